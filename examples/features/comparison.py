"""The metrics of two runs on the same bags, their difference, and its interval over patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from common.metrics import above_equal_below
from images.metrics import draws_of_patients, interval, weighted_auc, weighted_mean
from sklearn.metrics import average_precision_score

from features.evaluation import T_IOU, best_overlaps, instance_overlap, pointed
from features.opened_run import OpenedRun
from features.runs import Predictions, cells_of, maps_of

#: A metric as a function of the number of times that each bag of the labels is drawn (N,).
Measure = Callable[[np.ndarray], float]


class Difference(NamedTuple):
    """A metric of two runs, each the mean over the repeats.

    Attributes:
        first, second: the values of the two runs.
        low, high: the 95 % interval over patients of first - second. The trained networks stay the same.
        above, equal, below: the number of repeats in which ``first`` is above, equal to and below ``second``.
    """

    label: str
    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    above: int
    equal: int
    below: int


def differences(first: OpenedRun, second: OpenedRun, draws: int = 1000, seed: int = 0) -> list[Difference]:
    """All metrics that both runs have, by class.

    Patients are drawn with replacement. The number of patients with a positive bag of the class stays the same.

    Raises:
        ValueError: the runs have other classes, labels, splits, folds or numbers of repeats.
    """
    _refuse_unequal(first, second)
    labels = first.labels
    predictions = [run.predictions() for run in (first, second)]
    tested = np.isin(labels.names, predictions[0][0].names)
    rows = []
    for c, name in enumerate(labels.classes):
        one, other = (
            [_measures(p, run, c) for p in repeats] for repeats, run in zip(predictions, (first, second), strict=True)
        )
        weights = list(_drawn(labels.groups, labels.values[:, c] == 1, tested, draws, (seed, c)))
        for metric in one[0].keys() & other[0].keys():
            pairs = [(a[metric], b[metric]) for a, b in zip(one, other, strict=True)]
            row = _difference(name, metric, pairs, weights)
            if not math.isnan(row.difference):  # NaN: the test bags of the class have one label only
                rows.append(row)
    order = {metric: i for i, metric in enumerate(METRICS)}
    return sorted(rows, key=lambda row: (labels.classes.index(row.label), order[row.metric]))


#: The metrics, in the order of the table: as in the tables of train_features.py.
METRICS = (
    "auc",
    *(f"instance_{kind}" for kind in ("auc_all", "auc", "ap", "iou")),
    "pointing",
    *(f"iou_{t:g}" for t in T_IOU),
)


def _drawn(
    patients: np.ndarray, positive: np.ndarray, tested: np.ndarray, draws: int, seed: Sequence[int]
) -> Iterator[np.ndarray]:
    """The number of times that each bag (N,) is drawn: patients of the bags that are ``tested`` (N,)."""
    for counts in draws_of_patients(patients[tested], positive[tested], draws, seed):
        weights = np.zeros(len(tested), int)
        weights[tested] = counts
        yield weights


def _refuse_unequal(first: OpenedRun, second: OpenedRun) -> None:
    for what, one, other in (
        ("instance labels", *(run.truth.instances for run in (first, second))),
        (
            "boxes",
            *(
                {(c, bag): v for c, of_class in run.truth.boxes.items() for bag, v in of_class.items()}
                for run in (first, second)
            ),
        ),
    ):
        # a run without such a table is compared without it
        if (
            one
            and other
            and (one.keys() != other.keys() or any(not np.array_equal(one[k], other[k], True) for k in one))
        ):
            raise ValueError(f"runs: expected equal {what} in {first.folder} and {second.folder}")
    for what, one, other in (
        ("classes", first.labels.classes, second.labels.classes),
        ("labels", first.data["labels"], second.data["labels"]),
        ("split", first.data["split"], second.data["split"]),
        ("folds", first.settings["folds"], second.settings["folds"]),
        ("test", first.settings["test"], second.settings["test"]),
        ("repeats", len({r.repeat for r in first.runs}), len({r.repeat for r in second.runs})),
    ):
        if one != other:
            values = "" if what in ("labels", "split") else f": {one} and {other}"
            raise ValueError(f"runs: expected equal {what} in {first.folder} and {second.folder}{values}")


def _difference(
    label: str, metric: str, pairs: Sequence[tuple[Measure, Measure]], weights: Sequence[np.ndarray]
) -> Difference:
    once = np.ones(len(weights[0]), int)
    values = np.array([[one(once), other(once)] for one, other in pairs])
    drawn = [float(np.mean([one(w) - other(w) for one, other in pairs])) for w in weights]
    change = values[:, 0] - values[:, 1]
    first, second = values.mean(0).tolist()
    return Difference(label, metric, first, second, first - second, *interval(drawn), *above_equal_below(change))


def _measures(predictions: Predictions, run: OpenedRun, c: int) -> dict[str, Measure]:
    """The metrics of class ``c`` in a repeat, as functions of the number of times that each bag is drawn."""
    row = {name: i for i, name in enumerate(run.labels.names)}
    tested = np.array([row[name] for name in predictions.names.tolist()])
    labels = run.labels.values[tested, c]
    measures = {"auc": _of(tested, weighted_auc(predictions.bags[:, c], labels))}
    known = [
        (row[name], p[:, c], run.truth.instances[name][:, c])
        for name, p in predictions.by_bag()
        if name in run.truth.instances
    ]
    if known:
        positive = [bag for bag in known if run.labels.values[bag[0], c] == 1]
        measures["instance_auc_all"] = _instance_auc(*_together(known))
        measures |= dict(_instance_measures(positive)) if positive else {}
    boxes = run.truth.boxes.get(run.labels.classes[c], {})
    maps, sizes = maps_of(predictions, run.bags, c)
    overlaps = best_overlaps(maps, sizes, boxes, *cells_of(run.bags), run.truth.threshold)
    if overlaps:
        places, found = np.array([row[name] for name in overlaps]), np.array(list(overlaps.values()))
        hits = pointed({name: maps[name] for name in overlaps}, sizes, boxes, *cells_of(run.bags))
        everywhere = np.ones(len(places), bool)
        measures["pointing"] = _of(places, weighted_mean(np.array(hits, float), everywhere))
        for t in T_IOU:
            measures[f"iou_{t:g}"] = _of(places, weighted_mean((found > t).astype(float), everywhere))
    return measures


#: The number of a bag, and the probabilities and labels (L,) of its instances.
Instances = tuple[int, np.ndarray, np.ndarray]


def _together(bags: Sequence[Instances]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers of the bags, the probabilities and the labels of all instances with a known label."""
    numbers = np.concatenate([np.full(len(p), i) for i, p, _ in bags])
    p, y = (np.concatenate([bag[k] for bag in bags]) for k in (1, 2))
    known = ~np.isnan(y)
    return numbers[known], p[known], y[known]


def _instance_auc(numbers: np.ndarray, p: np.ndarray, y: np.ndarray) -> Measure:
    return _of(numbers, weighted_auc(p, y))


def _instance_measures(bags: Sequence[Instances]) -> Iterator[tuple[str, Measure]]:
    """The metrics inside positive bags."""
    numbers, p, y = _together(bags)
    yield "instance_auc", _instance_auc(numbers, p, y)
    if y.any():
        yield "instance_ap", _of(numbers, lambda w: float(average_precision_score(y, p, sample_weight=w)))
    overlaps = np.array([instance_overlap(p, y) for _, p, y in bags])
    yield "instance_iou", _of(np.array([i for i, _, _ in bags]), weighted_mean(overlaps, ~np.isnan(overlaps)))


def _of(places: np.ndarray, measure: Measure) -> Measure:
    """The ``measure`` of items that belong to the bags ``places`` (n,), as a function of the weights of all bags."""
    return lambda weights: measure(weights[places].astype(float)) if weights[places].any() else math.nan
