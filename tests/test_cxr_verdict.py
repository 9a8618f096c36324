"""The verdict of a report, the tables of the paper, and confidence intervals of differences."""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import pytest
from common.choices import UPSAMPLING
from images import evaluation, nih, paper, prediction, thresholds, verdict
from images import truth as truth_module
from images.dataset import Index
from images.metrics import auc_difference_interval, auc_intervals, auc_per_class, difference_intervals, mean_intervals
from images.nih import CLASSES

from sgl_ops import localization

MASS, NODULE = CLASSES.index("Mass"), CLASSES.index("Nodule")


def test_option_names_are_those_of_the_library():
    assert UPSAMPLING == localization.UPSAMPLING


def test_means_of_the_paper_are_those_of_its_rows():
    """The module documents the one exception."""
    rows = {("AUC", name): row for name, row in paper.AUC.items()}
    rows |= {(t, name): row for name, table in paper.LOCALIZATION.items() for t, row in table.items()}
    assert len(rows) == 4 + 16
    for key, row in rows.items():
        *values, mean = row.values()
        near = abs(np.mean(values) - mean) <= 0.01
        assert near == (key != ("0.1", "Liu et al. 2019")), key
    assert {tuple(row) for key, row in rows.items() if key[0] == "AUC"} == {(*CLASSES, "mean")}
    assert {len(row) for key, row in rows.items() if key[0] != "AUC"} == {9}
    assert {name for _, name in rows if name.endswith("*")} == {"Li et al. 2018 *", "Liu et al. 2019 *"}
    assert [paper.LOCALIZATION["SGL (paper)"][t]["Cardiomegaly"] for t in ("0.1", "0.3", "0.5", "0.7")] == [
        0.94, 0.76, 0.32, 0.01
    ]  # fmt: skip


def test_a_threshold_below_1_is_not_shown_as_1():
    shown = {0.5: "0.5", 0.8125: "0.812", 0.999: "0.999", 0.99996: "1 - 4e-05", 1 - 2**-20: "1 - 9.5e-07", 1.0: "1"}
    assert {value: thresholds.shown(value) for value in shown} == shown
    assert thresholds.shown(thresholds.Relative(0.5)) == "0.5max"


def test_thresholds_are_parsed():
    assert thresholds.map_threshold("0.25") == 0.25
    assert not isinstance(thresholds.map_threshold("0.25"), thresholds.Relative)
    half = thresholds.map_threshold("0.50max")
    assert isinstance(half, thresholds.Relative)
    assert (float(half), str(half), f"{half}") == (0.5, "0.5max", "0.5max")
    assert thresholds.map_threshold("validation") == thresholds.probability("validation") == "validation"
    assert thresholds.probability("0") == 0
    for text in ("1", "1max", "-0.1", "-0.1max", "nan", "nanmax", "max", "half", "0.5 max max"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"0\.5max, or validation, got"):
            thresholds.map_threshold(text)
    with pytest.raises(argparse.ArgumentTypeError, match="probability below 1"):
        thresholds.probability("0.5max")


def test_interval_of_a_difference_equals_a_calculation_by_hand():
    """Each patient has one box, and only one of the two methods finds 30 of the 40 boxes."""
    patients = np.arange(40)
    values = np.repeat([1.0, 0.0], [30, 10])[:, None] * [[1, 0, -1]]
    above, none, below = difference_intervals(values, np.zeros(40, int), patients, 2000, 0)
    assert 0.55 < above.low < 0.75 < above.high < 0.95
    assert none == (0, 0)
    assert below == pytest.approx((-above.high, -above.low))
    # if one method finds nothing, it is the interval of a fraction
    names = ["a"]
    share = mean_intervals(values[:, 0], np.zeros(40, int), patients, names, 2000, 1)["mean"]
    assert share == pytest.approx(above, abs=0.03)
    # the bootstrap draws whole patients: ten equal boxes in each of four patients give a wider interval
    wide = difference_intervals(values, np.zeros(40, int), patients // 10, 2000, 0)[0]
    assert wide.high - wide.low > 1.5 * (above.high - above.low)
    # a class that is missing from a draw changes as the others do, so that every draw counts
    rare = np.where(patients == 0, 1, 0)
    assert not math.isnan(difference_intervals(values, rare, patients, 200, 0)[0].low)


def test_interval_of_a_difference_of_aucs_is_paired():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 2)) < 0.4).astype(float)
    good, bad = labels + rng.normal(size=(300, 2)), labels / 4 + rng.normal(size=(300, 2))
    patients = np.arange(300)
    ahead = auc_difference_interval(good, bad, labels, patients, 200, 0)
    mean = [auc_per_class(scores, labels, ["a", "b"])["mean"] for scores in (good, bad)]
    assert 0 < ahead.low < mean[0] - mean[1] < ahead.high
    assert auc_difference_interval(bad, good, labels, patients, 200, 0) == pytest.approx((-ahead.high, -ahead.low))
    assert auc_difference_interval(good, good, labels, patients, 200, 0) == (0, 0)
    # paired, so narrower than from two independent intervals
    width = sum(high - low for low, high in (
        auc_intervals(scores, labels, patients, ["a", "b"], 200, 0)["mean"] for scores in (good, bad)
    ))  # fmt: skip
    assert ahead.high - ahead.low < width


