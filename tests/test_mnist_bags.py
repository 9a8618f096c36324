"""The MNIST-Bags example: drawing bags, metrics, training, resuming, output files."""

from __future__ import annotations

import csv
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
import train_mnist_bags as example
from bags import experiment, instances, networks, options, training
from bags.drawing import draw_bags, take
from bags.metrics import iou, iou_pooled
from common.metrics import auc
from sklearn.metrics import roc_auc_score

import sgl_ops

SMALL = ["--bags", "6", "--val-bags", "4", "--test-bags", "8", "--bag-size", "6", "--batch-size", "4"]


def draw(count=200, size=10.0, std=3.0, seed=0, positives=0):
    is_target = np.arange(500) % 10 == 9
    pool = np.arange(100, 400)
    return draw_bags(pool, is_target, count, size, std, np.random.default_rng(seed), positives), is_target, pool


def test_labels_of_bags_match_their_instances():
    bags, is_target, pool = draw()
    assert len(bags.labels) == 200
    assert bags.labels.sum() == 100
    assert np.isin(bags.index.numpy(), pool).all()
    assert (bags.positive.numpy() == is_target[bags.index.numpy()]).all()
    for i in range(200):
        inside = slice(int(bags.offsets[i]), int(bags.offsets[i + 1]))
        assert bool(bags.positive[inside].any()) == bool(bags.labels[i])
        assert len(bags.index[inside].unique()) == inside.stop - inside.start  # no image twice
    sizes = bags.offsets.diff().double()
    assert abs(float(sizes.mean()) - 10) < 1
    assert 2 < float(sizes.std()) < 4
    # at a rate of 0.1 a positive bag of 10 holds 10 * 0.1 / (1 - 0.9^10) = 1.54 targets on average
    assert 1.3 < float(bags.positive.sum()) / 100 < 1.8


def test_bags_are_reproducible_and_not_empty():
    one, two, other = draw(seed=1)[0], draw(seed=1)[0], draw(seed=2)[0]
    assert torch.equal(one.index, two.index)
    assert not torch.equal(one.index[:50], other.index[:50])
    assert draw(size=1.0, std=5.0)[0].offsets.diff().min() == 1
    with pytest.raises(ValueError, match="target class"):
        draw_bags(np.arange(5), np.zeros(5, bool), 2, 3, 0, np.random.default_rng(0))


def test_number_of_positives_can_be_chosen():
    bags, is_target, _ = draw(size=10, std=0.0, positives=4)
    assert (bags.positive.numpy() == is_target[bags.index.numpy()]).all()
    assert torch.equal(bags.positive.reshape(200, 10).sum(1), 4 * bags.labels.long())
    for wrong in ({"positives": 11}, {"positives": 2, "std": 1.0}):
        with pytest.raises(ValueError, match="positives"):
            draw(**({"size": 10, "std": 0.0} | wrong))


def test_take_selects_whole_bags():
    bags, *_ = draw(count=5)
    some = take(bags, torch.tensor([3, 0, 3]))
    for k, i in enumerate((3, 0, 3)):
        here, there = slice(*some.offsets[k : k + 2].tolist()), slice(*bags.offsets[i : i + 2].tolist())
        assert torch.equal(some.index[here], bags.index[there])
        assert torch.equal(some.positive[here], bags.positive[there])
        assert some.labels[k] == bags.labels[i]


def test_metrics_equal_a_calculation_by_hand():
    offsets = np.array([0, 3, 6, 8])
    positive = np.array([1, 1, 0, 0, 0, 0, 0, 0], bool)
    found = np.array([1, 0, 1, 0, 0, 0, 1, 0], bool)
    # bag 0: IoU 1/3; bag 1: no positive and none predicted; bag 2: no positive, but one predicted
    assert iou(found, positive, offsets) == pytest.approx((1 / 3 + 0) / 2)
    assert iou_pooled(found, positive, offsets, batch_size=64) == pytest.approx(1 / 4)
    assert iou_pooled(found, positive, offsets, batch_size=2) == pytest.approx((1 / 3 + 0) / 2)
    assert np.isnan(iou(found & False, positive & False, offsets))
    assert auc(np.array([0.1, 0.4, 0.3]), np.array([0, 1, 0])) == 1
    generator = np.random.default_rng(0)
    for kind in (np.float32, np.float64):
        for decimals in (1, 9):  # with ties and without
            scores, labels = generator.normal(size=50).round(decimals).astype(kind), generator.integers(0, 2, 50)
            assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), rel=1e-13)
    assert np.isnan(auc(np.array([0.1, 0.4]), np.array([1, 1])))
    with pytest.raises(ValueError, match="got NaN"):
        auc(np.array([0.1, np.nan]), np.array([0, 1]))


