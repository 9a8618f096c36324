"""examples/compare_localization.py: its generated images, measures, table of runs, means and errors."""

from __future__ import annotations

import compare_localization as command
import numpy as np
import pytest
import torch
from common.csv_table import nested, read_rows
from conftest import ROOT
from localization import comparison as compare
from localization import drawn_lesions, tables
from localization import rows as table

from sgl_ops import localization as bx

SMALL = {"size": 48, "train_images": 48, "test_images": 24, "epochs": 2, "batch_size": 16}


@pytest.fixture
def small(monkeypatch):
    """Small settings, with which a run takes a second."""
    for name, value in SMALL.items():
        monkeypatch.setitem(table.SETTINGS, name, value)


def small_run(out, row, seed):
    """Adds a run to the table, in this process because workers do not have the small settings."""
    (row,) = table.rows_of(row)
    out.mkdir(exist_ok=True)
    tables.add_run(compare.compute(table.Run(row, seed)), out / "runs.csv")


def runs_in(out):
    """The runs of the table by row and seed."""
    contents = [nested(cells) for cells in read_rows(out / "runs.csv")]
    return {(content["row"], content["seed"]): content for content in contents}


def test_boxes_lie_on_the_lesions():
    data = drawn_lesions.draw(40, 96, 7)
    assert data.images.shape == (40, 96, 96)
    assert data.images.dtype == np.uint8
    assert ((~np.isnan(data.boxes)).all(-1) == (data.labels == 1)).all()
    assert 0.25 < data.labels.mean() < 0.45
    image, c = np.nonzero(data.labels)
    boxes = data.boxes[image, c]
    x, y, w, h = boxes.T
    assert (x >= 0).all() and (y >= 0).all() and (x + w <= 96).all() and (y + h <= 96).all()
    assert boxes[:, 2:].min() >= 15 and boxes[:, 2:].max() <= 49
    assert (boxes[:, 2:].min(1) > 17).mean() > 0.7  # larger than the receptive field of a local patch
    both = [(k, m) for k in range(len(image)) for m in range(k) if image[k] == image[m]]
    assert len(both) > 20
    assert all(bx.box_iou(boxes[k], boxes[m]) < 0.1 for k, m in both)


@pytest.mark.parametrize("name", drawn_lesions.CLASSES)
def test_box_encloses_the_lesion(name):
    image = np.zeros((96, 96))
    half = np.array([20.0, 12.0])
    x, y, w, h = drawn_lesions.add_lesion(image, name, np.array([40.0, 60.0]), half, np.random.default_rng(0))
    assert (x, y, w, h) == (20, 48, 40, 24)
    inside = np.zeros((96, 96), bool)
    inside[y : y + h, x : x + w] = True
    assert np.square(image[~inside]).sum() < 0.1 * np.square(image).sum()
    middle = image[52:68, 28:52]
    if name in ("bright", "dark"):
        assert (middle > 1.4).all() if name == "bright" else (middle < -1.4).all()
    else:  # a grating varies in one direction
        across, along = middle.mean(1).std(), middle.mean(0).std()
        assert (across > 3 * along) if name == "stripes" else (along > 3 * across)


def test_images_depend_on_the_seed_only():
    first, again, other = (drawn_lesions.draw(3, 64, seed) for seed in ((5, 1), (5, 1), (5, 2)))
    assert (first.images == again.images).all()
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert (first.images != other.images).mean() > 0.5


