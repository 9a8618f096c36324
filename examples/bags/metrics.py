"""The metrics of a trained network: intersection over union of the instances of its bags."""

from __future__ import annotations

import math

import numpy as np

#: The metrics: AUC of the bags, and two IoUs of their instances.
METRICS = ("auc", "iou", "iou_pooled")


def iou(found: np.ndarray, positive: np.ndarray, offsets: np.ndarray) -> float:
    """Mean intersection over union of found and truly positive instances, over the bags that have any of them.

    An instance found in a negative bag makes that bag count, as 0. NaN where no bag counts.
    """
    both, either = (_per_group(x, offsets) for x in (found & positive, found | positive))
    counts = either > 0
    return float((both[counts] / either[counts]).mean()) if counts.any() else math.nan


def iou_pooled(found: np.ndarray, positive: np.ndarray, offsets: np.ndarray, batch_size: int = 64) -> float:
    """Intersection over union of the instances of ``batch_size`` bags together, mean over such batches."""
    edges = np.append(offsets[:-1:batch_size], offsets[-1])
    return iou(found, positive, edges)


def _per_group(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of ``x`` within each group; groups are not empty."""
    return np.add.reduceat(x.astype(np.int64), offsets[:-1])
