"""The metrics of a trained network: intersection over union of the instances of its bags."""

from __future__ import annotations

import math

import numpy as np

#: The metrics: AUC of the bags, and two IoUs of their instances.
METRICS = ("auc", "iou", "iou_pooled")


def iou(found: np.ndarray, positive: np.ndarray, offsets: np.ndarray) -> float:
    """Mean over the bags of the intersection over union of the predicted and the true positive instances.

    Bags with neither are left out. A negative bag with a predicted instance counts as 0. NaN if no bag counts.
    """
    both, either = (_per_group(x, offsets) for x in (found & positive, found | positive))
    counts = either > 0
    return float((both[counts] / either[counts]).mean()) if counts.any() else math.nan


def iou_pooled(found: np.ndarray, positive: np.ndarray, offsets: np.ndarray, batch_size: int = 64) -> float:
    """Mean over batches of ``batch_size`` bags of the intersection over union of all their instances."""
    edges = np.append(offsets[:-1:batch_size], offsets[-1])
    return iou(found, positive, edges)


def _per_group(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of ``x`` within each group. Groups must not be empty."""
    return np.add.reduceat(x.astype(np.int64), offsets[:-1])