def test_parts_share_no_image():
    data = instances.load_instances("digits", "")
    config = options.configs_of(example.parse(SMALL))["sgl"]
    images, bags = experiment.bags_of(data, config, 0, "cpu")
    assert images["train"] is images["val"]
    assert not set(bags["train"].index.tolist()) & set(bags["val"].index.tolist())
    flat = [x.flatten(1) for x in (data.train_images, data.test_images)]
    assert (torch.cdist(*flat) > 1e-3).all()
    assert data.train_images.shape[1:] == (1, 32, 32)
    assert abs(float(data.train_images.mean())) < 1e-4


def test_network_is_that_of_the_authors():
    model = networks.LeNet()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 1)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (16, 6, 5, 5), (120, 16 * 5 * 5), (84, 120), (1, 84)]


def run(out, *options):
    assert example.main([*SMALL, "--out", str(out), *options]) == 0
    return json.loads((out / "metrics.json").read_text())


def test_run_writes_its_files(tmp_path):
    metrics = run(tmp_path, "--loss", "sgl", "--epochs", "2", "--runs", "2", "--seed", "5")
    assert metrics["config"]["loss"] == "sgl"
    assert [r["seed"] for r in metrics["runs"]] == [5, 6]
    for entry in metrics["runs"]:
        assert entry["epoch"] == 2
        assert entry["best_val"]["epoch"] in (1, 2)
        validation = [
            r["val_auc"] for r in csv.DictReader((tmp_path / "history.csv").open()) if int(r["seed"]) == entry["seed"]
        ]
        assert entry["best_val"]["validation_auc"] == max(map(float, validation))
        for which in ("last", "best_val"):
            assert all(0 <= entry[which][name] <= 1 for name in ("auc", "iou", "iou_pooled"))
    for name in ("auc", "iou", "iou_pooled"):
        values = [r["last"][name] for r in metrics["runs"]]
        assert metrics["mean"]["last"][name] == pytest.approx(sum(values) / 2)
        assert metrics["worst"]["last"][name] == min(values)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [(r["seed"], r["epoch"]) for r in rows] == [("5", "1"), ("5", "2"), ("6", "1"), ("6", "2")]
    assert (tmp_path / "bags.png").read_bytes().startswith(b"\x89PNG")


def test_validation_every_n_epochs(tmp_path):
    every = run(tmp_path / "1", "--loss", "sgl", "--epochs", "5")
    some = run(tmp_path / "2", "--loss", "sgl", "--epochs", "5", "--val-every", "2")
    assert some["runs"][0]["last"] == every["runs"][0]["last"]
    histories = [list(csv.DictReader((tmp_path / k / "history.csv").open())) for k in ("1", "2")]
    for one, other in zip(*histories, strict=True):
        validated = int(one["epoch"]) in (2, 4, 5)
        assert other == one if validated else other == one | {n: "" for n in one if n.startswith("val_")}


