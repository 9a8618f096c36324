"""From a map of probabilities to a box, and how good the boxes are. numpy and scipy only.

One convention throughout: a box is x, y, w, h in pixels, x to the right and y downwards from the top left corner of the
image, half-open: it covers [x, x + w) and [y, y + h), so that a pixel (row r, column c) is the box (c, r, 1, 1). Boxes
are float arrays (..., 4); four NaN say that there is no box, which is a miss at every threshold. A box that is found
counts as a hit where its IoU with the true one is greater than T_IoU.

A map of k cells along n pixels has a cell every n / k pixels. Where they begin depends on how the network pads:
``first`` is the centre of the first one, in cells from the edge of the image. At 0.5 the cells fill the image; a
network that pads evenly on both sides and takes every second pixel from the first on, as a ResNet does, begins at the
edge. A pixel belongs to the cell whose centre is nearest, so that cells at the edges may be narrower or wider than the
others, or, where their centres lie beyond the edge, have no pixel at all, and then are not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from scipy import ndimage

T_IOU = (0.1, 0.3, 0.5, 0.7)
UPSAMPLING = ("nearest", "bilinear")
NO_BOX = (math.nan,) * 4

#: Pixels that touch, be it at a corner, are of one component.
TOUCHING = np.ones((3, 3), bool)


def positions(pixels: int, cells: int, first: float = 0.5) -> np.ndarray:
    """Where the centres of ``pixels`` pixels lie (pixels,), in cells from the centre of the first of ``cells``."""
    return (np.arange(pixels) + 0.5) * cells / pixels - first


def nearest_cells(pixels: int, cells: int, first: float = 0.5) -> np.ndarray:
    """The number of the cell (pixels,) that each pixel belongs to; the further one where two are equally near."""
    return np.clip(np.floor(positions(pixels, cells, first) + 0.5).astype(int), 0, cells - 1)


def cell_edges(pixels: int, cells: int, first: float = 0.5) -> np.ndarray:
    """Before which pixel each cell begins (cells + 1,), the last number where the last one ends, as upsampling has it.

    A cell that no pixel belongs to begins where it ends.
    """
    return np.searchsorted(nearest_cells(pixels, cells, first), np.arange(cells + 1))


def seen_cells(grid: tuple[int, int], size: tuple[int, int], first: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of a map of ``grid`` (h, w) that have a pixel in an image of ``size``."""
    rows, columns = (np.unique(nearest_cells(n, k, first)) for n, k in zip(size, grid, strict=True))
    return rows, columns


def upsample(heatmap: np.ndarray, size: tuple[int, int], mode: str = "nearest", first: float = 0.5) -> np.ndarray:
    """``heatmap`` (h, w) at ``size`` (height, width), the centres of the cells where ``first`` has them.

    With ``first`` 0.5 it is torch's ``interpolate`` with ``align_corners=False``.

    Raises:
        ValueError: a heatmap that is not of two dimensions, another mode, or an empty one of the sizes.
    """
    heatmap = np.asarray(heatmap)
    if heatmap.ndim != 2 or 0 in heatmap.shape or min(size) < 1:
        raise ValueError(f"heatmap, size: expected (h, w) and (height, width), got {heatmap.shape} and {tuple(size)}")
    if mode not in UPSAMPLING:
        raise ValueError(f"mode: expected one of {', '.join(UPSAMPLING)}, got {mode!r}")
    if mode == "nearest":
        return heatmap[np.ix_(*(nearest_cells(n, k, first) for n, k in zip(size, heatmap.shape, strict=True)))]
    for axis, (n, k) in enumerate(zip(size, heatmap.shape, strict=True)):
        where = np.clip(positions(n, k, first), 0, k - 1)
        below = np.minimum(where.astype(int), max(k - 2, 0))
        above = np.minimum(below + 1, k - 1)
        part = (where - below).reshape(-1, *([1] * (1 - axis)))
        heatmap = heatmap.take(below, axis) * (1 - part) + heatmap.take(above, axis) * part
    return heatmap


def open_and_close(mask: np.ndarray, side: int) -> np.ndarray:
    """Morphological opening, then closing, of ``mask`` (H, W) by a square of ``side`` pixels; 1 changes nothing.

    Of each square only what lies in the image counts, so that a mask at the edge is not eaten up from beyond it. A gap
    to the edge of up to half a square closes.

    Raises:
        ValueError: a side that is even, for which a square has no middle, or below 1.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"side: expected an odd number of pixels, got {side}")
    mask = mask.astype(np.uint8)
    for step in (_erode, _dilate, _dilate, _erode) if side > 1 else ():
        mask = step(mask, side)
    return mask.astype(bool)


def _erode(mask: np.ndarray, side: int) -> np.ndarray:
    return ndimage.minimum_filter(mask, side, mode="constant", cval=1)


def _dilate(mask: np.ndarray, side: int) -> np.ndarray:
    return ndimage.maximum_filter(mask, side, mode="constant", cval=0)


def box_of_peak(heatmap: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The box (4,) round the component of ``mask`` that holds the greatest of ``heatmap`` within the mask.

    Of equal greatest ones the first, row by row. No box where the mask is empty.
    """
    if not mask.any():
        return np.array(NO_BOX)
    labels, _ = ndimage.label(mask, TOUCHING)
    peak = np.argmax(np.where(mask, heatmap, -np.inf))
    rows, columns = ndimage.find_objects(labels)[labels.flat[peak] - 1]
    return np.array([columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start], dtype=np.float64)


