"""examples/predict_features.py, and extract_features.py --like: a trained run on other bags, without labels."""

from __future__ import annotations

import json
import shutil

import extract_features
import feature_packages  # noqa: F401
import numpy as np
import predict_features
import pytest
import torch
import train_features
from csv_files import read, write
from features import backbones, store
from features.evaluation import boxes_of, pixels_of
from features.runs import load_predictions, predictions_of, save_predictions


def predict(run, features, out, *options):
    return predict_features.main(["--run", str(run), "--features", str(features), "--out", str(out), *options])


def means(run, names, skip=()):
    """The means over the trainings of ``run`` of the probabilities of bags (N, C) and instances, in the order names."""
    parts = [load_predictions(p) for p in sorted((run / "parts").glob("*.npz")) if p.stem not in skip]
    by_name = [dict(p.by_bag()) for p in parts]
    bags = [np.mean([p.bags[p.names.tolist().index(name)] for p in parts], 0) for name in names]
    return np.array(bags), [np.mean([one[name] for one in by_name], 0) for name in names]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 bags of 12 to 20 instances of 432 features (patches of 12 pixels), two classes; the last eight are tested."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    writer = store.StoreWriter(folder / "features", {"backbone": "pixels", "patch": 12, "points": "one"})
    rows = []
    for i in range(24):
        x = generator.random((int(generator.integers(12, 21)), 432)).astype(np.float32)
        writer.add(f"b{i:02d}", store.Bag(x, generator.uniform(0, 99, (len(x), 2)), None, None))
        rows.append([f"b{i:02d}", i % 2, i // 2 % 2, "test" if i > 15 else "train"])
    write(folder / "labels.csv", ["bag", "red", "green", "split"], rows)
    return folder


def trained(data, out, *options):
    command = ["--features", str(data / "features"), "--labels", str(data / "labels.csv"), "--out", str(out)]
    assert train_features.main([*command, "--epochs=2", "--overlays=0", "--repeats=3", *options]) == 0
    (out / "failed.json").write_text("{}")  # noise teaches nothing
    return out


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("run") / "run", "--components=5")


@pytest.mark.parametrize(
    "options",
    [
        ["--components=5"],
        ["--head=linear", "--loss=mmm"],
        ["--head=gated", "--loss=bag"],
        ["--head=patches", "--pooling=mean"],
        ["--loss=bil", "--pooling=lse"],
    ],
    ids=["mlp", "linear", "gated", "patches", "bil"],
)
def test_a_probability_is_the_mean_over_the_trainings(data, tmp_path, options):
    """The test bags of the training, as if they were new ones."""
    run = trained(data, tmp_path / "run", *options)
    assert predict(run, data / "features", tmp_path / "found") == 0
    tested = [f"b{i:02d}" for i in range(16, 24)]
    bags, instances = means(run, tested)
    found = {row["bag"]: row for row in read(tmp_path / "found" / "bags.csv")}
    assert len(found) == 24  # all bags of the folder
    shown = np.array([[float(found[name][c]) for c in ("red", "green")] for name in tested])
    np.testing.assert_allclose(shown, bags, rtol=0, atol=1e-6)
    rows = read(tmp_path / "found" / "instances.csv")
    for name, expected in zip(tested, instances, strict=True):
        own = [row for row in rows if row["bag"] == name]
        assert [int(row["instance"]) for row in own] == list(range(len(expected)))
        values = np.array([[float(row[c]) for c in ("red", "green")] for row in own])
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-6)
    # the run's own tables of its test bags hold the same means
    own = {row["bag"]: row for row in read(run / "bags.csv")}
    assert all(abs(float(own[name]["red"]) - float(found[name]["red"])) < 1e-6 for name in tested)
    assert not (tmp_path / "found" / "boxes.csv").exists()  # the bags are no maps
    write(tmp_path / "found" / "boxes.csv", ["image", "label", *"xywhp"], [["other", "red", 1, 2, 3, 4, 0.9]])
    assert predict(run, data / "features", tmp_path / "found") == 0
    assert read(tmp_path / "found" / "boxes.csv") == []
    assert (tmp_path / "found" / "report.html").read_text(encoding="utf-8").count("<h3>") == 12


