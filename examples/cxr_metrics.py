"""What is measured over the test list of ChestX-ray14, with intervals over patients, and what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from metrics import auc
from sklearn.metrics import roc_curve

#: A class shown by fewer patients is one that a draw of patients may miss altogether.
FEW_PATIENTS = 10

#: Of the paper's Table 2 (localization accuracy, behind the class gate) what is known here: the mean over the eight
#: classes, Cardiomegaly, and Effusion at 0.7, where the paper prints 0.1, which can only be 0.01.
PAPER_LOCALIZATION = {
    "SGL (paper, Table 2)": {
        "0.1": {"Cardiomegaly": 0.94, "mean": 0.66},
        "0.3": {"Cardiomegaly": 0.76, "mean": 0.36},
        "0.5": {"Cardiomegaly": 0.32, "mean": 0.13},
        "0.7": {"Cardiomegaly": 0.01, "Effusion": 0.01, "mean": 0.01},
    }
}
#: The same of its Table 1 (AUC on the official test list), row by row: {row: {class: value, ..., "mean": value}}.
PAPER_AUC: dict[str, dict[str, float]] = {}


class Interval(NamedTuple):
    """The 95 % interval of a measure; NaN where it is not defined."""

    low: float
    high: float


def auc_per_class(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """AUC of scores (n, C) and labels (n, C), 0 or 1, by the name of the class, and their "mean".

    NaN for a class of which there are images of one kind only; the mean is over the others.
    """
    values = {name: auc(scores[:, c], labels[:, c]) for c, name in enumerate(names)}
    return values | {"mean": _mean(values.values())}


def _mean(values) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def strata_of(patients: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The stratum (n,) of each row: which of the classes that few patients show its patient shows.

    Args:
        patients: (n,) whose row it is.
        shown: (n, C) bool, whether the row has the class.
    """
    _, patient = np.unique(patients, return_inverse=True)
    shows = np.zeros((patient.max(initial=-1) + 1, shown.shape[1]), bool)
    np.logical_or.at(shows, patient, shown)
    count = shows.sum(0)
    rare = shows[:, (count > 0) & (count < FEW_PATIENTS)]
    if not rare.shape[1]:
        return np.zeros(len(patients), int)
    return np.unique(rare, axis=0, return_inverse=True)[1].reshape(-1)[patient]


def draws_of_patients(patients: np.ndarray, strata: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row (n,) is drawn, ``draws`` times: patients with replacement, all rows of a patient together.

    Every stratum keeps its number of patients, so that a class that few show does not vanish from a draw. The interval
    of such a class is one over those few, and narrower than one over more of them would be.
    """
    _, first, patient = np.unique(patients, return_index=True, return_inverse=True)
    members = [np.flatnonzero(strata[first] == s) for s in np.unique(strata)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        chosen = np.concatenate([np.zeros(0, int), *(rng.choice(inside, len(inside)) for inside in members)])
        yield np.bincount(chosen, minlength=len(first))[patient]


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """From the 2.5th to the 97.5th percentile of the ``values`` that are defined."""
    defined = np.asarray(values, np.float64)
    defined = defined[~np.isnan(defined)]
    low, high = np.percentile(defined, (2.5, 97.5)) if len(defined) else (math.nan, math.nan)
    return Interval(float(low), float(high))


def auc_intervals(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals of what ``auc_per_class`` gives, from ``draws`` draws of patients (``strata_of``)."""
    weighted = [_weighted_auc(scores[:, c], labels[:, c] > 0) for c in range(len(names))]
    rows = [
        [of(weight) for of in weighted]
        for weight in draws_of_patients(patients, strata_of(patients, labels > 0), draws, seed)
    ]
    table = np.array(rows).reshape(draws, len(names))
    return {name: interval(table[:, c]) for c, name in enumerate(names)} | {
        "mean": interval([_mean(row) for row in table])
    }


def _weighted_auc(scores: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], float]:
    """What maps weights (n,) to the AUC of the weighted images: sorted once for all draws, where scikit-learn sorts
    again for each."""
    order = np.argsort(scores, kind="stable")
    positive = positive[order]
    _, starts = np.unique(scores[order], return_index=True)  # images of equal scores

    def value(weight: np.ndarray) -> float:
        weight = weight[order]
        pro = np.add.reduceat(weight * positive, starts)
        contra = np.add.reduceat(weight * ~positive, starts)
        pairs = float(pro.sum()) * float(contra.sum())
        below = np.cumsum(contra) - contra / 2  # of a pair with equal scores half
        return float(pro @ below) / pairs if pairs else math.nan

    return value


def mean_intervals(
    values: np.ndarray,
    classes: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals of what ``boxes.per_class`` gives of hits (n,) and class numbers (n,), over draws of patients."""
    present = [c for c in range(len(names)) if (classes == c).any()]
    shown = np.stack([classes == c for c in present], axis=1) if present else np.zeros((len(values), 0), bool)
    table = []
    for weight in draws_of_patients(patients, strata_of(patients, shown), draws, seed):
        total = weight @ shown
        hits = (weight * values) @ shown
        table.append(np.divide(hits, total, out=np.full(len(present), math.nan), where=total > 0))
    columns = np.array(table).reshape(draws, len(present))
    return {names[c]: interval(columns[:, k]) for k, c in enumerate(present)} | {
        "mean": interval([_mean(row) for row in columns])
    }


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of ``scores`` (n,) with the largest sensitivity + specificity (Youden) on these labels (n,).

    Halfway between the lowest score above it and the next lower one, so that p > threshold is what was measured; 0.5
    where there are images of one kind only. For labels of validation images.
    """
    labels = np.asarray(labels) > 0
    if labels.all() or not labels.any():
        return 0.5
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    above = thresholds[np.argmax(true - false)]  # the lowest score that is called positive
    lower = scores[scores < above]
    if not np.isfinite(above):  # nothing beats calling nothing positive
        return float(np.max(scores))
    return float((above + lower.max()) / 2) if len(lower) else float(np.nextafter(above, -np.inf))
