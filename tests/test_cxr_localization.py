"""The evaluation of a run and its output files, with networks whose maps and hits are known."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import localize_cxr
import numpy as np
import pytest
import torch
import train_cxr
from common import progress
from images import evaluation, figure, gallery, nih, page, paper, pixels, prediction, provenance, report, truth
from images.dataset import Index
from images.models import Grid
from images.nih import CLASSES
from images.synthetic_set import write_dataset
from matplotlib.axes import Axes
from PIL import Image

from sgl_ops.localization import NO_BOX, overlay, seen_cells

SIZE = 64
CONFIG = {
    "image_size": SIZE, "loss": "sgl", "pooling": "max", "backbone": "known", "seed": 0, "val_patients": [90],
    "note": "<script>alert(1)</script>",
}  # fmt: skip
WHICH = {"network": "best", "epoch": 7}
MASS, NODULE, EDEMA = (CLASSES.index(name) for name in ("Mass", "Nodule", "Edema"))
DRAW = figure.draw
UNIT = 1024 // 8  # a cell of an 8 x 8 map, in pixels of the table


class KnownMaps(torch.nn.Module):
    """A network that reads its map from the brightness of the image, in cells of 8 x 8 pixels.

    Bright cells give Mass p = 0.9, dim cells give Nodule p = 0.4. All other probabilities are 0.1.
    """

    grid = Grid(4.0, 8)

    def grey_of(self, x):
        return torch.nn.functional.avg_pool2d(x, 8)

    def forward(self, x):
        grey = self.grey_of(x[:, 0] * pixels.STD[0] + pixels.MEAN[0])
        probability = torch.full((len(x), len(CLASSES), 8, 8), 0.1)
        probability[:, MASS] += 0.8 * (grey > 0.9)
        probability[:, NODULE] += 0.3 * ((grey > 0.4) & (grey < 0.6))
        return torch.logit(probability)


class KnownMapsFromTheEdge(KnownMaps):
    """KnownMaps whose cells read, and are centred on, pixels 0, 8, 16 and so on, as those of a ResNet."""

    grid = Grid(0.5, 8)

    def grey_of(self, x):
        return x[:, ::8, ::8]


class InvertedMaps(KnownMaps):
    """KnownMaps with inverted probabilities."""

    def forward(self, x):
        return -super().forward(x)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with five test images and two others, its index, and a run with KnownMaps."""
    rows = {
        # name: patient, test, classes, (first cell, cells, value) of the painted area, boxes
        "00000001_000.png": (1, True, [MASS], ((2, 1, 2, 2), 255), [(MASS, 2, 1, 2, 2)]),  # IoU 1
        "00000001_001.png": (1, True, [MASS], ((2, 1, 2, 2), 255), [(MASS, 2, 1, 4, 2)]),  # IoU 1/2
        "00000002_000.png": (2, True, [MASS], ((0, 0, 1, 1), 255), [(MASS, 4, 4, 2, 2)]),  # IoU 0
        "00000003_000.png": (3, True, [NODULE], ((5, 5, 2, 1), 128), [(NODULE, 5, 5, 2, 1)]),  # IoU 1 at T_p < 0.4
        "00000004_000.png": (4, True, [], ((0, 0, 0, 0), 0), []),
        "00000080_000.png": (80, False, [MASS], ((1, 1, 2, 2), 255), []),
        "00000090_000.png": (90, False, [NODULE], ((1, 1, 2, 2), 128), []),
        "00000090_001.png": (90, False, [MASS], ((1, 1, 2, 2), 255), []),
    }
    labels = np.zeros((len(rows), len(CLASSES)), np.float32)
    paths, boxes = [], {}
    for row, (name, (_, _, classes, ((x, y, w, h), value), true)) in enumerate(rows.items()):
        labels[row, classes] = 1
        pixels = np.full((SIZE, SIZE), 30, np.uint8)
        pixels[8 * y : 8 * (y + h), 8 * x : 8 * (x + w)] = value
        paths.append(tmp_path / name)
        Image.fromarray(pixels).save(paths[-1])
        if true:
            boxes[name] = [(c, *(UNIT * float(v) for v in box)) for c, *box in true]
    (tmp_path / nih.ENTRIES[0]).write_text("")  # the name of this file identifies the data set
    index = Index(
        about=nih.DESCRIPTION,
        names=list(rows),
        labels=labels,
        patients=np.array([row[0] for row in rows.values()]),
        test=np.array([row[1] for row in rows.values()]),
        paths=paths,
        boxes=boxes,
        sizes=np.full((len(rows), 2), 1024),
        missing=["00000007_000.png"],
    )
    trained = {name for name, row in rows.items() if not row[1]}
    monkeypatch.setattr(nih, "load_index", lambda *_, **__: index)
    monkeypatch.setattr(evaluation, "load_network", lambda *_: (KnownMaps(), dict(CONFIG), WHICH))
    monkeypatch.setattr(provenance, "trained_names", lambda run: trained)
    monkeypatch.setattr(figure, "draw", lambda *_: None)  # slow
    return tmp_path, index, trained


