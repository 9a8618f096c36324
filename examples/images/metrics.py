"""What is measured over the test list of ChestX-ray14, with intervals over patients, and what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from common.metrics import auc
from sklearn.metrics import roc_curve

#: An interval from fewer patients says little.
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


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def draws_of_patients(patients: np.ndarray, shown: np.ndarray, draws: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """How often each row (n,) is drawn, ``draws`` times: patients with replacement, all rows of a patient together.

    Those who have a row that is ``shown`` (n,) and those who have none are drawn apart, as many of each as there are:
    what is shown does not vanish from a draw, however few show it.
    """
    _, first, patient = np.unique(patients, return_index=True, return_inverse=True)
    shows = np.zeros(len(first), bool)
    np.logical_or.at(shows, patient, shown)
    members = [np.flatnonzero(shows == kind) for kind in (False, True)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        chosen = np.concatenate([inside[rng.integers(0, max(len(inside), 1), len(inside))] for inside in members])
        yield np.bincount(chosen, minlength=len(first))[patient]


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """From the 2.5th to the 97.5th percentile of the ``values`` that are defined."""
    defined = np.asarray(values, np.float64)
    defined = defined[~np.isnan(defined)]
    low, high = np.percentile(defined, (2.5, 97.5)) if len(defined) else (math.nan, math.nan)
    return Interval(float(low), float(high))


def over_patients(
    measures: dict[str, Callable[[np.ndarray], float]],
    shown: np.ndarray,
    patients: np.ndarray,
    draws: int,
    seed: int,
) -> dict[str, Interval]:
    """95 % intervals of the ``measures`` of classes and of their mean; a measure takes how often each row (n,) counts.

    Each class has draws of its own, in which the patients who show it (rows ``shown`` (n, classes)) keep their number:
    it does not vanish, but an interval from a few patients says little. The mean has draws of all patients alike; where
    a class is missing from one, the mean moves as the other classes do.
    """
    result = {}
    for c, (name, of) in enumerate(measures.items()):
        result[name] = interval([of(weight) for weight in draws_of_patients(patients, shown[:, c], draws, (seed, c))])
    whole = np.array([of(np.ones(len(patients), int)) for of in measures.values()])
    alike = draws_of_patients(patients, np.zeros(len(patients), bool), draws, (seed, len(measures)))
    moved = [_mean(np.array([of(weight) for of in measures.values()]) - whole) for weight in alike]
    # what moves as far as the others do may leave the range of a share
    return result | {"mean": interval(np.clip(_mean(whole) + np.array(moved), 0.0, 1.0))}


def auc_intervals(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals over patients of what ``auc_per_class`` gives."""
    measures = {name: _weighted_auc(scores[:, c], labels[:, c] > 0) for c, name in enumerate(names)}
    return over_patients(measures, labels > 0, patients, draws, seed)


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
    """95 % intervals over patients of what ``boxes.per_class`` gives of values (n,) and class numbers (n,)."""
    present = np.unique(classes)
    measures = {names[c]: _weighted_mean(values, classes == c) for c in present}
    return over_patients(measures, classes[:, None] == present, patients, draws, seed)


def _weighted_mean(values: np.ndarray, inside: np.ndarray) -> Callable[[np.ndarray], float]:
    def value(weight: np.ndarray) -> float:
        total = float((weight * inside).sum())
        return float((weight * inside) @ values) / total if total else math.nan

    return value


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
