"""Runs of train_features.py: their training and test bags, the files of finished runs, and their summary."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.csv_table import write_rows
from common.files import new_file, without_nan, write_json
from images.dataset import some

from features.evaluation import (
    auc,
    auc_interval,
    best_overlaps,
    box_intervals,
    box_metrics,
    boxes_of,
    instance_metrics,
    pixels_of,
)
from features.labels import Labels
from features.plan import Run
from features.store import FeatureBags, digest

#: The table with the labels and the probabilities of the test bags.
BAGS_OF_RUN = "bags.csv"


class Predictions(NamedTuple):
    """Predictions for the test bags: ``names``, ``bags`` (N, C), ``instances`` (T, C), ``offsets`` (N + 1,)."""

    names: np.ndarray
    bags: np.ndarray
    instances: np.ndarray
    offsets: np.ndarray

    def by_bag(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name and the probabilities of the instances (L, C) of each bag."""
        return zip(self.names.tolist(), np.split(self.instances, self.offsets[1:-1]), strict=True)


class Truth(NamedTuple):
    """The true labels and boxes that predictions are compared with. ``instances`` and ``boxes`` may be empty.

    ``threshold`` cuts a map: the predicted boxes enclose pixels above it, see :func:`features.evaluation.box_of`.
    """

    labels: Labels
    instances: Mapping[str, np.ndarray]
    boxes: Mapping[str, Mapping[str, np.ndarray]]
    threshold: float = 0.5


def digests_of(labels: Labels, bags: FeatureBags) -> dict[str, str]:
    """Digests of the data that decide the runs and their results: a run continues only on the same data."""
    table = [labels.names, list(labels.classes), labels.values.tolist(), labels.groups.tolist()]
    sizes = [bags.instances(name) for name in labels.names]
    return {
        "labels": digest(table),
        "split": digest(None if labels.split is None else labels.split.tolist()),
        "features": digest([bags.features, bags.settings, sizes]),
    }


def refuse_other_folds(parts: Path, runs: Sequence[Run], labels: Labels) -> None:
    """Raises ValueError if a finished run in ``parts`` tested other bags than the same run of ``runs``."""
    for run in runs:
        path = parts / f"{run.name}.npz"
        if path.is_file():
            with np.load(path) as file:
                tested = set(file["names"].tolist())
            if tested != {labels.names[i] for i in run.test}:
                raise ValueError(
                    f"{parts.parent}: {run.name} tested other bags than it would now, because an older version divided "
                    "the bags differently. Train again, into another --out"
                )


def refuse_empty(bags: FeatureBags, names: Sequence[str]) -> None:
    """Raises ValueError if one of the bags ``names`` has no instances."""
    empty = [name for name in names if not bags.instances(name)]
    if empty:
        raise ValueError(f"features: {len(empty)} bags have no instances ({some(empty)})")


def refuse_other_data(folder: Path, known: Mapping[str, str], found: Mapping[str, str], advice: str) -> None:
    """Raises ValueError if the digests ``found`` differ from those of the runs in ``folder``.

    Args:
        known: the digests that ``settings.json`` holds; empty in a folder of an older version, which is accepted.
        advice: what to do.
    """
    for name, text in (("labels", "other labels"), ("split", "another split"), ("features", "other features")):
        if known and known.get(name) != found[name]:
            raise ValueError(f"{folder}: made with {text} than there are now; {advice}")


def predictions_of(names: Sequence[str], found: Iterable[tuple[np.ndarray, np.ndarray]]) -> Predictions:
    """The predictions of the bags ``names`` from the probabilities of each bag, (C,), and of its instances, (L, C)."""
    bags, instances = zip(*found, strict=True)
    offsets = np.cumsum([0, *map(len, instances)])
    return Predictions(np.array(names), np.stack(bags), np.concatenate(instances), offsets)


def save_predictions(path: Path, predictions: Predictions) -> None:
    """Writes the predictions by ``new_file``."""
    with new_file(path, "wb") as file:
        np.savez(file, **predictions._asdict())


