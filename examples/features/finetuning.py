"""Fine-tuning of the last blocks of a network behind a trained head, on cached maps of the blocks before them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from features.backbones import load_backbone
from features.heads import Head
from features.store import Bag, FeatureBags
from features.training import finite
from features.transform import Transform

#: The file of a run with the blocks before the fine-tuning.
BLOCKS = "blocks.pt"


class MapReader:
    """Reads the input of :class:`BlocksHead`: the maps before the trained blocks, and the features of other stages.

    Args:
        before: bags with the output of the stage before the trained blocks, B features.
        after: the bags that the head was trained on. Their first ``width`` features are the output of the blocks.
        names: names of the bags to read.
        width: number of features of the output of the blocks.
        frozen: blocks between ``before`` and the trained blocks, which are computed once.

    Attributes:
        inputs: B, the number of features before the trained blocks.

    Raises:
        ValueError: the bags are not maps of one size, or those of ``before`` and ``after`` differ in size.
    """

    def __init__(self, before: FeatureBags, after: FeatureBags, names: Sequence[str], width: int, frozen: nn.Module):
        self.before, self.after, self.width, self.frozen = before, after, width, frozen
        self.cache: dict[str, Tensor] = {}
        grids = {bags.shape(name).grid for name in names for bags in (before, after)}
        if len(grids) != 1 or None in grids:
            raise ValueError(f"fine-tuning: expected maps of one size, found {sorted(grids, key=str)}")
        (self.grid,) = grids
        self.inputs = self(names[0]).shape[1] - (after.features - width)

    def __call__(self, name: str) -> Tensor:
        """The B features before the blocks and those of the other stages, (L, B + D - width), float32."""
        if name not in self.cache:
            self.cache[name] = rows_of(name, self.before[name], self.after[name], self.width, self.frozen)
        return self.cache[name]


@torch.no_grad()
def rows_of(name: str, before: Bag, after: Bag, width: int, frozen: nn.Module) -> Tensor:
    """The rows of the bag ``name`` for :class:`BlocksHead`, (L, B + D - width). See :class:`MapReader`.

    Raises:
        ValueError: a feature is not finite.
    """
    others = torch.from_numpy(after.features[:, width:].astype(np.float32))
    rows = torch.cat([_applied(frozen, before.features, before.grid), others], 1)
    return finite(rows, name)


class BlocksHead(nn.Module):
    """Blocks of a network and a head behind them: instance logits (L, C) of the rows of :class:`MapReader`.

    The statistics of batch norm are constant. Without training, the logits are those of the head on stored features.

    Args:
        blocks: the last blocks of a network, B to ``width`` channels, with the stride 1. Without any, only the head
            changes.
        head: the trained head.
        transform: the transform of the features that the head was trained with.
        inputs: B.
        grid: rows and columns of the maps.
    """

    def __init__(self, blocks: nn.Module, head: Head, transform: Transform, inputs: int, grid: tuple[int, int]):
        super().__init__()
        self.blocks, self.head, self.inputs, self.grid = blocks.requires_grad_(True).eval(), head, inputs, grid
        self.register_buffer("mean", transform.mean)
        self.register_buffer("weight", transform.weight)

    def train(self, mode: bool = True) -> BlocksHead:
        super().train(mode)
        self.blocks.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, C) and the input of attention; L is a multiple of the number of cells of a map."""
        maps = x[:, : self.inputs].unflatten(0, (-1, *self.grid)).permute(0, 3, 1, 2)
        tuned = self.blocks(maps).permute(0, 2, 3, 1).flatten(0, 2)
        return self.head(Transform(self.mean, self.weight)(torch.cat([tuned, x[:, self.inputs :]], 1)))


