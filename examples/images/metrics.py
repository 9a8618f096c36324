"""Metrics over the test images, with confidence intervals over patients. Unknown labels (NaN) are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from common.metrics import Interval, auc, interval
from sklearn.metrics import roc_curve

#: An AUC and its interval from fewer patients with the class, or without it, are unreliable.
FEW_PATIENTS = 10


def patients_with(value: int, labels: np.ndarray, patients: np.ndarray) -> list[int]:
    """For each class, the number of patients with an image whose label (n, C) is ``value``, 0 or 1."""
    return [len(np.unique(patients[column == value])) for column in labels.T]


def auc_per_class(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """AUC of scores (n, C) and labels (n, C), 0 or 1, by class name, and their "mean".

    NaN for a class whose known labels are all equal. The mean is over the other classes.
    """
    known = ~np.isnan(labels)
    values = {name: auc(scores[known[:, c], c], labels[known[:, c], c]) for c, name in enumerate(names)}
    return values | {"mean": _mean(values.values())}


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def draws_of_patients(patients: np.ndarray, shown: np.ndarray, draws: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """The number of times that each row (n,) is drawn, in each of ``draws`` bootstrap draws of whole patients.

    Patients with a row that is ``shown`` (n,) and patients without one are drawn separately, each in their own number.
    So every draw contains such rows, even if few patients have them.
    """
    _, first, patient = np.unique(patients, return_index=True, return_inverse=True)
    shows = np.zeros(len(first), bool)
    np.logical_or.at(shows, patient, shown)
    members = [np.flatnonzero(shows == kind) for kind in (False, True)]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        chosen = np.concatenate([inside[rng.integers(0, max(len(inside), 1), len(inside))] for inside in members])
        yield np.bincount(chosen, minlength=len(first))[patient]


def over_patients(
    measures: dict[str, Callable[[np.ndarray], float]],
    shown: np.ndarray,
    patients: np.ndarray,
    draws: int,
    seed: int,
) -> dict[str, Interval]:
    """95 % intervals of the ``measures`` of classes and of their mean. A measure takes the count of each row (n,).

    Each class has separate draws that keep the number of patients with the class (rows ``shown`` (n, classes)). So
    every draw contains the class, but an interval from a few patients is unreliable. The draws for the mean are over
    all patients.
    """
    result = {}
    for c, (name, of) in enumerate(measures.items()):
        result[name] = interval([of(weight) for weight in draws_of_patients(patients, shown[:, c], draws, (seed, c))])
    mean = _mean_over_patients(list(measures.values()), patients, draws, (seed, len(measures)))
    # the assumed changes of missing classes may exceed the range of a fraction
    return result | {"mean": Interval(*np.clip(mean, 0.0, 1.0).tolist())}


def _mean_over_patients(
    measures: Sequence[Callable[[np.ndarray], float]], patients: np.ndarray, draws: int, seed: Sequence[int]
) -> Interval:
    """The 95 % interval of the mean of the ``measures`` of classes, over draws of all patients.

    If a class is missing from a draw, it is assumed to change as the other classes do on average.
    """
    whole = np.array([of(np.ones(len(patients), int)) for of in measures])
    draws_of_all = draws_of_patients(patients, np.zeros(len(patients), bool), draws, seed)
    changes = [_mean(np.array([of(weight) for of in measures]) - whole) for weight in draws_of_all]
    return interval(_mean(whole) + np.array(changes))


def auc_intervals(
    scores: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals over patients of the AUCs that ``auc_per_class`` returns."""
    measures = {name: weighted_auc(scores[:, c], labels[:, c]) for c, name in enumerate(names)}
    return over_patients(measures, labels > 0, patients, draws, seed)


