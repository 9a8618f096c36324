"""Warnings about trainings: SGL never started, or the network seems not to have found the object.

All texts that say what to change are here.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from common.losses import deciding_auc

from features.recommended import SEARCHED_HEADS, search_options
from features.training import Settings
from sgl_ops import LamSchedule

#: A training whose last bag loss exceeds the (lower) median of all trainings by this factor seems to have failed. It
#: compares three or more trainings. Chosen on 39 trainings of 150 blood-smear photos; see docs/own-features.md.
HIGH_LOSS = 1.15
#: A smaller excess is no sign: all trainings with a loss near 0 have learnt.
LEAST_EXCESS = 0.03
#: The test AUC is not above chance if a random order reaches it with a probability above 5 % (one-sided).
CHANCE = 1.645
#: The place of the reasons that concern all classes.
ALL_CLASSES = "all classes"
#: The beginning of a reason: the labels of a class are all negative, or all positive, in the training.
TRAINED_WITHOUT = "trained without"
#: Boxes are called too large or too small if their area differs from that of the true boxes by more than this factor,
#: and if fewer images than this fraction have a box with IoU > 0.3.
OTHER_SIZE, ENOUGH_BOXES = 3.0, 0.5
#: Fewer test bags of a kind, or fewer images with boxes, give no warning: their metrics are too uncertain.
FEWEST = 8


def training_warnings(
    failed: Mapping[tuple[int, int], Mapping[str, Sequence[str]]],
    rows: Sequence[Mapping[str, object]],
    histories: Mapping[tuple[int, int], Sequence[Mapping]],
    labels: Mapping[tuple[int, int], np.ndarray],
    settings: Settings,
    many_folds: bool,
    fine_tuned: bool = False,
    extracted: bool = True,
) -> list[str]:
    """The warnings about the trainings of a command, each a paragraph.

    Args:
        failed: the result of :func:`failures`.
        rows: the rows of :func:`features.runs.rows_of_trainings`.
        histories: the rows of the epochs by (repeat, fold), as ``train`` logs them. Some may be missing or empty.
        labels: the labels (N, C) of the training bags by (repeat, fold).
        many_folds: the repeats have folds.
        fine_tuned: the trainings continue those of another run.
        extracted: the features are those of extract_features.py.
    """
    known = {key: history for key, history in histories.items() if history}
    started = lam_advice(list(known.values()), [labels[key] for key in known], settings, extracted)
    advice = failure_advice(failed, rows, settings, many_folds, fine_tuned, extracted)
    return [text for text in (started, advice) if text is not None]


def lam_advice(
    histories: Sequence[Sequence[Mapping]], labels: Sequence[np.ndarray], settings: Settings, extracted: bool = True
) -> str | None:
    """What it means if lam stayed 0, or did not reach its value, and what to change. None if lam reached it everywhere.

    Args:
        histories: the rows of the epochs of each run, as ``train`` logs them.
        labels: the labels (N, C) of the training bags of each run.
        extracted: as in :func:`training_warnings`.
    """
    if settings.loss != "sgl" or settings.lam == 0:
        return None
    idle = [run for run, history in enumerate(histories) if history and all(row["lam"] == 0 for row in history)]
    slow = _slow_rise(histories, settings)
    if not idle:
        return slow
    best = _best_deciding_auc([(histories[run], labels[run]) for run in idle], settings.start_auc)
    text = (
        f"lam stayed 0 in {len(idle)} of {len(histories)} runs. These runs trained with the bag loss only: SGL had no "
        f"effect. The instance loss starts when the training AUC of half of the classes reaches --start-auc "
        f"{settings.start_auc:g}, or more with few bags.{best} "
    )
    if not any(can_learn(labels[run], settings.start_auc) for run in idle):
        return f"{text}There are too few training bags: a class needs {fewest_bags(settings.start_auc)}."
    changes = [f"train longer (--epochs {2 * settings.epochs})"]
    changes += _search_advice(settings)
    changes.append(_other_features(extracted))
    return (
        text + f"To change this: {'; '.join(changes)}. If the AUC is close to the needed value, lower "
        "--start-auc. --start at_once uses the instance loss from the first step." + (f" {slow}" if slow else "")
    )


def failures(
    rows: Sequence[Mapping[str, object]],
    histories: Mapping[tuple[int, int], Sequence[Mapping]],
    settings: Settings,
) -> dict[tuple[int, int], dict[str, list[str]]]:
    """The trainings whose network seems not to have found the object: the reasons, by (repeat, fold) and class.

    A high loss is under ``ALL_CLASSES``. Arguments are those of :func:`training_warnings`.
    """
    known = {key: history for key, history in histories.items() if history}
    losses = {key: history[-1].get("bag_loss") for key, history in known.items()}
    if settings.loss != "sgl":  # the whole loss, also of a checkpoint that has no bag_loss
        losses = {key: history[-1]["loss"] for key, history in known.items()}
    losses = {key: loss for key, loss in losses.items() if loss is not None}
    usual = statistics.median_low(losses.values()) if len(losses) > 2 else math.nan
    failed: dict[tuple[int, int], dict[str, list[str]]] = {}
    for row in sorted(rows, key=lambda row: (row["repeat"], row["fold"])):
        key = row["repeat"], row["fold"]
        if losses.get(key, 0) > max(HIGH_LOSS * usual, usual + LEAST_EXCESS):
            kind = "bag loss" if settings.loss == "sgl" else "loss"
            text = f"{kind} {losses[key]:.2f}, the median is {usual:.2f}"
            failed.setdefault(key, {})[ALL_CLASSES] = [text]
        if signs := _signs(row):
            failed.setdefault(key, {})[row["class"]] = signs
    return failed


def failure_advice(
    failed: Mapping[tuple[int, int], Mapping[str, Sequence[str]]],
    rows: Sequence[Mapping[str, object]],
    settings: Settings,
    many_folds: bool,
    fine_tuned: bool = False,
    extracted: bool = True,
) -> str | None:
    """The ``failed`` trainings, why, and what to change. None if there is none.

    Arguments are those of :func:`training_warnings`.
    """
    if not failed:
        return None
    many_repeats = len({row["repeat"] for row in rows}) > 1
    many_classes = len({row["class"] for row in rows}) > 1
    lines = []
    for (repeat, fold), by_class in failed.items():
        reasons = [
            f"{text} of {label}" if many_classes and label != ALL_CLASSES else text
            for label, texts in by_class.items()
            for text in texts
        ]
        name = f"fold {fold}" if many_folds else f"seed {repeat}"
        name += f" of repeat {repeat}" if many_folds and many_repeats else ""
        lines.append(f"{name} ({'; '.join(reasons)})")
    changes = []
    every = [text for by_class in failed.values() for texts in by_class.values() for text in texts]
    untrained = [text for text in every if text.startswith(TRAINED_WITHOUT)]
    if untrained:
        changes.append("use more labels, or fewer folds, so that each training has positive and negative ones")
    if len(untrained) == len(every):
        pass  # other options do not help
    elif fine_tuned:
        changes.append("train the run of --run again with other options; its report names them")
    else:
        changes += _search_advice(settings)
        if not many_repeats:
            changes.append("compare other seeds and folds (--repeats 3)")
        changes.append(_other_features(extracted))
    count = len({(row["repeat"], row["fold"]) for row in rows})
    of_classes = " for these classes" if many_classes else ""
    return (
        f"The network seems not to have found the object in {len(lines)} of {count} trainings: {', '.join(lines)}. Do "
        f"not use the maps of these trainings{of_classes}; predict_features.py leaves them out. To change this: "
        f"{'; '.join(changes)}."
    )


def box_size_advice(result: Mapping[str, Mapping[str, float]], settings: Settings, extracted: bool = True) -> list[str]:
    """What to change for each class whose predicted boxes are much larger or smaller than the true ones: paragraphs.

    Args:
        result: the metrics by class.
        extracted: as in :func:`training_warnings`.
    """
    found = []
    for label, values in result.items():
        if values.get("images", 0) < FEWEST or values["iou_0.3"] >= ENOUGH_BOXES:
            continue
        ratio = values["area_ratio"]
        if not (ratio > OTHER_SIZE or ratio < 1 / OTHER_SIZE):
            continue
        size, cut = ("large", "higher (--threshold 0.8)") if ratio > 1 else ("small", "lower (--threshold 0.3)")
        changes = [f"cut the maps {cut}, chosen on other images than those of the test; --resume does not train again"]
        if ratio > 1 and extracted:
            changes.append("extract features with a smaller receptive field (an earlier stage, or --scales 2)")
        if ratio > 1 and settings.loss == "sgl":
            changes.append("compare with --loss bag")
        found.append(
            f"The predicted boxes of {label} are too {size}: the median of their area is {ratio:.2g} times that of the "
            f"true boxes, and {values['iou_0.3']:.0%} of the images have a box with IoU > 0.3. To change this: "
            f"{'; '.join(changes)}."
        )
    return found


def _signs(row: Mapping) -> list[str]:
    """What shows in the metrics of a training, for one class, that its network has not found the object."""
    signs = []
    positive, negative = row["positive"], row["negative"]
    if min(positive, negative) >= FEWEST:
        # the standard deviation of the AUC of a random order
        spread = math.sqrt((positive + negative + 1) / (12 * positive * negative))
        if row["auc"] < 0.5 + CHANCE * spread:
            signs.append(f"test AUC {row['auc']:.2f}, not clearly above chance")
    if row.get("images", 0) >= FEWEST and row["iou_0.1"] == 0:
        signs.append(f"no box overlaps a true box in {row['images']} images")
    return signs


def _other_features(extracted: bool) -> str:
    if extracted:
        return "extract other features (--stages, --cut, larger images)"
    return "use the features of another network"


def _search_advice(settings: Settings) -> list[str]:
    """How to search for small objects; nothing if the training did, or cannot."""
    if settings.pooling != "topk":
        return ["use --pooling topk"]
    if settings.head not in SEARCHED_HEADS or (settings.k_start > 0 and settings.restarts > 1):
        return []
    return [f"find small objects with {search_options()}"]


def _slow_rise(histories: Sequence[Sequence[Mapping]], settings: Settings) -> str | None:
    """What to change if lam rose, but the training ended before it had its value."""
    reached = [history[-1]["lam"] for history in histories if history]
    short = [lam for lam in reached if 0 < lam < settings.lam]
    if not short or settings.start != "measured":
        return None
    ends = f"{min(short):.3g}" + (f" to {max(short):.3g}" if max(short) > min(short) else "")
    return (
        f"lam did not reach its value of {settings.lam:g} in {len(short)} of {len(reached)} runs: it ended at {ends}. "
        "The training AUC was high enough for too few steps. To change this: a smaller --rise, a smaller --batch-size, "
        "or more --epochs."
    )


def _best_deciding_auc(runs: Sequence[tuple[Sequence[Mapping], np.ndarray]], start_auc: float) -> str:
    """A sentence on the highest AUC of the class that decides, and the AUC that it needs. Empty if there is none.

    Args:
        runs: for each run, the rows of its epochs and the labels (N, C) of its training bags.
    """
    found = []
    classes = 0
    for history, labels in runs:
        needed = needed_auc(labels, start_auc)
        classes = max(classes, int((~np.isnan(needed)).sum()))
        measured = (deciding_auc(row["auc"], needed.tolist()) for row in history if len(row["auc"]))
        found += [pair for pair in measured if pair is not None]
    if not found:
        return ""
    value, wanted = max(found, key=lambda pair: pair[0] - pair[1])
    which = "this AUC" if classes == 1 else "the AUC of the class that decides"
    return f" In the best epoch of these runs, {which} was {value:.3f}; it needs {wanted:.3f}."


def needed_auc(labels: np.ndarray, start_auc: float) -> np.ndarray:
    """The training AUC (C,) that each class needs, for the labels (N, C). NaN for a class with too few bags."""
    return LamSchedule(1.0, auc=start_auc).needed_auc(torch.from_numpy(labels)).numpy()


def can_learn(labels: np.ndarray, start_auc: float) -> bool:
    """Whether one of the classes has enough bags, for the labels (N, C)."""
    return not np.isnan(needed_auc(labels, start_auc)).all()


def fewest_bags(start_auc: float) -> str:
    """The numbers of bags from which lam can rise, in words."""

    def enough(positive: int, negative: int) -> bool:
        return can_learn(np.repeat(np.array([[1.0], [0.0]], np.float32), [positive, negative], 0), start_auc)

    equal = next(n for n in itertools.count(1) if enough(n, n))
    few, many = next((a, b) for a in range(1, equal + 1) for b in range(equal, 100) if enough(a, b))
    other = f", or {few} and {many}" if few < equal else ""
    return f"at least {equal} positive and {equal} negative ones{other}"