def evaluate(folder, *more):
    out = folder / "out"
    status = localize_cxr.main(
        ["--run", str(folder / "run"), "--data-dir", str(folder), "--out", str(out), "--device", "cpu", "--draws", "20",
         "--batch-size", "3", *more]
    )  # fmt: skip
    assert status == 0
    out = Path(more[more.index("--out") + 1]) if "--out" in more else out
    return json.loads((out / "metrics.json").read_text()), out


def test_report_of_one_run_replaces_that_of_two(data):
    folder, *_ = data
    one, other, out = (str(folder / name) for name in ("run", "other", "out"))
    common = ["--data-dir", str(folder), "--out", out, "--device", "cpu", "--draws", "5"]
    assert localize_cxr.main(["--run", one, other, *common]) == 0
    assert (folder / "out" / "baseline" / "metrics.json").exists()
    assert localize_cxr.main(["--run", one, *common]) == 0
    assert not (folder / "out" / "baseline").exists()


def test_foreign_files_are_not_deleted(data, capsys):
    """The folder for the tables of a second run contains a run, or its report."""
    folder, *_ = data
    one, other, baseline_folder = str(folder / "run"), str(folder / "other"), folder / "out" / "baseline"
    common = ["--data-dir", str(folder), "--out", str(folder / "out"), "--device", "cpu", "--draws", "5"]
    baseline_folder.mkdir(parents=True)
    for name in ("metrics.json", "details.json", "predictions.csv", "boxes.csv", "last.pt"):
        (baseline_folder / name).write_text("mine")
    assert localize_cxr.main(["--run", one, *common]) == 0
    assert localize_cxr.main(["--run", one, other, *common]) == 2
    assert (
        f"out: expected no other files in {baseline_folder}, the folder of the second run's tables"
        in capsys.readouterr().err
    )
    assert {path.read_text() for path in baseline_folder.iterdir()} == {"mine"}
    assert len(list(baseline_folder.iterdir())) == 5
    for name in ("details.json", "predictions.csv", "boxes.csv", "last.pt"):
        (baseline_folder / name).unlink()
    assert localize_cxr.main(["--run", one, *common]) == 0
    assert localize_cxr.main(["--run", one, other, *common]) == 2
    assert [path.read_text() for path in baseline_folder.iterdir()] == ["mine"]


def test_runs_with_the_same_settings_get_different_names(data, monkeypatch, capsys):
    folder, *_ = data
    monkeypatch.setattr(evaluation, "load_network", lambda run, *_: (
        KnownMaps() if run.parent.name == "s0" else InvertedMaps(), dict(CONFIG), WHICH
    ))  # fmt: skip
    runs = [folder / "s0" / "run", folder / "s1" / "run"]
    out = folder / "out"
    common = ["--data-dir", str(folder), "--out", str(out), "--device", "cpu", "--draws", "5"]
    assert localize_cxr.main(["--run", *map(str, runs), *common]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"/run\) +[\d-]", line)]
    auc = [json.loads((out / part / "metrics.json").read_text())["auc"]["mean"] for part in ("", "baseline")]
    assert auc[0] != auc[1]
    assert [(row.split("(")[1][:6], float(row.split(")")[1].split()[0])) for row in rows] == [
        ("s0/run", round(auc[0], 3)), ("s1/run", round(auc[1], 3))
    ]  # fmt: skip
    text = (out / "report.html").read_text()
    assert "(s0/run)" in text
    assert "(s1/run)" in text
    with pytest.raises(SystemExit):
        localize_cxr.main(["--run", str(runs[0]), str(folder / "s1" / ".." / "s0" / "run"), *common])
    assert "twice" in capsys.readouterr().err


