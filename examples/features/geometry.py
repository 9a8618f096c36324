"""The outputs of the stages of a network, and their geometry: stride, position and receptive field of the cells."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Geometry(NamedTuple):
    """The position and the receptive field of the cells of a feature map, in pixels of the network's input.

    Attributes:
        stride: the distance between the centres of neighbouring cells.
        centre: the centre of the first cell from the edge of the image; the first pixel covers 0 to 1.
        field: the side of the receptive field of a cell. None: a cell depends on the whole image, or unknown.
    """

    stride: int
    centre: float
    field: int | None


def rounded_up(n: int, step: int) -> int:
    """The smallest multiple of ``step`` that is at least ``n``."""
    return -(-n // step) * step


def stage_maps(network: nn.Module, stages: Sequence[str], x: Tensor, tokens: int | None) -> list[Tensor]:
    """The outputs (N, D, h, w) of ``stages`` for images (N, 3, H, W); nothing after the last of them is computed."""
    with _outputs(network, stages) as found, contextlib.suppress(_AllFoundError):
        try:
            network(x)
        except AssertionError as error:  # timm: the network takes images of one size only
            size = " x ".join(map(str, x.shape[2:]))
            raise ValueError(f"backbone: this network does not take images of {size} pixels: {error}") from None
    return [_as_map(found[name], x, tokens) for name in stages]


def _as_map(output: Tensor, x: Tensor, tokens: int | None) -> Tensor:
    if output.dim() == 4:
        return output
    if output.dim() != 3 or tokens is None:
        raise ValueError(f"stage: expected a feature map (N, D, h, w) or tokens (N, L, D), got {tuple(output.shape)}")
    h, w = (n // tokens for n in x.shape[2:])
    return output[:, output.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w))


class _AllFoundError(Exception):
    """Raised to end a forward pass after the last stage."""


@contextlib.contextmanager
def _outputs(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of submodules by name, filled during a forward pass. The pass ends after the last of them."""
    found: dict[str, Tensor] = {}
    modules = dict(network.named_modules())

    def keep(name: str, output: Tensor) -> None:
        found[name] = output
        if len(found) == len(set(names)):
            raise _AllFoundError

    hooks = [
        modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name in set(names)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def geometry_of(network: nn.Module, stage: str, size: int, tokens: int | None = None) -> Geometry:
    """The geometry of the map of ``stage``, measured by gradients.

    A copy of the network computes in float64 with small positive weights, averages instead of maxima and neutral
    normalization. The gradient of a cell with respect to an input pixel is then positive if the pixel is in the
    receptive field of the cell, and exactly 0 otherwise. The image is a narrow strip, which is enough for one
    direction.

    Args:
        size: side in pixels of the images that the network was trained with. The strip is up to eight times as long.
        tokens: side of a patch of a vision transformer.
    """
    probe = copy.deepcopy(network).double().eval()
    _make_positive(probe)
    if tokens is not None:
        return _measured(probe, stage, rounded_up(size, tokens), tokens)
    for side in (size, 2 * size, 4 * size, 8 * size):
        geometry = _measured(probe, stage, side, None)
        if geometry.field is not None and side % geometry.stride:
            # With the padding of TensorFlow, the position depends on the side. Images are extended to a multiple.
            geometry = _measured(probe, stage, rounded_up(side, geometry.stride), None)
        if geometry.field is not None:
            break
    return geometry


def effective_centre(network: nn.Module, stage: str, size: int, stride: int, draws: int = 16) -> float:
    """The centre of the effective receptive field of the first cell, in pixels from the edge of the image.

    It is the mean position of the squared gradient of a cell's features, in random directions, with respect to an image
    of noise. It may be far from the middle of the receptive field. An example is EfficientNet-Lite0 with the uneven
    padding of TensorFlow at a stride of 16: the middle is at 15.5 pixels, the effective centre at 10.

    Args:
        size: side in pixels of the images that the network was trained with. The image of noise is twice as large,
            rounded up to a multiple of the stride.
        stride: the stride of the map.
        draws: number of random pairs of a direction and a cell in the middle third of the map.
    """
    generator = torch.Generator().manual_seed(0)
    side = rounded_up(2 * size, stride)
    noise = torch.randn(1, 3, side, side, generator=generator).requires_grad_()
    with torch.enable_grad():
        (maps,) = stage_maps(network, [stage], noise, None)
    pixels = torch.arange(side) + 0.5
    centres = []
    for _ in range(draws):
        cell = [
            int(torch.randint(n // 3, max(2 * n // 3, n // 3 + 1), (1,), generator=generator)) for n in maps.shape[2:]
        ]
        direction = torch.randn(maps.shape[1], generator=generator)
        (gradient,) = torch.autograd.grad(maps[0, :, cell[0], cell[1]] @ direction, noise, retain_graph=True)
        energy = gradient[0].square().sum(0)
        for axis, number in enumerate(cell):
            along = energy.sum(1 - axis)
            centres.append(float((along * pixels).sum() / along.sum()) - number * stride)
    return sum(centres) / len(centres)


def _measured(probe: nn.Module, stage: str, side: int, tokens: int | None) -> Geometry:
    """The geometry along a strip of ``side`` pixels. ``field`` is None if that of a middle cell reaches an end."""
    strip = torch.ones(1, 3, side, rounded_up(64, tokens or 1), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (cells,) = stage_maps(probe, [stage], strip, tokens)
    cells = cells[0].sum(0)
    middle, column = len(cells) // 2, cells.shape[1] // 2
    stride = round(side / len(cells))
    fields = []
    for row in (middle, middle - 1):
        (gradient,) = torch.autograd.grad(cells[row, column], strip, retain_graph=True)
        seen = gradient[0].abs().sum((0, 2)).nonzero()
        if not len(seen) or seen[0] == 0 or seen[-1] + 1 == side:
            return Geometry(stride, stride / 2, None)
        fields.append((int(seen[0]), int(seen[-1]) + 1))
    (low, high), (before, _) = fields
    stride = low - before  # without padding, the map has fewer cells than the strip has strides
    return Geometry(stride, (low + high) / 2 - middle * stride, high - low)


@torch.no_grad()
def _make_positive(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
            elif isinstance(child, nn.LayerNorm):  # over the channels of a cell; equal values would give no gradient
                setattr(module, name, nn.Identity())
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.fill_(0.5 / module.weight[0].numel())  # sums below 1: ReLU6 is never saturated
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            if module.affine:
                module.weight.fill_(1.0)
                module.bias.zero_()
