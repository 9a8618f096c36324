"""examples/train_features.py: what it says about its labels and features, and the tables of the test bags."""

from __future__ import annotations

import csv
import shutil

import extract_features
import feature_packages  # noqa: F401
import numpy as np
import predict_features
import pytest
from csv_files import read, write
from feature_runs import NETWORK, change, command
from features import store
from features.opened_run import open_run
from features.trained import bags_of_training, load_heads


def test_command_prints_how_it_read_the_labels(bag_folder, tmp_path, capsys):
    assert command(bag_folder, tmp_path, "--epochs", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lesion: 40 bags, 20 positive, 20 negative, 0 unknown"
    assert lines[1].startswith("other: 40 bags, ") and lines[1].endswith(", 8 unknown")
    assert lines[2] == "40 bags of 20 patients (column patient)"
    assert lines[3] == "first run: 28 bags for training, 12 for the test"


def test_fold_of_each_repeat_is_in_the_table_of_the_bags(bag_folder, tmp_path):
    assert command(bag_folder, tmp_path / "folds", "--folds=3", "--repeats=2", "--epochs=1") == 0
    for row in read(tmp_path / "folds" / "bags.csv"):
        for repeat, fold in enumerate(row["fold"].split("|")):
            with np.load(tmp_path / "folds" / "parts" / f"repeat{repeat}_fold{fold}.npz") as part:
                assert row["bag"] in part["names"]
    assert command(bag_folder, tmp_path / "split", "--epochs=1") == 0
    assert "fold" not in read(tmp_path / "split" / "bags.csv")[0]


def test_command_says_that_there_are_no_patients(bag_folder, tmp_path, capsys):
    rows = [[row["bag"], row["lesion"]] for row in read(bag_folder / "labels.csv")]
    table = str(write(tmp_path / "labels.csv", ["bag", "lesion"], rows))
    assert command(bag_folder, tmp_path / "out", "--epochs=1", "--folds=2", "--labels", table) == 0
    text = "note: labels.csv has no column patient: bags of one patient may be in several folds"
    assert text in capsys.readouterr().out.splitlines()


def test_bags_without_features_are_an_error_or_are_left_out(bag_folder, tmp_path, capsys):
    rows = [[row["bag"], row["lesion"], row["patient"]] for row in read(bag_folder / "labels.csv")]
    rows[3][0], rows[30][0] = "gone.png", "lost.png"
    table = str(write(tmp_path / "labels.csv", ["bag", "lesion", "patient"], rows))
    options = (bag_folder, tmp_path / "out", "--epochs=1", "--folds=2", "--labels", table)
    assert command(*options) == 2
    assert "--allow-missing leaves out the bags without features" in capsys.readouterr().err
    assert command(*options, "--allow-missing") == 0
    text = "note: 2 bags of labels.csv have no features and are left out (gone.png, lost.png)"
    assert text in capsys.readouterr().out.splitlines()
    names = {row["bag"] for row in read(tmp_path / "out" / "bags.csv")}
    assert names == {row["bag"] for row in read(bag_folder / "labels.csv")} - {"b03", "b30"}
    # predict_features.py and compare_features.py read the same labels
    assert open_run(tmp_path / "out").labels.absent == ["gone.png", "lost.png"]
    assert len(bags_of_training(load_heads(tmp_path / "out", with_failed=True))) == 38
    none = str(write(tmp_path / "none.csv", ["bag", "lesion"], [["gone.png", 1]]))
    assert command(bag_folder, tmp_path / "no", "--folds=2", "--labels", none, "--allow-missing") == 2


def test_run_with_other_folds_is_not_continued(bag_folder, tmp_path, capsys):
    """An older version divided the bags differently: the file of a training holds other test bags."""
    options = (bag_folder, tmp_path, "--folds=2", "--epochs=1")
    assert command(*options) == 0
    first, second = (tmp_path / "parts" / f"repeat0_fold{fold}.npz" for fold in range(2))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    assert command(*options, "--resume") == 2
    assert "repeat0_fold0 tested other bags than it would now" in capsys.readouterr().err
    with pytest.raises(ValueError, match="repeat0_fold0 tested other bags"):
        open_run(tmp_path)
    first.write_bytes(content[0])
    assert command(*options, "--resume") == 0


def test_features_that_are_not_finite_are_named(bag_folder, tmp_path, capsys):
    shutil.copytree(bag_folder, tmp_path / "data")
    path = tmp_path / "data" / "features" / "features.bin"
    values = np.fromfile(path, np.float16).reshape(-1, 6)
    bags = store.FeatureBags(bag_folder / "features")
    start = sum(bags.instances(name) for name in bags.names[:2])
    values[start + 4, 2], values[start + 6, :2] = np.nan, np.inf
    values.tofile(path)
    assert command(tmp_path / "data", tmp_path / "out", "--epochs=1", "--folds=2") == 2
    text = f"b02 in {tmp_path / 'data' / 'features'}: expected finite features, found NaN or infinite ones in 2 of"
    assert f"{text} {bags.instances('b02')} instances (the first is number 4, from 0)" in capsys.readouterr().err


def test_tables_hold_every_bag_and_instance(bag_folder, tmp_path):
    assert command(bag_folder, tmp_path, "--folds", "2", "--epochs", "1") == 0
    bags = store.FeatureBags(bag_folder / "features")
    with (tmp_path / "instances.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(bags.instances(name) for name in bags.names)
    first = next(row for row in rows if row["bag"] == "b07" and row["instance"] == "2")
    np.testing.assert_allclose([float(first["x"]), float(first["y"])], bags.coords("b07")[2], rtol=1e-5)
    assert 0 <= float(first["lesion"]) <= 1
    rows = read(tmp_path / "bags.csv")
    assert len(rows) == 40
    for fold in range(2):
        with np.load(tmp_path / "parts" / f"repeat0_fold{fold}.npz") as part:
            assert sorted(part["names"]) == [
                row["bag"] for row in sorted(rows, key=lambda r: r["bag"]) if row["fold"] == str(fold)
            ]
    assert "<img" in (tmp_path / "report.html").read_text()


def test_command_names_boxes_of_no_bag_and_bags_without_an_image(timm, image_folder, tmp_path, capsys):
    given = ["--images", str(image_folder), "--out", str(tmp_path / "features"), *NETWORK]
    assert extract_features.main(given) == 0
    rows = [[f"im{k}", k % 2, ("train", "train", "test")[k]] for k in range(3)]
    write(tmp_path / "labels.csv", ["image", "lesion", "split"], rows)
    boxes = [[name, "lesion", 8, 8, 20, 20] for name in ("im1.png", "pic_1.png", "pic_2.png", "pic_2.png")]
    write(tmp_path / "boxes.csv", ["image", "label", *"xywh"], boxes)
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "im2.png").unlink()
    options = (
        tmp_path,
        tmp_path / "out",
        "--epochs=1",
        "--boxes",
        str(tmp_path / "boxes.csv"),
        "--images",
        str(images),
    )
    assert command(*options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note: 3 of 4 boxes of boxes.csv are of no bag (pic_1.png, pic_2.png)" in lines
    assert "note: 1 of 3 bags have no image in --images (im2)" in lines
    # other images with the same names
    shutil.copy(images / "im1.png", images / "im0.png")
    assert command(*options, "--resume") == 2
    text = "im0.png has 80x48 pixels, but the features of im0 are those of an image of 64x48 pixels"
    assert text in capsys.readouterr().err
    found = ["--run", str(tmp_path / "out"), "--features", str(tmp_path / "features"), "--with-failed"]
    found += ["--out", str(tmp_path / "found"), "--images"]
    assert predict_features.main([*found, str(images)]) == 2
    assert text in capsys.readouterr().err
    (images / "im0.png").unlink()
    assert predict_features.main([*found, str(images)]) == 0
    assert "note: 2 of 3 bags have no image in --images (im0, im2)" in capsys.readouterr().out.splitlines()


def test_command_names_classes_that_are_probably_mistakes(bag_folder, tmp_path, capsys):
    words = ["scratch" if int(row["lesion"]) else "ok" for row in read(bag_folder / "labels.csv")]
    words[1] = "Scratch"
    rows = [[f"b{k:02d}", word] for k, word in enumerate(words)]
    table = str(write(tmp_path / "labels.csv", ["bag", "labels"], rows))
    assert command(bag_folder, tmp_path / "out", "--epochs=1", "--folds=2", "--labels", table) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note: Scratch and scratch are two classes, because their names differ in capitals or spaces" in lines
    words[1] = "scratch"
    write(tmp_path / "labels.csv", ["bag", "labels"], [[f"b{k:02d}", word] for k, word in enumerate(words)])
    assert command(bag_folder, tmp_path / "again", "--epochs=1", "--folds=2", "--labels", table) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "exactly one of" in line]
    assert line.startswith("note: every bag or image has exactly one of ok and scratch: ")
    # words in a column of a class
    write(tmp_path / "labels.csv", ["bag", "defect"], rows)
    assert command(bag_folder, tmp_path / "words", "--epochs=1", "--folds=2", "--labels", table) == 2
    assert "a column with names of classes is called labels (none: no class)" in capsys.readouterr().err


def test_labels_of_one_kind_are_an_error(bag_folder, tmp_path, capsys):
    rows = [[row["bag"], 1] for row in read(bag_folder / "labels.csv")]
    table = str(write(tmp_path / "labels.csv", ["bag", "lesion"], rows))
    assert command(bag_folder, tmp_path / "out", "--epochs=1", "--folds=2", "--labels", table) == 2
    error = capsys.readouterr().err
    assert "labels: expected positive and negative bags of a class in a training" in error
    assert "lesion has 40 positive and 0 negative bags" in error
    # the class with both kinds is trained
    rows = [[name, 1, k % 2] for k, (name, _) in enumerate(rows)]
    write(tmp_path / "labels.csv", ["bag", "lesion", "other"], rows)
    assert command(bag_folder, tmp_path / "out", "--epochs=1", "--folds=2", "--labels", table) == 0


def test_changed_table_of_a_finished_run_is_named(bag_folder, tmp_path):
    shutil.copytree(bag_folder, tmp_path / "data")
    assert command(tmp_path / "data", tmp_path / "out", "--epochs=1", "--folds=2", "--classes=lesion") == 0
    change(tmp_path / "data" / "labels.csv", "lesion", "defect")
    with pytest.raises(ValueError, match=r"out: its table .*labels\.csv has changed: .* got lesion"):
        open_run(tmp_path / "out")
