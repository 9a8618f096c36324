"""Reads labels of bags and instances, and boxes, from CSV files.

The tables are those of images.label_tables. They name a bag by its name, or by its file with or without suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from images import label_tables
from images.dataset import records_of, some
from images.label_tables import CLASSES, NAMES, name_among, same

PATIENT = "patient"
#: Columns of the tables of results, which also have a column per class, and a column label_CLASS.
RESERVED = ("bag", "instance", "x", "y", "fold")


class Labels(NamedTuple):
    """Labels of bags.

    Attributes:
        names: names of the N bags.
        classes: names of the C classes.
        values: (N, C) float32: 0, 1, or NaN = unknown.
        split: (N,) train, val or test; None without a split.
        groups: (N,) patients; without such a column, the names of the bags.
        absent: the bags of the table that were left out, because they have no features.
    """

    names: list[str]
    classes: list[str]
    values: np.ndarray
    split: np.ndarray | None
    groups: np.ndarray
    absent: Sequence[str] = ()


def read_labels(
    path: Path,
    classes: Sequence[str] | None,
    group: str,
    bags: Sequence[str],
    with_split: bool = True,
    allow_missing: bool = False,
) -> Labels:
    """Labels of a csv file: the columns of images.label_tables.

    Args:
        classes: the classes to read; None: all.
        group: the column with the patients.
        bags: the names of the bags that have features.
        with_split: read the split.
        allow_missing: leave out the rows of bags without features.

    Raises:
        ValueError: a file or column is missing, two columns disagree, a bag occurs twice, a cell has another value, no
            bag has features, or some do not have them without ``allow_missing``.
    """
    header, records = records_of(path, [NAMES])
    if group not in header and group != PATIENT:
        raise ValueError(f"labels: expected the column {group} (--patient) in {path}, found {', '.join(header)}")
    name_of = name_among(bags)
    found = [same(cells, NAMES, at, name_of) for at, cells in records]
    given = [next(cells[key] for key in NAMES if key in cells) for _, cells in records]
    names = [cell if name is None else name for name, cell in zip(found, given, strict=True)]
    label_tables.refuse_twice(names, records)
    absent = [name for name, bag in zip(names, found, strict=True) if bag is None]
    if absent and (len(absent) == len(names) or not allow_missing):
        raise ValueError(
            f"labels: {len(absent)} of the {len(names)} bags of {path} have no features ({some(absent, 10)}); bags "
            f"with features: {some(bags)}. The name of a bag is that of its file, without the suffix. "
            "--allow-missing leaves out the bags without features"
        )
    rows = [number for number, bag in enumerate(found) if bag is not None]
    records, names = [records[n] for n in rows], [names[n] for n in rows]
    try:
        known, values = label_tables.read_labels(header, records, (*NAMES, group, "split"), classes)
    except ValueError as error:
        hint = "" if classes or "labels" in header else "; --classes names the columns of the classes"
        raise ValueError(f"{error}{hint}") from None
    taken = [name for name in known if name in RESERVED or name.startswith("label_")]
    if taken:
        raise ValueError(f"classes: {taken[0]} is the name of a column in the tables of results; rename this class")
    split = label_tables.read_split(header, records, names, path.parent, name_of) if with_split else None
    groups = label_tables.groups_of(records, group, names)
    return Labels(names, list(known), values, None if split is None else split[0], groups, absent)


def labels_of_run(known: Mapping[str, Any], bags: Sequence[str]) -> Labels:
    """The labels of a run of train_features.py with the options ``known``.

    Args:
        bags: as for :func:`read_labels`, which also says what is raised.
    """
    return read_labels(
        Path(known["labels"]),
        known["classes"],
        known["patient"],
        bags,
        known["folds"] is None,
        known.get("allow_missing", False),
    )


def read_instance_labels(path: Path, classes: Sequence[str], bags: Sequence[str]) -> dict[str, np.ndarray]:
    """Labels (L, C) of the instances by bag, in the order of the rows, NaN = unknown. Other bags are left out.

    Columns: ``bag`` (or ``image``), and either ``class`` (or ``label``) with the name of the instance's class or NaN,
    or one column per class as in the labels of the bags.
    """
    header, records = records_of(path, [NAMES])
    name_of = name_among(bags)
    named = set(CLASSES) & set(header) - set(classes)
    absent = [name for name in classes if name not in header]
    if absent and not named:
        raise ValueError(f"instance labels: expected the column class, or {absent[0]}, in {path}")
    rows: dict[str, list[list[float]]] = {}
    for at, cells in records:
        name = same(cells, NAMES, at, name_of)
        if name is not None:
            shown = same(cells, CLASSES, at) if named else None
            unknown = shown is not None and shown.lower() == "nan"
            row = [
                np.nan if unknown else float(shown == c) if named else label_tables.value_of(cells, c, at)
                for c in classes
            ]
            rows.setdefault(name, []).append(row)
    if not rows:
        raise ValueError(f"instance labels: no row of {path} names one of the bags ({some(bags)})")
    labels = {name: np.array(values, np.float32) for name, values in rows.items()}
    if named and not any((values == 1).any() for values in labels.values()):
        raise ValueError(f"instance labels: no row of {path} has one of the classes {some(classes, 20)}")
    return labels


def read_boxes(
    path: Path,
    classes: Sequence[str],
    bags: Sequence[str],
    size_of: Callable[[str], tuple[int, int] | None] = lambda _: None,
) -> dict[str, dict[str, np.ndarray]]:
    """Boxes (n, 4) x, y, w, h by class and bag. Boxes of other bags and classes are left out.

    Args:
        size_of: the size (height, width) of the image of a bag; None: unknown.

    Raises:
        ValueError: as images.label_tables.read_boxes; also if a box exceeds its image by more than one pixel, and if no
            box is of one of the bags and classes.
    """
    boxes: dict[str, dict[str, list]] = {name: {} for name in classes}
    for name, label, place in label_tables.read_boxes(path, lambda _, __, label: label in boxes, name_among(bags)):
        _refuse_outside(path, name, place, size_of(name))
        boxes[label].setdefault(name, []).append(place)
    if not any(boxes.values()):
        present: dict[str, None] = {}  # the classes of the file, in its order
        list(label_tables.read_boxes(path, lambda _, __, label: bool(present.setdefault(label)), name_among(bags)))
        found = f"has boxes of {some(present, 20)} in these bags" if present else "has no box in these bags"
        raise ValueError(f"boxes: expected boxes of {some(classes, 20)} in bags such as {some(bags)}; {path} {found}")
    return {label: {name: np.array(places) for name, places in found.items()} for label, found in boxes.items()}


def unknown_boxes(path: Path, bags: Sequence[str]) -> str | None:
    """A line with the number of boxes that belong to none of the ``bags``, and their first names; None without any."""
    name_of, unknown = name_among(bags), []

    def known(cell: str) -> str | None:
        found = name_of(cell)
        if found is None:
            unknown.append(cell)
        return found

    count = sum(1 for _ in records_of(path, [NAMES])[1])
    list(label_tables.read_boxes(path, lambda *_: True, known))
    names = dict.fromkeys(unknown)
    return f"{len(unknown)} of {count} boxes of {path.name} are of no bag ({some(names)})" if names else None


def _refuse_outside(
    path: Path, name: str, place: tuple[float, float, float, float], size: tuple[int, int] | None
) -> None:
    """Raises ValueError if a box exceeds its image by more than one pixel: it is meant for an image of another size."""
    x, y, w, h = place
    if size is not None and (x + w > size[1] + 1 or y + h > size[0] + 1):
        raise ValueError(
            f"{path}: the box {x:g}, {y:g}, {w:g}, {h:g} exceeds {name}, which has {size[1]}x{size[0]} pixels"
        )


def boxes_on_negatives(labels: Labels, boxes: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """A line for each class that has boxes in bags with the label 0."""
    lines = []
    for c, label in enumerate(labels.classes):
        placed = boxes.get(label, {})
        names = [
            name for name, value in zip(labels.names, labels.values[:, c], strict=True) if value == 0 and name in placed
        ]
        if names:
            count = sum(len(placed[name]) for name in names)
            lines.append(
                f"{count} boxes of {label} are in {len(names)} bags whose label of {label} is 0 ({some(names)})"
            )
    return lines
