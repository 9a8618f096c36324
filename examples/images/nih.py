"""Reads NIH ChestX-ray14: the tables, the splits and the images.

Any inconsistency is a ValueError that names the file and the line. Labels are never guessed. Images are found by name,
in the twelve folders ``images_001/images`` to ``images_012/images``, in one folder ``images``, or in the folder of the
tables. Resized copies and JPEG files also work. Boxes are always in pixels of the 1024x1024 image, as in the table.
"""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images.dataset import Box, Description, Index, refuse_missing, rows_of, some, text_of

#: The classes in the order of the paper, which is that of the label columns.
CLASSES = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
#: The classes that have boxes.
BOXED = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")
NO_FINDING = "No Finding"
DESCRIPTION = Description("nih", "ChestX-ray14", CLASSES, NO_FINDING, "official test list", "square", 1)
#: A file that make_synthetic_cxr.py writes into the folder of the tables. Reports then say that images are generated.
DRAWN = "drawn_images.txt"
VIEWS = ("PA", "AP")
#: Boxes are in pixels of an image of this width and height, for images of any size.
BOX_SIDE = 1024
#: The numbers of rows of the official tables.
OFFICIAL_IMAGES, OFFICIAL_TEST_IMAGES, OFFICIAL_BOXES = 112_120, 25_596, 984

ENTRIES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
BOXES = "BBox_List_2017.csv"
TRAIN_VAL_LIST, TEST_LIST = "train_val_list.txt", "test_list.txt"

# column names such as "OriginalImage[Width,Height]" are split at their commas
ENTRY_HEADER = [
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
    "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
]  # fmt: skip
#: Column 6 of the current version of the table.
NEW_HEADER = ["Patient Sex" if name == "Patient Gender" else name for name in ENTRY_HEADER]
BOX_HEADER = ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", ""]
BOX_CLASSES = {name: number for number, name in enumerate(CLASSES)} | {"Infiltrate": CLASSES.index("Infiltration")}
NAME = re.compile(r"(\d{8})_\d{3}\.png")
AGE = re.compile(r"\d+[YMD]?")
SUFFIXES = (".png", ".jpg", ".jpeg")


class Entries(NamedTuple):
    """The entry table: like Index, but with every row.

    ``sizes`` (n, 2): width and height of the radiograph before it was resized to 1024x1024; boxes are not in these
    pixels. ``views`` (n,): PA or AP.
    """

    names: list[str]
    labels: np.ndarray
    patients: np.ndarray
    sizes: np.ndarray
    views: np.ndarray


