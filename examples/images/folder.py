"""A folder of images with labels.csv: any classes, any depth, any format that can be read.

See images.label_tables for the tables. The column ``image`` is a path below the folder, or a file name that occurs once
in it. The suffix is optional. Without a split, the patients (or images) are split at random into 70, 10 and 20 percent,
and split.csv stores the result.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from common.choices import Config
from common.csv_table import write_csv

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
from images.label_tables import (
    BOXES,
    LABELS,
    NAMES,
    PARTS,
    SPLIT,
    SPLIT_ADVICE,
    groups_of,
    name_among,
    notes_of_classes,
    place_of,
    read_boxes,
    read_labels,
    read_split,
    refuse_twice,
    same,
)
from images.pixels import is_image, name_without_suffix, read_header

#: Shares of PARTS if the table has no split.
SHARES = (0.7, 0.1, 0.2)


def load_folder(
    data_dir: Path, allow_missing: bool = False, tables: Path | None = None, fit: str = "pad", seed: int = 0
) -> Index:
    """The images of ``data_dir`` that labels.csv (of ``tables``, else of ``data_dir``) names.

    Args:
        fit: how an image becomes a square, "pad" or "squeeze".
        seed: the seed of the split, if the table has no split and there is no split.csv yet.

    Raises:
        ValueError: a table is missing or broken; an image is listed twice, or matches several files; there is no image,
            or some are missing without ``allow_missing``; a box exceeds its image; a patient is in two parts; split.csv
            cannot be written, or lacks an image.
    """
    tables = Path(tables or data_dir)
    path = tables / LABELS
    if not path.is_file():
        raise ValueError(f"{tables}: no {LABELS}")
    header, records = records_of(path, [NAMES])
    classes, labels = read_labels(header, records)
    names = [same(cells, NAMES, at) or "" for at, cells in records]
    refuse_twice(names, records)
    patients = groups_of(records, "patient", names)
    parts, split_note = parts_of(header, records, names, patients, tables, seed)
    refuse_shared_patients(patients, parts, tables, SPLIT_ADVICE)
    boxes = boxes_of(tables / BOXES, classes, names) if (tables / BOXES).is_file() else {}
    found, unlisted = find_files(Path(data_dir), names)
    missing = [name for name in names if name not in found]
    if len(missing) == len(names):
        raise ValueError(f"{data_dir}: none of the {len(names)} images of {LABELS} was found ({some(missing)})")
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
    notes += [f"note      {line}" for line in notes_of_classes(classes, labels)]
    if unlisted:
        notes.append(f"unlisted  {len(unlisted)} images that are not in the table: {some(unlisted, 5)}")
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
    return index._replace(paths=paths, sizes=np.maximum(sizes, 1), notes=tuple(notes))


def without_labels(folder: Path, config: Config) -> Index:
    """All images of ``folder`` and its subfolders, for the network of ``config``. Their labels are unknown.

    The name of an image is its path below the folder. Only the headers of the files are read.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    files = image_files(folder)
    if not files:
        raise ValueError(
            f"images: expected images in {folder}, found no file with the suffix of an image or DICOM file"
        )
    names, paths = list(files), list(files.values())
    about = Description(
        "folder", folder.resolve().name, tuple(config["classes"]), "none of them", "new images", config["fit"],
        config["channels"], units="images",
    )  # fmt: skip
    labels = np.full((len(names), len(about.classes)), np.nan, np.float32)
    sizes, _ = read_sizes(paths)
    return Index(about, names, labels, np.array(names), np.ones(len(names), bool), paths, {}, np.maximum(sizes, 1), [])


# the split


def parts_of(
    header: list[str],
    records: list[tuple[str, dict[str, str]]],
    names: list[str],
    patients: np.ndarray,
    tables: Path,
    seed: int,
) -> tuple[np.ndarray, str]:
    """The part (rows,) of every image, one of PARTS, and a line for the report that names the source of the split."""
    given = read_split(header, records, names, tables, name_among(names))
    if given is not None:
        return given[0], f"split     {given[1]}"
    path = tables / SPLIT
    parts = draw_split(patients, seed)
    try:
        write_csv(["image", "split"], zip(names, parts, strict=True), path)
    except OSError as error:
        raise ValueError(
            f"{path}: the split cannot be written ({error.strerror}); copy {LABELS} into a writable folder, and give "
            "this folder with --tables"
        ) from None
    unit = "patient" if "patient" in header else "image"
    return parts, f"split     by {unit}, drawn with seed {seed}, saved in {path}"


