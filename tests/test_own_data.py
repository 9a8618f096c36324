"""docs/own-data.md: its commands run in order, and its code converts VOC and COCO to boxes.csv."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from images.folder import load_folder

Image = pytest.importorskip("PIL.Image")
PAGE = (ROOT / "docs" / "own-data.md").read_text()
BOXES = [
    ["photo_0.png", "red", 0, 0, 12, 10],
    ["photo_1.png", "green", 20, 5, 10, 15],
    ["photo_1.png", "green", 1, 2, 9, 9],
]


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S)


#: The code that reads a map, applies the network, and exports it; and that converts VOC and COCO boxes, and boxes to
#: labels.
READING, APPLYING, EXPORT, *CONVERSIONS = blocks("python")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of 24 photos of 40x30 and 30x40 pixels, as the page describes it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = [["image", "labels"]]
    rng = np.random.default_rng(0)
    for k in range(24):
        photo = rng.integers(60, 120, [(30, 40, 3), (40, 30, 3)][k % 2], dtype=np.uint8)
        names = ["red"] * (k % 2 == 0) + ["green"] * (k % 3 == 1)
        for name in names:
            c = ("red", "green").index(name)
            photo[10 * c : 10 * c + 10, 5:17, c] = 240
        Image.fromarray(photo).save(folder / f"photo_{k}.png")
        rows.append([f"photo_{k}.png", "|".join(names)])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def write_voc(tmp_path):
    (tmp_path / "voc").mkdir()
    for name in sorted({box[0] for box in BOXES}):
        things = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for image, label, x, y, w, h in BOXES
            if image == name
        )
        text = f"<annotation><filename>{name}</filename>{things}</annotation>"
        (tmp_path / "voc" / name).with_suffix(".xml").write_text(text)


def write_coco(tmp_path):
    names, labels = (sorted({box[k] for box in BOXES}) for k in (0, 1))
    content = {
        "images": [{"id": 7 + k, "file_name": name} for k, name in enumerate(names)],
        "categories": [{"id": 3 + k, "name": name} for k, name in enumerate(labels)],
        "annotations": [
            {"image_id": 7 + names.index(image), "category_id": 3 + labels.index(label), "bbox": place}
            for image, label, *place in BOXES
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("number", "write"), [(0, write_voc), (1, write_coco)], ids=["VOC", "COCO"])
def test_scripts_convert_voc_and_coco_boxes(photos, tmp_path, number, write):
    write(tmp_path)
    exec(CONVERSIONS[number], {})
    index = load_folder(photos)
    found = [[name, index.classes[c], *place] for name, boxes in index.boxes.items() for c, *place in boxes]
    assert sorted(found) == sorted(BOXES)


def test_script_creates_labels_from_boxes(photos, tmp_path):
    write_coco(tmp_path)
    (photos / "labels.csv").unlink()
    for number in (1, 2):
        exec(CONVERSIONS[number], {})
    index = load_folder(photos)
    assert index.classes == ("green", "red")
    assert len(index.names) == 24
    shown = {name: row.tolist() for name, row in zip(index.names, index.labels, strict=True) if row.any()}
    assert shown == {"photo_0.png": [0, 1], "photo_1.png": [1, 0]}


@pytest.mark.examples
def test_commands_of_the_page_run(photos, tmp_path):
    """The commands as in the page, with one epoch and small images."""
    write_coco(tmp_path)
    exec(CONVERSIONS[1], {})
    (tmp_path / "new").mkdir()
    for k in range(3):
        shutil.copy(photos / f"photo_{k}.png", tmp_path / "new")
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    scripts = ["check_cxr.py", "train_cxr.py", "localize_cxr.py", "predict_cxr.py"]
    assert [command[1] for command in commands] == scripts
    quick = {
        "train_cxr.py": ["--image-size", "64", "--epochs", "1", "--workers", "0"],
        "localize_cxr.py": ["--draws", "5"],
        "predict_cxr.py": ["--maps"],
    }
    for _, script, *options in commands:
        command = [sys.executable, ROOT / "examples" / script, *options, *quick.get(script, [])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "photos: classification and localization" in (tmp_path / "report" / "report.html").read_text()
    assert "new: predictions" in (tmp_path / "predictions" / "report.html").read_text()
    with (tmp_path / "predictions" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "p_green", "p_red"]
    assert [row["image"] for row in rows] == ["photo_0.png", "photo_1.png", "photo_2.png"]
    found = {}
    exec(READING.replace("photo_001.jpg", "photo_0.png").replace("(480, 640)", "(30, 40)"), found)
    assert found["red"].shape == (30, 40)
    assert found["red"].max() == pytest.approx(float(rows[0]["p_red"]), abs=1e-5)  # max pooling
    exec(APPLYING.replace("photo_001.jpg", "photo_0.png"), found)
    assert found["p"][0].tolist() == pytest.approx([float(rows[0][f"p_{c}"]) for c in found["classes"]], abs=1e-5)
    assert found["maps"][0].max((1, 2)).tolist() == pytest.approx(found["p"][0].tolist(), abs=1e-5)
    exec(EXPORT, found)
    program = torch.export.load("network.pt2").module()
    for count in (1, 3):
        batch = found["to_input"](found["pixels"]).repeat(count, 1, 1, 1)
        torch.testing.assert_close(program(batch), found["model"](batch), rtol=1e-4, atol=1e-4)
