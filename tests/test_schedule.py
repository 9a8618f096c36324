"""LamSchedule, TopKSchedule and prior_bias: the start of the instance loss, k of top-k pooling, the initial bias."""

from __future__ import annotations

import io
import itertools
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks

from sgl_ops import BagLoss, LamSchedule, TopKSchedule, prior_bias
from sgl_ops._ranking import rank_bags
from sgl_ops.pooling import TopKPooling

LABELS = torch.tensor([0.0, 1.0]).repeat(16)


def lams(schedule, scores, labels, steps):
    return [schedule.step(scores, labels) for _ in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# The AUC


def test_auc_is_the_fraction_of_ordered_pairs():
    scores, labels = torch.randn(40, 3).round(decimals=1), torch.randint(0, 2, (40, 3)).float()
    labels[::7, 1] = math.nan
    scores[3, 2] = math.nan
    scores[5, 2] = math.inf
    ranking = rank_bags(scores, labels)
    for c in range(3):
        bags = [(s, y) for s, y in zip(scores[:, c].tolist(), labels[:, c].tolist(), strict=True) if math.isfinite(s)]
        pairs = [(a, b) for (a, ya), (b, yb) in itertools.product(bags, bags) if ya == 1 and yb == 0]
        ordered = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
        assert ranking.ordered[c] == ordered
        assert ranking.pairs[c] == len(pairs)
        assert ranking.auc[c] == pytest.approx(ordered / len(pairs))


def test_chance_deviation_equals_that_of_random_scores():
    labels = (torch.arange(30) < 7).double().unsqueeze(1)
    aucs = torch.stack([rank_bags(torch.randn(30, 1), labels).auc for _ in range(2000)])
    assert float(aucs.std()) == pytest.approx(float(rank_bags(torch.randn(30, 1), labels).chance_deviation), rel=0.06)


def test_auc_of_one_label_is_nan():
    ranking = rank_bags(torch.randn(9, 2), torch.tensor([1.0, 0.0]).expand(9, 2))
    assert ranking.auc.isnan().all() and ranking.chance_deviation.isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# When lam rises


def test_lam_rises_linearly_and_stays():
    schedule = LamSchedule(3.0, rise=3, interval=1)
    assert lams(schedule, LABELS, LABELS, 5) == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert schedule.value == 3.0 and schedule.progress == 3
    assert schedule.class_auc.tolist() == [1.0]


def test_lam_reaches_its_value_exactly():
    assert lams(LamSchedule(0.1, rise=3, interval=1), LABELS, LABELS, 3)[-1] == 0.1


def test_wrong_labels_raise_an_error():
    for wrong in (0.9, -1.0):
        with pytest.raises(ValueError, match="targets: expected 0, 1 or NaN"):
            LamSchedule().step(torch.zeros(2), torch.tensor([0.0, wrong]))


def test_random_scores_never_raise_lam():
    for seed in range(10):
        torch.manual_seed(seed)
        schedule = LamSchedule(1.0, auc=0.5, interval=1)
        assert max(schedule.step(torch.randn(8), torch.randint(0, 2, (8,))) for _ in range(200)) < 0.1
    schedule = LamSchedule(1.0, interval=1)
    assert max(lams(schedule, torch.zeros(32), LABELS, 30)) == 0.0


@pytest.mark.parametrize("drift", [-1.0, 1.0])
def test_common_drift_of_scores_does_not_raise_lam(drift):
    """The scores of all bags fall together, as when only the bias is learned."""
    for seed in range(10):
        torch.manual_seed(seed)
        schedule = LamSchedule(1.0, interval=1, rise=20)
        values = []
        for step in range(150):
            labels = torch.rand(16) < 0.05
            values.append(schedule.step(drift * step / 10 + torch.randn(16), labels))
        assert values[-1] < 0.3


def test_rise_pauses_if_the_auc_falls():
    schedule = LamSchedule(1.0, rise=100, window=32, interval=1)
    up = lams(schedule, LABELS, LABELS, 10)
    assert up[-1] == pytest.approx(0.1)
    forgotten = lams(schedule, torch.zeros(32), LABELS, 10)
    assert forgotten == [pytest.approx(0.1)] * 10
    assert schedule.step(LABELS, LABELS) == pytest.approx(0.11)


def test_few_positive_bags_need_a_higher_auc():
    """Three positive bags of 64 may have the highest scores by chance. Four are sufficient evidence."""
    for positives, starts in ((3, False), (4, True)):
        labels = (torch.arange(64) < positives).float()
        assert (LamSchedule(1.0, interval=1).step(labels, labels) > 0) == starts
    labels = (torch.arange(64) < 5).float()
    scores = labels.clone()
    scores[4] = -1.0  # AUC 0.8 of five positives: above auc, below 1/2 + 3 sigma = 0.91
    schedule = LamSchedule(1.0, interval=1, auc=0.75)
    assert schedule.class_needed is None
    assert schedule.step(scores, labels) == 0.0
    assert schedule.class_auc.item() == pytest.approx(0.8)
    assert schedule.class_needed.item() == schedule.needed_auc(labels).item() == pytest.approx(0.906, abs=0.001)


def test_needed_auc_is_the_one_from_which_lam_rises():
    """Scores with an AUC just below and just above the needed one, for several numbers of bags and thresholds."""
    rises = []
    for positives, negatives in ((7, 7), (4, 16), (8, 24), (50, 150)):
        labels = (torch.arange(positives + negatives) < positives).double()
        for auc in (0.6, 0.95):
            needed = LamSchedule(auc=auc).needed_auc(labels).item()
            sigma = math.sqrt((positives + negatives + 1) / (12 * positives * negatives))
            assert needed == pytest.approx(max(auc, 0.5 + 3 * sigma))
            for wrong in range(positives * negatives + 1):  # pairs in the wrong order
                found = 1 - wrong / (positives * negatives)
                if abs(found - needed) < 2 / (positives * negatives):
                    # how many negative bags are above each positive bag
                    above = [min(max(wrong - p * negatives, 0), negatives) for p in range(positives)]
                    scores = torch.cat([0.5 - torch.tensor(above).double(), -torch.arange(negatives).double()])
                    schedule = LamSchedule(auc=auc, rise=1, interval=1)
                    rises.append((found >= needed, schedule.step(scores, labels) > 0))
                    assert schedule.class_auc.item() == pytest.approx(found)
    assert {one for one, _ in rises} == {True, False}
    assert all(expected == found for expected, found in rises)


def test_needed_auc_of_classes_that_do_not_count():
    nan = math.nan
    labels = torch.tensor([[0.0, 0.0, nan, 1.0], [1.0, 0.0, nan, nan]]).repeat(20, 1)
    assert LamSchedule(auc=0.9).needed_auc(labels).isnan().tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="targets: expected 0, 1 or NaN"):
        LamSchedule().needed_auc(torch.full((4, 1), 0.5))


