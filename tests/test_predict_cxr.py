"""predict_cxr.py: probabilities, boxes and maps of images without labels."""

from __future__ import annotations

import argparse
import csv
import html
import json
import os
import re

import localize_cxr
import numpy as np
import predict_cxr
import pytest
import torch
from common.files import save_atomically
from common.options import NAMED
from images import evaluation, items, new_images, pixels
from images.checkpoint import OLDER, make_model
from images.folder import load_folder, without_labels
from images.models import Grid
from images.prediction import predict
from images.provenance import digest_of
from images.thresholds import Relative, shown
from test_images_dicom import write_dicom

from sgl_ops.localization import upsample

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

SIDE, CELL = 64, 8
SIZES = [(60, 40), (40, 60), (64, 64), (90, 31)]


def config_of(**more):
    config = {
        "backbone": "local17", "output_stride": CELL, "image_size": SIDE, "classes": ["red", "green"], "channels": 3,
        "fit": "pad", "pooling": "max", "loss": "sgl", "seed": 0, "val_patients": [], "dataset": "folder",
    }  # fmt: skip
    return OLDER | config | more


def write_run(run, seed=0, trained=("train.png",), **more):
    """A run folder as of train_cxr.py. The network has random weights; the logits of a map have both signs."""
    torch.manual_seed(seed)
    config = config_of(**more)
    config["train_names_digest"] = digest_of(list(trained))
    model = make_model(config)
    coarse = torch.nn.functional.interpolate(torch.randn(16, 3, 6, 6), (SIDE, SIDE))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(coarse)  # sets the statistics of the batch norm
        logits = model.eval()(coarse)
        spread = logits.std((0, 2, 3)) / 2
        model.head.weight /= spread[:, None, None, None]
        model.head.bias.copy_((model.head.bias - logits.mean((0, 2, 3))) / spread)
    run.mkdir(parents=True)
    save_atomically({"config": config, "model": model.state_dict(), "epoch": 3}, run / "last.pt")
    rows = [["image", "part", "patient"], *([name, "train", name] for name in trained)]
    write_csv(run / "split.csv", *rows)
    return run


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save_photo(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture
def photos(tmp_path):
    """Eight photos of several sizes in two subfolders with the same file names."""
    folder = tmp_path / "photos"
    for k in range(8):
        save_photo(folder / ("a" if k < 4 else "b") / f"{k % 4}.png", SIZES[k % 4], k)
    return folder


def run_command(run, images, out, *more):
    runs = [str(r) for r in run] if isinstance(run, (list, tuple)) else [str(run)]
    return predict_cxr.main(["--run", *runs, "--images", str(images), "--out", str(out), "--device", "cpu", *more])


class Brightness(torch.nn.Module):
    """A network whose first class has a probability of 0.05 in black cells and 0.95 in white ones; the second 0.1."""

    grid = Grid(CELL / 2, CELL)

    def forward(self, x):
        white = torch.nn.functional.avg_pool2d(x[:, :1] * pixels.STD[0] + pixels.MEAN[0], CELL)
        return torch.logit(torch.cat([0.05 + 0.9 * white, torch.full_like(white, 0.1)], 1).clamp(0.01, 0.99))


@pytest.fixture
def brightness(monkeypatch):
    """Networks with the given settings, whose maps show the brightness of the images."""

    def use(**more):
        loaded = Brightness(), config_of(**more), {"network": "last", "epoch": 1}
        monkeypatch.setattr(evaluation, "load_network", lambda *_: loaded)

    return use


def painted(size, *boxes):
    """A black image with white ``boxes``."""
    array = np.zeros((size[1], size[0], 3), np.uint8)
    for x, y, w, h in boxes:
        array[y : y + h, x : x + w] = 255
    return Image.fromarray(array)


def boxes_in(out):
    return [
        (row["image"], row["label"], *(float(row[key]) for key in ("x", "y", "w", "h")))
        for row in rows_of(out / "boxes.csv")
    ]


# agreement with localize_cxr.py


@pytest.mark.parametrize("fit", ["pad", "squeeze"])
def test_predictions_and_boxes_are_those_of_the_evaluation(tmp_path, photos, fit):
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    write_csv(photos / "labels.csv", ["image", "split", "red", "green"], *([n, "test", 1, 1] for n in names))
    write_csv(
        photos / "boxes.csv", ["image", "label", "x", "y", "w", "h"],
        *([n, c, 3, 5, 9, 8] for n in names for c in ("red", "green")),
    )  # fmt: skip
    run = write_run(tmp_path / "run", fit=fit)
    given = ["--gate", "0", "--threshold", "0.7", "--upsampling", "bilinear", "--morphology", "3"]
    command = ["--run", str(run), "--data-dir", str(photos), "--out", str(tmp_path / "known"), "--device", "cpu"]
    assert localize_cxr.main([*command, "--draws", "5", "--gallery", "0", *given]) == 0
    assert run_command(run, photos, tmp_path / "new", *given) == 0
    known, new = (rows_of(tmp_path / name / "predictions.csv") for name in ("known", "new"))
    assert list(new[0]) == ["image", "p_red", "p_green"]
    assert [[row[key] for key in new[0]] for row in known] == [list(row.values()) for row in new]
    assert len({row["p_red"] for row in new}) == len(names)
    first = {}
    for image, label, *box in boxes_in(tmp_path / "new"):
        first.setdefault((image, label), box)
    found = {
        (row["image"], row["class"]): [float(row[f"found_{s}"]) for s in "xywh"]
        for row in rows_of(tmp_path / "known" / "boxes.csv")
        if row["found_x"]
    }
    assert len(found) > len(names)
    assert len({tuple(box) for box in found.values()}) > len(names)
    assert len(boxes_in(tmp_path / "new")) > len(found)
    assert first == {pair: pytest.approx(box, abs=1e-3) for pair, box in found.items()}


def test_arrays_are_exactly_those_of_predict(tmp_path, photos):
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    write_csv(photos / "labels.csv", ["image", "split", "red", "green"], *([n, "test", 1, 1] for n in names))
    args = argparse.Namespace(
        device="cpu", which=None, batch_size=3, workers=0, raster="network", cache=None, threshold=0.5,
        upsampling="nearest", morphology=5, gate=0.5,
    )  # fmt: skip
    networks = new_images.open_ensemble([write_run(tmp_path / "run")], args)
    index = load_folder(photos)
    image, classes = np.divmod(np.arange(2 * len(names)), 2)
    known = predict(*networks[0][:2], index, np.arange(len(names)), args, image, classes)
    new = list(new_images.predict_images(networks, without_labels(photos, networks[0].config), args))
    assert [item.row for item in new] == list(range(len(names)))
    assert np.array_equal(np.array([item.probability for item in new]), known.probability)
    assert np.array_equal(np.concatenate([item.maps for item in new]), np.array(known.maps))
    assert np.array_equal(np.array([item.frame for item in new]), known.frames[::2])


def test_options_are_those_of_localize_cxr(capsys):
    new = vars(predict_cxr.parse(["--run", "r", "--images", "i", "--out", "o"]))
    known = vars(localize_cxr.parse(["--run", "r", "--data-dir", "d"]))
    shared = ("which", "batch_size", "workers", "device", "threshold", "gate", "upsampling", "raster", "morphology",
              "gallery_size")  # fmt: skip
    assert {name: new[name] for name in shared} == {name: known[name] for name in shared}
    for option, wrong in (
        ("--threshold", "validation"), ("--gate", "validation"), ("--gate", "1"), ("--morphology", "4"),
        ("--batch-size", "0"), ("--gallery", "-1"), ("--gallery-size", "0"), ("--workers", "-1"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            predict_cxr.parse(["--run", "r", "--images", "i", "--out", "o", option, wrong])
        assert option in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict_cxr.parse(["--run", "r", "s", "x/../r", "--images", "i", "--out", "o"])
    assert "--run: expected different runs, got r twice" in capsys.readouterr().err


@pytest.mark.parametrize(("threshold", "least"), [("validation", 1), ("0.6", 3)])
def test_options_of_an_evaluation_are_used(tmp_path, photos, capsys, threshold, least):
    """--like REPORT gives the thresholds that were chosen with validation labels, class by class."""
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    val, test = names[:4], names[4:]
    report, out = tmp_path / "report", tmp_path / "out"
    run = write_run(tmp_path / "run", trained=val, val_patients=val, pooling="mean")
    assert run_command(run, photos, out) == 0
    p = np.array([[float(row["p_red"]), float(row["p_green"])] for row in rows_of(out / "predictions.csv")])
    labels = (p > np.median(p[:4], axis=0)).astype(int).tolist()
    write_csv(photos / "labels.csv", ["image", "split", "red", "green"],
              *([n, "val" if n in val else "test", *of] for n, of in zip(names, labels, strict=True)))  # fmt: skip
    write_csv(photos / "boxes.csv", ["image", "label", "x", "y", "w", "h"],
              *([n, c, 3, 5, 9, 8] for n in names for c in ("red", "green")))  # fmt: skip
    given = ["--threshold", threshold, "--gate", "validation", "--upsampling", "bilinear", "--morphology", "3",
             "--raster", "even"]  # fmt: skip
    command = ["--run", str(run), "--data-dir", str(photos), "--out", str(report), "--device", "cpu", "--draws", "5"]
    assert localize_cxr.main([*command, "--gallery", "0", *given]) == 0
    details = json.loads((report / "details.json").read_text())
    limits = {*details["threshold_of_class"].values(), *details["gate_of_class"].values(), 0.5}
    assert len(limits) == (5 if threshold == "validation" else 4)
    capsys.readouterr()
    assert run_command(run, photos, out, "--like", str(report)) == 0
    assert "warning" not in capsys.readouterr().err
    first = {}
    for image, label, *box in boxes_in(out):
        if image in test:
            first.setdefault((image, label), box)
    known = rows_of(report / "boxes.csv")
    found = {
        (row["image"], row["class"]): [float(row[f"found_{s}"]) for s in "xywh"]
        for row in known
        if row["found_x"] and row["predicted"] == "1"
    }
    assert least <= len(found) < len(known)
    assert first == {pair: pytest.approx(box, abs=1e-3) for pair, box in found.items()}
    text = (out / "report.html").read_text()
    limits_of_red = [shown(details[f"{name}_of_class"]["red"]) for name in ("threshold", "gate")]
    assert "".join(f"<td>{limit}</td>" for limit in limits_of_red) in text
    # options of the command have priority
    base = ["--run", str(run), "--images", str(photos), "--out", str(out), "--like", str(report)]
    args = predict_cxr.parse([*base, "--gate", "0.5", "--raster", "network"])
    assert (args.gate, args.raster, args.morphology, args.which) == (0.5, "network", 3, "last")
    assert args.threshold == (details["threshold_of_class"] if threshold == "validation" else 0.6)
    # a network with other settings and the same seed, another network, and a network with another class
    details["config"] |= {"epochs": 77}
    content = (report / "details.json").read_text()
    (report / "details.json").write_text(json.dumps(details))
    assert run_command(run, photos, out, "--like", str(report)) == 0
    assert f"warning: like: {report} evaluates another network than {run}" in capsys.readouterr().err
    (report / "details.json").write_text(content)
    assert run_command(write_run(tmp_path / "other", seed=1), photos, out, "--like", str(report)) == 0
    assert f"warning: like: {report} evaluates another network than {tmp_path / 'other'}" in capsys.readouterr().err
    blue = write_run(tmp_path / "blue", classes=["red", "blue"])
    assert run_command(blue, photos, out, "--like", str(report)) == 2
    name = "threshold" if threshold == "validation" else "gate"
    assert f"error: like: expected a {name} of each class in {report}, found none of blue" in capsys.readouterr().err


def test_relative_threshold_of_an_evaluation_is_used(tmp_path):
    details = {"threshold": "0.7max", "gate": 0.25, "threshold_of_class": {"red": 0.7}, "gate_of_class": {"red": 0.25},
               "upsampling": "nearest", "raster": "network", "morphology": 5, "network": "best"}  # fmt: skip
    (tmp_path / "details.json").write_text(json.dumps(details))
    args = predict_cxr.parse(["--run", "r", "--images", "i", "--out", "o", "--like", str(tmp_path)])
    assert isinstance(args.threshold, Relative)
    assert (args.threshold, args.gate, args.which) == (0.7, 0.25, "best")


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"threshold": 2, "gate": 0.5, "network": "best"}'])
def test_folder_without_an_evaluation_is_an_error(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "details.json").write_text(content)
    with pytest.raises(SystemExit):
        predict_cxr.parse(["--run", "r", "--images", "i", "--out", "o", "--like", str(tmp_path)])
    error = capsys.readouterr().err
    assert "error: --like: " in error
    assert ("found no details.json in" if content is None else "expected the details.json of localize_cxr.py") in error


# boxes in pixels of the image


@pytest.mark.parametrize(
    ("fit", "size", "box"),
    [
        # pad: 128x64 pixels become 64x32, so a cell has 16x16 pixels of the image, and the first row begins at 0
        ("pad", (128, 64), (32, 16, 32, 16)),
        ("pad", (64, 128), (16, 80, 16, 32)),
        # squeeze: a cell has 16x8 and 8x16 pixels of the image
        ("squeeze", (128, 64), (32, 8, 32, 24)),
        ("squeeze", (64, 128), (8, 80, 24, 32)),
        ("square", (128, 128), (32, 16, 48, 16)),
    ],
)
@pytest.mark.parametrize("turned", [False, True], ids=["", "EXIF"])
def test_boxes_enclose_the_painted_area(tmp_path, brightness, fit, size, box, turned):
    brightness(fit=fit)
    picture = painted(size, box)
    (tmp_path / "new").mkdir()
    if turned:  # stored with another orientation
        exif = Image.Exif()
        exif[pixels.ORIENTATION] = 6
        stored = picture.transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / "new" / "x.png", exif=exif)
        with Image.open(tmp_path / "new" / "x.png") as saved:
            assert saved.size == size[::-1]
            assert np.array_equal(ImageOps.exif_transpose(saved), picture)
    else:
        picture.save(tmp_path / "new" / "x.png")
    assert run_command("r", tmp_path / "new", tmp_path / "out") == 0
    assert boxes_in(tmp_path / "out") == [("x.png", "red", *box)]
    (row,) = rows_of(tmp_path / "out" / "boxes.csv")
    assert list(row) == ["image", "label", "x", "y", "w", "h", "p"]
    assert 0.8 < float(row["p"]) < 0.96


def test_dicom_is_read(tmp_path, brightness):
    """A grey DICOM file of 16 bits, for a network that was trained on colours."""
    brightness()
    (tmp_path / "new").mkdir()
    values = np.zeros((64, 128), np.uint16)
    values[16:32, 32:64] = 4000
    write_dicom(tmp_path / "new" / "film.dcm", values)
    assert run_command("r", tmp_path / "new", tmp_path / "out") == 0
    assert boxes_in(tmp_path / "out") == [("film.dcm", "red", 32, 16, 32, 16)]


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [(90, 31), (31, 90), (97, 64)])
def test_padding_gives_no_box(tmp_path, brightness, size, upsampling):
    """The padding has p = 0.45, and cells of the padding overlap the image at its edges."""
    brightness()
    (tmp_path / "new").mkdir()
    painted(size).save(tmp_path / "new" / "black.png")
    painted(size, (0, 0, *size)).save(tmp_path / "new" / "white.png")
    given = ["--threshold", "0.3", "--gate", "0", "--upsampling", upsampling, "--morphology", "1"]
    assert run_command("r", tmp_path / "new", tmp_path / "out", *given) == 0
    ((name, label, x, y, w, h),) = boxes_in(tmp_path / "out")
    assert (name, label) == ("white.png", "red")
    assert min(x, y) >= 0 and x + w <= size[0] and y + h <= size[1]
    assert w * h > 0.6 * size[0] * size[1]
    if size == (97, 64):  # the centres of all cells that overlap the image are in it
        assert (x, y, w, h) == (0, 0, *size)