def refuse_other_view(after: FeatureBags, before: FeatureBags) -> None:
    """Raises ValueError if blocks between the features ``before`` and ``after`` cannot be trained."""
    for bags in (after, before):
        if "backbone" not in bags.settings:
            raise ValueError(f"fine-tuning: expected features of extract_features.py, got {bags.folder}")
        if bags.settings.get("symmetric"):
            raise ValueError(f"fine-tuning: expected features without --symmetric, got {bags.folder}")
    for name in ("backbone", "weights", "output_stride"):
        values = [bags.settings.get(name) for bags in (after, before)]
        if values[0] != values[1]:
            option = name.replace("_", "-")
            raise ValueError(
                f"fine-tuning: expected the same --{option}, got {values[0]} in {after.folder} and {values[1]} in "
                f"{before.folder}"
            )


def load_blocks(name: str, weights: str, blocks: Sequence[str], output_stride: int | None = None) -> nn.Sequential:
    """The submodules ``blocks`` of a network of timm, one after the other.

    Raises:
        ValueError: an unknown network or block, weights that do not fit, or a vision transformer.
    """
    backbone = load_backbone(name, weights=weights, stages=blocks, output_stride=output_stride)
    if backbone.tokens is not None:
        raise ValueError(f"fine-tuning: expected a convolutional network, got {name}")
    return nn.Sequential(*(backbone.network.get_submodule(block) for block in blocks)).eval()


def split_blocks(blocks: nn.Sequential, count: int) -> tuple[nn.Sequential, nn.Sequential]:
    """The first ``count`` of ``blocks``, which stay frozen, and those that are trained."""
    return blocks[:count], nn.Sequential(*blocks[count:])


@torch.no_grad()
def width_of_output(blocks: nn.Module, inputs: int) -> int:
    """The number of features of the output of ``blocks`` for maps of ``inputs`` features."""
    return blocks(torch.zeros(1, inputs, 8, 8)).shape[1]


def width_of(blocks: nn.Module, before: FeatureBags, after: FeatureBags, names: Sequence[str]) -> int:
    """The number of features of the output of ``blocks``, the network's own ones.

    Raises:
        ValueError: ``blocks`` does not turn the maps ``names`` of ``before`` into the first features of ``after``.
    """
    try:
        width = width_of_output(blocks, before.features)
    except RuntimeError as error:  # the numbers of channels do not fit
        raise ValueError(_other_features(before, after) + f" ({error})") from None
    for name in names:
        refuse_other_image(blocks, width, before, after, name)
    return width


@torch.no_grad()
def refuse_other_image(blocks: nn.Module, width: int, before: FeatureBags, after: FeatureBags, name: str) -> None:
    """Raises ValueError unless ``blocks``, the network's own ones, turn a map of ``before`` into that of ``after``.

    Args:
        width: number of features of the output of ``blocks``.
    """
    for bags in (before, after):
        if name not in bags.names:
            raise ValueError(f"fine-tuning: {bags.folder} has no bag {name}")
        bags.instances(name)  # refuses a file with other settings
    one, two = before[name], after[name]
    if None in (one.grid, two.grid) or (one.grid, one.size) != (two.grid, two.size):
        raise ValueError(
            f"fine-tuning: expected maps of one size in {before.folder} and {after.folder}, got {one.grid} and "
            f"{two.grid} for {name}, of images of {one.size} and {two.size} pixels"
        )
    found, stored = _applied(blocks, one.features, one.grid), torch.from_numpy(two.features.astype(np.float32))
    stored = stored[:, :width]
    # the stored features have half precision
    if found.shape != stored.shape or not (found - stored).abs().mean() <= 0.02 * stored.abs().mean():
        raise ValueError(
            _other_features(before, after) + f"; {name} differs: other blocks, other weights, or another image"
        )


def _other_features(before: FeatureBags, after: FeatureBags) -> str:
    return (
        f"fine-tuning: expected that the blocks turn the features in {before.folder} into the first ones in "
        f"{after.folder}"
    )


def _applied(blocks: nn.Module, features: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The output (L, D) of ``blocks`` for the features (L, B) of a map."""
    x = torch.from_numpy(features.astype(np.float32)).T.unflatten(1, grid)[None]
    return blocks(x)[0].flatten(1).T