def test_batch_larger_than_the_window_counts_as_a_whole():
    """The batch is larger than the window and sorted: its last bags are all positive."""
    labels = (torch.arange(200) >= 100).float()
    assert LamSchedule(1.0, window=16, interval=1).step(labels, labels) > 0


def test_batches_of_one_bag_fill_the_window():
    schedule = LamSchedule(1.0, window=64, rise=10)
    values = [schedule.step(torch.tensor([float(i % 2)]), torch.tensor([i % 2])) for i in range(100)]
    assert values[0] == 0.0 and values[-1] == 1.0


def test_window_drops_old_bags():
    schedule = LamSchedule(1.0, window=64, rise=1000, interval=1)
    lams(schedule, torch.zeros(32), LABELS, 50)
    assert lams(schedule, LABELS, LABELS, 2)[-1] > 0


def test_auc_is_measured_every_interval():
    schedule = LamSchedule(1.0, rise=100, interval=5)
    assert max(lams(schedule, torch.zeros(32), LABELS, 1)) == 0.0
    # steps 1 to 4 use the first measurement only; by step 10 enough bags of the window are ordered
    assert lams(schedule, LABELS, LABELS, 4) == [0.0] * 4
    assert lams(schedule, LABELS, LABELS, 10)[-1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Several classes


def of_classes(*learnt):
    labels = LABELS.unsqueeze(1).expand(-1, len(learnt)).clone()
    return torch.where(torch.tensor(learnt), labels, 0.0), labels


def test_lam_rises_when_half_of_the_classes_have_learned():
    assert LamSchedule(1.0, interval=1).step(*of_classes(True, True, False, False)) > 0
    assert LamSchedule(1.0, interval=1).step(*of_classes(True, False, False)) == 0.0


def test_class_that_never_learns_delays_lam_by_patience():
    schedule = LamSchedule(1.0, patience=20, rise=10, interval=1)
    values = lams(schedule, *of_classes(True, False, False), 40)
    assert values[:20] == [0.0] * 20
    assert values[20] > 0 and values[-1] == 1.0


def test_patience_starts_with_the_first_class_that_has_learned():
    schedule = LamSchedule(1.0, patience=0, interval=1)
    assert max(lams(schedule, *of_classes(False, False, False), 40)) == 0.0


def test_classes_without_enough_bags_do_not_count():
    scores, labels = of_classes(True, False, False, False)
    labels[:, 1] = 0.0  # no positive bag
    labels[:, 2] = math.nan  # all unknown
    labels[4:, 3] = 0.0  # two positive bags
    schedule = LamSchedule(1.0, interval=1)
    assert schedule.step(scores, labels) > 0
    assert schedule.class_auc[:3].isnan().tolist() == [False, True, True]


def test_unknown_labels_and_broken_scores_are_left_out():
    scores, labels = LABELS.clone(), LABELS.clone()
    scores[:4] = torch.tensor([math.inf, math.nan, math.inf, -math.inf])
    scores[4:6], labels[4:6] = torch.tensor([9.0, -9.0]), math.nan
    schedule = LamSchedule(1.0, interval=1)
    schedule.step(scores, labels)
    assert schedule.class_auc.item() == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, and several processes


def test_state_dict_continues_the_schedule():
    torch.manual_seed(1)
    steps = [(y * strength + torch.randn(16), y) for strength in torch.linspace(0, 3, 60) for y in [LABELS[:16]]]
    whole, part = (LamSchedule(1.0, rise=30, window=64, interval=3) for _ in range(2))
    expected = [whole.step(*step) for step in steps]
    assert 0 < sum(v == 0 for v in expected) < 59 and expected[-1] > 0
    stop = next(i for i, v in enumerate(expected) if v > 0) - 2
    found = [part.step(*step) for step in steps[:stop]]
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    again = LamSchedule(1.0, rise=30, window=64, interval=3)
    again.load_state_dict(torch.load(file, weights_only=True))
    found += [again.step(*step) for step in steps[stop:]]
    assert found == expected


def test_state_of_another_device_continues_there():
    """A checkpoint is often loaded on the CPU. The device "meta" stands for a GPU: its tensors have no values."""
    first, again = (LamSchedule(1.0, window=64, interval=10) for _ in range(2))
    first.step(LABELS, LABELS)
    again.load_state_dict(first.state_dict())
    again.step(LABELS.to("meta"), LABELS.to("meta"))
    assert {tensor.device.type for bags in again._bags for tensor in bags} == {"meta"}
    assert [len(bags) for bags, _ in again._bags] == [len(LABELS), len(LABELS)]


def test_an_incomplete_state_is_refused_and_changes_nothing():
    schedule = LamSchedule(1.0, rise=5, interval=1)
    schedule.step(LABELS, LABELS)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=r"state: expected the entries of state_dict\(\), got no class_auc, steps"):
        schedule.load_state_dict({"value": 9.0, "progress": 3})
    assert (schedule.value, schedule.progress) == (before["value"], before["progress"]) == (0.2, 1)
    with pytest.raises(ValueError, match="got no progress"):
        TopKSchedule(8, start=16, steps=2).load_state_dict({"value": 9})