def test_every_component_has_a_box(tmp_path, brightness):
    brightness(fit="square")
    (tmp_path / "new").mkdir()
    picture = painted((64, 64), (8, 8, 8, 16), (32, 40, 16, 8))
    grey = np.array(picture)
    grey[8:24, 8:16] = 180  # p = 0.69
    Image.fromarray(grey).save(tmp_path / "new" / "x.png")
    both = [("x.png", "red", 32, 40, 16, 8), ("x.png", "red", 8, 8, 8, 16)]  # the most probable one first
    for more, expected in (
        ([], both), (["--threshold", "0.7"], both[:1]), (["--threshold", "0.8max"], both[:1]),
        (["--threshold", "0.7max"], both), (["--gate", "0.96"], []), (["--morphology", "9"], []),
    ):  # fmt: skip
        assert run_command("r", tmp_path / "new", tmp_path / "out", *more) == 0
        assert boxes_in(tmp_path / "out") == expected, more
    assert run_command("r", tmp_path / "new", tmp_path / "out") == 0
    p = [float(row["p"]) for row in rows_of(tmp_path / "out" / "boxes.csv")]
    assert p == pytest.approx([0.95, 0.05 + 0.9 * 180 / 255], abs=1e-3)


@pytest.mark.parametrize("fit", ["pad", "squeeze"])
def test_maps_lie_on_the_image(tmp_path, brightness, fit, capsys):
    brightness(fit=fit)
    save = tmp_path / "new" / "a" / "x.png"
    save.parent.mkdir(parents=True)
    box = (32, 16, 32, 16)
    painted((128, 64), box).save(save)
    assert run_command("r", tmp_path / "new", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "maps").exists()
    assert run_command("r", tmp_path / "new", tmp_path / "out", "--maps") == 0
    with np.load(tmp_path / "out" / "maps" / "a" / "x.png.npz") as content:
        maps, classes, first = content["maps"], content["classes"].tolist(), float(content["first"])
    assert (classes, maps.dtype) == (["red", "green"], np.float32)
    whole = upsample(maps[0], (64, 128), first=first)
    inside = np.zeros((64, 128), bool)
    inside[16:32, 32:64] = True
    assert np.array_equal(whole > 0.5, inside)
    assert np.allclose(maps[1], 0.1)
    assert "note:" not in capsys.readouterr().out
    # another image: the map of the first one is an older file
    save.rename(save.with_name("y.png"))
    os.utime(tmp_path / "out" / "maps" / "a" / "x.png.npz", (1, 1))
    assert run_command("r", tmp_path / "new", tmp_path / "out", "--maps") == 0
    assert f"note: {tmp_path / 'out' / 'maps'} also holds maps of an earlier call (files: 1)" in capsys.readouterr().out


