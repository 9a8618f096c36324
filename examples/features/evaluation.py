"""Metrics of the predictions of a trained head: for bags, instances and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from common import metrics
from images.thresholds import Relative
from sklearn.metrics import average_precision_score

from sgl_ops.localization import box_iou, contains, heatmap_to_box, heatmap_to_boxes, heatmap_to_point, upsample

T_IOU = (0.1, 0.3, 0.5)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of scores (n,) and labels (n,), NaN = unknown. NaN if all known labels are equal."""
    known = ~np.isnan(labels)
    return metrics.auc(scores[known], labels[known])


def bootstrap(
    measure: Callable[[np.ndarray], float], count: int, repeats: int = 1000, seed: int = 0
) -> metrics.Interval:
    """The 95 % interval of ``measure(indices)`` over ``repeats`` samples of ``count`` bags, drawn with replacement."""
    generator = np.random.default_rng(seed)
    return metrics.interval([measure(generator.integers(count, size=count)) for _ in range(repeats)])


def instance_metrics(
    found: Sequence[np.ndarray], truth: Sequence[np.ndarray], positive: Sequence[bool]
) -> dict[str, float]:
    """Metrics of the instances for one class, from probabilities ``found`` and labels ``truth`` (L_i,) of each bag.

    ``auc_all`` is the AUC of all instances. ``auc`` and ``ap`` are over the instances of all positive bags together.
    ``iou`` is the mean over the positive bags of the IoU of the instances with p > 0.5 and the positive instances.
    A metric is NaN if the labels do not define it: without a positive instance, all but ``auc_all``.
    """
    everything = np.concatenate(found), np.concatenate(truth)
    inside = [i for i, is_positive in enumerate(positive) if is_positive]
    result = {"auc_all": auc(*everything), "auc": math.nan, "ap": math.nan, "iou": math.nan}
    if not inside:
        return result
    p, y = (np.concatenate([x[i] for i in inside]) for x in (found, truth))
    known = ~np.isnan(y)
    result["auc"] = auc(p, y)
    if not (y[known] == 1).any():
        return result
    result["ap"] = float(average_precision_score(y[known], p[known]))
    overlaps = [value for i in inside if not math.isnan(value := instance_overlap(found[i], truth[i]))]
    result["iou"] = float(np.mean(overlaps)) if overlaps else math.nan
    return result


def instance_overlap(p: np.ndarray, labels: np.ndarray) -> float:
    """The IoU of the instances with p > 0.5 and the positive ones; NaN without either. Unknown labels are left out."""
    known = ~np.isnan(labels)
    chosen, true = p[known] > 0.5, labels[known] == 1
    return float((chosen & true).sum() / (chosen | true).sum()) if (chosen | true).any() else math.nan


def extended(heatmap: np.ndarray, size: tuple[int, int], stride: float | None) -> tuple[np.ndarray, tuple[int, int]]:
    """A map (h, w) and an image of ``size``, extended at the right and bottom so that a cell has ``stride`` pixels.

    The functions of :mod:`sgl_ops.localization` assume k cells along k strides. A network without padding has fewer,
    and the last cell may exceed the image. The edge values of the map are repeated.

    Args:
        stride: in pixels of the image. None: unknown; the cells divide the image evenly.
    """
    if stride is None:
        return heatmap, size
    cells = [max(k, math.ceil(n / stride - 1e-6)) for n, k in zip(size, heatmap.shape, strict=True)]
    wider = np.pad(heatmap, [(0, more - k) for more, k in zip(cells, heatmap.shape, strict=True)], "edge")
    height, width = (max(n, round(k * stride)) for n, k in zip(size, cells, strict=True))
    return wider, (height, width)


def pixels_of(heatmap: np.ndarray, size: tuple[int, int], first: float, stride: float | None = None) -> np.ndarray:
    """A map (h, w) at the pixels of an image of ``size``, bilinear: what is drawn, and what boxes are found in.

    Args:
        first: the centre of the first cell, in cells from the edge of the image.
        stride: as for :func:`extended`.
    """
    wider, whole = extended(heatmap, size, stride)
    return upsample(wider, whole, "bilinear", first)[: size[0], : size[1]]


def point_of(
    heatmap: np.ndarray, size: tuple[int, int], first: float, stride: float | None = None
) -> tuple[float, float]:
    """x, y in pixels: the centre of the cell with the largest value. Beyond the edge: of the pixel at the edge."""
    x, y = heatmap_to_point(*extended(heatmap, size, stride), first)
    return min(x, size[1] - 0.5), min(y, size[0] - 0.5)


