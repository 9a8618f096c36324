"""The metrics of a trained network on the test images.

The caller sets the thresholds, or they are chosen with the labels of the validation images. True boxes do not influence
them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common.choices import Config

from images.checkpoint import OLDER, load_network
from images.dataset import Index
from images.frames import to_image, to_square
from images.metrics import auc_intervals, auc_per_class, best_threshold, mean_intervals, patients_with
from images.prediction import Predictions, name_of, predict
from images.thresholds import HALF, VALIDATION, Relative
from images.truth import Truth, trivial_boxes
from sgl_ops.localization import (
    T_IOU,
    boxes_by_threshold,
    contains,
    heatmap_to_box,
    heatmap_to_point,
    localization_accuracy,
    max_box_accuracy,
    per_class,
)


class Network(NamedTuple):
    """A trained network, its configuration, and its checkpoint: "network" and "epoch"."""

    model: torch.nn.Module
    config: Config
    which: dict[str, Any]


def open_networks(
    runs: Sequence[Path], args: argparse.Namespace, equal: Sequence[str] = ("classes", "fit")
) -> list[Network]:
    """Loads the networks of the runs.

    Args:
        equal: settings in which the runs must agree. The order of the classes may differ.

    Raises:
        ValueError: a run does not exist, or two runs differ in a setting of ``equal``.
    """
    networks = []
    for run in runs:
        model, config, which = load_network(run, torch.device(args.device), args.which)
        networks.append(Network(model.eval(), OLDER | config, which))
    for run, network in zip(runs, networks, strict=True):
        for key in equal:
            expected, got = (
                sorted(value) if isinstance(value, list) else value
                for value in (networks[0].config[key], network.config[key])
            )
            if expected != got:
                shown = [", ".join(value) if isinstance(value, list) else value for value in (expected, got)]
                raise ValueError(
                    f"run: expected runs of the same {key}, got {shown[0]} in {runs[0]} and {shown[1]} in {run}"
                )
    return networks


class Evaluated(NamedTuple):
    """The evaluation of a run.

    ``found`` (k, 4): the predicted box of each pair. ``overlaps`` (k,): its best IoU. ``predicted`` (k,): whether the
    class is predicted. ``metrics``, ``details``: the contents of the output files.
    """

    name: str
    config: Config
    predictions: Predictions
    found: np.ndarray
    overlaps: np.ndarray
    predicted: np.ndarray
    metrics: dict[str, Any]
    details: dict[str, Any]


def thresholds_of(
    model: torch.nn.Module, config: Config, index: Index, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """T_p and the gate per class (C,): numbers of the options, or chosen with the labels of the validation images.

    A chosen threshold is the one that separates the validation images best. The gate is compared with the probability
    of the image. T_p is compared with that of the largest patch, so that images that probably have the class have a
    patch above T_p. Only the labels of images are used.

    Returns:
        T_p; the gate; and, if a threshold was chosen, the number of validation images and the classes whose threshold
        is 0.5, because their validation labels are all equal.

    Raises:
        ValueError: validation images are needed, but the run or the data has none.
    """
    given = (args.threshold, args.gate)
    if VALIDATION not in given:
        return np.full(len(index.classes), args.threshold), np.full(len(index.classes), args.gate), {}
    rows = np.flatnonzero(
        np.isin(index.patients, np.array(config.get("val_patients", []), index.patients.dtype)) & ~index.test
    )
    if not len(rows):
        raise ValueError(f"threshold, gate: {VALIDATION}: there are no validation images of the run in the data")
    there, expected = len(np.unique(index.patients[rows])), len(config["val_patients"])
    if there < expected:
        print(f"warning: only {there} of the run's {expected} validation patients are in the data", file=sys.stderr)
    predictions, labels = predict(model, config, index, rows, args), index.labels[rows]
    positive = (labels > 0).sum(0)
    known = (~np.isnan(labels)).sum(0)
    chosen = {
        "validation_images": len(rows),
        "classes_at_0.5": [name for name, n, of in zip(index.classes, positive, known, strict=True) if n in (0, of)],
    }
    t_p, gate = (
        np.array([best_threshold(scores[:, c], labels[:, c]) for c in range(len(index.classes))])
        if value == VALIDATION
        else np.full(len(index.classes), value)
        for value, scores in zip(given, (predictions.peak, predictions.probability), strict=True)
    )
    return t_p, gate, chosen


def evaluate(network: Network, truth: Truth, args: argparse.Namespace) -> Evaluated:
    """The predictions of the network, and their metrics."""
    model, config, which = network
    names = truth.class_names
    t_p, gate, chosen = thresholds_of(model, config, truth.index, args)
    predictions = predict(model, config, truth.index, truth.rows, args, truth.image, truth.classes)
    side = config["image_size"]
    found = boxes_of(predictions, truth, t_p, args, isinstance(args.threshold, Relative))
    overlaps = truth.overlaps(found)
    predicted = predictions.probability[truth.image, truth.classes] > gate[truth.classes]
    classes = truth.classes
    maps, first = predictions.square_maps(args.upsampling)
    drawn = {"names": names, "draws": args.draws, "seed": args.seed}
    metrics = {
        "auc": auc_per_class(predictions.probability, truth.labels, names),
        "auc_ci": auc_intervals(predictions.probability, truth.labels, truth.patients, **drawn),
        "localization": localization_accuracy(overlaps, classes, names, predicted),
        "localization_ungated": localization_accuracy(overlaps, classes, names),
        # in pixels of the network's image, to which the maps are upsampled
        "max_box_acc": max_box_accuracy(
            maps, boxes_in_network(truth, side), classes, names, (side, side), args.upsampling, first=first
        ),
        "pointing_game": per_class(points_hit(predictions, truth), classes, names),
        "baselines": {
            name: localization_accuracy(truth.overlaps(boxes), classes, names)
            for name, boxes in trivial_of(truth, predictions).items()
        },
        "images": len(truth.rows),
        "boxes": truth.box_count,
    }
    if not isinstance(args.threshold, Relative):
        half = truth.overlaps(boxes_of(predictions, truth, np.full(len(names), HALF), args, True))
        metrics["localization_relative"] = localization_accuracy(half, classes, names, predicted)
        metrics["localization_relative_ungated"] = localization_accuracy(half, classes, names)
    details = {
        "name": name_of(config),
        **which,
        **chosen,
        "config": {key: value for key, value in config.items() if not isinstance(value, list)},
        "threshold": str(args.threshold) if isinstance(args.threshold, Relative) else args.threshold,
        "gate": args.gate,
        "threshold_of_class": dict(zip(names, t_p.tolist(), strict=True)),
        "gate_of_class": dict(zip(names, gate.tolist(), strict=True)),
        "upsampling": args.upsampling,
        "raster": args.raster,
        "morphology": args.morphology,
        "draws": args.draws,
        "seed": args.seed,
        "grid": list(predictions.maps[0].shape) if predictions.maps else [],
        "first_cell": predictions.first,
        "patients": dict(zip(names, patients_with(1, truth.labels, truth.patients), strict=True)),
        "patients_without": dict(zip(names, patients_with(0, truth.labels, truth.patients), strict=True)),
        "boxes": {
            name: sum(len(true) for true, of in zip(truth.boxes, classes, strict=True) if of == c)
            for c, name in enumerate(names)
        },
    }
    for key, counts in (("localization", predicted), ("localization_ungated", np.ones_like(predicted))):
        details[f"{key}_ci"] = {
            f"{t:g}": mean_intervals((overlaps > t) & counts, truth.classes, truth.patients[truth.image], **drawn)
            for t in T_IOU
        }
    return Evaluated(name_of(config), config, predictions, found, overlaps, predicted, metrics, details)


def trivial_of(truth: Truth, predictions: Predictions) -> dict[str, np.ndarray]:
    """``trivial_boxes`` for the grid of these maps."""
    grid = predictions.maps[0].shape if predictions.maps else (1, 1)
    return trivial_boxes(truth, grid, predictions.first, predictions.side)


def boxes_in_network(truth: Truth, side: int) -> list[np.ndarray]:
    """The true boxes of each pair, in the square of ``side`` pixels that is the network's input."""
    inside = truth.frames_at(side)
    return [
        to_square(to_image(true, truth.sizes[i], truth.frames[i]), truth.sizes[i], inside[i])
        for i, true in zip(truth.image, truth.boxes, strict=True)
    ]