def test_conclusion_names_the_seeds_that_failed():
    def results(values):
        runs = [{"seed": s, "last": {"auc": a, "iou": i, "iou_pooled": i}} for s, (a, i) in enumerate(values)]
        keys = ("auc", "iou", "iou_pooled")
        return {"runs": runs, "mean": {"last": {k: sum(r["last"][k] for r in runs) / len(runs) for k in keys}}}

    both = {"sgl": results([(1.0, 0.7), (0.9, 0.8)]), "max": results([(0.5, 0.0), (0.9, 0.6)])}
    assert experiment.conclusion(both) == (
        "SGL against max pooling alone: bag AUC 0.950 against 0.700 (0.250 higher), "
        "pooled IoU 0.750 against 0.300 (0.450 higher).\n"
        "Max pooling did not learn with seed 0 (bag AUC below 0.7). "
        "Without this seed the pooled IoU is 0.800 against 0.600."
    )
    assert experiment.chosen_by(both) == "seed 1 (the first seed with which both losses learned)"
    three = {name: results([(0.5, 0.0), (0.5, 0.1), (0.9, 0.6)]) for name in both}
    text = experiment.conclusion(three)
    assert "SGL did not learn with seeds 0, 1 (" in text and "Without these seeds the pooled IoU is 0.600" in text
    assert "bag AUC 0.633 against 0.633 (equal)" in text
    none = {name: results([(0.5, 0.0)]) for name in both}
    assert experiment.chosen_by(none) == "seed 0 (the first seed; no seed learned with both)"
    assert experiment.seed_to_show(both) == 1
    both["max"] = results([(0.8, 0.5), (0.9, 0.6)])
    assert "did not learn" not in experiment.conclusion(both) and experiment.seed_to_show(both) == 0


