"""--margin and --threshold of examples/train_features.py and predict_features.py."""

from __future__ import annotations

import json

import compare_features
import feature_packages  # noqa: F401
import finetune_features
import numpy as np
import predict_features
import pytest
import train_features
from common.drawing import FOUND
from csv_files import read, write
from features import labels, prediction_report, runs, store
from features.evaluation import best_overlaps, box_intervals, box_of, boxes_of, pixels_of
from features.margin import filled, used_cells
from features.pictures import figure_of
from features.training import BagReader, Settings, falling_k
from images.thresholds import Relative
from matplotlib.colors import to_hex

from sgl_ops.localization import box_iou

ROWS, COLUMNS, STRIDE = 8, 10, 8
SIZE = (ROWS * STRIDE, COLUMNS * STRIDE)
PLACES = np.stack(np.meshgrid(np.arange(COLUMNS), np.arange(ROWS)), -1).reshape(-1, 2) * STRIDE + STRIDE / 2
#: The cells whose centre is at least 0.2 of the side from each edge: rows 2 to 5 and columns 2 to 7 of the map.
INSIDE = np.zeros((ROWS, COLUMNS), bool)
INSIDE[2:6, 2:8] = True


def write_features(folder, edge):
    """32 maps of 8x10 cells and 4 features. A positive map has a signal in 2x2 cells. ``edge`` is added outside."""
    generator = np.random.default_rng(0)
    writer = store.StoreWriter(folder, {"stride": STRIDE, "centre": STRIDE / 2, "scales": [1.0]})
    boxes = []
    for i in range(32):
        x = generator.normal(size=(ROWS, COLUMNS, 4)).astype(np.float32)
        y, left = int(generator.integers(2, 5)), int(generator.integers(2, 7))
        if i % 2:
            x[y : y + 2, left : left + 2, 0] += 6
            boxes.append([f"b{i:02d}", "red", STRIDE * left, STRIDE * y, 2 * STRIDE, 2 * STRIDE])
        x[~INSIDE] += edge
        writer.add(f"b{i:02d}", store.Bag(x.reshape(-1, 4), PLACES, (ROWS, COLUMNS), SIZE))
    return boxes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    boxes = write_features(folder / "features", 0)
    write_features(folder / "other_edges", np.nan)  # an error if they were read
    write(folder / "boxes.csv", ["image", "label", *"xywh"], boxes)
    rows = [[f"b{i:02d}", i % 2, "test" if i >= 20 else "train"] for i in range(32)]
    write(folder / "labels.csv", ["bag", "red", "split"], rows)
    for name, options in (
        ("margin", ["--margin=0.2"]),
        ("whole", []),
        ("low", ["--threshold=0.2max"]),
    ):
        assert train(folder, folder / name, *options) == 0
    return folder


def train(data, out, *options, features="features"):
    command = ["--features", str(data / features), "--labels", str(data / "labels.csv"), "--out", str(out)]
    command += ["--boxes", str(data / "boxes.csv"), "--overlays=2", "--epochs=15", "--lr=0.02", "--k=3", "--k-start=0"]
    return train_features.main([*command, "--restarts=1", "--start=at_once", "--rise=1", "--repeats=2", *options])


def predict(run, features, out, *options):
    command = ["--run", str(run), "--features", str(features), "--out", str(out), "--with-failed"]
    return predict_features.main([*command, *options])


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())["red"]


def instances(folder):
    """The probabilities of each bag in ``instances.csv`` as a map."""
    found: dict[str, list[float]] = {}
    for row in read(folder / "instances.csv"):
        found.setdefault(row["bag"], []).append(float(row["red"]))
    return {name: np.array(values).reshape(ROWS, COLUMNS) for name, values in found.items()}


def test_used_cells_have_their_centre_far_enough_from_all_edges():
    bag = store.Bag(np.zeros((80, 1), np.float32), PLACES.astype(np.float32), (ROWS, COLUMNS), SIZE)
    # centres of rows at (i + 0.5) / 8: row 1 at 0.1875, row 2 at 0.3125; of columns: column 1 at 0.15, column 2 at 0.25
    assert (used_cells(bag, 0.2).reshape(ROWS, COLUMNS) == INSIDE).all()
    assert used_cells(bag, 0.0).all() and len(used_cells(bag, 0.0)) == 80
    # a margin that is equal to the distance keeps the cell, and a larger one does not
    assert used_cells(bag, 0.1875).reshape(ROWS, COLUMNS)[1, 2] and used_cells(bag, 0.05).reshape(ROWS, COLUMNS)[4, 0]
    assert not used_cells(bag, 0.1876).reshape(ROWS, COLUMNS)[1, 2]
    # a centre beyond the image is used without a margin only
    beyond = bag._replace(coords=np.array([[81.0, 30.0], [40.0, 30.0]]))
    assert used_cells(beyond, 0.0).tolist() == [True, True]
    assert used_cells(beyond, 0.01).tolist() == [False, True]
    for other in (bag._replace(grid=None), bag._replace(size=None), bag._replace(coords=None)):
        with pytest.raises(ValueError, match="margin: expected feature maps of images"):
            used_cells(other, 0.1)


