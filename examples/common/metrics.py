"""Area under the ROC curve, 95 % intervals of bootstrap draws, and signs of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata


class Interval(NamedTuple):
    """The 95 % interval of a measure; NaN where it is not defined."""

    low: float
    high: float


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """From the 2.5th to the 97.5th percentile of the ``values`` that are defined."""
    defined = np.asarray(values, np.float64)
    defined = defined[~np.isnan(defined)]
    low, high = np.percentile(defined, (2.5, 97.5)) if len(defined) else (math.nan, math.nan)
    return Interval(float(low), float(high))


def above_equal_below(differences: np.ndarray) -> tuple[int, int, int]:
    """The number of ``differences`` (n,) above, equal to and below 0. Differences up to 1e-9 count as equal; NaN is not
    counted."""
    equal = np.isclose(differences, 0, atol=1e-9)
    return int((~equal & (differences > 0)).sum()), int(equal.sum()), int((~equal & (differences < 0)).sum())


def signs(differences: np.ndarray) -> str:
    """:func:`above_equal_below` as a text: "ABOVE / EQUAL / BELOW"."""
    return " / ".join(map(str, above_equal_below(differences)))


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