def test_without_loss_both_methods_are_compared(tmp_path, capsys, monkeypatch):
    headings, drawn = {}, {}
    monkeypatch.setattr(
        experiment,
        "draw_panels",
        lambda panels, columns, heading, path, *_: (
            headings.update({path.name: heading}) or drawn.update({path.name: panels})
        ),
    )
    options = ("--epochs", "1", "--runs", "1", "--seed", "3", "--out", str(tmp_path / "drawn"))
    assert example.main([*SMALL, *options]) == 0
    heading = " ".join(headings["comparison.png"].split())
    assert heading.startswith("Networks of seed 3 (the first seed")
    # the counts of the marks, one instance at a time
    for first, name in enumerate(("max pooling", "SGL")):
        rows = [
            (p > 0.5, y > 0) for panel in drawn["comparison.png"][first::2] for p, y in zip(*panel[1:3], strict=True)
        ]
        counts = f"{rows.count((True, True))} of {sum(y for _, y in rows)} instances of class 9"
        assert f"{name} marks {counts} and {rows.count((True, False))} others" in heading
    assert "Each picture shows the 20 instances of a bag with the highest probability, in falling order" in heading
    assert "The bags are the first test bags: 4 positive, 1 negative." in heading
    assert "network of seed 3: the probability of each instance, the highest first" in headings["bags.png"]
    monkeypatch.undo()
    capsys.readouterr()
    assert example.main([*SMALL, "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").exists()
    for name, loss in (("sgl", "sgl"), ("max", "bag")):
        assert json.loads((tmp_path / "out" / name / "metrics.json").read_text())["config"]["loss"] == loss
    printed = capsys.readouterr().out
    assert "sgl (max) seed 0: epoch 1 of 1, loss" in printed  # one line per epoch if the output is not a terminal
    assert "SGL against max pooling alone: bag AUC" in printed
    results = {name: json.loads((tmp_path / "out" / name / "metrics.json").read_text()) for name in ("sgl", "max")}
    seed = experiment.seed_to_show(results)
    assert "comparison.png shows the same test bags under both losses.\n" in printed
    assert f"It shows the networks of seed {seed} (the first seed" in printed
    for name in ("sgl", "max"):
        for entry in json.loads((tmp_path / "out" / name / "metrics.json").read_text())["runs"]:
            best = entry["best_val"]
            numbers = f"{best['validation_auc']:.3f} +{best['auc']:.3f}"
            assert re.search(rf"\n{name} +{entry['seed']} +1 +{numbers}\n", printed)
    for column in training.METRICS:
        assert f"\n{column} " in printed  # the explanation of the column


def test_defaults_of_the_demonstration_and_of_mnist():
    demo, mnist = example.parse([]), example.parse(["--data", "mnist"])
    assert demo.runs >= 3
    assert (mnist.bags, mnist.epochs, mnist.lr, mnist.batch_size) == (100, 300, 1e-4, 64)
    assert example.parse(["--epochs", "7"]).epochs == 7


@pytest.mark.parametrize("loss", ["sgl", "mmm"])
def test_interrupted_run_continues_to_the_same_result(tmp_path, monkeypatch, loss):
    expected = run(tmp_path / "whole", "--loss", loss, "--epochs", "4")
    epochs = []

    def interrupted(*arguments, train_epoch=training.train_epoch):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    options = ["--loss", loss, "--epochs", "4", "--out", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupted)
        assert example.main([*SMALL, *options]) == 130
    assert example.main([*SMALL, *options]) == 2  # existing results are not overwritten
    got = run(tmp_path / "cut", "--loss", loss, "--epochs", "4", "--resume")
    assert got["runs"] == expected["runs"]
    histories = [(tmp_path / name / "history.csv").read_text() for name in ("whole", "cut")]
    assert histories[0] == histories[1]
    states = [torch.load(tmp_path / name / "seed0.pt", weights_only=True) for name in ("whole", "cut")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
    assert example.main([*SMALL, *options, "--resume", "--lam", "2"]) == 2  # resuming needs the same settings


START = ["--runs", "1", "--loss", "sgl", "--pooling", "topk", "--k", "1", "--k-start", "0.5", "--epochs", "6"]


def test_k_falls_to_its_final_value_before_the_instance_loss_begins(tmp_path, monkeypatch):
    seen = []

    def noted(model, criterion, *rest, train_epoch=training.train_epoch):
        seen.append((criterion.pooling.k, criterion.lam))
        return train_epoch(model, criterion, *rest)

    monkeypatch.setattr(training, "train_epoch", noted)
    run(tmp_path / "half", *START)
    # half of the 6 instances, 3 * 3^(-t / 3) in epoch t, then 1
    assert seen == [(3, 0.0), (2, 0.0), (1, 0.0), (1, 1.0), (1, 1.0), (1, 1.0)]
    seen.clear()
    run(tmp_path / "one", *START, "--k-epochs", "1.5", "--lam", "2")
    assert seen == [(3, 0.0), (1, 0.0), *4 * [(1, 2.0)]]
    seen.clear()
    run(tmp_path / "off", "--runs", "1", "--loss", "sgl", "--pooling", "topk", "--k", "2", "--epochs", "2")
    assert seen == 2 * [(2, 1.0)]


def test_a_checkpoint_without_k_can_be_continued(tmp_path):
    given = ["--loss", "sgl", "--epochs", "2"]
    expected = run(tmp_path, *given)
    path = tmp_path / "seed0.pt"
    state = torch.load(path, weights_only=True)
    state["config"] = {name: value for name, value in state["config"].items() if name not in options.OLDER}
    torch.save(state, path)
    assert run(tmp_path, *given, "--resume")["runs"] == expected["runs"]
    assert example.main([*SMALL, *given, "--out", str(tmp_path), "--resume", "--k", "3"]) == 2


def test_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert example.main([*SMALL, "--dry-run"]) == 0
    assert "loss of one step" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--bags", "0"], ["--bag-size", "0"], ["--delta-l", "0.7"], ["--lam", "-1"], ["--loss", "hinge"],
        ["--loss", "mmm", "--pooling", "mean"], ["--resume"], ["--positives", "51"],
        ["--positives", "2", "--bag-std", "1"], ["--k", "0"], ["--k-start", "0.5"],
        ["--loss", "bag", "--k-start", "0.5"], ["--loss", "bag", "--pooling", "topk", "--k-start", "1"],
        ["--loss", "bag", "--pooling", "topk", "--k-epochs", "2"],
        ["--loss", "bag", "--pooling", "topk", "--k-start", "0.5", "--k-epochs", "0"],
        ["--loss", "bag", "--pooling", "topk", "--k-start", "0.5", "--k-epochs", "301", "--data", "mnist"],
    ],
)  # fmt: skip
def test_invalid_options_are_errors(options):
    with pytest.raises(SystemExit):
        example.parse(options)


