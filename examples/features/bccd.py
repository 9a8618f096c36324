"""The blood-smear photos of BCCD as bags: labels "has platelets", and the boxes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from common.csv_table import write_csv

CLASS = "Platelets"
MISSING = """{folder}: expected the BCCD data set (364 blood-smear photos, MIT licence). To get it:
    git clone https://github.com/Shenggan/BCCD_Dataset
    python bccd_demo.py --data BCCD_Dataset/BCCD --out bccd"""


def prepare(data: Path, out: Path) -> Path:
    """Writes ``labels.csv`` (bag, Platelets, split) and ``boxes.csv`` into ``out``.

    Args:
        data: the folder BCCD of the repository (Annotations, ImageSets, JPEGImages), or one with images and boxes.csv
            (image, split, class, xmin, ymin, xmax, ymax).

    Returns:
        the folder of the images.

    Raises:
        ValueError: the data are missing. The message says how to get them.
    """
    if (data / "boxes.csv").is_file():
        with (data / "boxes.csv").open(newline="", encoding="utf-8") as file:
            rows = [{**row, "image": Path(row["image"]).stem} for row in csv.DictReader(file)]
        images = data / "images"
    elif (data / "Annotations").is_dir():
        rows = list(_annotations(data))
        images = data / "JPEGImages"
    else:
        raise ValueError(MISSING.format(folder=data))
    split = {row["image"]: row["split"] for row in rows}
    positive = {row["image"] for row in rows if row["class"] == CLASS}
    out.mkdir(parents=True, exist_ok=True)
    bags = ([name, int(name in positive), split[name]] for name in sorted(split))
    write_csv(["bag", CLASS, "split"], bags, out / "labels.csv")
    columns = ["image", "class", "xmin", "ymin", "xmax", "ymax"]
    write_csv(columns, ([row[c] for c in columns] for row in rows if row["class"] == CLASS), out / "boxes.csv")
    return images


def _annotations(data: Path) -> Iterator[dict[str, str]]:
    split = {
        name: part
        for part in ("train", "val", "test")
        for name in (data / "ImageSets" / "Main" / f"{part}.txt").read_text(encoding="utf-8").split()
    }
    for path in sorted((data / "Annotations").glob("*.xml")):
        if path.stem not in split:
            continue
        for entry in ElementTree.parse(path).getroot().iter("object"):
            box = {tag: entry.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")}
            yield {"image": path.stem, "split": split[path.stem], "class": entry.findtext("name"), **box}
