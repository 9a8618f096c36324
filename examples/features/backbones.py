"""Pretrained networks of timm and torchvision as extractors of feature maps, and the geometry of the maps."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from images.pixels import MEAN, STD
from torch import Tensor, nn

TORCHVISION = "torchvision/"


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


class Backbone(nn.Module):
    """A frozen network that turns images into one feature map: ``forward`` of (N, 3, H, W) gives (N, D, h, w).

    The outputs of the ``stages`` are concatenated on the grid of the first stage's map. Cells of the other maps are
    averaged or interpolated bilinearly so that all features of a cell have the same centre in the image.

    Args:
        network: the network. It is set to evaluation mode, and its parameters require no gradient.
        stages: names of submodules, as ``network.named_modules()`` gives them. The first one decides the grid. Nothing
            after the last stage is computed.
        mean, std: of the normalization of images in [0, 1], per channel.
        size: side in pixels of the images that the network was trained with.
        tokens: side of a patch in pixels where the stages give tokens (N, 1 + h w, D), as vision transformers do.
        trained: whether the weights are trained. If so, :func:`effective_centre` gives the positions of the cells.
    """

    mean: Tensor
    std: Tensor

    @property
    def geometry(self) -> Geometry:
        """The grid of the maps, and the largest receptive field of the stages."""
        fields = [geometry.field for geometry in self.geometries]
        return self.geometries[0]._replace(field=None if None in fields else max(fields))

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        tokens: int | None = None,
        trained: bool = False,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.stages = tuple(stages)
        self.size = size
        self.tokens = tokens
        self.geometries = [geometry_of(self.network, stage, size, tokens) for stage in self.stages]
        if trained and tokens is None:
            self.geometries = [
                g._replace(centre=effective_centre(self.network, stage, size, g.stride))
                for stage, g in zip(self.stages, self.geometries, strict=True)
            ]
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D, h, w) of images (N, 3, H, W) in [0, 1]."""
        return self.features((images - self.mean) / self.std)

    def features(self, x: Tensor) -> Tensor:
        """Features (N, D, h, w) of normalized images (N, 3, H, W)."""
        maps = stage_maps(self.network, self.stages, x, self.tokens)
        grid = self.geometries[0]
        size = maps[0].shape[2:]
        return torch.cat([_aligned(m, g, grid, size) for m, g in zip(maps, self.geometries, strict=True)], 1)


def stage_maps(network: nn.Module, stages: Sequence[str], x: Tensor, tokens: int | None) -> list[Tensor]:
    """The outputs (N, D, h, w) of ``stages`` for images (N, 3, H, W); nothing after the last of them is computed."""
    with _outputs(network, stages) as found, contextlib.suppress(_AllFoundError):
        network(x)
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


def _aligned(maps: Tensor, own: Geometry, grid: Geometry, size: torch.Size) -> Tensor:
    """``maps`` with the geometry ``own``, resampled at the cells of ``grid``: (N, D, *size)."""
    if (own.stride, own.centre) == (grid.stride, grid.centre) and maps.shape[2:] == size:
        return maps
    blocks = max(grid.stride // own.stride, 1)
    if blocks > 1:
        maps = F.avg_pool2d(maps, blocks, ceil_mode=True, count_include_pad=False)
        own = own._replace(stride=own.stride * blocks, centre=own.centre + own.stride * (blocks - 1) / 2)
    places = [
        ((torch.arange(n) * grid.stride + grid.centre - own.centre) / own.stride + 0.5) / k * 2 - 1
        for n, k in zip(size, maps.shape[2:], strict=True)
    ]
    y, x = torch.meshgrid(*places, indexing="ij")
    at = torch.stack([x, y], -1).to(maps).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=False)