def truth_with(boxes: np.ndarray) -> truth_module.Truth:
    """One image and one patient per box; the classes Mass and Nodule alternate."""
    count = len(boxes)
    classes = np.tile([MASS, NODULE], count)[:count]
    labels = np.zeros((count, len(CLASSES)))
    labels[np.arange(count), classes] = 1
    square = np.tile([0, 0, 1024, 1024], (count, 1))
    return truth_module.Truth(
        Index(nih.DESCRIPTION, [], labels, np.arange(count), np.ones(count, bool), [], {}, square[:, 2:], []),
        np.arange(count), [str(k) for k in range(count)], [], labels, np.arange(count), square[:, 2:], square,
        np.arange(count), classes, list(boxes[:, None]),
    )  # fmt: skip


def run_with(name: str, truth: truth_module.Truth, found: np.ndarray, score: np.ndarray) -> evaluation.Evaluated:
    """A run with the predicted boxes ``found`` (k, 4) and the probabilities ``score`` (n, C)."""
    overlaps = truth.overlaps(found)
    count = len(truth.boxes)
    predictions = prediction.Predictions(
        score, score, [np.zeros((8, 8))] * count, 0.5, np.tile([0, 0, 64, 64], (count, 1)), 64
    )
    accuracy = localization.localization_accuracy(overlaps, truth.classes, CLASSES)
    metrics = {
        "auc": auc_per_class(score, truth.labels, CLASSES),
        "auc_ci": auc_intervals(score, truth.labels, truth.patients, CLASSES, 50, 0),
        "localization": accuracy,
        "localization_ungated": accuracy,
    }
    return evaluation.Evaluated(
        name, {"image_size": 64}, predictions, found, overlaps, np.ones(count, bool), metrics, {}
    )


def sentences_of(runs, truth):
    return verdict.verdict(runs, truth, verdict.compare_boxes(runs, truth, 200, 0), 200, 0)


def test_verdict_if_a_run_finds_everything():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 900, (60, 2)), rng.uniform(40, 120, (60, 2))], axis=1)
    truth = truth_with(boxes)
    good = run_with("good", truth, boxes, truth.labels)
    sentences = sentences_of([good], truth)
    assert sentences[0] == (
        "Good classifies with a mean AUC of 1.00 (95 % interval 1.00 to 1.00); above chance (0.5) in 2 of 2 classes."
    )
    assert "At IoU > 0.3, good finds 100 % of the boxes (mean over the classes), and 100 % if the class" in sentences[1]
    assert sentences[2] == (
        "Good is better than the whole image (at every IoU), the centre box (at every IoU) and the mean box of the "
        "class (at every IoU)."
    )
    assert not [line for line in sentences if "is not better" in line]
    assert sentences[-1] == "There are only 60 boxes: the intervals are wide."


def test_verdict_if_the_centre_box_is_better():
    """All boxes are in the centre, and the run finds none of them."""
    boxes = np.tile([256.0, 256, 512, 512], (120, 1)) + np.random.default_rng(0).uniform(-9, 9, (120, 4))
    truth = truth_with(boxes)
    scores = np.random.default_rng(1).random((120, len(CLASSES)))
    blind = run_with("blind", truth, np.full((120, 4), math.nan), scores)
    sentences = sentences_of([blind], truth)
    assert not [line for line in sentences if "is better" in line]
    (line,) = [line for line in sentences if "is not better" in line]
    assert "the centre box (at every IoU, clearly worse at every IoU)" in line
    assert "the whole image (at every IoU, clearly worse at IoU > 0.1)" in line  # above IoU 1/4, both find none
    assert not [line for line in sentences if "only" in line]


def test_verdict_compares_two_runs():
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 700, (120, 2)), rng.uniform(150, 250, (120, 2))], axis=1)
    truth = truth_with(boxes)
    half = boxes * [1, 1, 0.7, 0.7]  # IoU 0.49
    scores = [truth.labels + rng.normal(0, spread, truth.labels.shape) for spread in (0.3, 3.0)]
    one, other = run_with("one", truth, boxes, scores[0]), run_with("other", truth, half, scores[1])
    sentences = sentences_of([one, other], truth)
    assert any(line.startswith("One classifies better than other (difference +0.") for line in sentences)
    assert "One finds more boxes than other at IoU > 0.5 and 0.7." in sentences
    sentences = sentences_of([other, one], truth)
    assert any(line.startswith("One classifies better than other (difference -0.") for line in sentences)
    assert "Other finds fewer boxes than one at IoU > 0.5 and 0.7." in sentences
    same = one._replace(name="twin")
    sentences = sentences_of([one, same], truth)
    assert any(
        line.startswith("The AUCs of one and twin are not clearly different (difference +0.000") for line in sentences
    )
    assert "The boxes of one and twin are not clearly different at any IoU." in sentences
    json.dumps(sentences)


