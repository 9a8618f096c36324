"""examples/extract_features.py and train_features.py: geometry, files, training, protocols, on generated data."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from csv_files import read, write
from torch import nn

EXAMPLES = ROOT / "examples"
for needed in ("h5py", "safetensors", "pandas", "PIL", "scipy", "sklearn"):
    pytest.importorskip(needed)

import bccd_demo  # noqa: E402
import compare_features  # noqa: E402
import extract_features  # noqa: E402
import finetune_features  # noqa: E402
import predict_features  # noqa: E402
import train_features  # noqa: E402
from common.drawing import FOUND  # noqa: E402
from features import advice, backbones, extraction, finetuning, labels, recommended, runs, store, training  # noqa: E402
from features import geometry as geometries  # noqa: E402
from features.evaluation import (  # noqa: E402
    auc,
    bootstrap,
    box_metrics,
    box_of,
    boxes_of,
    instance_metrics,
    pixels_of,
    point_of,
)
from features.heads import Candidates, Head, PatchNetwork  # noqa: E402
from features.pictures import draw_map  # noqa: E402
from features.report import write_report  # noqa: E402
from features.results import write_results  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

BAGS = [f"b{i:02d}" for i in range(40)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 bags of 9 to 16 instances of 6 features; positive bags hold instances with feature 0 raised by 4."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    writer = store.StoreWriter(folder / "features", {})
    rows, instances = [], []
    for i in range(40):
        n = int(generator.integers(9, 17))
        x = generator.normal(size=(n, 6)).astype(np.float32)
        positive = np.zeros(n, int)
        if i % 2:
            positive[: max(1, n // 4)] = 1
            x[:, 0] += 4 * positive
        writer.add(f"b{i:02d}", store.Bag(x, generator.uniform(0, 99, (n, 2)), None, None))
        rows.append(
            [f"b{i:02d}", i % 2, "" if i % 5 == 0 else (i // 2) % 2, ("train", "val", "test")[i // 2 % 3], f"p{i // 2}"]
        )
        instances += [[f"b{i:02d}", p, 0] for p in positive]
    write(folder / "labels.csv", ["bag", "lesion", "other", "split", "patient"], rows)
    write(folder / "instances.csv", ["bag", "lesion", "other"], instances)
    return folder


def command(data, out, *options):
    return train_features.main(
        [
            "--features",
            str(data / "features"),
            "--labels",
            str(data / "labels.csv"),
            "--out",
            str(out),
            "--overlays",
            "1",
            *options,
        ]
    )


# geometry


def test_geometry_equals_that_of_the_convolutions():
    """Stride 4; kernel 3 with padding 1, then kernel 5 with padding 1: a field of 3 + 2 * 4 = 11 pixels."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 5, 5, 2, 1))
    found = geometries.geometry_of(network, "3", 64)
    # The first output of layer 0 is centred on pixel 0 (0.5). That of layer 3 is centred on output 1, 2 pixels later.
    assert found == geometries.Geometry(4, 2.5, 11)


def test_effective_centre_is_the_centre_of_the_weights():
    """The only weight of a 9x9 kernel is in its third row and column, 2 pixels before the middle."""
    network = nn.Sequential(nn.Conv2d(3, 2, 9, 4, 4, bias=False))
    assert geometries.geometry_of(network, "0", 32) == geometries.Geometry(4, 0.5, 9)
    with torch.no_grad():
        network[0].weight.zero_()[:, :, 2, 2] = torch.randn(2, 3)
    assert geometries.effective_centre(network, "0", 32, 4) == pytest.approx(-1.5, abs=1e-4)


def test_receptive_field_after_a_global_mean_is_the_whole_image():
    class Gate(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    assert geometries.geometry_of(nn.Sequential(nn.Conv2d(3, 4, 2, 2), Gate()), "1", 32).field is None


def test_maps_of_other_stages_are_aligned_with_the_first_stage():
    """A map of the x coordinates of a finer grid, resampled on a coarser grid, has the x coordinates of the latter."""
    fine, coarse = geometries.Geometry(4, 3.5, 9), geometries.Geometry(8, 5.0, 20)
    x = (torch.arange(16) * 4 + 3.5).expand(1, 1, 16, 16)
    found = backbones.aligned(x, fine, coarse, torch.Size((8, 8)))
    expected = torch.arange(8) * 8 + 5.0
    torch.testing.assert_close(found[0, 0, 3, 1:-1], expected[1:-1])
    back = backbones.aligned(expected.expand(1, 1, 8, 8), coarse, fine, torch.Size((16, 16)))
    torch.testing.assert_close(back[0, 0, 5, 2:-2], x[0, 0, 5, 2:-2])


@pytest.fixture(scope="module")
def timm():
    try:
        return backbones.import_timm()
    except ValueError as error:
        pytest.skip(str(error))


def test_list_of_stages_has_their_geometry(timm, capsys):
    assert extract_features.main(["--backbone", "timm/test_efficientnet", "--list-stages"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "number", "features", "stride", "receptive", "field", "in", "pixels"]
    network = timm.create_model("test_efficientnet")
    blocks = [f"blocks.{k}" for k in range(len(network.blocks))]
    assert [line.split()[0] for line in lines] == blocks
    listed = backbones.stage_names(network)
    x = torch.rand(1, 3, 64, 64)
    for line in lines:
        stage = line.split()[0]
        backbone = backbones.load_backbone("test_efficientnet", weights="none", cut=stage)
        geometry = backbone.geometry
        field = "the whole image" if geometry.field is None else str(geometry.field)
        number = [str(listed.index(stage))] if stage in listed else []
        features = str(backbone(x).shape[1])
        assert line.split() == [stage, *number, features, str(geometry.stride), *field.split()]
        for given in number:  # a number and its name are the same stage
            assert backbones.load_backbone("test_efficientnet", weights="none", cut=given).stages == (stage,)
    with pytest.raises(SystemExit):
        extract_features.main(["--backbone", "resnet18"])
    assert "--images and --out are needed, or --list-stages" in capsys.readouterr().err


def test_geometry_of_a_network_with_layer_norm(timm):
    """A patch of 4 pixels, then 7x7 convolutions at stride 4: 4 + 24 for each."""
    network = timm.create_model("convnext_atto", depths=(2, 1, 1, 1))
    assert geometries.geometry_of(network, "stages.0", 96) == geometries.Geometry(4, 2.0, 4 + 2 * 24)


@pytest.mark.parametrize(
    ("field", "width", "height", "warns"),
    [(49, 48, 64, True), (48, 48, 64, False), (49, 64, 48, True), (None, 9, 9, False)],
)
def test_warning_of_a_receptive_field_that_exceeds_the_image(field, width, height, warns):
    found = backbones.field_warning(field, width, height)
    assert (found is not None) == warns
    if warns:
        assert f"{field} pixels, exceeds the image of {width}x{height} pixels" in found


def test_nothing_after_the_cut_is_computed(timm):
    backbone = backbones.load_backbone("timm/resnet18", weights="none", cut="layer1")
    calls = []
    backbone.network.layer2.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = backbone(torch.rand(1, 3, 64, 96))
    assert found.shape == (1, 64, 16, 24) and not calls
    assert backbone.geometry == geometries.Geometry(4, 0.5, 43)  # 7x7 and pooling: 11; four 3x3 at stride 4: 32 more


def test_the_output_stride_is_halved_by_dilation(timm):
    network = backbones.load_backbone("resnet18", weights="none", output_stride=16)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 512, 4, 4)


def test_half_precision_weights_are_loaded_exactly(timm, tmp_path):
    from safetensors.torch import save_file

    network = timm.create_model("resnet18")
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    del state["fc.weight"], state["fc.bias"]
    save_file(state, tmp_path / "w.safetensors")
    loaded = backbones.load_backbone("resnet18", weights=tmp_path / "w.safetensors", cut="0").network
    assert torch.equal(loaded.layer4[1].conv2.weight, network.layer4[1].conv2.weight.half().float())
    state["layer9.weight"] = torch.ones(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"does not fit.*1 unexpected \['layer9\.weight'\]"):
        backbones.load_backbone("resnet18", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet18x"}, "timm has no model 'resnet18x'; similar names: "),
        (
            {"cut": "layer9"},
            r"expected one of act1, layer1, .*, or 0 to 4 \(act1, layer1, .*\), or the name of another submodule, got "
            r"'layer9'; extract_features.py --list-stages",
        ),
        ({"weights": "missing.pt"}, "expected 'pretrained', 'none' or a file, got 'missing.pt'"),
        ({"cut": "1", "stages": ["2"]}, "expected cut or stages, got both"),
    ],
)
def test_errors_of_backbones(timm, options, message):
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone(**{"name": "resnet18", "weights": "none"} | options)


def test_error_without_a_network_connection_names_the_option_for_a_file(timm, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"could not be loaded \(no network\); pass a file: --weights FILE"):
        backbones.load_backbone("resnet18")


def test_tokens_of_a_vision_transformer_become_a_map(timm):
    backbone = backbones.load_backbone("vit_tiny_patch16_224", weights="none", cut="blocks.0")
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, 192, 4, 6)
    assert backbone.geometry == geometries.Geometry(16, 8.0, None)


# extraction


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        array = np.random.default_rng(i).integers(0, 256, (48, 64 + 16 * i, 3), np.uint8)
        Image.fromarray(array).save(folder / f"im{i}.png")
    write(
        folder / "points.csv",
        ["image", "x", "y"],
        [[f"im{i}.png", 10 * j, 5 * j] for i in range(2) for j in range(i + 1, 4)],
    )
    return folder


NETWORK = ("--backbone", "resnet18", "--weights", "none", "--cut", "layer1")


@pytest.mark.parametrize("form", ["store", "h5"])
def test_extraction_continues_and_both_forms_hold_equal_features(timm, images, tmp_path, form, capsys):
    torch.manual_seed(0)
    out = tmp_path / form
    options = ["--images", str(images), "--out", str(out), "--format", form, *NETWORK]
    assert extract_features.main(options) == 0
    printed = capsys.readouterr().out
    assert "stride 4, a cell sees 43 pixels; the first image (64x48) has a grid of 16x12 cells" in printed
    assert printed.splitlines()[-1].startswith("next: python train_features.py")
    bags = store.FeatureBags(out)
    assert bags.names == ["im0", "im1", "im2"]
    assert [bags.instances(name) for name in bags.names] == [12 * 16, 12 * 20, 12 * 24]
    bag = bags["im1"]
    assert (bag.grid, bag.size) == ((12, 20), (48, 80))
    assert bag.coords[:3].tolist() == [[0.5, 0.5], [4.5, 0.5], [8.5, 0.5]]
    # truncated in the middle of the last bag: only this bag is computed again
    if form == "store":
        (out / "bags.csv").write_text("".join((out / "bags.csv").read_text().splitlines(True)[:-1]) + "im2,2")
    else:
        (out / "im2.h5").unlink()
    assert extract_features.main(options) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "2 of 3 bags are there already" in printed and "3 of 3 bags, 0 s left" in printed
    again = store.FeatureBags(out)
    assert np.array_equal(again["im1"].features, bag.features)
    assert len(again["im2"].features) == 12 * 24


@pytest.mark.parametrize(
    ("options", "sees", "warns"),
    [
        (("--cut", "layer1"), "stride 4, a cell sees 43 pixels", False),
        (("--cut", "layer2"), "stride 8, a cell sees 99 pixels", True),
        (("--cut", "layer2", "--scales", "4"), "stride 2, a cell sees 24.75 pixels", False),
        (("--cut", "layer2", "--scales", "4", "1"), "stride 2, a cell sees 99 pixels", True),
    ],
)
def test_extraction_warns_of_a_receptive_field_larger_than_the_image(
    timm, images, tmp_path, options, sees, warns, capsys
):
    options = ("--images", str(images), "--out", str(tmp_path), *NETWORK[:4], *options)
    assert extract_features.main(list(options)) == 0
    printed = capsys.readouterr().out
    assert sees in printed
    text = "warning: the receptive field of a cell, 99 pixels, exceeds the image of 64x48 pixels"
    assert (text in printed) == warns == ("--list-stages prints the stages for --cut" in printed)


def test_store_with_other_settings_is_an_error(timm, images, tmp_path, capsys):
    options = ["--images", str(images), "--out", str(tmp_path / "s")]
    assert extract_features.main([*options, *NETWORK]) == 0
    assert extract_features.main([*options, *NETWORK, "--symmetric"]) == 2
    assert "made with other settings (symmetric" in capsys.readouterr().err


