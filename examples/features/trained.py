"""The trained heads of a run of train_features.py, and the means of their predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.csv_table import read_rows
from common.files import load_state, read_json
from images.metrics import best_threshold
from torch import nn

from features.results import FAILED
from features.runs import Predictions, predictions_of
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
        heads: those that are used.
        failed: the names and the reasons of those that are left out because they seem to have failed.
        classes: names of the C classes.
        extraction: the settings of the extraction of the features; empty if unknown.
        settings: those of the training.
    """

    heads: list[TrainedHead]
    failed: dict[str, list[str]]
    classes: list[str]
    extraction: dict
    settings: Settings


def load_heads(run: Path, with_failed: bool = False) -> TrainedHeads:
    """The trained heads of the folder ``run``.

    Args:
        with_failed: use the trainings that seem to have failed, too.

    Raises:
        ValueError: ``run`` is no finished run of train_features.py, or all trainings seem to have failed.
    """
    path = run / SETTINGS
    if not path.is_file():
        raise ValueError(f"run: expected a folder of train_features.py, found no {path}")
    extraction = extraction_of_run(path)
    known = read_json(path)
    settings = Settings(**{name: known[name] for name in Settings.__dataclass_fields__})
    if not (run / FAILED).is_file():
        raise ValueError(f"run: {run} is not finished; the command of the training continues it with --resume")
    failed = {} if with_failed else read_json(run / FAILED)
    heads = []
    for file in sorted((run / "parts").glob("*.pt")):
        if file.stem not in failed:
            state = load_state(file)
            transform = Transform(**state["transform"])
            model = make_model(settings, transform.weight.shape[1], len(known["class_names"]), 0)
            model.load_state_dict(state["model"])
            heads.append(TrainedHead(file.stem, transform, model.eval()))
    if not heads:
        raise ValueError(
            f"run: all {len(failed)} trainings of {run} seem to have failed (see {run / 'report.html'}); --with-failed "
            "uses them nevertheless"
        )
    return TrainedHeads(heads, failed, known["class_names"], extraction, settings)


def thresholds_of(run: Path, classes: Sequence[str]) -> list[float]:
    """For each class, the probability that separates the positive and the negative test bags of ``run`` best.

    See :func:`images.metrics.best_threshold`. The probabilities are those of networks that were not trained on the bag.
    """
    rows = read_rows(run / "bags.csv")
    scores, labels = ([[float(row[f"{kind}{c}"] or "nan") for row in rows] for c in classes] for kind in ("", "label_"))
    return [best_threshold(np.array(p), np.array(y)) for p, y in zip(scores, labels, strict=True)]


def refuse_other_features(heads: TrainedHeads, bags: FeatureBags) -> None:
    """Raises ValueError if ``bags`` were extracted with other settings than the bags of the training."""
    wanted, found = ({**s, "points": bool(s.get("points"))} for s in (heads.extraction, bags.settings))
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"features: {bags.folder} has {name} {found.get(name)}, and the features of the training have "
                f"{wanted.get(name)}; extract_features.py --like extracts features as for the training"
            )
    features = len(heads.heads[0].transform.mean)
    if bags.features != features:
        raise ValueError(f"features: expected {features}, as in the training, got {bags.features} in {bags.folder}")


def mean_predictions(heads: Sequence[TrainedHead], bags: FeatureBags, names: Sequence[str]) -> Predictions:
    """The means of the probabilities of ``heads`` for the bags ``names`` and their instances, read bag by bag."""

    def found() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in names:
            x = reader.read(name)
            each = [probabilities(head.model, head.transform(x)) for head in heads]
            bag, instances = (np.mean([one[k] for one in each], 0) for k in (0, 1))
            yield bag, instances

    reader = BagReader(bags, names, 0)
    return predictions_of(names, found())