def heatmap_to_box(
    heatmap: np.ndarray,
    size: tuple[int, int],
    threshold: float = 0.5,
    mode: str = "nearest",
    side: int = 5,
    first: float = 0.5,
) -> np.ndarray:
    """The box (4,) of a map of probabilities (h, w) in an image of ``size`` (height, width), as in the paper's 4.4.

    Upsampling, p > ``threshold``, opening and closing by a square of ``side`` pixels, the component of the maximum, the
    box round it. The maximum is sought in what opening and closing leave; where they, or the threshold, leave nothing
    there is no box (four NaN): the threshold is not lowered until there is one. The paper does not tell the square.
    Upsampled by "nearest" the mask consists of whole cells, and a square that is smaller than a cell changes nothing.
    """
    image = upsample(heatmap, size, mode, first)
    return box_of_peak(image, open_and_close(image > threshold, side))


def peak_of(heatmap: np.ndarray, size: tuple[int, int], first: float = 0.5) -> tuple[float, float]:
    """x, y in an image of ``size`` (height, width): the centre of the map's greatest cell, the first of equal ones.

    Of the cells that have a pixel; where the centre lies beyond the edge, the centre of the pixel at the edge.
    """
    seen = seen_cells(heatmap.shape, size, first)
    part = heatmap[np.ix_(*seen)]
    cell = np.unravel_index(np.argmax(part), part.shape)
    y, x = (
        float(np.clip((there[c] + first) * n / k, 0.5, n - 0.5))
        for there, c, n, k in zip(seen, cell, size, heatmap.shape, strict=True)
    )
    return x, y


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4) and (..., 4), broadcast; 0 where either is no box or both are empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    overlap = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.clip(overlap, 0, None).prod(-1)
    either = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both
    return np.divide(both, either, out=np.zeros(np.shape(either)), where=either > 0)


