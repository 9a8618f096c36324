"""examples/features: metrics, advice, failed trainings and the report of a run."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace

import feature_packages  # noqa: F401
import numpy as np
import pytest
from common.drawing import FOUND
from features import advice, labels, runs, store, training
from features.evaluation import (
    auc,
    bootstrap,
    box_metrics,
    box_of,
    boxes_of,
    instance_metrics,
    pixels_of,
    point_of,
)
from features.pictures import draw_map
from features.plan import Run
from features.report import write_report
from features.results import write_results
from matplotlib.colors import to_hex


def test_advice_names_the_cause_and_what_is_not_yet_used():
    history = [{"epoch": 1, "loss": 0.5, "lam": 0.0, "auc": [math.nan, 0.61]}, {"epoch": 2, "lam": 0.0, "auc": []}]
    labels = np.repeat([[math.nan, 0.0], [math.nan, 1.0]], 20, 0).astype(np.float32)
    settings = training.Settings(k_start=0.2, restarts=4)
    text = advice.lam_advice([history, [], [{"lam": 0.5, "auc": [0.9]}]], [labels] * 3, settings)
    assert "lam stayed 0 in 1 of 3 runs" in text
    assert "In the best epoch of these runs, this AUC was 0.610; it needs 0.800." in text
    # features of other programs have no stages
    other = advice.lam_advice([history], [labels], settings, extracted=False)
    assert "use the features of another network" in other and "--stages" not in other
    few = advice.lam_advice([history], [labels[17:23]], settings)
    assert "too few training bags" in few and "--epochs" not in few
    counts = [int(number) for number in re.findall(r"(\d+) positive and (\d+) negative", few)[0]]
    more = [int(number) for number in re.findall(r"or (\d+) and (\d+)", few)[0]]
    for positive, negative in (counts, more):
        for fewer in (0, 1):
            targets = np.repeat([[1.0], [0.0]], [positive - fewer, negative], 0).astype(np.float32)
            assert advice.can_learn(targets, settings.start_auc) == (not fewer)
    assert advice.lam_advice([[{"lam": 0.5, "auc": [0.9]}, {"lam": 1.0, "auc": [0.9]}]], [labels], settings) is None


def test_metrics_of_instances_are_nan_without_a_positive_instance():
    """A class that no instance label names has no IoU: 0 would mean that its instances are not found."""
    p = [np.array([0.9, 0.2]), np.array([0.8])]
    found = instance_metrics(p, [np.zeros(2), np.zeros(1)], [True, False])
    assert all(math.isnan(found[key]) for key in ("auc", "ap", "iou", "auc_all"))
    found = instance_metrics(p, [np.zeros(2), np.ones(1)], [True, True])
    assert found["iou"] == 0.5 and found["auc"] == 0.5


def test_advice_names_boxes_of_another_size():
    def advised(ratio, found=0.1, images=20, **options):
        values = {"images": images, "iou_0.3": found, "area_ratio": ratio}
        return advice.box_size_advice({"cat": values, "dog": {"auc": 1.0}}, training.Settings(**options))

    (text,) = advised(5.2)
    assert "The predicted boxes of cat are too large: the median of their area is 5.2 times that" in text
    assert "--threshold 0.8" in text and "an earlier stage" in text and "--loss bag" in text
    assert "--loss bag" not in advised(5.2, loss="bag")[0]
    (text,) = advised(0.1)
    assert "too small" in text and "--threshold 0.3" in text and "stage" not in text
    assert advised(2.9) == advised(0.4) == advised(9.0, found=0.6) == advised(9.0, images=7) == []
    values = {"cat": {"images": 20, "iou_0.3": 0.1, "area_ratio": 5.0}}
    assert "an earlier stage" not in advice.box_size_advice(values, training.Settings(), extracted=False)[0]


def deciding(aucs, labels, start_auc=0.8):
    """The AUC that the advice names, and the AUC that is needed; None if it names none."""
    history = [{"epoch": 1, "lam": 0.0, "auc": values} for values in aucs]
    text = advice.lam_advice([history], [np.array(labels, np.float32)], training.Settings(start_auc=start_auc))
    found = re.search(r"(this AUC|the AUC of the class that decides) was ([\d.]+); it needs ([\d.]+)\.", text)
    return found and (float(found[2]), float(found[3]))


def test_advice_names_the_auc_that_decides_and_the_needed_one():
    many = np.repeat([[0.0], [1.0]], 100, 0)
    assert deciding([[0.5], [0.77], [0.7]], many) == (0.77, 0.8)
    # with few bags, more than --start-auc: 1/2 + 3 sqrt(17 / (12 * 64))
    assert deciding([[0.9]], np.repeat([[0.0], [1.0]], 8, 0)) == (0.9, 0.946)
    # the better half of the classes: the second of three or four, the first of two
    assert deciding([[0.9, 0.7, 0.6]], np.tile(many, 3)) == (0.7, 0.8)
    assert deciding([[0.5, 0.9, 0.6, 0.7]], np.tile(many, 4)) == (0.7, 0.8)
    assert deciding([[0.6, 0.7]], np.tile(many, 2)) == (0.7, 0.8)
    # a class with three positive bags does not count, even if its AUC is 1
    rare = np.where(np.arange(200) < 3, 1.0, 0.0)[:, None]
    assert deciding([[0.61, 1.0]], np.concatenate([many, rare], 1)) == (0.61, 0.8)
    assert deciding([[]], many) is None


def test_lam_that_does_not_reach_its_value_is_named():
    runs = [[{"lam": 0.1, "auc": [1.0]}, {"lam": last, "auc": [1.0]}] for last in (0.3, 1.0, 0.25)]
    labels = np.repeat([[0.0], [1.0]], 20, 0).astype(np.float32)
    text = advice.lam_advice(runs, [labels] * 3, training.Settings(rise=100))
    assert "lam did not reach its value of 1 in 2 of 3 runs: it ended at 0.25 to 0.3. " in text
    assert "a smaller --rise" in text
    assert advice.lam_advice(runs, [labels] * 3, training.Settings(lam=0.25)) is None
    assert advice.lam_advice(runs, [labels] * 3, training.Settings(loss="bag")) is None


def training_rows(*trainings):
    """Rows of trainings with 12 positive and 12 negative test bags; each argument: AUC, and fraction of boxes hit."""
    counts = {"repeat": 0, "class": "cat", "positive": 12, "negative": 12, "images": 12}
    return [counts | {"fold": fold, "auc": value, "iou_0.1": hit} for fold, (value, hit) in enumerate(trainings)]


def failure_text(rows, history, settings):
    return advice.failure_advice(advice.failures(rows, history, settings), rows, settings, True)


def failures(rows, losses, **options):
    history = {(0, fold): [{"loss": 9.0, "bag_loss": loss}] for fold, loss in enumerate(losses)}
    settings = replace(training.Settings(k_start=0.2, restarts=4), **options)
    text = failure_text(rows, history, settings)
    return text, [] if text is None else re.findall(r"fold (\d)", text)


def test_trainings_that_seem_to_have_failed_are_named_with_the_reason():
    good = training_rows((0.9, 0.8), (0.85, 0.6), (0.8, 0.7), (0.9, 0.9))
    assert failures(good, [0.4, 0.42, 0.38, 0.44]) == (None, [])
    # each sign alone
    text, named = failures(good, [0.4, 0.42, 0.38, 0.5])
    assert named == ["3"] and "1 of 4 trainings: fold 3 (bag loss 0.50, the median is 0.40)" in text
    assert "--restarts" not in text and "--k-start" not in text and "--repeats" in text
    # near 0, a loss says nothing
    assert failures(good, [0.04, 0.042, 0.038, 0.06]) == (None, [])
    # two of four: the lower median
    assert failures(good, [0.4, 0.5, 0.38, 0.5])[1] == ["1", "3"]
    text, named = failures(training_rows((0.9, 0.8), (0.6, 0.6), (0.8, 0.7), (0.9, 0.0)), [0.4] * 4)
    assert named == ["1", "3"] and "fold 1 (test AUC 0.60, not clearly above chance)" in text
    assert "fold 3 (no box overlaps a true box in 12 images)" in text
    # without the search for small objects, the advice is to use it
    assert "--k-start 0.2 --restarts 4 --trial-epochs 30" in failures(good, [0.4, 0.4, 0.4, 0.5], restarts=1)[0]
    # the whole loss of SGL is not compared, and two trainings are too few
    history = {(0, fold): [{"loss": loss}] for fold, loss in enumerate([0.4, 0.4, 0.4, 0.9])}
    assert failure_text(good, history, training.Settings()) is None
    assert "fold 3" in failure_text(good, history, training.Settings(loss="bag"))
    assert failures(good[:2], [0.4, 0.9]) == (None, [])
    # few test bags say little
    few = [row | {"positive": 4, "images": 4} for row in training_rows((0.5, 0.0))]
    assert failures(few, [0.4]) == (None, [])


def test_chance_is_that_of_random_orders():
    """5 % of random orders of the test bags have an AUC that is called above chance."""
    generator = np.random.default_rng(0)
    target = np.repeat([1.0, 0.0], [22, 16])
    values = [auc(generator.permutation(38).astype(float), target) for _ in range(4000)]
    row = {"positive": 22, "negative": 16}
    above = np.mean([not advice._signs(row | {"auc": value}) for value in values])
    assert 0.04 < above < 0.06


def test_report_says_how_often_the_boxes_are_right(tmp_path, capsys):
    """Two folds: an image whose predicted box is right, and an image whose predicted box misses the true box."""
    writer = store.StoreWriter(tmp_path / "features", {"stride": 16, "centre": 8.0})
    for name in ("a", "b"):
        writer.add(name, store.Bag(np.zeros((16, 1), np.float32), None, (4, 4), (64, 64)))
    p = np.zeros((16, 1), np.float32)
    p[5] = 0.9
    box = box_of(p.reshape(4, 4).astype(float), (64, 64), 0.5)[None]
    known = labels.Labels(["a", "b"], ["cat"], np.ones((2, 1), np.float32), None, np.array(["a", "b"]))
    truth = runs.Truth(known, {}, {"cat": {"a": box, "b": box + np.array([20.0, 0.0, 0.0, 0.0])}})
    planned = [Run(0, fold, np.array([1 - fold]), np.array([fold])) for fold in range(2)]
    (tmp_path / "parts").mkdir()
    for run, name in zip(planned, ("a", "b"), strict=True):
        found = runs.Predictions(np.array([name]), np.array([[0.9]], np.float32), p, np.array([0, 16]))
        runs.save_predictions(tmp_path / "parts" / f"{run.name}.npz", found)
    bags = store.FeatureBags(tmp_path / "features")
    write_results(tmp_path, planned, truth, bags, None, 2, "Loss: sgl", training.Settings(), [[]] * len(planned))
    page = (tmp_path / "report.html").read_text()
    assert (
        "2 test images have true boxes of cat. In 1 of them (50%), the predicted box overlaps a true box with IoU &gt; "
        "0.3 (folds: 0% to 100%). The 95 % interval is 0% to 100% if other images are tested with the same networks."
    ) in page
    assert "Loss: sgl; 2 trainings (2 folds, 1 repeat); each image is tested once." in page and "Each fold" in page
    assert re.findall("<h3>(.*?)</h3>", page) == ["a (fold 0)", "b (fold 1)"]
    assert "image AUC" in page and "bag" not in page.split("<h1>")[1].split("<h2>The first")[0]
    assert "iou_0.3 0.500 (folds: 0.000 to 1.000)" in capsys.readouterr().out
    with (tmp_path / "folds.csv").open() as file:
        assert [(row["fold"], row["iou_0.3"]) for row in csv.DictReader(file)] == [("0", "1.0"), ("1", "0.0")]
    # a second repeat that finds no box: the mean over the repeats, and its interval
    second = [run._replace(repeat=1) for run in planned]
    for run, name in zip(second, ("a", "b"), strict=True):
        found = runs.Predictions(np.array([name]), np.array([[0.1]], np.float32), 0 * p, np.array([0, 16]))
        runs.save_predictions(tmp_path / "parts" / f"{run.name}.npz", found)
    write_results(
        tmp_path, planned + second, truth, bags, None, 2, "Loss: sgl", training.Settings(), [[]] * len(planned + second)
    )
    page = (tmp_path / "report.html").read_text()
    assert (
        "2 test images have true boxes of cat. On average over the repeats, the predicted box overlaps a true box with "
        "IoU &gt; 0.3 in 25% of these images (repeats: 0% to 50%; folds: 0% to 100%). The 95 % interval is 0% to 50%"
    ) in page
    assert "4 trainings (2 folds, 2 repeats); each image is tested 2 times." in page
    assert re.findall("<h3>(.*?)</h3>", page) == ["a (fold 0 of repeat 0)", "b (fold 1 of repeat 0)"]


def test_failed_training_is_named_in_the_report_and_on_the_terminal(tmp_path, capsys):
    """Fold 0 separates its 8 positive and 8 negative bags; fold 1 gives all of them the same probability."""
    names = np.array([f"b{k:02d}" for k in range(32)])
    values = (np.arange(32) % 2).astype(np.float32)[:, None]
    truth = runs.Truth(labels.Labels(names.tolist(), ["cat"], values, None, names), {}, {})
    writer = store.StoreWriter(tmp_path / "features", {})
    for name in names:
        writer.add(name, store.Bag(np.zeros((1, 1), np.float32), None, None, None))
    (tmp_path / "parts").mkdir()
    planned = [Run(0, fold, np.arange(16) + 16 * (1 - fold), np.arange(16) + 16 * fold) for fold in range(2)]
    for run, score in zip(planned, (values[:16], np.full((16, 1), 0.5)), strict=True):
        found = runs.Predictions(names[run.test], score, score, np.arange(17))
        runs.save_predictions(tmp_path / "parts" / f"{run.name}.npz", found)
    bags = store.FeatureBags(tmp_path / "features")
    write_results(tmp_path, planned, truth, bags, None, 1, "Loss: sgl", training.Settings(), [[]] * len(planned))
    text = "The network seems not to have found the object in 1 of 2 trainings: fold 1 (test AUC 0.50, not clearly"
    assert f"warning: {text}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert text in page and "2 trainings (2 folds, 1 repeat); each bag is tested once." in page


def test_pictures_of_the_report_come_from_every_fold_in_turn(tmp_path):
    writer = store.StoreWriter(tmp_path / "features", {})
    names = [f"b{k}" for k in range(9)]
    for name in names:
        writer.add(name, store.Bag(np.zeros((4, 1), np.float32), None, (2, 2), (8, 8)))
    values = np.array([[1.0], [1], [1], [1], [0], [1], [1], [0], [1]], np.float32)
    truth = runs.Truth(labels.Labels(names, ["cat"], values, None, np.array(names)), {}, {})
    parts = []
    for part in ([3, 1, 0, 2], [4, 5], [7, 8, 6]):
        n = len(part)
        found = np.array(names)[part], np.full((n, 1), 0.5), np.zeros((4 * n, 1)), 4 * np.arange(n + 1)
        parts.append(runs.Predictions(*found))
    rows = [{"repeat": 0, "fold": k, "class": "cat"} for k in range(3)]
    write_report(tmp_path, parts, truth, store.FeatureBags(tmp_path / "features"), {}, None, 6, "text", rows)
    found = re.findall("<h3>(.*?)</h3>", (tmp_path / "report.html").read_text())
    assert found == ["b0 (fold 0)", "b5 (fold 1)", "b6 (fold 2)", "b1 (fold 0)", "b8 (fold 2)", "b2 (fold 0)"]


def test_every_box_of_a_map_is_drawn_and_the_evaluated_one_is_the_thickest():
    from matplotlib.figure import Figure

    heatmap = np.zeros((6, 6))
    heatmap[1, 1], heatmap[4, 4], heatmap[4, 0] = 0.7, 0.9, 0.4
    axes = Figure().subplots()
    draw_map(axes, heatmap, (96, 96), 0.5)
    frames = [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == FOUND]
    places = [[*frame.get_xy(), frame.get_width(), frame.get_height()] for frame in frames]
    assert places == boxes_of(heatmap, (96, 96), 0.5).tolist() and len(places) == 2
    assert places[0] == box_of(heatmap, (96, 96), 0.5).tolist()
    assert frames[0].get_linewidth() > frames[1].get_linewidth()


def test_pixels_of_a_picture_lie_where_boxes_and_points_have_them():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_map(axes, np.full((6, 6), 0.9), (96, 128), 0.5)
    (layer,) = axes.images
    assert layer.get_extent() == [0, 128, 96, 0]  # the box of the whole image is its edge
    (frame, *_) = [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == FOUND]
    assert [*frame.get_xy(), frame.get_width(), frame.get_height()] == [0, 0, 128, 96]


def test_interval_of_the_auc_is_that_of_the_mean_over_the_repeats(tmp_path):
    """The repeats rank the bags differently. Their mean score separates the bags better than each repeat does."""
    generator = np.random.default_rng(3)
    names = np.array([f"b{k:02d}" for k in range(60)])
    values = (np.arange(60) % 2).astype(np.float32)[:, None]
    truth = runs.Truth(labels.Labels(names.tolist(), ["cat"], values, None, names), {}, {})
    writer = store.StoreWriter(tmp_path, {})
    for name in names:
        writer.add(name, store.Bag(np.zeros((1, 1), np.float32), None, None, None))
    bags, repeats, scores = store.FeatureBags(tmp_path), [], []
    for _ in range(5):
        score = values[:, 0] + generator.normal(0, 1.2, 60)
        order = generator.permutation(60)
        scores.append(score)
        repeats.append([runs.Predictions(names[order], score[order, None], np.zeros((60, 1)), np.arange(61))])
    result = runs.summary(repeats, truth, bags)[0]["cat"]
    pairs = [(score[values[:, 0] == 1, None] > score[values[:, 0] == 0]).mean() for score in scores]
    assert result["auc"] == pytest.approx(np.mean(pairs))
    # an own bootstrap, with other samples
    samples = generator.integers(60, size=(4000, 60))
    own = [np.mean([auc(score[rows], values[rows, 0]) for score in scores]) for rows in samples]
    assert [result["auc_low"], result["auc_high"]] == pytest.approx(np.quantile(own, [0.025, 0.975]), abs=0.015)
    assert abs((result["auc_low"] + result["auc_high"]) / 2 - result["auc"]) < 0.02
    # and the AUC of the mean probabilities, which is larger
    assert result["of_means"]["auc"] == pytest.approx(auc(np.mean(scores, 0), values[:, 0]))
    assert result["of_means"]["auc"] > result["auc"] + 0.05
    assert "of_means" not in runs.summary(repeats[:1], truth, bags)[0]["cat"]


def test_mean_probabilities_have_own_metrics_in_the_report(tmp_path, capsys):
    """Two repeats list the bags in different orders. Each box is right in one of them; the mean map has both."""
    writer = store.StoreWriter(tmp_path / "features", {})
    for name in ("a", "b"):
        writer.add(name, store.Bag(np.zeros((4, 1), np.float32), np.zeros((4, 2)), (2, 2), (20, 20)))
    bags = store.FeatureBags(tmp_path / "features")
    corner = {"cat": {"a": np.array([[0.0, 0.0, 10.0, 10.0]]), "b": np.array([[0.0, 0.0, 10.0, 10.0]])}}
    values = np.array([[1], [1]], np.float32)
    truth = runs.Truth(labels.Labels(["a", "b"], ["cat"], values, None, np.array(["a", "b"])), {}, corner)
    right, wrong, unsure = [0.9, 0, 0, 0], [0, 0, 0, 0.7], [0.3, 0, 0, 0.1]
    (tmp_path / "parts").mkdir()
    planned = []
    for repeat, names in enumerate((["a", "b"], ["b", "a"])):
        planned.append(Run(repeat, 0, np.array([0]), np.array([0, 1])))
        found = [
            (np.array([0.5]), np.array(cells)[:, None]) for cells in ((right, wrong) if repeat else (right, unsure))
        ]
        runs.save_predictions(tmp_path / "parts" / f"{planned[-1].name}.npz", runs.predictions_of(names, found))
    settings = training.Settings(loss="bag")
    write_results(tmp_path, planned, truth, bags, None, 0, "Loss: bag", settings, [[]] * len(planned))
    # means: a (0.9 + 0.0, 0.7) / 2, b (0.3 + 0.9, 0.1) / 2: the maximum is right in both
    result = json.loads((tmp_path / "metrics.json").read_text())["cat"]
    assert result["pointing"] == 0.75 and result["of_means"]["pointing"] == 1
    assert "cat, mean probabilities: " in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>cat, mean probabilities</th>" in page and "Mean probabilities: the metrics of the mean" in page
    with (tmp_path / "instances.csv").open() as file:
        means = [[row["bag"], float(row["cat"])] for row in csv.DictReader(file)]
    expected = [0.45, 0, 0, 0.35, 0.6, 0, 0, 0.05]
    assert [name for name, _ in means] == list("aaaabbbb")
    assert [p for _, p in means] == pytest.approx(expected)


def test_auc_within_the_folds_is_shown(tmp_path, capsys):
    """Both folds separate their bags, but all probabilities of fold 1 are lower than those of fold 0."""
    names = np.array([f"b{k}" for k in range(8)])
    values = (np.arange(8) % 2).astype(np.float32)[:, None]
    truth = runs.Truth(labels.Labels(names.tolist(), ["cat"], values, None, names), {}, {})
    writer = store.StoreWriter(tmp_path / "features", {})
    for name in names:
        writer.add(name, store.Bag(np.zeros((1, 1), np.float32), None, None, None))
    (tmp_path / "parts").mkdir()
    planned = [Run(0, fold, np.arange(4) + 4 * (1 - fold), np.arange(4) + 4 * fold) for fold in range(2)]
    for run in planned:
        score = 0.1 * values[run.test] + 0.5 - 0.3 * run.fold
        runs.save_predictions(
            tmp_path / "parts" / f"{run.name}.npz", runs.Predictions(names[run.test], score, score, np.arange(5))
        )
    bags = store.FeatureBags(tmp_path / "features")
    write_results(tmp_path, planned, truth, bags, None, 1, "Loss: sgl", training.Settings(), [[]] * len(planned))
    assert "cat: auc 0.750 (folds: 1.000 to 1.000), auc_of_folds 1.000" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<th>AUC in folds</th>") == 1 and "AUC in folds: the mean" in page


def test_instance_metrics_equal_a_calculation_by_hand():
    found = [np.array([0.9, 0.2, 0.6]), np.array([0.8, 0.1])]
    truth = [np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.0])]
    result = instance_metrics(found, truth, [True, False])
    assert result["iou"] == pytest.approx(1 / 3)
    assert result["auc"] == 0.5  # 0.9 above 0.6, 0.2 below
    assert result["ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["auc_all"] == pytest.approx(4 / 6)


def test_box_metrics_equal_a_calculation_by_hand():
    """One cell of 8x8 that equals the true box, and one beside it."""
    maps = {"hit": np.zeros((8, 8)), "miss": np.zeros((8, 8)), "negative": np.ones((8, 8))}
    maps["hit"][2, 3] = maps["miss"][6, 6] = 1.0
    truth = {"hit": np.array([[24.0, 16, 8, 8]]), "miss": np.array([[0.0, 0, 8, 8], [8, 8, 8, 8]])}
    result = box_metrics(maps, dict.fromkeys(maps, (64, 64)), truth, 0.5)
    assert (result["images"], result["pointing"], result["iou_0.5"]) == (2, 0.5, 0.5)
    areas = [np.prod(box_of(maps[name], (64, 64), 0.5)[2:]) / 64 for name in truth]  # the true boxes have 64 pixels
    assert result["area_ratio"] == pytest.approx(np.mean(areas)) and min(areas) > 0


def test_maps_of_an_unknown_extraction_divide_the_image_evenly(tmp_path):
    store.StoreWriter(tmp_path, {}).add("b", store.Bag(np.zeros((4, 1), np.float32), None, (2, 2), (9, 9)))
    assert runs.cells_of(store.FeatureBags(tmp_path)) == (0.5, None)
    heatmap = np.array([[0.0, 1.0], [0.0, 0.0]])
    assert point_of(heatmap, (9, 9), 0.5) == (6.75, 2.25)
    assert pixels_of(heatmap, (9, 9), 0.5).shape == (9, 9)


def test_boxes_and_points_lie_in_the_image():
    """Three columns at a stride of 16 in an image of 36 pixels: the centre of the last one is beyond the edge."""
    heatmap = np.array([[0.0, 0.0, 1.0]])
    assert point_of(heatmap, (16, 36), 0.5, 16) == (35.5, 8)
    assert box_of(heatmap, (16, 36), 0.5, 16).tolist() == [32, 0, 4, 16]
    assert np.isnan(box_of(heatmap, (16, 32), 0.5, 16)).all()


def test_the_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: values[rows].mean(), 400)
    assert abs((high - low) / 2 - 1.96 / math.sqrt(400)) < 0.02
    assert low < values.mean() < high
