"""Area under the ROC curve."""

from __future__ import annotations

import math

import numpy as np
from sklearn.metrics import roc_auc_score


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of bag scores; NaN if all labels are equal."""
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else math.nan