def load_backbone(
    name: str,
    *,
    weights: str | Path = "pretrained",
    stages: Sequence[str] = (),
    cut: str | None = None,
    output_stride: int | None = None,
) -> Backbone:
    """A frozen network of timm, or a convolutional one of torchvision.

    Args:
        name: a model of timm, with or without ``timm/`` before it, or ``torchvision/NAME``, for example
            ``torchvision/squeezenet1_0``.
        weights: ``"pretrained"`` (downloaded), ``"none"`` (random), or a .safetensors, .pth or .pt file with a
            state dict of the network, without its classifier if need be. Half precision is converted to float32.
        stages: the stages whose outputs are concatenated: numbers in the list of the network's stages (0 = the first),
            or names of its submodules. Default: the last stage.
        cut: a single stage, after which the network ends. Cannot be combined with ``stages``.
        output_stride: 8, 16 or 32, for networks that timm can dilate.

    Raises:
        ValueError: an unknown name, stage or stride, a missing file, or weights that do not fit.
    """
    create = _create_torchvision if name.startswith(TORCHVISION) else _create_timm
    network, config, tokens = create(name, str(weights) == "pretrained", output_stride)
    if str(weights) not in ("pretrained", "none"):
        load_weights(network, Path(weights))
    if cut is not None and stages:
        raise ValueError("cut: expected cut or stages, got both; one stage is what cut means")
    wanted = [cut] if cut is not None else list(stages) or [str(len(stage_names(network)) - 1)]
    return Backbone(
        network,
        [stage_of(network, stage) for stage in wanted],
        config["mean"],
        config["std"],
        config["input_size"][-1],
        tokens,
        str(weights) != "none",
    )


def _create_timm(name: str, pretrained: bool, output_stride: int | None) -> tuple[nn.Module, dict, int | None]:
    """A network of timm, its configuration, and the side of a patch of a vision transformer."""
    timm = import_timm()
    short = name.removeprefix("timm/")
    if not timm.is_model(short.partition(".")[0]):
        near = timm.list_models(f"*{short[:6]}*")[:5]
        raise ValueError(
            f"backbone: timm has no model {short!r}" + (f"; similar names: {', '.join(near)}" if near else "")
        )
    options = {} if output_stride is None else {"output_stride": output_stride}
    is_tokens = "vit" in short.partition(".")[0]
    if is_tokens:
        options["dynamic_img_size"] = True
    try:
        network = timm.create_model(short, pretrained=pretrained, **options)
    except (TypeError, NotImplementedError, AssertionError, KeyError) as error:
        raise ValueError(f"output stride: {short} cannot have {output_stride} ({error})") from None
    except Exception as error:  # a download fails in many ways
        raise ValueError(f"weights: {short} could not be loaded ({error}); pass a file, or 'none'") from None
    return network, network.pretrained_cfg, network.patch_embed.patch_size[0] if is_tokens else None


def _create_torchvision(name: str, pretrained: bool, output_stride: int | None) -> tuple[nn.Module, dict, None]:
    """A network of torchvision, and a configuration as that of timm. Its stages are the names of submodules."""
    from common.import_torchvision import import_torchvision

    import_torchvision()
    from torchvision import models

    short = name.removeprefix(TORCHVISION)
    if output_stride is not None:
        raise ValueError(f"output stride: expected a network of timm, got {name}")
    try:
        network = models.get_model(short, weights="DEFAULT" if pretrained else None)
    except ValueError:
        near = [known for known in models.list_models(module=models) if known[:4] == short[:4]][:5]
        raise ValueError(
            f"backbone: torchvision has no model {short!r}" + (f"; similar names: {', '.join(near)}" if near else "")
        ) from None
    except Exception as error:  # a download fails in many ways
        raise ValueError(f"weights: {short} could not be loaded ({error}); pass a file, or 'none'") from None
    return network, {"mean": MEAN, "std": STD, "input_size": (3, 224, 224)}, None


def import_timm():
    """Imports timm, also if the operators of torchvision do not match the installed torch."""
    from common.import_torchvision import import_torchvision

    import_torchvision()
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError("backbone: timm is not installed: pip install timm") from None
    return timm


def stage_names(network: nn.Module) -> list[str]:
    """The names of the submodules that timm lists as the stages of a network. torchvision: the layers in order."""
    info = getattr(network, "feature_info", None)
    layers = getattr(network, "features", None)
    if not info and isinstance(layers, nn.Sequential):
        return [f"features.{name}" for name, _ in layers.named_children()]
    names = [str(entry["module"]) for entry in info] if info else []
    known = dict(network.named_modules())
    return [name for name in names if name in known] or [name for name, _ in network.named_children()]


