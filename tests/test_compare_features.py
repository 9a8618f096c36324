"""examples/compare_features.py: two runs on the same bags."""

from __future__ import annotations

import json

import compare_features
import feature_packages  # noqa: F401
import numpy as np
import pytest
import train_features
from csv_files import read, write
from features import comparison, store
from features.opened_run import open_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 maps of 4x5 cells and 4 features, two per patient. A positive map has a square of 2x2 cells with a signal."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    writer = store.StoreWriter(folder / "features", {"stride": 8, "centre": 4.0, "scales": [1.0]})
    rows, boxes, instances = [], [], []
    for i in range(48):
        x = generator.normal(size=(4, 5, 4)).astype(np.float32)
        y, left = (int(generator.integers(n)) for n in (3, 4))
        signal = np.zeros((4, 5), int)
        if i % 2:
            signal[y : y + 2, left : left + 2] = 1
            boxes.append([f"b{i:02d}", "red", 8 * left, 8 * y, 16, 16])
        x[..., 0] += 3 * signal
        places = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 8 + 4
        writer.add(f"b{i:02d}", store.Bag(x.reshape(20, 4), places, (4, 5), (32, 40)))
        rows.append([f"b{i:02d}", i % 2, f"p{i // 4}"])
        instances += [[f"b{i:02d}", value] for value in signal.ravel()]
    write(folder / "labels.csv", ["bag", "red", "patient"], rows)
    write(folder / "boxes.csv", ["image", "label", *"xywh"], boxes)
    write(folder / "instances.csv", ["bag", "red"], instances)
    for name, options in (("sgl", []), ("bag", ["--loss=bag"])):
        assert train(folder, folder / name, *options) == 0
    return folder


def train(data, out, *options):
    command = ["--features", str(data / "features"), "--out", str(out), "--overlays=0"]
    for option, name in (("labels", "labels"), ("boxes", "boxes"), ("instance-labels", "instances")):
        command += [f"--{option}", str(data / f"{name}.csv")]
    return train_features.main(
        [
            *command,
            "--folds=2",
            "--repeats=2",
            "--epochs=15",
            "--lr=0.02",
            "--k=3",
            "--k-start=0",
            "--restarts=1",
            "--start=at_once",
            "--rise=1",
            "--share=0.2",
            *options,
        ]
    )


def compare(data, *names, **options):
    return comparison.differences(*(open_run(data / name) for name in names), **options)


def test_values_are_those_of_the_runs(data, capsys):
    rows = {row.metric: row for row in compare(data, "sgl", "bag", draws=20)}
    assert list(rows) == list(comparison.METRICS)
    one, other = (json.loads((data / name / "metrics.json").read_text())["red"] for name in ("sgl", "bag"))
    for metric, row in rows.items():
        assert row.first == pytest.approx(one[metric], abs=1e-12) and row.second == pytest.approx(
            other[metric], abs=1e-12
        )
        assert row.difference == pytest.approx(one[metric] - other[metric], abs=1e-12)
        assert row.above + row.equal + row.below == 2
        # the number of repeats is that of the table of repeats
        each = []
        for name in ("sgl", "bag"):
            each.append([float(cells[metric]) for cells in read(data / name / "runs.csv")])
        change = np.round(np.subtract(*each), 9)
        assert [row.above, row.equal, row.below] == [(change > 0).sum(), (change == 0).sum(), (change < 0).sum()]
    assert rows["instance_auc"].first > 0.8  # something was learnt
    assert compare_features.main(["--runs", str(data / "sgl"), str(data / "bag"), "--draws=20"]) == 0
    printed = capsys.readouterr().out
    row = rows["auc"]
    assert f"{row.first:.3f}   {row.second:.3f}      {row.difference:+.3f}" in printed


def test_swapped_runs_have_the_opposite_difference(data):
    for one, other in zip(compare(data, "sgl", "bag", draws=50), compare(data, "bag", "sgl", draws=50), strict=True):
        assert (one.metric, one.first) == (other.metric, other.second)
        assert [one.low, one.high] == pytest.approx([-other.high, -other.low])
        assert (one.above, one.below) == (other.below, other.above)
    for row in compare(data, "sgl", "sgl", draws=10):
        assert [row.difference, row.low, row.high, row.equal] == [0, 0, 0, 2]


def test_intervals_are_those_of_an_own_bootstrap_over_patients(data):
    """All bags of a patient are drawn together. Here each patient has positive bags."""
    rows = {row.metric: row for row in compare(data, "sgl", "bag", draws=1000)}
    runs = [open_run(data / name) for name in ("sgl", "bag")]
    predictions = [run.predictions() for run in runs]
    labels = runs[0].labels
    patients = np.unique(labels.groups)
    members = [np.flatnonzero(labels.groups == patient) for patient in patients]
    scores = np.array(
        [[[dict(zip(p.names, p.bags[:, 0], strict=True))[n] for n in labels.names] for p in one] for one in predictions]
    )
    generator = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        picked = np.concatenate([members[k] for k in generator.integers(len(members), size=len(members))])
        positive, negative = (scores[:, :, picked[labels.values[picked, 0] == y]] for y in (1, 0))
        of_runs = (positive[..., :, None] > negative[..., None, :]).mean((1, 2, 3))
        drawn.append(of_runs[0] - of_runs[1])
    row = rows["auc"]
    spread = np.std(drawn)
    assert [row.low, row.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.25 * spread)
    assert row.high - row.low > 3 * spread > 0.01