def test_fewer_than_14_bags_cannot_raise_lam():
    pair = torch.tensor([0.0, 1.0])
    assert lams(LamSchedule(1.0, window=14, rise=1, interval=1), pair, pair, 7)[-2:] == [0.0, 1.0]
    assert max(lams(LamSchedule(1.0, window=12, rise=1, interval=1), pair, pair, 30)) == 0.0


def test_settings_may_be_integers_of_numpy():
    assert LamSchedule(rise=np.int64(10), interval=np.int32(2)).rise == 10


def test_state_dict_does_not_change_later():
    schedule = LamSchedule(1.0, rise=5, interval=1)
    schedule.step(LABELS, LABELS)
    state = schedule.state_dict()
    lams(schedule, LABELS, LABELS, 3)
    schedule.load_state_dict(state)
    assert lams(schedule, LABELS, LABELS, 2) == [0.4, 0.6]


def rank(number, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    try:
        schedule = LamSchedule(1.0, rise=4, window=16, interval=1, process_group=dist.group.WORLD)
        # rank 0 ranks its bags well, rank 1 has only negative bags; later both rank well
        labels = LABELS if number == 0 else torch.zeros(32)
        values = lams(schedule, LABELS, labels, 2)
        values += lams(schedule, -LABELS, LABELS, 3)
        torch.save((values, schedule.class_auc), f"{folder}/rank{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.integration
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_every_rank_has_the_same_lam(tmp_path):
    start_ranks(rank, os.fspath(tmp_path), count=2)
    results = [torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in range(2)]
    for values, auc in results:
        assert values == [0.25, 0.5, 0.5, 0.5, 0.5]
        assert auc.tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lam": -1.0}, ValueError, "lam: expected"),
        ({"lam": math.inf}, ValueError, "lam: expected finite"),
        ({"lam": math.nan}, ValueError, "lam: expected"),
        ({"lam": "1"}, TypeError, "lam: expected a number"),
        ({"auc": 0.4}, ValueError, "auc: expected 0.5 <= auc <= 1, got 0.4"),
        ({"rise": 0}, ValueError, "rise: expected at least 1, got 0"),
        ({"rise": 2.5}, TypeError, "rise: expected an int, got 2.5"),
        ({"window": 7}, ValueError, "window: expected at least 8"),
        ({"patience": -1}, ValueError, "patience"),
        ({"interval": True}, TypeError, "interval: expected an int"),
        ({"process_group": "world"}, TypeError, "process_group"),
    ],
)
def test_settings_out_of_range_raise_an_error(settings, error, message):
    with pytest.raises(error, match=message):
        LamSchedule(**settings)


