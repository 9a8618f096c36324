"""Heat maps to boxes: threshold, opening and closing, connected components."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ._maps import Array, Floats, Size, Values, cell_edges, to_array, to_heatmap, to_size, upsample

try:
    from scipy import ndimage
except ImportError as error:
    raise ImportError('sgl_ops.localization needs scipy: pip install "sgl-ops[localization]"') from error

NO_BOX = (math.nan,) * 4
COMPONENTS = ("peak", "largest")

#: Pixels that touch at an edge or at a corner belong to one component.
_TOUCHING = np.ones((3, 3), bool)


def open_and_close(mask: Values, side: int) -> npt.NDArray[np.bool_]:
    """Morphological opening, then closing, of ``mask`` (H, W) by a square of ``side`` pixels.

    A side of 1 changes nothing. Only the part of a square that lies in the image counts, so that a mask at the edge of
    the image does not shrink there. Closing fills a gap of up to half a square between the mask and the edge.

    Raises:
        ValueError: ``side`` is even or below 1: the square has no middle.
    """
    if side < 1 or side % 2 == 0:
        raise ValueError(f"side: expected an odd number of pixels, got {side}")
    array = to_array(mask).astype(np.uint8)
    if side > 1:
        for step in (_erode, _dilate, _dilate, _erode):
            array = step(array, side)
    return array.astype(bool)


def _erode(mask: Array, side: int) -> Array:
    return np.asarray(ndimage.minimum_filter(mask, side, mode="constant", cval=1))


def _dilate(mask: Array, side: int) -> Array:
    return np.asarray(ndimage.maximum_filter(mask, side, mode="constant", cval=0))


def _box_of(slices: tuple[slice, slice]) -> list[float]:
    rows, columns = slices
    return [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]


def _component_box(image: Floats, mask: npt.NDArray[np.bool_], component: str) -> Floats:
    """The box (4,) of a component of ``mask`` (H, W): that of the maximum of ``image`` (H, W), or the largest."""
    if not mask.any():
        return np.array(NO_BOX)
    labels, _ = ndimage.label(mask, _TOUCHING)
    if component == "peak":
        chosen = labels.flat[np.argmax(np.where(mask, image, -np.inf))]
    else:
        chosen = np.bincount(labels[mask]).argmax()
    return np.array(_box_of(ndimage.find_objects(labels)[chosen - 1]), np.float64)


def _check_component(component: str) -> None:
    if component not in COMPONENTS:
        raise ValueError(f"component: expected one of {', '.join(COMPONENTS)}, got {component!r}")


def _above(
    heatmap: Values, size: Size, threshold: float, mode: str, side: int, first: float, relative: bool
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The upsampled map (H, W), and where it is above the threshold after opening and closing."""
    if not math.isfinite(threshold):
        raise ValueError(f"threshold: expected a finite number, got {threshold}")
    image = upsample(heatmap, size, mode, first)
    if relative:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold: expected a share of the maximum, 0 <= threshold < 1, got {threshold}")
        if image.min() < 0:
            raise ValueError(
                f"heatmap: a relative threshold needs values of at least 0, got {image.min():g}; convert logits to "
                "probabilities first"
            )
        threshold = threshold * float(image.max())
    return image, open_and_close(image > threshold, side)


def heatmap_to_box(
    heatmap: Values,
    size: Size,
    threshold: float = 0.5,
    mode: str = "nearest",
    side: int = 5,
    first: float = 0.5,
    *,
    relative: bool = False,
    component: str = "peak",
) -> Floats:
    """The box (4,) of a map in an image of ``size``; four NaN if there is none.

    Steps, as in section 4.4 of Seibold et al. (ACCV 2020): upsample to the size of the image, keep the pixels with
    p > ``threshold``, open and close by a square, choose one connected component (8 neighbours), take its bounding box.
    The paper does not give the side of the square. With "nearest", a square smaller than a cell changes nothing.

    There is no box if no pixel is above the threshold, or if opening removes all pixels.

    Args:
        heatmap: (h, w), finite, usually probabilities.
        size: (height, width) of the image in pixels.
        threshold: T_p. A pixel whose value equals it is not above it.
        mode: "nearest" or "bilinear", as in ``upsample``.
        side: side of the square that opens and closes, odd, in pixels; 1 for none.
        first: centre of the first cell, in cells from the edge of the image.
        relative: True: the threshold is a fraction of the maximum of the upsampled map, 0 <= threshold < 1. The map
            must not have negative values.
        component: "peak": the component with the maximum of the map, among the pixels that remain after opening and
            closing. "largest": the component with the most pixels. If two are equal, the first one, row by row.

    Raises:
        ValueError: an argument is not as described.

    >>> heatmap_to_box([[0.0, 0.2], [0.1, 0.3]], (8, 8)).tolist()
    [nan, nan, nan, nan]
    >>> heatmap_to_box([[0.0, 0.2], [0.1, 0.3]], (8, 8), 0.5, relative=True, side=1).tolist()
    [4.0, 0.0, 4.0, 8.0]
    """
    _check_component(component)
    return _component_box(*_above(heatmap, size, threshold, mode, side, first, relative), component)


