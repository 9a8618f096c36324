"""Predictions for images without labels, image by image: probabilities, maps, and boxes in pixels of the image."""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.csv_table import write_csv
from common.files import new_file, read_json
from common.predicted_boxes import write_boxes
from common.progress import Progress
from torch.utils.data import DataLoader

from images.dataset import Index, some
from images.evaluation import Network, open_networks
from images.frames import to_image
from images.items import ReadableImages
from images.prediction import apply, content_of, first_cell, name_of, whole_images
from images.thresholds import Relative
from sgl_ops.localization import heatmap_to_boxes, upsample

#: Settings of runs whose probabilities can be averaged, apart from the positions of the cells of their maps.
EQUAL = ("classes", "image_size", "channels", "fit")


class Predicted(NamedTuple):
    """The prediction for an image.

    ``row``: of the index. ``probability``: (C,). ``maps``: (C, h, w) over the network's square; cells of padding are 0.
    ``frame``: (4,), the content of the image in the square. ``problem``: why the image cannot be read; empty if it can.
    Without an image, the other fields have no meaning.
    """

    row: int
    probability: np.ndarray
    maps: np.ndarray
    frame: np.ndarray
    problem: str


class Found(NamedTuple):
    """The prediction for a class in an image.

    ``row``: of the index. ``probability``: of the class in the image. ``heatmap``: (h, w) over the network's square.
    ``boxes``: (m, 4) in pixels of the square. ``peaks``: (m,), the largest probability of the map in each box.
    ``predicted``: whether the class passes the gate; if not, there is no box.
    """

    row: int
    probability: float
    heatmap: np.ndarray
    frame: np.ndarray
    boxes: np.ndarray
    peaks: np.ndarray
    predicted: bool


class Results(NamedTuple):
    """The predictions for the images of a folder.

    ``rows``: (n,), rows of the index that could be read. ``probability``: (n, C). ``predicted``, ``boxes``: (C,), the
    number of images in which each class passes the gate, and the number of its boxes. ``highest``: for each class, its
    images with the highest probabilities, the highest first. ``problems``: a message for each image that cannot be
    read.
    """

    rows: np.ndarray
    probability: np.ndarray
    predicted: np.ndarray
    boxes: np.ndarray
    highest: list[list[Found]]
    problems: list[str]


def open_ensemble(runs: Sequence[Path], args: argparse.Namespace) -> list[Network]:
    """Loads networks whose probabilities can be averaged, cell by cell.

    Raises:
        ValueError: a run does not exist, or two runs differ in a setting of EQUAL or in the positions of their cells.
    """
    networks = open_networks(runs, args, EQUAL)
    grids = [tuple(network.model.grid) for network in networks]
    for run, (centre, step) in zip(runs, grids, strict=True):
        if (centre, step) != grids[0]:
            raise ValueError(
                f"run: expected runs whose maps have the same cells, got a cell every {grids[0][1]:g} pixels from "
                f"{grids[0][0]:g} in {runs[0]}, and every {step:g} from {centre:g} in {run}"
            )
    return networks


def title_of(networks: Sequence[Network]) -> str:
    """The name of the networks in tables and reports."""
    return name_of(networks[0].config) if len(networks) == 1 else f"Mean of {len(networks)} networks"


def predict_images(networks: Sequence[Network], index: Index, args: argparse.Namespace) -> Iterator[Predicted]:
    """The predictions for all images of the index, in their order: the means over the networks.

    Only a few batches are in memory at a time. The networks are those of ``open_ensemble``, and the index is that of
    ``images.folder.without_labels``.

    Raises:
        ValueError: the maps of two networks have different sizes.
    """
    data = ReadableImages(whole_images(networks[0].config, index))
    order = [(0, row) for row in range(len(data))]
    loader = DataLoader(data, args.batch_size, sampler=order, num_workers=args.workers)
    for batch, _, frames, numbers, problems in Progress(loader, desc=title_of(networks), unit="batch"):
        content = frames.numpy()
        found = [apply(*network[:2], batch, content, index.classes, args.device) for network in networks]
        shapes = {maps.shape[2:] for _, maps in found}
        if len(shapes) > 1:
            raise ValueError(
                f"run: expected maps of one size, got {' and '.join(f'{w}x{h}' for h, w in sorted(shapes))}"
            )
        probability, maps = (np.mean(parts, axis=0) for parts in zip(*found, strict=True))
        for k, (row, problem) in enumerate(zip(numbers.tolist(), problems, strict=True)):
            yield Predicted(row, probability[k], maps[k], content[k], problem)


class Limits(NamedTuple):
    """The thresholds of a class: T_p of the map, which may be ``Relative``, and the gate of the image."""

    threshold: float
    gate: float


def limits_of(args: argparse.Namespace, classes: Sequence[str]) -> list[Limits]:
    """The thresholds of each class. ``args.threshold`` and ``args.gate`` are numbers, or dicts by class.

    Raises:
        ValueError: a dict lacks a class.
    """
    for name in ("threshold", "gate"):
        value = getattr(args, name)
        lacking = [label for label in classes if isinstance(value, dict) and label not in value]
        if lacking:
            raise ValueError(f"like: expected a {name} of each class in {args.like}, found none of {some(lacking)}")
    given = (args.threshold, args.gate)
    return [Limits(*(value[label] if isinstance(value, dict) else value for value in given)) for label in classes]


