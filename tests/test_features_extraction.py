"""examples/extract_features.py: features of images and of patches around points."""

from __future__ import annotations

import os
import shutil

import extract_features
import feature_packages  # noqa: F401
import numpy as np
import pytest
import torch
from csv_files import write
from feature_runs import NETWORK, change
from features import backbones, extraction, store
from torch import nn


@pytest.mark.parametrize("form", ["store", "h5"])
def test_extraction_continues_and_both_forms_hold_equal_features(timm, image_folder, tmp_path, form, capsys):
    torch.manual_seed(0)
    out = tmp_path / form
    options = ["--images", str(image_folder), "--out", str(out), "--format", form, *NETWORK]
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
    timm, image_folder, tmp_path, options, sees, warns, capsys
):
    options = ("--images", str(image_folder), "--out", str(tmp_path), *NETWORK[:4], *options)
    assert extract_features.main(list(options)) == 0
    printed = capsys.readouterr().out
    assert sees in printed
    text = "warning: the receptive field of a cell, 99 pixels, exceeds the image of 64x48 pixels"
    assert (text in printed) == warns == ("--list-stages prints the stages for --cut" in printed)


def test_store_with_other_settings_is_an_error(timm, image_folder, tmp_path, capsys):
    options = ["--images", str(image_folder), "--out", str(tmp_path / "s")]
    assert extract_features.main([*options, *NETWORK]) == 0
    assert extract_features.main([*options, *NETWORK, "--symmetric"]) == 2
    assert "made with other settings (symmetric" in capsys.readouterr().err


def test_folder_of_h5_with_other_settings_is_an_error(timm, image_folder, tmp_path, capsys):
    import h5py

    options = ["--images", str(image_folder), "--out", str(tmp_path / "s"), "--format=h5"]
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
        ("--points=p.csv --patch=9 --scales 2", "--patch: expected without --scales"),
        ("--points=p.csv --patch=9 --backbone=pixels --symmetric", "--backbone pixels: expected without --symmetric"),
        ("--points=p.csv --patch=9 --backbone=pixels --weights=w.pt", "--backbone pixels: expected without --weights"),
    ],
)
def test_errors_of_options_of_the_extraction(image_folder, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        extract_features.main(["--images", str(image_folder), "--out", str(tmp_path), *words.split()])
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
def test_features_at_other_points_are_not_continued(timm, image_folder, tmp_path, options, capsys):
    points = shutil.copy(image_folder / "points.csv", tmp_path / "points.csv")
    options = ["--images", str(image_folder), "--points", str(points), "--out", str(tmp_path / "s"), *options]
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


def test_features_at_cell_centres_are_those_of_the_cells(timm, image_folder):
    """The features at the centre of a cell are those of the cell."""
    backbone = backbones.load_backbone("resnet18", weights="none", cut="layer1")
    image = extraction.read_image(image_folder / "im0.png")
    whole = extraction.map_bag(backbone, backbone.geometry, image, (1.0,), False)
    points = whole.coords[[0, 17, 100]]
    found = extraction.point_bag(backbone, backbone.geometry, image, points, (1.0,), False)
    np.testing.assert_allclose(found.features, whole.features[[0, 17, 100]], rtol=1e-4, atol=1e-5)
    assert extraction.read_points(image_folder / "points.csv", ["im0", "im1"])["im1"].tolist() == [[20, 10], [30, 15]]


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
def test_points_far_outside_of_their_image_are_an_error(image_folder, tmp_path, first, capsys):
    """One pixel beyond the image is allowed."""
    table, out = tmp_path / "points.csv", tmp_path / "out"
    options = ["--images", str(image_folder), "--points", str(table), "--backbone", "pixels", "--patch", "8"]
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


def test_symmetric_features_rotate_with_the_image(timm, image_folder):
    backbone = backbones.load_backbone("resnet18", weights="none", cut="layer1")
    image = extraction.read_image(image_folder / "im0.png")
    maps = extraction.map_of(backbone, image, (1.0,), True)
    turned = extraction.map_of(backbone, image.rot90(1, (2, 3)), (1.0,), True)
    torch.testing.assert_close(maps.rot90(1, (1, 2)), turned, rtol=1e-4, atol=1e-5)


def test_patch_features_are_those_around_the_point(image_folder):
    class Mean(nn.Module):
        size = 8

        def forward(self, x):
            return x.mean((2, 3), keepdim=True)

    image = torch.zeros(1, 3, 40, 40)
    image[:, :, 10:18, 20:28] = 1
    bag = extraction.patch_bag(Mean(), image, np.array([[24.5, 14.5], [24.5, 10.5], [4.0, 30.0]]), 8, False)
    np.testing.assert_allclose(bag.features[:, 0], [1, 0.5, 0], atol=1e-6)


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
