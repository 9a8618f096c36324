"""AUC and its confidence intervals over patients, compared with scikit-learn and with calculations by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from common.metrics import above_equal_below
from hypothesis import given, settings
from hypothesis import strategies as st
from images import metrics as m
from sklearn.metrics import roc_auc_score


def drawn(n=400, classes=3, patients=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, classes)) < [0.4, 0.2, 0.01][:classes]).astype(np.float32)
    scores = rng.normal(size=(n, classes)) + labels
    return scores, labels, rng.integers(0, patients, n)


def test_auc_equals_a_calculation_by_hand():
    scores = np.array([[0.1, 0.3], [0.4, 0.2], [0.35, 0.9], [0.8, 0.1]])
    labels = np.array([[0, 0], [0, 0], [1, 0], [1, 0]])
    values = m.auc_per_class(scores, labels, ["a", "b"])
    assert values["a"] == 0.75
    assert math.isnan(values["b"])
    assert values["mean"] == 0.75


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12))
def test_weighted_auc_equals_scikit_learn(rows):
    scores, positive, weight = (np.array(column) for column in zip(*rows, strict=True))
    value = m.weighted_auc(scores.astype(float), positive)(weight)
    if not weight[positive].sum() or not weight[~positive].sum():
        assert math.isnan(value)
    else:
        assert value == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight))


def test_bootstrap_draws_whole_patients():
    patients = np.array([5, 9, 5, 7, 9, 5])
    for weight in m.draws_of_patients(patients, np.zeros(6, bool), 20, (1,)):
        assert weight[0] == weight[2] == weight[5]
        assert weight[1] == weight[4]
        assert weight[0] + weight[1] + weight[3] == 3


def test_rare_class_keeps_its_interval():
    scores, labels, patients = drawn()
    few = labels[:, 2] > 0
    count = len(np.unique(patients[few]))
    assert 1 < count < m.FEW_PATIENTS
    one_each = np.unique(patients, return_index=True)[1]
    shows = np.isin(patients, patients[few])
    for weight in m.draws_of_patients(patients, few, 100, (0,)):
        assert weight[few].sum() > 0
        assert weight[one_each][shows[one_each]].sum() == count
        assert weight[one_each].sum() == len(one_each)
    plain = m.draws_of_patients(patients, np.zeros(len(patients), bool), 300, (0,))
    assert min(weight[few].sum() for weight in plain) == 0
    low, high = m.auc_intervals(scores, labels, patients, ["a", "b", "c"], draws=50)["c"]
    assert 0 < low < high <= 1


def test_class_missing_from_a_draw_does_not_change_the_mean():
    """One patient has class b, with value 1. In draws without this patient, only class a changes the mean."""
    values = np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    classes = np.array([0, 0, 0, 0, 1])
    low, high = m.mean_intervals(values, classes, np.arange(5), ["a", "b"], draws=400)["mean"]
    assert low >= 0.75 - 0.5 and high <= 0.75 + 0.5  # with class a alone, the mean would reach 0.5 - 0.5
    assert low < 0.75 < high


def test_intervals_of_fractions_stay_in_their_range():
    """If classes are missing from a draw, the others change the mean, here by more than its value."""
    values, classes = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]), np.array([0, 0, 1, 2, 3, 4])
    low, high = m.mean_intervals(values, classes, np.arange(6), list("abcde"), draws=400)["mean"]
    assert 0 == low < high < 1
    low, high = m.mean_intervals(1 - values, classes, np.arange(6), list("abcde"), draws=400)["mean"]
    assert 0 < low < high == 1


def test_intervals_contain_the_value_and_are_seeded():
    scores, labels, patients = drawn()
    names = ["a", "b", "c"]
    values = m.auc_per_class(scores, labels, names)
    intervals = m.auc_intervals(scores, labels, patients, names, draws=300, seed=3)
    assert list(intervals) == list(values)
    for name, (low, high) in intervals.items():
        assert low < values[name] < high
    assert intervals == m.auc_intervals(scores, labels, patients, names, draws=300, seed=3)
    assert intervals != m.auc_intervals(scores, labels, patients, names, draws=300, seed=4)
    again = np.repeat(np.arange(len(scores)), 4)  # four equal images of a patient carry the information of one
    wide = m.auc_intervals(scores[again], labels[again], patients[again], names, draws=300, seed=3)
    assert wide["a"] == pytest.approx(intervals["a"])
    assert wide["mean"] == pytest.approx(intervals["mean"])


def test_interval_of_a_fraction_equals_the_binomial_interval():
    """For 400 patients with one box each and a fraction of 0.3: +- 1.96 sqrt(0.3 0.7 / 400) = 0.045."""
    hits = np.arange(400) % 10 < 3
    low, high = m.mean_intervals(hits, np.zeros(400, int), np.arange(400), ["a", "b"], draws=2000)["a"]
    assert 0.3 - low == pytest.approx(0.045, abs=0.006)
    assert high - 0.3 == pytest.approx(0.045, abs=0.006)
    none = m.mean_intervals(hits[:0], np.zeros(0, int), np.arange(0), ["a"], draws=10)
    assert all(math.isnan(v) for v in none["mean"])


def test_threshold_equals_a_calculation_by_hand():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    # above 0.25: sensitivity 1, specificity 2/3
    assert m.best_threshold(scores, np.array([0, 0, 1, 0, 1])) == pytest.approx(0.25)
    assert m.best_threshold(scores, np.array([0, 0, 0, 0, 1])) == pytest.approx(0.65)
    assert m.best_threshold(scores, np.zeros(5)) == 0.5
    assert (scores > m.best_threshold(scores, np.array([0, 1, 0, 0, 0]))).sum() == 4
    assert not (scores > m.best_threshold(scores, np.array([1, 0, 0, 0, 0]))).any()


def test_differences_of_rounding_errors_are_equal():
    assert above_equal_below(np.array([0.1, 0.0, 1e-12, -0.1, -0.2])) == (1, 2, 2)