def test_cells_that_are_not_used_have_the_probability_0():
    used = np.array([False, True, True, False])
    assert filled(used, np.array([[0.2, 0.3], [0.4, 0.5]])).tolist() == [[0, 0], [0.2, 0.3], [0.4, 0.5], [0, 0]]


def test_features_near_the_edges_do_not_change_a_run_with_a_margin(data, tmp_path):
    """The features outside of the margin are NaN in the second folder. All files with results are equal."""
    assert train(data, tmp_path / "run", "--margin=0.2", features="other_edges") == 0
    for name in ("bags.csv", "instances.csv", "runs.csv", "metrics.json"):
        assert (tmp_path / "run" / name).read_text() == (data / "margin" / name).read_text()
    assert (data / "margin" / "bags.csv").read_text() != (data / "whole" / "bags.csv").read_text()
    for heatmap in instances(data / "margin").values():
        assert (heatmap[~INSIDE] == 0).all() and (heatmap[INSIDE] > 0).all()
    assert metrics(data / "margin")["auc"] > 0.9  # the signal is inside


def test_prediction_has_the_margin_of_the_run(data, tmp_path):
    assert predict(data / "margin", data / "other_edges", tmp_path / "found") == 0
    found, own = instances(tmp_path / "found"), instances(data / "margin")
    for name, heatmap in own.items():
        np.testing.assert_allclose(found[name], heatmap, rtol=1e-3, atol=1e-6)
        assert (found[name][~INSIDE] == 0).all()
    bags = {row["bag"]: float(row["red"]) for row in read(tmp_path / "found" / "bags.csv")}
    assert len(bags) == 32
    for row in read(data / "margin" / "bags.csv"):
        assert bags[row["bag"]] == pytest.approx(float(row["red"]), abs=1e-5)


def test_k_starts_at_a_fraction_of_the_used_cells(data):
    bags = store.FeatureBags(data / "features")
    settings = Settings(k=2, k_start=0.5, trial_epochs=3, margin=0.2)
    for margin, count in ((0.2, 24), (0.0, 80)):
        reader = BagReader(bags, bags.names, 0, margin)
        assert reader.count("b00") == count and len(reader("b00")) == count
        assert falling_k(reader, bags.names, settings).step() == count // 2


def test_threshold_cuts_the_maps_for_boxes(data, tmp_path):
    """The fraction of boxes found is that of boxes of 20 % of the maximum; the training is that of the default."""
    assert (data / "low" / "bags.csv").read_text() == (data / "whole" / "bags.csv").read_text()
    truth = {row["image"]: np.array([[float(row[key]) for key in "xywh"]]) for row in read(data / "boxes.csv")}
    shares = {}
    for name, threshold in (("low", Relative(0.2)), ("whole", 0.5)):
        hits = []
        for part in sorted((data / name / "parts").glob("*.npz")):
            with np.load(part) as file:
                for bag, one in zip(file["names"], np.split(file["instances"], file["offsets"][1:-1]), strict=True):
                    if str(bag) in truth:
                        box = box_of(one.reshape(ROWS, COLUMNS).astype(float), SIZE, 0.5, STRIDE, threshold)
                        hits.append(float(np.nan_to_num(box_iou(box, truth[str(bag)]).max())) > 0.3)
        shares[name] = float(np.mean(hits))
        assert metrics(data / name)["iou_0.3"] == pytest.approx(shares[name])
        assert_intervals(data, name, truth, threshold)
    assert shares["low"] != shares["whole"]
    pages = [(data / name / "report.html").read_text(encoding="utf-8") for name in ("low", "whole")]
    assert "places with p &gt; 0.2 of the largest p" in pages[0] and "places with p &gt; 0.5. " in pages[1]


