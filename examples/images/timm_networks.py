"""Convolutional networks of timm as trainable backbones: ``timm/NAME``, optionally up to a stage or on a finer grid."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from common.weights import read_weights
from features.backbones import import_timm
from features.geometry import Geometry, geometry_of
from torch import Tensor, nn

from images.pixels import MEAN, STD

PREFIX = "timm/"


class Defaults(NamedTuple):
    """Properties of a network in timm.

    Attributes:
        stride: pixels from one cell to the next in the map of the stage, without dilation.
        image_size: side in pixels of the images that its weights were trained with.
        stages: the number of stages.
        modules: the name of the last module of each stage.
    """

    stride: int
    image_size: int
    stages: int
    modules: tuple[str, ...]


def defaults_of(name: str, cut: int | None) -> Defaults:
    """The properties of ``timm/NAME`` up to stage ``cut``, without loading its weights.

    Raises:
        ValueError: timm is missing, or has no such network or stage.
    """
    with torch.device("meta"):
        network = _create(name, None, None)
    info = network.feature_info
    stages = len(info.channels())
    if cut is not None and not 0 <= cut < stages:
        raise ValueError(f"cut: {name} has the stages 0 to {stages - 1}, got {cut}")
    stage = stages - 1 if cut is None else cut
    timm = import_timm()
    size = timm.get_pretrained_cfg(name.removeprefix(PREFIX), allow_unregistered=True)
    side = size.input_size[-1] if size is not None else 224
    return Defaults(info.reduction()[stage], side, stages, tuple(info.module_name()))


class TimmFeatures(nn.Module):
    """Features (n, D, h, w) of images (n, 3, H, W) that are normalized as in images.pixels.

    The module converts the images to the mean and standard deviation that the network was trained with.

    Args:
        name: ``timm/NAME``.
        cut: number of the last stage, 0 for the first; None: all stages. The module does not contain later layers.
        output_stride: pixels from one cell to the next. If it is below that of the stage, timm dilates the network.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, cut: int | None, output_stride: int):
        super().__init__()
        defaults = defaults_of(name, cut)
        if output_stride > defaults.stride:
            raise ValueError(
                f"output stride: expected up to {defaults.stride} at this stage of {name}, got {output_stride}"
            )
        stage = defaults.stages - 1 if cut is None else cut
        self.network = _create(name, (stage,), output_stride if output_stride < defaults.stride else None)
        self.stage_modules = defaults.modules
        (self.channels,) = self.network.feature_info.channels()
        config = self.network.pretrained_cfg if hasattr(self.network, "pretrained_cfg") else {}
        mean, std = (torch.tensor(config.get(key, given)) for key, given in (("mean", MEAN), ("std", STD)))
        self.register_buffer("scale", (torch.tensor(STD) / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((torch.tensor(MEAN) - mean) / std).view(3, 1, 1), persistent=False)

    def freeze(self, stages: int) -> None:
        """Excludes the first ``stages`` stages, and the layers before them, from the training."""
        if not stages:
            return
        last = self.stage_modules[stages - 1]
        listed = list(self.network.named_modules())
        names = [name for name, _ in listed]
        last = last if last in names else last.replace(".", "_")  # timm flattens the stages of some networks
        end = max(i for i, name in enumerate(names) if name == last or name.startswith(f"{last}."))
        for _, module in listed[: end + 1]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        (features,) = self.network(x * self.scale + self.shift)
        return features


@lru_cache(maxsize=16)
def timm_geometry(name: str, cut: int | None, output_stride: int) -> Geometry:
    """The grid and the receptive field of ``TimmFeatures(name, cut, output_stride)``; None if above 1024 pixels."""
    with torch.random.fork_rng():
        probe = nn.Sequential(TimmFeatures(name, cut, output_stride), nn.Identity())
    return geometry_of(probe.eval(), "1", 128)


def _create(
    name: str, stages: tuple[int, ...] | None, output_stride: int | None, pretrained: bool = False
) -> nn.Module:
    timm = import_timm()
    short = name.removeprefix(PREFIX)
    if not timm.is_model(short.partition(".")[0]):
        near = difflib.get_close_matches(short, timm.list_models(), 5)
        raise ValueError(f"backbone: timm has no model {short!r}" + (f"; similar: {', '.join(near)}" if near else ""))
    options = {} if stages is None else {"out_indices": stages}
    if output_stride is not None:
        options["output_stride"] = output_stride
    try:
        return timm.create_model(short, features_only=True, pretrained=pretrained, **options)
    except (TypeError, NotImplementedError, AssertionError, KeyError, AttributeError) as error:
        wanted = "has no feature maps" if output_stride is None else f"cannot have an output stride of {output_stride}"
        raise ValueError(f"backbone: {short} {wanted} in timm ({error})") from None


def load_timm_weights(features: TimmFeatures, name: str, weights: str) -> None:
    """Loads initial weights into ``features``, as float32.

    Args:
        weights: ``"imagenet"`` (downloaded by timm), or a .safetensors, .pth or .pt file. It must contain every weight
            of the module. Other weights, of the classifier and of later stages, are ignored.

    Raises:
        ValueError: no such file, a failed download, or weights that do not fit.
    """
    if weights == "imagenet":
        try:
            state = _create(name, tuple(features.network.feature_info.out_indices), None, pretrained=True).state_dict()
        except Exception as error:  # a download fails in many ways
            raise ValueError(f"weights: {name} could not be loaded ({error}); pass a file: --weights FILE") from None
    else:
        path = Path(weights)
        if not path.is_file():
            raise ValueError(f"weights: expected 'none', 'imagenet' or a file, got {weights!r}")
        state = read_weights(path)
    prefix = "features.network."  # of a checkpoint of train_cxr.py
    found = {
        key.removeprefix(prefix): value.float() if value.is_floating_point() else value for key, value in state.items()
    }
    own = features.network.state_dict()
    absent = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    other = [key for key in own if key in found and found[key].shape != own[key].shape]
    if absent or other:
        raise ValueError(
            f"weights: {weights} does not fit {name}: {len(absent)} of {len(own)} are missing, e.g. {absent[:2]}, "
            f"{len(other)} have another shape, e.g. {other[:2]}"
        )
    features.network.load_state_dict({key: found[key] for key in own if key in found}, strict=False)