def box_of(
    heatmap: np.ndarray, size: tuple[int, int], first: float, stride: float | None = None, threshold: float = 0.5
) -> np.ndarray:
    """The box (4,) of a map (h, w): bilinear, component of the maximum, without opening and closing.

    Args:
        first, stride: as for :func:`pixels_of`.
        threshold: the box encloses pixels above it: a probability, or a fraction of the maximum (``Relative``).
    """
    relative = isinstance(threshold, Relative)
    return heatmap_to_box(pixels_of(heatmap, size, first, stride), size, threshold, side=1, relative=relative)


def boxes_of(
    heatmap: np.ndarray, size: tuple[int, int], first: float, stride: float | None = None, threshold: float = 0.5
) -> np.ndarray:
    """The boxes (n, 4) of all components of a map, the one of :func:`box_of` first."""
    relative = isinstance(threshold, Relative)
    return heatmap_to_boxes(pixels_of(heatmap, size, first, stride), size, threshold, side=1, relative=relative)


def best_overlaps(
    maps: Mapping[str, np.ndarray],
    sizes: Mapping[str, tuple[int, int]],
    truth: Mapping[str, np.ndarray],
    first: float,
    stride: float | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """By bag, the largest IoU of the predicted box with a true box. Bags without true boxes are left out."""
    return {
        name: float(box_iou(box_of(heatmap, sizes[name], first, stride, threshold), truth[name]).max())
        for name, heatmap in maps.items()
        if name in truth
    }


def pointed(
    maps: Mapping[str, np.ndarray],
    sizes: Mapping[str, tuple[int, int]],
    truth: Mapping[str, np.ndarray],
    first: float,
    stride: float | None = None,
) -> list[bool]:
    """For each bag of ``maps``, whether the centre of the cell with the largest value lies in one of its true boxes."""
    return [
        bool(contains(truth[name], point_of(heatmap, sizes[name], first, stride)).any())
        for name, heatmap in maps.items()
    ]


def _area_ratio(box: np.ndarray, truth: np.ndarray) -> float:
    """The area of ``box`` (4,) divided by the median area of ``truth`` (n, 4). 0 if there is no box (NaN)."""
    return float(np.nan_to_num(box[2] * box[3]) / np.median(truth[:, 2] * truth[:, 3]))


def box_metrics(
    maps: Mapping[str, np.ndarray],
    sizes: Mapping[str, tuple[int, int]],
    truth: Mapping[str, np.ndarray],
    first: float,
    stride: float | None = None,
    threshold: float = 0.5,
) -> dict[str, float]:
    """Fractions of the bags with true boxes that are found, with one predicted box and one point per bag.

    A bag counts as found at T if the predicted box has an IoU greater than T with any of its true boxes. For
    ``pointing``, the centre of the cell with the largest value must lie in one of them. ``area_ratio`` is the median
    over the bags of the area of the predicted box, divided by the median area of the true boxes of the bag.
    """
    overlaps = best_overlaps(maps, sizes, truth, first, stride, threshold)
    if not overlaps:
        return {}
    hits = pointed({name: maps[name] for name in overlaps}, sizes, truth, first, stride)
    result = {"images": len(overlaps), "pointing": float(np.mean(hits))}
    boxes = {name: box_of(maps[name], sizes[name], first, stride, threshold) for name in overlaps}
    result["area_ratio"] = float(np.median([_area_ratio(box, truth[name]) for name, box in boxes.items()]))
    for t in T_IOU:
        result[f"iou_{t:g}"] = float(np.mean([overlap > t for overlap in overlaps.values()]))
    return result | box_intervals([overlaps])


def box_intervals(repeats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The 95 % intervals over bags of the fractions found at 0.3 and 0.5, each the mean over the repeats.

    Args:
        repeats: the overlaps of the same bags in each repeat, as :func:`best_overlaps` returns them.
    """
    overlaps = np.array([[found[name] for name in repeats[0]] for found in repeats])
    result = {}
    for t in (0.3, 0.5):
        low, high = bootstrap(lambda picked, t=t: float((overlaps[:, picked] > t).mean()), overlaps.shape[1])
        result |= {f"iou_{t:g}_low": low, f"iou_{t:g}_high": high}
    return result


def auc_interval(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The 95 % interval over bags of the mean AUC of ``scores`` (repeats, n), with ``labels`` (n,)."""
    low, high = bootstrap(
        lambda picked: float(np.mean([auc(one[picked], labels[picked]) for one in scores])), scores.shape[1]
    )
    return {"auc_low": low, "auc_high": high}