def contains(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether the points (..., 2) lie in the boxes (..., 4): the pointing game, without tolerance."""
    offset = np.asarray(points) - np.asarray(boxes)[..., :2]
    return ((offset >= 0) & (offset < np.asarray(boxes)[..., 2:])).all(-1)


def per_class(values: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean of ``values`` (n,) per class number of ``classes`` (n,), by name, and the "mean" of those means.

    A class without a value is left out, of the mean as well; the mean of no class is NaN.
    """
    values = np.asarray(values, np.float64)
    means = {name: float(values[classes == c].mean()) for c, name in enumerate(names) if (classes == c).any()}
    return means | {"mean": float(np.mean(list(means.values()))) if means else math.nan}


def localization_accuracy(
    overlaps: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    predicted: np.ndarray | None = None,
    at: Iterable[float] = T_IOU,
) -> dict[str, dict[str, float]]:
    """The share of boxes that are found, per class and mean over the classes, for every T_IoU of ``at``.

    Args:
        overlaps: (n,) IoU of the found box and the true one.
        classes: (n,) class number of each box.
        predicted: (n,) whether the image was said to have the class; None: a box counts whatever was said.
    """
    said = True if predicted is None else np.asarray(predicted, bool)
    return {f"{t:g}": per_class((np.asarray(overlaps) > t) & said, classes, names) for t in at}


def boxes_by_threshold(
    heatmap: np.ndarray, size: tuple[int, int], thresholds: np.ndarray, mode: str = "nearest", first: float = 0.5
) -> np.ndarray:
    """Boxes (k, 4) of the component of the maximum at each of the rising ``thresholds`` (k,), without morphology.

    The component shrinks while the threshold rises, and its box lies in the box of any lower threshold: it is sought
    there, and where two thresholds give the same box, so does every one between them.
    """
    image = np.asarray(heatmap)
    # where row and column k of what is labelled begin in the image, to the pixel that upsampling begins them at
    edge_y, edge_x = (cell_edges(n, k, first) for n, k in zip(size, image.shape, strict=True))
    # where every cell is a block of pixels, cells touch where their pixels do
    if mode != "nearest" or not (np.diff(edge_y).all() and np.diff(edge_x).all()):
        image = upsample(heatmap, size, mode, first)
        edge_y, edge_x = (np.arange(n + 1) for n in size)
    boxes = np.empty((len(thresholds), 4))

    def find(k: int, within: np.ndarray) -> None:
        if not np.isnan(within).any():
            x, y, w, h = within.astype(int)
            part = image[y : y + h, x : x + w]
            within = np.add(box_of_peak(part, part > thresholds[k]), (x, y, 0, 0))
        boxes[k] = within

    def fill(first: int, last: int) -> None:
        if last - first < 2:
            return
        if np.array_equal(boxes[first], boxes[last], equal_nan=True):
            boxes[first + 1 : last] = boxes[first]
            return
        middle = (first + last) // 2
        find(middle, boxes[first])
        fill(first, middle)
        fill(middle, last)

    find(0, whole_image(image.shape))
    find(len(boxes) - 1, boxes[0])
    fill(0, len(boxes) - 1)
    found = ~np.isnan(boxes[:, 0])
    x, y, w, h = boxes[found].astype(int).T
    boxes[found] = np.stack([edge_x[x], edge_y[y], edge_x[x + w] - edge_x[x], edge_y[y + h] - edge_y[y]], axis=1)
    return boxes


def max_box_accuracy(
    heatmaps: Iterable[np.ndarray],
    boxes: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str],
    size: tuple[int, int],
    mode: str = "nearest",
    at: Iterable[float] = T_IOU,
    steps: int = 100,
    first: float = 0.5,
) -> dict[str, dict[str, float]]:
    """MaxBoxAcc: the accuracy at the one threshold, of ``steps``, at which it is highest (Choe et al., CVPR 2020).

    Every map (h, w) is scaled to 0 ... 1, by its cells that have a pixel, and one threshold is chosen for all boxes
    together, by the mean over the classes: by the boxes that it is measured on. It says what a map would be worth if
    the threshold were known, and is no result of a method that has to choose one. Without class gate and morphology; a
    constant map has no box.

    Returns:
        per T_IoU of ``at`` the accuracy per class, their "mean", and the "threshold" chosen (of equal ones the lowest).
    """
    thresholds = np.arange(steps) / steps
    overlaps = []
    for heatmap, box in zip(heatmaps, boxes, strict=True):
        heatmap = np.asarray(heatmap, np.float64)
        shown = heatmap[np.ix_(*seen_cells(heatmap.shape, size, first))]
        low, high = float(shown.min()), float(shown.max())
        scaled = (heatmap - low) / ((high - low) or 1.0)
        overlaps.append(iou(boxes_by_threshold(scaled, size, thresholds, mode, first), box))
    table = np.array(overlaps).reshape(-1, steps)
    result = {}
    for t in at:
        rows = [per_class(table[:, k] > t, classes, names) for k in range(steps)]
        best = int(np.argmax([-1.0 if math.isnan(row["mean"]) else row["mean"] for row in rows]))
        result[f"{t:g}"] = rows[best] | {"threshold": float(thresholds[best])}
    return result


def whole_image(size: tuple[int, int]) -> np.ndarray:
    """The box (4,) of all of an image of ``size`` (height, width)."""
    return np.array([0.0, 0.0, size[1], size[0]])


def centre_box(size: tuple[int, int]) -> np.ndarray:
    """The box (4,) in the centre, half the image wide and high."""
    return np.array([0.25, 0.25, 0.5, 0.5]) * [size[1], size[0], size[1], size[0]]


def mean_boxes(boxes: np.ndarray, classes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each of the boxes (n, 4) the mean of x, y, w, h over those of its class in *other* ``groups`` (n,).

    With patients as groups no box is predicted from one of the same patient, its own least of all. It knows the other
    test boxes, which no network here does. No box where there is no other.
    """
    boxes = np.asarray(boxes, np.float64)
    result = np.full(boxes.shape, math.nan)
    for i in range(len(boxes)):
        others = (classes == classes[i]) & (groups != groups[i])
        if others.any():
            result[i] = boxes[others].mean(0)
    return result


def grid_ceiling(boxes: np.ndarray, grid: tuple[int, int], size: tuple[int, int], first: float = 0.5) -> np.ndarray:
    """For each of the boxes (n, 4) the best one that whole cells of a map of ``grid`` (h, w) can give.

    What any threshold could reach with upsampling by "nearest". In the best box every edge is one of the two grid lines
    beside the true edge: further out only adds to the union, further in only takes from the intersection.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    spans = []
    for axis in (0, 1):
        count = grid[1 - axis]
        lines = cell_edges(size[1 - axis], count, first)
        sides = []
        for edge in (boxes[:, axis], boxes[:, axis] + boxes[:, axis + 2]):
            before = np.clip(np.searchsorted(lines, edge, "right") - 1, 0, count)
            after = np.clip(np.searchsorted(lines, edge, "left"), 0, count)
            sides.append((lines[before], lines[after]))
        spans.append([(low, np.maximum(high - low, 0)) for low, high in product(*sides)])
    candidates = np.array([np.stack([x, y, w, h], axis=1) for (x, w), (y, h) in product(*spans)])  # (16, n, 4)
    best = iou(candidates, boxes).argmax(0)
    return candidates[best, np.arange(len(boxes))]