@pytest.mark.parametrize("data", ["nothing.npz", "emnist"])
def test_invalid_data_are_errors(data, capsys):
    assert example.main(["--data", data, "--dry-run"]) == 2
    assert data in capsys.readouterr().err
    assert example.main(["--target", "77", "--dry-run"]) == 2


def test_instances_from_an_npz_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.random((60, 20, 20, 3)), "y_train": np.arange(60) % 3}
    arrays |= {"x_test": rng.random((30, 20, 20, 3)), "y_test": np.arange(30) % 3}
    np.savez(tmp_path / "mine.npz", **arrays)
    run(tmp_path / "out", "--data", str(tmp_path / "mine.npz"), "--target", "2", "--epochs", "1", "--loss", "bag")
    np.savez(tmp_path / "bad.npz", **(arrays | {"y_train": np.arange(59)}))
    with pytest.raises(ValueError, match="y_train"):
        instances.load_instances(str(tmp_path / "bad.npz"), "")
    content = (tmp_path / "mine.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"bad\.npz is not a readable \.npz file"):
        instances.load_instances(str(tmp_path / "bad.npz"), "")
    with (tmp_path / "bad.npz").open("wb") as file:
        np.save(file, arrays["x_train"])
    with pytest.raises(ValueError, match="got a single array"):
        instances.load_instances(str(tmp_path / "bad.npz"), "")


def test_real_mnist_is_read(data_dir, tmp_path):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (data_dir / "MNIST" / "raw").glob("*.gz"):  # they are unpacked in the same folder
        (raw / packed.name).symlink_to(packed)
    data = instances.load_instances("mnist", str(tmp_path))
    assert data.train_images.shape == (60000, 1, 32, 32)
    assert data.test_images.shape == (10000, 1, 32, 32)
    assert np.bincount(data.test_classes)[9] == 1009
    assert abs(float(data.train_images.std()) - 1) < 1e-3


@pytest.mark.parametrize("lam", [None, 0.0, 1.0])
@pytest.mark.parametrize("pooling", ["max", "topk", "mean"])
def test_backward_computes_only_instances_with_a_gradient(pooling, lam):
    """``lam``: of SGL; None for the bag loss."""
    data = instances.load_instances("digits", "")
    rng = np.random.default_rng(0)
    drawn = draw_bags(np.arange(200), data.train_classes == 9, 12, 30, 3, rng)  # images repeat between bags
    model = networks.LeNet()
    criterion = sgl_ops.BagLoss(pooling) if lam is None else sgl_ops.SGLLoss(lam=lam, pooling=pooling)
    loss = criterion(model(data.train_images[drawn.index])[:, 0], drawn.labels, offsets=drawn.offsets)
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    seen = []
    model.register_forward_hook(lambda _, given, __: seen.append((torch.is_grad_enabled(), len(given[0]))))
    assert training.backward(model, criterion, data.train_images, drawn) == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    unique = len(drawn.index.unique())
    if pooling == "mean" or lam:
        assert seen == [(True, unique)]
    else:
        few = 12 * (1 if pooling == "max" else 8)
        assert seen[0] == (False, unique)
        assert len(seen) == 2 and seen[1][0] and 1 <= seen[1][1] <= few


def test_checkpoints_do_not_change_the_result(tmp_path):
    data = instances.load_instances("digits", "")
    config = options.configs_of(example.parse(["--loss", "sgl", "--bags", "4", "--epochs", "3", "--bag-size", "5"]))[
        "sgl"
    ]
    images, bags = experiment.bags_of(data, config, 0, "cpu")
    saved, written = [], training.save_atomically
    results = []
    for number, seconds in enumerate((0.0, 1e9)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                training, "save_atomically", lambda state, path: (saved.append(state["epoch"]), written(state, path))
            )
            results.append(
                training.train_run(
                    networks.LeNet, config, 0, images, bags, tmp_path / f"{number}.pt", False, True, seconds
                )[:2]
            )
    assert saved == [1, 2, 3, 3]
    assert results[0] == results[1]
