"""Networks of timm as backbones of train_cxr.py."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from common.import_torchvision import import_torchvision

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)
import_torchvision()
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

import train_cxr as example  # noqa: E402
from images import options as settings  # noqa: E402
from images.checkpoint import load_run  # noqa: E402
from images.initial_head import deviation_of_logits, set_initial_head  # noqa: E402
from images.models import PatchClassifier, load_weights  # noqa: E402
from images.pixels import MEAN, STD, load_image, to_input  # noqa: E402
from images.synthetic_set import write_dataset  # noqa: E402
from images.timm_networks import TimmFeatures, defaults_of  # noqa: E402

SMALL = "timm/test_resnet"  # 0.5 million parameters


def parsed(*options):
    return settings.parse(["--data-dir", "x", "--out", "y", *options])


@pytest.mark.parametrize("stride", [32, 16])
def test_resnet_of_timm_equals_that_of_torchvision(tmp_path, stride):
    """The same weights give the same features on the same grid."""
    theirs = PatchClassifier("resnet18", stride, 2).eval()
    state = {k.removeprefix("features."): v for k, v in theirs.state_dict().items() if not k.startswith("head.")}
    torch.save(state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "resnet18.pth")
    ours = PatchClassifier("timm/resnet18", stride, 2).eval()
    load_weights(ours, "timm/resnet18", str(tmp_path / "resnet18.pth"))
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(images), theirs.features(images), rtol=1e-3, atol=1e-4)
    assert ours.grid == theirs.grid
    assert ours.description(224).startswith(f"stride {stride}, a grid of {224 // stride}x{224 // stride} patches")
    assert ours.field == 435
    warning = "warning: the receptive field of a cell, 435 pixels, exceeds the image of 224x224 pixels"
    assert warning in ours.description(224) and "warning" not in ours.description(448)


def test_cut_network_is_the_first_part_of_the_network():
    whole = timm.create_model("resnet18").eval()
    cut = TimmFeatures("timm/resnet18", 2, 8).eval()
    cut.network.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.layer2(whole.layer1(whole.maxpool(whole.act1(whole.bn1(whole.conv1(x))))))
        torch.testing.assert_close(cut(x), expected)
    assert cut.channels == 128
    assert not any("layer3" in name for name, _ in cut.named_parameters())  # DDP needs a gradient of all parameters
    model = PatchClassifier("timm/resnet18", 8, 2, cut=2)
    assert (model.field, model.grid.step) == (99, 8)


def test_images_are_normalized_as_in_the_training_of_the_network():
    features = TimmFeatures("timm/tf_efficientnet_lite0", 1, 4).eval()
    config = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    assert config.mean != MEAN and config.std != STD
    gray = torch.randint(0, 256, (2, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        (expected,) = features.network((gray.unsqueeze(1) / 255 - mean) / std)
        torch.testing.assert_close(features(to_input(gray)), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_weights_of_a_file_are_loaded(tmp_path):
    network = timm.create_model("test_resnet")
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(state, path)
    model = PatchClassifier(SMALL, 32, 2)
    load_weights(model, SMALL, str(path))
    loaded = model.features.network.state_dict()
    assert all(v.dtype != torch.float16 for v in loaded.values())
    assert torch.equal(loaded["conv1.0.weight" if "conv1.0.weight" in loaded else "conv1.weight"],
                       state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"].float())  # fmt: skip
    with pytest.raises(ValueError, match=r"does not fit timm/resnet18: \d+ of \d+ are missing, e\.g\. \["):
        load_weights(PatchClassifier("timm/resnet18", 32, 2), "timm/resnet18", str(path))
    with pytest.raises(ValueError, match="expected 'none', 'imagenet' or a file"):
        load_weights(model, SMALL, "no.safetensors")
    torch.save({"teacher": network.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match=r"nested\.pt: expected tensors, got (OrderedDict|dict) at teacher"):
        load_weights(model, SMALL, str(tmp_path / "nested.pt"))


def test_imagenet_weights_without_internet_are_an_error(monkeypatch):
    def offline(*arguments, **named):
        raise OSError("no network")

    model = PatchClassifier(SMALL, 32, 2)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ValueError, match=r"timm/test_resnet could not be loaded \(no network\); pass a file: --weights FILE"
    ):
        load_weights(model, SMALL, "imagenet")


def test_settings_come_from_the_network():
    assert defaults_of("timm/tf_efficientnet_lite0", None)[:2] == (32, 224)
    args = parsed("--backbone", "timm/tf_efficientnet_lite0")
    assert (args.output_stride, args.image_size, args.weights) == (32, 256, "imagenet")
    assert settings.crop_side(256, 32) == 224
    args = parsed("--backbone", SMALL, "--cut", "2", "--image-size", "64", "--weights", "none")
    assert (args.output_stride, args.image_size, args.cut) == (8, 64, 2)
    assert settings.config_of(args)["cut"] == 2
    assert parsed("--backbone", "timm/resnet50", "--output-stride", "8").output_stride == 8
    assert parsed("--backbone", "resnet50").image_size == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "timm/no_such_net"], "timm has no model 'no_such_net'"),
        (["--backbone", "timm/"], "expected timm/NAME or one of"),
        (["--backbone", SMALL, "--cut", "9"], "--cut: timm/test_resnet has the stages 0 to 4, got 9"),
        (
            ["--backbone", SMALL, "--cut", "1", "--output-stride", "8"],
            "--output-stride: expected up to 4 at this stage, got 8",
        ),
        (["--backbone", "local33", "--cut", "1"], "--cut: expected a backbone of timm"),
        (["--backbone", "local33", "--freeze", "1"], "--freeze: expected a backbone of timm"),
        (["--backbone", SMALL, "--cut", "1", "--freeze", "3"], "--freeze: expected at most the 2 stages"),
        (["--backbone", SMALL, "--freeze", "-1"], "--freeze: expected a finite number >= 0"),
        (["--backbone", "resnet50", "--output-stride", "4"], "--output-stride: expected 32, 16 or 8, got 4"),
        (["--backbone", SMALL, "--output-stride", "0"], "--output-stride: expected at least 1"),
    ],
)
def test_invalid_options_are_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "frozen", "first", "before"),
    [
        ("tf_efficientnet_lite0", 2, "blocks.2.", ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
        ("resnet18", 1, "layer1.", ("conv1.", "bn1.")),
        ("resnet18", 2, "layer2.", ("conv1.", "bn1.", "layer1.")),
        ("convnext_atto", 1, "stages_1.", ("stem_0.", "stem_1.", "stages_0.")),
    ],
)
def test_frozen_stages_are_the_first_ones(name, frozen, first, before):
    features = TimmFeatures(f"timm/{name}", 2, 8 if name != "convnext_atto" else 16)
    features.freeze(frozen)
    fixed = {key for key, value in features.network.named_parameters() if not value.requires_grad}
    trained = [key for key, value in features.network.named_parameters() if value.requires_grad]
    assert all(key.startswith(before) for key in fixed)
    assert {part for part in before if any(key.startswith(part) for key in fixed)} == set(before)
    assert trained[0].startswith(first) and not any(key.startswith(before) for key in trained)


def test_training_changes_no_frozen_stage(tmp_path):
    """Neither the weights nor the statistics of batch norm. The run can be resumed with the same option only."""
    data, out = tmp_path / "data", tmp_path / "run"
    write_dataset(data, images=24, size=64, seed=2)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    options = [
        "--data-dir", str(data), "--out", str(out), "--allow-missing", "--backbone", SMALL, "--weights",
        str(tmp_path / "weights.pth"), "--cut", "3", "--freeze", "2", "--image-size", "64", "--batch-size", "8",
        "--workers", "0", "--device", "cpu", "--val-fraction", "0.3", "--epochs", "1",
    ]  # fmt: skip
    assert example.main(options) == 0
    start = PatchClassifier(SMALL, 16, 14, 3)
    load_weights(start, SMALL, str(tmp_path / "weights.pth"))
    before, after = start.state_dict(), load_run(out, "cpu")[0].state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    early = {key for key in before if key.startswith("features.network.") and "layer" not in key}
    early |= {key for key in before if key.startswith("features.network.layer1.")}
    assert early <= same
    assert not any("running" in key or "weight" in key for key in same - early)
    assert example.main([*options[:-1], "2", "--resume", "--freeze", "1"]) == 2


def test_network_that_cannot_be_dilated_is_an_error():
    with pytest.raises(ValueError, match="cannot have an output stride of 8"):
        TimmFeatures("timm/vgg11", None, 8)


def test_run_with_a_network_of_timm(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    write_dataset(data, images=24, size=64, seed=2)
    options = [
        "--data-dir", str(data), "--out", str(out), "--allow-missing", "--backbone", SMALL, "--weights", "none",
        "--cut", "2", "--image-size", "64", "--batch-size", "8", "--workers", "0", "--device", "cpu",
        "--val-fraction", "0.3",
    ]  # fmt: skip
    assert example.main([*options, "--epochs", "1"]) == 0
    assert "stride 8, a grid of 8x8 patches, receptive field of a patch: " in capsys.readouterr().out
    model, config = load_run(out, "cpu")
    assert config["cut"] == 2
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 14, 8, 8)
    assert example.main([*options, "--epochs", "2", "--resume"]) == 0
    changed = [*options, "--epochs", "3", "--resume"]
    changed[changed.index("--cut") + 1] = "1"
    assert example.main(changed) == 2
    assert "was trained with another" in capsys.readouterr().err
    # another run starts from the weights of this run
    second = PatchClassifier(SMALL, 8, 14, cut=2)
    load_weights(second, SMALL, str(out / "last.pt"))


def test_real_weights(data_dir):
    path = data_dir / "backbones" / "tf_efficientnet_lite0.fp16.safetensors"
    if not path.exists():
        pytest.skip(f"no {path}")
    model = PatchClassifier("timm/tf_efficientnet_lite0", 32, 14).eval()
    load_weights(model, "timm/tf_efficientnet_lite0", str(path))
    stem = safetensors.load_file(path)["conv_stem.weight"].float()
    assert torch.equal(model.features.network.conv_stem.weight, stem)
    assert model.grid == (31.5, 32)  # with the padding of TensorFlow, the cells lie further from the upper left edge


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_initial_probabilities_of_a_pretrained_network_are_near_the_prior(data_dir, stage):
    """The features of the early stages of this network are large: without scaling, the logits deviate by 3 to 4."""
    weights = data_dir / "backbones" / "tf_efficientnet_lite0.fp16.safetensors"
    paths = sorted((data_dir / "chestxray14_256" / "images").rglob("*.png"))[:4]
    if not weights.is_file() or not paths:
        pytest.skip("SGL_OPS_DATA has no backbones or no chest films")
    name = "timm/tf_efficientnet_lite0"
    torch.manual_seed(0)
    model = PatchClassifier(name, defaults_of(name, stage).stride, 14, stage).eval()
    load_weights(model, name, str(weights))
    images = to_input(torch.stack([torch.from_numpy(load_image(path, 256, 3)) for path in paths]))
    with torch.no_grad():
        assert (model(images) - model.head.bias.view(-1, 1, 1)).std() > 3
        set_initial_head(model, 0.05)
        logits = model(images)
    assert (logits - model.head.bias.view(-1, 1, 1)).std() < 1.3
    assert 0.02 < torch.sigmoid(logits).median() < 0.12  # 0.05 plus the same features


def test_initial_head_changes_only_large_weights():
    torch.manual_seed(0)
    model = PatchClassifier(SMALL, 32, 3).train()
    weight, bias = (parameter.detach().clone() for parameter in (model.head.weight, model.head.bias))
    buffers = [buffer.clone() for buffer in model.buffers()]
    before = torch.get_rng_state()
    assert deviation_of_logits(model) < 1
    set_initial_head(model, 0.5)
    assert torch.equal(model.head.weight, weight) and torch.equal(model.head.bias, bias)
    with torch.no_grad():
        model.head.weight.mul_(1000)
    assert deviation_of_logits(model) > 1
    set_initial_head(model, 0.2)
    assert deviation_of_logits(model) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(model.head.bias, bias + math.log(0.25))
    # the direction of the weights, the statistics of batch norm, the mode and the random numbers do not change
    ratio = model.head.weight / weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))
    assert all(torch.equal(one, other) for one, other in zip(buffers, model.buffers(), strict=True))
    assert model.training and torch.equal(before, torch.get_rng_state())