def stages_in(network: nn.Module) -> list[str]:
    """The names of the stages that timm lists, and of the modules beside them: blocks.3 of an EfficientNet, too."""
    listed = stage_names(network)
    parents = {name.rpartition(".")[0] for name in listed if "." in name}
    return [
        name for name, _ in network.named_modules() if name in listed or (name and name.rpartition(".")[0] in parents)
    ]


def stage_table(name: str) -> str:
    """The stages of a model of timm as a text table: name, number, features, stride and receptive field.

    Raises:
        ValueError: timm is missing, or has no such model.
    """
    backbone = load_backbone(name, weights="none")
    network, size = backbone.network, backbone.size
    names, listed = stages_in(network), stage_names(network)
    with torch.no_grad():
        maps = stage_maps(network, names, torch.zeros(1, 3, size, size), backbone.tokens)
    rows = [("stage", "number", "features", "stride", "receptive field in pixels")]
    for stage, features in zip(names, maps, strict=True):
        geometry = geometry_of(network, stage, size, backbone.tokens)
        number = str(listed.index(stage)) if stage in listed else ""
        field = "the whole image" if geometry.field is None else str(geometry.field)
        rows.append((stage, number, str(features.shape[1]), str(geometry.stride), field))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:{width}}  {row[1]:>6}  {row[2]:>8}  {row[3]:>6}  {row[4]}" for row in rows)


def field_warning(field: float | None, width: int, height: int) -> str | None:
    """A warning if the receptive field of a cell exceeds an image of ``width`` x ``height`` pixels; else None.

    Args:
        field: its side in pixels; None: unknown, or the whole image.
    """
    if field is None or field <= min(width, height):
        return None
    return (
        f"warning: the receptive field of a cell, {field:g} pixels, exceeds the image of {width}x{height} pixels. "
        "Cells far from an object also respond to it, and boxes become too large. Choose an earlier stage, or larger "
        "images"
    )


def stage_of(network: nn.Module, stage: str) -> str:
    """The name of the submodule for a stage, given as a number or a name."""
    names = stage_names(network)
    if stage.isdigit() and int(stage) < len(names):
        return names[int(stage)]
    if stage and stage in dict(network.named_modules()):
        return stage
    raise ValueError(
        f"stage: expected one of {', '.join(stages_in(network))}, or 0 to {len(names) - 1} ({', '.join(names)}), or "
        f"the name of another submodule, got {stage!r}; extract_features.py --list-stages prints their receptive fields"
    )


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads a state dict into ``network``. The classifier, and the last convolution before it, may be missing."""
    if not path.is_file():
        raise ValueError(f"weights: expected 'pretrained', 'none' or a file, got {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError:
            raise ValueError("weights: safetensors is not installed: pip install safetensors") from None
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    own = network.state_dict()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    head = tuple(f"{name}." for name in ("classifier", "fc", "head", "conv_head", "bn2", "head_dist"))
    state = {k: v for k, v in state.items() if not k.startswith(head) or (k in own and own[k].shape == v.shape)}
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.startswith(head) and not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"weights: {path} does not fit {type(network).__name__}: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )


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
    geometry = _measured(probe, stage, size, tokens)
    for factor in (2, 4, 8):
        if geometry.field is None and tokens is None:
            geometry = _measured(probe, stage, factor * size, tokens)
    return geometry


def effective_centre(network: nn.Module, stage: str, size: int, stride: int, draws: int = 16) -> float:
    """The centre of the effective receptive field of the first cell, in pixels from the edge of the image.

    It is the mean position of the squared gradient of a cell's features, in random directions, with respect to an image
    of noise. It may be far from the middle of the receptive field. An example is EfficientNet-Lite0 with the uneven
    padding of TensorFlow at a stride of 16: the middle is at 15.5 pixels, the effective centre at 10.

    Args:
        size: side in pixels of the images that the network was trained with. The image of noise is twice as large.
        stride: the stride of the map.
        draws: number of random pairs of a direction and a cell in the middle third of the map.
    """
    generator = torch.Generator().manual_seed(0)
    side = 2 * size
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
    strip = torch.ones(1, 3, side, 64, dtype=torch.float64, requires_grad=True)
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
