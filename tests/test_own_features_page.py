"""docs/own-features.md: its tables and commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import check_cxr
import compare_features
import extract_features
import feature_packages  # noqa: F401
import finetune_features
import numpy as np
import predict_features
import pytest
import torch
import train_features
from conftest import ROOT
from csv_files import read, write
from features import backbones, labels, recommended


def read_text(tmp_path, text, bags=("x", "y", "z.1"), **options):
    """The labels of a labels.csv with this text."""
    (tmp_path / "labels.csv").write_text(text)
    return labels.read_labels(
        tmp_path / "labels.csv", **{"classes": None, "group": "patient", "bags": list(bags)} | options
    )


PAGE = (ROOT / "docs" / "own-features.md").read_text()


#: Language and content of the code blocks of the page.
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.examples
def test_list_of_stages_in_own_features_is_that_of_the_command(timm):
    (shown,) = [text for _, text in BLOCKS if text.startswith("stage ")]
    assert list(backbones.stage_table("tf_efficientnet_lite0")) == shown.splitlines()


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("tf_efficientnet_lite0", [f"blocks.{k}" for k in range(7)]),
        ("mobilenetv3_small_050", ["bn1", *(f"blocks.{k}" for k in range(6))]),
        ("convnext_atto", [f"stages.{k}" for k in range(4)]),
        ("vit_tiny_patch16_224", [f"blocks.{k}" for k in range(12)]),
    ],
)
def test_names_of_stages_are_those_of_own_features(timm, name, stages):
    with torch.device("meta"):
        assert backbones.stages_in(timm.create_model(name)) == stages


def test_tables_of_own_features_are_read(tmp_path):
    tables = [text for _, text in BLOCKS if text.startswith(("image,", "bag,"))]
    assert len(tables) == 5
    bags = ["photo_001", "photo_002"]
    for first, second in (tables[:2], tables[2:4]):
        found = read_text(tmp_path, first, bags)
        assert found.names == bags and found.values[:, 0].tolist() == [1, 0]
        (tmp_path / "boxes.csv").write_text(second)
        places = labels.read_boxes(tmp_path / "boxes.csv", found.classes, bags)
        assert list(places[found.classes[0]]) == bags[:1]


def test_tables_of_slides_of_own_features_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        Path("dataset.csv"),
        ["case_id", "slide_id", "label"],
        [["p1", "s1", "tumour"], ["p1", "s2", "normal"], ["p2", "s3", ""]],
    )
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "pandas" in text]
    exec(code, {})
    found = labels.read_labels(Path("slides.csv"), None, "patient", ["s1", "s2", "s3"])
    assert (found.names, found.classes) == (["s1", "s2", "s3"], ["tumour"])
    np.testing.assert_array_equal(found.values, [[1.0], [0.0], [np.nan]])  # an empty label is unknown
    assert found.groups[0] == found.groups[1] != found.groups[2]
    (text,) = [text for _, text in BLOCKS if text.startswith("bag,class\n")]
    Path("tiles.csv").write_text(text)
    found = labels.read_instance_labels(Path("tiles.csv"), ["tumour"], ["slide_001"])
    assert found["slide_001"].tolist() == [[1.0], [0.0]]


def test_printed_training_command_is_that_of_own_features(tmp_path, monkeypatch):
    blocks = "".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
    assert blocks.splitlines()[0] == check_cxr.FIRST_STEP
    first = next(line for line in blocks.splitlines() if "train_features.py" in line)
    monkeypatch.chdir(tmp_path)
    photos = Path("photos")
    photos.mkdir()
    (photos / "labels.csv").touch()
    (photos / "boxes.csv").touch()
    assert recommended.training_command(Path("features"), photos, True, False) == " ".join(first.split())
    assert "--boxes" not in recommended.training_command(Path("features"), photos, False, False)
    (photos / "boxes.csv").unlink()
    command = recommended.training_command(Path("my features"), photos, True, False)
    assert "--boxes" not in command and "--features 'my features'" in command
    assert recommended.training_command(Path("features"), photos, True, False, True).endswith(
        " --allow-missing --out runs/sgl"
    )
    patches = recommended.training_command(Path("features"), photos, False, True)
    assert "--head patches" in patches and "--k-start" not in patches


@pytest.mark.examples
def test_commands_of_own_features_run(timm, image_folder, tmp_path, monkeypatch, capsys):
    """Every command of docs/own-features.md in its order, with random weights and one epoch."""
    from PIL import Image

    blocks = "".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
    commands = [line.split()[1:] for line in blocks.splitlines()]
    assert len(commands) == 17
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    for folder, count in ((photos, 8), (tmp_path / "new_photos", 2)):
        folder.mkdir()
        for k in range(count):
            array = np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(array).save(folder / f"photo_{k}.jpg")
    write(photos / "labels.csv", ["image", "labels"], [[f"photo_{k}.jpg", "lesion" * (k % 2)] for k in range(8)])
    write(photos / "boxes.csv", ["image", "label", *"xywh"], [["photo_1.jpg", "lesion", 8, 8, 20, 20]])
    points = [[f"photo_{k}.jpg", 10 * k, 20] for k in range(3)]
    write(tmp_path / "nuclei.csv", ["image", "x", "y"], points)
    for folder, count in (("slides/pt_files", 6), ("new_slides/pt_files", 2)):
        slides = tmp_path / folder
        slides.mkdir(parents=True)
        for i in range(count):
            torch.save(torch.randn(5 + i, 4), slides / f"s{i}.pt")
    write(tmp_path / "slides.csv", ["bag", "tumour", "patient"], [[f"s{i}", i % 2, f"p{i // 2}"] for i in range(6)])
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.pt")
    weights = ["--weights", "weights.pt"]
    short = {
        "extract_features.py": weights,
        "train_features.py": ["--epochs", "1", "--trial-epochs", "1"],
        "finetune_features.py": [*weights, "--epochs", "1"],
        "predict_features.py": ["--with-failed"],
        "compare_features.py": ["--draws", "9"],
    }
    scripts = (compare_features, extract_features, finetune_features, predict_features, train_features)
    modules = {f"{one.__name__}.py": one for one in scripts}
    for script, *words in commands:
        random = ["--weights", "none"] if "timm/resnet18" in words else short[script]
        assert modules[script].main([*words, *random]) == 0, words
    assert "next: open" in capsys.readouterr().out
    assert (tmp_path / "found_tuned" / "bags.csv").read_text() != (tmp_path / "found" / "bags.csv").read_text()
    (tmp_path / "runs" / "slides" / "failed.json").write_text("{}")  # noise teaches nothing
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "load_heads" in text]
    names = {}
    exec(code, names)
    rows = {row["bag"]: float(row["tumour"]) for row in read(tmp_path / "found_slides" / "bags.csv")}
    assert dict(zip(names["found"].names, names["found"].bags[:, 0], strict=True)) == pytest.approx(rows, rel=1e-4)
    for loss in ("sgl", "bag"):
        result = json.loads((tmp_path / "runs" / loss / "metrics.json").read_text())["lesion"]
        assert result["images"] == 1 and "iou_0.3" in result
        assert "<img" in (tmp_path / "runs" / loss / "report.html").read_text()
