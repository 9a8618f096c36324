"""The trained heads of a run of train_features.py or finetune_features.py, and the means of their predictions."""

from __future__ import annotations

import copy
import csv
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.files import load_state, read_json
from images.metrics import best_threshold
from torch import Tensor, nn

from features.advice import ALL_CLASSES
from features.extraction_settings import changed_settings
from features.finetuning import (
    BLOCKS,
    BlocksHead,
    load_blocks,
    refuse_other_image,
    rows_of,
    split_blocks,
    width_of_output,
)
from features.labels import labels_of_run
from features.plan import run_name
from features.results import FAILED
from features.run_settings import extraction_of_run, settings_of_run
from features.runs import BAGS_OF_RUN, Predictions, load_predictions, predictions_of
from features.store import FeatureBags
from features.training import BagReader, Settings, make_model, probabilities
from features.transform import Transform


class TrainedHead(NamedTuple):
    """A finished training: its name, the transform of the features, and the network with the pooling.

    The network of a fine-tuned run transforms the features itself.
    """

    name: str
    transform: Callable[[Tensor], Tensor]
    model: nn.ModuleDict


class TunedBlocks(NamedTuple):
    """The input of fine-tuned blocks.

    Attributes:
        before: the output of the stage before the blocks of ``--blocks``.
        original: all blocks, as they were before the fine-tuning.
        frozen: the blocks that were not trained.
        trained: the trained blocks, as they were before the fine-tuning.
        inputs: number of features of the output of the frozen blocks.
        width: number of features of the output of all blocks.
    """

    before: FeatureBags
    original: nn.Module
    frozen: nn.Module
    trained: nn.Module
    inputs: int
    width: int


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
        features: the number of features of an instance.
        tuned: the input of the trained blocks; None for a run of train_features.py.
        margin: cells nearer to an edge of their image are not used, see :func:`features.margin.used_cells`.
    """

    run: Path
    heads: list[TrainedHead]
    used: np.ndarray
    left_out: np.ndarray
    hopeless: list[str]
    classes: list[str]
    extraction: dict
    features: int
    tuned: TunedBlocks | None
    margin: float


def load_heads(run: Path, with_failed: bool = False, before: FeatureBags | None = None) -> TrainedHeads:
    """The trained heads of the folder ``run``.

    Args:
        with_failed: use the trainings that seem to have failed, too.
        before: for a run of finetune_features.py, the features before its blocks.

    Raises:
        ValueError: ``run`` is no finished run, all its trainings seem to have failed, or ``before`` does not fit.
    """
    extraction = extraction_of_run(run)
    own, known = settings_of_run(run)
    if own is not known:
        refuse_other_before(own, run, before)
    elif before is not None:
        raise ValueError(f"before: expected a run of finetune_features.py, got {run} of train_features.py")
    classes = known["class_names"]
    settings = Settings.of_run(known)
    repeats = min(own["repeats"] or known["repeats"], known["repeats"])
    names = [run_name(r, f) for r in range(repeats) for f in range(known["folds"] or 1)]
    needed = [
        run / FAILED,
        run / BAGS_OF_RUN,
        *([] if before is None else [run / BLOCKS]),
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
    heads: list[TrainedHead] = []
    features = 0
    tuned = None if before is None else tuned_blocks(run, own, extraction, before)
    for name, some in zip(names, used.any(1).tolist(), strict=True):
        if not some:
            continue
        state = load_state(run / "parts" / f"{name}.pt")
        parts = state["model"]
        if tuned is not None:
            transform = Transform(parts["head.mean"], parts["head.weight"])
        else:
            transform = Transform(**state["transform"])
        features = len(transform.mean)
        model = make_model(settings, transform.weight.shape[1], len(classes), 0)
        if tuned is not None:
            blocks = copy.deepcopy(tuned.trained)
            model["head"] = BlocksHead(blocks, model["head"], transform, tuned.inputs, (0, 0))
        model.load_state_dict(parts)
        heads.append(TrainedHead(name, transform if tuned is None else nn.Identity(), model.eval()))
    hopeless = [label for label, is_hopeless in zip(classes, none.tolist(), strict=True) if is_hopeless]
    left_out = np.where(none, 0, left_out)
    return TrainedHeads(
        run, heads, used[used.any(1)], left_out, hopeless, classes, extraction, features, tuned, settings.margin
    )


def tuned_blocks(run: Path, own: dict, extraction: dict, before: FeatureBags) -> TunedBlocks:
    """The blocks of the fine-tuned ``run`` as they were before the fine-tuning, and their input ``before``.

    Args:
        own: ``settings.json`` of the run.
        extraction: the settings of the extraction of the features of the heads.
    """
    original = load_blocks(extraction["backbone"], "none", own["blocks"], extraction.get("output_stride"))
    original.load_state_dict(load_state(run / BLOCKS))
    frozen, trained = split_blocks(original, own["freeze"])
    inputs = width_of_output(frozen, before.features)
    return TunedBlocks(before, original, frozen, trained, inputs, width_of_output(original, before.features))


def refuse_other_before(own: dict, run: Path, before: FeatureBags | None) -> None:
    """Raises ValueError if ``before`` was not extracted like the input of the blocks of the fine-tuned ``run``.

    Args:
        own: ``settings.json`` of the run.
    """
    if before is None:
        raise ValueError(
            f"before: {run} is a run of finetune_features.py, which needs --before; "
            f"extract_features.py --like {own['before']} extracts these features of new images"
        )
    refuse_other_settings(own["extraction_before"], before, "before", f"the features in {own['before']}")


def bags_of_training(trained: TrainedHeads) -> set[str] | None:
    """The names of the labelled bags of the run; None if its labels or features have gone or changed."""
    _, known = settings_of_run(trained.run)
    try:
        bags = FeatureBags(Path(known["features"]))
        return set(labels_of_run(known, bags.names).names)
    except (ValueError, OSError):
        return None


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


def refuse_other_features(trained: TrainedHeads, bags: FeatureBags) -> None:
    """Raises ValueError if ``bags`` were extracted with other settings than the bags of the training.

    With fine-tuned blocks, their input must also hold the same images.
    """
    refuse_other_settings(trained.extraction, bags, "features", "the features of the training")
    if bags.features != trained.features:
        raise ValueError(
            f"features: expected {trained.features}, as in the training, got {bags.features} in {bags.folder}"
        )
    if trained.tuned is None:
        return
    for name in bags.names:
        refuse_other_image(trained.tuned.original, trained.tuned.width, trained.tuned.before, bags, name)


def refuse_other_settings(wanted: dict, bags: FeatureBags, option: str, of_training: str) -> None:
    """Raises ValueError if the extraction of ``bags`` had other settings than ``wanted``.

    Args:
        option: the option that gave ``bags``, for the message.
        of_training: what ``wanted`` belongs to, for the message.
    """
    wanted, found = ({**s, "points": bool(s.get("points"))} for s in (wanted, bags.settings))
    changed = changed_settings(wanted, found)
    if changed and set(changed) <= {"stride", "centre", "field"}:  # measured in the network
        raise ValueError(f"{option}: {bags.folder} was extracted with other weights than {of_training}")
    if changed:
        name = changed[0]
        raise ValueError(
            f"{option}: {bags.folder} has {name} {found.get(name)}, and {of_training} have "
            f"{wanted.get(name)}; extract_features.py --like extracts features as for the training"
        )


def mean_predictions(trained: TrainedHeads, bags: FeatureBags, names: Sequence[str]) -> Predictions:
    """The means of the probabilities over the used trainings, for the bags ``names`` and their instances."""
    weights = trained.used / trained.used.sum(0)

    def input_of(name: str) -> Tensor:
        if trained.tuned is None:
            return reader.read(name)
        bag = bags[name]
        for head in trained.heads:
            head.model["head"].grid = bag.grid
        return rows_of(name, trained.tuned.before[name], bag, trained.tuned.width, trained.tuned.frozen)

    def found() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in names:
            x = input_of(name)
            each = [probabilities(head.model, head.transform(x)) for head in trained.heads]
            bag, instances = (sum(w * one[k] for w, one in zip(weights, each, strict=True)) for k in (0, 1))
            yield bag, reader.filled(name, instances)

    reader = BagReader(bags, names, 0, trained.margin)
    return predictions_of(names, found())