def boxes_of(
    predictions: Predictions, truth: Truth, thresholds: np.ndarray, args: argparse.Namespace, relative: bool
) -> np.ndarray:
    """The boxes (k, 4) of the maps at the ``thresholds`` (C,) of their classes, in the square of the truth.

    The maps are upsampled to the pixels of the network's input. Padding is ignored. ``relative``: the thresholds are
    fractions of the maximum of each map.
    """
    found = np.full((len(predictions.maps), 4), np.nan)
    for k, c in enumerate(truth.classes):
        heatmap, size, first = predictions.content(k, args.upsampling)
        box = heatmap_to_box(heatmap, size, thresholds[c], args.upsampling, args.morphology, first, relative=relative)
        found[k] = box + np.array([*predictions.frames[k, :2], 0, 0])
    return truth.from_network(found, predictions.side)


def boxes_at(predictions: Predictions, truth: Truth, thresholds: np.ndarray, upsampling: str) -> np.ndarray:
    """The boxes (k, s, 4) at each of the increasing ``thresholds`` (s,), without opening and closing."""
    found = np.full((len(predictions.maps), len(thresholds), 4), np.nan)
    for k in range(len(found)):
        heatmap, size, first = predictions.content(k, upsampling)
        found[k] = boxes_by_threshold(heatmap, size, thresholds, upsampling, first)
        found[k] += [*predictions.frames[k, :2], 0, 0]
    return truth.from_network(found, predictions.side)


def points_hit(predictions: Predictions, truth: Truth) -> np.ndarray:
    """Whether the centre of the cell with the largest value of each map lies in a true box (k,): the pointing game."""
    side, hits = predictions.side, []
    for heatmap, boxes in zip(predictions.maps, boxes_in_network(truth, side), strict=True):
        hits.append(contains(boxes, heatmap_to_point(heatmap, (side, side), predictions.first)).any())
    return np.array(hits, bool)
