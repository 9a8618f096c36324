"""Checks a data set: counts, splits, boxes, and whether the files are complete."""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.progress import Progress

from images.dataset import Index, refuse_missing, some
from images.depth import bits_used
from images.identical import identical_files
from images.metrics import FEW_PATIENTS, patients_with
from images.open_dataset import open_dataset
from images.pixels import is_dicom, load_image, read_header, read_image

#: First and last bytes of a complete file. Some programs append other bytes after the last ones.
COMPLETE = {".png": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"), ".jpg": (b"\xff\xd8", b"\xff\xd9")}
COMPLETE[".jpeg"] = COMPLETE[".jpg"]


#: Largest number of images to decode: in check_cxr.py without --decode, and before a training.
CHECKED, SAMPLE = 2000, 256


class Findings(NamedTuple):
    """The results of a check.

    ``index``: the images that exist. ``report``: lines to print. ``broken``: images that cannot be read. ``constant``:
    images of the training and validation parts with a single value. ``decoded``: the number of decoded images."""

    index: Index
    report: str
    broken: list[str]
    constant: list[str]
    decoded: int


#: What to do with images that cannot be read.
ADVICE = (
    "Replace these files, or move them away and pass --allow-missing, which leaves out missing images. "
    "check_cxr.py --decode finds all of them"
)


def inspect(args: argparse.Namespace, sample: int | None = SAMPLE) -> Findings:
    """Checks the first and last bytes of all images, and the pixels of ``sample`` of them.

    Args:
        sample: largest number of images to decode, drawn at random with a fixed seed; None: all.

    Raises:
        ValueError: as open_dataset, but not for missing images.
    """
    index = open_dataset(args, allow_missing=True)
    broken, constant_rows, decoded = check_files(index, sample)
    used = [row for row in constant_rows if not index.test[row]]
    lines = [
        *index.notes,
        *_about_files(index),
        f"decoded   {'all' if decoded == len(index.paths) else f'{decoded} of {len(index.paths)}, drawn at random'}",
        *_about_splits(index),
        *_about_identical(index),
        *_about_boxes(index),
        *_about_classes(index),
        *_about_learning(index),
    ]
    if constant_rows:
        names = some([index.paths[row] for row in constant_rows], 5)
        lines.append(f"\n{len(constant_rows)} images are constant, {len(used)} of them outside the test part: {names}")
    if broken:
        lines.append(f"\n{len(broken)} images cannot be read:")
        lines += [f"  {problem}" for problem in broken[:20]] + (["  ..."] if len(broken) > 20 else [])
    return Findings(index, "\n".join(lines), broken, [str(index.paths[row]) for row in used], decoded)


def checked_index(args: argparse.Namespace) -> tuple[Index, str]:
    """The index and the report, if training may start.

    Raises:
        ValueError: as open_dataset; also if files are broken, or if training images are constant.
    """
    found = inspect(args)
    if not args.allow_missing:
        refuse_missing(args.data_dir, found.index.missing, len(found.index.names) + len(found.index.missing))
    if found.broken:
        raise ValueError("\n".join([f"{len(found.broken)} images cannot be read:", *found.broken[:20], ADVICE]))
    if found.constant:
        raise ValueError(
            f"{len(found.constant)} images for training or validation are constant: all pixels are equal "
            f"({some(found.constant)}); replace them, or remove them from the table"
        )
    return found.index, found.report


def check_files(index: Index, sample: int | None) -> tuple[list[str], list[int], int]:
    """Problems of the files, one line each; the rows of constant images; the number of decoded images."""
    chosen = np.arange(len(index.paths))
    if sample is not None and sample < len(chosen):
        chosen = np.sort(np.random.default_rng(0).choice(len(chosen), sample, replace=False))
    with ThreadPoolExecutor() as pool:
        problems = dict(enumerate(pool.map(_problem_of_file, index.paths)))
        complete = [int(row) for row in chosen if not problems[row]]
        results = pool.map(lambda row: _check_pixels(index.paths[row], index.about.fit), complete)
        results = list(Progress(results, total=len(complete), desc="decoding", unit="image", leave=False))
    problems |= {row: error for row, (error, _) in zip(complete, results, strict=True) if error}
    constant_rows = [row for row, (_, constant) in zip(complete, results, strict=True) if constant]
    return [problem for problem in problems.values() if problem], constant_rows, len(chosen)


def _problem_of_file(path: Path) -> str:
    """What is wrong with the first and last bytes of the file; empty if they are those of an image."""
    if path.suffix.lower() not in COMPLETE:
        return ""
    start, end = COMPLETE[path.suffix.lower()]
    try:
        with path.open("rb") as file:
            head = file.read(len(start))
            file.seek(max(0, path.stat().st_size - 4096))
            tail = file.read()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not head:
        return f"{path}: the file is empty"
    if head != start:
        others = [suffix for suffix, (begin, _) in COMPLETE.items() if head.startswith(begin[: len(head)])]
        hint = f"; rename it to *{others[0]}" if others else ""
        return f"{path}: expected a {path.suffix[1:].upper()} image, but the file starts with {head!r}{hint}"
    return "" if end in tail else f"{path}: the file is truncated"


def _check_pixels(path: Path, fit: str) -> tuple[str, bool]:
    """The problem of the pixels, if any, and whether the image is constant."""
    try:
        image = read_image(path)
        if fit == "square" and image.width != image.height:
            load_image(path, 64)  # raises the error to report
    except ValueError as error:
        return str(error), False
    extrema = image.getextrema()
    return "", all(low == high for low, high in (extrema if isinstance(extrema[0], tuple) else [extrema]))


def _about_files(index: Index, sample: int = 32) -> list[str]:
    """The number of images, and the size, mode and format of ``sample`` of them."""
    from PIL import Image

    found: list[tuple[str, str]] = []  # size and kind
    for path in index.paths[:: max(1, len(index.paths) // sample)][:sample]:
        try:
            width, height, _ = read_header(path)
            size = f"{width}x{height} "
            if is_dicom(path):
                found.append((size, "DICOM"))
                continue
            with Image.open(path) as image:
                bits = ""
                if image.mode.startswith("I"):
                    bits = f", {bits_used(int(image.getextrema()[1]))} bits used"
                found.append((size, f"{image.mode} {image.format}{bits}"))
        except (OSError, ValueError, Image.DecompressionBombError):
            found.append(("", "unreadable"))
    kinds, sizes = Counter(size + kind for size, kind in found), ""
    if len(kinds) > 8:
        kinds, sizes = Counter(kind for _, kind in found), f", in {len({size for size, _ in found})} sizes"
    rows = len(index.names) + len(index.missing)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    lines = [f"images    {len(index.names)} of {rows}; formats of a sample: {counts}{sizes}"]
    if index.missing:
        lines.append(f"missing   {len(index.missing)}: {some(index.missing, 10)}")
    return lines


def _parts(index: Index) -> list[tuple[str, np.ndarray]]:
    """The name of each part, and whether each image (n,) is in it. Two parts if there is no validation part."""
    if index.val is None:
        name = "train_val" if index.about.kind == "nih" else "train"
        return [(name, ~index.test), ("test", index.test)]
    return [("train", ~index.test & ~index.val), ("val", index.val), ("test", index.test)]


def _negative(index: Index) -> np.ndarray:
    """Whether each image (n,) is known to have none of the classes."""
    return (index.labels == 0).all(1)


def _about_splits(index: Index) -> list[str]:
    lines = []
    for name, part in _parts(index):
        share = _negative(index)[part].mean() if part.any() else 0
        patients = f" of {len(np.unique(index.patients[part]))} patients" if index.about.units == "patients" else ""
        lines.append(
            f"{name:10}{part.sum()} images{patients}, {share:.1%} with "
            f"{index.about.negative[0].lower() + index.about.negative[1:]}"
        )
    if index.about.units == "images":
        return [*lines, "leaks     unknown: there is no column patient, so each image counts as a separate patient"]
    return [*lines, "leaks     no patient is in two parts"]  # otherwise open_dataset raises an error


def _about_identical(index: Index) -> list[str]:
    """The groups of images with the same content: all, those in two parts of the split, and those with other labels."""
    groups = identical_files(index.paths)
    if not groups:
        return []
    part = np.zeros(len(index.paths), int)
    for number, (_, rows) in enumerate(_parts(index)):
        part[rows] = number
    across = [group for group in groups if len(set(part[group])) > 1]
    differ = [group for group in groups if not all(_same(index.labels[group[0]], index.labels[row]) for row in group)]
    found = [("of images with the same content", groups), ("in two parts: the test is not independent", across)]
    found += [("with different labels", differ)]
    heads = ["identical", "", ""]
    return [
        f"{head:10}{len(some_groups)} groups {words}{_examples(index, some_groups)}"
        for head, (words, some_groups) in zip(heads, found, strict=True)
        if some_groups
    ]


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first, second, equal_nan=True)


def _examples(index: Index, groups: list[list[int]]) -> str:
    return ": " + some([" = ".join(index.names[row] for row in group[:3]) for group in groups], 3)


def _about_boxes(index: Index) -> list[str]:
    here = {name: row for row, name in enumerate(index.names) if name in index.boxes}
    outside = [name for name, row in here.items() if not index.test[row]]
    strange = [n for n, row in here.items() if any(index.labels[row, box[0]] != 1 for box in index.boxes[n])]
    lines = [
        f"boxes     {sum(map(len, index.boxes.values()))} on {len(index.boxes)} images, {len(here)} of which exist"
    ]
    if outside:
        lines.append(
            f"          {len(outside)} images with boxes are not in the test part; their boxes are not used: "
            f"{some(outside, 5)}"
        )
    if strange:
        lines.append(
            f"          {len(strange)} images have a box of a class that is not in their labels: {some(strange, 5)}"
        )
    return lines


def _about_classes(index: Index) -> list[str]:
    boxes = Counter(box[0] for name in index.names for box in index.boxes.get(name, ()))
    parts = _parts(index)
    unknown = np.isnan(index.labels).any()
    few = [np.min(_with_and_without(index, part), axis=0) < FEW_PATIENTS for _, part in parts]
    heads = [*(name for name, _ in parts), "boxes", *(["unknown"] if unknown else [])]
    width = max(20, *(len(name) + 2 for name in index.classes))
    lines = [f"\n{'':{width}}" + "".join(f"{head:>10} " for head in heads).rstrip()]
    for number, name in enumerate(index.classes):
        column = index.labels[:, number]
        cells = [
            f"{(part & (column == 1)).sum()}{'*' if marked[number] else ' '}"
            for (_, part), marked in zip(parts, few, strict=True)
        ]
        cells += [f"{boxes[number]} ", *([f"{np.isnan(column).sum()} "] if unknown else [])]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells).rstrip())
    none = "".join(f"{(part & _negative(index)).sum():10} " for _, part in parts)
    lines.append(f"{index.about.negative:{width}}{none.rstrip()}")
    if np.any(few):
        lines.append(
            f"* fewer than {FEW_PATIENTS} {index.about.units} of the part have the class, or fewer than "
            f"{FEW_PATIENTS} do not have it"
        )
    return lines


def _with_and_without(index: Index, part: np.ndarray) -> tuple[list[int], list[int]]:
    """The numbers of patients with each class and without it, among the images of ``part`` (n,)."""
    labels, patients = index.labels[part], index.patients[part]
    return patients_with(1, labels, patients), patients_with(0, labels, patients)


def _about_learning(index: Index) -> list[str]:
    """Warnings of empty parts, and of classes with no or few positive or negative labels in a part."""
    lines, units = [], index.about.units
    for name, rows in _parts(index):
        if not rows.any():
            lines.append(f"warning   there is no image in the part {name}")
            continue
        for words, counts in zip(("with", "without"), _with_and_without(index, rows), strict=True):
            of_class = dict(zip(index.classes, counts, strict=True))
            lacking = [c for c, count in of_class.items() if not count]
            few = [f"{c} ({count})" for c, count in of_class.items() if 0 < count < FEW_PATIENTS]
            if lacking:
                lines.append(f"warning   the part {name} has no image {words} {', '.join(lacking)}")
            if few:
                about = "they are hard to learn" if name.startswith("train") else "their AUC is unreliable"
                lines.append(f"warning   the part {name} has few {units} {words} {', '.join(few)}: {about}")
    return ["", *lines] if lines else []