def auc_difference_interval(
    scores: np.ndarray, others: np.ndarray, labels: np.ndarray, patients: np.ndarray, draws: int = 1000, seed: int = 0
) -> Interval:
    """95 % interval over patients of the mean AUC of ``scores`` minus that of ``others``, both (n, C), same images."""

    def difference(c: int) -> Callable[[np.ndarray], float]:
        one, other = (weighted_auc(some[:, c], labels[:, c]) for some in (scores, others))
        return lambda weight: one(weight) - other(weight)

    classes = labels.shape[1]
    return _mean_over_patients([difference(c) for c in range(classes)], patients, draws, (seed, classes))


def weighted_auc(scores: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], float]:
    """A function from weights (n,) to the AUC of the weighted images.

    It sorts once for all draws. scikit-learn sorts for each draw.
    """
    order = np.argsort(scores, kind="stable")
    positive, negative = (labels == 1)[order], (labels == 0)[order]
    _, starts = np.unique(scores[order], return_index=True)  # groups of images with equal scores

    def value(weight: np.ndarray) -> float:
        weight = weight[order]
        positives = np.add.reduceat(weight * positive, starts)
        negatives = np.add.reduceat(weight * negative, starts)
        pairs = float(positives.sum()) * float(negatives.sum())
        below = np.cumsum(negatives) - negatives / 2  # a pair with equal scores counts half
        return float(positives @ below) / pairs if pairs else math.nan

    return value


def mean_intervals(
    values: np.ndarray,
    classes: np.ndarray,
    patients: np.ndarray,
    names: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals over patients of the mean of ``values`` (n,) in each class, and of the mean over the classes.

    Args:
        classes: class numbers (n,).
    """
    present = np.unique(classes)
    measures = {names[c]: weighted_mean(values, classes == c) for c in present}
    return over_patients(measures, classes[:, None] == present, patients, draws, seed)


def difference_intervals(
    values: np.ndarray, classes: np.ndarray, patients: np.ndarray, draws: int = 1000, seed: int = 0
) -> list[Interval]:
    """95 % intervals over patients of the mean over the classes of each column of ``values`` (k, m).

    For differences of two methods on the same boxes, with the class numbers ``classes`` (k,).
    """
    weights = np.array(list(draws_of_patients(patients, np.zeros(len(patients), bool), draws, (seed, 0))), float)
    changes = []
    for c in np.unique(classes):
        inside = classes == c
        total = weights[:, inside].sum(1, keepdims=True)
        drawn = np.divide(weights[:, inside] @ values[inside], total, out=np.full((draws, values.shape[1]), math.nan),
                          where=total > 0)  # fmt: skip
        changes.append((drawn - values[inside].mean(0), values[inside].mean(0)))
    whole = np.mean([mean for _, mean in changes], axis=0)
    shifts = np.array([shift for shift, _ in changes])  # (classes, draws, m)
    count = np.maximum((~np.isnan(shifts[..., :1])).sum(0), 1)
    return [interval(column) for column in (whole + np.nansum(shifts, axis=0) / count).T]


def weighted_mean(values: np.ndarray, inside: np.ndarray) -> Callable[[np.ndarray], float]:
    """A function from weights (n,) to the weighted mean of the ``values`` (n,) that are ``inside`` (n,)."""

    def value(weight: np.ndarray) -> float:
        total = float((weight * inside).sum())
        return float((weight * inside) @ values) / total if total else math.nan

    return value


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of ``scores`` (n,) with the largest sensitivity + specificity (Youden) on these labels (n,).

    The threshold is halfway between the lowest score above it and the next lower one, so that p > threshold selects the
    same images. 0.5 if all labels are equal. For labels of validation images.
    """
    known = ~np.isnan(labels)
    scores, labels = scores[known], np.asarray(labels)[known] > 0
    if labels.all() or not labels.any():
        return 0.5
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    above = thresholds[np.argmax(true - false)]  # the lowest score that is predicted positive
    lower = scores[scores < above]
    if not np.isfinite(above):  # the best is to predict no positive
        return float(np.max(scores))
    return float((above + lower.max()) / 2) if len(lower) else float(np.nextafter(above, -np.inf))
