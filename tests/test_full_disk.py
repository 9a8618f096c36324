"""Commands of the examples that write files: if a write fails, the error message names the file."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from features.store import Bag, StoreWriter
from images.synthetic_set import write_dataset

Image = pytest.importorskip("PIL.Image")
resource = pytest.importorskip("resource")

SMALL = "--backbone local17 --image-size 64 --batch-size 8 --epochs 1 --workers 0 --device cpu"


@contextlib.contextmanager
def files_up_to(size):
    """Limits files of this process to ``size`` bytes. Larger writes fail as on a full disk, with no file name."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_error_of_a_plain_write_has_no_file_name(tmp_path):
    with files_up_to(10), pytest.raises(OSError, match="File too large") as caught:
        (tmp_path / "x").write_text(20 * "x")
    assert caught.value.filename is None


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    data = tmp_path_factory.mktemp("films") / "data"
    write_dataset(data, images=40, size=64, seed=0)
    return data


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    assert importlib.import_module("train_cxr").main(["--data-dir", str(films), "--out", str(run), *SMALL.split()]) == 0
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(8):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{k}.png")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "cat"], *([f"{k}.png", k % 2] for k in range(8))])
    return folder


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """Ten bags of 200 to 209 instances with 4 features."""
    folder = tmp_path_factory.mktemp("bags")
    writer = StoreWriter(folder, {})
    rng = np.random.default_rng(0)
    for k in range(10):
        writer.add(f"{k}", Bag(rng.normal(size=(200 + k, 4)), rng.uniform(0, 99, (200 + k, 2)), None, None))
    parts = ("train", "train", "train", "test", "test")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["bag", "cat", "split"], *([k, k % 2, parts[k // 2]] for k in range(10))])
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Boxes as bccd_demo.py reads them."""
    folder = tmp_path_factory.mktemp("cells")
    with (folder / "boxes.csv").open("w", newline="") as file:
        header = ["image", "split", "class", "xmin", "ymin", "xmax", "ymax"]
        csv.writer(file).writerows([header, ["a.jpg", "train", "Platelets", 1, 1, 5, 5]])
    return folder


TRAIN = f"--data-dir {{films}} --out {{out}} {SMALL}"
HEADS = "--features {bags} --labels {bags}/labels.csv --out {out} --epochs 1 --overlays 4"
NEW = "--run {trained} --images {films} --out {out}"
DIGITS = "--out {out} --data digits --bags 8 --val-bags 4 --test-bags 8 --epochs 1 --runs 1 --device cpu"
#: command: (options, largest file size in bytes, pattern of the first larger file)
COMMANDS = {
    "check_cxr": ("--data-dir {photos}", 10, "{photos}/split.csv"),
    "make_synthetic_cxr": ("--out {out} --images 4 --size 64", 500, "{out}/images_.*png"),
    "train_cxr, settings": (TRAIN, 100, "{out}/config.json"),
    "train_cxr, checkpoint": (TRAIN, 30_000, "{out}/(best|last).pt"),
    "train_cxr, cache": (TRAIN + " --cache {out}/cache", 20_000, "{out}/cache/cxr_64_.*part"),
    "localize_cxr, tables": ("--run {trained} --data-dir {films} --out {out} --draws 5", 100, "{out}/.*json"),
    "localize_cxr, report": (
        "--run {trained} --data-dir {films} --out {out} --draws 5", 30_000, "{out}/(localization.png|report.html)",
    ),
    "predict_cxr, boxes": (f"{NEW} --gate 0 --threshold 0", 1000, "{out}/boxes.csv"),
    "predict_cxr, predictions": (f"{NEW} --gate 0.99", 200, "{out}/predictions.csv"),
    "predict_cxr, maps": (f"{NEW} --maps", 200, "{out}/maps/.*npz"),
    "predict_cxr, report": (f"{NEW} --gate 0.99", 15_000, "{out}/report.html"),
    "train_mnist_bags, checkpoint": (DIGITS, 1000, "{out}/sgl/seed0.pt"),
    "train_cifar10_bags, checkpoint": (
        DIGITS + " --stem imagenet --bag-size 4 --positives 1", 1000, "{out}/.*seed0.pt",
    ),
    "compare_localization": ("--out {out} --draw-only", 300, "{out}/localization.md"),
    "reproduce_figures": (
        "--figure 5a --draw-only --data mnist --table {results}/mnist_bags/runs.csv --out {out}", 1000,
        "{out}/figure5a.png",
    ),
    "extract_features": (
        "--images {photos} --backbone timm/resnet18 --weights none --cut 1 --out {out}", 700, "{out}/features.bin",
    ),
    "extract_features, one file per bag": (
        "--images {photos} --backbone timm/resnet18 --weights none --cut 1 --out {out} --format h5", 1000,
        "{out}/0.h5",
    ),
    "train_features, settings": (HEADS, 100, "{out}/settings.json"),
    "train_features, head": (HEADS, 2000, "{out}/parts/repeat0_fold0.pt"),
    "train_features, predictions": (HEADS, 10_000, "{out}/instances.csv"),
    "train_features, report": (HEADS, 30_000, "{out}/report.html"),
    "bccd_demo": ("--data {cells} --out {out}", 10, "{out}/labels.csv"),
    "frozen_cxr": ("table --runs {out} --out {out}/films.csv", 100, "{out}/films.csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_error_names_the_file(name, films, trained, photos, bags, cells, tmp_path, capsys):
    command = name.split(",")[0]
    options, size, expected = COMMANDS[name]
    if command == "train_cifar10_bags" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    if command == "extract_features" and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    places = {"films": films, "trained": trained, "photos": photos, "bags": bags, "cells": cells,
              "out": tmp_path / "out", "results": ROOT / "examples" / "results"}  # fmt: skip
    if command in ("compare_localization", "reproduce_figures", "frozen_cxr"):
        places["out"].mkdir()
    if command == "compare_localization":
        shutil.copy(places["results"] / "localization" / "runs.csv", places["out"])
    if command == "frozen_cxr":
        found = {"hits": [[1, 0, 0]], "centre": [[1, 1, 0]], "patients": [1], "pointing": 0.5}
        run = {"method": "cam", "seed": 0, "auc": 0.6, "boxes": {"nih": {"half": found}}}
        (places["out"] / "cam-seed0.json").write_text(json.dumps(run))
    main = importlib.import_module(command).main
    with files_up_to(size):
        try:
            status = main([part.format(**places) for part in options.split()])
        except SystemExit as end:
            status = end.code
    assert status == 2
    error = capsys.readouterr().err
    pattern = expected.format(**{key: re.escape(str(path)) for key, path in places.items()})
    assert re.search(f"error: .*({pattern})", error), error
    assert "File too large" in error