def load_index(
    data_dir: Path, allow_missing: bool = False, tables: Path | None = None, view: str | None = None
) -> Index:
    """The images of ``data_dir`` with their data from the tables (in ``tables``, by default in ``data_dir``).

    Args:
        view: only images of this View Position, one of VIEWS; None: all.

    Raises:
        ValueError: a table is missing, broken, or contradicts another one; an image exists twice; there are no images;
            or some are missing without ``allow_missing``.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder")
    entries, test, boxes = read_tables(Path(tables or data_dir))
    rows, listed = len(entries.names), set(entries.names)
    in_test = dict(zip(entries.names, test.tolist(), strict=True))
    official = rows == OFFICIAL_IMAGES and all(in_test[name] for name in boxes)
    if view is not None:
        kept = entries.views == view
        if not kept.any():
            raise ValueError(f"view: no image of the tables is {view}")
        names = [name for name, keep in zip(entries.names, kept, strict=True) if keep]
        entries = Entries(names, *(column[kept] for column in entries[1:]))
        test = test[kept]
    found = find_images(data_dir)
    present = np.array([Path(name).stem in found for name in entries.names])
    missing = [name for name, is_present in zip(entries.names, present, strict=True) if not is_present]
    if not present.any():
        raise ValueError(
            f"{data_dir}: none of the {len(present)} images of the tables was found in images_001/images to "
            "images_012/images, in images, or in the folder itself"
        )
    if not allow_missing:
        refuse_missing(data_dir, missing, len(present))
    names = [name for name, is_present in zip(entries.names, present, strict=True) if is_present]
    drawn = (Path(tables or data_dir) / DRAWN).is_file()
    title = "generated images in the layout of ChestX-ray14" if drawn else DESCRIPTION.title
    return Index(
        about=DESCRIPTION._replace(title=title, drawn=drawn),
        names=names,
        labels=entries.labels[present],
        patients=entries.patients[present],
        test=test[present],
        paths=[found[Path(name).stem] for name in names],
        boxes=boxes,
        sizes=np.full((len(names), 2), BOX_SIDE),
        missing=missing,
        official=official,
        notes=notes_of(data_dir, Path(tables or data_dir), listed, rows, found),
    )


def notes_of(data_dir: Path, tables: Path, listed: set[str], rows: int, found: dict[str, Path]) -> tuple[str, ...]:
    """Lines for check_cxr.py: the layout of the images, the version of the table, and images that are not in it."""
    layouts = [
        name
        for name, folders in image_folders(data_dir).items()
        if any(entry.suffix.lower() in SUFFIXES for folder in folders for entry in folder.iterdir())
    ]
    table = next(name for name in ENTRIES if (tables / name).is_file())
    official = "the official number" if rows == OFFICIAL_IMAGES else f"the official table has {OFFICIAL_IMAGES}"
    lines = [f"layout    {', '.join(layouts)}", f"table     {table}, {rows} rows ({official})"]
    others = sorted(set(found) - {Path(name).stem for name in listed})
    if others:
        lines.append(f"unlisted  {len(others)} images that are not in the table: {some(others, 5)}")
    return tuple(lines)


# the tables


def read_tables(folder: Path) -> tuple[Entries, np.ndarray, dict[str, list[Box]]]:
    """Reads the four tables of ``folder`` and checks them: entries, (rows,) bool of the test list, boxes by name."""
    path = next((folder / name for name in ENTRIES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: expected {' or '.join(ENTRIES)}, found neither")
    entries = read_entries(path)
    rows = {name: row for row, name in enumerate(entries.names)}
    test = np.zeros(len(rows), dtype=bool)
    listed: dict[str, Path] = {}
    for file in (folder / TRAIN_VAL_LIST, folder / TEST_LIST):
        for line, name in read_list(file):
            if name not in rows:
                raise ValueError(f"{file}, line {line}: {name} is not in {path.name}, which may be truncated")
            if name in listed:
                raise ValueError(f"{file}, line {line}: {name} is already listed in {listed[name].name}")
            listed[name] = file
            test[rows[name]] = file.name == TEST_LIST
    unlisted = [name for name in rows if name not in listed]
    if unlisted:
        raise ValueError(
            f"{folder}: {len(unlisted)} images of {path.name} ({some(unlisted)}) are neither in {TRAIN_VAL_LIST} nor "
            f"in {TEST_LIST}, which may be truncated"
        )
    both = np.intersect1d(entries.patients[test], entries.patients[~test])
    if len(both):
        raise ValueError(f"{folder}: {len(both)} patients are in {TRAIN_VAL_LIST} and in {TEST_LIST} ({some(both)})")
    if len(rows) == OFFICIAL_IMAGES and test.sum() != OFFICIAL_TEST_IMAGES:
        raise ValueError(
            f"{folder / TEST_LIST}: expected the official {OFFICIAL_TEST_IMAGES} images, got {test.sum()}; another "
            "split may use images with boxes for training"
        )
    boxes = read_boxes(folder / BOXES)
    unknown = [name for name in boxes if name not in rows]
    if unknown:
        raise ValueError(f"{folder / BOXES}: {len(unknown)} images are not in {path.name} ({some(unknown)})")
    count = sum(map(len, boxes.values()))
    if len(rows) == OFFICIAL_IMAGES and count != OFFICIAL_BOXES:
        raise ValueError(f"{folder / BOXES}: expected {OFFICIAL_BOXES} boxes, got {count}; it may be truncated")
    return entries, test, boxes


def read_entries(path: Path) -> Entries:
    """The entry table of 2020, or the older one, in which rows end with a comma and ages may be ``058Y``."""
    rows = rows_of(path)
    line, header = next(rows, (1, []))
    width = len(ENTRY_HEADER)
    old = header in ([*ENTRY_HEADER, ""], [*NEW_HEADER, ""])
    if not old and header not in (ENTRY_HEADER, NEW_HEADER):
        raise ValueError(f"{path}, line {line}: expected the columns {ENTRY_HEADER}, got {header}")
    first: dict[str, int] = {}
    labels, patients, sizes, views = [], [], [], []
    for line, cells in rows:
        at = f"{path}, line {line}"
        if len(cells) != width + old or (old and cells[-1]):
            raise ValueError(f"{at}: expected {width} cells{' and a comma' if old else ''}, got {len(cells)}: {cells}")
        name = cells[0]
        if name in first:
            raise ValueError(f"{at}: {name} is already in line {first[name]}")
        first[name] = line
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{at}: expected a name like 00000001_000.png, got {name!r}")
        if not cells[3].isdecimal() or int(cells[3]) != int(match[1]):
            raise ValueError(f"{at}: expected patient {int(match[1])} for image {name}, got {cells[3]!r}")
        if not AGE.fullmatch(cells[4]):
            raise ValueError(f"{at}: expected an age such as 58 or 058Y, got {cells[4]!r}")
        labels.append(_findings(cells[1], at))
        if cells[6] not in VIEWS:
            raise ValueError(f"{at}: expected a view position {' or '.join(VIEWS)}, got {cells[6]!r}")
        views.append(cells[6])
        patients.append(int(cells[3]))
        sizes.append([int(_positive(cell, "width and height", at)) for cell in cells[7:9]])
        for cell in cells[9:width]:
            _positive(cell, "pixel spacing", at)
    if not labels:
        raise ValueError(f"{path}: there are no rows below the header")
    table = np.zeros((len(labels), len(CLASSES)), dtype=np.float32)
    for row, columns in enumerate(labels):
        table[row, columns] = 1
    return Entries(list(first), table, np.array(patients), np.array(sizes), np.array(views))


def read_boxes(path: Path) -> dict[str, list[Box]]:
    """The boxes by name of the image, as in Index. The header has more cells than the rows."""
    rows = rows_of(path)
    line, header = next(rows, (1, []))
    if header != BOX_HEADER:
        raise ValueError(f"{path}, line {line}: expected the columns {BOX_HEADER}, got {header}")
    boxes: dict[str, list[Box]] = {}
    for line, cells in rows:
        at = f"{path}, line {line}"
        while len(cells) > 6 and not cells[-1]:
            cells = cells[:-1]
        if len(cells) != 6 or not NAME.fullmatch(cells[0]):
            raise ValueError(f"{at}: expected an image, a class and four numbers, got {cells}")
        if cells[1] not in BOX_CLASSES:
            raise ValueError(f"{at}: expected one of {', '.join(BOX_CLASSES)}, got {cells[1]!r}")
        x, y = (_positive(cell, "x and y", at, zero=True) for cell in cells[2:4])
        w, h = (_positive(cell, "w and h", at) for cell in cells[4:])
        if max(x + w, y + h) > BOX_SIDE:
            raise ValueError(f"{at}: the box {x, y, w, h} exceeds the image of {BOX_SIDE}x{BOX_SIDE}")
        if any(box[0] == BOX_CLASSES[cells[1]] for box in boxes.get(cells[0], ())):
            raise ValueError(f"{at}: {cells[0]} already has a box of {cells[1]}")
        boxes.setdefault(cells[0], []).append((BOX_CLASSES[cells[1]], x, y, w, h))
    if path.read_bytes()[-1:] not in (b"\n", b"\r"):
        raise ValueError(f"{path}, line {line}: the last line has no newline; its last number may be truncated")
    return boxes


def read_list(path: Path) -> list[tuple[int, str]]:
    """(line number, name of an image) of one of the two lists. The last line may lack its newline."""
    names = []
    for line, text in enumerate(text_of(path).splitlines(), 1):
        name = text.strip()
        if not name:
            continue
        if not NAME.fullmatch(name):
            raise ValueError(f"{path}, line {line}: expected a name like 00000001_000.png, got {name!r}")
        names.append((line, name))
    return names


def _findings(text: str, at: str) -> list[int]:
    """The numbers of the classes in a text such as ``Mass|Nodule``. ``No Finding`` must stand alone, and gives none."""
    if text == NO_FINDING:
        return []
    names = text.split("|")
    wrong = [name for name in names if name not in CLASSES]
    if wrong or len(set(names)) != len(names):
        raise ValueError(
            f"{at}: expected {NO_FINDING!r} alone, or some of {', '.join(CLASSES)} joined by |, got {text!r}"
        )
    return [CLASSES.index(name) for name in names]


@functools.lru_cache(10_000)  # few texts, many rows
def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str, what: str, at: str, zero: bool = False) -> float:
    value = _number(text)
    if not (value > 0 or (zero and value == 0)) or value == math.inf:
        raise ValueError(f"{at}: {what}: expected numbers > 0{' or 0' if zero else ''}, got {text!r}")
    return value


# the images


def image_folders(data_dir: Path) -> dict[str, list[Path]]:
    """The existing folders that may contain images, by layout."""
    twelve = [data_dir / f"images_{k:03}" for k in range(1, 13)]
    layouts = {
        "twelve folders": [inner for outer in twelve for inner in (outer / "images", outer)],
        "one folder": [data_dir / "images"],
        "flat": [data_dir],
    }
    return {layout: [f for f in folders if f.is_dir()] for layout, folders in layouts.items()}


def find_images(data_dir: Path) -> dict[str, Path]:
    """The files that look like images, by name without suffix.

    Raises:
        ValueError: there is no such folder, or an image exists twice.
    """
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder")
    found: dict[str, Path] = {}
    for folder in (folder for folders in image_folders(data_dir).values() for folder in folders):
        for entry in os.scandir(folder):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in SUFFIXES and entry.is_file():
                if stem in found:
                    raise ValueError(f"{stem} exists twice: {found[stem]} and {entry.path}")
                found[stem] = Path(entry.path)
    return found
