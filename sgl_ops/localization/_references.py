"""References for the metrics: boxes without a network, and the best box of whole cells."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from ._accuracy import box_iou, to_boxes
from ._maps import Floats, Size, Values, cell_edges, to_array, to_size


def whole_image_box(size: Size) -> Floats:
    """The box (4,) of the whole image of ``size`` (height, width)."""
    height, width = to_size(size)
    return np.array([0.0, 0.0, width, height])


def centre_box(size: Size) -> Floats:
    """The box (4,) in the centre of an image of ``size`` (height, width), half as wide and half as high.

    >>> centre_box((20, 40)).tolist()
    [10.0, 5.0, 20.0, 10.0]
    """
    height, width = to_size(size)
    return np.array([0.25, 0.25, 0.5, 0.5]) * [width, height, width, height]


def mean_boxes(boxes: Values, classes: Values, groups: Values) -> Floats:
    """For each of the boxes (n, 4), the mean of x, y, w, h over the boxes of its class in *other* groups.

    With patients as groups, no box is predicted from a box of the same patient. This prediction uses the other test
    boxes. A network does not see them. Four NaN if no other group has a box of the class.

    Args:
        boxes: (n, 4) true boxes.
        classes: (n,) class number of each box.
        groups: (n,) patient or image of each box.

    Raises:
        ValueError: the shapes do not fit.
    """
    array, of, group = to_boxes(boxes), to_array(classes), to_array(groups)
    if array.ndim != 2 or of.shape != array.shape[:1] or group.shape != array.shape[:1]:
        shapes = f"{array.shape}, {of.shape}, {group.shape}"
        raise ValueError(f"boxes, classes, groups: expected (n, 4), (n,), (n,), got {shapes}")
    result = np.full(array.shape, math.nan)
    for i in range(len(array)):
        others = (of == of[i]) & (group != group[i])
        if others.any():
            result[i] = array[others].mean(0)
    return result


def grid_ceiling(boxes: Values, grid: Size, size: Size, first: float = 0.5) -> Floats:
    """For each of the boxes (n, 4), the best box that consists of whole cells of a map of ``grid`` (h, w).

    No threshold can give a better box with "nearest" upsampling in images of ``size`` (height, width). Each edge of the
    best box is one of the two grid lines beside the true edge. A line further out only adds to the union, and a line
    further in only reduces the intersection.

    Returns:
        (n, 4) float64: x, y, width, height; NaN where the given box is NaN.
    """
    array, size, grid = to_boxes(boxes).reshape(-1, 4), to_size(size), to_size(grid, "grid", "cell")
    spans = []
    for axis in (0, 1):
        count = grid[1 - axis]
        lines = cell_edges(size[1 - axis], count, first)
        sides = []
        for edge in (array[:, axis], array[:, axis] + array[:, axis + 2]):
            before = np.clip(np.searchsorted(lines, edge, "right") - 1, 0, count)
            after = np.clip(np.searchsorted(lines, edge, "left"), 0, count)
            sides.append((lines[before], lines[after]))
        spans.append([(low, np.maximum(high - low, 0)) for low, high in product(*sides)])
    # (16, n, 4)
    candidates = np.array([np.stack([x, y, w, h], axis=1) for (x, w), (y, h) in product(*spans)], np.float64)
    best = box_iou(candidates, array).argmax(0)
    return np.where(np.isnan(array).any(1, keepdims=True), np.nan, candidates[best, np.arange(len(array))])
