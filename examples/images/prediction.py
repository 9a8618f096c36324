"""Predictions of a network: probabilities of images, and maps of (image, class) pairs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common.choices import Config
from common.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader

from images.cache import open_cache
from images.dataset import Index
from images.frames import cell_mask
from images.items import LabelledImages
from images.pixels import to_input
from sgl_ops.localization import seen_cells, upsample
from sgl_ops.pooling import make_pooling


def is_padded(frame: np.ndarray, side: int) -> bool:
    """Whether the content ``frame`` (4,) is smaller than the square of ``side`` pixels."""
    return tuple(frame) != (0, 0, side, side)


def content_of(
    heatmap: np.ndarray, frame: np.ndarray, side: int, upsampling: str, first: float
) -> tuple[np.ndarray, tuple[int, int], float]:
    """A map over the content without padding, its size in pixels, and the centre of the first cell.

    With padding, the map is first upsampled to pixels, because its cells may not be aligned with the content.

    Args:
        heatmap: the map (h, w) over a square of ``side`` pixels.
        frame: (4,), the content: x, y, width, height in pixels of the square.
        first: the centre of the map's first cell, in cells from the edge of the square.
    """
    size = (side, side)
    if not is_padded(frame, side):
        return heatmap, size, first
    x, y, w, h = frame
    return upsample(heatmap, size, upsampling, first)[y : y + h, x : x + w], (int(h), int(w)), 0.5


class Predictions(NamedTuple):
    """Probabilities (n, C) of the images and of their largest patches, and the k maps (h, w) of the pairs.

    ``frames`` (k, 4): the content of the pairs' images in the network's square of ``side`` pixels; cells of padding
    are 0 in the maps. ``first``: the centre of a map's first cell, in cells from the edge of the square.
    """

    probability: np.ndarray
    peak: np.ndarray
    maps: list[np.ndarray]
    first: float
    frames: np.ndarray
    side: int

    def padded(self, k: int) -> bool:
        return is_padded(self.frames[k], self.side)

    def content(self, k: int, upsampling: str) -> tuple[np.ndarray, tuple[int, int], float]:
        """The map of pair ``k`` over its content without padding, the size in pixels, and the centre of the first cell.

        See content_of.
        """
        return content_of(self.maps[k], self.frames[k], self.side, upsampling, self.first)

    def square_maps(self, upsampling: str) -> tuple[list[np.ndarray], float]:
        """Maps over the square, with the smallest content value in the padding, and the centre of the first cell.

        MaxBoxAcc scales each map to 0 ... 1, so no threshold then selects padding.
        """
        if not any(self.padded(k) for k in range(len(self.maps))):
            return self.maps, self.first
        maps = []
        for k in range(len(self.maps)):
            part, (h, w), first = self.content(k, upsampling)
            part = part if self.padded(k) else upsample(part, (h, w), upsampling, first)
            whole = np.full((self.side, self.side), part.min())
            x, y = self.frames[k, :2]
            whole[y : y + h, x : x + w] = part
            maps.append(whole)
        return maps, 0.5


def name_of(config: Config) -> str:
    """The name of a run in tables and reports. SGL without instance loss and penalty is the bag loss."""
    if config["loss"] == "sgl" and config.get("lam") == 0 and config.get("mask_weight") == 0:
        return name_of({**config, "loss": "bag"})
    loss = {"sgl": "SGL", "bag": "bag loss", "bil": "BIL", "mmm": "MMM"}.get(config["loss"], str(config["loss"]))
    return f"{loss}, {config['pooling']} pooling"


def whole_images(config: Config, index: Index, cache: Path | None = None) -> LabelledImages:
    """The images of the index as the network of ``config`` takes them. ``cache``: a folder of decoded images."""
    size, loading = config["image_size"], {"channels": config["channels"], "fit": config["fit"]}
    images = index.paths if cache is None else open_cache(cache, index.paths, size, **loading)
    return LabelledImages(images, index.labels, size, sizes=index.sizes, **loading)


def first_cell(model: torch.nn.Module, raster: str) -> float:
    """The centre of the first cell of the maps, in cells from the edge of the image. ``raster``: as ``--raster``."""
    centre, step = model.grid
    return 0.5 if raster == "even" else centre / step


def apply(
    model: torch.nn.Module, config: Config, images: Tensor, frames: np.ndarray, classes: Sequence[str], device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (b, C) of images, and their maps (b, C, h, w). Cells of padding are 0 in the maps.

    Args:
        images: (b, side, side[, 3]) uint8.
        frames: (b, 4), the content of the images in the square.
        classes: the classes of the network, in the order of the result.
    """
    order = [config["classes"].index(name) for name in classes]
    with torch.inference_mode():
        # float64: in float32, all logits above 17 have the same probability, and the maximum would be ambiguous
        logits = model(to_input(images.to(device))).double()[:, order]
        mask = None
        if config["fit"] == "pad":
            mask = cell_mask(frames, tuple(logits.shape[2:]), *model.grid)
        cells = None if mask is None else torch.from_numpy(mask).to(logits.device)
        probability = torch.sigmoid(make_pooling(config["pooling"])(logits, mask=cells)).cpu().numpy()
        maps = torch.sigmoid(logits).cpu().numpy()
    return probability, maps if mask is None else np.where(mask[:, None], maps, 0.0)


def predict(
    model: torch.nn.Module,
    config: Config,
    index: Index,
    rows: np.ndarray,
    args: argparse.Namespace,
    image: np.ndarray | None = None,
    classes: np.ndarray | None = None,
) -> Predictions:
    """Predictions for the images ``rows`` (n,) of the index, in the order of its classes.

    Args:
        image: (k,), for each map the number of its image, below n.
        classes: (k,), for each map its class.
    """
    side = config["image_size"]
    data = whole_images(config, index, args.cache)
    loader = DataLoader(data, args.batch_size, sampler=[(0, int(row)) for row in rows], num_workers=args.workers)
    image = np.zeros(0, int) if image is None else image
    probability, peak = (np.zeros((len(rows), len(index.classes))) for _ in range(2))
    maps = [np.zeros((0, 0))] * len(image)
    content = np.zeros((len(rows), 4), int)
    start = 0
    first = first_cell(model, args.raster)
    for batch, _, frames, _ in Progress(loader, desc=name_of(config), unit="batch"):
        inside = slice(start, start + len(batch))
        content[inside] = frames
        probability[inside], patches = apply(model, config, batch, content[inside], index.classes, args.device)
        rows_seen, columns_seen = seen_cells(patches.shape[2:], (side, side), first)
        peak[inside] = patches[:, :, rows_seen[:, None], columns_seen].max((2, 3))
        for k in np.flatnonzero((image >= inside.start) & (image < inside.stop)):
            maps[k] = patches[image[k] - start, classes[k]].copy()
        start = inside.stop
    return Predictions(probability, peak, maps, first, content[image], side)
