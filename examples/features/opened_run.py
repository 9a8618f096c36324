"""A run of train_features.py or finetune_features.py with its data: features, labels, boxes, and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from features.labels import Labels, labels_of_run, read_boxes, read_instance_labels
from features.plan import Run, plan
from features.run_settings import settings_of_run, threshold_of_run
from features.runs import (
    Predictions,
    Truth,
    digests_of,
    joined,
    load_predictions,
    refuse_other_data,
    refuse_other_folds,
)
from features.store import FeatureBags


class OpenedRun(NamedTuple):
    """A run and its data.

    Attributes:
        folder: the folder of the run.
        settings: the options of train_features.py; of a fine-tuned run, those of the run that it continued.
        bags: the features of the head.
        labels: the labels of the bags.
        truth: the same labels, and the labels of instances and the boxes that the run was evaluated with.
        runs: its trainings.
        data: the digests of the data.
        tuned: whether it is a run of finetune_features.py.
    """

    folder: Path
    settings: dict
    bags: FeatureBags
    labels: Labels
    truth: Truth
    runs: list[Run]
    data: dict[str, str]
    tuned: bool

    def predictions(self) -> list[Predictions]:
        """The predictions of each repeat, for the test bags of all its folds.

        Raises:
            ValueError: a training is not finished.
        """
        found: dict[int, list[Predictions]] = {}
        for run in self.runs:
            path = self.folder / "parts" / f"{run.name}.npz"
            if not path.is_file():
                raise ValueError(f"{self.folder}: {run.name} is not finished; the same command with --resume continues")
            found.setdefault(run.repeat, []).append(load_predictions(path))
        return [joined(parts) for parts in found.values()]


def open_run(folder: Path, repeats: int | None = None) -> OpenedRun:
    """Opens a run.

    Args:
        repeats: use only the first repeats.

    Raises:
        ValueError: it is no run, or its labels, features or folds have changed.
    """
    own, known = settings_of_run(folder)
    if own is not known:  # a fine-tuned run
        repeats = min(own["repeats"] or known["repeats"], repeats or known["repeats"])
    bags = FeatureBags(Path(known["features"]))
    try:
        labels = labels_of_run(known, bags.names)
    except ValueError as error:
        raise ValueError(f"{folder}: its table {known['labels']} has changed: {error}") from None
    instances, boxes = (Path(known[key]) if known[key] else None for key in ("instance_labels", "boxes"))
    truth = Truth(
        labels,
        read_instance_labels(instances, labels.classes, labels.names) if instances else {},
        read_boxes(boxes, labels.classes, labels.names, bags.size) if boxes else {},
        threshold_of_run(known),
    )
    data = digests_of(labels, bags)
    refuse_other_data(folder, own.get("data", {}), data, "restore the old ones, or train again")
    count = min(repeats or known["repeats"], known["repeats"])
    runs = list(plan(labels, known["folds"], count, known["test"]))
    refuse_other_folds(folder / "parts", runs, labels)
    return OpenedRun(folder, known, bags, labels, truth, runs, data, own is not known)