def test_failed_trainings_are_left_out(data, run, tmp_path, capsys):
    tested = [f"b{i:02d}" for i in range(16, 24)]
    reason = ["bag loss 0.90, the median is 0.40"]
    failed = {"repeat1_fold0": {"red": reason, "green": reason}}
    (run / "failed.json").write_text(json.dumps(failed))
    try:
        for options, skip, words in (
            ([], failed, "2 trainings of RUN; left out, because they seem to have failed: 1 for red, 1 for green"),
            (["--with-failed"], (), "3 trainings of RUN"),
        ):
            out = tmp_path / f"found{len(options)}"
            assert predict(run, data / "features", out, *options) == 0
            assert f"24 bags, {words}".replace("RUN", str(run)) + "\n" in capsys.readouterr().out
            found = {row["bag"]: float(row["red"]) for row in read(out / "bags.csv")}
            np.testing.assert_allclose([found[n] for n in tested], means(run, tested, skip)[0][:, 0], atol=1e-6)
        # only for one class
        (run / "failed.json").write_text(json.dumps({"repeat0_fold0": {"green": reason}}))
        assert predict(run, data / "features", tmp_path / "green") == 0
        assert "3 trainings of RUN; left out, because they seem to have failed: 1 for green\n".replace(
            "RUN", str(run)
        ) in (capsys.readouterr().out)
        found = {row["bag"]: row for row in read(tmp_path / "green" / "bags.csv")}
        expected = {"red": means(run, tested)[0][:, 0], "green": means(run, tested, ("repeat0_fold0",))[0][:, 1]}
        for label, values in expected.items():
            np.testing.assert_allclose([float(found[n][label]) for n in tested], values, atol=1e-6)
        # in all trainings, for one class
        content = {f"repeat{k}_fold0": {"red": reason} for k in range(3)}
        (run / "failed.json").write_text(json.dumps(content))
        assert predict(run, data / "features", tmp_path / "red") == 0
        printed = capsys.readouterr().out
        assert "warning: all trainings seem to have failed for red: do not use" in printed and "left out" not in printed
        content = {f"repeat{k}_fold0": {"all classes": reason} for k in range(3)}
        (run / "failed.json").write_text(json.dumps(content))
        assert predict(run, data / "features", tmp_path / "none") == 2
        assert "all 3 trainings" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
    finally:
        (run / "failed.json").write_text("{}")


def test_a_training_names_its_failures_in_a_file(data, tmp_path, capsys):
    command = ["--features", str(data / "features"), "--labels", str(data / "labels.csv"), "--overlays=0"]
    assert train_features.main([*command, "--folds=2", "--epochs=1", "--out", str(tmp_path / "run")]) == 0
    named = json.loads((tmp_path / "run" / "failed.json").read_text())
    printed = capsys.readouterr().out
    assert len(named) == len({f"fold {k}" for k in range(2) if f"fold {k} (" in printed})
    reasons = [f"{text} of {label}" for one in named.values() for label, texts in one.items() for text in texts]
    assert all(text.removesuffix(" of all classes") in printed for text in reasons)
    assert set(named) <= {"repeat0_fold0", "repeat0_fold1"}