def heatmap_to_boxes(
    heatmap: Values,
    size: Size,
    threshold: float = 0.5,
    mode: str = "nearest",
    side: int = 5,
    first: float = 0.5,
    *,
    relative: bool = False,
) -> Floats:
    """The boxes (n, 4) of all connected components, sorted by their maximum, the largest first. n may be 0.

    Arguments and errors are those of ``heatmap_to_box``. Components with equal maxima are sorted by the place of the
    maximum, row by row. The first box is that of ``heatmap_to_box`` with ``component="peak"``.

    >>> heatmap_to_boxes([[0.6, 0.0, 0.9]], (8, 24)).tolist()
    [[16.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0]]
    """
    image, mask = _above(heatmap, size, threshold, mode, side, first, relative)
    labels, _ = ndimage.label(mask, _TOUCHING)
    descending = labels[mask][np.argsort(-image[mask], kind="stable")]
    order = descending[np.sort(np.unique(descending, return_index=True)[1])]
    slices = ndimage.find_objects(labels)
    return np.array([_box_of(slices[label - 1]) for label in order], np.float64).reshape(-1, 4)


def boxes_by_threshold(
    heatmap: Values,
    size: Size,
    thresholds: Values,
    mode: str = "nearest",
    first: float = 0.5,
    *,
    component: str = "peak",
) -> Floats:
    """The boxes (k, 4) at each of the increasing ``thresholds`` (k,), without opening and closing.

    The same as k calls of ``heatmap_to_box`` with ``side=1``, but faster.

    Raises:
        ValueError: an argument is not as in ``heatmap_to_box``, or the thresholds do not increase.
    """
    _check_component(component)
    image, size, steps = to_heatmap(heatmap), to_size(size), to_array(thresholds).astype(np.float64)
    if steps.ndim != 1 or not np.isfinite(steps).all() or (np.diff(steps) < 0).any():
        raise ValueError("thresholds: expected finite numbers (k,) in rising order")
    if not len(steps):
        return np.empty((0, 4))
    if component == "largest":
        return _largest_by_threshold(upsample(image, size, mode, first), steps)
    return _peak_by_threshold(image, size, steps, mode, first)


def _largest_by_threshold(image: Floats, steps: Floats) -> Floats:
    boxes = np.empty((len(steps), 4))
    # masks of rising thresholds are nested: those of equal counts are equal
    counts = image.size - np.searchsorted(np.sort(image, axis=None), steps, "right")
    for k, step in enumerate(steps):
        same = k > 0 and counts[k] == counts[k - 1]
        boxes[k] = boxes[k - 1] if same else _component_box(image, image > step, "largest")
    return boxes


def _peak_by_threshold(image: Floats, size: Size, steps: Floats, mode: str, first: float) -> Floats:
    """The component of the maximum shrinks while the threshold rises, and its box lies in that of any lower threshold.

    The search is limited to that box. Where two thresholds give the same box, so does every threshold between them.
    """
    # the pixel at which row and column k of what is labelled begin
    edge_y, edge_x = (cell_edges(n, k, first) for n, k in zip(size, image.shape, strict=True))
    # where every cell is a block of pixels, cells touch where their pixels do: the cells are labelled
    if mode != "nearest" or not (np.diff(edge_y).all() and np.diff(edge_x).all()):
        image = upsample(image, size, mode, first)
        edge_y, edge_x = (np.arange(n + 1) for n in size)
    boxes = np.empty((len(steps), 4))

    def find(k: int, within: Floats) -> None:
        if not np.isnan(within).any():
            x, y, w, h = within.astype(int)
            part = image[y : y + h, x : x + w]
            within = np.add(_component_box(part, part > steps[k], "peak"), (x, y, 0, 0))
        boxes[k] = within

    def fill(low: int, high: int) -> None:
        if high - low < 2:
            return
        if np.array_equal(boxes[low], boxes[high], equal_nan=True):
            boxes[low + 1 : high] = boxes[low]
            return
        middle = (low + high) // 2
        find(middle, boxes[low])
        fill(low, middle)
        fill(middle, high)

    find(0, np.array([0.0, 0.0, image.shape[1], image.shape[0]]))
    find(len(boxes) - 1, boxes[0])
    fill(0, len(boxes) - 1)
    found = ~np.isnan(boxes[:, 0])
    x, y, w, h = boxes[found].astype(int).T
    boxes[found] = np.stack([edge_x[x], edge_y[y], edge_x[x + w] - edge_x[x], edge_y[y + h] - edge_y[y]], axis=1)
    return boxes
