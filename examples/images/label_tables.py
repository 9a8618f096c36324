"""The tables of your own data: labels.csv, split.csv and boxes.csv, of images and of bags of features.

labels.csv has the column ``image``, and optionally ``patient`` and ``split`` (train, val, test). The labels are either
in the column ``labels`` (class names joined by ``|``; nothing, ``none`` or ``No Finding`` for none of the
classes, NaN for unknown), or
in one column per class (1 or 0; nothing, NaN or -1 for unknown). In every table, ``image`` may also be named ``bag``,
``file`` or ``filename``.

boxes.csv has ``image``, ``label`` (or ``class``), and ``x,y,w,h`` or ``xmin,ymin,xmax,ymax`` in pixels. x and y are the
upper left corner. split.csv has ``image`` and ``split``.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from images.dataset import records_of, some
from images.pixels import name_without_suffix

LABELS, BOXES, SPLIT = "labels.csv", "boxes.csv", "split.csv"
PARTS = ("train", "val", "test")
VALUES = {"1": 1.0, "0": 0.0, "-1": math.nan, "": math.nan, "nan": math.nan}
#: What to do if a patient is in two parts of the split.
SPLIT_ADVICE = (
    f"; correct the column split, or {SPLIT}. Delete this file if check_cxr.py or train_cxr.py drew it before the "
    "table had patients"
)
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)")
#: Cells of the column ``labels`` for none of the classes, in lower case.
NOTHING = ("none", "no finding")
NAMES, CLASSES = ("image", "bag", "file", "filename"), ("label", "class")
SIDES, CORNERS = ("x", "y", "w", "h"), ("xmin", "ymin", "xmax", "ymax")

#: Position for messages, and cells by column, of a row.
Record = tuple[str, dict[str, str]]


def name_among(names: Collection[str]) -> Callable[[str], str | None]:
    """A function from a cell of a table to the image or bag of ``names`` that it refers to; None if there is none.

    A cell refers to a name that is equal as a path, or else to the only name that has the same last part, with or
    without the suffix of an image. If both have a folder, the folders must be equal. The last part of a cell may have
    any suffix if the name is the part before it: the bag ``a`` of the slide ``a.svs``.
    """
    path_of = {name: place_of(name) for name in names}
    by_path: dict[PurePosixPath, list[str]] = {}
    by_part: dict[str, list[str]] = {}
    for name, path in path_of.items():
        by_path.setdefault(path, []).append(name)
        for part in _last_parts(path):
            by_part.setdefault(part, []).append(name)

    def matches(path: PurePosixPath) -> Iterator[list[str]]:
        yield by_path.get(path, [])
        for part in _last_parts(path):
            here = by_part.get(part, [])
            yield [name for name in here if len({path.parent, path_of[name].parent} - {_HERE}) < 2]
        if not path.suffix[1:].isdecimal():  # the last part of a number such as 1.2.840.7 is no suffix
            yield by_path.get(PurePosixPath(path.stem), [])

    def name_of(cell: str) -> str | None:
        if cell in path_of:
            return cell
        return next((names[0] for names in matches(place_of(cell)) if len(names) == 1), None)

    return name_of


_HERE = PurePosixPath(".")


def place_of(name: str) -> PurePosixPath:
    """The path that a cell or a file name stands for. ``./a``, ``a`` and both forms of Unicode are equal.

    The names of files are in decomposed Unicode on macOS, and those in tables are mostly in composed Unicode.
    """
    return PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _last_parts(path: PurePosixPath) -> tuple[str, ...]:
    """The last part of a path, and the same without the suffix of an image."""
    return tuple(dict.fromkeys((path.name, name_without_suffix(path))))


def read_labels(
    header: Sequence[str],
    records: Sequence[Record],
    others: Sequence[str] = (*NAMES, "patient", "split"),
    wanted: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the C classes, and the labels (rows, C) float32: 0, 1, or NaN = unknown.

    Args:
        others: columns that are not classes.
        wanted: the classes to read, in this order; None: all of them. Other columns are not read.

    Raises:
        ValueError: there is no class; a wanted class is missing; a cell has an invalid value; the column ``labels``
            contradicts the column of a class.
    """
    if "labels" in header:
        lists = [_listed(cells["labels"], at) for at, cells in records]
        known = tuple(sorted({name for names in lists for name in names or ()}))
        if not known:
            raise ValueError(f"{LABELS}: the column labels is empty in all rows")
        classes = _wanted(wanted, known, "names in the column labels")
        unknown = [math.nan] * len(classes)
        rows = [unknown if names is None else [name in names for name in classes] for names in lists]
        labels = np.array(rows, np.float32)
        for c, name in enumerate(classes):
            if name in header and name not in others:
                _refuse_contradiction(records, name, labels[:, c])
        return classes, labels
    known = tuple(name for name in header if name not in others)
    if not known:
        raise ValueError(f"{LABELS}: expected a column labels, or one column per class, got {', '.join(header)}")
    classes = _wanted(wanted, known, "columns of classes")
    return classes, np.array([[value_of(cells, name, at) for name in classes] for at, cells in records], np.float32)


