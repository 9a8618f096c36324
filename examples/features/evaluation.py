"""Metrics of the predictions of a trained head: for bags, instances and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from common import metrics
from sklearn.metrics import average_precision_score

from sgl_ops.localization import box_iou, contains, heatmap_to_box, heatmap_to_boxes, heatmap_to_point

T_IOU = (0.1, 0.3, 0.5)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of scores (n,) and labels (n,), NaN = unknown. NaN if all known labels are equal."""
    known = ~np.isnan(labels)
    return metrics.auc(scores[known], labels[known])


def bootstrap(
    measure: Callable[[np.ndarray], float], count: int, repeats: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of ``measure(indices)`` over ``repeats`` samples of ``count`` bags, drawn with replacement."""
    generator = np.random.default_rng(seed)
    values = np.array([measure(generator.integers(count, size=count)) for _ in range(repeats)])
    values = values[~np.isnan(values)]
    return tuple(np.quantile(values, (0.025, 0.975)).tolist()) if len(values) else (math.nan, math.nan)


def instance_metrics(
    found: Sequence[np.ndarray], truth: Sequence[np.ndarray], positive: Sequence[bool]
) -> dict[str, float]:
    """Metrics of the instances for one class, from probabilities ``found`` and labels ``truth`` (L_i,) of each bag.

    ``auc_all`` is the AUC of all instances. ``auc`` and ``ap`` are over the instances of all positive bags together.
    ``iou`` is the mean over the positive bags of the IoU of the instances with p > 0.5 and the positive instances.
    """
    everything = np.concatenate(found), np.concatenate(truth)
    inside = [i for i, is_positive in enumerate(positive) if is_positive]
    result = {"auc_all": auc(*everything), "auc": math.nan, "ap": math.nan, "iou": math.nan}
    if not inside:
        return result
    p, y = (np.concatenate([x[i] for i in inside]) for x in (found, truth))
    known = ~np.isnan(y)
    result["auc"] = auc(p, y)
    if y[known].sum() > 0:
        result["ap"] = float(average_precision_score(y[known], p[known]))
    overlaps = []
    for i in inside:
        known = ~np.isnan(truth[i])
        chosen, true = found[i][known] > 0.5, truth[i][known] == 1
        if (chosen | true).any():
            overlaps.append((chosen & true).sum() / (chosen | true).sum())
    result["iou"] = float(np.mean(overlaps)) if overlaps else math.nan
    return result


def box_of(heatmap: np.ndarray, size: tuple[int, int], first: float) -> np.ndarray:
    """The box (4,) of a map (h, w): bilinear, p > 0.5, component of the maximum, without opening and closing."""
    return heatmap_to_box(heatmap, size, 0.5, "bilinear", 1, first)


def boxes_of(heatmap: np.ndarray, size: tuple[int, int], first: float) -> np.ndarray:
    """The boxes (n, 4) of all components of a map, the one of :func:`box_of` first."""
    return heatmap_to_boxes(heatmap, size, 0.5, "bilinear", 1, first)


def best_overlaps(
    maps: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]], truth: Mapping[str, np.ndarray], first: float
) -> dict[str, float]:
    """By bag, the largest IoU of the predicted box with a true box. Bags without true boxes are left out."""
    return {
        name: float(box_iou(box_of(heatmap, sizes[name], first), truth[name]).max())
        for name, heatmap in maps.items()
        if name in truth
    }


def box_metrics(
    maps: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]], truth: Mapping[str, np.ndarray], first: float
) -> dict[str, float]:
    """Fractions of the bags with true boxes that are found, with one predicted box and one point per bag.

    A bag counts as found at T if the predicted box has an IoU greater than T with any of its true boxes. For
    ``pointing``, the centre of the cell with the largest value must lie in one of them.
    """
    overlaps = best_overlaps(maps, sizes, truth, first)
    if not overlaps:
        return {}
    hits = [contains(truth[name], heatmap_to_point(maps[name], sizes[name], first)).any() for name in overlaps]
    result = {"images": len(overlaps), "pointing": float(np.mean(hits))}
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
