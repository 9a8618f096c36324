"""Metrics of boxes: IoU, localization accuracy, MaxBoxAcc, the pointing game."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._boxes import boxes_by_threshold
from ._maps import Floats, Size, Values, heatmap_to_point, seen_cells, to_array, to_heatmap

#: The thresholds of IoU that the paper reports.
T_IOU = (0.1, 0.3, 0.5, 0.7)


def to_boxes(boxes: Values, name: str = "boxes") -> Floats:
    """``boxes`` as float64 (..., 4).

    Raises:
        ValueError: the last dimension is not 4, a side is negative, or a number is infinite.
    """
    array = to_array(boxes).astype(np.float64)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"{name}: expected (..., 4), got {array.shape}")
    if np.isinf(array).any() or (array[..., 2:] < 0).any():
        raise ValueError(f"{name}: expected finite x, y, w, h with w, h >= 0, or NaN for no box")
    return array


def box_iou(a: Values, b: Values) -> Floats:
    """Intersection over union of boxes ``a`` (..., 4) and ``b`` (..., 4), broadcast; 0 for "no box" and empty boxes.

    For all pairs of (n, 4) and (m, 4) boxes write ``box_iou(a[:, None], b)``.

    Raises:
        ValueError: the last dimension is not 4, a side is negative, or a number is infinite.

    >>> box_iou([[0, 0, 4, 4], [2, 0, 4, 4]], [0, 0, 4, 4]).round(3).tolist()
    [1.0, 0.333]
    """
    a, b = to_boxes(a, "a"), to_boxes(b, "b")
    overlap = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.clip(overlap, 0, None).prod(-1)
    either = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both
    return np.asarray(np.divide(both, either, out=np.zeros(np.shape(either)), where=either > 0))


def contains(boxes: Values, points: Values) -> npt.NDArray[np.bool_]:
    """Whether the points (..., 2) lie in the half-open boxes (..., 4), broadcast. "No box" contains nothing.

    Raises:
        ValueError: the last dimensions are not 4 and 2, or a box is not valid.

    >>> contains([10, 10, 255, 255], [[10, 264], [8, 12]]).tolist()
    [True, False]
    """
    array, at = to_boxes(boxes), to_array(points).astype(np.float64)
    if at.ndim == 0 or at.shape[-1] != 2:
        raise ValueError(f"points: expected (..., 2), got {at.shape}")
    offset = at - array[..., :2]
    return np.asarray(((offset >= 0) & (offset < array[..., 2:])).all(-1))


#: Keys of the results that are no class.
RESERVED = ("mean", "threshold")


def to_classes(classes: Values, count: int, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """``classes`` as integers (count,).

    Raises:
        ValueError: another shape, a number that is not that of a name, a name that occurs twice or is in RESERVED.
    """
    refused = [name for k, name in enumerate(names) if name in RESERVED or name in names[:k]]
    if refused:
        raise ValueError(f"names: expected names that differ, and none of {', '.join(RESERVED)}, got {refused[0]!r}")
    array = to_array(classes)
    if array.shape != (count,):
        raise ValueError(f"classes: expected ({count},), got {array.shape}")
    numbers = array.astype(np.int64)
    if (numbers != array).any() or (numbers < 0).any() or (numbers >= len(names)).any():
        raise ValueError(f"classes: expected whole numbers from 0 to {len(names) - 1}")
    return numbers


def per_class(values: Values, classes: Values, names: Sequence[str]) -> dict[str, float]:
    """The mean of ``values`` (n,) for each class number of ``classes`` (n,), by name, and the "mean" of those means.

    A class without a value is left out, also of the "mean". If no class has a value, the "mean" is NaN.

    Raises:
        ValueError: the shapes are not (n,) both, a class number has no name, a name occurs twice, or a name is "mean"
            or "threshold".

    >>> per_class([1, 0, 1], [0, 0, 1], ["mass", "nodule", "hernia"])
    {'mass': 0.5, 'nodule': 1.0, 'mean': 0.75}
    """
    numbers = to_array(values).astype(np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"values: expected (n,), got {numbers.shape}")
    of = to_classes(classes, len(numbers), names)
    means = {name: float(numbers[of == c].mean()) for c, name in enumerate(names) if (of == c).any()}
    return means | {"mean": float(np.mean(list(means.values()))) if means else math.nan}


def localization_accuracy(
    overlaps: Values,
    classes: Values,
    names: Sequence[str],
    predicted: Values | None = None,
    at: Iterable[float] = T_IOU,
) -> dict[str, dict[str, float]]:
    """The fraction of boxes with IoU > T_IoU, per class and mean over the classes, for every T_IoU of ``at``.

    Args:
        overlaps: (n,) IoU of the found box and the true one.
        classes: (n,) class number of each box.
        names: names of the classes.
        predicted: (n,) bool, whether the class is predicted in the image. If it is not, the box counts as not found.
            None: the class is predicted in every image.
        at: thresholds of IoU.

    Returns:
        ``{"0.1": {class: share, ..., "mean": mean over the classes}, ...}``

    Raises:
        ValueError: the shapes do not fit, or a class number has no name.

    >>> localization_accuracy([0.4, 0.2, 0.9], [0, 0, 1], ["mass", "nodule"], at=[0.3])
    {'0.3': {'mass': 0.5, 'nodule': 1.0, 'mean': 0.75}}
    """
    iou = to_array(overlaps).astype(np.float64)
    gate = np.ones(iou.shape, bool) if predicted is None else to_array(predicted).astype(bool)
    if gate.shape != iou.shape:
        raise ValueError(f"predicted: expected {iou.shape}, got {gate.shape}")
    return {f"{t:g}": per_class((iou > t) & gate, classes, names) for t in at}


def _true_boxes(boxes: Any, count: int) -> list[Floats]:
    """``count`` arrays (m, 4), of n boxes (n, 4) or of n arrays (m, 4)."""
    entries: Iterable[Any] = boxes if isinstance(boxes, (list, tuple)) else to_array(boxes)
    each = [to_boxes(entry).reshape(-1, 4) for entry in entries]
    if len(each) != count:
        raise ValueError(f"boxes: expected one entry for each of {count} maps, got {len(each)}")
    if any(not len(box) for box in each):
        raise ValueError("boxes: expected at least one box for each map")
    return each


def max_box_accuracy(
    heatmaps: Iterable[Values],
    boxes: Values | Sequence[Values],
    classes: Values,
    names: Sequence[str],
    size: Size,
    mode: str = "nearest",
    at: Iterable[float] = T_IOU,
    steps: int = 100,
    first: float = 0.5,
    *,
    component: str = "peak",
) -> dict[str, dict[str, float]]:
    """MaxBoxAcc: the localization accuracy at the threshold at which it is highest (Choe et al., CVPR 2020).

    Each map is scaled to 0 ... 1 by the smallest and the largest value of the cells that contain a pixel of the image.
    One threshold of 0, 1 / steps, ... is chosen for all maps together: the one with the highest mean over the classes
    *on these boxes*. So MaxBoxAcc measures the maps for the best threshold. It is not a result of a method that has to
    choose a threshold. There is no class gate and no opening and closing. A constant map has no box.

    Differences from the authors' code (wsolevaluation):

    - it takes the largest component (``component="largest"``); the default here is the component of the maximum;
    - a pixel counts if its value is greater than *or equal to* the threshold, and a box if its IoU is; here both must
      be greater;
    - its boxes include their last pixel, w = x1 - x0 + 1 of contour points; here boxes are half-open;
    - its mean is over the images; here it is over the classes.

    Because of these differences, the values are not equal to those of the authors' code. On 200 maps of drawn lesions,
    the authors' rules gave values from 0.2 percentage points lower to 2.9 percentage points higher.

    Args:
        heatmaps: n maps (h, w), finite; their shapes may differ.
        boxes: (n, 4) the true box of each map, or n arrays (m, 4): the box with the largest IoU counts.
        classes: (n,) class number of each map.
        names: names of the classes.
        size: (height, width) of the images, in which the boxes are given.
        mode: upsampling, "nearest" or "bilinear".
        at: thresholds of IoU.
        steps: number of thresholds, at least 1.
        first: centre of the first cell, in cells from the edge of the image.
        component: "peak" or "largest", as in ``heatmap_to_box``.

    Returns:
        For each T_IoU of ``at``: the accuracy of each class, their "mean", and the chosen "threshold". If thresholds
        are equally good, it is the lowest one.

    Raises:
        ValueError: an argument is not as described.

    >>> heatmap = [[0.0, 0.2, 0.8, 0.2]]
    >>> max_box_accuracy([heatmap], [[2, 0, 1, 1]], [0], ["mass"], (1, 4), at=[0.5])
    {'0.5': {'mass': 1.0, 'mean': 1.0, 'threshold': 0.25}}
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    maps = [to_heatmap(heatmap) for heatmap in heatmaps]
    thresholds = np.arange(steps) / steps
    table = np.zeros((len(maps), steps))
    for k, (heatmap, true) in enumerate(zip(maps, _true_boxes(boxes, len(maps)), strict=True)):
        shown = heatmap[np.ix_(*seen_cells((heatmap.shape[0], heatmap.shape[1]), size, first))]
        scaled = (heatmap - shown.min()) / ((shown.max() - shown.min()) or 1.0)
        found = boxes_by_threshold(scaled, size, thresholds, mode, first, component=component)
        table[k] = box_iou(found[:, None], true).max(1)
    result = {}
    for t in at:
        rows = [per_class(table[:, k] > t, classes, names) for k in range(steps)]
        best = int(np.argmax([-1.0 if math.isnan(row["mean"]) else row["mean"] for row in rows]))
        result[f"{t:g}"] = rows[best] | {"threshold": float(thresholds[best])}
    return result


def pointing_game(
    heatmaps: Iterable[Values],
    boxes: Values | Sequence[Values],
    classes: Values,
    names: Sequence[str],
    size: Size,
    first: float = 0.5,
) -> dict[str, float]:
    """The fraction of maps whose maximum lies in a true box, per class and mean over the classes.

    The maximum of a map is the centre of the cell with the largest value. There is no tolerance around a box.
    Arguments and errors are those of ``max_box_accuracy``.

    >>> pointing_game([[[0.1, 0.9]], [[0.7, 0.2]]], [[8, 0, 8, 8], [8, 0, 8, 8]], [0, 0], ["mass"], (8, 16))
    {'mass': 0.5, 'mean': 0.5}
    """
    points = [heatmap_to_point(heatmap, size, first) for heatmap in heatmaps]
    hits = [contains(true, at).any() for true, at in zip(_true_boxes(boxes, len(points)), points, strict=True)]
    return per_class(hits, classes, names)
