"""examples/train_features.py: the command with its options, and --resume."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import extract_features
import feature_packages  # noqa: F401
import numpy as np
import pytest
import torch
import train_features
from conftest import ROOT
from csv_files import write
from feature_runs import NETWORK, change, command
from features import recommended, training

EXAMPLES = ROOT / "examples"


@pytest.mark.examples
@pytest.mark.parametrize("head", [head for head in train_features.HEADS if head != "patches"])
@pytest.mark.parametrize("loss", train_features.LOSSES)
def test_every_head_and_loss_separates_the_bags(bag_folder, tmp_path, head, loss):
    options = [
        "--folds=2",
        "--epochs=20",
        "--lr=0.05",
        "--batch-size=5",
        "--classes=lesion",
        "--rise=10",
        "--share=0.3",
    ]
    labelled = ("--instance-labels", str(bag_folder / "instances.csv"))
    assert command(bag_folder, tmp_path, f"--head={head}", f"--loss={loss}", "--pooling=mean", *options, *labelled) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())["lesion"]
    assert result["auc"] > 0.9
    assert result["auc_low"] <= result["auc_high"] <= 1
    assert result["instance_auc"] > 0.75


@pytest.mark.examples
def test_small_network_learns_from_the_pixels_of_patches(tmp_path):
    """Patches of 16 pixels: those of the class have a bright square. Bags by extract_features.py, random weights."""
    from PIL import Image

    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    labels, points, instances = [], [], []
    for k in range(24):
        pixels = generator.integers(0, 120, (64, 64, 3), np.uint8)
        for x, y in ((16, 16), (16, 48), (48, 16), (48, 48)):
            positive = k % 2 and x == 16
            if positive:
                pixels[y - 4 : y + 4, x - 4 : x + 4] += 120
            points.append([f"p{k:02d}.png", x, y])
            instances.append([f"p{k:02d}", int(positive)])
        Image.fromarray(pixels).save(tmp_path / "photos" / f"p{k:02d}.png")
        labels.append([f"p{k:02d}", k % 2])
    write(tmp_path / "points.csv", ["image", "x", "y"], points)
    known = write(tmp_path / "instances.csv", ["bag", "bright"], instances)
    table = write(tmp_path / "labels.csv", ["bag", "bright"], labels)
    given = ["--images", str(tmp_path / "photos"), "--points", str(tmp_path / "points.csv"), "--backbone", "pixels"]
    assert extract_features.main([*given, "--patch", "16", "--out", str(tmp_path / "patches")]) == 0
    with pytest.raises(SystemExit):
        extract_features.main([*given, "--out", str(tmp_path / "other")])
    options = ["--features", str(tmp_path / "patches"), "--labels", str(table), "--instance-labels", str(known)]
    options += ["--head=patches", "--pooling=mean", "--share=0.5", "--folds=2", "--epochs=8", "--batch-size=2"]
    assert train_features.main([*options, "--lr=0.001", "--rise=10", "--out", str(tmp_path / "runs")]) == 0
    result = json.loads((tmp_path / "runs" / "metrics.json").read_text())["bright"]
    assert result["auc"] > 0.95 and result["instance_auc"] > 0.95


@pytest.mark.examples
@pytest.mark.parametrize("pooling", train_features.POOLINGS)
def test_every_pooling_runs(bag_folder, tmp_path, pooling):
    options = ("--epochs", "2", "--pooling", pooling, "--head", "linear", "--start", "at_once")
    assert command(bag_folder, tmp_path, *options) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert set(result) == {"lesion", "other"} and all(0 <= v["auc"] <= 1 for v in result.values())


@pytest.mark.parametrize(
    ("options", "r"), [(["generalized_mean"], 3.0), (["generalized_mean", "--r=1"], 1.0), (["lse", "--r=5"], 5.0)]
)
def test_parameter_r_of_the_pooling(bag_folder, tmp_path, options, r):
    assert command(bag_folder, tmp_path, "--epochs=1", "--pooling", *options) == 0
    known = json.loads((tmp_path / "settings.json").read_text())
    settings = training.Settings.of_run(known)
    assert settings.r == r
    assert training.make_model(settings, 6, 2, 0)["loss"].pooling.r == r
    # a run of an older version had the default of the library
    del known["r"]
    older = training.Settings.of_run(known)
    assert training.make_model(older, 6, 2, 0)["loss"].pooling.r == {"lse": 10.0, "generalized_mean": 1.0}[options[0]]


def test_mixed_precision_is_a_setting_of_the_run(bag_folder, tmp_path, capsys):
    assert command(bag_folder, tmp_path, "--epochs=1", "--amp=bf16") == 0
    assert training.Settings.of_run(json.loads((tmp_path / "settings.json").read_text())).amp == "bf16"
    capsys.readouterr()
    assert command(bag_folder, tmp_path, "--epochs=1", "--resume") == 2
    assert "made with another --amp" in capsys.readouterr().err
    # a run of an older version has no such setting, and was trained in float32
    path = tmp_path / "settings.json"
    known = json.loads(path.read_text())
    del known["amp"]
    path.write_text(json.dumps(known))
    assert command(bag_folder, tmp_path, "--epochs=1", "--resume") == 0


@pytest.mark.examples
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", (0.2, 4, 30, 30)),
        ("--head=linear --epochs=2", (0.2, 4, 30, 2)),
        ("--k-start=0 --restarts=1", (0.0, 1, 30, 30)),
        ("--pooling=mean", (0.0, 1, 8, 60)),
        ("--head=gated", (0.0, 1, 8, 60)),
    ],
)
def test_top_k_pooling_searches_for_small_objects_by_default(bag_folder, tmp_path, options, expected):
    assert command(bag_folder, tmp_path, "--folds=2", "--classes=lesion", *options.split()) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert tuple(settings[name] for name in ("k_start", "restarts", "trial_epochs", "epochs")) == expected


@pytest.mark.examples
def test_command_explains_lam_that_stayed_zero(bag_folder, tmp_path, capsys):
    """A tiny learning rate: the training AUC stays below 1. In the second command lam rises at once."""
    options = ("--folds=2", "--classes=lesion", "--epochs=3", "--lr=1e-6", "--pooling=mean")
    assert command(bag_folder, tmp_path / "never", *options, "--start-auc=1") == 0
    printed = capsys.readouterr().out
    assert "run 1 of 2: " in printed and "lam stayed 0" in printed
    text = "lam stayed 0 in 2 of 2 runs. These runs trained with the bag loss only: SGL had no effect."
    assert f"warning: {text}" in printed
    for advice in (
        "--epochs 6",
        "--pooling topk",
        "another network",
        "--start at_once",
    ):
        assert advice in printed
    best, needed = map(float, re.search(r"this AUC was ([\d.]+); it needs ([\d.]+)\.", printed).groups())
    histories = [torch.load(path, weights_only=True)["history"] for path in (tmp_path / "never" / "parts").glob("*.pt")]
    assert best == pytest.approx(max(row["auc"][0] for rows in histories for row in rows), abs=0.005) and needed == 1
    assert text in (tmp_path / "never" / "report.html").read_text()
    # a finished run is not trained again, but still explained
    assert command(bag_folder, tmp_path / "never", *options, "--start-auc=1", "--resume") == 0
    assert text in capsys.readouterr().out
    assert command(bag_folder, tmp_path / "rises", *options, "--start=at_once") == 0
    assert command(bag_folder, tmp_path / "bag", *options, "--loss=bag") == 0
    assert command(bag_folder, tmp_path / "off", *options, "--lam=0") == 0
    assert "lam stayed 0 in" not in capsys.readouterr().out
    assert "lam stayed 0 in" not in (tmp_path / "rises" / "report.html").read_text()


@pytest.mark.examples
def test_resume_gives_what_an_uninterrupted_command_gives(bag_folder, tmp_path, capsys):
    options = ("--folds", "2", "--repeats", "2", "--epochs", "2")
    assert command(bag_folder, tmp_path / "whole", *options) == 0
    assert command(bag_folder, tmp_path / "cut", *options) == 0
    for name in ("repeat0_fold1", "repeat1_fold0"):
        (tmp_path / "cut" / "parts" / f"{name}.npz").unlink()
    assert command(bag_folder, tmp_path / "cut", *options) == 2
    assert "holds runs; pass --resume" in capsys.readouterr().err
    assert command(bag_folder, tmp_path / "cut", *options, "--resume", "--lr", "0.1") == 2
    assert "made with another --lr" in capsys.readouterr().err
    assert command(bag_folder, tmp_path / "cut", *options, "--resume") == 0
    for name in ("metrics.json", "runs.csv", "bags.csv", "instances.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def drop_last_instance(folder):
    """Takes the last instance away from the last bag of a store."""
    *rows, (name, instances, *others) = csv.reader((folder / "bags.csv").open())
    write(folder / "bags.csv", rows[0], [*rows[1:], [name, int(instances) - 1, *others]])


@pytest.mark.parametrize(
    ("protocol", "edit", "message"),
    [
        ("--folds=2", lambda d: change(d / "labels.csv", "b00,0,", "b00,1,"), "other labels"),
        ("--folds=2", lambda d: change(d / "labels.csv", "b39,1,1,val,p19\n", ""), "other labels"),
        ("--folds=2", lambda d: change(d / "labels.csv", "val,p19", "val,p18"), "other labels"),
        ("--folds=2", lambda d: drop_last_instance(d / "features"), "other features"),
        ("--folds=2", lambda d: change(d / "features" / "store.json", "{}", '{"stride": 8}'), "other features"),
        ("--repeats=2", lambda d: change(d / "labels.csv", "val,p19", "test,p19"), "another split"),
    ],
)
def test_resume_with_other_data_is_an_error(bag_folder, tmp_path, capsys, protocol, edit, message):
    shutil.copytree(bag_folder, tmp_path / "data")
    options = (tmp_path / "data", tmp_path / "out", protocol, "--epochs=1")
    assert command(*options) == 0
    edit(tmp_path / "data")
    assert command(*options, "--resume") == 2
    assert f"made with {message}" in capsys.readouterr().err


def test_split_that_is_not_used_may_change_before_a_resume(bag_folder, tmp_path):
    shutil.copytree(bag_folder, tmp_path / "data")
    options = (tmp_path / "data", tmp_path / "out", "--folds=2", "--epochs=1")
    assert command(*options) == 0
    change(tmp_path / "data" / "labels.csv", "val,p19", "test,p19")
    assert command(*options, "--resume") == 0


def test_folder_of_an_older_version_is_continued(bag_folder, tmp_path):
    options = (bag_folder, tmp_path, "--folds=2", "--epochs=1")
    assert command(*options) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["data"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert command(*options, "--resume") == 0


def test_other_form_of_the_same_path_is_no_other_option(bag_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(bag_folder)
    assert command(Path(), tmp_path / "out", "--epochs=1") == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["labels"] == str(bag_folder / "labels.csv")
    monkeypatch.chdir(tmp_path)
    assert command(bag_folder, Path("out"), "--epochs=1", "--resume") == 0
    shutil.copy(bag_folder / "labels.csv", tmp_path / "labels.csv")
    assert command(bag_folder, Path("out"), "--epochs=1", "--resume", "--labels=labels.csv") == 2
    assert "made with another --labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--threads=0", "--threads: expected at least 1, got 0"),
        ("--hidden=0", "--hidden: expected at least 1, got 0"),
        ("--components=-1", "--components: expected at least 0, got -1"),
        ("--overlays=-1", "--overlays: expected at least 0, got -1"),
        ("--noise=-0.5", "--noise: expected at least 0, got -0.5"),
        ("--noise=nan", "--noise: expected at least 0, got nan"),
        ("--lr=-1", "--lr: expected at least 0, got -1.0"),
        ("--k=2.7", "--k: expected a whole number of at least 1, or a fraction between 0 and 1, got 2.7"),
        ("--k=nan", "--k: expected a whole number of at least 1, or a fraction between 0 and 1, got nan"),
        ("--dropout=1.5", "--dropout: expected at least 0 and below 1, got 1.5"),
        ("--folds=2 --test=val", "--test: expected without --folds"),
        ("--k-start=0.2 --pooling=max", "--k-start: expected --pooling topk, got max"),
        ("--r=3 --pooling=max", "--r: expected --pooling lse or generalized_mean, got max"),
        ("--r=0 --pooling=lse", "--r: expected a finite number above 0, got 0"),
        ("--k-start=0.2 --head=gated", "--k-start, --restarts: expected --head linear or mlp, got gated"),
        ("--classes lesion other lesion", "--classes: expected each class once, got lesion twice"),
    ],
)
def test_errors_of_options(bag_folder, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        command(bag_folder, tmp_path, *words.split())
    assert message in capsys.readouterr().err


def test_command_names_boxes_on_negative_bags(timm, image_folder, tmp_path, capsys):
    """The images are in both parts of a split of patients with a lesion (im0, im2) and without (im1)."""
    given = ["--images", str(image_folder), "--out", str(tmp_path / "features"), *NETWORK]
    assert extract_features.main(given) == 0
    parts = ("train", "train", "test")
    write(tmp_path / "labels.csv", ["image", "lesion", "split"], [[f"im{k}", 1 - k % 2, parts[k]] for k in range(3)])
    boxes = write(tmp_path / "boxes.csv", ["image", "label", *"xywh"], [["im1.png", "lesion", 8, 8, 20, 20]])
    options = (tmp_path, tmp_path / "out", "--epochs=1", "--boxes", str(boxes))
    assert command(*options) == 0
    text = "note: 1 boxes of lesion are in 1 bags whose label of lesion is 0 (im1)"
    assert text in capsys.readouterr().out.splitlines()
    change(boxes, "8,8,20,20", "8,8,200,20")
    assert command(*options, "--resume") == 2
    assert "the box 8, 8, 200, 20 exceeds im1, which has 80x48 pixels" in capsys.readouterr().err


def test_wrong_folder_of_images_is_an_error_before_the_training(bag_folder, tmp_path, capsys):
    assert command(bag_folder, tmp_path / "out", "--images", str(tmp_path / "nowhere")) == 2
    assert "images: expected a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bags_without_a_label_are_named(bag_folder, tmp_path, capsys):
    lines = (bag_folder / "labels.csv").read_text().splitlines(keepends=True)
    (tmp_path / "labels.csv").write_text("".join(lines[:-2]))
    options = ("--labels", str(tmp_path / "labels.csv"), "--epochs", "1")
    assert command(bag_folder, tmp_path / "out", *options) == 0
    note = "note: 2 of 40 bags with features are not in labels.csv and are not used (b38, b39)"
    assert note in capsys.readouterr().out.splitlines()


@pytest.mark.examples
def test_reading_without_a_cache_gives_the_same_training(bag_folder, tmp_path):
    options = ("--epochs", "2", "--batch-size", "3")
    assert command(bag_folder, tmp_path / "a", *options) == 0
    assert command(bag_folder, tmp_path / "b", *options, "--cache-gb", "0") == 0
    assert (tmp_path / "a" / "bags.csv").read_text() == (tmp_path / "b" / "bags.csv").read_text()


@pytest.mark.parametrize(
    "script",
    [f"{name}_features.py" for name in ("extract", "train", "finetune", "predict", "compare")] + ["bccd_demo.py"],
)
def test_help_does_not_import_torch(script):
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.argv = ['x', '--help']\n"
    code += f"import runpy\ntry: runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_choices_are_those_of_the_library():
    from sgl_ops.pooling import POOLINGS

    assert set(train_features.POOLINGS) == set(POOLINGS)


@pytest.mark.examples
def test_resume_keeps_the_options_of_an_older_version(bag_folder, tmp_path, capsys):
    """Before, the search for small objects was off by default, and lam always rose during 100 steps."""
    old = ("--k-start=0", "--restarts=1", "--trial-epochs=8", "--epochs=2", "--rise=100")
    assert command(bag_folder, tmp_path, "--folds=2", "--classes=lesion", *old) == 0
    (tmp_path / "parts" / "repeat0_fold1.npz").unlink()
    assert command(bag_folder, tmp_path, "--folds=2", "--classes=lesion", "--resume") == 0
    assert (tmp_path / "parts" / "repeat0_fold1.npz").exists()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert [settings[name] for name in ("k_start", "restarts", "trial_epochs", "epochs", "rise")] == [0, 1, 8, 2, 100]
    capsys.readouterr()
    assert command(bag_folder, tmp_path, "--folds=2", "--classes=lesion", "--resume", "--rise=5", "--epochs=3") == 2
    assert "was made with another --rise, --epochs" in capsys.readouterr().err


def test_settings_without_a_search_are_those_of_the_command_without_it():
    args = train_features.make_parser().parse_args(["--features", "f", "--labels", "l", "--out", "o"])
    given = vars(args) | recommended.WITHOUT_SEARCH
    assert training.Settings(**{name: given[name] for name in training.Settings.__dataclass_fields__}) == (
        training.Settings()
    )
    assert all(getattr(args, name) is None for name in recommended.SEARCH)
    assert recommended.SEARCH.keys() == recommended.WITHOUT_SEARCH.keys()
