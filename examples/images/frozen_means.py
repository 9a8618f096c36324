"""The mean predictions of several heads, for mirrored images, and of several networks. Used by frozen_cxr.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from images.frozen import Films, Predicted


def mean_of_heads(predicted: Sequence[Predicted]) -> Predicted:
    """The mean scores and maps of several heads for the same images."""
    numbers, *_ = predicted[0]
    return Predicted(numbers, *(np.mean([p[k] for p in predicted], 0) for k in (1, 2)))


def mean_with_mirrored(films: Films, predicted: Predicted) -> Predicted:
    """The mean scores and maps of images and their mirrored images, whose maps are mirrored back.

    Args:
        predicted: the predictions of both, in the order of Films.

    Raises:
        ValueError: a mirrored image is missing, or the order is another one.
    """
    half = len(films.labels) // 2
    numbers, scores, maps = predicted
    first = numbers < half
    if not np.array_equal(numbers[~first] - half, numbers[first]):
        raise ValueError("predicted: expected the mirrored image of each image, in the same order")
    maps = (maps[first] + mirrored_back(maps[~first], films.first)) / 2
    return Predicted(numbers[first], (scores[first] + scores[~first]) / 2, maps)


def mirrored_back(maps: np.ndarray, first: float) -> np.ndarray:
    """The maps (..., h, w) of mirrored images, on the cells of the maps of the images.

    Cell j of the reversed map is centred at j + 1 - first cells from the edge of the image, and cell i of the result at
    i + first. So the result is interpolated at j = i + 2 first - 1. Beyond the outer cells, their values are repeated.
    """
    return ndimage.shift(maps[..., ::-1], [0] * (maps.ndim - 1) + [1 - 2 * first], order=1, mode="nearest")


def on_cells_of(maps: np.ndarray, films: Films, shown: Films) -> np.ndarray:
    """The maps (..., h, w) of ``films``, interpolated linearly on the cells of ``shown``, which has the same images.

    Cell i of n cells is centred at (i + first) / n of the side of the image. Beyond the outer used cells, their values
    are repeated. The value of a cell of ``shown`` that is not used is 0.
    """
    if films is shown:
        return maps
    used = [np.flatnonzero(films.inside.any(axis)) for axis in (1, 0)]
    rows, columns = (np.arange(n).clip(i[0], i[-1]) for n, i in zip(films.inside.shape, used, strict=True))
    maps = maps[..., rows[:, None], columns]
    ratios = np.array(films.inside.shape) / shown.inside.shape
    others = maps.ndim - 2
    moved = ndimage.affine_transform(
        maps,
        [1.0] * others + ratios.tolist(),
        [0.0] * others + (shown.first * ratios - films.first).tolist(),
        (*maps.shape[:-2], *shown.inside.shape),
        order=1,
        mode="nearest",
    )
    return moved * shown.inside
