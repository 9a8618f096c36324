"""Heat maps: validation, the raster of their cells on the pixels of an image, upsampling, the maximum."""

from __future__ import annotations

import math
from operator import index
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

#: What the public functions take as an array.
Values: TypeAlias = npt.ArrayLike | torch.Tensor
Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Size: TypeAlias = tuple[int, int]

UPSAMPLING = ("nearest", "bilinear")


def to_array(values: Values) -> Array:
    """``values`` as a NumPy array. A tensor is detached and moved to the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
    return np.asarray(values)


def to_heatmap(heatmap: Values) -> Floats:
    """``heatmap`` as float64 (h, w).

    Raises:
        ValueError: other dimensions, no cell, complex values, or a value that is NaN or infinite.
    """
    array = to_array(heatmap)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"heatmap: expected (h, w) with at least one cell, got {array.shape}")
    if array.dtype.kind not in "buif":
        raise ValueError(f"heatmap: expected real numbers, got {array.dtype}")
    array = array.astype(np.float64)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(
            f"heatmap: expected finite values, got {bad} of {array.size} that are NaN or infinite; "
            "give cells that are not to count the least value of the others"
        )
    return array


def to_size(size: Size, name: str = "size", unit: str = "pixel") -> Size:
    """``size`` as two integers.

    Raises:
        ValueError: not (height, width) of at least one pixel each. The message has the ``name`` of the argument.
    """
    try:
        height, width = (index(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected two integers (height, width), got {size!r}") from None
    if min(height, width) < 1:
        raise ValueError(f"{name}: expected at least one {unit} each way, got {(height, width)}")
    return height, width


def _positions(pixels: int, cells: int, first: float) -> Floats:
    """The centres of ``pixels`` pixels (pixels,), in cells from the centre of the first of ``cells``."""
    if not math.isfinite(first):
        raise ValueError(f"first: expected a finite number of cells, got {first}")
    return (np.arange(pixels) + 0.5) * cells / pixels - first


def nearest_cells(pixels: int, cells: int, first: float = 0.5) -> npt.NDArray[np.int64]:
    """The number of the cell (pixels,) that each pixel of a line belongs to.

    It is the cell with the nearest centre. If two are equally near, it is the one with the larger number.

    >>> nearest_cells(6, 2).tolist()
    [0, 0, 0, 1, 1, 1]
    >>> nearest_cells(6, 2, first=0).tolist()       # the first cell is centred on the edge of the image
    [0, 1, 1, 1, 1, 1]
    """
    return np.clip(np.floor(_positions(pixels, cells, first) + 0.5).astype(np.int64), 0, cells - 1)


def cell_edges(pixels: int, cells: int, first: float = 0.5) -> npt.NDArray[np.int64]:
    """The first pixel of each cell of a line, and the pixel after the last cell: (cells + 1,).

    A cell without a pixel begins at the pixel at which the next cell begins.
    """
    return np.searchsorted(nearest_cells(pixels, cells, first), np.arange(cells + 1)).astype(np.int64)


def seen_cells(grid: Size, size: Size, first: float = 0.5) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows and the columns of cells, of a map of ``grid`` (h, w), that have a pixel in an image of ``size``."""
    rows, columns = (np.unique(nearest_cells(n, k, first)) for n, k in zip(to_size(size), grid, strict=True))
    return rows, columns


def upsample(heatmap: Values, size: Size, mode: str = "nearest", first: float = 0.5) -> Floats:
    """The map at the size of the image, float64 (height, width).

    With ``first=0.5`` the result is that of ``torch.nn.functional.interpolate``: "bilinear" is ``mode="bilinear"`` with
    ``align_corners=False``, and "nearest" is ``mode="nearest-exact"`` (torch's "nearest" takes another cell at some
    sizes). Only a pixel exactly between two cells may differ: torch may take the first of the two. Here it is the
    second.

    Args:
        heatmap: (h, w), finite.
        size: (height, width) of the image in pixels.
        mode: "nearest" or "bilinear".
        first: centre of the first cell, in cells from the edge of the image.

    Raises:
        ValueError: an argument is not as described.

    >>> upsample([[0.0, 1.0]], (1, 4), "bilinear").tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    image, size = to_heatmap(heatmap), to_size(size)
    if mode not in UPSAMPLING:
        raise ValueError(f"mode: expected one of {', '.join(UPSAMPLING)}, got {mode!r}")
    if mode == "nearest":
        rows, columns = (nearest_cells(n, k, first) for n, k in zip(size, image.shape, strict=True))
        return image[np.ix_(rows, columns)]
    for axis, (n, k) in enumerate(zip(size, image.shape, strict=True)):
        where = np.clip(_positions(n, k, first), 0, k - 1)
        below = np.minimum(where.astype(np.int64), max(k - 2, 0))
        above = np.minimum(below + 1, k - 1)
        part = (where - below).reshape(-1, *([1] * (1 - axis)))
        image = image.take(below, axis) * (1 - part) + image.take(above, axis) * part
    return image


def heatmap_to_point(heatmap: Values, size: Size, first: float = 0.5) -> tuple[float, float]:
    """x, y in pixels: the centre of the cell with the largest value of ``heatmap`` (h, w), in an image of ``size``.

    If cells are equal, the first one counts, row by row. Only cells with a pixel count. If the centre lies outside of
    the image, the point is the centre of the nearest pixel at the edge.

    Raises:
        ValueError: the map is not (h, w) of finite values, or the size is not (height, width).

    >>> heatmap_to_point([[0.1, 0.9], [0.3, 0.2]], (16, 16))
    (12.0, 4.0)
    """
    array, size = to_heatmap(heatmap), to_size(size)
    seen = seen_cells((array.shape[0], array.shape[1]), size, first)
    part = array[np.ix_(*seen)]
    cell = np.unravel_index(np.argmax(part), part.shape)
    y, x = (
        float(np.clip((there[c] + first) * n / k, 0.5, n - 0.5))
        for there, c, n, k in zip(seen, cell, size, array.shape, strict=True)
    )
    return x, y