def test_a_training_without_a_positive_bag_of_a_class_is_not_used_for_it(data, tmp_path, capsys):
    """One positive bag of green: the training that tests it has none, and says nothing about this class."""
    rows = read(data / "labels.csv")
    only = next(row for row in rows if row["split"] == "train")
    table = tmp_path / "labels.csv"
    lines = [f"{row['bag']},{row['red']},{int(row is only)}" for row in rows]
    table.write_text("bag,red,green\n" + "\n".join(lines) + "\n")
    out = tmp_path / "run"
    command = ["--features", str(data / "features"), "--labels", str(table), "--overlays=0", "--epochs=1"]
    assert train_features.main([*command, "--folds=2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (fold,) = [int(row["fold"]) for row in read(out / "bags.csv") if row["bag"] == only["bag"]]
    name = f"repeat0_fold{fold}"
    assert f"warning: 1 of 2 trainings have no positive bag of green ({name})" in printed
    assert f"fold {fold} (" in printed and "trained without positive labels of green" in printed
    assert "use more labels, or fewer folds" in printed
    named = json.loads((out / "failed.json").read_text())
    assert named[name]["green"] == ["trained without positive labels"]
    (out / "failed.json").write_text(json.dumps({name: {"green": named[name]["green"]}}))  # a short training may fail
    assert predict(out, data / "features", tmp_path / "found") == 0
    found = {row["bag"]: float(row["green"]) for row in read(tmp_path / "found" / "bags.csv")}
    part = np.load(out / "parts" / f"repeat0_fold{1 - fold}.npz")  # it tested these bags
    np.testing.assert_allclose([found[n] for n in part["names"].tolist()], part["bags"][:, 1], atol=1e-6)


def test_folders_that_do_not_fit_are_errors(data, run, tmp_path, capsys):
    def message(folder, features):
        assert predict(folder, features, tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert f"found no {tmp_path / 'settings.json'}" in message(tmp_path, data / "features")
    assert "expected features (bags.csv, or files BAG.h5 or BAG.pt), found none" in message(run, tmp_path)
    for settings, words in (
        (
            {"backbone": "pixels", "patch": 13, "points": "two"},
            "has patch 13, and the features of the training have 12",
        ),
        ({"backbone": "pixels", "patch": 12, "points": False}, "has points False"),
        ({}, "has backbone None"),
    ):
        other = tmp_path / f"features{len(words)}"
        store.StoreWriter(other, settings).add("new", store.Bag(np.zeros((3, 432)), np.zeros((3, 2)), None, None))
        assert words in message(run, other)
    # other points are no other settings
    writer = store.StoreWriter(tmp_path / "wide", {"backbone": "pixels", "patch": 12, "points": "two"})
    writer.add("new", store.Bag(np.zeros((3, 400)), np.zeros((3, 2)), None, None))
    assert "features: expected 432, as in the training, got 400" in message(run, tmp_path / "wide")
    writer = store.StoreWriter(tmp_path / "empty", {"backbone": "pixels", "patch": 12, "points": "two"})
    writer.add("new", store.Bag(np.zeros((3, 432)), np.zeros((3, 2)), None, None))
    writer.add("none", store.Bag(np.zeros((0, 432)), np.zeros((0, 2)), None, None))
    assert "features: 1 bags have no instances (none)" in message(run, tmp_path / "empty")
    content = (run / "settings.json").read_text()
    old = {key: value for key, value in json.loads(content).items() if key not in ("extraction", "class_names")}
    copy = tmp_path / "old"
    copy.mkdir()
    (copy / "settings.json").write_text(json.dumps(old))
    assert "--resume" in message(copy, data / "features")
    (copy / "settings.json").write_text(json.dumps(old | {"before": "features"}))
    assert "was made by an older version; fine-tune again, into another --out" in message(copy, data / "features")
    (copy / "settings.json").write_text(content)
    shutil.copytree(run / "parts", copy / "parts")
    shutil.copy(run / "bags.csv", copy)
    assert f"({copy / 'failed.json'} is missing)" in message(copy, data / "features")
    (copy / "failed.json").write_text("{")
    assert f"{copy / 'failed.json'}: not a JSON file" in message(copy, data / "features")
    (copy / "failed.json").write_text("{}")
    (copy / "bags.csv").unlink()
    assert "is not finished" in message(copy, data / "features")


def test_bags_of_the_training_are_named(data, run, tmp_path, capsys):
    writer = store.StoreWriter(tmp_path / "some", store.FeatureBags(data / "features").settings)
    for name in ("b03", "new", "b20"):
        writer.add(name, store.Bag(np.full((2, 432), 0.5), np.zeros((2, 2)), None, None))
    assert predict(run, tmp_path / "some", tmp_path / "found") == 0
    assert f"note: 2 of these bags have the name of a bag of {run} (b03, b20): if they were" in capsys.readouterr().out
    # features without a label are no part of the run
    rows = [[f"b{i:02d}", i % 2, ("train", "test")[i // 8]] for i in range(16)]
    write(tmp_path / "few.csv", ["bag", "red", "split"], rows)
    few = ["--features", str(data / "features"), "--labels", str(tmp_path / "few.csv"), "--overlays=0", "--epochs=1"]
    assert train_features.main([*few, "--out", str(tmp_path / "few")]) == 0
    capsys.readouterr()
    assert predict(tmp_path / "few", tmp_path / "some", tmp_path / "found", "--with-failed") == 0
    assert "note: 1 of these bags have the name of a bag of" in capsys.readouterr().out
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    content = json.loads((moved / "settings.json").read_text())
    (moved / "settings.json").write_text(json.dumps(content | {"features": str(tmp_path / "absent")}))
    assert predict(moved, tmp_path / "some", tmp_path / "found") == 0
    assert "note:" not in capsys.readouterr().out


# images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Features of ten images of two sizes, and a run on them."""
    try:
        timm = backbones.import_timm()
    except ValueError as error:
        pytest.skip(str(error))
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), folder / "weights.pt")
    for part, count in (("old", 6), ("new", 4)):
        (folder / part).mkdir()
        for k in range(count):
            array = np.random.default_rng(k + count).integers(0, 256, (40, 52 + 16 * (k % 2), 3), np.uint8)
            Image.fromarray(array).save(folder / part / f"{part}{k}.png")
    rows = [[f"old{k}", k % 2, ("train", "test")[k // 4]] for k in range(6)]
    write(folder / "labels.csv", ["bag", "red", "split"], rows)
    extract = ["--images", str(folder / "old"), "--backbone", "timm/test_efficientnet", "--scales", "2", "1"]
    extract += ["--weights", f"{folder}/weights.pt", "--stages", "blocks.1", "blocks.0", "--symmetric"]
    assert extract_features.main([*extract, "--out", str(folder / "features")]) == 0
    run = ["--features", str(folder / "features"), "--labels", str(folder / "labels.csv"), "--overlays=0"]
    assert train_features.main([*run, "--epochs=20", "--share=0.5", "--repeats=2", "--out", str(folder / "run")]) == 0
    return folder


def like(photos, folder, out, *options):
    command = ["--like", str(folder), "--images", str(photos / "new"), "--out", str(out)]
    return extract_features.main([*command, *options])


@pytest.mark.parametrize("given", ["features", "run"])
def test_features_like_those_of_the_training(photos, tmp_path, given, capsys):
    weights = ["--weights", f"{photos}/weights.pt"]
    assert like(photos, photos / given, tmp_path / "new", *weights) == 0
    next_line = capsys.readouterr().out.splitlines()[-1]
    assert (
        next_line.startswith("next: python predict_features.py --run ")
        and f"--features {tmp_path / 'new'}" in next_line
    )
    assert given == "features" or f"--run {photos / 'run'} " in next_line
    one, two = store.FeatureBags(photos / "features"), store.FeatureBags(tmp_path / "new")
    assert one.settings == two.settings and one.features == two.features
    assert two.names == [f"new{k}" for k in range(4)]
    # the same image has the same features
    again = [*weights, "--images", str(photos / "old")]
    assert extract_features.main(["--like", str(photos / given), *again, "--out", str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(store.FeatureBags(tmp_path / "again")["old3"].features, one["old3"].features)


def test_options_that_contradict_like_are_errors(photos, tmp_path, capsys):
    weights = ["--weights", f"{photos}/weights.pt"]
    for options, words in (
        ([*weights, "--stages", "blocks.0"], "--like: expected without --stages"),
        ([*weights, "--symmetric"], "--like: expected without --symmetric"),
        ([*weights, "--list-stages"], "--like: expected without --list-stages"),
    ):
        with pytest.raises(SystemExit):
            like(photos, photos / "run", tmp_path / "out", *options)
        assert words in capsys.readouterr().err
    points = write(tmp_path / "points.csv", ["image", "x", "y"], [["new0", 3, 4]])
    for options, words in (
        ([], f"weights: expected --weights weights.pt, as for {photos / 'run'}, got pretrained"),
        (["--weights", "other.pt"], "weights: expected --weights weights.pt"),
        ([*weights, "--points", str(points)], "points: expected no --points"),
    ):
        assert like(photos, photos / "run", tmp_path / "out", *options) == 2
        assert words in capsys.readouterr().err
    assert like(photos, tmp_path, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_boxes_are_those_of_the_mean_maps(photos, tmp_path):
    run = photos / "run"
    assert like(photos, run, tmp_path / "new", "--weights", f"{photos}/weights.pt") == 0
    common = ["--with-failed", "--images", str(photos / "new")]
    assert predict(run, tmp_path / "new", tmp_path / "found", *common, "--gate=0", "--overlays=3") == 0
    bags = store.FeatureBags(tmp_path / "new")
    centre, stride = bags.settings["centre"] / bags.settings["stride"], bags.settings["stride"] / 2
    instances, expected = read(tmp_path / "found" / "instances.csv"), []
    for name in bags.names:
        values = [float(row["red"]) for row in instances if row["bag"] == name]
        heatmap, size = np.array(values).reshape(bags.shape(name).grid), bags.size(name)
        image = pixels_of(heatmap, size, centre, stride)
        for x, y, w, h in boxes_of(heatmap, size, centre, stride):
            p = image[int(y) : int(y + h), int(x) : int(x + w)].max()
            expected.append([name, "red", x, y, w, h, p])
            assert x + w <= size[1] and y + h <= size[0]
    found = read(tmp_path / "found" / "boxes.csv")
    assert expected and [[row["image"], row["label"]] for row in found] == [row[:2] for row in expected]
    shown = np.array([[float(row[key]) for key in "xywhp"] for row in found])
    np.testing.assert_allclose(shown, np.array([row[2:] for row in expected], float), atol=1e-3)
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 and "True boxes" not in page
    probabilities = {row["bag"]: float(row["red"]) for row in read(tmp_path / "found" / "bags.csv")}
    first = max(probabilities, key=probabilities.get)
    assert page.index(f"<h3>{first}: red") < min(
        page.index(f"<h3>{n}: red") for n in [*probabilities] if n != first and f"<h3>{n}: red" in page
    )
    # no bag above the gate: no boxes
    assert predict(run, tmp_path / "new", tmp_path / "none", *common, "--gate=0.9999") == 0
    assert read(tmp_path / "none" / "boxes.csv") == []
    # between the bags
    gate = np.median(list(probabilities.values()))
    assert predict(run, tmp_path / "new", tmp_path / "some", *common, f"--gate={gate}") == 0
    likely = {name for name, p in probabilities.items() if p > gate}
    assert {row["image"] for row in read(tmp_path / "some" / "boxes.csv")} == likely & {row["image"] for row in found}


def test_the_threshold_separates_the_test_bags_of_the_run(data, run, tmp_path, capsys):
    """The probabilities of three trainings are set. Without known labels, the threshold is 0.5, with a warning."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    rows = [["b1", 1, "", 0, 0], ["b2", 0, "", 0, 0], ["b3", 1, "", 0, 0], ["b4", 0, "", 0, 0]]
    write(copy / "bags.csv", ["bag", "label_red", "label_green", "red", "green"], rows)
    names = ["b4", "b2", "b1", "b3"]
    for repeat, p in enumerate(([0.1, 0.6, 0.9, 0.8], [0.1, 0.8, 0.9, 0.8], [0.9, 0.9, 0.1, 0.1])):
        pairs = [(np.array([q, 0.3]), np.array([[q, 0.3]])) for q in p]
        save_predictions(copy / "parts" / f"repeat{repeat}_fold0.npz", predictions_of(names, pairs))
    # without the third training halfway between 0.7 and 0.8; with all trainings b4 0.37, b2 0.77, b1 0.63, b3 0.57
    for failed, gate in (({"repeat2_fold0": {"red": ["reason"]}}, 0.75), ({}, 0.467)):
        (copy / "failed.json").write_text(json.dumps(failed))
        assert predict(copy, data / "features", tmp_path / "found") == 0
        printed = capsys.readouterr().out
        count = sum(float(row["red"]) > gate for row in read(tmp_path / "found" / "bags.csv"))
        assert f"red: p > {gate} in {count} of 24 bags\n" in printed
        assert "warning: the test bags of the run give no threshold for green: 0.5 is used" in printed
        assert "green: p > 0.5 in " in printed
    with pytest.raises(SystemExit):
        predict(run, data / "features", tmp_path / "found", "--gate=1.5")
    assert "expected a probability below 1, or run, got '1.5'" in capsys.readouterr().err


def test_nothing_is_overwritten(photos, tmp_path, capsys):
    run = photos / "run"
    assert like(photos, run, tmp_path / "new", "--weights", f"{photos}/weights.pt") == 0
    common = ["--with-failed", "--gate=0.9999"]
    for name, folder in (("run", run), ("features", tmp_path / "new"), ("images", photos / "new")):
        options = [*common, "--images", str(photos / "new")]
        assert predict(run, tmp_path / "new", folder, *options) == 2
        assert f"out: expected another folder than --{name}, got {folder}" in capsys.readouterr().err
    mine = write(tmp_path / "boxes.csv", ["image", "label", *"xywh"], [["a", "red", 1, 2, 3, 4]])
    content = mine.read_text()
    assert predict(run, tmp_path / "new", tmp_path, *common) == 2
    assert f"{mine}: not a table of predicted boxes" in capsys.readouterr().err and mine.read_text() == content
    # own results are replaced
    for _ in range(2):
        assert predict(run, tmp_path / "new", tmp_path / "found", *common) == 0
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    assert page.count("not above the threshold: without boxes") == 4
    command = ["--features", str(photos / "features"), "--labels", str(photos / "labels.csv")]
    assert train_features.main([*command, "--out", str(photos / "features")]) == 2
    assert "out: expected another folder than --features" in capsys.readouterr().err
    other = photos / "old"
    assert predict(run, tmp_path / "new", tmp_path / "found", *common, "--images", str(other)) == 2
    assert f"images: {other} holds no image of the bags" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x", "y", "bag", "instance", "label_red"])
def test_classes_with_the_name_of_a_column_of_the_results_are_errors(data, tmp_path, name, capsys):
    rows = [[f"b{i:02d}", name if i % 2 else ""] for i in range(24)]
    labels = write(tmp_path / "labels.csv", ["image", "labels"], rows)
    command = ["--features", str(data / "features"), "--labels", str(labels), "--folds=2"]
    assert train_features.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert f"classes: {name} is the name of a column" in capsys.readouterr().err