def test_verdict_without_boxes():
    truth = truth_with(np.zeros((0, 4)))._replace(
        labels=np.eye(len(CLASSES)), patients=np.arange(len(CLASSES)), rows=np.arange(len(CLASSES))
    )
    run = run_with("run", truth, np.zeros((0, 4)), np.eye(len(CLASSES)))
    first, second = verdict.verdict([run], truth, [], 20, 0)
    assert first.startswith("Run classifies with a mean AUC of 1.00 (95 % interval 1.00 to 1.00).")
    assert second.startswith("The AUC of Atelectasis, ") and second.endswith(
        "fewer than 10 patients with it, or without it."
    )


def test_verdict_at_chance_calls_no_run_better():
    """The boxes are perfect, and the probabilities are random: "is better" and "finds more" would mislead."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0, 700, (120, 2)), rng.uniform(150, 250, (120, 2))], axis=1)
    truth = truth_with(boxes)
    scores = rng.random(truth.labels.shape)
    low, high = auc_intervals(scores, truth.labels, truth.patients, CLASSES, 50, 0)["mean"]
    assert low < 0.5 < high
    chance = run_with("chance", truth, boxes, scores)
    none = np.full_like(boxes, math.nan)
    for runs in (
        [chance],
        [chance, run_with("other", truth, none, scores)],
        [run_with("other", truth, none, scores), chance],
    ):
        sentences = sentences_of(runs, truth)
        assert any(line.startswith("Chance classifies") and "not above chance (0.5)." in line for line in sentences)
        assert (
            "The AUC of chance is not above chance, so that its boxes are no evidence that it finds the classes."
            in sentences
        )
        claims = ("is better", "finds more", "finds fewer", "classifies better")
        assert not [line for line in sentences if any(claim in line for claim in claims)]
    # below chance, the other run has a higher AUC, but not one above chance
    below = run_with("below", truth, none, scores - truth.labels)
    (line,) = [line for line in sentences_of([below, chance], truth) if "has a higher AUC" in line]
    assert line.startswith("Chance has a higher AUC than below, but is not above chance (difference -")


@pytest.mark.parametrize("value", [0, 1])
def test_verdict_names_classes_with_few_images(value):
    """The AUC of Nodule comes from 9 images with it, or without it."""
    truth = truth_with(np.zeros((0, 4)))._replace(patients=np.arange(60), rows=np.arange(60))
    labels = np.full((60, len(CLASSES)), math.nan)
    labels[:, MASS] = np.arange(60) % 2
    labels[:, NODULE] = np.where(np.arange(60) < 9, value, 1 - value)
    truth = truth._replace(labels=labels)
    run = run_with("run", truth, np.zeros((0, 4)), labels)
    first, second = verdict.verdict([run], truth, [], 20, 0)
    assert first.endswith("above chance (0.5) in 1 of 1 classes.")
    assert second == "The AUC of Nodule is unreliable: fewer than 10 patients with it, or without it."
    labels[9, NODULE] = value
    (only,) = verdict.verdict([run], truth, [], 20, 0)
    assert only.endswith("above chance (0.5) in 2 of 2 classes.")


def test_verdict_if_all_images_have_the_same_label():
    truth = truth_with(np.zeros((0, 4)))._replace(
        labels=np.ones((9, len(CLASSES))), patients=np.arange(9), rows=np.arange(9)
    )
    run = run_with("run", truth, np.zeros((0, 4)), np.random.default_rng(0).random((9, len(CLASSES))))
    sentence = "The AUC of {} is not defined: no class has test images both with and without it."
    assert verdict.verdict([run], truth, [], 20, 0) == [sentence.format("run")]
    other = run._replace(name="other")
    assert verdict.verdict([run, other], truth, [], 20, 0) == [sentence.format("run"), sentence.format("other")]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"loss": "sgl", "lam": 3.0, "mask_weight": 0.0}, "SGL, max pooling"),
        ({"loss": "sgl", "lam": 0.0, "mask_weight": 0.5}, "SGL, max pooling"),
        ({"loss": "sgl", "lam": 0.0, "mask_weight": 0.0}, "bag loss, max pooling"),
        ({"loss": "bag", "lam": 3.0, "mask_weight": 0.5}, "bag loss, max pooling"),
    ],
)
def test_name_of_a_run_says_which_loss_was_active(config, name):
    assert prediction.name_of({"pooling": "max", **config}) == name
