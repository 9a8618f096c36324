"""Area under the ROC curve."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of bag scores (n,) and labels (n,), 0 or 1; NaN if all labels are equal.

    The AUC is the share of (positive bag, negative bag) pairs in which the positive bag has the higher score. Ties
    count half. Ranks give this share with one sort. scikit-learn's function takes 20 times as long for 40 bags, and an
    interval needs 1000 AUCs.
    """
    positive = labels > 0
    ones = np.count_nonzero(positive)
    zeros = len(labels) - ones
    if ones == 0 or zeros == 0:
        return math.nan
    if np.isnan(scores).any():
        raise ValueError("scores: expected numbers, got NaN")
    ranks = rankdata(scores)  # from 1; tied scores share the mean of their ranks
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))