def draw_split(patients: np.ndarray, seed: int) -> np.ndarray:
    """The part (n,) of each image: SHARES of the patients. With three patients or more, no part is empty."""
    unique = np.unique(patients)
    order = np.random.default_rng(seed).permutation(unique)
    least = int(len(unique) >= len(PARTS))  # patients in each part
    val, test = (max(round(share * len(unique)), least) for share in SHARES[1:])
    part = dict.fromkeys(order[:test].tolist(), "test") | dict.fromkeys(order[test : test + val].tolist(), "val")
    return np.array([part.get(patient, "train") for patient in patients.tolist()])


# boxes and files


def boxes_of(path: Path, classes: tuple[str, ...], names: list[str]) -> dict[str, list[Box]]:
    """The boxes of each image, by its name. An image may have several boxes of one class.

    Raises:
        ValueError: as read_boxes; also for an image that is not in ``names`` and a class that is not in ``classes``.
    """

    def accept(at: str, name: str, label: str) -> bool:
        if name not in known:
            raise ValueError(f"{at}: {name!r} is not in {LABELS}")
        if label not in classes:
            raise ValueError(f"{at}: expected one of the classes {some(classes, 20)}, got {label!r}")
        return True

    known, name_of = set(names), name_among(names)
    boxes: dict[str, list[Box]] = {}
    for name, label, place in read_boxes(path, accept, lambda cell: name_of(cell) or cell):
        boxes.setdefault(name, []).append((classes.index(label), *place))
    return boxes


def refuse_outside(path: Path, name: str, boxes: list[Box], size: np.ndarray | None) -> None:
    """Raises ValueError if a box exceeds the image of ``size`` (width, height); None: the image is missing."""
    for _, x, y, w, h in boxes:
        if size is not None and size[0] and (x + w > size[0] or y + h > size[1]):
            raise ValueError(
                f"{path}: the box {x:g}, {y:g}, {w:g}, {h:g} exceeds {name}, which is displayed with "
                f"{size[0]:g}x{size[1]:g} pixels"
            )


def image_files(folder: Path) -> dict[str, Path]:
    """The image files of a folder and its subfolders, by their path below the folder, in the order of the paths.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if is_image(path)}


def find_files(data_dir: Path, names: list[str]) -> tuple[dict[str, Path], list[str]]:
    """The file of each name, and the images that no name refers to.

    Raises:
        ValueError: there is no such folder, a name matches several files, or two names match one file.
    """
    files = image_files(data_dir)
    equal: dict[PurePosixPath, list[str]] = {}  # by path
    matching: dict[PurePosixPath, list[str]] = {}  # by path or last part, with and without the suffix
    for place, path in files.items():
        equal.setdefault(place_of(place), []).append(place)
        stem = name_without_suffix(path)
        for text in {place_of(t) for t in (place, path.name, PurePosixPath(place).with_name(stem).as_posix(), stem)}:
            matching.setdefault(text, []).append(place)
    found: dict[str, Path] = {}
    name_of: dict[str, str] = {}
    for name in names:
        key = place_of(name)
        places = [name] if name in files else equal.get(key) or matching.get(key, [])
        if len(places) > 1:
            raise ValueError(
                f"{data_dir}: {name} matches several files ({some(places)}); write the name with its folder and suffix"
            )
        if places:
            (place,) = places
            if place in name_of:
                raise ValueError(f"{LABELS}: {name} and {name_of[place]} are both the image {place}")
            found[name], name_of[place] = files[place], name
    return found, [place for place in files if place not in name_of]


def read_sizes(paths: list[Path]) -> tuple[np.ndarray, bool]:
    """Width and height (n, 2) of the displayed images, 0x0 for unreadable files, and whether any image has colours."""

    def header(path: Path) -> tuple[int, int, bool]:
        try:
            return read_header(path)
        except ValueError:
            return 0, 0, False  # check_cxr.py reports the file

    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(header, paths))
    return np.array([known[:2] for known in headers]).reshape(-1, 2), any(known[2] for known in headers)