# several runs


def test_probabilities_of_several_runs_are_averaged(tmp_path, photos):
    """Probabilities and maps are the means, although the runs have other orders of classes and other poolings."""
    runs = [
        write_run(tmp_path / "one", 0),
        write_run(tmp_path / "two", 1, classes=["green", "red"], pooling="mean"),
        write_run(tmp_path / "three", 2),
    ]
    found = []
    for name, run in (*zip("123", runs, strict=True), ("all", runs)):
        out = tmp_path / f"out{name}"
        assert run_command(run, photos, out, "--maps", "--gallery", "1") == 0
        rows = {
            row["image"]: [float(row[f"p_{c}"]) for c in ("red", "green")] for row in rows_of(out / "predictions.csv")
        }
        maps = {}
        for image in rows:
            with np.load(out / "maps" / f"{image}.npz") as content:
                order = [content["classes"].tolist().index(c) for c in ("red", "green")]
                maps[image] = content["maps"][order]
        found.append((rows, maps))
    *single, mean = found
    for image in mean[0]:
        assert mean[0][image] == pytest.approx(np.mean([part[0][image] for part in single], axis=0), abs=2e-6)
        assert np.allclose(mean[1][image], np.mean([part[1][image] for part in single], axis=0), atol=1e-6)
    assert not np.allclose(single[0][1]["a/0.png"], single[1][1]["a/0.png"], atol=0.1)
    assert "Mean of 3 networks, on 8 images" in (tmp_path / "outall" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"classes": ["red", "blue"]}, "same classes, got green, red in .*one and blue, red in .*two"),
        ({"classes": ["red"]}, "same classes, got green, red in .*one and red in .*two"),
        ({"image_size": 32}, "same image_size, got 64 in .*one and 32 in .*two"),
        ({"channels": 1}, "same channels, got 3 in .*one and 1 in .*two"),
        ({"fit": "squeeze"}, "same fit, got pad in .*one and squeeze in .*two"),
        (
            {"output_stride": 16},
            "whose maps have the same cells, got a cell every 8 pixels from .* in .*one, and every",
        ),
    ],
)
def test_runs_that_do_not_match_are_an_error(tmp_path, photos, capsys, more, message):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", **more)]
    assert run_command(runs, photos, tmp_path / "out") == 2
    assert re.search(f"error: run: expected runs .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_missing_run_is_an_error(tmp_path, photos, capsys):
    run = write_run(tmp_path / "run")
    assert run_command(tmp_path / "other", photos, tmp_path / "out") == 2
    assert "error: run: " in capsys.readouterr().err
    assert run_command(run, photos, tmp_path / "out", "--which", "best") == 2
    assert f"error: run: {run} holds no best.pt" in capsys.readouterr().err


# images that cannot be read


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_images_are_left_out(tmp_path, photos, capsys, workers):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    assert run_command(run, photos, out) == 0
    whole = [rows_of(out / name) for name in ("predictions.csv", "boxes.csv")]
    assert "warning" not in capsys.readouterr().err
    (photos / "a" / "2.5.png").write_bytes((photos / "a" / "0.png").read_bytes()[:60])
    (photos / "text.jpg").write_text("<b>no image</b>")
    (photos / "notes.txt").write_text("is not in the list of images")
    assert run_command(run, photos, out, "--workers", workers, "--batch-size", "3") == 1
    printed = capsys.readouterr()
    assert "warning: 2 images cannot be read and were left out:\n" in printed.err
    named = [line for line in printed.err.splitlines() if line.startswith("  ")]
    assert [line.split(": ")[0].strip() for line in named] == [str(photos / "a" / "2.5.png"), str(photos / "text.jpg")]
    assert [rows_of(out / name) for name in ("predictions.csv", "boxes.csv")] == whole
    text = (out / "report.html").read_text()
    assert "2 images cannot be read." in text
    assert html.escape(str(photos / "text.jpg")) in text
    assert printed.out.endswith(f"next: open {out / 'report.html'} in a browser\n")


def test_long_lists_of_unreadable_images_are_shortened(tmp_path, photos, capsys):
    for k in range(NAMED + 3):
        (photos / f"{k}.bmp").write_text("")
    assert run_command(write_run(tmp_path / "run"), photos, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"warning: {NAMED + 3} images cannot be read" in error
    assert error.count(".bmp: ") == NAMED
    assert error.endswith("\n  ...\n")
    assert (tmp_path / "out" / "report.html").read_text().count(".bmp: ") == NAMED + 3


def test_folders_without_readable_images_are_errors(tmp_path, capsys):
    run, folder = write_run(tmp_path / "run"), tmp_path / "new"
    assert run_command(run, folder, tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: {folder}: no such folder\n"
    folder.mkdir()
    (folder / "report.pdf").write_text("")  # Pillow writes PDF, but does not read it
    assert run_command(run, folder, tmp_path / "out") == 2
    assert f"error: images: expected images in {folder}, found no file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (folder / "x.png").write_text("")
    assert run_command(run, folder, tmp_path / "out") == 2
    assert "error: images: none of the 1 images can be read, for example" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_file_in_place_of_the_output_folder_is_an_error(tmp_path, photos, capsys):
    (tmp_path / "out").write_text("")
    assert run_command(write_run(tmp_path / "run"), photos, tmp_path / "out") == 2
    assert f"'{tmp_path / 'out'}'" in capsys.readouterr().err


# memory and report


def test_images_are_read_batch_by_batch(tmp_path, photos, monkeypatch):
    read = []
    load = items.load_image
    monkeypatch.setattr(items, "load_image", lambda path, *more: read.append(path) or load(path, *more))
    args = argparse.Namespace(device="cpu", which=None, batch_size=3, workers=0, raster="network")
    networks = new_images.open_ensemble([write_run(tmp_path / "run")], args)
    stream = new_images.predict_images(networks, without_labels(photos, networks[0].config), args)
    for expected in (3, 3, 3, 6, 6, 6, 8, 8):
        next(stream)
        assert len(read) == expected


def test_only_the_highest_are_kept():
    highest = new_images.Highest(3)
    batch = np.zeros((4, 2, 8, 8))
    for row, p in enumerate([0.2, 0.9, 0.5, 0.9, 0.1, 0.5, 0.7]):
        found = new_images.Found(row, p, batch[row % 4, 0], np.zeros(4), np.zeros((0, 4)), np.zeros(0), False)
        highest.add(found)
        assert len(highest.kept) <= 3
    assert [(found.row, found.probability) for found in highest.sorted()] == [(1, 0.9), (3, 0.9), (6, 0.7)]
    assert all(found.heatmap.base is None for found in highest.sorted())
    none = new_images.Highest(0)
    none.add(found)
    assert none.sorted() == []


def test_report_shows_the_images_with_the_highest_probability(tmp_path, brightness):
    folder, out = tmp_path / "<new>", tmp_path / "out"
    folder.mkdir()
    brightness(fit="squeeze", note="<script>alert(1)</script>")
    for k, value in enumerate((40, 250, 120, 200)):
        Image.fromarray(np.full((32, 64, 3), value, np.uint8)).save(folder / f"<{k}>.png")
    assert run_command("r", folder, out, "--gallery", "2", "--gate", "0.05") == 0
    text = (out / "report.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert "<title>&lt;new&gt;: predictions</title>" in text
    cards = re.findall(r'<figure class="card" data-group="(\w+)".*?<figcaption>(.*?)</figcaption>', text)
    assert cards == [("red", "&lt;1&gt;.png"), ("red", "&lt;3&gt;.png"), ("green", "&lt;0&gt;.png"),
                     ("green", "&lt;1&gt;.png")]  # fmt: skip
    captions = re.findall(r"</svg><b>(\w+)</b> (.*?)</div>", text)
    assert captions[0] == ("red", "p 0.93, 1 box")
    assert captions[2] == ("green", "p 0.10, no boxes")
    assert text.count('class="found"') == 2
    assert text.count(">no box</text>") == 2
    assert text.count('style="aspect-ratio: 2"') == 4  # each image is shown with its own aspect ratio
    assert "true box" not in text
    table = re.search(r'<th scope="row">red</th>(.*?)</tr>', text)[1]
    assert re.findall("<td>(.*?)</td>", table) == ["4", "2", "0.932", "0.615", "0.191"]
    assert 'href="http' not in text and "src=" not in text
    assert run_command("r", folder, out, "--gallery", "0") == 0
    assert "<figure" not in (out / "report.html").read_text()
