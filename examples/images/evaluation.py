"""Predictions of a trained network on the test list, and their measures.

Thresholds are numbers that the caller gives, or are chosen by the labels of validation images; boxes choose nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common.choices import Config
from torch.utils.data import DataLoader
from tqdm import tqdm

from images import nih
from images.cache import open_cache
from images.checkpoint import load_network
from images.dataset import Index
from images.items import Radiographs
from images.metrics import auc_intervals, auc_per_class, best_threshold, mean_intervals
from images.nih import BOX_SIDE, CLASSES
from images.pixels import to_input
from images.thresholds import HALF, VALIDATION, Relative
from sgl_ops.localization import (
    T_IOU,
    box_iou,
    centre_box,
    grid_ceiling,
    heatmap_to_box,
    localization_accuracy,
    max_box_accuracy,
    mean_boxes,
    pointing_game,
    seen_cells,
    whole_image_box,
)
from sgl_ops.pooling import make_pooling

TABLE_SIZE = (BOX_SIDE, BOX_SIDE)


class Truth(NamedTuple):
    """The n images of the test list that are there, and the k boxes on them.

    ``rows`` (n,) of the index, and what it says of them; per box its ``image`` (k,), a number below n, its class
    ``classes`` (k,), and ``boxes`` (k, 4) in pixels of the table's BOX_SIDE x BOX_SIDE image.
    """

    index: Index
    rows: np.ndarray
    names: list[str]
    paths: list[Path]
    labels: np.ndarray
    patients: np.ndarray
    image: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray

    @property
    def official(self) -> bool:
        """Whether tables and lists are those of the NIH, of which the paper reports, whatever images are there.

        All images with boxes are on the official test list; other splits of as many images have some in training.
        """
        count = len(self.index.names) + len(self.index.missing)
        learned = (name for name, test in zip(self.index.names, self.index.test, strict=True) if not test)
        return count == nih.OFFICIAL_IMAGES and self.index.boxes.keys().isdisjoint(learned)


class Predictions(NamedTuple):
    """Probabilities (n, C) of the image and of its greatest patch, and the maps (k,) of (h, w) of boxes.

    ``first``: where the centre of a map's first cell is, in cells from the edge of the image.
    """

    probability: np.ndarray
    peak: np.ndarray
    maps: list[np.ndarray]
    first: float


class Evaluated(NamedTuple):
    """A run: its name, its settings, what it says, per box what was found, and what is written of it."""

    name: str
    config: Config
    predictions: Predictions
    found: np.ndarray
    overlaps: np.ndarray
    predicted: np.ndarray
    metrics: dict[str, Any]
    details: dict[str, Any]


def truth_of(index: Index) -> Truth:
    rows = np.flatnonzero(index.test)
    names = [index.names[row] for row in rows]
    boxes = [(i, *box) for i, name in enumerate(names) for box in index.boxes.get(name, ())]
    columns = np.array(boxes, np.float64).reshape(-1, 6)
    return Truth(
        index,
        rows,
        names,
        [index.paths[row] for row in rows],
        index.labels[rows],
        index.patients[rows],
        columns[:, 0].astype(int),
        columns[:, 1].astype(int),
        columns[:, 2:],
    )


def refuse_trained(truth: Truth, trained: set[str], run: Path) -> None:
    """
    Raises:
        ValueError: images of the test list were trained or validated on, or others of the same patients.
    """
    both = [name for name in truth.names if name in trained]
    if both:
        boxed = {truth.names[i] for i in truth.image} & trained
        raise ValueError(
            f"run: {run} was trained or validated on {len(both)} images of the test list, {len(boxed)} of them with "
            f"boxes ({', '.join(both[:3])}{', ...' if len(both) > 3 else ''}): what it says of them means nothing"
        )
    # by name, which begins with the patient's number: what was trained on may lie on another disk
    patients = {int(name[:8]) for name in trained}
    shared = patients & set(truth.patients.tolist())
    if shared:
        raise ValueError(
            f"run: {run} was trained or validated on other images of {len(shared)} patients of the test list "
            f"({min(shared)}, for one): what it says of them means nothing"
        )


def predict(
    model: torch.nn.Module,
    config: Config,
    index: Index,
    rows: np.ndarray,
    args: argparse.Namespace,
    image: np.ndarray | None = None,
    classes: np.ndarray | None = None,
) -> Predictions:
    """Predictions for the images ``rows`` (n,) of the index, with maps of the ``classes`` (k,) in the images ``image``
    (k,), numbers below n."""
    size = config["image_size"]
    images = index.paths if args.cache is None else open_cache(args.cache, index.paths, size)
    data = Radiographs(images, index.labels, size)
    loader = DataLoader(data, args.batch_size, sampler=[(0, int(row)) for row in rows], num_workers=args.workers)
    pooling = make_pooling(config["pooling"])
    image = np.zeros(0, int) if image is None else image
    probability, peak = (np.zeros((len(rows), len(CLASSES))) for _ in range(2))
    maps = [np.zeros((0, 0))] * len(image)
    start = 0
    centre, step = model.grid
    first = 0.5 if args.raster == "even" else centre / step
    for batch, _, _ in tqdm(loader, desc=name_of(config), unit="batch", disable=None):
        with torch.inference_mode():
            # in float32 every logit above 17 would be the same probability, and where the greatest is a matter of order
            logits = model(to_input(batch.to(args.device))).double()
            inside = slice(start, start + len(batch))
            probability[inside] = torch.sigmoid(pooling(logits)).cpu()
            patches = torch.sigmoid(logits).cpu().numpy()
        rows_seen, columns_seen = seen_cells(patches.shape[2:], (size, size), first)
        peak[inside] = patches[:, :, rows_seen[:, None], columns_seen].max((2, 3))
        for k in np.flatnonzero((image >= inside.start) & (image < inside.stop)):
            maps[k] = patches[image[k] - start, classes[k]].copy()
        start = inside.stop
    return Predictions(probability, peak, maps, first)


def thresholds_of(
    model: torch.nn.Module, config: Config, index: Index, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """T_p and the gate, per class (C,): a number of the options, or what separates the validation images best.

    And, where validation images choose, how many do, and the classes where they cannot, and 0.5 is taken.

    For the gate by the probability of the image; for T_p by that of its greatest patch, so that an image has a patch
    above T_p where it is likely to have the class. Labels of images are all that is looked at.

    Raises:
        ValueError: they are to be chosen, and the run has no validation images, or the data lacks them.
    """
    given = (args.threshold, args.gate)
    if VALIDATION not in given:
        return np.full(len(CLASSES), args.threshold), np.full(len(CLASSES), args.gate), {}
    rows = np.flatnonzero(np.isin(index.patients, config.get("val_patients", [])) & ~index.test)
    if not len(rows):
        raise ValueError(f"threshold, gate: {VALIDATION}: there are no validation images of the run in the data")
    there, expected = len(np.unique(index.patients[rows])), len(config["val_patients"])
    if there < expected:
        print(f"warning: of the run's {expected} validation patients {there} are in the data", file=sys.stderr)
    predictions, labels = predict(model, config, index, rows, args), index.labels[rows]
    positive = (labels > 0).sum(0)
    chosen = {
        "validation_images": len(rows),
        "classes_at_0.5": [name for name, n in zip(CLASSES, positive, strict=True) if n in (0, len(rows))],
    }
    t_p, gate = (
        np.array([best_threshold(scores[:, c], labels[:, c]) for c in range(len(CLASSES))])
        if value == VALIDATION
        else np.full(len(CLASSES), value)
        for value, scores in zip(given, (predictions.peak, predictions.probability), strict=True)
    )
    return t_p, gate, chosen


def name_of(config: Config) -> str:
    loss = {"sgl": "SGL", "bag": "bag loss", "bil": "BIL", "mmm": "MMM"}.get(config["loss"], str(config["loss"]))
    return f"{loss}, {config['pooling']} pooling"


def evaluate(run: Path, truth: Truth, args: argparse.Namespace) -> Evaluated:
    """Predictions of the network of ``run``, and their measures."""
    model, config, which = load_network(run, torch.device(args.device), args.which)
    model.eval()
    t_p, gate, chosen = thresholds_of(model, config, truth.index, args)
    predictions = predict(model, config, truth.index, truth.rows, args, truth.image, truth.classes)
    side = config["image_size"]
    found = boxes_of(predictions, truth, t_p, side, args, isinstance(args.threshold, Relative))
    overlaps = box_iou(found, truth.boxes)
    predicted = predictions.probability[truth.image, truth.classes] > gate[truth.classes]
    maps, classes = predictions.maps, truth.classes
    drawn = {"names": CLASSES, "draws": args.draws, "seed": args.seed}
    metrics = {
        "auc": auc_per_class(predictions.probability, truth.labels, CLASSES),
        "auc_ci": auc_intervals(predictions.probability, truth.labels, truth.patients, **drawn),
        "localization": localization_accuracy(overlaps, classes, CLASSES, predicted),
        "localization_ungated": localization_accuracy(overlaps, classes, CLASSES),
        # in pixels of the network's image, to which the maps are upsampled
        "max_box_acc": max_box_accuracy(
            maps,
            truth.boxes * (side / BOX_SIDE),
            classes,
            CLASSES,
            (side, side),
            args.upsampling,
            first=predictions.first,
        ),
        "pointing_game": pointing_game(maps, truth.boxes, classes, CLASSES, TABLE_SIZE, predictions.first),
        "baselines": {
            name: localization_accuracy(box_iou(boxes, truth.boxes), classes, CLASSES)
            for name, boxes in trivial_boxes(truth, predictions, side).items()
        },
        "images": len(truth.rows),
        "boxes": len(truth.boxes),
    }
    if not isinstance(args.threshold, Relative):
        half = box_iou(boxes_of(predictions, truth, np.full(len(CLASSES), HALF), side, args, True), truth.boxes)
        metrics["localization_relative"] = localization_accuracy(half, classes, CLASSES, predicted)
        metrics["localization_relative_ungated"] = localization_accuracy(half, classes, CLASSES)
    details = {
        "name": name_of(config),
        **which,
        **chosen,
        "config": {key: value for key, value in config.items() if not isinstance(value, list)},
        "threshold": str(args.threshold) if isinstance(args.threshold, Relative) else args.threshold,
        "gate": args.gate,
        "threshold_of_class": dict(zip(CLASSES, t_p.tolist(), strict=True)),
        "gate_of_class": dict(zip(CLASSES, gate.tolist(), strict=True)),
        "upsampling": args.upsampling,
        "raster": args.raster,
        "morphology": args.morphology,
        "draws": args.draws,
        "seed": args.seed,
        "grid": list(predictions.maps[0].shape) if predictions.maps else [],
        "first_cell": predictions.first,
        "patients": {name: len(set(truth.patients[truth.labels[:, c] > 0])) for c, name in enumerate(CLASSES)},
        "boxes": {name: int((truth.classes == c).sum()) for c, name in enumerate(CLASSES)},
    }
    for key, counts in (("localization", predicted), ("localization_ungated", np.ones_like(predicted))):
        details[f"{key}_ci"] = {
            f"{t:g}": mean_intervals((overlaps > t) & counts, truth.classes, truth.patients[truth.image], **drawn)
            for t in T_IOU
        }
    return Evaluated(name_of(config), config, predictions, found, overlaps, predicted, metrics, details)


def boxes_of(
    predictions: Predictions,
    truth: Truth,
    thresholds: np.ndarray,
    side: int,
    args: argparse.Namespace,
    relative: bool,
) -> np.ndarray:
    """The boxes (k, 4) of the maps at the ``thresholds`` (C,) of their classes, in pixels of the tables.

    The maps are upsampled to ``side`` x ``side`` pixels. ``relative``: the thresholds are shares of each map's maximum.
    """
    found = [
        heatmap_to_box(
            heatmap, (side, side), thresholds[c], args.upsampling, args.morphology, predictions.first, relative=relative
        )
        for heatmap, c in zip(predictions.maps, truth.classes, strict=True)
    ]
    return np.array(found).reshape(-1, 4) * (BOX_SIDE / side)


def trivial_boxes(truth: Truth, predictions: Predictions, side: int) -> dict[str, np.ndarray]:
    """Boxes (k, 4) that need no network, and the best that the cells of this one's maps could give.

    The latter as those of the maps, in whole pixels of images of ``side`` by ``side``.
    """
    count, unit = len(truth.boxes), BOX_SIDE / side
    return {
        "whole image": np.tile(whole_image_box(TABLE_SIZE), (count, 1)),
        "centre box": np.tile(centre_box(TABLE_SIZE), (count, 1)),
        "mean box of the class": mean_boxes(truth.boxes, truth.classes, truth.patients[truth.image]),
        "ceiling of the grid": unit
        * grid_ceiling(
            truth.boxes / unit, predictions.maps[0].shape if count else (1, 1), (side, side), predictions.first
        ),
    }