def test_runs_that_cannot_be_compared_are_errors(data, tmp_path, capsys):
    assert train(data, tmp_path / "folds", "--folds=3") == 0
    assert train(data, tmp_path / "one", "--repeats=1") == 0
    other = tmp_path / "other"
    other.mkdir()
    for name in ("boxes.csv", "instances.csv"):
        (other / name).write_text((data / name).read_text())
    (other / "labels.csv").write_text((data / "labels.csv").read_text().replace("b01,1", "b01,0"))
    (other / "features").symlink_to(data / "features")
    assert train(other, tmp_path / "labels") == 0
    capsys.readouterr()
    for name, words in (
        ("folds", "expected equal folds in SGL and OTHER: 2 and 3"),
        ("one", "expected equal repeats in SGL and OTHER: 2 and 1"),
        ("labels", "expected equal labels in SGL and OTHER\n"),
        ("absent", "found no OTHER/settings.json"),
    ):
        assert compare_features.main(["--runs", str(data / "sgl"), str(tmp_path / name)]) == 2
        shown = words.replace("SGL", str(data / "sgl")).replace("OTHER", str(tmp_path / name))
        assert shown in capsys.readouterr().err
    (tmp_path / "one" / "parts" / "repeat0_fold1.npz").unlink()
    with pytest.raises(ValueError, match="repeat0_fold1 is not finished"):
        open_run(tmp_path / "one").predictions()


def test_other_boxes_are_an_error(data, tmp_path, capsys):
    """A run without boxes is compared without boxes."""
    rows = (data / "boxes.csv").read_text().splitlines()
    for name, content in (("fewer", rows[:-1]), ("moved", [*rows[:-1], rows[-1][:-2] + "15"])):
        other = tmp_path / f"{name}.csv"
        other.write_text("\n".join(content) + "\n")
        assert train(data, tmp_path / name, "--boxes", str(other)) == 0
        assert compare_features.main(["--runs", str(data / "sgl"), str(tmp_path / name)]) == 2
        assert f"expected equal boxes in {data / 'sgl'}" in capsys.readouterr().err
    command = ["--features", str(data / "features"), "--labels", str(data / "labels.csv"), "--overlays=0", "--epochs=1"]
    assert train_features.main([*command, "--folds=2", "--repeats=2", "--out", str(tmp_path / "none")]) == 0
    found = comparison.differences(open_run(data / "sgl"), open_run(tmp_path / "none"), draws=5)
    assert [row.metric for row in found] == ["auc"]


def test_only_patients_of_the_test_bags_are_drawn():
    patients, positive = np.array(list("aabbccdd")), np.array([1, 0, 1, 0, 0, 0, 1, 1], bool)
    tested = np.array([1, 1, 1, 1, 0, 0, 1, 1], bool)
    drawn = np.array(list(comparison._drawn(patients, positive, tested, 200, (0, 0))))
    assert (drawn[:, ~tested] == 0).all() and (drawn.sum(1) == 6).all()
    assert (drawn[:, 0] == drawn[:, 1]).all() and drawn[:, 0].max() > 1


def test_a_class_with_equal_test_labels_has_no_row(tmp_path, capsys):
    generator = np.random.default_rng(1)
    writer = store.StoreWriter(tmp_path / "features", {})
    rows = []
    for i in range(12):
        writer.add(f"b{i}", store.Bag(generator.normal(size=(5, 3)).astype(np.float32), None, None, None))
        rows.append([f"b{i}", i % 2, int(i < 4), "train" if i < 8 else "test"])
    write(tmp_path / "labels.csv", ["bag", "red", "rare", "split"], rows)
    command = ["--features", str(tmp_path / "features"), "--labels", str(tmp_path / "labels.csv"), "--epochs=1"]
    assert train_features.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert train_features.main([*command, "--classes", "rare", "--out", str(tmp_path / "alone")]) == 0
    capsys.readouterr()
    alone = str(tmp_path / "alone")
    assert compare_features.main(["--runs", alone, alone, "--draws=5"]) == 2
    assert "runs: no class has positive and negative test bags" in capsys.readouterr().err
    run = str(tmp_path / "run")
    assert compare_features.main(["--runs", run, run, "--draws=5"]) == 0
    printed = capsys.readouterr().out
    assert "red" in printed and "rare" not in printed and "nan" not in printed


def test_the_table_is_written(data, tmp_path):
    command = ["--runs", str(data / "sgl"), str(data / "bag"), "--draws=20", "--out", str(tmp_path / "table.csv")]
    assert compare_features.main(command) == 0
    rows = read(tmp_path / "table.csv")
    expected = compare(data, "sgl", "bag", draws=20)
    assert list(rows[0]) == ["class", *comparison.Difference._fields[1:]]
    for cells, row in zip(rows, expected, strict=True):
        assert cells["class"] == "red" and cells["metric"] == row.metric
        assert float(cells["difference"]) == row.difference and int(cells["above"]) == row.above