def test_errors_and_interruptions_print_one_line(data, monkeypatch, capsys):
    folder, *_ = data
    (folder / "file").write_text("")
    base = ["--run", str(folder / "run"), "--data-dir", str(folder), "--draws", "5"]
    for more in (["--out", str(folder / "file")], ["--out", str(folder / "a"), "--cache", str(folder / "file")]):
        assert localize_cxr.main([*base, "--device", "cpu", *more]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        localize_cxr.parse([*base, "--device", "nowhere"])
    assert "argument --device: nowhere: " in capsys.readouterr().err
    Image.open(folder / "00000002_000.png").load()
    (folder / "00000002_000.png").write_bytes((folder / "00000002_000.png").read_bytes()[:60])
    for workers in ("0", "1"):
        assert localize_cxr.main([*base, "--device", "cpu", "--out", str(folder / "b"), "--workers", workers]) == 2
        message = [line for line in capsys.readouterr().err.splitlines() if "it/s]" not in line and "batch" not in line]
        assert len(message) == 1, message
        assert message[0].startswith("error: ")
        assert "00000002_000.png" in message[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "load_network", interrupt)
    assert localize_cxr.main([*base, "--device", "cpu", "--out", str(folder / "c")]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_rows_of_the_paper_are_shown_for_the_official_split_only(data, monkeypatch):
    folder, index, _ = data
    for official in (True, False):
        monkeypatch.setattr(nih, "load_index", lambda *_, o=official, **__: index._replace(official=o))
        _, out = evaluate(folder)
        assert ("Tables 1 and 2 of Seibold" in (out / "report.html").read_text()) == official


def test_known_maps_give_the_expected_hits(data):
    folder, *_ = data
    metrics, _ = evaluate(folder)
    assert metrics["images"] == 5
    assert metrics["boxes"] == 4
    # Mass: IoU 1, 1/2, 0. Nodule has p = 0.4, below T_p = 0.5.
    assert metrics["localization_ungated"] == {
        "0.1": {"Mass": pytest.approx(2 / 3), "Nodule": 0, "mean": pytest.approx(1 / 3)},
        "0.3": {"Mass": pytest.approx(2 / 3), "Nodule": 0, "mean": pytest.approx(1 / 3)},
        "0.5": {"Mass": pytest.approx(1 / 3), "Nodule": 0, "mean": pytest.approx(1 / 6)},
        "0.7": {"Mass": pytest.approx(1 / 3), "Nodule": 0, "mean": pytest.approx(1 / 6)},
    }
    assert metrics["localization"] == metrics["localization_ungated"]  # Mass is predicted at 0.9
    assert metrics["pointing_game"] == {"Mass": pytest.approx(2 / 3), "Nodule": 1, "mean": pytest.approx(5 / 6)}
    # scaled to its maximum, the map of the nodule gives its box
    assert metrics["max_box_acc"]["0.7"]["Nodule"] == 1
    assert metrics["auc"]["Mass"] == 1
    assert metrics["auc"]["Edema"] is None
    assert metrics["baselines"]["ceiling of the grid"]["0.7"] == {"Mass": 1, "Nodule": 1, "mean": 1}
    assert metrics["baselines"]["whole image"]["0.1"]["mean"] == pytest.approx((1 / 3) / 2)  # 8 of 64 cells


def test_boxes_peaks_pictures_and_ceiling_use_the_centre_of_the_cells(data, monkeypatch):
    """For cells that are centred on the edge of the image: everything moves up and left by half a cell."""
    folder, index, _ = data
    pixels = np.full((SIZE, SIZE), 30, np.uint8)
    pixels[12:20, 20:36] = 255  # pixels 16 along y; 24 and 32 along x: row 2, columns 3 and 4
    Image.fromarray(pixels).save(index.paths[0])
    one = index.test & (np.array(index.names) == index.names[0])
    boxes = {index.names[0]: [(MASS, *(1024 / SIZE * v for v in (20, 12, 16, 8)))]}
    monkeypatch.setattr(nih, "load_index", lambda *_, **__: index._replace(test=one, boxes=boxes))
    drawn = []
    monkeypatch.setattr(figure, "draw", DRAW)
    monkeypatch.setattr(Axes, "imshow", lambda self, picture, **more: drawn.append(picture))
    for grid, exact in ((KnownMapsFromTheEdge.grid, True), (KnownMaps.grid, False)):
        network = KnownMapsFromTheEdge()
        network.grid = grid
        monkeypatch.setattr(evaluation, "load_network", lambda *_, network=network: (network, dict(CONFIG), WHICH))
        metrics, out = evaluate(folder)
        for name, accuracy in (
            ("box", metrics["localization"]), ("best threshold", metrics["max_box_acc"]),
            ("ceiling", metrics["baselines"]["ceiling of the grid"]),
        ):  # fmt: skip
            assert (accuracy["0.7"]["Mass"] == 1) == exact, name
        # The figure has 512 pixels, the network 64. Cell borders lie half a network pixel right of the edges of
        # the boxes, because boxes consist of whole pixels.
        found = drawn[-1][..., 3] > 0.5 * 255 * page.OPACITY / 100
        edges = [np.flatnonzero(np.diff(found.any(axis), prepend=False, append=False)) for axis in (0, 1)]
        assert (np.abs(np.subtract(edges, [[8 * 20, 8 * 36], [8 * 12, 8 * 20]])) <= 4).all() == exact
        # the HTML gallery places and scales the picture of the map
        place = next(
            a
            for tag, a in self_contained_elements((out / "report.html").read_text()).found
            if a.get("class") == "map fixed"
        )
        left, width = float(place["x"]), float(place["width"])
        with Image.open(io.BytesIO(base64.b64decode(place["href"].split(",")[1]))) as picture:
            columns = (np.asarray(picture.convert("RGB")) != np.asarray(picture.convert("RGB"))[0, 0]).any((0, 2))
        edges = left + np.flatnonzero(np.diff(columns, prepend=False, append=False)) * width / picture.width
        assert (np.abs(edges - 16 * np.array([20, 36])) <= 8).all() == exact


def test_gate_and_threshold_are_separate_options(data):
    folder, *_ = data
    below, _ = evaluate(folder, "--threshold", "0.3")
    assert below["localization_ungated"]["0.7"]["Nodule"] == 1
    assert below["localization"]["0.7"]["Nodule"] == 0
    open_gate, _ = evaluate(folder, "--threshold", "0.3", "--gate", "0.3")
    assert open_gate["localization"]["0.7"]["Nodule"] == 1
    closed_gate, _ = evaluate(folder, "--gate", "0.95")
    assert closed_gate["localization"]["0.1"]["mean"] == 0
    assert closed_gate["localization_ungated"]["0.1"]["Mass"] == pytest.approx(2 / 3)


def test_thresholds_from_the_labels_of_validation_images(data, monkeypatch, capsys):
    folder, index, _ = data
    chosen, out = evaluate(folder, "--threshold", "validation", "--gate", "validation")
    assert chosen["localization"]["0.7"]["Nodule"] == 1
    details = json.loads((out / "details.json").read_text())
    assert details["threshold_of_class"]["Nodule"] == pytest.approx(0.25)  # between 0.1 and 0.4
    assert details["threshold_of_class"]["Edema"] == 0.5  # no validation labels to choose from
    assert details["validation_images"] == 2
    assert details["classes_at_0.5"] == [name for name in CLASSES if name not in ("Mass", "Nodule")]
    assert "of 2 validation images, 0.5 for Atelectasis" in (out / "report.html").read_text()
    assert (details["network"], details["epoch"]) == ("best", 7)
    assert "best, of epoch 7" in (out / "report.html").read_text()
    assert "warning" not in capsys.readouterr().err
    config = CONFIG | {"val_patients": [90, 91, 92]}
    monkeypatch.setattr(evaluation, "load_network", lambda *_: (KnownMaps(), config, WHICH))
    evaluate(folder, "--threshold", "validation")
    assert "only 1 of the run's 3 validation patients are in the data" in capsys.readouterr().err
    # with mean pooling, the probability of the image differs from the maximum of its map
    monkeypatch.setattr(evaluation, "load_network", lambda *_: (KnownMaps(), CONFIG | {"pooling": "mean"}, WHICH))
    evaluate(folder, "--threshold", "validation", "--gate", "validation")
    details = json.loads((out / "details.json").read_text())
    assert details["threshold_of_class"]["Nodule"] == pytest.approx(0.25)
    assert details["gate_of_class"]["Nodule"] == pytest.approx(0.1 + 0.3 * 4 / 64 / 2)
    # the boxes have no influence on the thresholds
    other = {name: [(c, 0.0, 0.0, 8.0, 8.0) for c, *_ in boxes] for name, boxes in index.boxes.items()}
    monkeypatch.setattr(nih, "load_index", lambda *_, **__: index._replace(boxes=other))
    evaluate(folder, "--threshold", "validation", "--gate", "validation")
    again = json.loads((out / "details.json").read_text())
    assert again["threshold_of_class"] == details["threshold_of_class"]
    assert again["gate_of_class"] == details["gate_of_class"]


@pytest.mark.parametrize(
    ("extra", "named"),
    [("00000002_000.png", "1 images of the official test list, 1 of them"), ("00000004_001.png", "patients")],
)
def test_training_images_in_the_test_list_are_an_error(data, monkeypatch, capsys, extra, named):
    folder, index, trained = data
    if extra not in index.names:  # another image of a patient of the test list
        index = index._replace(
            names=[*index.names, extra], patients=np.append(index.patients, 4), test=np.append(index.test, False),
            paths=[*index.paths, index.paths[0]], labels=np.append(index.labels, index.labels[:1], axis=0),
        )  # fmt: skip
        monkeypatch.setattr(nih, "load_index", lambda *_, **__: index)
    monkeypatch.setattr(provenance, "trained_names", lambda run: trained | {extra})
    out = folder / "out"
    assert localize_cxr.main(["--run", "r", "--data-dir", str(folder), "--out", str(out), "--device", "cpu"]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_metrics_match_the_schema(data):
    folder, *_ = data
    metrics, out = evaluate(folder)
    assert list(metrics) == [
        "auc", "auc_ci", "localization", "localization_ungated", "max_box_acc", "pointing_game", "baselines",
        "images", "boxes", "localization_relative", "localization_relative_ungated",
    ]  # fmt: skip
    assert list(metrics["auc"]) == list(metrics["auc_ci"]) == [*CLASSES, "mean"]
    assert len(metrics["auc_ci"]["Mass"]) == 2
    for table in (metrics["localization"], metrics["localization_ungated"], metrics["max_box_acc"]):
        assert list(table) == ["0.1", "0.3", "0.5", "0.7"]
    for table in metrics["baselines"].values():
        assert list(table) == ["0.1", "0.3", "0.5", "0.7"]
    details = json.loads((out / "details.json").read_text())
    low, high = details["localization_ungated_ci"]["0.5"]["Mass"]
    assert low <= metrics["localization_ungated"]["0.5"]["Mass"] <= high


def test_tables_hold_every_box_and_image(data):
    folder, index, _ = data
    _, out = evaluate(folder)
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == index.names[:5]
    assert float(rows[0]["p_Mass"]) == pytest.approx(0.9)
    assert float(rows[3]["p_Nodule"]) == pytest.approx(0.4)
    assert rows[3]["label_Nodule"] == "1"
    with (out / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iou"] for row in rows] == ["1.0000", "0.5000", "0.0000", "0.0000"]
    # in pixels of the box table, independent of the input size of the network
    assert [float(rows[1][f"found_{s}"]) for s in "xywh"] == [256, 128, 256, 256]
    assert rows[3]["found_x"] == ""


def test_run_of_train_cxr_is_evaluated(tmp_path, capsys, monkeypatch):
    """From generated images to the report. Then an evaluation on training images, which is an error."""
    monkeypatch.setattr(progress, "EVERY", 0.0)
    data, run = tmp_path / "data", tmp_path / "run"
    write_dataset(data, images=40, size=32, seed=1)
    small = ["--backbone", "local9", "--output-stride", "8", "--image-size", "32", "--batch-size", "8", "--epochs", "1"]
    common = ["--data-dir", str(data), "--device", "cpu", "--workers", "0"]
    assert train_cxr.main([*common, *small, "--out", str(run), "--val-fraction", "0.3"]) == 0
    evaluation = ["--run", str(run), "--draws", "5", "--threshold", "validation", "--gate", "validation"]
    assert localize_cxr.main([*common, *evaluation]) == 0
    # the output is not a terminal: progress is printed in lines
    lines = capsys.readouterr().err
    assert "\nepoch 1: step 1 of " in lines and "\nSGL, softmax pooling: batch 1 of " in lines
    metrics = json.loads((run / "localization" / "metrics.json").read_text())
    index = nih.load_index(data)
    assert metrics["images"] == index.test.sum()
    assert metrics["boxes"] == sum(len(boxes) for boxes in index.boxes.values()) > 0
    assert metrics["baselines"]["ceiling of the grid"]["0.1"]["mean"] > 0.5
    # with the two lists exchanged, the split differs from that of the training
    lists = data / nih.TRAIN_VAL_LIST, data / nih.TEST_LIST
    train, test = (path.read_bytes() for path in lists)
    lists[0].write_bytes(test)
    lists[1].write_bytes(train)
    assert localize_cxr.main([*common, *evaluation]) == 2
    assert f"trained or validated on {(~index.test).sum()} images of the official test list" in capsys.readouterr().err


def test_real_images_with_boxes_are_evaluated(data_dir, tmp_path, monkeypatch):
    images, tables = data_dir / "chestxray14_256", data_dir / "chestxray14"
    if not (images / "images").is_dir() or not tables.is_dir():
        pytest.skip(f"there is no {images} or {tables}")
    monkeypatch.setattr(evaluation, "load_network", lambda *_: (KnownMaps(), dict(CONFIG), WHICH))
    monkeypatch.setattr(provenance, "trained_names", lambda run: set())
    more = ["--tables", str(tables), "--allow-missing", "--gallery", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(figure, "draw", lambda *_: None)  # slow
    metrics, _ = evaluate(images, *more)
    assert (metrics["images"], metrics["boxes"]) == (311, 53)
    assert metrics["localization"]["0.1"]["mean"] < metrics["baselines"]["centre box"]["0.1"]["mean"]
    text = (tmp_path / "report.html").read_text()
    for shown in ("Tables 1 and 2 of Seibold", *paper.AUC, *paper.LOCALIZATION):
        assert shown in text
    with (tmp_path / "boxes.csv").open() as file:
        assert sum(row["class"] == "Infiltration" for row in csv.DictReader(file)) == 4  # "Infiltrate" in the list


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def self_contained_elements(text):
    """The elements of a page. Fails if the page loads anything from other files or hosts."""
    page = Elements(text)
    assert not page.open
    assert "http" not in text.replace("http-equiv", "")
    for _, attributes in page.found:
        for name in ("src", "href", "action", "srcset", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), attributes
    assert not [tag for tag, _ in page.found if tag in ("link", "iframe", "object", "embed", "base")]
    return page


def test_report_is_self_contained(data, monkeypatch):
    folder, *_ = data
    monkeypatch.setattr(figure, "draw", DRAW)
    _, out = evaluate(folder)
    text = (out / "report.html").read_text()
    page = self_contained_elements(text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    cards = [attributes for tag, attributes in page.found if attributes.get("class") == "card"]
    # the gallery of the best two and worst two images, and that of all
    assert [card["data-group"] for card in cards] == [
        "Mass",
        "Mass",
        "Mass",
        "Nodule",
        "Mass",
        "Nodule",
        "Mass",
        "Mass",
    ]
    assert [card["data-hit"] for card in cards] == ["1", "1", "0", "0", "1", "0", "1", "0"]
    frames = [attributes["class"] for tag, attributes in page.found if tag == "rect"]
    assert frames.count("true") == 8
    assert frames.count("found") == 6
    assert text.count(">no box</text>") == 2  # of the nodule in both galleries
    assert text.count('<span class="key-none">no box</span>') == 2  # their legends
    for shown in ("0.33", "SGL, max pooling", "MaxBoxAcc", "centre box", "1 images of the tables"):
        assert shown in text
    assert "Seibold" not in text  # the images differ from those of the paper
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles == ["Verdict", "Best and worst", "Classification", "Localization", "Curves", "Gallery", "Settings"]
    assert '<th scope="row">Edema</th>' not in text.split("<h2>Localization")[0]  # no image has this label
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text.lower())
    with Image.open(out / "localization.png") as picture:
        assert picture.width > 300


def test_two_runs_are_compared(data, monkeypatch):
    folder, *_ = data

    def load_network(run, *_):
        return KnownMaps(), CONFIG | ({"loss": "bag", "pooling": "mean"} if run.name == "other" else {}), WHICH

    monkeypatch.setattr(evaluation, "load_network", load_network)
    status = localize_cxr.main(["--run", str(folder / "one"), str(folder / "other"), "--data-dir", str(folder),
                                "--device", "cpu", "--draws", "5", "--upsampling", "bilinear"])  # fmt: skip
    assert status == 0
    out = folder / "one" / "localization"
    first, second = (json.loads((out / part / "metrics.json").read_text()) for part in ("", "baseline"))
    assert first["localization_ungated"] == second["localization_ungated"]
    assert first["localization"]["0.1"]["Mass"] > second["localization"]["0.1"]["Mass"] == 0  # a mean over the map
    text = (out / "report.html").read_text()
    page = self_contained_elements(text)
    used = {attributes["href"] for tag, attributes in page.found if tag == "use"}
    assert used == {f"#{attributes['id']}" for tag, attributes in page.found if tag == "image" and "id" in attributes}
    assert len(used) == 2 + 2 + 4
    assert "bag loss, mean pooling" in text
    assert "gallery smooth" in text


def test_data_without_boxes_are_evaluated(data, monkeypatch):
    folder, index, _ = data
    monkeypatch.setattr(nih, "load_index", lambda *_, **__: index._replace(boxes={}))
    metrics, out = evaluate(folder, "--threshold", "validation")
    assert metrics["boxes"] == 0
    assert metrics["localization"]["0.1"] == {"mean": None}
    assert "None of these images has a box" in (out / "report.html").read_text()


def test_cache_does_not_change_the_metrics(data):
    folder, *_ = data
    plain, _ = evaluate(folder)
    cached, _ = evaluate(folder, "--cache", str(folder / "cache"))
    assert cached == plain


@pytest.mark.parametrize(
    "option",
    [("--morphology", "4"), ("--threshold", "1"), ("--gate", "test"), ("--draws", "0"), ("--run", "a", "b", "c")],
)
def test_contradictory_options_are_errors(option, capsys):
    with pytest.raises(SystemExit):
        localize_cxr.main(["--run", "r", "--data-dir", "d", *option])
    assert option[0] in capsys.readouterr().err


@pytest.mark.parametrize("first", [0.5, 0.0625, 1.8125, -0.75])
def test_gallery_shows_the_upsampled_map(first):
    """Scaled by the browser, the picture equals the upsampled map at every pixel."""
    heatmap = np.arange(9).reshape(3, 3) / 8
    card = gallery.Card("", "", np.zeros((24, 24), np.uint8), 24, np.array([NO_BOX]),
                        [gallery.View("", heatmap, np.array(NO_BOX), "", first)], 0.0)  # fmt: skip
    images = [a for tag, a in Elements(gallery.gallery([card], False, "all")).found if tag == "image"]
    seen = heatmap[np.ix_(*seen_cells((3, 3), (24, 24), first))]
    own = (float(seen.min()), float(seen.max()))
    for kind, limits in (("map fixed", (0.0, 1.0)), ("map own", own)):
        (place,) = [a for a in images if a.get("class") == kind]
        x, y, width, height = (float(place[name]) for name in ("x", "y", "width", "height"))
        with Image.open(io.BytesIO(base64.b64decode(place["href"].split(",")[1]))) as picture:
            pixels = np.asarray(picture.convert("RGBA"))
        rows, columns = (
            np.floor((np.arange(24) + 0.5 - start) / length * count).astype(int)
            for start, length, count in ((y, height, len(pixels)), (x, width, len(pixels[0])))
        )
        assert min(rows.min(), columns.min()) >= 0
        shown = pixels[np.ix_(rows, columns)]
        assert (shown == overlay(heatmap, (24, 24), first=first, limits=limits, opacity=1.0)).all()


def test_constant_map_is_shown():
    card = gallery.Card("", "", np.zeros((24, 24), np.uint8), 24, np.array([NO_BOX]),
                        [gallery.View("", np.full((3, 3), 0.05), np.array(NO_BOX), "")], 0.0)  # fmt: skip
    images = [a for tag, a in Elements(gallery.gallery([card], False, "all")).found if "map" in a.get("class", "")]
    opacities = {}
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["href"].split(",")[1]))) as picture:
            opacities[image["class"]] = np.asarray(picture.convert("RGBA"))[..., 3]
    assert (opacities["map fixed"] == round(0.05 * 255)).all()  # nearly transparent
    assert (opacities["map own"] == 0).all()  # its range is empty


def test_curves_omit_undefined_values():
    svg = page.chart([page.Line("a <b>", [0, 0.5, 1], [0, math.nan, 1], 0)], "title", "x", "y")
    assert svg.count("344.0,") == 0 or "nan" not in svg
    assert "a &lt;b&gt;" in svg
    (points,) = re.findall(r'points="([^"]*)"', svg)
    assert points == "44.0,220.0 348.0,10.0"


def test_text_is_escaped_once():
    assert page.text("<&>") == "&lt;&amp;&gt;"
    assert page.text(page.text("<&>")) == "&lt;&amp;&gt;"
    assert "<td>&lt;b&gt;</td>" in page.table(["", "x"], [["a", "<b>"]])


def test_relative_thresholds_have_separate_rows(data, capsys):
    folder, *_ = data
    metrics, out = evaluate(folder)
    # the nodule has p = 0.4: above half of the maximum 0.4, but below T_p
    assert metrics["localization_ungated"]["0.7"]["Nodule"] == 0
    assert metrics["localization_relative_ungated"]["0.7"]["Nodule"] == 1
    assert metrics["localization_relative"]["0.7"]["Nodule"] == 0  # it is not predicted
    assert "T_p 0.5max, without gate" in (out / "report.html").read_text()
    assert "T_p 0.5max, without gate" in capsys.readouterr().out
    relative, _ = evaluate(folder, "--threshold", "0.5max")
    assert relative["localization_ungated"] == metrics["localization_relative_ungated"]
    assert relative["localization"] == metrics["localization_relative"]
    assert "localization_relative" not in relative
    assert json.loads((out / "details.json").read_text())["threshold"] == "0.5max"
    assert "T_p 0.5max, gate 0.5" in (out / "report.html").read_text()
    higher, _ = evaluate(folder, "--threshold", "0.99max")
    assert higher["localization_ungated"]["0.7"]["Nodule"] == 1


def test_even_grid_ignores_the_centre_of_the_cells(data, monkeypatch):
    """A network whose cells are centred on the edge, with and without the assumption of an even grid."""
    folder, index, _ = data
    pixels = np.full((SIZE, SIZE), 30, np.uint8)
    pixels[12:20, 20:36] = 255
    Image.fromarray(pixels).save(index.paths[0])
    one = index.test & (np.array(index.names) == index.names[0])
    boxes = {index.names[0]: [(MASS, *(1024 / SIZE * v for v in (20, 12, 16, 8)))]}
    monkeypatch.setattr(nih, "load_index", lambda *_, **__: index._replace(test=one, boxes=boxes))
    monkeypatch.setattr(evaluation, "load_network", lambda *_: (KnownMapsFromTheEdge(), dict(CONFIG), WHICH))
    for raster, found, first in (("network", (20, 12, 16, 8), 0.0625), ("even", (24, 16, 16, 8), 0.5)):
        _, out = evaluate(folder, "--raster", raster)
        with (out / "boxes.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert [float(row[f"found_{side}"]) for side in "xywh"] == [1024 / SIZE * v for v in found]
        details = json.loads((out / "details.json").read_text())
        assert (details["raster"], details["first_cell"]) == (raster, first)
        assert f"{raster} raster" in (out / "report.html").read_text()


def test_best_and_worst_images_are_ranked(data):
    _, index, _ = data
    found = truth.truth_of(index)
    probability = np.full((5, len(CLASSES)), 0.1)
    probability[2, MASS] = 0.9
    run = evaluation.Evaluated(
        "run", {}, prediction.Predictions(probability, probability, [], 0.5, np.zeros((0, 4), int), SIZE),
        np.zeros((4, 4)), np.array([0.2, 0.7, 0.0, 0.0]), np.ones(4, bool), {}, {},
    )  # fmt: skip
    assert report.best_and_worst(run, found, 4) == ([1, 0], [2, 3])  # a miss at p = 0.9 is worse than one at 0.1
    assert report.best_and_worst(run, found, 1) == ([1], [2])


def test_boxes_have_the_order_of_the_images(data):
    _, index, _ = data
    found = truth.truth_of(index)
    assert found.image.tolist() == [0, 1, 2, 3]
    assert [boxes.tolist() for boxes in found.boxes][1] == [[256, 128, 512, 256]]
