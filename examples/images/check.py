"""What there is of a data set, and what is not: counts, splits, boxes, and whether the files look whole."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images.dataset import Index
from images.nih import (
    CLASSES,
    ENTRIES,
    NO_FINDING,
    OFFICIAL_IMAGES,
    find_images,
    image_folders,
    load_index,
    refuse_missing,
)
from images.pixels import load_image

#: Beginning and end of a whole file; some programs append something.
WHOLE = {".png": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"), ".jpg": (b"\xff\xd8", b"\xff\xd9")}
WHOLE[".jpeg"] = WHOLE[".jpg"]


class Findings(NamedTuple):
    """``index`` of the images that are there, ``report`` to print, and what is wrong with the images: ``broken``."""

    index: Index
    report: str
    broken: list[str]


def inspect(data_dir: Path, tables: Path | None = None, decode: bool = False, sample: int = 32) -> Findings:
    """Looks at everything. Of the images at first and last bytes, and decodes ``sample`` of them, or all.

    Raises:
        ValueError: as load_index, which missing images do not make it do.
    """
    index = load_index(data_dir, allow_missing=True, tables=tables)
    broken = look_at_files(index, decode, sample)
    lines = [
        *_about_files(Path(data_dir), Path(tables or data_dir), index, sample),
        *_about_splits(index),
        *_about_boxes(index),
        *_about_classes(index),
    ]
    if broken:
        lines.append(f"\n{len(broken)} images cannot be read:")
        lines += [f"  {problem}" for problem in broken[:20]] + (["  ..."] if len(broken) > 20 else [])
    return Findings(index, "\n".join(lines), broken)


def checked_index(data_dir: Path, allow_missing: bool = False, tables: Path | None = None) -> tuple[Index, str]:
    """The index and the report, where training may start.

    Raises:
        ValueError: as load_index, and where files are broken.
    """
    found = inspect(data_dir, tables)
    if not allow_missing:
        refuse_missing(data_dir, found.index.missing, len(found.index.names) + len(found.index.missing))
    if found.broken:
        raise ValueError("\n".join([f"{len(found.broken)} images cannot be read:", *found.broken[:20]]))
    return found.index, found.report


def look_at_files(index: Index, decode: bool, sample: int) -> list[str]:
    """What is wrong with the files, a line each."""
    if not decode and sample < len(index.paths):
        chosen = np.random.default_rng(0).choice(len(index.paths), sample, replace=False)
    else:
        chosen = np.arange(len(index.paths))
    with ThreadPoolExecutor() as pool:
        problems = dict(zip(index.paths, pool.map(_unlike_an_image, index.paths), strict=True))
        whole = [index.paths[k] for k in chosen if not problems[index.paths[k]]]
        problems |= {path: error for path, error in pool.map(_undecodable, whole) if error}
    return [problem for problem in problems.values() if problem]


def _unlike_an_image(path: Path) -> str:
    start, end = WHOLE[path.suffix.lower()]
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
        others = [suffix for suffix, (begin, _) in WHOLE.items() if head.startswith(begin[: len(head)])]
        hint = f"; it is to be named {others[0]}" if others else ""
        return f"{path}: no {path.suffix[1:].upper()} image, it starts with {head!r}{hint}"
    return "" if end in tail else f"{path}: the file is cut off"


def _undecodable(path: Path) -> tuple[Path, str]:
    try:
        load_image(path, 64)
    except ValueError as error:
        return path, str(error)
    return path, ""


def _about_files(data_dir: Path, tables: Path, index: Index, sample: int) -> list[str]:
    from PIL import Image

    layouts = [name for name, folders in image_folders(data_dir).items() if any(_images_in(f) for f in folders)]
    table = next(name for name in ENTRIES if (tables / name).is_file())
    rows = len(index.names) + len(index.missing)
    official = "the official number" if rows == OFFICIAL_IMAGES else f"{OFFICIAL_IMAGES} in the official one"
    kinds: Counter[str] = Counter()
    brightest = 0  # of those with 16 bits
    for path in index.paths[:: max(1, len(index.paths) // sample)][:sample]:
        try:
            with Image.open(path) as image:
                kinds[f"{image.width}x{image.height} {image.mode} {image.format}"] += 1
                if image.mode.startswith("I"):
                    brightest = max(brightest, int(image.getextrema()[1]))
        except (OSError, ValueError, Image.DecompressionBombError):
            kinds["unreadable"] += 1
    known = {Path(name).stem for name in (*index.names, *index.missing)}
    others = sorted(set(find_images(data_dir)) - known)
    lines = [
        f"layout    {', '.join(layouts)}",
        f"table     {table}, {rows} rows ({official})",
        f"images    {len(index.names)} of {rows}; of some: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
    ]
    if 0 < brightest < 2**14:
        lines.append(
            f"dark      16 bits are read as their upper 8, and the brightest pixel looked at is {brightest} of 65535: "
            "bring them to the whole range first"
        )
    if index.missing:
        shown = ", ".join(index.missing[:10]) + (" ..." if len(index.missing) > 10 else "")
        lines.append(f"missing   {len(index.missing)}: {shown}")
    if others:
        more = " ..." if len(others) > 5 else ""
        lines.append(f"besides   {len(others)} images that the table does not name: {', '.join(others[:5])}{more}")
    return lines


def _images_in(folder: Path) -> bool:
    return any(entry.suffix.lower() in WHOLE for entry in folder.iterdir())


def _about_splits(index: Index) -> list[str]:
    lines = []
    for name, part in (("train_val", ~index.test), ("test", index.test)):
        healthy = (index.labels[part].sum(1) == 0).mean() if part.any() else 0
        lines.append(
            f"{name:10}{part.sum()} images of {len(np.unique(index.patients[part]))} patients, "
            f"{healthy:.1%} with no finding"
        )
    return [*lines, "leaks     no patient is in both lists"]  # else there would be no index


def _about_boxes(index: Index) -> list[str]:
    here = {name: row for row, name in enumerate(index.names) if name in index.boxes}
    outside = [name for name, row in here.items() if not index.test[row]]
    strange = [n for n, row in here.items() if any(not index.labels[row, box[0]] for box in index.boxes[n])]
    lines = [
        f"boxes     {sum(map(len, index.boxes.values()))} of {len(index.boxes)} images, of which {len(here)} are here"
    ]
    if outside:
        lines.append(f"          {len(outside)} images with boxes are not in the test list: {', '.join(outside[:5])}")
    if strange:
        lines.append(f"          {len(strange)} images have a box of a class that their entry lacks: {strange[:5]}")
    return lines


def _about_classes(index: Index) -> list[str]:
    boxes = Counter(box[0] for name in index.names for box in index.boxes.get(name, ()))
    healthy = index.labels.sum(1) == 0
    lines = [f"\n{'':20}{'train_val':>10}{'test':>10}{'boxes':>10}"]
    for number, name in enumerate(CLASSES):
        positive = index.labels[:, number] == 1
        lines.append(
            f"{name:20}{(positive & ~index.test).sum():10}{(positive & index.test).sum():10}{boxes[number]:10}"
        )
    return [*lines, f"{NO_FINDING:20}{(healthy & ~index.test).sum():10}{(healthy & index.test).sum():10}"]