def assert_intervals(data, name, truth, threshold):
    """The intervals of ``metrics.json`` are those of boxes with ``threshold``."""
    bags = store.FeatureBags(data / "features")
    overlaps = []
    for part in sorted((data / name / "parts").glob("*.npz")):
        maps, sizes = runs.maps_of(runs.load_predictions(part), bags, 0)
        overlaps.append(best_overlaps(maps, sizes, truth, 0.5, STRIDE, threshold))
    found = metrics(data / name)
    assert {key: found[key] for key in box_intervals(overlaps)} == pytest.approx(box_intervals(overlaps))


def test_drawn_boxes_have_the_threshold(data, tmp_path, monkeypatch):
    bags = store.FeatureBags(data / "features")
    predictions = runs.load_predictions(data / "low" / "parts" / "repeat0_fold0.npz")
    maps, sizes = runs.maps_of(predictions, bags, 0)
    name = str(predictions.names[1])
    table = labels.Labels(predictions.names.tolist(), ["red"], np.zeros((12, 1)), None, predictions.names)
    for threshold in (0.5, Relative(0.2)):
        figure = figure_of(predictions, 1, 0, runs.Truth(table, {}, {}, threshold), bags, {})
        frames = [p for axes in figure.axes for p in axes.patches if to_hex(p.get_edgecolor()) == FOUND]
        found = [[*frame.get_xy(), frame.get_width(), frame.get_height()] for frame in frames]
        assert found == boxes_of(maps[name], sizes[name], 0.5, STRIDE, threshold).tolist()
    assert len(boxes_of(maps[name], SIZE, 0.5, STRIDE)) != len(boxes_of(maps[name], SIZE, 0.5, STRIDE, Relative(0.2)))
    # the pages of both commands draw with the threshold of the run
    given = []
    monkeypatch.setattr(prediction_report, "picture_of", lambda *a: given.append(a[3].threshold) or "")
    assert predict(data / "low", data / "features", tmp_path / "found") == 0
    assert given and {repr(threshold) for threshold in given} == {"0.2max"}


def test_relative_threshold_is_a_fraction_of_the_maximum_of_the_map():
    heatmap = np.zeros((4, 4))
    heatmap[1:3, 1:3] = 0.1
    assert np.isnan(box_of(heatmap, (32, 32), 0.5)).all()
    box = box_of(heatmap, (32, 32), 0.5, threshold=Relative(0.5))
    assert box.tolist() == box_of(5 * heatmap, (32, 32), 0.5, threshold=0.25).tolist() == [8, 8, 16, 16]
    assert boxes_of(heatmap, (32, 32), 0.5, threshold=Relative(0.5)).tolist() == [box.tolist()]
    assert np.isnan(box_of(np.zeros((4, 4)), (32, 32), 0.5, threshold=Relative(0.5))).all()


def test_other_threshold_does_not_train_again(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run) == 0
    times = {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()}
    assert train(data, run, "--resume", "--threshold=0.2max") == 0
    assert {path: path.stat().st_mtime_ns for path in (run / "parts").iterdir()} == times
    assert metrics(run) == metrics(data / "low")
    # without the option, the folder keeps its threshold
    assert train(data, run, "--resume") == 0
    assert metrics(run) == metrics(data / "low")
    assert train(data, run, "--resume", "--margin=0.1") == 2
    assert "was made with another --margin" in capsys.readouterr().err


def test_run_of_an_older_version_has_no_margin(data, tmp_path):
    run = tmp_path / "run"
    assert train(data, run) == 0
    path = run / "settings.json"
    settings = json.loads(path.read_text())
    del settings["margin"], settings["threshold"]
    path.write_text(json.dumps(settings))
    assert predict(run, data / "features", tmp_path / "found") == 0
    assert train(data, run, "--resume") == 0
    assert metrics(run) == metrics(data / "whole")


@pytest.mark.parametrize(
    ("run", "options", "threshold"),
    [("low", [], Relative(0.2)), ("whole", [], 0.5), ("low", ["--threshold=0.4"], 0.4)],
)
def test_predicted_boxes_have_the_threshold_of_the_run_or_of_the_option(data, tmp_path, run, options, threshold):
    assert predict(data / run, data / "features", tmp_path / "found", "--gate=0", *options) == 0
    expected = []
    for name, heatmap in instances(tmp_path / "found").items():
        image = pixels_of(heatmap, SIZE, 0.5, STRIDE)
        for x, y, w, h in boxes_of(heatmap, SIZE, 0.5, STRIDE, threshold):
            expected.append((name, x, y, w, h))
            assert image[int(y) : int(y + h), int(x) : int(x + w)].max() > threshold * (
                image.max() if isinstance(threshold, Relative) else 1
            )
    rows = read(tmp_path / "found" / "boxes.csv")
    found = [(row["image"], *(float(row[key]) for key in "xywh")) for row in rows]
    assert expected and [row[0] for row in found] == [row[0] for row in expected]
    # instances.csv has four digits, so an edge may move by a pixel
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in expected], rtol=0, atol=1)
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    words = f"p &gt; {float(threshold):g}{' of the largest p' if isinstance(threshold, Relative) else ''}"
    assert page.count(words) == 2