def test_invalid_calls_raise_an_error():
    schedule = LamSchedule()
    schedule.step(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"targets: expected shape \(4, 2\), got \(3, 2\)"):
        schedule.step(torch.zeros(4, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="bag_logits: expected 2 classes, got 3"):
        schedule.step(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="bag_logits: expected shape"):
        schedule.step(torch.zeros(4, 3, 2), torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"bag_logits: expected a torch.Tensor, got list"):
        schedule.step([0.0], torch.zeros(1))


def test_presets_take_the_settings_of_the_constructor():
    pretrained, scratch = LamSchedule.pretrained(2.0, window=64), LamSchedule.from_scratch(rise=7)
    assert (pretrained.lam, pretrained.window) == (2.0, 64)
    assert (scratch.lam, scratch.rise) == (1.0, 7)
    assert pretrained.auc > scratch.auc
    assert LamSchedule.pretrained(auc=0.9).auc == 0.9


# ---------------------------------------------------------------------------------------------------------------------
# The bias


def test_prior_bias_gives_the_frequency_of_the_label():
    labels = (torch.arange(1000).unsqueeze(1) < torch.tensor([10, 500, 990])).float()
    torch.testing.assert_close(torch.sigmoid(prior_bias(labels)), labels.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.sigmoid(prior_bias(labels, share=0.1)), 0.1 * labels.mean(0), atol=1e-3, rtol=0)


def test_prior_bias_is_finite_without_a_positive_or_known_label():
    labels = torch.tensor([[0.0, 1.0, math.nan]] * 3)
    bias = prior_bias(labels)
    assert bias.isfinite().all() and bias[0] < 0 < bias[1]
    assert bias[2] == 0.0
    assert prior_bias(torch.tensor([0, 1])).shape == (1,)
    assert prior_bias(torch.tensor([True, False])).item() == 0.0


def test_prior_bias_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="share: expected 0 < share <= 1, got 0"):
        prior_bias(torch.zeros(3), share=0.0)
    with pytest.raises(ValueError, match="targets: expected 0, 1 or NaN"):
        prior_bias(torch.tensor([2.0]))
    with pytest.raises(ValueError, match="targets: expected shape"):
        prior_bias(torch.zeros(0))