def warn_of_others(report: Path, runs: Sequence[Path], networks: Sequence[Network]) -> None:
    """Prints a warning if the folder ``report`` of localize_cxr.py evaluates another network than one of ``runs``."""
    known = read_json(report / "details.json").get("config", {})
    others = [
        str(run)
        for run, network in zip(runs, networks, strict=True)
        if any(network.config.get(key) != value for key, value in known.items())
    ]
    if others:
        print(
            f"warning: like: {report} evaluates another network than {' and '.join(others)}; its thresholds may not "
            "suit them",
            file=sys.stderr,
        )


def boxes_in_square(
    heatmap: np.ndarray, frame: np.ndarray, side: int, first: float, threshold: float, args: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes (m, 4) of all components of a map, in pixels of the network's square, and their peaks (m,).

    The peak is the largest probability of the map in the box. The first box is that of ``images.evaluation.boxes_of``.

    Args:
        heatmap: (h, w) over the square of ``side`` pixels.
        frame: (4,), the content of the image in the square. Boxes do not exceed it.
        first: the centre of the first cell of the map, in cells.
        threshold: T_p, which may be ``Relative``.
    """
    part, size, first = content_of(heatmap, frame, side, args.upsampling, first)
    pixels = upsample(part, size, args.upsampling, first)
    relative = isinstance(threshold, Relative)
    boxes = heatmap_to_boxes(pixels, size, threshold, side=args.morphology, relative=relative)
    peaks = [pixels[y : y + h, x : x + w].max() for x, y, w, h in boxes.astype(int)]
    return boxes + np.array([*frame[:2], 0, 0]), np.array(peaks)


def find(predicted: Predicted, c: int, side: int, first: float, limits: Limits, args: argparse.Namespace) -> Found:
    """The prediction for class ``c`` in an image, with its boxes if the class passes the gate."""
    probability, heatmap = float(predicted.probability[c]), predicted.maps[c]
    boxes, peaks = np.zeros((0, 4)), np.zeros(0)
    if probability > limits.gate:
        boxes, peaks = boxes_in_square(heatmap, predicted.frame, side, first, limits.threshold, args)
    return Found(predicted.row, probability, heatmap, predicted.frame, boxes, peaks, probability > limits.gate)


class Highest:
    """The ``count`` images with the highest probabilities of a class. If two are equal, the first image counts."""

    def __init__(self, count: int):
        self.count = count
        self.kept: list[tuple[float, int, Found]] = []

    def add(self, found: Found) -> None:
        entry = (found.probability, -found.row, found)
        if len(self.kept) < self.count:
            # a copy, because the map is a view of the maps of its whole batch
            heapq.heappush(self.kept, (*entry[:2], found._replace(heatmap=found.heatmap.copy())))
        elif self.kept and entry[:2] > self.kept[0][:2]:
            heapq.heapreplace(self.kept, (*entry[:2], found._replace(heatmap=found.heatmap.copy())))

    def sorted(self) -> list[Found]:
        return [found for *_, found in sorted(self.kept, key=lambda entry: entry[:2], reverse=True)]


def write_predictions(networks: Sequence[Network], index: Index, args: argparse.Namespace, out: Path) -> Results:
    """Applies the networks to all images, and writes predictions.csv, boxes.csv and, with ``--maps``, the maps.

    Raises:
        ValueError: none of the images can be read, or a class has no threshold.
        OSError: a file cannot be written.
    """
    side, first = networks[0].config["image_size"], first_cell(networks[0].model, args.raster)
    limits = limits_of(args, index.classes)
    rows, probabilities, problems = [], [], []
    predicted, boxes = (np.zeros(len(index.classes), int) for _ in range(2))
    highest = [Highest(args.gallery) for _ in index.classes]

    def table_of_boxes() -> Iterator[list]:
        for image in predict_images(networks, index, args):
            if image.problem:
                problems.append(image.problem)
                continue
            name = index.names[image.row]
            rows.append(image.row)
            probabilities.append(image.probability)
            if args.maps:
                write_maps(image, side, first, index.classes, args.upsampling, out / "maps" / f"{name}.npz")
            for c, label in enumerate(index.classes):
                found = find(image, c, side, first, limits[c], args)
                predicted[c] += found.predicted
                boxes[c] += len(found.boxes)
                highest[c].add(found)
                places = to_image(found.boxes, index.sizes[image.row], image.frame)
                yield from ([name, label, *box, p] for box, p in zip(places, found.peaks, strict=True))
        if not rows:
            raise ValueError(f"images: none of the {len(problems)} images can be read, for example {problems[0]}")

    write_boxes(table_of_boxes(), out / "boxes.csv")
    content = ([index.names[row], *(f"{v:.6g}" for v in p)] for row, p in zip(rows, probabilities, strict=True))
    write_csv(["image", *(f"p_{name}" for name in index.classes)], content, out / "predictions.csv")
    best = [of_class.sorted() for of_class in highest]
    return Results(np.array(rows), np.array(probabilities), predicted, boxes, best, problems)


def write_maps(image: Predicted, side: int, first: float, classes: Sequence[str], upsampling: str, path: Path) -> None:
    """Writes the maps of an image without padding: ``maps`` (C, h, w) float32, ``classes`` (C,), and ``first``.

    ``sgl_ops.localization.upsample(maps[c], (height, width), first=first)`` is the map of class c in pixels of the
    image.
    """
    parts = [content_of(heatmap, image.frame, side, upsampling, first) for heatmap in image.maps]
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, "wb") as file:
        np.savez_compressed(
            file,
            maps=np.array([part for part, *_ in parts], np.float32),
            classes=np.array(classes),
            first=parts[0][2],
        )
