"""The result of an evaluation as text: the better run, and the boxes without a network that are better than the runs.

Comparisons are paired: both methods are measured on the same images and boxes. The confidence interval over patients is
that of the difference of their means over the classes. A method is better if this interval is above 0. A run must also
have a mean AUC above chance: the interval of the AUC is above 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from images.evaluation import Evaluated, trivial_of
from images.metrics import FEW_PATIENTS, Interval, auc_difference_interval, difference_intervals, patients_with
from images.truth import CEILING, Truth
from sgl_ops.localization import T_IOU, per_class

#: With fewer boxes, the intervals are too wide for conclusions.
FEW_BOXES = 100


class Comparison(NamedTuple):
    """The accuracy of ``name`` at IoU > ``t`` (mean over classes), and the interval of its difference to ``other``."""

    name: str
    other: str
    t: float
    share: float
    interval: Interval

    @property
    def better(self) -> bool:
        return self.interval.low > 0

    @property
    def worse(self) -> bool:
        return self.interval.high < 0


def compare_boxes(runs: Sequence[Evaluated], truth: Truth, draws: int, seed: int) -> list[Comparison]:
    """Compares each run with each kind of box without a network, then the first run with the second, without gate."""
    hits = {run.name: run.overlaps[:, None] > T_IOU for run in runs}
    pairs = []
    for run in runs:
        for name, boxes in trivial_of(truth, run.predictions).items():
            if name != CEILING:
                hits[name] = truth.overlaps(boxes)[:, None] > T_IOU
                pairs.append((run.name, name))
    pairs += [(runs[0].name, run.name) for run in runs[1:]]
    names = truth.class_names
    means = {
        name: [per_class(column, truth.classes, names)["mean"] for column in found.T] for name, found in hits.items()
    }
    differences = np.concatenate([hits[a].astype(float) - hits[b] for a, b in pairs], axis=1)
    patients = truth.patients[truth.image]
    intervals = iter(difference_intervals(differences, truth.classes, patients, draws, seed))
    return [Comparison(a, b, t, means[a][k], next(intervals)) for a, b in pairs for k, t in enumerate(T_IOU)]


def listed(items: Iterable[str]) -> str:
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _at_chance(run: Evaluated) -> bool:
    """Whether the run has a mean AUC that is not above chance. False if no AUC is defined."""
    return run.metrics["auc_ci"]["mean"][0] <= 0.5


def _unreliable(truth: Truth) -> list[str]:
    """Classes that too few patients have, or too few do not have, for an AUC."""
    counts = zip(*(patients_with(value, truth.labels, truth.patients) for value in (0, 1)), strict=True)
    return [name for name, count in zip(truth.class_names, counts, strict=True) if min(count) < FEW_PATIENTS]


def _where(steps: Sequence[float]) -> str:
    return "at every IoU" if len(steps) == len(T_IOU) else f"at IoU > {listed(f'{t:g}' for t in steps)}"


def _against_trivial(run: Evaluated, comparisons: Sequence[Comparison]) -> list[str]:
    """Up to two sentences: the boxes without a network that are worse than ``run``, and those that are not."""
    own = [c for c in comparisons if c.name == run.name]
    sentences = []
    for kind, wanted in (("is better than", True), ("is not better than", False)):
        found = []
        for other in dict.fromkeys(c.other for c in own):
            steps = [c.t for c in own if c.other == other and c.better == wanted]
            if steps:
                worse = [c.t for c in own if c.other == other and c.worse]
                clearly = f", clearly worse {_where(worse)}" if worse and not wanted else ""
                found.append(f"the {other} ({_where(steps)}{clearly})")
        if found and not (wanted and _at_chance(run)):
            sentences.append(f"{run.name} {kind} {listed(found)}.")
    return sentences


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"


def verdict(
    runs: Sequence[Evaluated], truth: Truth, comparisons: Sequence[Comparison], draws: int, seed: int
) -> list[str]:
    """The sentences of the verdict, which begin the report."""
    return [line[0].upper() + line[1:] for line in _sentences(runs, truth, comparisons, draws, seed)]


def _sentences(
    runs: Sequence[Evaluated], truth: Truth, comparisons: Sequence[Comparison], draws: int, seed: int
) -> list[str]:
    sentences, units = [], truth.index.about.units
    unreliable = _unreliable(truth)
    for run in runs:
        low, high = run.metrics["auc_ci"]["mean"]
        names = [name for name in run.metrics["auc"] if name != "mean" and not math.isnan(run.metrics["auc"][name])]
        reliable = [name for name in names if name not in unreliable]
        above = sum(run.metrics["auc_ci"][name][0] > 0.5 for name in reliable)
        if not names:
            sentences.append(
                f"The AUC of {run.name} is not defined: no class has test images both with and without it."
            )
            continue
        mean = run.metrics["auc"]["mean"]
        sentence = f"{run.name} classifies with a mean AUC of {mean:.2f} (95 % interval {low:.2f} to {high:.2f})"
        if _at_chance(run):
            sentence += ", which is not above chance (0.5)"
        elif reliable:
            sentence += f"; above chance (0.5) in {above} of {len(reliable)} classes"
        sentences.append(f"{sentence}.")
    few = [name for name in unreliable if any(not math.isnan(run.metrics["auc"][name]) for run in runs)]
    if few:
        sentences.append(
            f"The AUC of {listed(few)} is unreliable: fewer than {FEW_PATIENTS} {units} with it, or without it."
        )
    if len(runs) > 1 and not math.isnan(runs[0].metrics["auc"]["mean"]):
        a, b = runs
        between = auc_difference_interval(
            a.predictions.probability, b.predictions.probability, truth.labels, truth.patients, draws, seed
        )
        gap = f"difference {a.metrics['auc']['mean'] - b.metrics['auc']['mean']:+.3f}, 95 % interval "
        gap += f"{between.low:+.3f} to {between.high:+.3f}"
        if between.low > 0 or between.high < 0:
            better, worse = (a, b) if between.low > 0 else (b, a)
            chance = _at_chance(better)
            words = "has a higher AUC than" if chance else "classifies better than"
            but = ", but is not above chance" if chance else ""
            sentences.append(f"{better.name} {words} {worse.name}{but} ({gap}).")
        else:
            sentences.append(f"The AUCs of {a.name} and {b.name} are not clearly different ({gap}).")
    if not len(truth.boxes):
        return sentences
    for run in runs:
        share, gated = (run.metrics[key]["0.3"]["mean"] for key in ("localization_ungated", "localization"))
        sentences.append(
            f"At IoU > 0.3, {run.name} finds {_percent(share)} of the {truth.counted} (mean over the classes), "
            f"and {_percent(gated)} if the class must also be predicted."
        )
    if len(runs) > 1:
        between_runs = [c for c in comparisons if c.other == runs[1].name]
        for better, words, steps in (
            (runs[0], "finds more boxes than", [c.t for c in between_runs if c.better]),
            (runs[1], "finds fewer boxes than", [c.t for c in between_runs if c.worse]),
        ):
            if steps and not _at_chance(better):
                sentences.append(f"{runs[0].name} {words} {runs[1].name} {_where(steps)}.")
        if not any(c.better or c.worse for c in between_runs):
            sentences.append(f"The boxes of {runs[0].name} and {runs[1].name} are not clearly different at any IoU.")
    trivial = [c for c in comparisons if c.other not in {run.name for run in runs}]
    sentences += [
        f"The AUC of {run.name} is not above chance, so that its boxes are no evidence that it finds the classes."
        for run in runs
        if _at_chance(run)
    ]
    for run in runs:
        sentences += _against_trivial(run, trivial)
    if len(truth.boxes) < FEW_BOXES:
        sentences.append(f"There are only {len(truth.boxes)} {truth.counted}: the intervals are wide.")
    return sentences