def test_compared_runs_have_their_own_thresholds(data, tmp_path):
    out = tmp_path / "differences.csv"
    assert compare_features.main(["--runs", str(data / "low"), str(data / "whole"), "--out", str(out)]) == 0
    rows = {row["metric"]: row for row in read(out)}
    assert float(rows["auc"]["difference"]) == 0
    for key in ("iou_0.1", "iou_0.3"):
        values = [metrics(data / name)[key] for name in ("low", "whole")]
        assert [float(rows[key][column]) for column in ("first", "second")] == pytest.approx(values, abs=1e-4)
    assert float(rows["iou_0.3"]["difference"]) != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--margin=0.5"], "--margin: expected at least 0 and below 0.5, got 0.5"),
        (["--margin=-0.1"], "--margin: expected at least 0 and below 0.5, got -0.1"),
        (["--margin=nan"], "--margin: expected at least 0 and below 0.5, got nan"),
        (["--threshold=1.2"], "argument --threshold: expected a probability below 1 or a fraction of the maximum"),
        (["--threshold=validation"], "argument --threshold: expected a probability below 1 or a fraction of the"),
    ],
)
def test_errors_of_options(data, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        train(data, tmp_path / "run", *options)
    assert message in capsys.readouterr().err


def test_margin_without_cells_or_maps_is_an_error(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--margin=0.49") == 2
    assert "margin: no cell of b00 is farther than 0.49 of the side from all edges" in capsys.readouterr().err
    writer = store.StoreWriter(tmp_path / "points", {"points": "one"})
    for i in range(32):
        writer.add(f"b{i:02d}", store.Bag(np.zeros((3, 4), np.float32), np.ones((3, 2)), None, SIZE))
    command = ["--features", str(tmp_path / "points"), "--labels", str(data / "labels.csv"), "--margin=0.2"]
    assert train_features.main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "margin: expected feature maps of images" in capsys.readouterr().err


def test_prediction_of_an_image_without_used_cells_is_an_error(data, tmp_path, capsys):
    writer = store.StoreWriter(tmp_path / "new", {"stride": STRIDE, "centre": STRIDE / 2, "scales": [1.0]})
    writer.add("small", store.Bag(np.zeros((2, 4), np.float32), PLACES[:2], (1, 2), (STRIDE, 20 * STRIDE)))
    assert predict(data / "margin", tmp_path / "new", tmp_path / "found") == 2
    assert "margin: no cell of small is farther than 0.2 of the side from all edges" in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["0.4", "0.5max"])
def test_threshold_without_maps_is_an_error(data, tmp_path, capsys, threshold):
    writer = store.StoreWriter(tmp_path / "points", {"points": "one"})
    for i in range(32):
        x = np.random.default_rng(i).normal(size=(3, 4)).astype(np.float32)
        writer.add(f"b{i:02d}", store.Bag(x, np.ones((3, 2)), None, SIZE))
    command = ["--features", str(tmp_path / "points"), "--labels", str(data / "labels.csv"), "--k=1", "--epochs=1"]
    command += ["--out", str(tmp_path / "run"), "--trial-epochs=1", "--overlays=0"]
    assert train_features.main([*command, "--threshold", threshold]) == 2
    assert "threshold: expected feature maps of images" in capsys.readouterr().err
    assert train_features.main(command) == 0
    assert predict(tmp_path / "run", tmp_path / "points", tmp_path / "found", "--threshold", threshold) == 2
    assert "threshold: expected feature maps of images" in capsys.readouterr().err
    assert predict(tmp_path / "run", tmp_path / "points", tmp_path / "found") == 0


def test_fine_tuning_of_a_run_with_a_margin_is_an_error(data, tmp_path, capsys):
    command = ["--run", str(data / "margin"), "--before", str(data / "features"), "--blocks", "blocks.0"]
    assert finetune_features.main([*command, "--out", str(tmp_path / "tuned")]) == 2
    assert "run: expected a run without --margin" in capsys.readouterr().err
