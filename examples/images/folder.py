"""A folder of images with labels.csv: any classes, any depth, any format that can be read.

labels.csv has the column ``image`` (a path below the folder, or a file name that is there once), optionally ``patient``
and ``split`` (train, val, test), and then either ``labels`` (class names joined by ``|``, empty for none) or one column
a class with 1, 0, or, for unknown, nothing, NaN or -1. Optional boxes.csv: ``image,label,x,y,w,h`` in pixels of that
file, x and y of the upper left corner. Without ``split`` the patients (or images) are split by chance into 70, 10 and
20 percent, and split.csv keeps who is where.
"""

from __future__ import annotations

import csv
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common.files import naming

from images.dataset import (
    Box,
    Description,
    Index,
    records_of,
    refuse_missing,
    refuse_shared_patients,
    some,
    take,
)
from images.pixels import image_suffixes, read_header

LABELS, BOXES, SPLIT = "labels.csv", "boxes.csv", "split.csv"
PARTS = ("train", "val", "test")
#: Shares of PARTS where the table has no split.
SHARES = (0.7, 0.1, 0.2)
VALUES = {"1": 1.0, "0": 0.0, "-1": math.nan, "": math.nan, "nan": math.nan}


def load_folder(
    data_dir: Path, allow_missing: bool = False, tables: Path | None = None, fit: str = "pad", seed: int = 0
) -> Index:
    """The images of ``data_dir`` that labels.csv (of ``tables``, else of ``data_dir``) names.

    Args:
        fit: how an image becomes a square, "pad" or "squeeze".
        seed: of the split, where the table has none and there is no split.csv yet.

    Raises:
        ValueError: a table is absent or broken, an image is there twice, there is none, or some are missing and that is
            not allowed; a patient is in two parts; split.csv cannot be written, or lacks an image.
    """
    tables = Path(tables or data_dir)
    path = tables / LABELS
    if not path.is_file():
        raise ValueError(f"{tables}: no {LABELS}")
    header, records = records_of(path, ["image"])
    classes, labels = read_labels(header, records)
    names = [cells["image"] for _, cells in records]
    refuse_twice(names, records)
    patients = np.array([cells.get("patient") or cells["image"] for _, cells in records])
    parts, split_note = parts_of(header, records, names, patients, tables, seed)
    refuse_shared_patients(patients, parts, tables)
    boxes = read_boxes(tables / BOXES, classes, set(names)) if (tables / BOXES).is_file() else {}
    found, besides = find_files(Path(data_dir), names)
    missing = [name for name in names if name not in found]
    if len(missing) == len(names):
        stems = {Path(place).stem: Path(place).name for place in besides}
        hint = f"; names need their suffix, as {stems[names[0]]}" if names[0] in stems else ""
        raise ValueError(f"{data_dir}: none of the {len(names)} images of {LABELS} is there ({some(missing)}){hint}")
    if not allow_missing:
        refuse_missing(Path(data_dir), missing, len(names))
    rows = np.array([name in found for name in names])
    paths = [found[name] for name in names if name in found]
    sizes, colour = read_sizes(paths)
    here = dict(zip([name for name in names if name in found], sizes, strict=True))
    for name, placed in boxes.items():
        refuse_outside(tables / BOXES, name, placed, here.get(name))
    about = Description(
        "folder", Path(data_dir).resolve().name, classes, "none of them", "test part", fit, 3 if colour else 1,
        units="patients" if "patient" in header else "images",
    )  # fmt: skip
    notes = [f"table     {path.name}, {len(names)} rows, {len(classes)} classes", split_note]
    if besides:
        notes.append(f"besides   {len(besides)} images that the table does not name: {some(besides, 5)}")
    everything = Index(
        about,
        names,
        labels,
        patients,
        parts == "test",
        [Path()] * len(names),
        boxes,
        np.zeros((len(names), 2)),
        missing,
    )
    val = (parts == "val") if (parts == "val").any() else None
    index = take(everything._replace(val=val), rows)
    return index._replace(paths=paths, sizes=sizes, notes=tuple(notes))