def _listed(cell: str, at: str) -> list[str] | None:
    """The names of classes in a cell of the column ``labels``; None: unknown."""
    names = [name.strip() for name in cell.split("|") if name.strip()]
    words = [name.lower() for name in names]
    if len(words) == 1 and words[0] in ("nan", *NOTHING):
        return None if words == ["nan"] else []
    if {"nan", *NOTHING} & set(words) or any(NUMBER.fullmatch(word) for word in words):
        raise ValueError(
            f"{at}: labels: expected names of classes joined by |, or only none or No Finding (no class) or NaN "
            f"(unknown), got {cell!r}; a number is no name: for labels 1, 0 and -1, use one column per class"
        )
    return names


def value_of(cells: dict[str, str], name: str, at: str) -> float:
    """The label in the column ``name``: 0, 1, or NaN = unknown. Raises ValueError for another value."""
    text = cells[name].lower().removesuffix(".0")
    if text not in VALUES:
        words = "" if NUMBER.fullmatch(text) else "; a column with names of classes is called labels (none: no class)"
        raise ValueError(f"{at}: {name}: expected 1, 0, or nothing, NaN or -1 for unknown, got {cells[name]!r}{words}")
    return VALUES[text]


def _wanted(wanted: Sequence[str] | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    absent = [name for name in wanted or () if name not in known]
    if absent:
        raise ValueError(f"{LABELS}: expected {what} among {some(known, 20)}, got {some(absent)}")
    return known if wanted is None else tuple(wanted)


def _refuse_contradiction(records: Sequence[Record], name: str, listed: np.ndarray) -> None:
    """Raises ValueError if the column of a class differs from the column ``labels``."""
    for (at, cells), label in zip(records, listed.tolist(), strict=True):
        if not np.array_equal(value_of(cells, name, at), label, equal_nan=True):
            raise ValueError(
                f"{at}: the column labels is {cells['labels']!r}, but the column {name} is {cells[name]!r}; keep one "
                "of the two columns"
            )


def notes_of_classes(classes: Sequence[str], labels: np.ndarray) -> list[str]:
    """Lines on classes that are probably mistakes: equal but for capitals, and opposite ones such as ok and defect.

    Args:
        labels: (rows, C): 0, 1, or NaN = unknown.
    """
    notes = []
    for first, second in itertools.combinations(range(len(classes)), 2):
        pair = f"{classes[first]} and {classes[second]}"
        if classes[first].split() == classes[second].split() or classes[first].casefold() == classes[second].casefold():
            notes.append(f"{pair} are two classes, because their names differ in capitals or spaces")
        known = labels[:, [first, second]][~np.isnan(labels[:, [first, second]]).any(1)]
        if len(known) and (known.sum(1) == 1).all() and known.any(0).all():
            notes.append(
                f"every bag or image has exactly one of {pair}: if one of them means none of the classes, write none "
                "in its place, or leave out its column"
            )
    return notes


def groups_of(records: Sequence[Record], column: str, names: Sequence[str]) -> np.ndarray:
    """The patient (rows,) of each row, or another group. Its own name if the cell is empty or NaN, or the column is
    missing."""
    cells = [cells.get(column, "") for _, cells in records]
    return np.array([name if cell.lower() in ("", "nan") else cell for name, cell in zip(names, cells, strict=True)])


def refuse_twice(names: Sequence[str], records: Sequence[Record]) -> None:
    """Raises ValueError if a row has no name, or the name of an earlier row."""
    first: dict[str, str] = {}
    for name, (at, _) in zip(names, records, strict=True):
        if not name or name in first:
            raise ValueError(f"{at}: {name} is already in {first[name]}" if name else f"{at}: the name is empty")
        first[name] = at


def read_split(
    header: Sequence[str],
    records: Sequence[Record],
    names: Sequence[str],
    folder: Path,
    name_of: Callable[[str], str | None] = str,
) -> tuple[np.ndarray, str] | None:
    """The part (rows,) of each row, of PARTS, and its source: the column ``split``, or split.csv in ``folder``.

    Args:
        names: the names of the rows.
        name_of: the name that a cell of split.csv refers to; None: unknown.

    Returns:
        None if there is neither a column ``split`` nor a split.csv.

    Raises:
        ValueError: a cell is not in PARTS, or split.csv lacks a row or has it in two parts.
    """
    if "split" in header:
        for at, cells in records:
            if cells["split"] not in PARTS:
                raise ValueError(f"{at}: expected a split {', '.join(PARTS)}, got {cells['split']!r}")
        return np.array([cells["split"] for _, cells in records]), f"the column split of {LABELS}"
    path = folder / SPLIT
    if not path.is_file():
        return None
    _, rows = records_of(path, [NAMES, "split"])
    known: dict[str | None, str] = {None: ""}
    first: dict[str, str] = {}
    for at, cells in rows:
        name, part = same(cells, NAMES, at, name_of), cells["split"]
        if name is not None and known.setdefault(name, part) != part:
            raise ValueError(
                f"{at}: {name} is in the part {part}, but in the part {known[name]} in {first[name]}; keep one of the "
                "two rows"
            )
        first.setdefault(name or "", at)
    new = [name for name in names if known.get(name) not in PARTS]
    if new:
        raise ValueError(
            f"{path}: {len(new)} images of {LABELS} have no split there ({some(new)}); add them, or remove the file "
            "(train_cxr.py then draws a new split)"
        )
    return np.array([known[name] for name in names]), path.name


def read_boxes(
    path: Path, accept: Callable[[str, str, str], bool], name_of: Callable[[str], str | None] = str
) -> Iterator[tuple[str, str, tuple[float, float, float, float]]]:
    """The name of the image or bag, the class, and x, y, w, h of each box.

    Args:
        accept: called with the position for messages, the name and the class; False: the box is left out.
        name_of: the name that a cell refers to; None: boxes of this cell are left out.

    Raises:
        ValueError: a column is missing, two columns disagree, or a side is not a number in its range.
    """
    header, records = records_of(path, [NAMES, CLASSES])
    given = [sides for sides in (SIDES, CORNERS) if set(sides) <= set(header)]
    if len(given) != 1:
        raise ValueError(
            f"{path}, line 1: expected the columns {', '.join(SIDES)} or {', '.join(CORNERS)}, got "
            f"{'both' if given else ', '.join(header)}"
        )
    (sides,) = given
    for at, cells in records:
        name, label = same(cells, NAMES, at, name_of), same(cells, CLASSES, at)
        if name is None or not accept(at, name, label):
            continue
        try:
            x, y, w, h = (float(cells[side]) for side in sides)
        except ValueError:
            raise ValueError(f"{at}: expected numbers {', '.join(sides)}, got {list(cells.values())}") from None
        if sides == CORNERS:
            w, h = w - x, h - y
        if not (x >= 0 and y >= 0 and 0 < w < math.inf and 0 < h < math.inf):
            raise ValueError(f"{at}: expected x, y of at least 0 and w, h above 0, got {x:g}, {y:g}, {w:g}, {h:g}")
        yield name, label, (x, y, w, h)


def same(
    cells: dict[str, str], columns: Sequence[str], at: str, name_of: Callable[[str], str | None] = str
) -> str | None:
    """The content of the ``columns``, which have the same meaning. A table has one of them, or several that agree.

    Args:
        name_of: the name that a cell refers to; None: unknown.

    Raises:
        ValueError: two columns disagree.
    """
    found = {name: cells[name] for name in columns if name in cells}
    values = {name_of(text) for text in found.values()} - {None}
    if len(values) > 1:
        pairs = " and ".join(f"{name} {text!r}" for name, text in found.items())
        raise ValueError(
            f"{at}: expected equal values in the columns {' and '.join(found)}, got {pairs}; keep one of them"
        )
    return values.pop() if values else None
