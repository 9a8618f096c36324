"""examples/recipe.py and docs/recipe.md: from a classifier to boxes."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from common.import_torchvision import import_torchvision
from conftest import ROOT

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)
import_torchvision()
timm = pytest.importorskip("timm")

import recipe as example  # noqa: E402
from images import recipe_steps as recipe  # noqa: E402

import sgl_ops  # noqa: E402


@pytest.mark.parametrize(
    "name", ["timm/resnet18", "timm/tf_efficientnet_lite0", "torchvision/resnet18", "torchvision/mobilenet_v2"]
)
def test_mean_of_the_map_is_the_logit_of_the_classifier(name):
    classifier = recipe.make_classifier(name, 3, None, None).eval()
    images = torch.randn(2, 3, 96, 64)
    model = recipe.FullyConvolutional(classifier, images)
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape[:2] == (2, 3) and logits.shape[2] > 1
        torch.testing.assert_close(logits.mean((2, 3)), classifier(images), rtol=1e-3, atol=1e-4)


def test_densenet_and_cut_network_become_fully_convolutional():
    images = torch.randn(2, 3, 64, 64)
    for classifier in (
        recipe.make_classifier("torchvision/densenet121", 2, None, None),
        recipe.make_classifier("timm/resnet18", 2, None, 1),
    ):
        model = recipe.FullyConvolutional(classifier, images).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images).mean((2, 3)), classifier.eval()(images), rtol=1e-3, atol=1e-4)


def test_classifier_with_other_last_layers_is_an_error():
    classifier = timm.create_model("resnet18", num_classes=2, global_pool="max")
    with pytest.raises(ValueError, match="classifier: the mean of its map differs from its output by"):
        recipe.FullyConvolutional(classifier, torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="expected one of timm or torchvision, got Sequential"):
        recipe.features_of(torch.nn.Sequential(torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="backbone: expected timm/NAME"):
        recipe.make_classifier("resnet18", 2, None, None)


def test_weights_that_do_not_fit_are_errors(tmp_path, capsys):
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    path = tmp_path / "w.pth"
    for content in (state, {"state_dict": state}, {"model": state}):
        torch.save(content, path)
        for cut in (None, 0):
            loaded = recipe.make_classifier("timm/test_resnet", 2, path, cut).state_dict()
            prefix = "" if cut is None else "features.0."
            assert torch.equal(loaded[f"{prefix}conv1.0.weight"], state["conv1.0.weight"])
    torch.save({f"module.{key}": value for key, value in state.items()}, path)
    for options, message in (
        (["--weights", str(path)], "does not fit timm/test_resnet: "),
        (["--weights", str(tmp_path / "absent.pth")], "there is no file"),
        (["--backbone", "timm/rensett18", "--cut", "-1"], "backbone: timm/rensett18 could not be created"),
    ):
        assert example.main(options) == 2
        assert message in capsys.readouterr().err


def test_script_runs(capsys):
    assert example.main(["--images", "32", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("share of boxes with IoU > 0.1, 0.3, 0.5:") == 2
    assert out.count("class  positive bags") == 2


def test_boxes_of_generated_images_contain_the_square():
    images, labels, boxes = recipe.generated_images(20, 0)
    assert labels.sum() == 10
    for image, label, (x, y, w, h) in zip(images, labels, boxes.int().tolist(), strict=True):
        if label:  # the grating: columns two pixels apart differ by 2
            square = image[0, y : y + h, x : x + w]
            assert (square[:, :-2] - square[:, 2:]).abs().mean() > 1.5
        else:
            assert (w, h) == (0, 0)


def test_code_of_the_recipe_page_runs(capsys):
    """The code blocks of docs/recipe.md, in their order."""
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(24).remainder(2).reshape(8, 3).float()
    names = {
        "timm": timm, "torch": torch, "sgl_ops": sgl_ops, "images": images, "all_labels": labels, "epochs": 1,
        "validation_images": images, "validation_labels": labels, "loader": [(images, labels)],
        **{n: getattr(sgl_ops, n) for n in ("SGLLoss", "LamSchedule", "prior_bias")},
    }  # fmt: skip
    page = (ROOT / "docs" / "recipe.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    assert names["logits"].shape == (8, 3, 2, 2)
    assert names["box"].shape == (4,)
    assert names["resnet"](images).shape == (8, 3, 2, 2)
    assert names["cut_model"](images).shape == (8, 3, 8, 8)
    assert "bag AUC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "cut", "stride"), [("timm/test_resnet", 0, 2), ("timm/test_resnet", 1, 4), ("timm/resnet18", None, 32)]
)
def test_first_cell_of_a_resnet_is_at_pixel_one_half(name, cut, stride):
    torch.manual_seed(0)
    model = recipe.FullyConvolutional(recipe.make_classifier(name, 1, None, cut), torch.randn(1, 3, 96, 96))
    assert recipe.first_cell(model, 96) == pytest.approx(0.5 / stride, abs=0.1)


def test_boxes_follow_the_first_cell():
    logits = torch.full((1, 8, 8), -5.0)
    logits[0, 3:5, 3:5] = 5.0
    default = recipe.boxes_of(logits, (96, 96), 0.5)
    assert recipe.boxes_of(logits, (96, 96), 0.0).tolist() == (default - [6, 6, 0, 0]).tolist()  # half of 12 pixels