# ---------------------------------------------------------------------------------------------------------------------
# k of top-k pooling


def test_k_falls_geometrically_and_stays():
    schedule = TopKSchedule(1, start=16, steps=4)
    assert (schedule.value, schedule.done) == (16, False)
    seen = [(schedule.step(), schedule.done) for _ in range(6)]
    assert seen == [(16, False), (8, False), (4, False), (2, False), (1, True), (1, True)]
    assert schedule.progress == 4


def test_k_may_be_a_fraction_of_the_bag():
    schedule = TopKSchedule(0.01, start=0.16, steps=2)
    assert [schedule.step() for _ in range(4)] == pytest.approx([0.16, 0.04, 0.01, 0.01])
    assert schedule.value == 0.01  # exactly


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_k_continues_after_a_checkpoint(cut):
    whole, first, second = (TopKSchedule(8, start=240, steps=4) for _ in range(3))
    expected = [whole.step() for _ in range(6)]
    begun = [first.step() for _ in range(cut)]
    second.load_state_dict(first.state_dict())
    assert begun + [second.step() for _ in range(6 - cut)] == expected


def test_every_k_is_valid_for_the_pooling():
    for schedule in (TopKSchedule(3, start=1000, steps=50), TopKSchedule(0.003, start=0.5, steps=50)):
        for _ in range(60):
            pooling = TopKPooling(schedule.step())
            assert torch.isfinite(pooling(torch.randn(2, 40))).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0, "start": 4, "steps": 1}, ValueError, "k: "),
        ({"k": 8, "start": 4, "steps": 1}, ValueError, "start: expected at least k = 8"),
        (
            {"k": 8, "start": 0.2, "steps": 1},
            TypeError,
            r"a number of instances \(int\), as k = 8, got 0\.2",
        ),
        (
            {"k": 0.1, "start": 8, "steps": 1},
            TypeError,
            r"a fraction of the bag \(float\), as k = 0\.1, got 8",
        ),
        ({"k": 8, "start": 16, "steps": 0}, ValueError, "steps: "),
        ({"k": 8, "start": 16, "steps": 2.0}, TypeError, "steps: "),
    ],
)
def test_invalid_settings_of_k_raise_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        TopKSchedule(**arguments)


@pytest.mark.integration
def test_falling_k_finds_small_objects_with_more_seeds():
    """4 of 200 instances of a positive bag show the class. 20 instances of every bag are large for another reason."""
    torch.manual_seed(0)
    labels = torch.arange(150).remainder(2).float().unsqueeze(1)
    features = torch.randn(150, 200, 12)
    features[:, 100:120, 1:] += torch.randn(11)
    features[labels[:, 0] == 1, :4, 0] += 4

    def finds(seed, start):
        torch.manual_seed(seed)
        head = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        with torch.no_grad():
            head[-1].bias.copy_(prior_bias(labels, share=0.02))
        optimizer = torch.optim.Adam(head.parameters(), 1e-2)
        criterion = BagLoss(TopKPooling(4))
        schedule = TopKSchedule(4, start=start, steps=40)
        for _ in range(80):
            criterion.pooling.k = schedule.step()
            loss = criterion(head(features).transpose(1, 2), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            chosen = head(features).squeeze(2)[labels[:, 0] == 1].argmax(1)
        return bool((chosen < 4).float().mean() > 0.9)

    constant, falling = (sum(finds(seed, start) for seed in range(8)) for start in (4, 40))
    assert falling >= constant + 2, (falling, constant)
