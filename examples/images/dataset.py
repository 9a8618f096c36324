"""A data set of images: its description, and names, labels, patients, split and boxes of its images."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

#: A box: class number, then x, y, width, height.
Box = tuple[int, float, float, float, float]


class Description(NamedTuple):
    """Properties of a data set as a whole.

    ``kind``: the value of --dataset. ``title``: title of reports. ``classes``: names of the label columns, in order.
    ``negative``: name of an image without any class. ``test_name``: name of the test part. ``fit``: how an image
    becomes a square, a name of images.frames.FITS. ``channels``: 1 (grey) or 3. ``drawn``: whether the images are
    generated. ``units``: the units of splits and confidence intervals, ``"patients"``, or ``"images"`` without
    patients.
    """

    kind: str
    title: str
    classes: tuple[str, ...]
    negative: str
    test_name: str
    fit: str
    channels: int
    drawn: bool = False
    units: str = "patients"


class Index(NamedTuple):
    """A data set of n images.

    ``names``: as in the table. ``labels``: (n, C) float32 of 0, 1 and NaN (unknown). ``patients``: (n,). ``test``: (n,)
    bool. ``paths``: the files. ``boxes``: by name; x and y are the upper left corner, in pixels of an image with the
    width and height of ``sizes`` (n, 2). ``missing``: names in the table without a file. ``val``: (n,) bool, None if
    the data set does not define validation images. ``official``: whether tables and lists are those of the paper.
    ``notes``: lines that check_cxr.py prints.
    """

    about: Description
    names: list[str]
    labels: np.ndarray
    patients: np.ndarray
    test: np.ndarray
    paths: list[Path]
    boxes: dict[str, list[Box]]
    sizes: np.ndarray
    missing: list[str]
    val: np.ndarray | None = None
    official: bool = False
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.about.classes


def with_classes(index: Index, classes: Sequence[str], source: str) -> Index:
    """The same images with the labels of the ``classes`` of a network, in their order. Other classes are left out.

    Raises:
        ValueError: the data set lacks one of the classes. The message names the network, ``source``.
    """
    lacking = [name for name in classes if name not in index.classes]
    if lacking:
        raise ValueError(
            f"{source}: its classes {some(lacking)} are not in the data set, which has {some(index.classes, 20)}"
        )
    if tuple(classes) == index.classes:
        return index
    number = {index.classes.index(name): k for k, name in enumerate(classes)}
    boxes = {
        name: kept
        for name, found in index.boxes.items()
        if (kept := [(number[c], *place) for c, *place in found if c in number])
    }
    return index._replace(
        about=index.about._replace(classes=tuple(classes)), labels=index.labels[:, list(number)], boxes=boxes
    )


def take(index: Index, rows: np.ndarray) -> Index:
    """The images ``rows`` (indices, or (n,) bool). Boxes and missing names are unchanged."""
    numbers = np.arange(len(index.names))[rows]
    return index._replace(
        names=[index.names[n] for n in numbers],
        labels=index.labels[numbers],
        patients=index.patients[numbers],
        test=index.test[numbers],
        paths=[index.paths[n] for n in numbers],
        sizes=index.sizes[numbers],
        val=None if index.val is None else index.val[numbers],
    )


def refuse_missing(data_dir: Path, missing: list[str], count: int) -> None:
    """Raises ValueError if some of ``count`` images are missing."""
    if missing:
        raise ValueError(
            f"{data_dir}: {len(missing)} of {count} images of the tables are missing ({some(missing)}); "
            "--allow-missing leaves them out"
        )


def refuse_shared_patients(patients: np.ndarray, parts: np.ndarray, where: object, advice: str = "") -> None:
    """Raises ValueError if a patient of ``patients`` (n,) is in two of the ``parts`` (n,). ``advice``: what to do."""
    pairs = np.unique(np.stack([patients.astype(str), parts.astype(str)]), axis=1)
    both, counts = np.unique(pairs[0], return_counts=True)
    if (counts > 1).any():
        shared = both[counts > 1]
        raise ValueError(
            f"{where}: {len(shared)} patients are in more than one part of the split ({some(shared)}){advice}"
        )


# tables


def text_of(path: Path) -> str:
    """The content of a text file. Raises ValueError if it does not exist or is not text."""
    if not path.is_file():
        raise ValueError(f"{path}: {'expected a file, got a folder' if path.is_dir() else 'there is no such file'}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file in UTF-8 ({error}); save it as UTF-8") from None


def rows_of(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the rows of a table, without blank lines."""
    reader = csv.reader(text_of(path).splitlines(), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def records_of(
    path: Path, needed: Sequence[str | tuple[str, ...]]
) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The header of a table, and (position for messages, cells by column) of every row.

    Args:
        needed: the columns that the table needs. A tuple holds alternatives, of which one is enough.

    Raises:
        ValueError: a needed column is missing, a column name occurs twice, or a row has a wrong length.
    """
    rows = rows_of(path)
    line, header = next(rows, (1, []))
    either = [(names,) if isinstance(names, str) else names for names in needed]
    lacking = [" or ".join(names) for names in either if not set(names) & set(header)]
    if lacking:
        separators = "; cells are separated by commas" if len(header) == 1 else ""
        raise ValueError(
            f"{path}, line {line}: expected a column {', and a column '.join(lacking)}, found the columns "
            f"{header}{separators}"
        )
    if len(set(header)) != len(header) or "" in header:
        raise ValueError(f"{path}, line {line}: expected one name per column, each once, found the columns {header}")
    records = []
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {line}: expected {len(header)} cells, got {len(cells)}: {cells}")
        records.append((f"{path}, line {line}", dict(zip(header, cells, strict=True))))
    if not records:
        raise ValueError(f"{path}: there are no rows below the header")
    return header, records


def some(names: Iterable[object], count: int = 3) -> str:
    """The first ``count`` names as text, and " ..." if there are more."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:count]) + (" ..." if len(listed) > count else "")