def test_folder_of_h5_with_other_settings_is_an_error(timm, images, tmp_path, capsys):
    import h5py

    options = ["--images", str(images), "--out", str(tmp_path / "s"), "--format=h5"]
    assert extract_features.main([*options, *NETWORK]) == 0
    assert extract_features.main([*options, *NETWORK, "--symmetric"]) == 2
    assert "made with other settings (symmetric" in capsys.readouterr().err
    with h5py.File(tmp_path / "s" / "im0.h5", "a") as file:
        del file.attrs["settings"]
    assert extract_features.main([*options, *NETWORK]) == 2
    assert "im0.h5 has no settings of extract_features.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--threads=0", "--threads: expected at least 1, got 0"),
        ("--scales 1 0", "--scales: expected numbers above 0, got 1 0"),
        ("--scales nan", "--scales: expected numbers above 0, got nan"),
        ("--points=p.csv --patch=0", "--patch: expected at least 1, got 0"),
    ],
)
def test_errors_of_options_of_the_extraction(images, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        extract_features.main(["--images", str(images), "--out", str(tmp_path), *words.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("w.pt", lambda path: path.write_bytes(b"no"), r"w\.pt is not a readable file of weights \(\w+\)"),
        ("w.safetensors", lambda path: path.write_bytes(b"no"), r"w\.safetensors is not a readable file of weights"),
        ("w.pt", lambda path: torch.save(torch.zeros(2), path), r"w\.pt: expected a state dict, got a Tensor"),
        ("w.pt", lambda path: torch.save({"epoch": 3}, path), r"w\.pt: expected tensors, got int at epoch"),
        (
            "w.pt",
            lambda path: torch.save({"conv1.weight": torch.zeros(2)}, path),
            r"w\.pt does not fit ResNet: size mismatch for conv1\.weight",
        ),
    ],
)
def test_errors_of_files_of_weights(timm, tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        backbones.load_backbone("resnet18", weights=tmp_path / name)


@pytest.mark.parametrize("options", [NETWORK, ("--backbone=pixels", "--patch=8")])
def test_features_at_other_points_are_not_continued(timm, images, tmp_path, options, capsys):
    points = shutil.copy(images / "points.csv", tmp_path / "points.csv")
    options = ["--images", str(images), "--points", str(points), "--out", str(tmp_path / "s"), *options]
    assert extract_features.main(options) == 0
    capsys.readouterr()
    assert extract_features.main(options) == 0
    assert "2 of 2 bags are there already" in capsys.readouterr().out.splitlines()
    change(points, "im1.png,20,10", "im1.png,20,11")
    assert extract_features.main(options) == 2
    assert "made with other settings (points)" in capsys.readouterr().err


def test_random_weights_are_the_same_in_every_command(timm):
    state = torch.random.get_rng_state()
    one, two = (backbones.load_backbone("resnet18", weights="none", cut="act1").network for _ in range(2))
    assert torch.equal(one.conv1.weight, two.conv1.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_features_at_cell_centres_are_those_of_the_cells(timm, images):
    """The features at the centre of a cell are those of the cell."""
    backbone = backbones.load_backbone("resnet18", weights="none", cut="layer1")
    image = extraction.read_image(images / "im0.png")
    whole = extraction.map_bag(backbone, backbone.geometry, image, (1.0,), False)
    points = whole.coords[[0, 17, 100]]
    found = extraction.point_bag(backbone, backbone.geometry, image, points, (1.0,), False)
    np.testing.assert_allclose(found.features, whole.features[[0, 17, 100]], rtol=1e-4, atol=1e-5)
    assert extraction.read_points(images / "points.csv", ["im0", "im1"])["im1"].tolist() == [[20, 10], [30, 15]]


def test_images_are_those_of_own_data(tmp_path):
    """Images in subfolders are found, and an image is read as it is displayed: the boxes of own-data fit to it."""
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # to be displayed after a rotation by 90 degrees
    (tmp_path / "a" / "b").mkdir(parents=True)
    image.save(tmp_path / "a" / "b" / "turned.tiff", exif=exif)
    Image.fromarray(array[..., 0].astype(np.uint16) << 8).save(tmp_path / "deep.png")
    images = extraction.find_images(tmp_path)
    assert sorted(images) == ["deep", "turned"]
    turned = extraction.read_image(images["turned"])
    np.testing.assert_array_equal((turned[0] * 255).round().permute(1, 2, 0).numpy(), np.rot90(array, -1))
    deep = extraction.read_image(images["deep"])
    np.testing.assert_array_equal((deep[0, 0] * 255).round().numpy(), array[..., 0])
    Image.fromarray(array).save(tmp_path / "a" / "deep.jpg")
    with pytest.raises(ValueError, match=r"holds a/deep\.jpg and deep\.png; a bag has the name"):
        extraction.find_images(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,x\nim0,1\n", r"expected a column y, found the columns \['image', 'x'\]"),
        ("image,x,y\nim0,1,one\n", "line 2: expected numbers x, y, got '1', 'one'"),
        ("image,x,y\nim0,1,NaN\n", "line 2: expected numbers x, y, got '1', 'NaN'"),
        ("image,x,y\nim0,1,1\nim0,inf,1\n", "line 3: expected numbers x, y, got 'inf', '1'"),
        ("image,x,y\nim0,,1\n", "line 2: expected numbers x, y, got '', '1'"),
        ("image,x,y\nim0,1,1\nim7.png,1,1\n", r"1 bags of .* have no image \(im7\.png\)"),
    ],
)
def test_errors_of_points(tmp_path, text, message):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        extraction.read_points(tmp_path / "points.csv", ["im0"])


@pytest.mark.parametrize("first", [0, 1])
def test_points_far_outside_of_their_image_are_an_error(images, tmp_path, first, capsys):
    """One pixel beyond the image is allowed."""
    table, out = tmp_path / "points.csv", tmp_path / "out"
    options = ["--images", str(images), "--points", str(table), "--backbone", "pixels", "--patch", "8"]
    options += ["--out", str(out), *["--points-from-one"] * first]
    inside = [["im0", -1 + first, 48 + first], ["im0", 64 + first, -1 + first], ["im1", 80 + first, 1]]
    for x, y in ([-2, 0], [65, 0], [0, -1.5], [3, 49]):
        write(table, ["image", "x", "y"], [*inside, ["im0.png", x + first, y + first]])
        assert extract_features.main(options) == 2
        message = f"points: 1 of the 3 points of im0 are outside of the image of 64x48 pixels: {x + first}, {y + first}"
        assert message in capsys.readouterr().err
        assert not out.exists()
    write(table, ["image", "x", "y"], inside)
    assert extract_features.main(options) == 0
    assert store.FeatureBags(out).names == ["im0", "im1"]


@pytest.mark.parametrize("size", [(1, 3), (7, 5), (40, 50)])
def test_patch_may_be_larger_than_the_image(size):
    """The image is mirrored as often as the patch needs."""
    image = torch.rand(1, 3, *size)
    points = np.array([[0.5, 0.5], [2.5, 0.5], [size[1] - 0.5, size[0] - 0.5]])
    for side in (1, 2, 8, 33):
        patches = extraction.patches_at(image, points, side)
        assert patches.shape == (3, 3, side, side)
        for patch, (x, y) in zip(patches, points.astype(int), strict=True):
            assert torch.equal(patch[:, side // 2, side // 2], image[0, :, y, x])
        if side < min(size):
            padded = nn.functional.pad(image, (side // 2, side, side // 2, side), mode="reflect")
            assert torch.equal(patches[0], padded[0, :, :side, :side])
    if min(size) > 1:
        wide = np.pad(image[0].numpy(), ((0, 0), (60, 60), (60, 60)), mode="reflect")
        (patch,) = extraction.patches_at(image, points[:1], 101)
        np.testing.assert_array_equal(patch.numpy(), wide[:, 10:111, 10:111])


def test_symmetric_features_rotate_with_the_image(timm, images):
    backbone = backbones.load_backbone("resnet18", weights="none", cut="layer1")
    image = extraction.read_image(images / "im0.png")
    maps = extraction.map_of(backbone, image, (1.0,), True)
    turned = extraction.map_of(backbone, image.rot90(1, (2, 3)), (1.0,), True)
    torch.testing.assert_close(maps.rot90(1, (1, 2)), turned, rtol=1e-4, atol=1e-5)


class SameConv(nn.Conv2d):
    """A 3x3 convolution of stride 2 with the padding of TensorFlow: it depends on the size of the input."""

    def forward(self, x):
        extra = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
        top, left = (n // 2 for n in extra)
        return super().forward(nn.functional.pad(x, (left, extra[1] - left, top, extra[0] - top)))


def small_backbone(convolution, depth, stages=None):
    """Convolutions of 3x3 and stride 2 with equal weights. The effective receptive fields have their exact centres."""
    layers = [convolution(3 if k == 0 else 2, 2, 3, 2) for k in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 0.1)
        nn.init.zeros_(layer.bias)
    return backbones.Backbone(nn.Sequential(*layers), stages or [str(depth - 1)], [0] * 3, [1] * 3, 128, trained=True)


def spot_at(size, x, y):
    image = torch.zeros(1, 3, *size)
    image[..., y - 8 : y + 8, x - 8 : x + 8] = 1.0
    return image


#: Networks and sizes (height, width) of images. The sides are not always multiples of the stride.
PLACES = [(SameConv, 4, (169, 105)), (SameConv, 4, (128, 96)), (nn.Conv2d, 3, (480, 640)), (nn.Conv2d, 3, (169, 105))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("convolution", "depth", "size"), PLACES)
def test_spot_is_found_at_its_place(convolution, depth, size, symmetric, tmp_path):
    """The features, the coordinates, and the map for boxes and pictures have the centre of a spot in the image."""
    backbone = small_backbone(convolution, depth)
    x, y = size[1] // 2 + 5, size[0] // 2 - 3
    image = spot_at(size, x, y)
    bag = extraction.map_bag(backbone, backbone.geometry, image, (1.0,), symmetric)
    assert bag.grid == extraction.grid_of(backbone, size, 1.0)
    response = bag.features.sum(1).astype(float)
    assert (response @ bag.coords / response.sum()).tolist() == pytest.approx([x, y], abs=1)
    if symmetric:
        turned = extraction.map_of(backbone, nn.functional.pad(image, (0, -size[1] % 16, 0, -size[0] % 16)), (1,), True)
        rows, columns = bag.grid
        np.testing.assert_allclose(turned[:, :rows, :columns].flatten(1).T, bag.features, atol=1e-6)
    # what train_features.py does with the bag
    centre = backbone.cells(symmetric).centre
    writer = store.StoreWriter(tmp_path, {"stride": backbone.geometry.stride, "centre": centre, "scales": [1.0]})
    writer.add("b", bag)
    first, stride = runs.cells_of(store.FeatureBags(tmp_path))
    heatmap = response.reshape(bag.grid) / response.max()
    pixels = pixels_of(heatmap, size, first, stride)
    assert pixels.shape == size
    found = [(pixels.sum(axis) * (np.arange(n) + 0.5)).sum() / pixels.sum() for axis, n in ((0, size[1]), (1, size[0]))]
    assert found == pytest.approx([x, y], abs=1)
    left, top, width, height = box_of(heatmap, size, first, stride)
    assert [left + width / 2, top + height / 2] == pytest.approx([x, y], abs=2)
    layer = drawn(heatmap, size, first, stride)[..., 3] / 255
    found = [(layer.sum(axis) * (np.arange(n) + 0.5)).sum() / layer.sum() for axis, n in ((0, size[1]), (1, size[0]))]
    assert found == pytest.approx([x, y], abs=1)
    # the pointing game
    peak = point_of(heatmap, size, first, stride)
    assert peak == pytest.approx(bag.coords[response.argmax()].tolist(), abs=0.5)


def drawn(heatmap, size, first, stride):
    """The layer of colour of a picture of the report."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_map(axes, heatmap, size, first, stride)
    (layer,) = axes.images
    for frame in axes.patches:
        (x, y), (width, height) = frame.get_xy(), (frame.get_width(), frame.get_height())
        assert min(x, y) >= 0 and x + width <= size[1] and y + height <= size[0]
    return layer.get_array()


@pytest.mark.parametrize(("convolution", "depth", "size"), PLACES)
def test_squared_gradient_of_a_cell_has_its_centre_at_the_coordinates(convolution, depth, size):
    backbone = small_backbone(convolution, depth)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.enable_grad():
        maps = extraction.map_of.__wrapped__(backbone, image, (1.0,), False)
    bag = extraction.map_bag(backbone, backbone.geometry, image.detach(), (1.0,), False)
    h, w = bag.grid
    first, stride = backbone.geometry.centre / backbone.geometry.stride, backbone.geometry.stride
    for row, column in ((h // 3, w // 3), (2 * h // 3, w // 2), (h - 3, w - 3)):
        (gradient,) = torch.autograd.grad(maps[:, row, column].sum(), image, retain_graph=True)
        energy = gradient[0].square().sum(0)
        place = [
            float((energy.sum(axis) * (torch.arange(n) + 0.5)).sum() / energy.sum())
            for axis, n in ((0, size[1]), (1, size[0]))
        ]
        assert place == pytest.approx(bag.coords.reshape(h, w, 2)[row, column].tolist(), abs=1)
        single = np.zeros(bag.grid)
        single[row, column] = 1
        assert place == pytest.approx(point_of(single, size, first, stride), abs=1)
        # each point of --points has the features of the cell there
        points = np.array([place])
        found = extraction.point_bag(backbone, backbone.geometry, image.detach(), points, (1.0,), False)
        np.testing.assert_allclose(found.features[0], maps[:, row, column].detach(), rtol=0.1)


def test_stages_and_scales_are_aligned_at_any_size():
    """A spot has the same centre in the maps of both stages, and of both scales."""
    views = [(["2", "3"], (1.0,)), (["3", "2"], (1.0,)), (["2"], (1.0, 1.5)), (["2"], (2.0, 0.75))]
    for size in ((169, 105), (100, 150)):
        x, y = size[1] // 2, size[0] // 2
        for stages, scales in views:
            backbone = small_backbone(SameConv, 4, stages)
            bag = extraction.map_bag(backbone, backbone.geometry, spot_at(size, x, y), scales, False)
            for part in np.split(bag.features.astype(float), 2, 1):
                found = part.sum(1) @ bag.coords / part.sum()
                assert found.tolist() == pytest.approx([x, y], abs=2), (size, stages, scales)
            step = backbone.geometry.stride / scales[0]
            assert (bag.coords.max(0) - np.array(size)[::-1] < step).all()  # no cell lies in the extension only


def test_images_with_multiples_of_the_stride_are_not_changed(timm):
    for name, cut, size in (
        ("timm/resnet18", "layer2", (96, 64)),
        ("timm/test_efficientnet", "blocks.2", (96, 64)),
        ("timm/vit_tiny_patch16_224", "blocks.0", (64, 96)),
    ):
        backbone = backbones.load_backbone(name, weights="none", cut=cut)
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(extraction.map_of(backbone, image, (1.0,), False), backbone(image)[0])
            large = nn.functional.interpolate(
                image, (2 * size[0], 2 * size[1]), mode="bilinear", align_corners=False, antialias=True
            )
            second = nn.functional.interpolate(
                backbone(large), backbone(image).shape[2:], mode="bilinear", align_corners=False
            )
            both = torch.cat([backbone(image), second], 1)[0]
            assert torch.equal(extraction.map_of(backbone, image, (1.0, 2.0), False), both)


def test_vision_transformers_with_any_patch_take_images_of_any_size(timm):
    backbone = backbones.load_backbone("timm/vit_small_patch14_dinov2", weights="none", cut="blocks.0")
    assert backbone.geometry == geometries.Geometry(14, 7.0, None)
    image = torch.rand(1, 3, 100, 150)
    for symmetric in (False, True):
        bag = extraction.map_bag(backbone, backbone.geometry, image, (1.0,), symmetric)
        assert bag.grid == extraction.grid_of(backbone, (100, 150), 1.0) == (8, 11)
        assert bag.coords[[0, -1]].tolist() == [[7, 7], [10 * 14 + 7, 7 * 14 + 7]]
    assert extraction.map_of(backbone, image, (1.0, 0.5), False).shape == (2 * 384, 8, 11)


def test_geometry_of_a_size_that_is_no_multiple_of_the_stride():
    """The padding of TensorFlow at 128 pixels, not at 120: with the latter, the cells lie at other places."""
    network = small_backbone(SameConv, 4).network
    assert geometries.geometry_of(network, "3", 120) == geometries.geometry_of(network, "3", 128)
    centres = [geometries.effective_centre(network, "3", side, 16) for side in (60, 64)]
    assert centres[0] == pytest.approx(centres[1], abs=0.1)


def test_patch_features_are_those_around_the_point(images):
    class Mean(nn.Module):
        size = 8

        def forward(self, x):
            return x.mean((2, 3), keepdim=True)

    image = torch.zeros(1, 3, 40, 40)
    image[:, :, 10:18, 20:28] = 1
    bag = extraction.patch_bag(Mean(), image, np.array([[24.5, 14.5], [24.5, 10.5], [4.0, 30.0]]), 8, False)
    np.testing.assert_allclose(bag.features[:, 0], [1, 0.5, 0], atol=1e-6)


# files of others


def test_files_of_clam_and_trident_are_read(tmp_path):
    import h5py

    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = x, np.arange(8).reshape(4, 2)
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"], file["coords"] = x[None], np.arange(8).reshape(1, 4, 2)
    torch.save(torch.from_numpy(x), tmp_path / "plain.pt")
    torch.save({"features": torch.from_numpy(x)}, tmp_path / "named.pt")
    bags = store.FeatureBags(tmp_path)
    assert bags.names == ["clam", "named", "plain", "trident"]
    for name in bags.names:
        assert bags.instances(name) == 4
        assert np.array_equal(bags[name].features, x)
        assert (bags.coords(name) is None) == (name in ("plain", "named"))
    assert bags.coords("trident").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    (tmp_path / "broken.h5").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken.h5: not a readable HDF5 file"):
        store.FeatureBags(tmp_path)["broken"]


def test_settings_of_the_extraction_are_read_from_both_forms(tmp_path):
    """The centre of the first cell decides the place of a box."""
    settings = {"backbone": "timm/resnet18", "stride": 16, "centre": 10.0}
    for kind in (store.StoreWriter, store.FileWriter):
        writer = kind(tmp_path / kind.__name__, settings)
        writer.add("a", store.Bag(np.zeros((6, 4)), None, (2, 3), (32, 48)))
        bags = store.FeatureBags(tmp_path / kind.__name__)
        assert bags.settings == settings
        assert (bags.shape("a").grid, bags.shape("a").size) == ((2, 3), (32, 48))
    writer = store.FileWriter(tmp_path / "other", settings | {"stride": 8, "centre": 4.0})
    writer.add("b", store.Bag(np.zeros((6, 4)), None, (2, 3), (32, 48)))
    shutil.copy(tmp_path / "other" / "b.h5", tmp_path / "FileWriter")
    bags = store.FeatureBags(tmp_path / "FileWriter")
    with pytest.raises(ValueError, match=r"b\.h5: made with other settings than .*a\.h5 \(centre, stride\)"):
        bags.instances("b")


def h5(path, **arrays):
    import h5py

    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


FEATURES = torch.arange(12, dtype=torch.float32).reshape(4, 3)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("b.h5", lambda path: path.write_bytes(b"no"), "not a readable HDF5 file"),
        ("b.h5", lambda path: h5(path, feats=FEATURES), "expected a data set 'features', found feats"),
        ("b.h5", lambda path: h5(path, features=FEATURES[0]), r"expected features \(L, D\), got \(3,\)"),
        ("b.h5", lambda path: h5(path, features=torch.zeros(2, 4, 3)), r"expected features \(L, D\), got \(2, 4, 3\)"),
        ("b.h5", lambda path: h5(path, features=FEATURES[:, :2]), r"expected features \(L, 3\), got \(4, 2\)"),
        (
            "b.h5",
            lambda path: h5(path, features=FEATURES, coords=torch.zeros(4, 3)),
            r"expected coords \(4, 2\), got \(4, 3\)",
        ),
        ("b.pt", lambda path: torch.save(torch.tensor(1.0), path), r"expected features \(L, D\), got \(\)"),
        ("b.pt", lambda path: torch.save({"feats": FEATURES}, path), "expected a tensor, or a dict with a tensor"),
        (
            "b.pt",
            lambda path: torch.save({"features": FEATURES, "coords": "none"}, path),
            r"expected coords \(4, 2\), got str",
        ),
    ],
)
def test_broken_file_among_others_is_named(tmp_path, name, make, message):
    h5(tmp_path / "a.h5", features=FEATURES)
    make(tmp_path / name)
    bags = store.FeatureBags(tmp_path)
    assert bags.instances("a") == 4
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        bags["b"]
    if "coords" not in message:
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            bags.instances("b")


@pytest.mark.parametrize(
    "content",
    [
        FEATURES.bfloat16(),
        FEATURES.half(),
        FEATURES.int(),
        FEATURES.clone().requires_grad_(),
        {"features": FEATURES, "coords": [[0, 1], [2, 3], [4, 5], [6, 7]]},
    ],
)
def test_tensors_of_every_kind_are_read(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    bags = store.FeatureBags(tmp_path)
    assert np.array_equal(bags["a"].features, FEATURES)
    assert bags.instances("a") == 4
    if isinstance(content, dict):
        assert bags.coords("a").tolist() == content["coords"]


def test_bag_in_two_files_is_an_error(tmp_path):
    h5(tmp_path / "a.h5", features=FEATURES)
    torch.save(FEATURES, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds a\.h5 and a\.pt; expected one file per bag"):
        store.FeatureBags(tmp_path)


def test_bag_without_instances_is_named_before_the_training(tmp_path, capsys):
    (tmp_path / "features").mkdir()
    for k in range(6):
        h5(tmp_path / "features" / f"b{k}.h5", features=FEATURES[: 0 if k in (2, 5) else 4])
    write(tmp_path / "labels.csv", ["bag", "a"], [[f"b{k}", k % 2] for k in range(6)])
    assert command(tmp_path, tmp_path / "out", "--folds=2", "--epochs=1") == 2
    assert "features: 2 bags have no instances (b2, b5)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# labels and folds


def read_text(tmp_path, text, bags=("x", "y", "z.1"), **options):
    """The labels of a labels.csv with this text."""
    (tmp_path / "labels.csv").write_text(text)
    return labels.read_labels(
        tmp_path / "labels.csv", **{"classes": None, "group": "patient", "bags": list(bags)} | options
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bag,a\nx,1\nx,0\n", "line 3: x is already in .*line 2"),
        ("image,a\nx.png,1\nsub/x.png,0\n", "line 3: x is already in .*line 2"),
        ("slide,a\nx,1\n", r"expected a column image or bag or file or filename, found the columns \['slide', 'a'\]"),
        ("bag,a\nx,red\n", "line 2: a: expected 1, 0, or nothing, .* got 'red'; --classes names the columns"),
        ("bag,a,split\nx,1,holdout\n", "line 2: expected a split train, val, test, got 'holdout'"),
        ("bag,a\nq.png,1\nx,1\n", r"1 of the 2 bags of .* have no features \(q\.png\); bags with features: x, y, z\.1"),
        ("bag,image,a\nx,y.png,1\n", r"line 2: expected equal values in .*, got image 'y\.png' and bag 'x'"),
        ("bag,labels,a\nx,a,1\ny,a,0\n", "line 3: the column labels is 'a', but the column a is '0'"),
        ("bag,labels,a\nx,a,1\ny,,\n", "line 3: the column labels is '', but the column a is ''"),
        ("bag,labels\nx,\n", "the column labels is empty in all rows"),
    ],
)
def test_errors_of_labels(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path, text)


def test_errors_of_options_that_name_columns(tmp_path):
    for text, among in (("bag,a\nx,1\n", "columns of classes"), ("bag,labels\nx,a\n", "names in the column labels")):
        with pytest.raises(ValueError, match=f"expected {among} among a, got b"):
            read_text(tmp_path, text, classes=["b"])
    with pytest.raises(ValueError, match=r"expected the column who in .*, found bag, a"):
        read_text(tmp_path, "bag,a\nx,1\n", group="who")


@pytest.mark.parametrize("key", ["bag", "image", "bag,image", "file", "filename"])
@pytest.mark.parametrize("name", ["{}", "{}.png", "deep/er/{}.jpeg", "deep\\{}.h5"])
def test_bag_is_named_by_its_file_with_or_without_suffix(tmp_path, key, name):
    rows = [",".join([name.format(bag)] * (key.count(",") + 1)) for bag in ("y", "z.1", "x")]
    found = read_text(tmp_path, f"{key},a\n{rows[0]},1\n{rows[1]},0\n{rows[2]},-1\n")
    assert found.names == ["y", "z.1", "x"]
    np.testing.assert_array_equal(found.values, [[1], [0], [np.nan]])


def test_tables_of_own_images_are_read_as_by_the_image_commands(tmp_path):
    """Labels, boxes and split of one folder, read for images and for bags."""
    from images.folder import load_folder
    from PIL import Image

    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    names = [f"p{k}.png" for k in range(10)]
    for k, name in enumerate(names):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 30), np.uint8)).save(
            photos / ("sub" if k % 2 else "") / name
        )
    shown = ["red|green", "", "red", "green", "", "red", "", "", "green", " red "]
    boxes = [["p0.png", "red", 1, 2, 3, 4], ["p0.png", "red", 5, 6, 7, 8], ["p3.png", "green", 0, 0, 30, 20]]
    write(photos / "boxes.csv", ["image", "label", "x", "y", "w", "h"], boxes)
    for form in ("list", "columns"):
        if form == "list":
            header, rows = ["image", "patient", "labels"], [[n, f"q{k // 2}", shown[k]] for k, n in enumerate(names)]
        else:
            cells = [(int("red" in text), "NaN" if k == 4 else "") for k, text in enumerate(shown)]
            header, rows = (
                ["image", "patient", "red", "green"],
                [[n, f"q{k // 2}", *cells[k]] for k, n in enumerate(names)],
            )
        write(photos / "labels.csv", header, rows)
        index = load_folder(photos)
        bags = sorted(extraction.find_images(photos))
        found = labels.read_labels(photos / "labels.csv", None, "patient", bags)
        assert found.names == [name.removesuffix(".png") for name in index.names]
        assert tuple(found.classes) == index.classes
        np.testing.assert_array_equal(found.values, index.labels)
        assert found.groups.tolist() == index.patients.tolist()
        assert (found.split == "test").tolist() == index.test.tolist()  # split.csv, which load_folder has drawn
        assert (found.split == "val").tolist() == index.val.tolist()
        assert labels.read_labels(photos / "labels.csv", None, "patient", bags, with_split=False).split is None
        places = labels.read_boxes(photos / "boxes.csv", found.classes, found.names)
        for name, placed in index.boxes.items():
            for c, *place in placed:
                assert place in places[index.classes[c]][name.removesuffix(".png")].tolist()
        assert sum(len(p) for by_bag in places.values() for p in by_bag.values()) == len(boxes)


@pytest.mark.parametrize("key", ["bag", "image", "file", "filename"])
@pytest.mark.parametrize("label", ["class", "label", "class,label"])
@pytest.mark.parametrize("sides", ["x,y,w,h", "xmin,ymin,xmax,ymax"])
def test_boxes_in_every_form(tmp_path, key, label, sides):
    twice = label.count(",") + 1
    place = "1,2,3,4" if sides.startswith("x,") else "1,2,4,6"
    rows = [("x.png", "a", place), ("q", "a", place), ("x", "other", "1,1,1,1"), ("y.jpg", "a", place)]
    lines = [f"{key},{label},{sides}", *(",".join([name, *[c] * twice, p]) for name, c, p in rows)]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    found = labels.read_boxes(tmp_path / "boxes.csv", ["a", "b"], ["x", "y"])
    assert {c: {name: p.tolist() for name, p in by_bag.items()} for c, by_bag in found.items()} == {
        "a": {"x": [[1, 2, 3, 4]], "y": [[1, 2, 3, 4]]},
        "b": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bag,x,y,w,h\nx,1,1,1,1\n", "expected a column label or class, found the columns"),
        ("bag,class,x,y\nx,a,1,1\n", "expected the columns x, y, w, h or xmin, ymin, xmax, ymax, got bag, class, x, y"),
        ("bag,class,x,y,w,h,xmin,ymin,xmax,ymax\nx,a,1,1,1,1,1,1,2,2\n", "or xmin, ymin, xmax, ymax, got both"),
        (
            "bag,class,label,x,y,w,h\nx,a,b,1,1,1,1\n",
            "line 2: expected equal values in .*, got label 'b' and class 'a'",
        ),
        ("bag,class,x,y,w,h\nx,a,1,1,,1\n", "line 2: expected numbers x, y, w, h, got "),
        ("bag,class,xmin,ymin,xmax,ymax\nx,a,5,1,2,3\n", "line 2: expected x, y of at least 0 and w, h above 0"),
        ("bag,class,x,y,w,h\nx,b,1,1,1,1\n", r"expected boxes of a in bags such as x; .* has boxes of b in these bags"),
        ("bag,class,x,y,w,h\ny,a,1,1,1,1\n", r"expected boxes of a in bags such as x; .* has no box in these bags"),
    ],
)
def test_errors_of_boxes(tmp_path, text, message):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        labels.read_boxes(tmp_path / "boxes.csv", ["a"], ["x"])


def test_box_outside_the_image_is_an_error(tmp_path):
    def read(place):
        (tmp_path / "boxes.csv").write_text(f"image,label,x,y,w,h\nx.png,a,1,1,5,5\nx.png,a,{place}\n")
        return labels.read_boxes(tmp_path / "boxes.csv", ["a"], ["x"], {"x": (48, 64), "y": None}.get)

    assert len(read("60,40,5,9")["a"]["x"]) == 2  # one pixel too far, for example by rounding
    for place in ("60,40,5.5,8", "60,40,4,9.5", "70,0,4,4"):
        with pytest.raises(ValueError, match=rf"the box {place.replace(',', ', ')} exceeds x, which has 64x48 pixels"):
            read(place)


def test_boxes_on_negative_bags_are_counted():
    table = labels.Labels(["x", "y", "z"], ["a"], np.array([[0.0], [1], [np.nan]], np.float32), None, np.array([]))
    boxes = {"a": {"x": np.zeros((2, 4)), "y": np.zeros((1, 4)), "z": np.zeros((1, 4))}}
    assert labels.boxes_on_negatives(table, boxes) == ["2 boxes of a are in 1 bags whose label of a is 0 (x)"]
    assert labels.boxes_on_negatives(table, {"a": {"y": np.zeros((1, 4))}}) == []


def test_labels_of_instances_in_both_forms(tmp_path):
    path = tmp_path / "instances.csv"
    for text in ("bag,a,b\nx,1,0\nx,,1\nq,1,1\n", "image,a,b\nx.png,1,0\nx.png,-1,1\nq.png,1,1\n"):
        path.write_text(text)
        found = labels.read_instance_labels(path, ["a", "b"], ["x", "y"])
        assert list(found) == ["x"]
        np.testing.assert_array_equal(found["x"], [[1, 0], [np.nan, 1]])
    path.write_text("bag,class\nx,a\nx,NaN\nx,b\n")
    np.testing.assert_array_equal(labels.read_instance_labels(path, ["a"], ["x"])["x"], [[1], [np.nan], [0]])
    for column in ("class", "label"):
        path.write_text(f"bag,{column},x\nx,a,3\nx,other,4\n")
        assert labels.read_instance_labels(path, ["a"], ["x"])["x"].tolist() == [[1], [0]]
    with pytest.raises(ValueError, match="has one of the classes b"):
        labels.read_instance_labels(path, ["b"], ["x"])
    with pytest.raises(ValueError, match="names one of the bags"):
        labels.read_instance_labels(path, ["a"], ["y"])


def test_missing_patients_are_not_one_patient(tmp_path):
    (tmp_path / "labels.csv").write_text("bag,a,patient\nw,1,p\nx,0,NaN\ny,1,\nz,0,nan\n")
    found = labels.read_labels(tmp_path / "labels.csv", None, "patient", ["w", "x", "y", "z"])
    assert found.groups.tolist() == ["p", "x", "y", "z"]


def test_unknown_labels_and_named_classes(data):
    found = labels.read_labels(data / "labels.csv", None, "patient", BAGS)
    assert found.classes == ["lesion", "other"]
    assert np.isnan(found.values[::5, 1]).all() and not np.isnan(found.values[:, 0]).any()
    assert labels.read_labels(data / "labels.csv", ["other"], "patient", BAGS).classes == ["other"]


def test_folds_keep_patients_together_and_test_each_bag_once(data):
    table = labels.read_labels(data / "labels.csv", None, "patient", BAGS)
    tested = []
    for one in runs.plan(table, 5, 2, "test"):
        assert not set(table.groups[one.train]) & set(table.groups[one.test])
        tested += one.test.tolist()
    assert sorted(tested) == sorted([*range(40), *range(40)])


def test_more_folds_than_bags_of_a_kind(data):
    table = labels.read_labels(data / "labels.csv", None, "patient", BAGS)
    table = table._replace(groups=np.array(table.names))
    with pytest.raises(ValueError, match=r"--folds: expected at most 20 .* lesion has 20 negative, 20 positive bags"):
        list(runs.plan(table, 21, 1, "test"))
    few = table._replace(values=np.array([[float(i < 3)] for i in range(40)], np.float32), classes=["rare"])
    plan = list(runs.plan(few, 5, 2, "test"))
    assert runs.untested(few, plan) == ["4 of 10 folds test no positive bag of rare: they have no AUC"]
    assert runs.untested(table, list(runs.plan(table, 2, 1, "test"))) == []


def test_given_split_is_used(data):
    table = labels.read_labels(data / "labels.csv", None, "patient", BAGS)
    ((_, _, train, test),) = runs.plan(table, None, 1, "test")
    assert set(table.split[train]) == {"train", "val"} and set(table.split[test]) == {"test"}
    ((_, _, train, test),) = runs.plan(table, None, 1, "val")
    assert set(table.split[train]) == {"train"} and set(table.split[test]) == {"val"}


def test_errors_of_the_split(tmp_path):
    table = read_text(tmp_path, "bag,a\nx,1\ny,0\n")
    with pytest.raises(ValueError, match=r"expected --folds, or a column split in labels\.csv .* or a split\.csv"):
        list(runs.plan(table, None, 1, "test"))
    table = read_text(tmp_path, "bag,patient,split,a\nx,p,train,1\ny,p,test,0\n")
    with pytest.raises(ValueError, match=r"1 patients are in more than one part of the split \(p\)"):
        list(runs.plan(table, None, 1, "test"))
    (tmp_path / "split.csv").write_text("image,split\nx.png,train\n")
    with pytest.raises(ValueError, match=r"1 images of labels\.csv have no split there \(y\)"):
        read_text(tmp_path, "bag,a\nx,1\ny,0\n")


# training


def test_standardization_and_principal_components():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1]) + 100
    x = torch.cat([x, x[:, :1] * 2], 1)
    parts = [x[:7], x[7:7], x[7:]]
    plain = training.fit_transform(parts, 0)(x)
    torch.testing.assert_close(plain.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(plain.std(0), torch.ones(4), atol=1e-2, rtol=0)
    few = training.fit_transform(parts, 2)(x)
    torch.testing.assert_close(few.T.cov(), torch.eye(2), atol=1e-2, rtol=0)
    # the first feature and its double are one direction, the first component
    assert abs(torch.corrcoef(torch.stack([few[:, 0], x[:, 0]]))[0, 1]) > 0.99
    with pytest.raises(ValueError, match="expected at most the 4 features, got 5"):
        training.fit_transform(parts, 5)


@pytest.mark.examples
@pytest.mark.parametrize("head", [head for head in train_features.HEADS if head != "patches"])
@pytest.mark.parametrize("loss", train_features.LOSSES)
def test_every_head_and_loss_separates_the_bags(data, tmp_path, head, loss):
    options = [
        "--folds=2",
        "--epochs=20",
        "--lr=0.05",
        "--batch-size=5",
        "--classes=lesion",
        "--rise=10",
        "--share=0.3",
    ]
    labelled = ("--instance-labels", str(data / "instances.csv"))
    assert command(data, tmp_path, f"--head={head}", f"--loss={loss}", "--pooling=mean", *options, *labelled) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())["lesion"]
    assert result["auc"] > 0.9
    assert result["auc_low"] <= result["auc_high"] <= 1
    assert result["instance_auc"] > 0.75


@pytest.mark.examples
def test_small_network_learns_from_the_pixels_of_patches(tmp_path):
    """Patches of 16 pixels: those of the class have a bright square. Bags by extract_features.py, random weights."""
    from PIL import Image

    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    labels, points, instances = [], [], []
    for k in range(24):
        pixels = generator.integers(0, 120, (64, 64, 3), np.uint8)
        for x, y in ((16, 16), (16, 48), (48, 16), (48, 48)):
            positive = k % 2 and x == 16
            if positive:
                pixels[y - 4 : y + 4, x - 4 : x + 4] += 120
            points.append([f"p{k:02d}.png", x, y])
            instances.append([f"p{k:02d}", int(positive)])
        Image.fromarray(pixels).save(tmp_path / "photos" / f"p{k:02d}.png")
        labels.append([f"p{k:02d}", k % 2])
    write(tmp_path / "points.csv", ["image", "x", "y"], points)
    known = write(tmp_path / "instances.csv", ["bag", "bright"], instances)
    table = write(tmp_path / "labels.csv", ["bag", "bright"], labels)
    given = ["--images", str(tmp_path / "photos"), "--points", str(tmp_path / "points.csv"), "--backbone", "pixels"]
    assert extract_features.main([*given, "--patch", "16", "--out", str(tmp_path / "patches")]) == 0
    with pytest.raises(SystemExit):
        extract_features.main([*given, "--out", str(tmp_path / "other")])
    options = ["--features", str(tmp_path / "patches"), "--labels", str(table), "--instance-labels", str(known)]
    options += ["--head=patches", "--pooling=mean", "--share=0.5", "--folds=2", "--epochs=8", "--batch-size=2"]
    assert train_features.main([*options, "--lr=0.001", "--rise=10", "--out", str(tmp_path / "runs")]) == 0
    result = json.loads((tmp_path / "runs" / "metrics.json").read_text())["bright"]
    assert result["auc"] > 0.95 and result["instance_auc"] > 0.95


@pytest.mark.parametrize("patches", [0, 1, 128, 300])
def test_small_network_in_groups_computes_the_layers_of_ilse_et_al(patches):
    torch.manual_seed(1)
    network = PatchNetwork(3 * 27 * 27, 2, 0.0).eval()
    x = torch.rand(patches, 3 * 27 * 27)
    (w1, b1), (w2, b2) = ((network.convolutions[i].weight, network.convolutions[i].bias) for i in (0, 3))
    out = F.max_pool2d(F.relu(F.conv2d(x.view(-1, 3, 27, 27), w1, b1)), 2)
    out = F.max_pool2d(F.relu(F.conv2d(out, w2, b2)), 2).flatten(1)
    expected = network.last(F.relu(network.second(F.relu(network.first(out)))))
    logits, hidden = network(x)
    assert logits.shape == (patches, 2) and hidden.shape == (patches, 512)
    torch.testing.assert_close(logits, expected)
    if patches:
        cotangent = torch.randn_like(logits)
        parameters = list(network.parameters())
        grads = (torch.autograd.grad(out, parameters, cotangent) for out in (logits, expected))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_small_network_reads_patches_of_the_image(images):
    image = extraction.read_image(images / "im0.png")
    bag = extraction.pixel_bag(image, np.array([[24.5, 14.5], [2.0, 30.0]]), 16)
    patch = bag.features[0].reshape(3, 16, 16)
    np.testing.assert_array_equal(patch, image[0, :, 6:22, 16:32].numpy())
    beyond, within = (extraction.pixel_bag(image, np.array([place]), 16).features for place in ([-0.4, 99], [0.5, 47]))
    np.testing.assert_array_equal(beyond, within)
    network = PatchNetwork(3 * 27 * 27, 2, 0.0)
    assert network.first.in_features == 1200
    x = torch.randn(5, 3 * 27 * 27)
    network.eval()
    torch.testing.assert_close(network(x)[0], network(x)[0])
    network.train()
    assert len({tuple(network(x)[0].flatten().tolist()) for _ in range(40)}) == 8  # flips and rotations
    network.start(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 0.5)
    assert network.last.bias[0] > network.last.bias[1]
    with pytest.raises(ValueError, match="square patches"):
        PatchNetwork(100, 1, 0.0)
    settings = replace(training.Settings(), head="patches", restarts=2)
    with pytest.raises(ValueError, match="expected the head linear or mlp, got patches"):
        training.choose_start(None, None, [], torch.zeros(2, 1), settings, 0)


@pytest.mark.examples
@pytest.mark.parametrize("pooling", train_features.POOLINGS)
def test_every_pooling_runs(data, tmp_path, pooling):
    options = ("--epochs", "2", "--pooling", pooling, "--head", "linear", "--start", "at_once")
    assert command(data, tmp_path, *options) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert set(result) == {"lesion", "other"} and all(0 <= v["auc"] <= 1 for v in result.values())


@pytest.mark.parametrize(
    ("options", "r"), [(["generalized_mean"], 3.0), (["generalized_mean", "--r=1"], 1.0), (["lse", "--r=5"], 5.0)]
)
def test_parameter_r_of_the_pooling(data, tmp_path, options, r):
    assert command(data, tmp_path, "--epochs=1", "--pooling", *options) == 0
    known = json.loads((tmp_path / "settings.json").read_text())
    settings = training.Settings.of_run(known)
    assert settings.r == r
    assert training.make_model(settings, 6, 2, 0)["loss"].pooling.r == r
    # a run of an older version had the default of the library
    del known["r"]
    older = training.Settings.of_run(known)
    assert training.make_model(older, 6, 2, 0)["loss"].pooling.r == {"lse": 10.0, "generalized_mean": 1.0}[options[0]]


def precisions(settings, data, monkeypatch):
    """The precisions of the outputs of the layers of all networks, and of the logits that the losses get."""
    layers, logits = set(), set()

    def linear(x, *weights, compute=torch.nn.functional.linear):
        out = compute(x, *weights)
        layers.add(out.dtype)
        return out

    def recorded(shaped, *arguments, compute=training.loss_arguments):
        logits.add(shaped.dtype)
        return compute(shaped, *arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(training, "loss_arguments", recorded)
    bags = store.FeatureBags(data / "features")
    labels = torch.tensor([[float(i % 2)] for i in range(len(bags.names))])
    reader = training.BagReader(bags, bags.names, 1e9)
    model = training.train(reader, bags.names, labels, settings, 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    of_training = layers.copy()
    layers.clear()
    training.predicted(model, reader, bags.names[:2])
    assert layers == {torch.float32}
    return of_training, logits


@pytest.mark.parametrize(
    "options", [{}, {"restarts": 2, "trial_epochs": 1}, {"head": "linear"}, {"head": "gated"}], ids=str
)
def test_mixed_precision_is_that_of_the_network_in_training(data, monkeypatch, options):
    settings = training.Settings(epochs=1, amp="bf16", **options)
    with monkeypatch.context() as patched:
        layers, logits = precisions(settings, data, patched)
    assert torch.bfloat16 in layers and logits == {torch.float32}
    # the layers of attention belong to the loss
    assert (torch.float32 in layers) == (settings.head == "gated")
    with monkeypatch.context() as patched:
        assert precisions(replace(settings, amp=None), data, patched) == ({torch.float32}, {torch.float32})


def test_mixed_precision_is_a_setting_of_the_run(data, tmp_path, capsys):
    assert command(data, tmp_path, "--epochs=1", "--amp=bf16") == 0
    assert training.Settings.of_run(json.loads((tmp_path / "settings.json").read_text())).amp == "bf16"
    capsys.readouterr()
    assert command(data, tmp_path, "--epochs=1", "--resume") == 2
    assert "made with another --amp" in capsys.readouterr().err
    # a run of an older version has no such setting, and was trained in float32
    path = tmp_path / "settings.json"
    known = json.loads(path.read_text())
    del known["amp"]
    path.write_text(json.dumps(known))
    assert command(data, tmp_path, "--epochs=1", "--resume") == 0


def test_patches_in_mixed_precision_are_near_those_in_float32():
    network, x = PatchNetwork(3 * 27 * 27, 2, 0.0).eval(), torch.rand(7, 3 * 27 * 27)
    with training.autocast(training.Settings(amp="bf16")):
        logits, hidden = network(x)
    assert logits.dtype == hidden.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), network(x)[0], atol=0.01, rtol=0.05)


def test_bags_of_equal_size_give_the_loss_of_packed_bags():
    settings = training.Settings()
    model = training.make_model(settings, 6, 2, 0)
    batch = training.Batch(torch.randn(12, 6), torch.tensor([0, 4, 8, 12]), torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    logits, hidden = model["head"](batch.features)
    shaped, given = training.loss_arguments(logits, batch, hidden)
    assert shaped.shape == (3, 2, 4) and "offsets" not in given
    packed = model["loss"](logits, batch.labels, offsets=batch.offsets)
    torch.testing.assert_close(model["loss"](shaped, batch.labels, **given), packed)


@pytest.mark.parametrize("hidden", [0, 4])
def test_candidates_compute_the_logits_of_their_heads(hidden):
    heads = [Head(6, 2, hidden, 0.0) for _ in range(3)]
    together, x = Candidates(heads), torch.randn(9, 6)
    torch.testing.assert_close(together(x), torch.cat([head(x)[0] for head in heads], 1))
    copy = Head(6, 2, hidden, 0.0)
    together.copy_to(copy, 1)
    torch.testing.assert_close(copy(x)[0], heads[1](x)[0])


@pytest.mark.examples
def test_restarts_find_the_object_from_poor_initial_weights(data):
    """Max pooling with a linear head: some initial weights never use feature 0, the best of eight do."""
    bags = store.FeatureBags(data / "features")
    reader = training.BagReader(bags, bags.names, 1e9)
    values = torch.tensor([[float(i % 2)] for i in range(40)])
    settings = training.Settings(
        loss="bag", pooling="max", head="linear", epochs=10, batch_size=8, lr=0.05, share=0.3, trial_epochs=10
    )

    def weights(restarts):
        found = []
        for seed in range(6):
            model = training.train(reader, bags.names, values, replace(settings, restarts=restarts), seed)
            found.append(float(model["head"].first.weight[0, 0]))
        return found

    assert min(weights(1)) < 0.5 < min(weights(8))


def test_k_falls_during_the_trials_to_its_final_value(data):
    bags = store.FeatureBags(data / "features")
    reader = training.BagReader(bags, bags.names, 1e9)
    settings = training.Settings(k=1, k_start=0.9, trial_epochs=3, batch_size=10)
    schedule = training.falling_k(reader, bags.names, settings)
    ks = [schedule.step() for _ in range(3 * 4)]  # 40 bags, 4 steps an epoch
    assert ks[0] == round(0.9 * max(map(bags.instances, bags.names)))
    assert sorted(ks, reverse=True) == ks and ks[6] > 1
    assert ks[8:] == [1] * 4
    share = training.falling_k(reader, bags.names, replace(settings, k=0.1, k_start=0.5))
    assert [share.step() for _ in range(9)][::8] == [0.5, 0.1]
    assert training.falling_k(reader, bags.names, replace(settings, k_start=0.0)) is None
    assert training.falling_k(reader, bags.names, replace(settings, pooling="max")) is None


def test_lam_stays_zero_for_random_labels(data):
    bags = store.FeatureBags(data / "features")
    reader = training.BagReader(bags, bags.names, 1e9)
    values = torch.randint(0, 2, (40, 1), generator=torch.Generator().manual_seed(1)).float()
    history = []
    settings = training.Settings(epochs=3, batch_size=10, lr=1e-5, share=0.3)
    training.train(reader, bags.names, values, settings, 0, history.append)
    assert [row["lam"] for row in history] == [0.0, 0.0, 0.0]


@pytest.mark.examples
def test_command_explains_lam_that_stayed_zero(data, tmp_path, capsys):
    """A tiny learning rate: the training AUC stays below 1. In the second command lam rises at once."""
    options = ("--folds=2", "--classes=lesion", "--epochs=3", "--lr=1e-6", "--pooling=mean")
    assert command(data, tmp_path / "never", *options, "--start-auc=1") == 0
    printed = capsys.readouterr().out
    assert "run 1 of 2: " in printed and "lam stayed 0" in printed
    text = "lam stayed 0 in 2 of 2 runs. These runs trained with the bag loss only: SGL had no effect."
    assert f"warning: {text}" in printed
    for change in (
        "--epochs 6",
        "--pooling topk",
        "--k-start 0.2 --restarts 4",
        "another network",
        "--start at_once",
    ):
        assert change in printed
    best = float(re.search(r"The highest AUC was ([\d.]+)\.", printed)[1])
    histories = [torch.load(path, weights_only=True)["history"] for path in (tmp_path / "never" / "parts").glob("*.pt")]
    assert best == pytest.approx(max(row["auc"][0] for rows in histories for row in rows), abs=0.005)
    assert text in (tmp_path / "never" / "report.html").read_text()
    # a finished run is not trained again, but still explained
    assert command(data, tmp_path / "never", *options, "--start-auc=1", "--resume") == 0
    assert text in capsys.readouterr().out
    assert command(data, tmp_path / "rises", *options, "--start=at_once") == 0
    assert command(data, tmp_path / "bag", *options, "--loss=bag") == 0
    assert command(data, tmp_path / "off", *options, "--lam=0") == 0
    assert "lam stayed 0 in" not in capsys.readouterr().out
    assert "lam stayed 0 in" not in (tmp_path / "rises" / "report.html").read_text()


def test_advice_names_the_cause_and_what_is_not_yet_used():
    history = [{"epoch": 1, "loss": 0.5, "lam": 0.0, "auc": [math.nan, 0.61]}, {"epoch": 2, "lam": 0.0, "auc": []}]
    labels = np.repeat([[0.0], [1.0]], 20, 0).astype(np.float32)
    settings = training.Settings(k_start=0.2, restarts=4)
    text = advice.lam_advice([history, [], [{"lam": 0.5, "auc": [0.9]}]], [labels] * 3, settings)
    assert "lam stayed 0 in 1 of 3 runs" in text and "The highest AUC was 0.61" in text
    assert "--k-start" not in text and "--pooling topk" not in text
    # features of other programs have no stages
    other = advice.lam_advice([history], [labels], settings, extracted=False)
    assert "use the features of another network" in other and "--stages" not in other
    few = advice.lam_advice([history], [labels[17:23]], settings)
    assert "too few training bags" in few and "--epochs" not in few
    counts = [int(number) for number in re.findall(r"(\d+) positive and (\d+) negative", few)[0]]
    more = [int(number) for number in re.findall(r"or (\d+) and (\d+)", few)[0]]
    for positive, negative in (counts, more):
        for fewer in (0, 1):
            targets = np.repeat([[1.0], [0.0]], [positive - fewer, negative], 0).astype(np.float32)
            assert advice.can_learn(targets, settings.start_auc) == (not fewer)
    assert advice.lam_advice([[{"lam": 0.5, "auc": [0.9]}]], [labels], settings) is None


def training_rows(*trainings):
    """Rows of trainings with 12 positive and 12 negative test bags; each argument: AUC, and fraction of boxes hit."""
    counts = {"repeat": 0, "class": "cat", "positive": 12, "negative": 12, "images": 12}
    return [counts | {"fold": fold, "auc": value, "iou_0.1": hit} for fold, (value, hit) in enumerate(trainings)]


def failure_text(rows, history, settings):
    return advice.failure_advice(advice.failures(rows, history, settings), rows, settings, True)


def failures(rows, losses, **options):
    history = {(0, fold): [{"loss": 9.0, "bag_loss": loss}] for fold, loss in enumerate(losses)}
    settings = replace(training.Settings(k_start=0.2, restarts=4), **options)
    text = failure_text(rows, history, settings)
    return text, [] if text is None else re.findall(r"fold (\d)", text)


def test_trainings_that_seem_to_have_failed_are_named_with_the_reason():
    good = training_rows((0.9, 0.8), (0.85, 0.6), (0.8, 0.7), (0.9, 0.9))
    assert failures(good, [0.4, 0.42, 0.38, 0.44]) == (None, [])
    # each sign alone
    text, named = failures(good, [0.4, 0.42, 0.38, 0.5])
    assert named == ["3"] and "1 of 4 trainings: fold 3 (bag loss 0.50, the median is 0.40)" in text
    assert "--restarts" not in text and "--k-start" not in text and "--repeats" in text
    # two of four: the lower median
    assert failures(good, [0.4, 0.5, 0.38, 0.5])[1] == ["1", "3"]
    text, named = failures(training_rows((0.9, 0.8), (0.6, 0.6), (0.8, 0.7), (0.9, 0.0)), [0.4] * 4)
    assert named == ["1", "3"] and "fold 1 (test AUC 0.60, not clearly above chance)" in text
    assert "fold 3 (no box overlaps a true box in 12 images)" in text
    # without the search for small objects, the advice is to use it
    assert "--k-start 0.2 --restarts 4 --trial-epochs 30" in failures(good, [0.4, 0.4, 0.4, 0.5], restarts=1)[0]
    # the whole loss of SGL is not compared, and two trainings are too few
    history = {(0, fold): [{"loss": loss}] for fold, loss in enumerate([0.4, 0.4, 0.4, 0.9])}
    assert failure_text(good, history, training.Settings()) is None
    assert "fold 3" in failure_text(good, history, training.Settings(loss="bag"))
    assert failures(good[:2], [0.4, 0.9]) == (None, [])
    # few test bags say little
    few = [row | {"positive": 4, "images": 4} for row in training_rows((0.5, 0.0))]
    assert failures(few, [0.4]) == (None, [])


def test_chance_is_that_of_random_orders():
    """5 % of random orders of the test bags have an AUC that is called above chance."""
    generator = np.random.default_rng(0)
    target = np.repeat([1.0, 0.0], [22, 16])
    values = [auc(generator.permutation(38).astype(float), target) for _ in range(4000)]
    row = {"positive": 22, "negative": 16}
    above = np.mean([not advice._signs(row | {"auc": value}) for value in values])
    assert 0.04 < above < 0.06


def test_initial_probability_of_the_head_is_the_prior():
    head = Head(5, 2, 0, 0.0)
    head.start(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), 0.1)
    torch.testing.assert_close(torch.sigmoid(head.first.bias), torch.tensor([0.0625, 0.0125]))


@pytest.mark.examples
def test_resume_gives_what_an_uninterrupted_command_gives(data, tmp_path, capsys):
    options = ("--folds", "2", "--repeats", "2", "--epochs", "2")
    assert command(data, tmp_path / "whole", *options) == 0
    assert command(data, tmp_path / "cut", *options) == 0
    for name in ("repeat0_fold1", "repeat1_fold0"):
        (tmp_path / "cut" / "parts" / f"{name}.npz").unlink()
    assert command(data, tmp_path / "cut", *options) == 2
    assert "holds runs; pass --resume" in capsys.readouterr().err
    assert command(data, tmp_path / "cut", *options, "--resume", "--lr", "0.1") == 2
    assert "made with another --lr" in capsys.readouterr().err
    assert command(data, tmp_path / "cut", *options, "--resume") == 0
    for name in ("metrics.json", "runs.csv", "bags.csv", "instances.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def drop_last_instance(folder):
    """Takes the last instance away from the last bag of a store."""
    *rows, (name, instances, *others) = csv.reader((folder / "bags.csv").open())
    write(folder / "bags.csv", rows[0], [*rows[1:], [name, int(instances) - 1, *others]])


@pytest.mark.parametrize(
    ("protocol", "edit", "message"),
    [
        ("--folds=2", lambda d: change(d / "labels.csv", "b00,0,", "b00,1,"), "other labels"),
        ("--folds=2", lambda d: change(d / "labels.csv", "b39,1,1,val,p19\n", ""), "other labels"),
        ("--folds=2", lambda d: change(d / "labels.csv", "val,p19", "val,p18"), "other labels"),
        ("--folds=2", lambda d: drop_last_instance(d / "features"), "other features"),
        ("--folds=2", lambda d: change(d / "features" / "store.json", "{}", '{"stride": 8}'), "other features"),
        ("--repeats=2", lambda d: change(d / "labels.csv", "val,p19", "test,p19"), "another split"),
    ],
)
def test_resume_with_other_data_is_an_error(data, tmp_path, capsys, protocol, edit, message):
    shutil.copytree(data, tmp_path / "data")
    options = (tmp_path / "data", tmp_path / "out", protocol, "--epochs=1")
    assert command(*options) == 0
    edit(tmp_path / "data")
    assert command(*options, "--resume") == 2
    assert f"made with {message}" in capsys.readouterr().err


def test_split_that_is_not_used_may_change_before_a_resume(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    options = (tmp_path / "data", tmp_path / "out", "--folds=2", "--epochs=1")
    assert command(*options) == 0
    change(tmp_path / "data" / "labels.csv", "val,p19", "test,p19")
    assert command(*options, "--resume") == 0


def test_folder_of_an_older_version_is_continued(data, tmp_path):
    options = (data, tmp_path, "--folds=2", "--epochs=1")
    assert command(*options) == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["data"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert command(*options, "--resume") == 0


def test_other_form_of_the_same_path_is_no_other_option(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data)
    assert command(Path(), tmp_path / "out", "--epochs=1") == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["labels"] == str(data / "labels.csv")
    monkeypatch.chdir(tmp_path)
    assert command(data, Path("out"), "--epochs=1", "--resume") == 0
    shutil.copy(data / "labels.csv", tmp_path / "labels.csv")
    assert command(data, Path("out"), "--epochs=1", "--resume", "--labels=labels.csv") == 2
    assert "made with another --labels" in capsys.readouterr().err


def test_tables_hold_every_bag_and_instance(data, tmp_path):
    assert command(data, tmp_path, "--folds", "2", "--epochs", "1") == 0
    bags = store.FeatureBags(data / "features")
    with (tmp_path / "instances.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(bags.instances(name) for name in bags.names)
    first = next(row for row in rows if row["bag"] == "b07" and row["instance"] == "2")
    np.testing.assert_allclose([float(first["x"]), float(first["y"])], bags.coords("b07")[2], rtol=1e-5)
    assert 0 <= float(first["lesion"]) <= 1
    with (tmp_path / "bags.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 40
    assert "<img" in (tmp_path / "report.html").read_text()


def test_command_prints_how_it_read_the_labels(data, tmp_path, capsys):
    assert command(data, tmp_path, "--epochs", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lesion: 40 bags, 20 positive, 20 negative, 0 unknown"
    assert lines[1].startswith("other: 40 bags, ") and lines[1].endswith(", 8 unknown")
    assert lines[2] == "first run: 28 bags for training, 12 for the test"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--threads=0", "--threads: expected at least 1, got 0"),
        ("--hidden=0", "--hidden: expected at least 1, got 0"),
        ("--components=-1", "--components: expected at least 0, got -1"),
        ("--overlays=-1", "--overlays: expected at least 0, got -1"),
        ("--noise=-0.5", "--noise: expected at least 0, got -0.5"),
        ("--noise=nan", "--noise: expected at least 0, got nan"),
        ("--lr=-1", "--lr: expected at least 0, got -1.0"),
        ("--k=2.7", "--k: expected a whole number of at least 1, or a fraction between 0 and 1, got 2.7"),
        ("--k=nan", "--k: expected a whole number of at least 1, or a fraction between 0 and 1, got nan"),
        ("--dropout=1.5", "--dropout: expected at least 0 and below 1, got 1.5"),
        ("--folds=2 --test=val", "--test: expected without --folds"),
        ("--k-start=0.2 --pooling=max", "--k-start: expected --pooling topk, got max"),
        ("--r=3 --pooling=max", "--r: expected --pooling lse or generalized_mean, got max"),
        ("--r=0 --pooling=lse", "--r: expected a finite number above 0, got 0"),
        ("--k-start=0.2 --head=gated", "--k-start, --restarts: expected --head linear or mlp, got gated"),
        ("--classes lesion other lesion", "--classes: expected each class once, got lesion twice"),
    ],
)
def test_errors_of_options(data, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        command(data, tmp_path, *words.split())
    assert message in capsys.readouterr().err


def test_command_names_boxes_on_negative_bags(timm, images, tmp_path, capsys):
    """The images are in both parts of a split of patients with a lesion (im0, im2) and without (im1)."""
    given = ["--images", str(images), "--out", str(tmp_path / "features"), *NETWORK]
    assert extract_features.main(given) == 0
    parts = ("train", "train", "test")
    write(tmp_path / "labels.csv", ["image", "lesion", "split"], [[f"im{k}", 1 - k % 2, parts[k]] for k in range(3)])
    boxes = write(tmp_path / "boxes.csv", ["image", "label", *"xywh"], [["im1.png", "lesion", 8, 8, 20, 20]])
    options = (tmp_path, tmp_path / "out", "--epochs=1", "--boxes", str(boxes))
    assert command(*options) == 0
    text = "note: 1 boxes of lesion are in 1 bags whose label of lesion is 0 (im1)"
    assert text in capsys.readouterr().out.splitlines()
    change(boxes, "8,8,20,20", "8,8,200,20")
    assert command(*options, "--resume") == 2
    assert "the box 8, 8, 200, 20 exceeds im1, which has 80x48 pixels" in capsys.readouterr().err


def test_wrong_folder_of_images_is_an_error_before_the_training(data, tmp_path, capsys):
    assert command(data, tmp_path / "out", "--images", str(tmp_path / "nowhere")) == 2
    assert "images: expected a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bags_without_a_label_are_named(data, tmp_path, capsys):
    lines = (data / "labels.csv").read_text().splitlines(keepends=True)
    (tmp_path / "labels.csv").write_text("".join(lines[:-2]))
    options = ("--labels", str(tmp_path / "labels.csv"), "--epochs", "1")
    assert command(data, tmp_path / "out", *options) == 0
    note = "note: 2 of 40 bags with features are not in labels.csv and are not used (b38, b39)"
    assert note in capsys.readouterr().out.splitlines()


def test_report_says_how_often_the_boxes_are_right(tmp_path, capsys):
    """Two folds: an image whose predicted box is right, and an image whose predicted box misses the true box."""
    writer = store.StoreWriter(tmp_path / "features", {"stride": 16, "centre": 8.0})
    for name in ("a", "b"):
        writer.add(name, store.Bag(np.zeros((16, 1), np.float32), None, (4, 4), (64, 64)))
    p = np.zeros((16, 1), np.float32)
    p[5] = 0.9
    box = box_of(p.reshape(4, 4).astype(float), (64, 64), 0.5)[None]
    known = labels.Labels(["a", "b"], ["cat"], np.ones((2, 1), np.float32), None, np.array(["a", "b"]))
    truth = runs.Truth(known, {}, {"cat": {"a": box, "b": box + np.array([20.0, 0.0, 0.0, 0.0])}})
    plan = [runs.Run(0, fold, np.array([1 - fold]), np.array([fold])) for fold in range(2)]
    (tmp_path / "parts").mkdir()
    for run, name in zip(plan, ("a", "b"), strict=True):
        found = runs.Predictions(np.array([name]), np.array([[0.9]], np.float32), p, np.array([0, 16]))
        runs.save_predictions(tmp_path / "parts" / f"{run.name}.npz", found)
    bags = store.FeatureBags(tmp_path / "features")
    write_results(tmp_path, plan, truth, bags, None, 2, "Loss: sgl", training.Settings(), [[]] * len(plan))
    page = (tmp_path / "report.html").read_text()
    assert (
        "2 test images have true boxes of cat. In 1 of them (50%), the predicted box overlaps a true box with IoU &gt; "
        "0.3 (folds: 0% to 100%). The 95 % interval is 0% to 100% if other images are tested with the same networks."
    ) in page
    assert "Loss: sgl; 2 trainings (2 folds, 1 repeat); each image is tested once." in page and "Each fold" in page
    assert re.findall("<h3>(.*?)</h3>", page) == ["a (fold 0)", "b (fold 1)"]
    assert "image AUC" in page and "bag" not in page.split("<h1>")[1].split("<h2>The first")[0]
    assert "iou_0.3 0.500 (folds: 0.000 to 1.000)" in capsys.readouterr().out
    with (tmp_path / "folds.csv").open() as file:
        assert [(row["fold"], row["iou_0.3"]) for row in csv.DictReader(file)] == [("0", "1.0"), ("1", "0.0")]
    # a second repeat that finds no box: the mean over the repeats, and its interval
    second = [run._replace(repeat=1) for run in plan]
    for run, name in zip(second, ("a", "b"), strict=True):
        found = runs.Predictions(np.array([name]), np.array([[0.1]], np.float32), 0 * p, np.array([0, 16]))
        runs.save_predictions(tmp_path / "parts" / f"{run.name}.npz", found)
    write_results(
        tmp_path, plan + second, truth, bags, None, 2, "Loss: sgl", training.Settings(), [[]] * len(plan + second)
    )
    page = (tmp_path / "report.html").read_text()
    assert (
        "2 test images have true boxes of cat. On average over the repeats, the predicted box overlaps a true box with "
        "IoU &gt; 0.3 in 25% of these images (repeats: 0% to 50%; folds: 0% to 100%). The 95 % interval is 0% to 50%"
    ) in page
    assert "4 trainings (2 folds, 2 repeats); each image is tested 2 times." in page
    assert re.findall("<h3>(.*?)</h3>", page) == ["a (fold 0 of repeat 0)", "b (fold 1 of repeat 0)"]


def test_failed_training_is_named_in_the_report_and_on_the_terminal(tmp_path, capsys):
    """Fold 0 separates its 8 positive and 8 negative bags; fold 1 gives all of them the same probability."""
    names = np.array([f"b{k:02d}" for k in range(32)])
    values = (np.arange(32) % 2).astype(np.float32)[:, None]
    truth = runs.Truth(labels.Labels(names.tolist(), ["cat"], values, None, names), {}, {})
    writer = store.StoreWriter(tmp_path / "features", {})
    for name in names:
        writer.add(name, store.Bag(np.zeros((1, 1), np.float32), None, None, None))
    (tmp_path / "parts").mkdir()
    plan = [runs.Run(0, fold, np.arange(16) + 16 * (1 - fold), np.arange(16) + 16 * fold) for fold in range(2)]
    for run, score in zip(plan, (values[:16], np.full((16, 1), 0.5)), strict=True):
        found = runs.Predictions(names[run.test], score, score, np.arange(17))
        runs.save_predictions(tmp_path / "parts" / f"{run.name}.npz", found)
    bags = store.FeatureBags(tmp_path / "features")
    write_results(tmp_path, plan, truth, bags, None, 1, "Loss: sgl", training.Settings(), [[]] * len(plan))
    text = "The network seems not to have found the object in 1 of 2 trainings: fold 1 (test AUC 0.50, not clearly"
    assert f"warning: {text}" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert text in page and "2 trainings (2 folds, 1 repeat); each bag is tested once." in page


def test_pictures_of_the_report_come_from_every_fold_in_turn(tmp_path):
    writer = store.StoreWriter(tmp_path / "features", {})
    names = [f"b{k}" for k in range(9)]
    for name in names:
        writer.add(name, store.Bag(np.zeros((4, 1), np.float32), None, (2, 2), (8, 8)))
    values = np.array([[1.0], [1], [1], [1], [0], [1], [1], [0], [1]], np.float32)
    truth = runs.Truth(labels.Labels(names, ["cat"], values, None, np.array(names)), {}, {})
    parts = []
    for part in ([3, 1, 0, 2], [4, 5], [7, 8, 6]):
        n = len(part)
        found = np.array(names)[part], np.full((n, 1), 0.5), np.zeros((4 * n, 1)), 4 * np.arange(n + 1)
        parts.append(runs.Predictions(*found))
    rows = [{"repeat": 0, "fold": k, "class": "cat"} for k in range(3)]
    write_report(tmp_path, parts, truth, store.FeatureBags(tmp_path / "features"), {}, None, 6, "text", rows)
    found = re.findall("<h3>(.*?)</h3>", (tmp_path / "report.html").read_text())
    assert found == ["b0 (fold 0)", "b5 (fold 1)", "b6 (fold 2)", "b1 (fold 0)", "b8 (fold 2)", "b2 (fold 0)"]


def test_every_box_of_a_map_is_drawn_and_the_evaluated_one_is_the_thickest():
    from matplotlib.figure import Figure

    heatmap = np.zeros((6, 6))
    heatmap[1, 1], heatmap[4, 4], heatmap[4, 0] = 0.7, 0.9, 0.4
    axes = Figure().subplots()
    draw_map(axes, heatmap, (96, 96), 0.5)
    frames = [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == FOUND]
    places = [[*frame.get_xy(), frame.get_width(), frame.get_height()] for frame in frames]
    assert places == boxes_of(heatmap, (96, 96), 0.5).tolist() and len(places) == 2
    assert places[0] == box_of(heatmap, (96, 96), 0.5).tolist()
    assert frames[0].get_linewidth() > frames[1].get_linewidth()


def test_interval_of_the_auc_is_that_of_the_mean_over_the_repeats(tmp_path):
    """The repeats rank the bags differently. Their mean score separates the bags better than each repeat does."""
    generator = np.random.default_rng(3)
    names = np.array([f"b{k:02d}" for k in range(60)])
    values = (np.arange(60) % 2).astype(np.float32)[:, None]
    truth = runs.Truth(labels.Labels(names.tolist(), ["cat"], values, None, names), {}, {})
    writer = store.StoreWriter(tmp_path, {})
    for name in names:
        writer.add(name, store.Bag(np.zeros((1, 1), np.float32), None, None, None))
    bags, repeats, scores = store.FeatureBags(tmp_path), [], []
    for _ in range(5):
        score = values[:, 0] + generator.normal(0, 1.2, 60)
        order = generator.permutation(60)
        scores.append(score)
        repeats.append([runs.Predictions(names[order], score[order, None], np.zeros((60, 1)), np.arange(61))])
    result = runs.summary(repeats, truth, bags)[0]["cat"]
    pairs = [(score[values[:, 0] == 1, None] > score[values[:, 0] == 0]).mean() for score in scores]
    assert result["auc"] == pytest.approx(np.mean(pairs))
    # an own bootstrap, with other samples
    samples = generator.integers(60, size=(4000, 60))
    own = [np.mean([auc(score[rows], values[rows, 0]) for score in scores]) for rows in samples]
    assert [result["auc_low"], result["auc_high"]] == pytest.approx(np.quantile(own, [0.025, 0.975]), abs=0.015)
    assert abs((result["auc_low"] + result["auc_high"]) / 2 - result["auc"]) < 0.02
    # and the AUC of the mean probabilities, which is larger
    assert result["of_means"]["auc"] == pytest.approx(auc(np.mean(scores, 0), values[:, 0]))
    assert result["of_means"]["auc"] > result["auc"] + 0.05
    assert "of_means" not in runs.summary(repeats[:1], truth, bags)[0]["cat"]


def test_mean_probabilities_have_own_metrics_in_the_report(tmp_path, capsys):
    """Two repeats list the bags in different orders. Each box is right in one of them; the mean map has both."""
    writer = store.StoreWriter(tmp_path / "features", {})
    for name in ("a", "b"):
        writer.add(name, store.Bag(np.zeros((4, 1), np.float32), np.zeros((4, 2)), (2, 2), (20, 20)))
    bags = store.FeatureBags(tmp_path / "features")
    corner = {"cat": {"a": np.array([[0.0, 0.0, 10.0, 10.0]]), "b": np.array([[0.0, 0.0, 10.0, 10.0]])}}
    values = np.array([[1], [1]], np.float32)
    truth = runs.Truth(labels.Labels(["a", "b"], ["cat"], values, None, np.array(["a", "b"])), {}, corner)
    right, wrong, unsure = [0.9, 0, 0, 0], [0, 0, 0, 0.7], [0.3, 0, 0, 0.1]
    (tmp_path / "parts").mkdir()
    plan = []
    for repeat, names in enumerate((["a", "b"], ["b", "a"])):
        plan.append(runs.Run(repeat, 0, np.array([0]), np.array([0, 1])))
        found = [
            (np.array([0.5]), np.array(cells)[:, None]) for cells in ((right, wrong) if repeat else (right, unsure))
        ]
        runs.save_predictions(tmp_path / "parts" / f"{plan[-1].name}.npz", runs.predictions_of(names, found))
    settings = training.Settings(loss="bag")
    write_results(tmp_path, plan, truth, bags, None, 0, "Loss: bag", settings, [[]] * len(plan))
    # means: a (0.9 + 0.0, 0.7) / 2, b (0.3 + 0.9, 0.1) / 2: the maximum is right in both
    result = json.loads((tmp_path / "metrics.json").read_text())["cat"]
    assert result["pointing"] == 0.75 and result["of_means"]["pointing"] == 1
    assert "cat, mean probabilities: " in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<th>cat, mean probabilities</th>" in page and "Mean probabilities: the metrics of the mean" in page
    with (tmp_path / "instances.csv").open() as file:
        means = [[row["bag"], float(row["cat"])] for row in csv.DictReader(file)]
    expected = [0.45, 0, 0, 0.35, 0.6, 0, 0, 0.05]
    assert [name for name, _ in means] == list("aaaabbbb")
    assert [p for _, p in means] == pytest.approx(expected)


def test_auc_within_the_folds_is_shown(tmp_path, capsys):
    """Both folds separate their bags, but all probabilities of fold 1 are lower than those of fold 0."""
    names = np.array([f"b{k}" for k in range(8)])
    values = (np.arange(8) % 2).astype(np.float32)[:, None]
    truth = runs.Truth(labels.Labels(names.tolist(), ["cat"], values, None, names), {}, {})
    writer = store.StoreWriter(tmp_path / "features", {})
    for name in names:
        writer.add(name, store.Bag(np.zeros((1, 1), np.float32), None, None, None))
    (tmp_path / "parts").mkdir()
    plan = [runs.Run(0, fold, np.arange(4) + 4 * (1 - fold), np.arange(4) + 4 * fold) for fold in range(2)]
    for run in plan:
        score = 0.1 * values[run.test] + 0.5 - 0.3 * run.fold
        runs.save_predictions(
            tmp_path / "parts" / f"{run.name}.npz", runs.Predictions(names[run.test], score, score, np.arange(5))
        )
    bags = store.FeatureBags(tmp_path / "features")
    write_results(tmp_path, plan, truth, bags, None, 1, "Loss: sgl", training.Settings(), [[]] * len(plan))
    assert "cat: auc 0.750 (folds: 1.000 to 1.000), auc_of_folds 1.000" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<th>AUC in folds</th>") == 1 and "AUC in folds: the mean" in page


@pytest.mark.examples
def test_reading_without_a_cache_gives_the_same_training(data, tmp_path):
    options = ("--epochs", "2", "--batch-size", "3")
    assert command(data, tmp_path / "a", *options) == 0
    assert command(data, tmp_path / "b", *options, "--cache-gb", "0") == 0
    assert (tmp_path / "a" / "bags.csv").read_text() == (tmp_path / "b" / "bags.csv").read_text()


@pytest.mark.examples
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory as Linux reports it")
def test_training_without_a_cache_holds_one_batch_in_memory(tmp_path):
    """The features have 102 MB in float32. Without a cache, the process needs at least half of that less memory."""
    generator = np.random.default_rng(0)
    writer = store.FileWriter(tmp_path / "features", {})
    for i in range(20):
        writer.add(f"{i:02d}", store.Bag(generator.standard_normal((5000, 256), dtype=np.float32), None, None, None))
    rows = "".join(f"{i:02d},{i % 2}\n" for i in range(20))
    (tmp_path / "labels.csv").write_text(f"bag,lesion\n{rows}")
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
    code += "import train_features\nassert train_features.main() == 0\n"
    # Not getrusage: its ru_maxrss of a new process starts at the peak of the process that started it.
    code += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    most = {}
    for gigabytes in (0, 2):
        command = ["--features", tmp_path / "features", "--labels", tmp_path / "labels.csv", "--folds=2", "--epochs=1"]
        command += ["--batch-size=1", f"--cache-gb={gigabytes}", "--out", tmp_path / f"out{gigabytes}"]
        done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        most[gigabytes] = int(done.stdout.splitlines()[-1]) * 1024
    assert most[0] < most[2] - 51e6, most


# metrics


def test_instance_metrics_equal_a_calculation_by_hand():
    found = [np.array([0.9, 0.2, 0.6]), np.array([0.8, 0.1])]
    truth = [np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.0])]
    result = instance_metrics(found, truth, [True, False])
    assert result["iou"] == pytest.approx(1 / 3)
    assert result["auc"] == 0.5  # 0.9 above 0.6, 0.2 below
    assert result["ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["auc_all"] == pytest.approx(4 / 6)


def test_box_metrics_equal_a_calculation_by_hand():
    """One cell of 8x8 that equals the true box, and one beside it."""
    maps = {"hit": np.zeros((8, 8)), "miss": np.zeros((8, 8)), "negative": np.ones((8, 8))}
    maps["hit"][2, 3] = maps["miss"][6, 6] = 1.0
    truth = {"hit": np.array([[24.0, 16, 8, 8]]), "miss": np.array([[0.0, 0, 8, 8], [8, 8, 8, 8]])}
    result = box_metrics(maps, dict.fromkeys(maps, (64, 64)), truth, 0.5)
    assert (result["images"], result["pointing"], result["iou_0.5"]) == (2, 0.5, 0.5)


def test_maps_of_an_unknown_extraction_divide_the_image_evenly(tmp_path):
    store.StoreWriter(tmp_path, {}).add("b", store.Bag(np.zeros((4, 1), np.float32), None, (2, 2), (9, 9)))
    assert runs.cells_of(store.FeatureBags(tmp_path)) == (0.5, None)
    heatmap = np.array([[0.0, 1.0], [0.0, 0.0]])
    assert point_of(heatmap, (9, 9), 0.5) == (6.75, 2.25)
    assert pixels_of(heatmap, (9, 9), 0.5).shape == (9, 9)


def test_boxes_and_points_lie_in_the_image():
    """Three columns at a stride of 16 in an image of 36 pixels: the centre of the last one is beyond the edge."""
    heatmap = np.array([[0.0, 0.0, 1.0]])
    assert point_of(heatmap, (16, 36), 0.5, 16) == (35.5, 8)
    assert box_of(heatmap, (16, 36), 0.5, 16).tolist() == [32, 0, 4, 16]
    assert np.isnan(box_of(heatmap, (16, 32), 0.5, 16)).all()


def test_the_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: values[rows].mean(), 400)
    assert abs((high - low) / 2 - 1.96 / math.sqrt(400)) < 0.02
    assert low < values.mean() < high


# commands


@pytest.mark.parametrize(
    "script",
    [f"{name}_features.py" for name in ("extract", "train", "finetune", "predict", "compare")] + ["bccd_demo.py"],
)
def test_help_does_not_import_torch(script):
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.argv = ['x', '--help']\n"
    code += f"import runpy\ntry: runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_choices_are_those_of_the_library():
    from features.heads import HEADS

    from sgl_ops.pooling import POOLINGS

    assert set(train_features.POOLINGS) == set(POOLINGS)
    assert train_features.HEADS == HEADS


def test_defaults_of_the_command_are_those_of_the_settings(data):
    args = train_features.make_parser().parse_args(["--features", "f", "--labels", "l", "--out", "o"])
    assert training.Settings(**{name: getattr(args, name) for name in training.Settings.__dataclass_fields__}) == (
        training.Settings()
    )


PAGE = (ROOT / "docs" / "own-features.md").read_text()
#: Language and content of the code blocks of the page.
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.examples
def test_list_of_stages_in_own_features_is_that_of_the_command(timm):
    (shown,) = [text for _, text in BLOCKS if text.startswith("stage ")]
    assert backbones.stage_table("tf_efficientnet_lite0") == shown.rstrip("\n")


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ["act1", "layer1", "layer2", "layer3", "layer4"]),
        ("tf_efficientnet_lite0", [f"blocks.{k}" for k in range(7)]),
        ("mobilenetv3_small_050", ["bn1", *(f"blocks.{k}" for k in range(6))]),
        ("convnext_atto", [f"stages.{k}" for k in range(4)]),
        ("vit_tiny_patch16_224", [f"blocks.{k}" for k in range(12)]),
    ],
)
def test_names_of_stages_are_those_of_own_features(timm, name, stages):
    with torch.device("meta"):
        assert backbones.stages_in(timm.create_model(name)) == stages


def test_networks_of_torchvision(timm, tmp_path):
    """SqueezeNet has no padding in its first layers: fewer cells than strides, and an exact stride all the same."""
    from torchvision.models import squeezenet1_0

    network = squeezenet1_0(weights=None).eval()
    torch.save({k: v for k, v in network.state_dict().items() if "classifier" not in k}, tmp_path / "trunk.pt")
    backbone = backbones.load_backbone("torchvision/squeezenet1_0", weights=tmp_path / "trunk.pt", cut="features.6")
    assert backbone.geometry.stride == 8 and backbone.geometry.field == 43
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        wanted = network.features[:7]((image - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(image), wanted)
    geometry = geometries.geometry_of(network, "features.12", 224)
    assert (geometry.stride, geometry.field) == (16, 155)
    assert backbones.stages_in(network) == [f"features.{k}" for k in range(13)]
    with pytest.raises(ValueError, match="similar names: squeezenet1_0, squeezenet1_1"):
        backbones.load_backbone("torchvision/squeezenet", weights="none")
    with pytest.raises(ValueError, match="expected a network of timm"):
        backbones.load_backbone("torchvision/squeezenet1_0", weights="none", output_stride=8)


def test_tables_of_own_features_are_read(tmp_path):
    tables = [text for _, text in BLOCKS if text.startswith(("image,", "bag,"))]
    assert len(tables) == 4
    bags = ["photo_001", "photo_002"]
    for first, second in (tables[:2], tables[2:]):
        found = read_text(tmp_path, first, bags)
        assert found.names == bags and found.values[:, 0].tolist() == [1, 0]
        (tmp_path / "boxes.csv").write_text(second)
        places = labels.read_boxes(tmp_path / "boxes.csv", found.classes, bags)
        assert list(places[found.classes[0]]) == bags[:1]


def test_printed_training_command_is_that_of_own_features(tmp_path, monkeypatch):
    blocks = "".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
    first = next(line for line in blocks.splitlines() if "train_features.py" in line)
    monkeypatch.chdir(tmp_path)
    photos = Path("photos")
    photos.mkdir()
    (photos / "labels.csv").touch()
    (photos / "boxes.csv").touch()
    assert recommended.training_command(Path("features"), photos, True, False) == " ".join(first.split())
    assert "--boxes" not in recommended.training_command(Path("features"), photos, False, False)
    (photos / "boxes.csv").unlink()
    command = recommended.training_command(Path("my features"), photos, True, False)
    assert "--boxes" not in command and "--features 'my features'" in command
    patches = recommended.training_command(Path("features"), photos, False, True)
    assert "--head patches" in patches and "--k-start" not in patches


@pytest.mark.examples
def test_commands_of_own_features_run(timm, images, tmp_path, monkeypatch, capsys):
    """Every command of docs/own-features.md in its order, with random weights and one epoch."""
    from PIL import Image

    blocks = "".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
    commands = [line.split()[1:] for line in blocks.splitlines()]
    assert len(commands) == 15
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    for folder, count in ((photos, 8), (tmp_path / "new_photos", 2)):
        folder.mkdir()
        for k in range(count):
            array = np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)
            Image.fromarray(array).save(folder / f"photo_{k}.jpg")
    write(photos / "labels.csv", ["image", "labels"], [[f"photo_{k}.jpg", "lesion" * (k % 2)] for k in range(8)])
    write(photos / "boxes.csv", ["image", "label", *"xywh"], [["photo_1.jpg", "lesion", 8, 8, 20, 20]])
    points = [[f"photo_{k}.jpg", 10 * k, 20] for k in range(3)]
    write(tmp_path / "nuclei.csv", ["image", "x", "y"], points)
    slides = tmp_path / "slides"
    slides.mkdir()
    for i in range(6):
        torch.save(torch.randn(5 + i, 4), slides / f"s{i}.pt")
    write(tmp_path / "slides.csv", ["bag", "tumour", "patient"], [[f"s{i}", i % 2, f"p{i // 2}"] for i in range(6)])
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.pt")
    weights = ["--weights", "weights.pt"]
    short = {
        "extract_features.py": weights,
        "train_features.py": ["--epochs", "1", "--trial-epochs", "1"],
        "finetune_features.py": [*weights, "--epochs", "1"],
        "predict_features.py": ["--with-failed"],
        "compare_features.py": ["--draws", "9"],
    }
    scripts = (compare_features, extract_features, finetune_features, predict_features, train_features)
    modules = {f"{one.__name__}.py": one for one in scripts}
    for script, *words in commands:
        random = ["--weights", "none"] if "timm/resnet18" in words else short[script]
        assert modules[script].main([*words, *random]) == 0, words
    assert "next: open" in capsys.readouterr().out
    assert (tmp_path / "found_tuned" / "bags.csv").read_text() != (tmp_path / "found" / "bags.csv").read_text()
    for loss in ("sgl", "bag"):
        result = json.loads((tmp_path / "runs" / loss / "metrics.json").read_text())["lesion"]
        assert result["images"] == 1 and "iou_0.3" in result
        assert "<img" in (tmp_path / "runs" / loss / "report.html").read_text()


@pytest.fixture(scope="module")
def trained(timm, tmp_path_factory):
    """Features of six images before and after the last block of a stage, and a run of train_features.py on them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("trained")
    (folder / "photos").mkdir()
    for k in range(6):
        array = np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(array).save(folder / "photos" / f"p{k}.png")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", zero_init_last=False)  # otherwise new blocks are the identity
    torch.save(network.state_dict(), folder / "weights.pt")
    rows = [[f"p{k}", k % 2, ("train", "test")[k // 4]] for k in range(6)]
    labels = write(folder / "labels.csv", ["bag", "red", "split"], rows)
    boxes = write(folder / "boxes.csv", ["image", "label", "x", "y", "w", "h"], [["p5", "red", 5, 6, 25, 36]])
    common = ["--images", str(folder / "photos"), "--backbone", "timm/resnet18", "--weights", f"{folder}/weights.pt"]
    for out, stages in (("before", ["layer1.0"]), ("start", ["maxpool"]), ("features", ["layer1", "maxpool"])):
        assert extract_features.main([*common, "--stages", *stages, "--out", str(folder / out)]) == 0
    command = ["--features", str(folder / "features"), "--labels", str(labels), "--boxes", str(boxes), "--overlays=1"]
    command += ["--epochs=2", "--repeats=2", "--out", str(folder / "run")]
    assert train_features.main(command) == 0
    return folder


def finetune(folder, out, *options):
    command = ["--run", str(folder / "run"), "--before", str(folder / "before"), "--weights", f"{folder}/weights.pt"]
    return finetune_features.main([*command, "--out", str(out), "--overlays=1", "--epochs=1", *options])


BLOCK = ("--blocks", "layer1.1")


def test_blocks_without_training_give_the_predictions_of_the_stored_features(trained, tmp_path):
    assert finetune(trained, tmp_path, *BLOCK, "--lr=0", "--batch-size=2") == 0
    for name in ("repeat0_fold0.npz", "repeat1_fold0.npz"):
        own, frozen = (runs.load_predictions(folder / "parts" / name) for folder in (tmp_path, trained / "run"))
        assert own.names.tolist() == frozen.names.tolist() == ["p4", "p5"]
        found, wanted = (np.log(p.instances / (1 - p.instances)) for p in (own, frozen))
        # half precision of the stored features
        np.testing.assert_allclose(found, wanted, atol=0.01)
        assert wanted.std() > 0.1


def test_fine_tuning_trains_blocks_and_head_but_not_the_statistics_of_batch_norm(trained, tmp_path):
    assert finetune(trained, tmp_path, *BLOCK, "--repeats=1") == 0
    start = torch.load(trained / "weights.pt", weights_only=True)
    own = torch.load(tmp_path / "parts" / "repeat0_fold0.pt", weights_only=True)["model"]
    head = torch.load(trained / "run" / "parts" / "repeat0_fold0.pt", weights_only=True)["model"]
    for name in ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.running_mean", "bn2.running_var"):
        equal = torch.equal(own[f"head.blocks.0.{name}"], start[f"layer1.1.{name}"])
        assert equal == ("running" in name), name
    assert not torch.equal(own["head.head.first.weight"], head["head.first.weight"])


def test_frozen_blocks_are_computed_and_not_trained(trained, tmp_path):
    assert finetune(trained, tmp_path / "one", *BLOCK, "--repeats=1") == 0
    options = ["--before", str(trained / "start"), "--blocks", "layer1.0", "layer1.1", "--freeze=1", "--repeats=1"]
    assert finetune(trained, tmp_path / "two", *options) == 0
    parts = [tmp_path / name / "parts" / "repeat0_fold0.pt" for name in ("one", "two")]
    one, two = (torch.load(path, weights_only=True)["model"] for path in parts)
    assert list(one) == list(two)
    for name, value in one.items():
        # the stored features have half precision
        torch.testing.assert_close(two[name], value, rtol=0.02, atol=0.002)


def test_head_alone_is_trained_further_if_all_blocks_are_frozen(trained, tmp_path):
    """Without a step, the predictions are those of the stored features. With steps, only the head changes."""
    still, moved = tmp_path / "still", tmp_path / "moved"
    assert finetune(trained, still, *BLOCK, "--freeze=1", "--lr=0") == 0
    assert finetune(trained, moved, *BLOCK, "--freeze=1", "--repeats=1") == 0
    known, own, other = (
        runs.load_predictions(out / "parts" / "repeat0_fold0.npz") for out in (trained / "run", still, moved)
    )
    np.testing.assert_allclose(own.instances, known.instances, atol=0.003)
    assert not np.array_equal(own.instances, other.instances)
    model = torch.load(moved / "parts" / "repeat0_fold0.pt", weights_only=True)["model"]
    assert not [key for key in model if "blocks" in key] and "head.head.first.weight" in model
    with pytest.raises(SystemExit):
        finetune(trained, tmp_path / "more", *BLOCK, "--freeze=2")


def test_fine_tuning_continues_and_writes_the_tables_of_train_features(trained, tmp_path, capsys):
    assert finetune(trained, tmp_path / "whole", *BLOCK) == 0
    out = tmp_path / "resumed"
    assert finetune(trained, out, *BLOCK, "--repeats=1") == 0
    assert finetune(trained, out, *BLOCK, "--resume") == 0
    assert "next: open" in capsys.readouterr().out
    for name in ("runs.csv", "bags.csv", "instances.csv", "metrics.json"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    columns = (out / "runs.csv").read_text().splitlines()
    assert columns[0] == (trained / "run" / "runs.csv").read_text().splitlines()[0] and len(columns) == 3
    assert finetune(trained, out, *BLOCK) == 2
    assert "pass --resume" in capsys.readouterr().err
    # compared with the run that it continues; it is not fine-tuned again
    assert compare_features.main(["--runs", str(out), str(trained / "run"), "--draws", "9"]) == 0
    assert "red    pointing " in capsys.readouterr().out
    assert finetune(trained, tmp_path / "again", *BLOCK, "--run", str(out)) == 2
    assert f"got {out} of finetune_features.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "layer1.0"], "expected that the blocks turn the features"),
        (["--blocks", "layer3.1"], "expected that the blocks turn the features"),
        (["--blocks", "layer9"], "stage: expected one of"),
        ([*BLOCK, "--run", "absent"], "run: expected a folder of train_features.py"),
    ],
)
def test_errors_of_fine_tuning(trained, tmp_path, capsys, options, message):
    assert finetune(trained, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_fine_tuning_continues_a_run_from_another_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    command = ["--features=features", "--labels=labels.csv", "--boxes=boxes.csv", "--overlays=1", "--epochs=1"]
    assert train_features.main([*command, "--out", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", "run") == 0


def test_fine_tuning_on_other_labels_than_those_of_the_run_is_an_error(trained, tmp_path, capsys):
    labels = shutil.copy(trained / "labels.csv", tmp_path / "labels.csv")
    command = ["--features", str(trained / "features"), "--labels", str(labels), "--overlays=1", "--epochs=1"]
    assert train_features.main([*command, "--out", str(tmp_path / "run")]) == 0
    change(labels, "p5,1,test", "p5,1,train")
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(tmp_path / "run")) == 2
    assert "run: made with another split" in capsys.readouterr().err


def test_fine_tuning_reads_one_file_per_bag(trained, tmp_path):
    common = ["--images", str(trained / "photos"), "--backbone=timm/resnet18", "--weights", f"{trained}/weights.pt"]
    given = [*common, "--stages", "layer1", "maxpool", "--format=h5", "--out", str(tmp_path / "features")]
    assert extract_features.main(given) == 0
    command = ["--features", str(tmp_path / "features"), "--labels", str(trained / "labels.csv"), "--overlays=1"]
    command += ["--boxes", str(trained / "boxes.csv"), "--epochs=2", "--repeats=2", "--out", str(tmp_path / "run")]
    assert train_features.main(command) == 0
    assert (tmp_path / "run" / "runs.csv").read_text() == (trained / "run" / "runs.csv").read_text()
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(tmp_path / "run")) == 0


@pytest.mark.parametrize("form", ["store", "h5"])
def test_unreadable_and_newer_images_are_named(timm, tmp_path, capsys, form):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for k in range(4):
        Image.new("RGB", (48, 32), (60 * k, 0, 0)).save(tmp_path / "photos" / f"p{k}.png")
    for k in (0, 2):
        content = (tmp_path / "photos" / f"p{k}.png").read_bytes()
        (tmp_path / "photos" / f"p{k}.png").write_bytes(content[:60])
    command = ["--images", str(tmp_path / "photos"), "--backbone", "timm/test_efficientnet", "--weights", "none"]
    command += ["--cut", "blocks.0", "--out", str(tmp_path / "features"), "--format", form]
    assert extract_features.main(command) == 1
    printed = capsys.readouterr()
    assert store.FeatureBags(tmp_path / "features").names == ["p1", "p3"]
    assert "warning: 2 images cannot be read and were left out:" in printed.err and "next: " in printed.out
    assert all(f"p{k}.png" in printed.err for k in (0, 2))
    # repaired: the same command continues; p1 was replaced after its features
    Image.new("RGB", (48, 32), (9, 0, 0)).save(tmp_path / "photos" / "p0.png")
    (tmp_path / "photos" / "p2.png").unlink()
    later = max(path.stat().st_mtime for path in (tmp_path / "features").iterdir()) + 5
    os.utime(tmp_path / "photos" / "p1.png", (later, later))
    for _ in range(2):  # the note does not vanish when another bag is written
        assert extract_features.main(command) == 0
        printed = capsys.readouterr()
        assert "note: images that are newer than their features: 1 (p1); if" in printed.out
        assert "warning" not in printed.err
    assert store.FeatureBags(tmp_path / "features").names == ["p0", "p1", "p3"]
    # points: the size of a broken image is not compared
    (tmp_path / "photos" / "p0.png").write_bytes(b"")
    write(tmp_path / "points.csv", ["image", "x", "y"], [["p0", 3, 3], ["p3", 3, 3]])
    given = [*command[:-3], str(tmp_path / "at_points"), "--points", str(tmp_path / "points.csv")]
    assert extract_features.main(given) == 1
    printed = capsys.readouterr()
    assert "1 image cannot be read and was left out" in printed.err and "1 of 2 bags, 0 s left" in printed.out
    for path in (tmp_path / "photos").iterdir():
        path.write_bytes(b"no")
    assert extract_features.main([*command[:-3], str(tmp_path / "none")]) == 2
    assert "p0.png" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def tuned(trained, tmp_path_factory):
    """Fine-tuned runs: of one block, and of two blocks of which the first stays frozen."""
    folder = tmp_path_factory.mktemp("tuned")
    assert finetune(trained, folder / "one", *BLOCK) == 0
    options = ["--before", str(trained / "start"), "--blocks", "layer1.0", "layer1.1", "--freeze=1"]
    assert finetune(trained, folder / "two", *options) == 0
    for name in ("one", "two"):
        (folder / name / "failed.json").write_text("{}")  # noise teaches nothing
    return folder


def predict(trained, run, features, before, out, *options):
    command = ["--run", str(run), "--features", str(features), "--out", str(out), *options]
    return predict_features.main([*command, *(["--before", str(before)] if before else [])])


@pytest.mark.parametrize(("name", "before"), [("one", "before"), ("two", "start")])
def test_a_fine_tuned_run_predicts_its_test_bags_again(trained, tuned, tmp_path, name, before):
    run = tuned / name
    assert predict(trained, run, trained / "features", trained / before, tmp_path / "found") == 0
    parts = [runs.load_predictions(run / "parts" / f"repeat{k}_fold0.npz") for k in range(2)]
    found = {row["bag"]: float(row["red"]) for row in read(tmp_path / "found" / "bags.csv")}
    assert len(found) == 6
    np.testing.assert_allclose([found["p4"], found["p5"]], np.mean([p.bags[:, 0] for p in parts], 0), atol=1e-5)
    assert abs(parts[0].bags - parts[1].bags).max() > 1e-4
    cells = [float(row["red"]) for row in read(tmp_path / "found" / "instances.csv") if row["bag"] in ("p4", "p5")]
    np.testing.assert_allclose(cells, np.mean([p.instances[:, 0] for p in parts], 0), atol=1e-5)


def test_a_fine_tuned_training_is_left_out_if_the_one_before_had_failed(trained, tmp_path, capsys):
    base = tmp_path / "run"
    shutil.copytree(trained / "run", base)
    reason = "bag loss 0.90, the median is 0.40"
    (base / "failed.json").write_text(json.dumps({"repeat1_fold0": {"all classes": [reason]}}))
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(base)) == 0
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert failed == {"repeat1_fold0": {"all classes": [f"before fine-tuning: {reason}"]}}
    text = f"in 1 of 2 trainings: seed 1 (before fine-tuning: {reason}). Do not use"
    printed = capsys.readouterr().out
    assert text in printed and "To change this: train the run of --run again with other options" in printed
    assert predict(trained, tmp_path / "out", trained / "features", trained / "before", tmp_path / "found") == 0
    assert "one training of" in capsys.readouterr().out


def test_a_fine_tuned_run_does_not_need_the_run_that_it_continued(trained, tmp_path):
    """The settings of the first run are kept, although that folder then holds another run."""
    base = tmp_path / "run"
    shutil.copytree(trained / "run", base)
    (base / "failed.json").write_text("{}")
    options = [*BLOCK, "--run", str(base), "--repeats=9"]
    assert finetune(trained, tmp_path / "out", *options) == 0
    given = [trained, tmp_path / "out", trained / "features", trained / "before"]
    assert predict(*given, tmp_path / "one") == 0
    content = json.loads((base / "settings.json").read_text())
    changed = content | {"class_names": ["blue"], "pooling": "mean"}
    (base / "settings.json").write_text(json.dumps(changed))
    assert finetune(trained, tmp_path / "out", *options, "--resume") == 2
    shutil.rmtree(base)
    assert predict(*given, tmp_path / "two") == 0
    for name in ("bags.csv", "boxes.csv", "instances.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_fine_tuning_after_principal_components(trained, tmp_path):
    command = ["--features", str(trained / "features"), "--labels", str(trained / "labels.csv"), "--overlays=1"]
    command += ["--epochs=2", "--components=4", "--out", str(tmp_path / "run")]
    assert train_features.main(command) == 0
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(tmp_path / "run"), "--lr=0") == 0
    parts = [runs.load_predictions(tmp_path / name / "parts" / "repeat0_fold0.npz") for name in ("run", "out")]
    np.testing.assert_allclose(parts[0].instances, parts[1].instances, atol=0.01)


def copied(folder, out, change):
    """A copy of a folder of features with the features (L, D) changed: ``change(number, features)``."""
    bags = store.FeatureBags(folder)
    writer = store.StoreWriter(out, bags.settings)
    for number, name in enumerate(bags.names):
        bag = bags[name]
        writer.add(name, bag._replace(features=change(number, bag.features.copy())))
    return out


def test_features_of_other_images_are_errors(trained, tuned, tmp_path, capsys):
    """Each bag is compared, in fine-tuning and in prediction. Features that are not finite are errors, too."""

    def infinite(number, x):
        x[5, 5] = np.inf if number == 3 else x[5, 5]
        return x

    turned = copied(trained / "before", tmp_path / "turned", lambda number, x: x[::-1] if number == 3 else x)
    broken = copied(trained / "before", tmp_path / "broken", infinite)
    for before in (turned, broken):
        assert predict(trained, tuned / "one", trained / "features", before, tmp_path / "found") == 2
        assert "p3 differs: other blocks, other weights, or another image" in capsys.readouterr().err
        assert finetune(trained, tmp_path / "out", *BLOCK, "--before", str(before)) == 2
        assert "p3 differs: other blocks, other weights, or another image" in capsys.readouterr().err
    assert not (tmp_path / "found").exists() and not (tmp_path / "out").exists()

    # not finite in a stage beside the blocks
    def last(number, x):
        x[5, -1] = np.nan if number == 3 else x[5, -1]
        return x

    other = copied(trained / "features", tmp_path / "nan", last)
    assert predict(trained, tuned / "one", other, trained / "before", tmp_path / "found") == 2
    assert "p3: expected finite features" in capsys.readouterr().err


def test_features_that_cannot_be_fine_tuned_are_errors(trained, tmp_path, capsys):
    def message(features, before, *options):
        command = ["--features", str(features), "--labels", str(trained / "labels.csv"), "--overlays=0", "--epochs=1"]
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert train_features.main([*command, "--out", str(out)]) == 0
        assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(out), "--before", str(before), *options) == 2
        return capsys.readouterr().err

    bags = store.FeatureBags(trained / "features")
    (tmp_path / "clam").mkdir()
    for name in bags.names:
        torch.save(torch.from_numpy(bags[name].features), tmp_path / "clam" / f"{name}.pt")
    wanted = f"expected features of extract_features.py, got {tmp_path / 'clam'}"
    assert wanted in message(tmp_path / "clam", trained / "before")
    for name, settings, words in (
        ("symmetric", {"symmetric": True}, "expected features without --symmetric"),
        ("stride", {"output_stride": 8}, "expected the same --output-stride, got 8 in"),
        ("network", {"backbone": "timm/resnet34"}, "expected the same --backbone, got timm/resnet34 in"),
    ):
        writer = store.StoreWriter(tmp_path / name, bags.settings | settings)
        for bag in bags.names:
            writer.add(bag, bags[bag])
        assert words in message(tmp_path / name, trained / "before")
    with pytest.raises(ValueError, match="expected a convolutional network, got timm/test_vit"):
        finetuning.load_blocks("timm/test_vit", "none", ["blocks.1"], None)
    # one file per bag: a file is missing, or was made with other settings
    before = store.FeatureBags(trained / "before")
    for name, extra in (("fewer", []), ("mixed", ["p5"])):
        files = store.FileWriter(tmp_path / name, before.settings)
        for bag in [*before.names[:-1], *extra]:
            files.settings = before.settings | ({"scales": [2.0]} if bag == "p5" else {})
            files.add(bag, before[bag])
    assert "has no bag p5" in message(trained / "features", tmp_path / "fewer")
    assert "p5.h5: made with other settings" in message(trained / "features", tmp_path / "mixed")


def test_a_fine_tuned_run_predicts_images_of_other_sizes(trained, tuned, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "new").mkdir()
    for k, size in enumerate(((64, 48), (96, 80), (40, 100))):
        array = np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(array).save(tmp_path / "new" / f"n{k}.png")
    Image.open(trained / "photos" / "p5.png").save(tmp_path / "new" / "p5.png")
    common = ["--images", str(tmp_path / "new"), "--weights", f"{trained}/weights.pt"]
    assert extract_features.main([*common, "--like", str(tuned / "one"), "--out", str(tmp_path / "features")]) == 0
    printed = capsys.readouterr().out.splitlines()
    needed = ["--like", trained / "before", *common, "--out", "new_before"]
    assert printed[-3] == f"also needed: python extract_features.py {' '.join(map(str, needed))}"
    assert "--before new_before" in printed[-1]
    assert f"--run {tuned / 'one'} " in printed[-1]
    assert extract_features.main([*common, "--like", f"{trained}/before", "--out", str(tmp_path / "new_before")]) == 0
    given = [trained, tuned / "one", tmp_path / "features", tmp_path / "new_before", tmp_path / "found"]
    assert predict(*given, "--images", str(tmp_path / "new")) == 0
    found = {row["bag"]: float(row["red"]) for row in read(tmp_path / "found" / "bags.csv")}
    assert sorted(found) == ["n0", "n1", "n2", "p5"] and len(set(found.values())) == 4
    own = [runs.load_predictions(tuned / "one" / "parts" / f"repeat{k}_fold0.npz").bags[1, 0] for k in range(2)]
    assert found["p5"] == pytest.approx(np.mean(own), abs=1e-4)


def test_wrong_features_before_the_blocks_are_errors(trained, tuned, tmp_path, capsys):
    def message(run, before):
        assert predict(trained, run, trained / "features", before, tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    run = tuned / "one"
    assert f"which needs --before; extract_features.py --like {trained / 'before'} extracts" in message(run, None)
    assert "got {} of train_features.py".format(trained / "run") in message(trained / "run", trained / "before")
    assert f"before: {trained / 'start'} has stages ['maxpool'], and the features in" in message(run, trained / "start")
    settings = store.FeatureBags(trained / "before").settings
    first = store.FeatureBags(trained / "before")["p0"]
    small = store.Bag(np.zeros((6, 64)), None, (2, 3), (48, 64))
    for name, bag, words in (
        ("one", first, "has no bag p1"),
        ("small", small, "maps of one size"),
        ("size", first._replace(size=(47, 64)), "images of (47, 64) and (48, 64) pixels"),
    ):
        store.StoreWriter(tmp_path / name, settings).add("p0", bag)
        assert words in message(run, tmp_path / name)
    copy = tmp_path / "old"
    shutil.copytree(run, copy)
    content = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps({k: v for k, v in content.items() if k != "base"}))
    assert "was made by an older version; fine-tune again" in message(copy, trained / "before")
    (copy / "settings.json").write_text(json.dumps(content))
    (copy / "blocks.pt").unlink()
    assert f"is not finished ({copy / 'blocks.pt'} is missing)" in message(copy, trained / "before")


def test_fine_tuning_needs_images_of_one_size(tmp_path):
    writer = store.StoreWriter(tmp_path, {})
    for name, grid in (("a", (2, 3)), ("b", (3, 2))):
        writer.add(name, store.Bag(np.zeros((6, 4)), None, grid, None))
    bags = store.FeatureBags(tmp_path)
    with pytest.raises(ValueError, match="expected maps of one size"):
        finetuning.MapReader(bags, bags, ["a", "b"], 4, torch.nn.Identity())


@pytest.mark.examples
def test_demonstration_on_blood_smears_runs(timm, tmp_path, monkeypatch, capsys):
    """bccd_demo.py from photos to the figure, with a network without weights and one epoch."""
    from PIL import Image

    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for k in range(6):
        array = np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(array).save(data / "images" / f"p{k}.png")
    boxes = [[f"p{k}.png", ("train", "test")[k // 4], ("RBC", "Platelets")[k % 2], 5, 6, 25, 36] for k in range(6)]
    write(data / "boxes.csv", ["image", "split", "class", "xmin", "ymin", "xmax", "ymax"], boxes)
    monkeypatch.setattr(bccd_demo, "SMALL_OBJECTS", ["--epochs=1"])
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--weights", "none"]
    assert bccd_demo.main(options) == 0
    assert (tmp_path / "out" / "bccd.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "out" / "sgl" / "metrics.json").read_text())["Platelets"]
    assert result["images"] == 1  # p5
