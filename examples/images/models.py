"""Networks with one logit per class and patch: (n, 3, height, width) to (n, classes, height / s, width / s).

The ResNets and DenseNet-121 of torchvision have large receptive fields, which cover most of the image. The local
networks have a small receptive field of a known size (as BagNets: Brendel & Bethge, ICLR 2019).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common.import_torchvision import import_torchvision
from common.weights import read_weights
from features.backbones import field_warning
from torch import Tensor, nn

from images.backbones import BACKBONES, STRIDES, THREES, TORCHVISION
from images.timm_networks import PREFIX, TimmFeatures, load_timm_weights, timm_geometry


class Grid(NamedTuple):
    """The positions of the cells of a map along either side, in pixels from the edge of the network's input.

    ``centre``: the centre of the first cell; the centre of the first pixel is 0.5. ``step``: the distance between
    cells.
    """

    centre: float
    step: float


class PatchClassifier(nn.Module):
    """A backbone and a 1x1 convolution: logits (n, classes, height / s, width / s) of images (n, 3, height, width).

    ``grid``: the positions of the cells.
    """

    def __init__(self, backbone: str, output_stride: int, classes: int, cut: int | None = None):
        super().__init__()
        self.features, channels = make_backbone(backbone, output_stride, cut)
        self.head = nn.Conv2d(channels, classes, 1)
        self.field: int | None = None  # side of the receptive field of a patch in pixels, if known
        if isinstance(self.features, TimmFeatures):
            geometry = timm_geometry(backbone, cut, output_stride)
            self.grid, self.field = Grid(geometry.centre, geometry.stride), geometry.field
        else:
            self.grid = grid_of(self.features)
            if isinstance(self.features, LocalNet):
                self.field = self.features.receptive_field

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def description(self, image_size: int) -> str:
        """The stride, the grid and the receptive field of the map of an image of ``image_size`` pixels, as text."""
        stride = int(self.grid.step)
        side = image_size // stride
        field = "most of the image" if self.field is None else f"{self.field} pixels"
        warning = field_warning(self.field, image_size, image_size)
        return f"stride {stride}, a grid of {side}x{side} patches, receptive field of a patch: {field}" + (
            "" if warning is None else f"\n{warning}"
        )


def grid_of(features: nn.Module) -> Grid:
    """The grid of a network, computed from its layers in the order of their names.

    A layer has kernel size k, dilation d and padding p. Its window is centred d (k - 1) / 2 - p inputs after the
    position of the output. With the even padding of torchvision's 3x3 and 7x7 convolutions, this offset is 0: a stride
    keeps the centre of the first position. The 2x2 averages in a DenseNet's transitions move the centre by half a step.
    """
    centre, step = 0.5, 1
    for name, layer in features.named_modules():
        if {"downsample", "change"} & set(name.split(".")):  # a shortcut has the same geometry
            continue
        if isinstance(layer, LocalNet):
            centre -= layer.before * step
        elif isinstance(layer, DilatedPool):
            centre += layer.dilation / 2 * step
        elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            size, stride, padding, dilation = (
                value if isinstance(value, int) else value[0]
                for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))
            )
            centre += (dilation * (size - 1) / 2 - padding) * step
            step *= stride
    return Grid(centre, step)


def make_backbone(name: str, output_stride: int, cut: int | None = None) -> tuple[nn.Module, int]:
    """A network without head, with random weights, and the number of its channels.

    ``timm/NAME`` is a network of timm; ``cut`` keeps it up to that stage.

    ``local9`` to ``local65`` are small networks for training from random weights. ``bagnet9`` to ``bagnet65`` are as
    deep and wide as a ResNet-50. The number is the receptive field in pixels. Their stride is 8 or 16.
    """
    if name.startswith(PREFIX):
        features = TimmFeatures(name, cut, output_stride)
        return features, features.channels
    if cut is not None:
        raise ValueError(f"cut: expected a backbone of timm, got {name!r}")
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected timm/NAME or one of {', '.join(BACKBONES)}, got {name!r}")
    if output_stride not in STRIDES:
        raise ValueError(f"output stride: expected 32, 16 or 8, got {output_stride}")
    if name not in TORCHVISION:
        kind, field = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
        local = kind == "local"
        network = LocalNet(
            int(field),
            output_stride,
            Plain if local else Bottleneck,
            (32, 64, 128, 192) if local else (256, 512, 1024, 2048),
            (2, 2, 2, 2) if local else (3, 4, 6, 3),
        )
        return network, network.channels
    import_torchvision()
    from torchvision import models

    network = getattr(models, name)()
    features = nn.Sequential()  # under torchvision's names, so that its weights fit
    if name == "densenet121":
        channels = network.classifier.in_features
        for key, part in network.features.named_children():
            features.add_module(key, part)
        features.add_module("relu", nn.ReLU())
        stages = [[features.transition2, features.denseblock3], [features.transition3, features.denseblock4]]
    else:
        channels = network.fc.in_features
        for key, part in network.named_children():
            if key not in ("avgpool", "fc"):
                features.add_module(key, part)
        stages = [[features.layer3], [features.layer4]]
    keep_resolution(stages[STRIDES.index(16) + 1 - STRIDES.index(output_stride) :])
    return features, channels


def keep_resolution(stages: list[list[nn.Module]]) -> None:
    """Removes the stride of each stage and dilates the following layers, in place ("a trous").

    At the positions of the original outputs, the network computes the same values.
    """
    dilation = 1
    for stage in stages:
        for part in stage:
            for module in list(part.modules()):
                if isinstance(module, nn.Conv2d):
                    if module.kernel_size == (3, 3):
                        # the layer with the stride has the dilation of the layers before it, later layers twice that
                        module.dilation = (dilation if module.stride == (2, 2) else 2 * dilation,) * 2
                        module.padding = module.dilation
                    module.stride = (1, 1)
                elif hasattr(module, "pool"):  # a transition of a DenseNet
                    module.pool = DilatedPool(dilation)
        dilation *= 2


class DilatedPool(nn.Module):
    """At every pixel, the mean of 2x2 pixels at a distance of ``dilation``. The edge pixels are repeated beyond the
    edge."""

    def __init__(self, dilation: int):
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = F.pad(x, (0, d, 0, d), mode="replicate")
        x = x[..., :-d] + x[..., d:]
        return 0.25 * (x[..., :-d, :] + x[..., d:, :])


class Plain(nn.Module):
    """A residual block of two convolutions. The first one may be 3x3 and have a stride."""

    def __init__(self, inward: int, outward: int, size: int, stride: int):
        super().__init__()
        self.border = size // 2  # pixels that the 3x3 removes from each side
        self.stride = stride
        self.change = nn.Conv2d(inward, outward, 1, bias=False) if inward != outward or stride > 1 else nn.Identity()
        self.convolutions = self.make(inward, outward, size, stride)

    @staticmethod
    def make(inward: int, outward: int, size: int, stride: int) -> nn.Sequential:
        return nn.Sequential(*convolution(inward, outward, size, stride), *convolution(outward, outward)[:-1])

    def forward(self, x: Tensor) -> Tensor:
        b, s = self.border, self.stride
        shortcut = x[..., b : x.shape[-2] - b : s, b : x.shape[-1] - b : s]
        return F.relu(self.change(shortcut) + self.convolutions(x))


class Bottleneck(Plain):
    """A residual block with a bottleneck, as in a ResNet-50."""

    @staticmethod
    def make(inward: int, outward: int, size: int, stride: int) -> nn.Sequential:
        middle = outward // 4
        return nn.Sequential(
            *convolution(inward, middle),
            *convolution(middle, middle, size, stride),
            *convolution(middle, outward)[:-1],
        )


def convolution(inward: int, outward: int, size: int = 1, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inward, outward, size, stride, bias=False), nn.BatchNorm2d(outward), nn.ReLU()]


class LocalNet(nn.Module):
    """A residual network. Each cell lies in the middle of its receptive field of ``receptive_field`` pixels.

    Only the image is padded, not the layers. So the output of a patch does not depend on its position, except at the
    border of the image.
    """

    def __init__(
        self,
        receptive_field: int,
        output_stride: int,
        block: type[Plain],
        widths: tuple[int, ...],
        depths: tuple[int, ...],
    ):
        super().__init__()
        if output_stride not in (8, 16) or receptive_field < output_stride:
            raise ValueError(
                f"output stride: expected 8{' or 16' if receptive_field > 16 else ''} for a local backbone of "
                f"{receptive_field} pixels, got {output_stride}"
            )
        first = widths[0] // 4 if block is Bottleneck else widths[0]
        layers = convolution(3, first, 3)
        field, jump, channels = 3, 1, first
        for stage, (width, depth, threes) in enumerate(zip(widths, depths, THREES[receptive_field], strict=True)):
            for number in range(depth):
                size = 3 if number < threes else 1
                # the fourth stride comes last, where it does not change the receptive field
                halves = number == 0 if stage < 3 else number == depth - 1 and output_stride == 16
                stride = 2 if halves else 1
                layers.append(block(channels, width, size, stride))
                field += (size - 1) * jump
                jump *= stride
                channels = width
        assert (field, jump) == (receptive_field, output_stride)
        self.layers = nn.Sequential(*layers)
        self.channels = channels
        self.receptive_field = receptive_field
        self.stride = jump
        self.before = (field - jump) // 2
        self.after = field - jump - self.before

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(F.pad(x, (self.before, self.after) * 2))


def load_weights(model: PatchClassifier, backbone: str, weights: str) -> None:
    """Loads initial weights into ``model``.

    Args:
        weights: ``"none"``, ``"imagenet"`` (downloaded by torchvision), or a file with a state_dict. The weights of a
            classifier in the file are ignored. All other weights must fit.

    Raises:
        ValueError: there is no such file, the download fails, or the weights do not fit.
    """
    if weights == "none":
        return
    if backbone.startswith(PREFIX):
        load_timm_weights(model.features, backbone, weights)
        return
    if weights == "imagenet":
        if backbone not in TORCHVISION:
            raise ValueError(f"weights: {backbone} has no ImageNet weights; give a file, or 'none'")
        import_torchvision()
        from torchvision import models

        try:
            state = getattr(models, backbone)(weights="IMAGENET1K_V1").state_dict()
        except Exception as error:  # a truncated file raises many types
            where = Path(torch.hub.get_dir(), "checkpoints")
            raise ValueError(
                f"weights: could not be downloaded, or are truncated in {where} ({error}); give a file, or 'none'"
            ) from None
    else:
        path = Path(weights)
        if not path.is_file():
            raise ValueError(f"weights: expected 'none', 'imagenet' or a file, got {weights!r}")
        state = read_weights(path)
    found = {}
    for key, value in state.items():
        key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])", r"\1\2", key)  # key names of older files
        if not key.startswith(("fc.", "classifier.", "head.")):
            found[key.removeprefix("features.")] = value
    try:
        model.features.load_state_dict(found)
    except RuntimeError as error:
        details = str(error).partition("\n")[2].strip()  # without the class name
        more = " ..." if len(details) > 300 else ""
        raise ValueError(f"weights: {weights} does not fit {backbone}: {details[:300]}{more}") from None