@pytest.mark.parametrize("name", table.NETWORKS)
def test_receptive_field_is_that_of_the_row(name):
    network = compare.make_network(name).eval()
    field = int(name.removeprefix("local").removeprefix("bagnet"))
    for module in network.modules():  # no zero weights, so that every pixel of the field has an influence
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 0.01)
    x = torch.rand(1, 1, 96, 96, requires_grad=True)
    logits = network(x)
    assert logits.shape == (1, len(compare.CLASSES), 96 // table.STRIDE, 96 // table.STRIDE)
    logits[0, 0, 6, 6].backward()
    rows, columns = (np.flatnonzero((x.grad[0, 0] != 0).any(axis).numpy()) for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == field
    for seen in (rows, columns):  # their middle is the centre of the cell
        assert seen.mean() + 0.5 == 48 + table.SETTINGS["cell_centre"]


def test_rows_are_selected_by_name():
    assert len(table.rows_of("17")) == 9
    assert table.rows_of("65/softmax/mask") == [table.Row("65", "softmax", "mask")]
    (row,) = table.rows_of("17/max/sgl/lam=3/delta_l=0.2")
    settings = table.settings_of(row)
    assert (settings["lam"], settings["delta_l"], settings["loss"], settings["pooling"]) == (3.0, 0.2, "sgl", "max")
    assert table.settings_of(row._replace(changes=()))["delta_l"] == 0.3
    assert table.settings_of(table.Row("17", "max", "bag"))["loss"] == "bag"
    assert table.settings_of(table.Row("17", "max", "sgl"))["mask_weight"] == 0
    assert table.settings_of(table.Row("17", "max", "mask"))["mask_weight"] > 0
    for wrong in ("18", "17/median", "17/max/lam=1/sgl", "17/max/sgl/lamb=3", "17/max/sgl/lam=much", "17/max/sgl/mask"):
        with pytest.raises(ValueError, match="rows: "):
            table.rows_of(wrong)


def test_measures_equal_a_calculation_by_hand():
    """For maps that show the lesions exactly, and for maps of half of each lesion."""
    data = drawn_lesions.draw(30, 48, 1)
    maps = np.zeros((*data.labels.shape, 48, 48))
    settings = table.SETTINGS | {"morphology": 1, "cell_centre": table.STRIDE / 2}  # maps with the size of the image
    halves = maps.copy()
    for image, c in np.argwhere(data.labels > 0):
        x, y, w, h = data.boxes[image, c].astype(int)
        maps[image, c, y : y + h, x : x + w] = 0.8
        halves[image, c, y : y + h, x : x + w // 2] = 0.95
    whole = compare.measure(data.labels, maps, data, settings)
    assert whole["auc"]["mean"] == 1
    assert whole["boxes"] == data.labels.sum()
    assert {t: v["mean"] for t, v in whole["0.5"]["accuracy"].items()} == {"0.1": 1, "0.3": 1, "0.5": 1, "0.7": 1}
    assert (whole["0.5"]["area_mean"], whole["0.5"]["area_median"], whole["0.5"]["no_box"]) == (1, 1, 0)
    assert (whole["0.9"]["accuracy"]["0.1"]["mean"], whole["0.9"]["area_mean"], whole["0.9"]["no_box"]) == (0, 0, 1)
    half = compare.measure(1 - data.labels, halves, data, settings)
    assert half["auc"]["mean"] == 0
    assert half["0.9"]["accuracy"]["0.3"]["mean"] == 1
    assert half["0.9"]["accuracy"]["0.5"]["mean"] == 0
    assert 0.4 < half["0.9"]["area_mean"] <= 0.5


def test_instance_loss_starts_after_the_delay(small, monkeypatch):
    seen = []

    class Criterion(torch.nn.Module):
        lam = 1.0

        def forward(self, logits, labels):
            seen.append(self.lam)
            return logits.mean()

    monkeypatch.setattr(compare, "make_criterion", lambda settings: Criterion())
    compare.train(table.rows_of("17/max/sgl/lam_delay=1/lam_warmup=1/lam=6")[0], 0)
    assert seen == pytest.approx([0, 0, 0, 0, 2, 4])


@pytest.mark.examples
def test_repeated_run_is_bitwise_equal(small):
    (row,) = table.rows_of("17/max/sgl/lam_delay=0")
    first, again, other = (compare.train(row, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_runs_are_averaged_and_contradictions_are_an_error(small, tmp_path, capsys):
    out = tmp_path / "out"
    for row, seed in [("17/max/bag", 1), ("17/max/bag", 2), ("17/max/sgl", 1), ("17/max/sgl", 2),
                      ("65/mean/mask", 1), ("17/max/sgl/lam=3", 1)]:  # fmt: skip
        small_run(out, row, seed)
    runs = runs_in(out)
    assert list(runs) == [("17/max/bag", 1), ("17/max/bag", 2), ("17/max/sgl", 1), ("17/max/sgl", 2),
                          ("65/mean/mask", 1), ("17/max/sgl/lam=3", 1)]  # fmt: skip
    content = runs["17/max/sgl", 2]
    assert content["command"] == "python compare_localization.py --rows 17/max/sgl --seeds 2"
    assert content["settings"]["lam"] == table.settings_of(table.Row("17", "max", "sgl"))["lam"]
    assert np.array(content["shown"]).shape == (4, 6, 6)
    assert command.main(["--out", str(out), "--draw-only"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip().startswith((out / "localization.md").read_text().strip())
    assert printed.splitlines()[-1] == f"next: open {out / 'localization.png'}"
    assert (out / "localization.png").read_bytes().startswith(b"\x89PNG")
    assert ["shown" in run for run in runs.values()] == [True, True, True, True, False, False]
    results = {run: content["result"] for run, content in runs.items()}
    values = [results["17/max/sgl", seed]["0.9"]["accuracy"]["0.1"]["mean"] for seed in (1, 2)]
    assert f"| 17 | max | SGL | 2 | {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}) |" in printed
    more = [results["17/max/sgl", s]["auc"]["mean"] - results["17/max/bag", s]["auc"]["mean"] for s in (1, 2)]
    assert f"| 17 | max | SGL | 0.5 | 2 | {np.mean(more):+.3f} ({min(more):+.3f} to {max(more):+.3f}) |" in printed
    assert "| 65 | mean | SGL, mask penalty | 0.5 |" not in printed  # without a run of the bag loss, no comparison
    assert "Best bag loss alone" in printed

    table.SETTINGS["epochs"] = 3  # the fixture restores it
    for option in ([], ["--draw-only"]):
        assert command.main(["--out", str(out), "--rows", "65/max/bag", "--seeds", "1", *option]) == 2
        assert "'epochs': 2}, not {'epochs': 3}" in capsys.readouterr().err
    assert runs_in(out) == runs  # no runs with other settings are added


def test_only_missing_runs_are_computed(small, tmp_path, monkeypatch, capsys):
    small_run(tmp_path, "17/max/bag", 1)
    there = runs_in(tmp_path)

    # in this process, because a worker does not have the small settings
    monkeypatch.setattr(
        command, "compute_in_workers", lambda f, runs, workers, *given: ((run, f(run, *given)) for run in runs)
    )
    assert command.main(["--rows", "17/max/bag", "17/max/sgl", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "2 runs, 1 of them to compute" in capsys.readouterr().out
    both = runs_in(tmp_path)
    assert list(both) == [("17/max/bag", 1), ("17/max/sgl", 1)]
    assert both["17/max/bag", 1] == there["17/max/bag", 1]
    (tmp_path / "runs.csv").unlink()
    assert command.main(["--rows", "17/max/bag", "--seeds", "1", "--out", str(tmp_path)]) == 0
    (again,) = runs_in(tmp_path).values()
    assert all(again[key] == there["17/max/bag", 1][key] for key in ("result", "shown"))


def test_empty_folder_is_an_error(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--draw-only"]) == 2
    assert "there is no run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.parse_arguments(["--rows", "17/median"])
    assert "expected FIELD/POOLING/LOSS" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [".", "other_settings", "other_seeds", "networks"])
def test_committed_runs_have_the_current_settings(folder):
    """The committed tables of means are computed from the committed runs."""
    out = command.Path(command.__file__).parent / "results" / "localization" / folder
    if not (ROOT / ".git").exists() and not out.exists():
        pytest.skip(f"the source distribution does not have {folder}")
    found = tables.collect(out / "runs.csv")
    assert (out / "localization.md").read_text() == tables.tables_of(found) + "\n"


def test_page_shows_the_committed_table():
    results = command.Path(command.__file__).parent / "results"
    drawn = (results / "localization" / "localization.md").read_text().split("\n\n")[1]
    assert drawn.count("\n") == 28 and drawn in (results / "README.md").read_text()
