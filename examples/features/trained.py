"""The trained heads of a run of train_features.py, and the means of their predictions."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.files import load_state, read_json
from images.metrics import best_threshold
from torch import nn

from features.advice import ALL_CLASSES
from features.results import FAILED
from features.runs import BAGS_OF_RUN, Predictions, load_predictions, predictions_of
from features.store import SETTINGS, FeatureBags, extraction_of_run
from features.training import BagReader, Settings, Transform, make_model, probabilities


class TrainedHead(NamedTuple):
    """A finished training: its name, the transform of the features, and the network with the pooling."""

    name: str
    transform: Transform
    model: nn.ModuleDict


class TrainedHeads(NamedTuple):
    """The trainings of a run.

    Attributes:
        run: the folder.
        heads: the H trainings that are used.
        used: (H, C), the classes that each is used for.
        left_out: (C,), the number of trainings that are not used, because they seem to have failed.
        hopeless: the classes for which all trainings seem to have failed. They are used nevertheless.
        classes: names of the C classes.
        extraction: the settings of the extraction of the features; empty if unknown.
    """

    run: Path
    heads: list[TrainedHead]
    used: np.ndarray
    left_out: np.ndarray
    hopeless: list[str]
    classes: list[str]
    extraction: dict


def load_heads(run: Path, with_failed: bool = False) -> TrainedHeads:
    """The trained heads of the folder ``run``.

    Args:
        with_failed: use the trainings that seem to have failed, too.

    Raises:
        ValueError: ``run`` is no finished run of train_features.py, or all its trainings seem to have failed.
    """
    path = run / SETTINGS
    if not path.is_file():
        raise ValueError(f"run: expected a folder of train_features.py, found no {path}")
    extraction = extraction_of_run(path)
    known = read_json(path)
    classes = known["class_names"]
    settings = Settings(**{name: known[name] for name in Settings.__dataclass_fields__})
    names = [f"repeat{r}_fold{f}" for r in range(known["repeats"]) for f in range(known["folds"] or 1)]
    needed = [
        run / FAILED,
        run / BAGS_OF_RUN,
        *(run / "parts" / f"{name}{end}" for name in names for end in (".pt", ".npz")),
    ]
    missing = [file for file in needed if not file.is_file()]
    if missing:
        raise ValueError(
            f"run: {run} is not finished ({missing[0]} is missing); the same command with --resume continues"
        )
    failed = {} if with_failed else read_json(run / FAILED)
    used = np.array([[not {label, ALL_CLASSES} & failed.get(name, {}).keys() for label in classes] for name in names])
    left_out, none = (~used).sum(0), ~used.any(0)
    if none.all():
        raise ValueError(
            f"run: all {len(names)} trainings of {run} seem to have failed (see {run / 'report.html'}); --with-failed "
            "uses them nevertheless"
        )
    used[:, none] = True
    heads = []
    for name, some in zip(names, used.any(1).tolist(), strict=True):
        if some:
            state = load_state(run / "parts" / f"{name}.pt")
            transform = Transform(**state["transform"])
            model = make_model(settings, transform.weight.shape[1], len(classes), 0)
            model.load_state_dict(state["model"])
            heads.append(TrainedHead(name, transform, model.eval()))
    hopeless = [label for label, is_hopeless in zip(classes, none.tolist(), strict=True) if is_hopeless]
    return TrainedHeads(run, heads, used[used.any(1)], np.where(none, 0, left_out), hopeless, classes, extraction)


def thresholds_of(trained: TrainedHeads) -> list[float | None]:
    """For each class, the probability that separates the positive and the negative test bags of the run best.

    See :func:`images.metrics.best_threshold`. The probability of a bag is the mean over the used trainings that tested
    it. None for a class without positive or without negative test bags.
    """
    with (trained.run / BAGS_OF_RUN).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    # by position: two columns may have the same name
    labels = {row[0]: [float(cell or "nan") for cell in row[1 : 1 + len(trained.classes)]] for row in rows}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in labels}
    for head, used in zip(trained.heads, trained.used, strict=True):
        part = load_predictions(trained.run / "parts" / f"{head.name}.npz")
        for name, p in zip(part.names.tolist(), part.bags, strict=True):
            scores[name].append(np.where(used, p, np.nan))
    names = [name for name, found in scores.items() if found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a bag that no used training tested has the mean NaN
        means = np.array([np.nanmean(scores[name], 0) for name in names])
    truth = np.array([labels[name] for name in names])
    thresholds: list[float | None] = []
    for p, y in zip(means.T, truth.T, strict=True):
        y = np.where(np.isnan(p), np.nan, y)
        both = (y == 1).any() and (y == 0).any()
        thresholds.append(best_threshold(p, y) if both else None)
    return thresholds


def refuse_other_features(heads: TrainedHeads, bags: FeatureBags) -> None:
    """Raises ValueError if ``bags`` were extracted with other settings than the bags of the training."""
    wanted, found = ({**s, "points": bool(s.get("points"))} for s in (heads.extraction, bags.settings))
    changed = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if changed and set(changed) <= {"stride", "centre", "field"}:  # measured in the network
        raise ValueError(f"features: {bags.folder} was extracted with other weights than the features of the training")
    if changed:
        name = changed[0]
        raise ValueError(
            f"features: {bags.folder} has {name} {found.get(name)}, and the features of the training have "
            f"{wanted.get(name)}; extract_features.py --like extracts features as for the training"
        )
    features = len(heads.heads[0].transform.mean)
    if bags.features != features:
        raise ValueError(f"features: expected {features}, as in the training, got {bags.features} in {bags.folder}")


def mean_predictions(trained: TrainedHeads, bags: FeatureBags, names: Sequence[str]) -> Predictions:
    """The means of the probabilities over the used trainings, for the bags ``names`` and their instances."""
    weights = trained.used / trained.used.sum(0)

    def found() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in names:
            x = reader.read(name)
            each = [probabilities(head.model, head.transform(x)) for head in trained.heads]
            bag, instances = (sum(w * one[k] for w, one in zip(weights, each, strict=True)) for k in (0, 1))
            yield bag, instances

    reader = BagReader(bags, names, 0)
    return predictions_of(names, found())
