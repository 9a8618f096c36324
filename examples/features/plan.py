"""The trainings of a command: the bags that each trains on, and those that it tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from images.dataset import refuse_shared_patients, some
from images.label_tables import SPLIT_ADVICE

from features.labels import Labels


def run_name(repeat: int, fold: int) -> str:
    """The name of the files of a training."""
    return f"repeat{repeat}_fold{fold}"


class Run(NamedTuple):
    """One training: number of the repeat (or seed), number of the fold (0 with a given split), indices of bags."""

    repeat: int
    fold: int
    train: np.ndarray
    test: np.ndarray

    @property
    def name(self) -> str:
        return run_name(self.repeat, self.fold)

    @property
    def seed(self) -> int:
        """The seed of the training, a different one for every repeat and fold."""
        return self.repeat * 1000 + self.fold


def plan(labels: Labels, count: int | None, repeats: int, test: str) -> Iterator[Run]:
    """The runs: ``repeats`` times ``count`` folds, or ``repeats`` seeds with the given split.

    Args:
        count: number of folds; None: use the split of ``labels``.
        test: ``"test"`` trains on train and val and tests on test. ``"val"`` trains on train and tests on val; it does
            not read the test bags.
    """
    if count is None:
        if labels.split is None:
            raise ValueError(
                "split: expected --folds, or a column split in labels.csv (train, val, test), or a split.csv beside it"
            )
        refuse_shared_patients(labels.groups, labels.split, "split", SPLIT_ADVICE)
        chosen = labels.split == test
        train = (labels.split == "train") | ((labels.split == "val") & (test == "test"))
        if not chosen.any() or not train.any():
            raise ValueError(f"split: expected bags of train and {test}, found {train.sum()} and {chosen.sum()}")
        for seed in range(repeats):
            yield Run(seed, 0, train.nonzero()[0], chosen.nonzero()[0])
        return
    for repeat in range(repeats):
        for fold, (train, tested) in enumerate(folds(labels, count, repeat)):
            yield Run(repeat, fold, train, tested)


def untested(labels: Labels, runs: Sequence[Run]) -> list[str]:
    """A line for each class of which some runs test no positive or no negative bag."""
    return [
        f"{len(found)} of {len(runs)} folds test no {kind}: they have no AUC"
        for kind, found in _runs_without(labels, [(run.name, run.test) for run in runs])
    ]


def untrained(labels: Labels, runs: Sequence[Run]) -> list[str]:
    """A line for each class of which some runs train on no positive or no negative bag."""
    return [
        f"{len(found)} of {len(runs)} trainings have no {kind} ({some(found)}): predict_features.py does not use their "
        "probabilities of this class"
        for kind, found in _runs_without(labels, [(run.name, run.train) for run in runs])
    ]


def refuse_one_kind(labels: Labels, runs: Sequence[Run]) -> None:
    """Raises ValueError if no run has both positive and negative bags of a class for its training."""
    if all(len(missing_kinds(labels, run.train)) == len(labels.classes) for run in runs):
        counts = ", ".join(
            f"{label} has {(values == 1).sum()} positive and {(values == 0).sum()} negative"
            for label, values in zip(labels.classes, labels.values.T, strict=True)
        )
        raise ValueError(
            f"labels: expected positive and negative bags of a class in a training, but {counts} bags; add bags, or "
            "use fewer folds"
        )


def missing_kinds(labels: Labels, part: np.ndarray) -> dict[str, list[str]]:
    """The classes without a positive or without a negative bag among the bags ``part``, and these kinds."""
    found: dict[str, list[str]] = {}
    for label, values in zip(labels.classes, labels.values[part].T, strict=True):
        for kind, value in (("positive", 1), ("negative", 0)):
            if not (values == value).any():
                found.setdefault(label, []).append(kind)
    return found


def _runs_without(labels: Labels, parts: Sequence[tuple[str, np.ndarray]]) -> Iterator[tuple[str, list[str]]]:
    """For each class, "positive bag of CLASS" or "negative bag of CLASS", and the names of the runs without one.

    Args:
        parts: the name of each run, and the indices of its bags that are examined.
    """
    missing = {name: missing_kinds(labels, part) for name, part in parts}
    for label in labels.classes:
        for kind in ("positive", "negative"):
            found = [name for name, kinds in missing.items() if kind in kinds.get(label, ())]
            if found:
                yield f"{kind} bag of {label}", found


def folds(labels: Labels, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``count`` folds as pairs (training, test) of bag indices.

    The bags of a group stay together. The positive and the negative bags of each class are spread over the folds as
    evenly as possible.

    Raises:
        ValueError: there are more folds than groups, or, with one class, than bags of each kind.
    """
    groups = len(set(labels.groups))
    if count > groups:
        raise ValueError(f"--folds: expected at most {groups}, the number of patients (or bags), got {count}")
    if labels.values.shape[1] == 1:
        yield from _folds_of_one_class(labels, count, seed)
        return
    part = _parts_of_classes(labels, count, seed)
    for fold in range(count):
        yield (part != fold).nonzero()[0], (part == fold).nonzero()[0]


def _folds_of_one_class(labels: Labels, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold

    target = np.nan_to_num(labels.values[:, 0], nan=-1).astype(int)
    kinds = {"negative": 0, "positive": 1, "unknown": -1}
    counts = {kind: int((target == value).sum()) for kind, value in kinds.items() if (target == value).any()}
    if count > max(counts.values()):
        found = f"{labels.classes[0]} has {', '.join(f'{number} {kind}' for kind, number in counts.items())} bags"
        raise ValueError(f"--folds: expected at most {max(counts.values())} because {found}, got {count}")
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer bags of a kind than folds: see runs.untested
        return list(splitter.split(target, target, labels.groups))


def _parts_of_classes(labels: Labels, count: int, seed: int) -> np.ndarray:
    """The fold (N,) of each bag, for several classes, which StratifiedGroupKFold does not support.

    The groups with the rarest kinds of bags come first. Each goes to the fold where the sum of the squared fractions,
    over folds and kinds of bags, rises least. The kinds are all bags, and the positive and the negative ones of each
    class. A fraction is the number of bags of the kind in a fold, divided by the number of all bags of the kind.
    """
    positive, negative = labels.values == 1, labels.values == 0
    kinds = np.concatenate([np.ones((len(positive), 1), bool), positive, negative], 1)
    names, group = np.unique(labels.groups, return_inverse=True)
    fractions = np.zeros((len(names), kinds.shape[1]))
    np.add.at(fractions, group, kinds / np.maximum(kinds.sum(0), 1))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-np.square(fractions[order]).sum(1), kind="stable")]
    held = np.zeros((count, kinds.shape[1]))  # the fractions in each fold
    part = np.empty(len(names), int)
    for one in order:
        part[one] = (held @ fractions[one]).argmin()
        held[part[one]] += fractions[one]
    return part[group]