def read_labels(header: list[str], records: list[tuple[str, dict[str, str]]]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and the labels (rows, classes) float32.

    Raises:
        ValueError: there is no class, or a cell is not as it should be.
    """
    if "labels" in header:
        lists = [[name.strip() for name in cells["labels"].split("|") if name.strip()] for _, cells in records]
        classes = tuple(sorted({name for names in lists for name in names}))
        if not classes:
            raise ValueError(f"{LABELS}: the column labels is empty in all rows")
        return classes, np.array([[name in names for name in classes] for names in lists], np.float32)
    classes = tuple(name for name in header if name not in ("image", "patient", "split"))
    if not classes:
        raise ValueError(f"{LABELS}: expected a column labels, or one column a class, got {', '.join(header)}")
    labels = np.empty((len(records), len(classes)), np.float32)
    for row, (at, cells) in enumerate(records):
        for c, name in enumerate(classes):
            text = cells[name].lower().removesuffix(".0")
            if text not in VALUES:
                raise ValueError(f"{at}: {name}: expected 1, 0, or nothing, NaN or -1 for unknown, got {cells[name]!r}")
            labels[row, c] = VALUES[text]
    return classes, labels


def refuse_twice(names: list[str], records: list[tuple[str, dict[str, str]]]) -> None:
    """Raises ValueError where a row names no image, or one that another row names."""
    first: dict[str, str] = {}
    for name, (at, _) in zip(names, records, strict=True):
        if not name or name in first:
            raise ValueError(f"{at}: {name} is already in {first[name]}" if name else f"{at}: no image is named")
        first[name] = at


# the split


def parts_of(
    header: list[str],
    records: list[tuple[str, dict[str, str]]],
    names: list[str],
    patients: np.ndarray,
    tables: Path,
    seed: int,
) -> tuple[np.ndarray, str]:
    """The part (rows,) of every image, of PARTS, and a line of where it is from."""
    if "split" in header:
        for at, cells in records:
            if cells["split"] not in PARTS:
                raise ValueError(f"{at}: expected a split {', '.join(PARTS)}, got {cells['split']!r}")
        return np.array([cells["split"] for _, cells in records]), f"split     the column split of {LABELS}"
    path = tables / SPLIT
    if path.is_file():
        _, rows = records_of(path, ["image", "split"])
        known = {cells["image"]: cells["split"] for _, cells in rows}
        new = [name for name in names if known.get(name) not in PARTS]
        if new:
            raise ValueError(
                f"{path}: {len(new)} images of {LABELS} have no split there ({some(new)}); add them, or remove the "
                "file, and all images are split anew"
            )
        return np.array([known[name] for name in names]), f"split     {path.name}"
    parts = draw_split(patients, seed)
    try:
        with naming(path), path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "split"])
            writer.writerows(zip(names, parts, strict=True))
    except OSError as error:
        raise ValueError(
            f"{path}: the split cannot be written ({error.strerror}); copy {LABELS} into a folder that can be written, "
            "and name it by --tables"
        ) from None
    who = "patient" if "patient" in header else "image"
    return parts, f"split     by {who}, drawn with seed {seed}, now in {path}"


def draw_split(patients: np.ndarray, seed: int) -> np.ndarray:
    """The part (n,) of each image: SHARES of the patients, each part at least one where there are three."""
    unique = np.unique(patients)
    order = np.random.default_rng(seed).permutation(unique)
    few = len(unique) >= len(PARTS)
    val, test = (max(round(share * len(unique)), int(few)) for share in SHARES[1:])
    part = dict.fromkeys(order[:test].tolist(), "test") | dict.fromkeys(order[test : test + val].tolist(), "val")
    return np.array([part.get(patient, "train") for patient in patients.tolist()])


# boxes and files


def read_boxes(path: Path, classes: tuple[str, ...], names: set[str]) -> dict[str, list[Box]]:
    """The boxes by name of the image; several of one class in an image are kept."""
    _, records = records_of(path, ["image", "label", "x", "y", "w", "h"])
    boxes: dict[str, list[Box]] = {}
    for at, cells in records:
        if cells["image"] not in names:
            raise ValueError(f"{at}: {cells['image']!r} is not in {LABELS}")
        if cells["label"] not in classes:
            raise ValueError(f"{at}: expected one of the classes {some(classes, 20)}, got {cells['label']!r}")
        try:
            x, y, w, h = (float(cells[side]) for side in ("x", "y", "w", "h"))
        except ValueError:
            raise ValueError(f"{at}: expected numbers x, y, w, h, got {list(cells.values())}") from None
        if not (x >= 0 and y >= 0 and 0 < w < math.inf and 0 < h < math.inf):
            raise ValueError(f"{at}: expected x, y of at least 0 and w, h above 0, got {x:g}, {y:g}, {w:g}, {h:g}")
        boxes.setdefault(cells["image"], []).append((classes.index(cells["label"]), x, y, w, h))
    return boxes


def refuse_outside(path: Path, name: str, boxes: list[Box], size: np.ndarray | None) -> None:
    """Raises ValueError where a box leaves the image of ``size`` (width, height); None: it is missing."""
    for _, x, y, w, h in boxes:
        if size is not None and size[0] and (x + w > size[0] or y + h > size[1]):
            raise ValueError(
                f"{path}: the box {x:g}, {y:g}, {w:g}, {h:g} leaves {name}, which is {size[0]:g}x{size[1]:g} as it is "
                "shown"
            )


def find_files(data_dir: Path, names: list[str]) -> tuple[dict[str, Path], list[str]]:
    """The files of the ``names``, and the images that none of them is.

    Raises:
        ValueError: there is no such folder, or a name without a folder is there several times.
    """
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder")
    suffixes = image_suffixes()
    files = {
        path.relative_to(data_dir).as_posix(): path
        for path in sorted(data_dir.rglob("*"))
        if path.suffix.lower() in suffixes and path.is_file()
    }
    by_name: dict[str, list[str]] = {}
    for place in files:
        by_name.setdefault(place.rsplit("/", 1)[-1], []).append(place)
    found, used = {}, set()
    for name in names:
        places = [name] if name in files else by_name.get(name, [])
        if len(places) > 1:
            raise ValueError(f"{data_dir}: {name} is there several times ({some(places)}); name it with its folder")
        if places:
            found[name] = files[places[0]]
            used.add(places[0])
    return found, [place for place in files if place not in used]


def read_sizes(paths: list[Path]) -> tuple[np.ndarray, bool]:
    """Width and height (n, 2) of the files, 1x1 where one cannot be read, and whether any has colours."""

    def header(path: Path) -> tuple[int, int, bool]:
        try:
            return read_header(path)
        except ValueError:
            return 0, 0, False  # check_cxr.py names it

    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(header, paths))
    return np.maximum([known[:2] for known in headers], 1), any(known[2] for known in headers)
