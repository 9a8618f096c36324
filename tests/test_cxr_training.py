"""Training on ChestX-ray14: networks, batches, output files, and resuming after an interruption at any moment."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import train_cxr as example
from common import files, losses
from common.import_torchvision import import_torchvision
from common.processes import Processes, joined
from conftest import ROOT
from images import batches, demo, items, models, nih, pixels, provenance, run_folder, synthetic_set, training
from images import options as settings
from images.checkpoint import OLDER, load_run
from images.models import PatchClassifier
from images.nih import CLASSES
from images.synthetic_set import write_dataset

from sgl_ops import LamSchedule
from sgl_ops import localization as boxes

Image = pytest.importorskip("PIL.Image")
has_torchvision = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not has_torchvision, reason="torchvision is not installed")

SMALL = [
    "--backbone", "local17", "--image-size", "64", "--batch-size", "8", "--epochs", "2", "--workers", "0", "--device",
    "cpu", "--lr", "1e-3", "--val-fraction", "0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small synthetic data set, 64 pixels wide."""
    folder = tmp_path_factory.mktemp("cxr") / "data"
    write_dataset(folder, images=48, size=64, seed=2)
    return folder


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("cxr") / "whole"
    assert run(drawn, out) == 0
    return out


def run(data, out, *options):
    return example.main(["--data-dir", str(data), "--out", str(out), *SMALL, *options])


def assert_same_run(one, other):
    """The checkpoints and histories of two runs are bitwise equal, except for their speed."""
    for name in ("last.pt", "best.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        for state in states:
            for row in state.get("history", ()):
                del row["images_per_s"]
        flat = [torch.utils._pytree.tree_flatten_with_path(state) for state in states]
        assert flat[0][1] == flat[1][1]
        for (path, a), (_, b) in zip(flat[0][0], flat[1][0], strict=True):
            if isinstance(a, torch.Tensor):
                same = np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())
            else:
                same = a == b or (a != a and b != b)
            assert same, torch.utils._pytree.keystr(path)
    histories = [list(csv.DictReader((folder / "history.csv").open())) for folder in (one, other)]
    for rows in histories:
        for row in rows:
            del row["images_per_s"]
    assert histories[0] == histories[1]


