"""Reads CheXpert in its published layout: train.csv, valid.csv, and the images at the ``Path`` of each row.

The official validation list is the test part. A part of the training patients is used for validation. A label is 1, 0,
-1 (uncertain) or blank. Blank means not mentioned in the report and counts as 0, as in the publication. There are
frontal and lateral views.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from images.dataset import Description, Index, records_of, refuse_missing, refuse_shared_patients, some
from images.folder import read_sizes

TABLES = ("train.csv", "valid.csv")
KNOWN = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
NO_FINDING = "No Finding"
UNCERTAIN = {"unknown": math.nan, "0": 0.0, "1": 1.0}
VIEWS = ("PA", "AP", "frontal", "lateral")
PATIENT = re.compile(r"(?:^|/)(patient\d+)/")


def load_chexpert(
    data_dir: Path,
    allow_missing: bool = False,
    tables: Path | None = None,
    view: str | None = None,
    uncertain: str = "unknown",
    fit: str = "pad",
) -> Index:
    """The images of both tables.

    Args:
        view: only images of this view, one of VIEWS; None: all.
        uncertain: the value of a label of -1, one of UNCERTAIN.

    Raises:
        ValueError: a table is missing or broken, a patient is in both tables, or images are missing without
            ``allow_missing``.
    """
    data_dir, tables = Path(data_dir), Path(tables or data_dir)
    rows, classes = [], None
    for path in (tables / name for name in TABLES):
        header, records = records_of(path, KNOWN)
        columns = tuple(name for name in header if name not in (*KNOWN, NO_FINDING))
        if classes not in (None, columns) or not columns:
            raise ValueError(f"{path}: expected the classes of {TABLES[0]}, {some(classes or (), 20)}, got {columns}")
        classes = columns
        rows += [(at, cells, path.name == TABLES[1]) for at, cells in records if of_view(cells, view)]
    if not rows:
        raise ValueError(f"view: no image of the tables is {view}")
    names, patients, labels = [], [], np.zeros((len(rows), len(classes)), np.float32)
    for row, (at, cells, _) in enumerate(rows):
        patient = PATIENT.search(cells["Path"])
        if patient is None:
            raise ValueError(f"{at}: expected a path with a folder like patient00001, got {cells['Path']!r}")
        names.append(cells["Path"])
        patients.append(patient[1])
        labels[row] = [value_of(cells[name], name, at, uncertain) for name in classes]
    if len(set(names)) < len(names):
        raise ValueError(f"{tables}: {len(names) - len(set(names))} images are in the tables twice")
    test = np.array([in_test for *_, in_test in rows])
    refuse_shared_patients(np.array(patients), test, tables)
    paths = [file_of(data_dir, name) for name in names]
    present = np.array([path is not None for path in paths])
    missing = [name for name, is_present in zip(names, present, strict=True) if not is_present]
    if not present.any():
        raise ValueError(f"{data_dir}: none of the {len(names)} images of the tables was found ({some(missing)})")
    if not allow_missing:
        refuse_missing(data_dir, missing, len(names))
    files = [path for path in paths if path is not None]
    return Index(
        about=Description("chexpert", "CheXpert", classes, NO_FINDING, "official validation list", fit, 1),
        names=[name for name, is_present in zip(names, present, strict=True) if is_present],
        labels=labels[present],
        patients=np.array(patients)[present],
        test=test[present],
        paths=files,
        boxes={},
        sizes=np.maximum(read_sizes(files)[0], 1),
        missing=missing,
        notes=(f"tables    {' and '.join(TABLES)}, {len(names)} rows, uncertain labels count as {uncertain}",),
    )


def of_view(cells: dict[str, str], view: str | None) -> bool:
    """Whether the row has the ``view``, one of VIEWS; None: any."""
    return view is None or view.lower() in (cells["AP/PA"].lower(), cells["Frontal/Lateral"].lower())


def value_of(text: str, name: str, at: str, uncertain: str) -> float:
    """The label in a cell of column ``name``: 0, 1, or for -1 the value of ``uncertain``. An empty cell is 0."""
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if value not in (-1, 0, 1):
        raise ValueError(f"{at}: {name}: expected 1, 0, -1 or nothing, got {text!r}")
    return UNCERTAIN[uncertain] if value == -1 else value


def file_of(data_dir: Path, name: str) -> Path | None:
    """The file of a ``Path`` of the tables, whose first folder may be ``data_dir`` itself. None: it is missing."""
    for place in (name, name.partition("/")[2]):
        if place and (data_dir / place).is_file():
            return data_dir / place
    return None