def load_predictions(path: Path) -> Predictions:
    with np.load(path) as file:
        return Predictions(**{name: file[name] for name in Predictions._fields})


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The predictions of several folds as those of one run."""
    sizes = np.concatenate([np.diff(p.offsets) for p in parts])
    names, bags, instances = (np.concatenate([getattr(p, field) for p in parts]) for field in Predictions._fields[:3])
    return Predictions(names, bags, instances, np.concatenate([[0], np.cumsum(sizes)]))


def mean_of(repeats: Sequence[Predictions]) -> Predictions:
    """The mean probabilities over predictions of the same bags. The bags have the order of the first one."""
    places = [{name: i for i, name in enumerate(p.names.tolist())} for p in repeats]
    instances = [dict(p.by_bag()) for p in repeats]
    names = repeats[0].names.tolist()
    return predictions_of(
        names,
        (
            (
                np.mean([p.bags[place[name]] for p, place in zip(repeats, places, strict=True)], 0),
                np.mean([one[name] for one in instances], 0),
            )
            for name in names
        ),
    )


def metrics_of(predictions: Predictions, truth: Truth, bags: FeatureBags) -> dict[str, dict[str, float]]:
    """Metrics by class, of bags; with labels of instances or boxes, also of these."""
    rows = {name: i for i, name in enumerate(truth.labels.names)}
    labels = truth.labels.values[[rows[str(name)] for name in predictions.names]]
    per_bag = [instances for _, instances in predictions.by_bag()]
    result: dict[str, dict[str, float]] = {}
    for c, name in enumerate(truth.labels.classes):
        scores = predictions.bags[:, c]
        found = {"auc": auc(scores, labels[:, c])}
        known = [i for i, bag in enumerate(predictions.names) if str(bag) in truth.instances]
        if known:
            values = instance_metrics(
                [per_bag[i][:, c] for i in known],
                [truth.instances[str(predictions.names[i])][:, c] for i in known],
                [labels[i, c] == 1 for i in known],
            )
            found |= {f"instance_{key}": value for key, value in values.items()}
        if name in truth.boxes:
            found |= box_metrics(*maps_of(predictions, bags, c), truth.boxes[name], *cells_of(bags), truth.threshold)
        result[name] = found
    return result


def maps_of(
    predictions: Predictions, bags: FeatureBags, c: int
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """Maps (h, w) of class ``c`` and sizes of the images, for the bags that are maps."""
    maps, sizes = {}, {}
    for i, name in enumerate(predictions.names.tolist()):
        bag = bags.shape(name)
        if bag.grid is not None and bag.size is not None:
            start, stop = predictions.offsets[i : i + 2]
            maps[name] = predictions.instances[start:stop, c].reshape(bag.grid).astype(float)
            sizes[name] = bag.size
    return maps, sizes


def predicted_boxes(
    predictions: Predictions,
    bags: FeatureBags,
    classes: Sequence[str],
    gates: Sequence[float],
    threshold: float = 0.5,
) -> list[tuple[str, str, float, float, float, float, float]]:
    """The boxes of all maps: name of the bag, class, x, y, w, h in pixels, and the largest probability in the box.

    Args:
        gates: for each class, only bags with a higher probability have boxes of it.
        threshold: as for :func:`features.evaluation.box_of`.
    """
    rows = []
    for c, (label, gate) in enumerate(zip(classes, gates, strict=True)):
        likely = set(predictions.names[predictions.bags[:, c] > gate].tolist())
        maps, sizes = maps_of(predictions, bags, c)
        for name, heatmap in maps.items():
            if name in likely:
                image = pixels_of(heatmap, sizes[name], *cells_of(bags))
                for x, y, w, h in boxes_of(heatmap, sizes[name], *cells_of(bags), threshold):
                    inside = image[int(y) : int(y + h), int(x) : int(x + w)]
                    rows.append((name, label, float(x), float(y), float(w), float(h), float(inside.max())))
    return rows


def cells_of(bags: FeatureBags) -> tuple[float, float | None]:
    """The centre of the first cell, in cells from the edge of the image, and the stride in pixels of the image.

    0.5 and None if the extraction is unknown.
    """
    settings = bags.settings
    if not settings.get("stride"):
        return 0.5, None
    return settings["centre"] / settings["stride"], settings["stride"] / settings.get("scales", [1.0])[0]


def unit_of(bags: FeatureBags) -> str:
    """What a bag is, for the report: "image" if the bags are maps of images, otherwise "bag"."""
    return "image" if all(bags.shape(name).grid is not None for name in bags.names[:1]) else "bag"


def summary(repeats: Sequence[Sequence[Predictions]], truth: Truth, bags: FeatureBags) -> tuple[dict, list[dict]]:
    """Metrics over all repeats (each a list of folds): a dictionary by class, and one row per repeat and class.

    The metrics of a repeat are computed over the test bags of all its folds together. Each metric has its mean, worst
    and best over the repeats. ``KEY_low`` and ``KEY_high`` are the 95 % interval over bags of this mean: the bags are
    resampled, and the trained networks stay. ``auc_of_folds`` and ``auc_of_folds_sd`` are the mean and the standard
    deviation of the AUC within the folds. With several repeats, ``of_means`` has the metrics of the mean probabilities
    over the repeats.
    """
    whole = [joined(parts) for parts in repeats]
    of_means = metrics_of(mean_of(whole), truth, bags) if len(whole) > 1 else {}
    rows = []
    for number, predictions in enumerate(whole):
        for name, values in metrics_of(predictions, truth, bags).items():
            rows.append({"repeat": number, "class": name} | values)
    order = {name: i for i, name in enumerate(truth.labels.names)}
    result = {}
    for c, name in enumerate(truth.labels.classes):
        own = [row for row in rows if row["class"] == name]
        keys = [key for key in own[0] if key not in ("repeat", "class") and not key.endswith(("_low", "_high"))]
        stats = {}
        for key in keys:
            values = np.array([row[key] for row in own], float)
            stats[key] = float(values.mean())
            stats[f"{key}_worst"], stats[f"{key}_best"] = float(values.min()), float(values.max())
        # every repeat tests the same bags, in another order
        ordered = [predictions.bags[np.argsort(predictions.names), c] for predictions in whole]
        labels = truth.labels.values[[order[str(bag)] for bag in np.sort(whole[0].names)], c]
        stats |= auc_interval(np.array(ordered), labels)
        if "images" in own[0]:
            overlaps = [
                best_overlaps(*maps_of(predictions, bags, c), truth.boxes[name], *cells_of(bags), truth.threshold)
                for predictions in whole
            ]
            stats |= box_intervals(overlaps)
        within = [
            auc(part.bags[:, c], truth.labels.values[[order[str(bag)] for bag in part.names], c])
            for parts in repeats
            for part in parts
        ]
        if len(within) > len(whole):
            defined = np.array(within)[~np.isnan(within)]
            if len(defined):
                stats |= {"auc_of_folds": float(np.mean(defined)), "auc_of_folds_sd": float(np.std(defined))}
        if name in of_means:
            stats["of_means"] = of_means[name]
        result[name] = stats
    return result, rows


def rows_of_trainings(repeats: Sequence[Sequence[Predictions]], truth: Truth, bags: FeatureBags) -> list[dict]:
    """The metrics of each training, one row per repeat, fold and class, with the numbers of its test bags."""
    order = {name: i for i, name in enumerate(truth.labels.names)}
    rows = []
    for repeat, parts in enumerate(repeats):
        for fold, part in enumerate(parts):
            labels = truth.labels.values[[order[str(bag)] for bag in part.names]]
            for c, (name, values) in enumerate(metrics_of(part, truth, bags).items()):
                counts = {"positive": int((labels[:, c] == 1).sum()), "negative": int((labels[:, c] == 0).sum())}
                rows.append({"repeat": repeat, "fold": fold, "class": name} | counts | values)
    return rows


def write_tables(
    folder: Path,
    repeats: Sequence[Sequence[Predictions]],
    labels: Labels,
    bags: FeatureBags,
    result: dict,
    rows: list[dict],
    folds: list[dict],
) -> None:
    """``metrics.json``, ``runs.csv``, ``folds.csv``, ``bags.csv`` and ``instances.csv`` (means over the repeats).

    With folds, the last column of ``bags.csv`` has the fold that tested the bag; with several repeats, those of all
    repeats, joined by |.
    """
    write_json(without_nan(result), folder / "metrics.json")
    for name, lines in (("runs.csv", rows), ("folds.csv", folds)):
        if lines:
            write_rows(lines, folder / name)
    means = mean_of([joined(parts) for parts in repeats])
    order = {name: i for i, name in enumerate(labels.names)}
    with new_file(folder / BAGS_OF_RUN) as file:
        writer = csv.writer(file, lineterminator="\n")
        tested = [{name: fold for fold, part in enumerate(parts) for name in part.names.tolist()} for parts in repeats]
        own = ["fold"] if len(repeats[0]) > 1 else []
        writer.writerow(["bag", *(f"label_{c}" for c in labels.classes), *labels.classes, *own])
        for name, score in zip(means.names.tolist(), means.bags, strict=True):
            truth = ["" if math.isnan(v) else int(v) for v in labels.values[order[name]]]
            fold = ["|".join(str(folds_of[name]) for folds_of in tested)] if own else []
            writer.writerow([name, *truth, *(f"{v:.6g}" for v in score), *fold])
    write_instances(folder, means.by_bag(), labels.classes, bags)


def write_instances(
    folder: Path, found: Iterable[tuple[str, np.ndarray]], classes: Sequence[str], bags: FeatureBags
) -> None:
    """``instances.csv``: the position and the probabilities of each instance, from names and arrays (L, C) of bags."""
    with new_file(folder / "instances.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bag", "instance", "x", "y", *classes])
        for name, instances in found:
            coords = bags.coords(name)
            for j, values in enumerate(instances):
                place = ("", "") if coords is None else (f"{coords[j][0]:g}", f"{coords[j][1]:g}")
                writer.writerow([name, j, *place, *(f"{v:.4g}" for v in values)])