# networks


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", [name for name in models.BACKBONES if name.startswith("local")] + ["bagnet9"])
def test_receptive_field_of_local_patch_networks(name, stride):
    field = int("".join(filter(str.isdigit, name)))
    if stride > field:
        with pytest.raises(ValueError, match=f"expected 8 for a local backbone of {field} pixels"):
            PatchClassifier(name, stride, 14)
        return
    side = 96
    model = PatchClassifier(name, stride, 14).eval()
    x = torch.randn(1, 3, side, side, requires_grad=True)
    y = model(x)
    assert y.shape == (1, 14, side // stride, side // stride)
    cell = side // stride // 2
    y[0, :, cell, cell].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    for along in (0, 1):
        (where,) = seen.any(along).nonzero(as_tuple=True)
        first, last = int(where[0]), int(where[-1])
        assert last - first + 1 == field
        # the cell lies in the middle of its receptive field
        before, after = cell * stride - first, last - ((cell + 1) * stride - 1)
        assert after - before in (0, 1)


@pytest.mark.parametrize(
    ("name", "stride", "centre"),
    [
        # conv1 is centred on pixels 0, 2, 4, and so on; every later stride keeps the first of two positions
        *(pytest.param(name, stride, 0.5, marks=needs_torchvision)
          for name, stride in (("resnet18", 32), ("resnet18", 16), ("resnet50", 32))),
        # the same, plus 2 + 4 + 8 pixels: three average poolings of two positions, 4, 8 and 16 pixels apart
        pytest.param("densenet121", 16, 14.5, marks=needs_torchvision),
        # a field of 17 pixels with the 8 pixels of the cell: 4 pixels left of it, 5 right; a field of 33: 16, 8 and 9
        ("local17", 8, 4.5), ("local33", 16, 8.5), ("bagnet9", 8, 4.5),
    ],
)  # fmt: skip
def test_cells_lie_at_the_centre_of_their_receptive_field(name, stride, centre):
    """The pixels that influence a cell's logit lie where the overlay shows the cell."""
    model = PatchClassifier(name, stride, 1).eval().requires_grad_(False)
    assert model.grid == (centre, stride)
    for weight in (m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        weight.fill_(1 / weight[0].numel())  # equal positive weights: no ReLU is inactive
    side = 448 if name in models.TORCHVISION else 96
    x = torch.rand(1, 3, side, side, requires_grad=True)  # random, so that the maxima lie anywhere in their windows
    cells, row, column = side // stride, side // stride // 2, side // stride // 2 + 1
    model(x)[:, 0, row, column].sum().backward()
    heat = np.zeros((cells, cells))
    heat[row, column] = 1
    drawn = boxes.upsample(heat, (side, side), first=model.grid.centre / stride)
    seen = x.grad.sum((0, 1)).numpy()
    pixels = np.arange(side) + 0.5
    for axis, cell in ((0, row), (1, column)):
        influenced, shown = (float(pixels @ a.sum(1 - axis) / a.sum()) for a in (seen, drawn))
        assert influenced == pytest.approx(centre + cell * stride, abs=0.75)
        assert shown == pytest.approx(centre + cell * stride, abs=0.5)  # cells begin at whole pixels
    x_of_peak, y_of_peak = boxes.heatmap_to_point(heat, (side, side), model.grid.centre / stride)
    assert (x_of_peak, y_of_peak) == (centre + column * stride, centre + row * stride)


@needs_torchvision
@pytest.mark.parametrize("name", models.TORCHVISION)
def test_finer_stride_gives_the_logits_of_the_coarse_stride_at_its_cells(name):
    """Dilation replaces the removed strides, so the same weights compute the same logits."""
    x = torch.randn(1, 3, 64, 64)
    coarse = PatchClassifier(name, 32, 14).eval()
    for module in coarse.modules():  # otherwise nearly all outputs are 0 or the bias
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    with torch.inference_mode():
        expected = coarse(x)
        assert expected.shape == (1, 14, 2, 2)
        for stride in (16, 8):
            fine = PatchClassifier(name, stride, 14).eval()
            fine.load_state_dict(coarse.state_dict())
            got = fine(x)
            assert fine.grid == (coarse.grid.centre, stride)
            assert got.shape == (1, 14, 64 // stride, 64 // stride)
            step = 32 // stride
            torch.testing.assert_close(got[..., ::step, ::step], expected, rtol=1e-3, atol=1e-4)


@needs_torchvision
def test_weights_from_a_file_are_loaded(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision import models as theirs

    for name in ("resnet18", "densenet121"):
        state = getattr(theirs, name)().state_dict()
        if name == "densenet121":  # the key names of torchvision's file
            state = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in k else k: v
                     for k, v in state.items()}  # fmt: skip
        torch.save(state, tmp_path / f"{name}.pth")
        model = PatchClassifier(name, 16, 14)
        head = model.head.weight.clone()
        models.load_weights(model, name, str(tmp_path / f"{name}.pth"))
        first = next(value for key, value in state.items() if key.endswith(("conv1.weight", "conv0.weight")))
        assert torch.equal(next(model.features.parameters()), first)
        assert torch.equal(model.head.weight, head)
    with pytest.raises(ValueError, match="does not fit resnet50"):
        models.load_weights(PatchClassifier("resnet50", 32, 14), "resnet50", str(tmp_path / "resnet18.pth"))
    with pytest.raises(ValueError, match=r"expected 'none', 'imagenet' or a file, got 'no\.pth'"):
        models.load_weights(model, "densenet121", "no.pth")
    with pytest.raises(ValueError, match="local17 has no ImageNet weights"):
        models.load_weights(PatchClassifier("local17", 8, 14), "local17", "imagenet")

    def offline(*arguments, **named):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded, or .* \(no network\); give a file"):
        models.load_weights(PatchClassifier("resnet18", 32, 14), "resnet18", "imagenet")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    for length in (0, 3, 5000):
        content = (tmp_path / "resnet18.pth").read_bytes()[:length]
        (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"weights: could not be downloaded, or are truncated in .*hub/checkpoints"
        ):
            models.load_weights(PatchClassifier("resnet18", 32, 14), "resnet18", "imagenet")


# settings and batches


def test_defaults_are_the_settings_of_the_paper():
    config = settings.config_of(settings.parse(["--data-dir", "x", "--out", "y"]))
    expected = {
        "backbone": "resnet50", "weights": "imagenet", "image_size": 512, "loss": "sgl", "pooling": "softmax",
        "delta_l": 0.3, "lam": 20, "lr": 1e-4, "weight_decay": 1e-4, "lr_step": 10, "lr_factor": 0.1, "epochs": 20,
        "output_stride": 32, "rescale": True, "weighted": True, "amp": "off",
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert batches.crop_of(config) == 448
    assert config["mask_weight"] > 0
    criterion = losses.make_criterion(config)
    assert (criterion.lam, criterion.mask_weight) == (20, config["mask_weight"])
    base = settings.config_of(settings.parse(["--data-dir", "x", "--out", "y", "--loss", "bag"]))
    assert base["pooling"] == "mean"


@pytest.mark.parametrize(
    ("delay", "warmup", "expected"),
    [(0, 0, [20, 20, 20, 20, 20]), (0, 2, [0, 5, 10, 20, 20]), (1, 0, [0, 0, 20, 20, 20]), (1, 2, [0, 0, 0, 10, 20])],
)
def test_lam_rises_after_the_delay_during_the_warmup(delay, warmup, expected):
    config = {"lam": 20.0, "lam_delay": float(delay), "lam_warmup": float(warmup)}
    assert [losses.lam_at(config, at) for at in (0, 0.5, 1, 2, 7)] == expected


@pytest.mark.parametrize(("start", "expected"), [(0.5, [392, 56, 8, 8]), (0.01, [8, 8, 8, 8]), (0.25, [196, 40, 8, 8])])
def test_k_falls_geometrically_from_a_fraction_of_the_map(start, expected):
    config = {"k_start": start, "k_epochs": 4.0}
    assert [losses.k_at(config, 8, 784, at) for at in (0, 2, 4, 7)] == expected


class Brightness(torch.nn.Module):
    """Logits (n, 14, 8, 8) that rise with the brightness of the image."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(3, len(CLASSES), 7, 7)
        torch.nn.init.constant_(self.head.weight, 0.01)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("positive", ["bright", "dark"])
def test_measured_start_raises_lam_only_if_positive_images_rank_higher(monkeypatch, positive, accumulate):
    """``rise`` counts steps, not passes. In the same training, k of top-k pooling falls."""
    monkeypatch.setattr(training, "make_model", lambda config: Brightness())
    options = ["--start-auc", "0.8", "--rise", "4", "--lam", "2", "--pooling", "topk", "--k-start", "0.5", "--lr", "0"]
    given = ["--data-dir", "x", "--out", "y", *SMALL, *options, "--accumulate", str(accumulate)]
    config = OLDER | settings.config_of(settings.parse(given))
    state = training.Training(config, Processes(0, 1, torch.device("cpu"), None), False)
    bright = torch.arange(32) % 2
    images = (bright * 200).to(torch.uint8).view(-1, 1, 1).expand(32, 56, 56)
    labels = (bright if positive == "bright" else 1 - bright).float().view(-1, 1).expand(32, len(CLASSES))
    one = (images, labels, torch.zeros(32, 4))
    lams, ks = [], []
    for step in range(6):
        example.take_step(state, [one] * accumulate, float(step))
        lams.append(state.criterion.lam)
        ks.append(state.criterion.pooling.k)
    assert lams == ([0.5, 1.0, 1.5, 2.0, 2.0, 2.0] if positive == "bright" else [0.0] * 6)
    assert ks[0] == round(0.5 * 49) > ks[2] > 8 == ks[5]


@pytest.mark.parametrize(
    ("options", "warns"),
    [(["--lam-delay", "2"], True), (["--lam-delay", "1.5"], False), (["--lam-delay", "2", "--loss", "bag"], False)],
)
def test_dry_run_warns_if_lam_stays_zero(drawn, capsys, options, warns):
    assert example.main(["--data-dir", str(drawn), *SMALL, "--epochs", "2", *options, "--dry-run"]) == 0
    text = "warning: lam stays 0, because --lam-delay 2 is not below --epochs 2."
    assert (text in capsys.readouterr().out) == warns


def test_warning_if_the_measured_start_never_occurs():
    config = settings.config_of(settings.parse(["--data-dir", "x", "--out", "y", "--start-auc", "0.9"]))
    idle = [{"lam": 0.0}, {"lam": 0.0}]
    found = losses.lam_warning(config, idle)
    assert found.startswith(
        "warning: lam stayed 0, because the AUC of the training images did not reach --start-auc 0.9"
    )
    assert "--k-start" in found and "--k-start" not in losses.lam_warning(config | {"k_start": 0.2}, idle)
    schedule = LamSchedule(auc=0.9, interval=1)
    labels = torch.tensor([0.0, 1.0]).repeat(32)
    schedule.step(torch.where(torch.arange(64) < 16, -labels, labels), labels)  # 8 of 32 positive bags are below all
    assert "This AUC was 0.750 at the end, and it needs 0.900. The run" in losses.lam_warning(config, idle, schedule)
    assert losses.lam_warning(config, [*idle, {"lam": 0.5}]) is None
    assert losses.lam_warning(config, []) is None
    for change in ({"loss": "bag"}, {"lam": 0.0}):
        assert losses.lam_warning(config | change, idle) is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_split_the_batches_of_one_order(accumulate):
    config = {"batch_size": 12, "accumulate": accumulate, "seed": 4}
    numbers = np.arange(100, 150)
    alone = batches.batches_of(numbers, config, 3, 0, 1)
    shares = [batches.batches_of(numbers, config, 3, rank, 3) for rank in range(3)]
    assert len(alone) == 4 * accumulate
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == alone
    everything = [key for some in alone for key in some]
    assert {epoch for epoch, _ in everything} == {3}
    assert len(set(everything)) == 48
    assert {number for _, number in everything} <= set(numbers.tolist())
    assert batches.batches_of(numbers, config, 3, 0, 1) == alone
    assert {n for _, n in batches.batches_of(numbers, config, 4, 0, 1)[0]} != {n for _, n in alone[0]}


def test_validation_share_must_leave_training_images(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "all", "--val-fraction", "0.999") == 2
    assert "val-fraction: 0.999 leaves no training image" in capsys.readouterr().err
    assert run(drawn, tmp_path / "none", "--val-fraction", "0.001", "--epochs", "1") == 0
    assert "warning: there are no validation images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [], ["--out", "x"], ["--data-dir", "x"], ["--delta-l", "0.7"], ["--lam", "-1"], ["--lam", "nan"],
        ["--epochs", "0"], ["--batch-size", "9", "--accumulate", "2"], ["--loss", "mmm", "--pooling", "max"],
        ["--image-size", "100"], ["--image-size", "32"], ["--val-fraction", "1"], ["--backbone", "vgg"],
        ["--synthetic"], ["--device", "nowhere"], ["--start-auc", "0.3"], ["--start-auc", "0.8", "--lam-delay", "1"],
        ["--rise", "0"], ["--k-start", "0.2"], ["--k-start", "1", "--pooling", "topk"], ["--k-epochs", "-1"],
    ],
)  # fmt: skip
def test_invalid_options_are_errors(options, capsys):
    given = ["--data-dir", "x", "--out", "y"] if options and options[0] not in ("--out", "--data-dir") else []
    with pytest.raises(SystemExit):
        settings.parse([*given, *options])
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--loss", "mmm"], ["--cache", "x"]])
def test_demonstration_refuses_options_without_effect(options, capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--synthetic", "--out", "y", *options])
    assert f"leave out {options[0]}" in capsys.readouterr().err
    assert settings.parse(["--synthetic", "--out", "y"]).loss == "sgl"


def test_untrained_network_predicts_the_prior():
    base = settings.config_of(settings.parse(["--data-dir", "x", "--out", "y", *SMALL]))
    alone = Processes(0, 1, torch.device("cpu"), None)
    images = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
    logits = []
    for prior in (0.5, 0.02):
        network = training.Training(OLDER | base | {"prior": prior}, alone, False).network.eval()
        with torch.inference_mode():
            logits.append(network(pixels.to_input(images)))
    torch.testing.assert_close(logits[1], logits[0] + torch.logit(torch.tensor(0.02)))


# runs


def test_run_folder_has_its_files_and_log(drawn, whole):
    config = json.loads((whole / "config.json").read_text())
    rows = list(csv.DictReader((whole / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert float(row["loss"]) == pytest.approx(
            float(row["bag"]) + 20 * float(row["instance"]) + config["mask_weight"] * float(row["mask"])
        )
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    index = nih.load_index(drawn)
    names = provenance.trained_names(whole)
    assert names == {name for name, test in zip(index.names, index.test, strict=True) if not test}
    parts = {row["image"]: row["part"] for row in csv.DictReader((whole / "split.csv").open())}
    for name, patient in zip(index.names, index.patients, strict=True):
        if name in parts:
            assert (parts[name] == "val") == (patient in config["val_patients"])
    for which in (None, "best", "last"):
        model, loaded = load_run(whole, "cpu", which)
        assert loaded == config
        assert not model.training
        images = pixels.to_input(np.stack([pixels.load_image(path, 64) for path in index.paths[:2]]))
        assert model(images).shape == (2, 14, 8, 8)
    assert "missing" not in (whole / "data.txt").read_text()
    if importlib.util.find_spec("tensorboard") is not None:
        assert list((whole / "tensorboard").glob("events*"))


def test_best_checkpoint_has_the_highest_validation_auc(drawn, whole):
    rows = list(csv.DictReader((whole / "history.csv").open()))
    best = max(rows, key=lambda row: float(row["val_auc"]))
    assert torch.load(whole / "best.pt", weights_only=True)["epoch"] == int(best["epoch"])
    # the checkpoint gives the validation AUC of the history
    from sklearn.metrics import roc_auc_score

    model, config = load_run(whole, "cpu", "best")
    index = nih.load_index(drawn)
    val = np.isin(index.patients, config["val_patients"])
    with torch.inference_mode():
        maps = model(pixels.to_input(np.stack([pixels.load_image(p, 64) for p in np.array(index.paths)[val]])))
        scores = training.make_pooling("softmax")(maps).numpy()
    labels = index.labels[val]
    values = [roc_auc_score(labels[:, c], scores[:, c]) for c in range(14) if 0 < labels[:, c].sum() < val.sum()]
    assert float(best["val_auc"]) == pytest.approx(np.mean(values), abs=1e-6)
    assert 3 <= len(values) == sum(best[f"val_auc_{name}"] != "nan" for name in CLASSES)


def test_changed_list_of_trained_images_is_an_error(whole, tmp_path):
    other = shutil.copytree(whole, tmp_path / "run")
    lines = (other / "split.csv").read_text().splitlines()
    (other / "split.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="not the images that the run was trained on"):
        provenance.trained_names(other)
    (other / "split.csv").unlink()
    with pytest.raises(ValueError, match="holds no split"):
        provenance.trained_names(other)
    with pytest.raises(ValueError, match=r"holds no last\.pt"):
        load_run(tmp_path, "cpu")


def test_run_from_weights_keeps_their_list_of_trained_images(drawn, whole, tmp_path, capsys):
    """A run that starts from the weights of another run lists its training images, too, also through a third run."""
    some = ["--allow-missing", "--epochs", "1"]
    other = shutil.copytree(drawn, tmp_path / "data")
    gone = sorted(provenance.trained_names(whole))[0]
    next(other.rglob(gone)).unlink()
    second, third = tmp_path / "second", tmp_path / "third"
    assert run(other, second, *some, "--weights", str(whole / "best.pt")) == 0
    assert gone in (second / "data.txt").read_text()
    own = {
        row["image"]
        for row in csv.DictReader((second / "split.csv").open())
        if row["part"] != provenance.PRETRAINED_PART
    }
    assert gone not in own
    assert provenance.trained_names(second) == own | provenance.trained_names(whole)
    assert run(other, third, *some, "--weights", str(second / "last.pt")) == 0
    assert gone in provenance.trained_names(third)
    assert run(other, third, *some, "--weights", str(second / "last.pt"), "--resume") == 0

    lines = [line for line in (third / "split.csv").read_text().splitlines() if not line.startswith(gone)]
    (third / "split.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="not the images that the run was trained on"):
        provenance.trained_names(third)
    shutil.copy(whole / "last.pt", tmp_path / "alone.pt")
    capsys.readouterr()
    assert run(other, tmp_path / "fourth", *some, "--weights", str(tmp_path / "alone.pt")) == 2
    assert "holds no split.csv, the list of its training images" in capsys.readouterr().err
    shutil.copy(second / "last.pt", whole / "copied.pt")
    try:
        assert run(other, tmp_path / "fourth", *some, "--weights", str(whole / "copied.pt")) == 2
    finally:
        (whole / "copied.pt").unlink()
    assert "weights: expected a checkpoint of the run in" in capsys.readouterr().err
    torch.save(files.load_state(whole / "last.pt")["model"], tmp_path / "plain.pt")  # a file of unknown origin
    assert provenance.names_of_weights(str(tmp_path / "plain.pt")) == provenance.names_of_weights("imagenet") == []


def test_resume_with_more_epochs_equals_one_longer_run(drawn, whole, tmp_path, capsys):
    """Resuming with fewer epochs than trained is an error."""
    longer, at_once = shutil.copytree(whole, tmp_path / "longer"), tmp_path / "at_once"
    assert run(drawn, longer, "--resume") == 0
    assert "all 2 epochs are complete" in capsys.readouterr().out
    assert run(drawn, longer, "--resume", "--epochs", "1") == 2
    assert "was trained with another epochs" in capsys.readouterr().err
    assert run(drawn, longer, "--resume", "--epochs", "3") == 0
    assert run(drawn, at_once, "--epochs", "3") == 0
    for name in ("last.pt", "best.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (longer, at_once)]
        assert states[0]["epoch"] == states[1]["epoch"]
        assert all(torch.equal(a, b) for a, b in zip(*(s["model"].values() for s in states), strict=True))
    assert load_run(longer, "cpu", "last")[1]["epochs"] == 3


#: Keys of a configuration that older versions did not write, in the order in which they were added.
CAME_LATER = (
    "prior", "lam_delay", "train_labels_digest", "train_files_digest", "cut", "dataset", "title", "classes", "channels",
    "fit", "start_auc", "rise", "k_start", "k_epochs", "freeze",
)  # fmt: skip


@pytest.mark.parametrize("first", range(len(CAME_LATER)), ids=CAME_LATER)
def test_runs_of_older_versions_can_be_resumed(drawn, whole, tmp_path, first):
    """A missing key gets the value that the older version used."""
    state = torch.load(whole / "last.pt", weights_only=True)
    assert (state["config"]["prior"], state["config"]["lam_delay"], state["config"]["cut"]) == (0.5, 0.0, None)
    older = {key: value for key, value in state["config"].items() if key not in CAME_LATER[first:]}
    state["merit"] = state.pop("best_score")
    torch.save(state | {"config": older}, tmp_path / "last.pt")
    alone = Processes(0, 1, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="was trained with another prior; use the same settings, or another --out"):
        training.Training(state["config"] | {"prior": 0.3}, alone, False).restore(tmp_path / "last.pt")
    resumed = training.Training(state["config"], alone, False)
    resumed.restore(tmp_path / "last.pt")
    assert resumed.epoch == state["epoch"]
    assert resumed.best_score == state["merit"]
    # the run can be evaluated
    model, config = load_run(tmp_path, "cpu", "last")
    assert set(CAME_LATER) - {"train_labels_digest", "train_files_digest"} <= set(config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state["model"].values(), strict=True))


def test_name_of_the_data_folder_does_not_matter(whole, tmp_path):
    state = torch.load(whole / "last.pt", weights_only=True)
    config = state["config"] | {"title": "another name"}
    training.Training(config, Processes(0, 1, torch.device("cpu"), None), False).restore(whole / "last.pt")


def test_training_of_an_epoch_does_not_read_the_number_of_epochs():
    """Resuming with more epochs depends on this."""
    config = settings.config_of(settings.parse(["--data-dir", "x", "--out", "y", *SMALL]))
    config = OLDER | config
    state = training.Training(config, Processes(0, 1, torch.device("cpu"), None), False)
    assert settings.EXTENDABLE == ("epochs",)
    assert not set(settings.EXTENDABLE) & set(state.config)
    assert state.full_config() == config == state.state()["config"]
    with pytest.raises(KeyError):
        state.config["epochs"]


@pytest.mark.parametrize("step", [1, 2], ids=["in the epoch", "at its end"])
@pytest.mark.parametrize("where", ["loss", "parameters"])
def test_nonfinite_weights_are_not_saved(drawn, tmp_path, monkeypatch, capsys, where, step):
    """The last finite checkpoint stays, and the run can be resumed from it."""
    take_step = example.take_step

    def spoiled(self, passes, progress):
        take_step(self, passes, progress)
        if self.epoch == 0 and self.step == step:  # of three steps
            with torch.no_grad():
                self.network.head.bias[3] = torch.nan
            if where == "loss":
                take_step(self, passes, progress)

    monkeypatch.setattr(example, "take_step", spoiled)
    assert run(drawn, tmp_path, "--save-every", "1") == 2
    assert "a lower --lr may help" in capsys.readouterr().err
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, step)
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    monkeypatch.setattr(example, "take_step", take_step)
    assert run(drawn, tmp_path, "--resume") == 0


class Killed(BaseException):
    """Raised in place of a kill signal. No code catches it."""


@pytest.mark.parametrize("when", ["first step", "second step", "epoch's last step", "best kept", "last history"])
def test_run_killed_at_any_moment_resumes_to_the_same_bits(drawn, whole, tmp_path, monkeypatch, when):
    options = ["--save-every", "1", "--cache", str(tmp_path / "cache")]
    steps = []
    with monkeypatch.context() as patch:

        def take_step(self, passes, progress, original=example.take_step):
            original(self, passes, progress)
            steps.append(progress)
            if len(steps) == {"first step": 1, "second step": 2, "epoch's last step": 3}.get(when):
                raise Killed

        def save(state, path, original=files.save_atomically):
            if when == "best kept" and path.name == "last.pt" and state["step"] == 0:
                raise Killed
            original(state, path)

        def write(history, path):
            if len(history) == 2:
                raise Killed

        patch.setattr(example, "take_step", take_step)
        patch.setattr(run_folder, "save_atomically", save)
        if when == "last history":
            patch.setattr(run_folder, "write_history", write)
        with pytest.raises(Killed):
            run(drawn, tmp_path / "cut", *options)
    if when == "epoch's last step":
        state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
        assert (state["epoch"], state["step"]) == (0, 2)  # of three steps
    assert run(drawn, tmp_path / "cut", *options, "--resume") == 0
    assert_same_run(whole, tmp_path / "cut")


class Tiny(torch.nn.Module):
    """A network of two layers with state between steps: batch-norm statistics and the random numbers of dropout."""

    def description(self, image_size):
        return "two layers"

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 8, 8), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.3)
        )
        self.head = torch.nn.Conv2d(4, len(CLASSES), 1)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize("last", [2, 3, 4, 6, 9])
def test_resume_restores_every_state(drawn, tmp_path, monkeypatch, last):
    """Learning rate, loss scale, measured start and random numbers, for a run that is killed in step ``last`` of 3 x 3.

    Before the run is resumed, all random generators are reseeded, as in another process.
    """
    monkeypatch.setattr(training, "make_model", lambda config: Tiny())
    scales, original = [], example.take_step

    class Scaler(torch.amp.GradScaler):
        """A scaler whose scale overflows at first, so that steps are skipped, and then grows every second step."""

        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0**16, growth_interval=2, enabled=enabled)

    def take_step(self, *arguments):
        original(self, *arguments)
        scales.append(self.scaler.get_scale())
        if len(scales) == stop:
            raise Killed

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(example, "take_step", take_step)
    options = ["--epochs", "3", "--lr-step", "1", "--lr-factor", "0.5", "--amp", "fp16", "--save-every", "1"]
    options += ["--start-auc", "0.5", "--rise", "5", "--pooling", "topk", "--k-start", "0.5", "--k-epochs", "2"]
    stop = None
    assert run(drawn, tmp_path / "whole", *options) == 0
    rates = [float(row["lr"]) for row in csv.DictReader((tmp_path / "whole" / "history.csv").open())]
    assert rates == [1e-3, 5e-4, 2.5e-4]
    assert len(scales) == 9
    assert min(np.diff(scales)) < 0 < max(np.diff(scales))
    scales.clear()
    stop = last
    with pytest.raises(Killed):
        run(drawn, tmp_path / "cut", *options)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(last)
    stop = None
    assert run(drawn, tmp_path / "cut", *options, "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.examples
def test_killed_process_resumes_to_the_same_bits(drawn, whole, tmp_path):
    """SIGKILL in the middle of an epoch, while another process loads images."""
    out = tmp_path / "cut"
    options = ["--data-dir", drawn, "--out", out, *SMALL, "--save-every", "1", "--workers", "1"]
    # The number of threads of this process, because the order of the sums in convolutions depends on it.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "train_cxr.py", *map(str, options)],
        env=environment, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 300
    while not (out / "last.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = torch.load(out / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) < (2, 0)
    assert run(drawn, out, "--resume") == 0
    assert_same_run(whole, out)


def test_existing_run_is_not_overwritten_or_resumed_with_other_settings(drawn, whole, capsys):
    assert run(drawn, whole) == 2
    assert "holds a run" in capsys.readouterr().err
    assert run(drawn, whole, "--resume", "--lam", "3", "--seed", "1") == 2
    assert "was trained with another lam, seed, val_patients" in capsys.readouterr().err


def test_files_of_a_run_without_checkpoint_are_not_overwritten(drawn, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "last.pt").unlink()
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for more in ([], ["--resume"]):
        assert run(drawn, out, "--seed", "1", *more) == 2
        assert f"out: {out} holds a best.pt and a history.csv, but no last.pt" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert run(drawn, tmp_path / "new", "--resume", "--epochs", "1") == 0
    assert f"{tmp_path / 'new'} holds no last.pt to resume; a new training starts" in capsys.readouterr().out


@pytest.mark.examples
def test_second_training_into_the_same_folder_is_an_error(drawn, tmp_path, capsys):
    out = tmp_path / "out"
    code = (
        "import sys, pathlib, images.run_folder\n"
        "with images.run_folder.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    assert run(drawn, out) == 2
    assert f"out: another training writes into {out}" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"lock"}
    process.kill()
    process.communicate()
    assert run(drawn, out, "--epochs", "1") == 0


def test_resume_with_replaced_images_is_an_error(drawn, whole, tmp_path, capsys):
    data, out = shutil.copytree(drawn, tmp_path / "data"), shutil.copytree(whole, tmp_path / "run")
    index = nih.load_index(data)
    for test, status in ((True, 0), (False, 2)):
        path = index.paths[np.flatnonzero(index.test == test)[0]]
        pixels = 255 - np.asarray(Image.open(path).convert("L"))
        Image.fromarray(pixels).save(path, compress_level=0)
        assert run(data, out, "--resume") == status
    assert "was trained with another content of its images" in capsys.readouterr().err


def test_full_disk_is_an_error_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    files.save_atomically({"a": torch.zeros(3)}, tmp_path / "last.pt")

    def full(_):
        raise OSError(28, "No space left on device")

    for error, kind in ((full, OSError), (lambda _: (_ for _ in ()).throw(KeyboardInterrupt), KeyboardInterrupt)):
        monkeypatch.setattr(os, "fsync", error)
        with pytest.raises(kind) as message:
            files.save_atomically({"a": torch.ones(3)}, tmp_path / "last.pt")
        assert kind is not OSError or str(message.value).endswith(f"No space left on device: '{tmp_path / 'last.pt'}'")
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
        assert (files.load_state(tmp_path / "last.pt")["a"] == 0).all()


def test_ranks_are_read_from_variables_of_job_systems(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu") as processes:
        assert (processes.rank, processes.count, processes.group) == (0, 1, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE.*torchrun"), joined("cpu"):
        pass


def test_existing_weights_are_stored_as_an_absolute_path(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole)
    one = settings.parse(["--data-dir", ".", "--out", "x", "--weights", "best.pt"])
    monkeypatch.chdir(tmp_path)
    assert one.weights == str((whole / "best.pt").resolve())
    assert settings.parse(["--data-dir", ".", "--out", "x", "--weights", "nothing.pt"]).weights == "nothing.pt"


def test_resume_with_changed_labels_is_an_error(drawn, whole, tmp_path, capsys):
    data, out = shutil.copytree(drawn, tmp_path / "data"), shutil.copytree(whole, tmp_path / "run")
    path = data / nih.ENTRIES[0]
    index = nih.load_index(data)
    learned, tested = (index.names[np.flatnonzero(index.test == test)[0]] for test in (False, True))
    for name, status in ((tested, 0), (learned, 2)):
        lines = path.read_text().splitlines()
        (row,) = (k for k, line in enumerate(lines) if line.startswith(name))
        cells = lines[row].split(",")
        cells[1] = "Hernia" if cells[1] != "Hernia" else "Edema"
        lines[row] = ",".join(cells)
        path.write_text("\n".join(lines) + "\n")
        assert run(data, out, "--resume") == status
    assert "was trained with another entry table (the labels of its images have changed" in capsys.readouterr().err
    # the message for other images differs from that for other labels
    lists = data / nih.TRAIN_VAL_LIST, data / nih.TEST_LIST
    train, test = (some.read_bytes() for some in lists)
    lists[0].write_bytes(test)
    lists[1].write_bytes(train)
    assert run(data, out, "--resume", "--val-fraction", "0", "--batch-size", "4") == 2
    message = capsys.readouterr().err
    assert "choice of images" in message
    assert "have changed" not in message


@pytest.mark.examples
def test_interrupted_run_can_be_resumed(drawn, tmp_path):
    """The process gets SIGINT, as by Ctrl-C in a terminal."""
    out = tmp_path / "out"
    options = ["--data-dir", drawn, "--out", out, *SMALL, "--epochs", "1000", "--save-every", "1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "train_cxr.py", *map(str, options)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit an ignored SIGINT
    )  # fmt: skip
    end = time.monotonic() + 300
    while not (out / "last.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 130, message
    assert message.endswith("stopped; the same command with --resume continues after the last checkpoint\n")
    assert "Traceback" not in message


@pytest.mark.parametrize("error", [None, RuntimeError("a process that loads images has ended")])
def test_interruption_that_a_library_suppresses_still_stops_the_run(drawn, tmp_path, monkeypatch, capsys, error):
    steps = []

    def take_step(self, *arguments, take_step=example.take_step):
        take_step(self, *arguments)
        steps.append(0)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        if error is not None:
            raise error

    monkeypatch.setattr(example, "take_step", take_step)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(drawn, tmp_path / "out") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) == 1
    assert "stopped; the same command with --resume" in capsys.readouterr().err


def test_wrong_data_is_an_error_before_training(drawn, tmp_path, capsys):
    other = shutil.copytree(drawn, tmp_path / "data")
    path = next(path for path in nih.load_index(other).paths if "images_003" in str(path))
    path.write_bytes(path.read_bytes()[:-30])
    assert run(other, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"1 images cannot be read:\n{path}: " in error and "move them away and pass --allow-missing" in error
    path.unlink()
    assert run(other, tmp_path / "out") == 2
    assert f"images of the tables are missing ({path.name})" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(other, tmp_path / "out", "--allow-missing", "--epochs", "1") == 0
    assert path.name in (tmp_path / "out" / "data.txt").read_text()
    assert not (tmp_path / "out" / "missing.txt").exists()  # with a part of the real data it would have 100,000 lines
    assert path.name not in provenance.trained_names(tmp_path / "out")
    assert run(other, tmp_path / "more", "--allow-missing", "--batch-size", "64") == 2
    assert "batch-size: expected at most the" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "bf16"], ["--amp", "fp16"], ["--loss", "bag"], ["--loss", "bil"], ["--loss", "mmm"],
        ["--batch-norm", "frozen", "--accumulate", "2"], ["--lam-warmup", "3"], ["--val-fraction", "0"],
        ["--start-auc", "0.8"], ["--pooling", "topk", "--k-start", "0.2"],
    ],
)  # fmt: skip
def test_dry_run_prints_a_loss_and_writes_nothing(drawn, tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    assert example.main(["--data-dir", str(drawn), *SMALL, *options, "--dry-run"]) == 0
    loss = float(capsys.readouterr().out.split("loss of one step ")[1].split(";")[0])
    assert 0 < loss < 100
    assert list(tmp_path.iterdir()) == []


def step_of(config, passes, **changed):
    alone = Processes(0, 1, torch.device("cpu"), None)
    some = training.Training(OLDER | config | changed, alone, False)
    some.train_mode()
    example.take_step(some, passes, 0.0)
    return torch.cat([p.detach().flatten() for p in some.network.parameters()]), some


def test_two_accumulated_passes_equal_one_step(drawn):
    """For the bag loss, which is a mean over images, and frozen batch norm, which does not depend on the batch."""
    base = settings.config_of(settings.parse(["--data-dir", "x", "--out", "y", *SMALL, "--loss", "bag"]))
    index = nih.load_index(drawn)
    data = items.LabelledImages(index.paths, index.labels, 64)
    batch = torch.utils.data.default_collate([data[0, n] for n in range(8)])[:3]
    # Compare the moments, not Adam's steps: rounding may change the sign of a step if a gradient is near 0.
    one, a = step_of(base | {"batch_norm": "frozen"}, [batch])
    two, b = step_of(base | {"batch_norm": "frozen"}, [[x[:4] for x in batch], [x[4:] for x in batch]])
    momenta = [torch.cat([s["exp_avg"].flatten() for s in x.optimizer.state_dict()["state"].values()]) for x in (a, b)]
    torch.testing.assert_close(momenta[0], momenta[1], rtol=1e-4, atol=1e-7)
    assert momenta[0].abs().max() > 1e-4
    assert one.shape == two.shape
    torch.testing.assert_close(a.sums, b.sums, rtol=1e-5, atol=0)
    statistics = [m for m in a.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked) == 0 and m.weight.grad is None for m in statistics)


def run_two(*command):
    """Runs a script in two processes that share the batches. Returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL))
    try:
        return [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.examples
def test_two_processes_equal_one(drawn, tmp_path):
    options = ["--loss", "sgl", "--batch-norm", "frozen", "--epochs", "1", "--pooling", "max"]
    assert run(drawn, tmp_path / "one", *options) == 0
    command = [ROOT / "examples" / "train_cxr.py", "--data-dir", drawn, "--out", tmp_path / "two", *SMALL, *options]
    assert run_two(*command) == [0, 0]
    rows = [next(csv.DictReader((tmp_path / k / "history.csv").open())) for k in ("one", "two")]
    for name in ("loss", "bag", "instance", "mask", "val_loss"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), rel=1e-3), name
    one, two = (torch.load(tmp_path / k / "last.pt", weights_only=True) for k in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(value, two["model"][key], rtol=0.02, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == one["config"]


#: The program of each of two processes: an uninterrupted run, and a run that stops before its third step and resumes.
INTERRUPT_AND_RESUME = """
import sys
import train_cxr as example
from common.processes import joined
from images import options as settings

class Killed(BaseException):
    pass

def stop_before_third_step(self, *arguments, take_step=example.take_step):
    if self.step == 2:
        raise Killed
    take_step(self, *arguments)

with joined("cpu") as processes:
    def run(out, *more):
        args = settings.parse([*sys.argv[2:], "--out", f"{sys.argv[1]}/{out}", *more])
        example.train(args, settings.config_of(args), processes)

    run("whole")
    original, example.take_step = example.take_step, stop_before_third_step
    try:
        run("cut")
    except Killed:
        example.take_step = original
        run("cut", "--resume")
"""


@pytest.mark.examples
def test_two_interrupted_processes_resume_to_the_same_log(drawn, tmp_path):
    """Rank 0 writes the log. The losses in it include those of both processes, also before the interruption."""
    program = tmp_path / "program.py"
    program.write_text(INTERRUPT_AND_RESUME)
    options = ["--data-dir", drawn, *SMALL, "--loss", "bil", "--epochs", "1", "--save-every", "1"]
    assert run_two(program, tmp_path, *options) == [0, 0]
    (row,) = csv.DictReader((tmp_path / "cut" / "history.csv").open())
    assert float(row["loss"]) > 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_demonstration_trains_two_runs_and_reports_both(tmp_path, monkeypatch):
    """Two runs on the generated images, and the report gets both."""
    reported = []
    stub = types.SimpleNamespace(main=lambda options: reported.append(options) or 0, __spec__="found")
    monkeypatch.setitem(sys.modules, "localize_cxr", stub)
    monkeypatch.setattr(settings, "DEMO", settings.DEMO | {"epochs": 1, "image_size": 32})
    monkeypatch.setattr(demo, "DEMO_DATA", settings.DEMO_DATA | {"images": 40, "size": 32})
    out = tmp_path / "demo"
    assert example.main(["--synthetic", "--out", str(out)]) == 0
    configs = [load_run(out / name, "cpu")[1] for name in ("sgl", "bag")]
    assert [config["loss"] for config in configs] == ["sgl", "bag"]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} == {"loss"}
    ((_, sgl, bag, _, data, *_),) = reported
    assert (sgl, bag, data) == (str(out / "sgl"), str(out / "bag"), str(out / "data"))
    labels = nih.load_index(out / "data").labels
    assert {CLASSES[c] for c in np.flatnonzero(labels.any(0))} == set(settings.DEMO_DATA["findings"])
    assert example.main(["--synthetic", "--out", str(out)]) == 2


@pytest.mark.parametrize("where", ["drawing", "first run", "second run", "report"])
def test_interrupted_demonstration_continues(tmp_path, monkeypatch, capsys, where):
    def stop(*_, **__):
        raise KeyboardInterrupt

    reported = []
    stub = types.SimpleNamespace(main=lambda options: reported.append(options) or 0, __spec__="found")
    monkeypatch.setitem(sys.modules, "localize_cxr", stub)
    monkeypatch.setattr(settings, "DEMO", settings.DEMO | {"epochs": 1, "image_size": 32})
    monkeypatch.setattr(demo, "DEMO_DATA", settings.DEMO_DATA | {"images": 40, "size": 32})
    monkeypatch.setattr(training, "make_model", lambda config: Tiny())
    command = ["--synthetic", "--out", str(tmp_path / "demo")]
    with monkeypatch.context() as patch:
        if where == "drawing":
            patch.setattr(synthetic_set, "write_tables", stop)
        elif where == "report":
            patch.setattr(stub, "main", stop)
        else:
            original = example.take_step
            bag = where == "second run"
            patch.setattr(
                example, "take_step",
                lambda self, *given: stop() if (self.config["loss"] == "bag") == bag else original(self, *given),
            )  # fmt: skip
        assert example.main(command) == 130
    assert capsys.readouterr().err.endswith(
        "stopped; the same command with --resume continues after the last checkpoint\n"
    )
    if where != "drawing":
        assert example.main(command) == 2
        assert "holds a demonstration; continue it with --resume" in capsys.readouterr().err
    assert reported == []
    assert example.main([*command, "--resume"]) == 0
    assert len(reported) == 1
    for name in ("sgl", "bag"):
        assert torch.load(tmp_path / "demo" / name / "last.pt", weights_only=True)["epoch"] == 1
    assert not (tmp_path / "demo" / "data.part").exists()


def test_training_on_real_images(data_dir, tmp_path):
    folder = data_dir / "chestxray14"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    assert run(folder, tmp_path / "out", "--allow-missing", "--epochs", "1") == 0
    here = {path.name for path in (folder / "images").iterdir()}
    trained = provenance.trained_names(tmp_path / "out")
    assert trained == here & set((folder / "train_val_list.txt").read_text().split())
    assert trained
    assert not trained & set(nih.read_boxes(folder / "BBox_List_2017.csv"))
