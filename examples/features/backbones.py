"""Pretrained networks of timm and torchvision as extractors of feature maps."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from common.weights import read_weights
from images.pixels import MEAN, STD
from torch import Tensor, nn

from features.geometry import Geometry, effective_centre, geometry_of, rounded_up, stage_maps

TORCHVISION = "torchvision/"
#: The modules of timm whose networks are vision transformers: their stages give tokens.
TOKEN_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")


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

    @property
    def multiple(self) -> int:
        """The side of an image should be a multiple of so many pixels: the largest stride, or the side of a patch.

        With the padding of TensorFlow, the positions of the cells depend on the remainder of the side.
        """
        return self.tokens or max(geometry.stride for geometry in self.geometries)

    @cached_property
    @torch.no_grad()
    def absent(self) -> int:
        """The number of cells by which a line of the map is shorter than the image has strides: 0 with padding."""
        if self.tokens is not None:
            return 0
        side = rounded_up(self.size, self.multiple)
        (maps,) = stage_maps(self.network, self.stages[:1], torch.zeros(1, 3, side, side), None)
        return side // self.geometry.stride - maps.shape[2]

    def cells(self, symmetric: bool) -> Geometry:
        """The grid of the maps. ``symmetric``: of their mean over flips and rotations, the same from every edge."""
        if not symmetric:
            return self.geometry
        return self.geometry._replace(centre=(self.absent + 1) * self.geometry.stride / 2)

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
        return torch.cat([aligned(m, g, grid, size) for m, g in zip(maps, self.geometries, strict=True)], 1)


def aligned(maps: Tensor, own: Geometry, grid: Geometry, size: torch.Size) -> Tensor:
    """``maps`` with the geometry ``own``, resampled at the cells of ``grid``: (N, D, *size).

    Strides and centres may be fractions: at another scale of the image, they are divided by the scale.
    """
    if (own.stride, own.centre) == (grid.stride, grid.centre) and maps.shape[2:] == size:
        return maps
    blocks = max(int(grid.stride / own.stride + 1e-6), 1)
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
    with torch.random.fork_rng():
        torch.manual_seed(0)  # random weights are the same in every command
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
        near = difflib.get_close_matches(short, timm.list_models(), 5)
        raise ValueError(
            f"backbone: timm has no model {short!r}" + (f"; similar names: {', '.join(near)}" if near else "")
        )
    options = {} if output_stride is None else {"output_stride": output_stride}
    kind = timm.models.model_entrypoint(short.partition(".")[0]).__module__.rpartition(".")[2]
    is_tokens = kind in TOKEN_MODULES
    if is_tokens:
        options["dynamic_img_size"] = True
    try:
        network = timm.create_model(short, pretrained=pretrained, **options)
    except (TypeError, NotImplementedError, AssertionError, KeyError) as error:
        raise ValueError(f"output stride: {short} cannot have {output_stride} ({error})") from None
    except Exception as error:  # a download fails in many ways
        raise ValueError(f"weights: {short} could not be loaded ({error}); pass a file: --weights FILE") from None
    if getattr(network, "output_fmt", "NCHW") == "NHWC":
        raise ValueError(f"backbone: {short} is not supported: its maps have the features in the last dimension")
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
        raise ValueError(f"weights: {short} could not be loaded ({error}); pass a file: --weights FILE") from None
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


def stage_table(name: str) -> Iterator[str]:
    """The lines of a table of the stages of a model of timm: name, number, features, stride and receptive field.

    The receptive fields are measured line by line. This takes up to a minute for a large network.

    Raises:
        ValueError: timm is missing, or has no such model.
    """
    backbone = load_backbone(name, weights="none")
    network, size = backbone.network, backbone.size
    names, listed = stages_in(network), stage_names(network)
    with torch.no_grad():
        maps = stage_maps(network, names, torch.zeros(1, 3, size, size), backbone.tokens)
    width = max(map(len, ("stage", *names)))

    def line(stage: str, *cells: str) -> str:
        number, features, stride, field = cells
        return f"{stage:{width}}  {number:>6}  {features:>8}  {stride:>6}  {field}"

    yield line("stage", "number", "features", "stride", "receptive field in pixels")
    for stage, features in zip(names, maps, strict=True):
        geometry = geometry_of(network, stage, size, backbone.tokens)
        number = str(listed.index(stage)) if stage in listed else ""
        field = "the whole image" if geometry.field is None else str(geometry.field)
        yield line(stage, number, str(features.shape[1]), str(geometry.stride), field)


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
    state = read_weights(path)
    own = network.state_dict()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    head = tuple(f"{name}." for name in ("classifier", "fc", "head", "conv_head", "bn2", "head_dist"))
    state = {k: v for k, v in state.items() if not k.startswith(head) or (k in own and own[k].shape == v.shape)}
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor of another shape
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"weights: {path} does not fit {type(network).__name__}: {first}") from None
    missing = [key for key in missing if not key.startswith(head) and not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"weights: {path} does not fit {type(network).__name__}: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
