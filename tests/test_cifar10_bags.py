"""The CIFAR10-Bags example: network, settings, running, resuming and reading the pictures."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
import train_cifar10_bags as example
from bags import experiment, instances, networks, training

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")

SMALL = [
    "--data", "digits", "--bags", "4", "--val-bags", "4", "--test-bags", "6", "--bag-size", "4", "--positives", "2",
    "--batch-size", "2", "--stem", "imagenet", "--device", "cpu",
]  # fmt: skip


def test_defaults_are_the_settings_of_the_paper():
    (sgl, most) = example.configs_of(example.parse([])).values()
    expected = {
        "bags": 2500, "test_bags": 5000, "bag_size": 50, "bag_std": 0, "batch_size": 64, "epochs": 50, "lr": 1e-4,
        "weight_decay": 1e-4, "delta_l": 0.3, "lam": 1, "target": 5, "pooling": "max", "loss": "sgl",
    }  # fmt: skip
    assert {name: sgl[name] for name in expected} == expected
    assert {name: most[name] for name in sgl if most[name] != sgl[name]} == {"loss": "bag"}
    assert example.parse([]).runs == 5


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8)])
def test_network_has_the_shapes_of_the_stem(stem, side):
    sizes = []
    for channels in (1, 3):
        model = networks.ResNet18(channels, stem).eval()
        model.network.layer1.register_forward_hook(lambda m, x, y: sizes.append(y.shape[-1]))
        with torch.inference_mode():
            assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 1)
    assert sizes == [side, side]
    assert 11e6 < sum(p.numel() for p in model.parameters()) < 11.3e6
    low = networks.ResNet18(3, stem, bf16=True).eval()
    low.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert low(x).dtype == torch.float32
        torch.testing.assert_close(low(x), model(x), rtol=0.1, atol=0.1)
        assert not torch.equal(low(x), model(x))


def test_network_computes_the_whole_batch_at_once():
    """Batch normalization of parts of a batch would use other means and deviations than a GPU does."""
    model = networks.ResNet18(1, "imagenet")
    images = torch.randn(300, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(images).reshape(-1)
    torch.testing.assert_close(training.forward(model, images, torch.arange(300)), expected)
    model.eval()
    torch.testing.assert_close(
        training.forward(model, images, torch.arange(300)), model(images).reshape(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.examples
def test_run_resumes_to_the_same_result(tmp_path, monkeypatch):
    options = [*SMALL, "--loss", "sgl", "--runs", "1", "--epochs", "2"]
    assert example.main([*options, "--out", str(tmp_path / "whole")]) == 0
    expected = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    epochs = []

    def interrupted(*arguments, train_epoch=training.train_epoch):
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupted)
        assert example.main([*options, "--out", str(tmp_path / "cut")]) == 130
    assert example.main([*options, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["runs"] == expected["runs"]
    assert (tmp_path / "whole" / "bags.png").read_bytes().startswith(b"\x89PNG")
    assert example.main([*options, "--out", str(tmp_path / "cut"), "--resume", "--bf16"]) == 2


def test_pictures_keep_their_colours():
    picture = torch.zeros(1, 3, 2, 2)
    picture[0, 0], picture[0, 2] = 1.0, 0.5
    assert experiment.pictures_of(picture)[0, 0, 0].tolist() == [1.0, 0.0, 0.5]


@pytest.mark.examples
def test_real_cifar10_is_read(data_dir, tmp_path):
    """Reads the file of real pictures. The bags contain the requested number of dogs."""
    import subprocess
    import sys

    script = data_dir / "cifar10" / "build_npz.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    pytest.importorskip("PIL")
    subprocess.run([sys.executable, script, tmp_path / "cifar10.npz"], check=True, capture_output=True)
    data = instances.load_instances(str(tmp_path / "cifar10.npz"), "")
    assert data.train_images.shape == (50000, 3, 32, 32)
    assert np.bincount(data.train_classes).tolist() == [5000] * 10
    config = example.configs_of(example.parse(["--bags", "20", "--test-bags", "10", "--positives", "7"]))["sgl"]
    _, bags = experiment.bags_of(data, config, 0, "cpu")
    per_bag = bags["train"].positive.reshape(20, 50).sum(1)
    assert torch.equal(per_bag, 7 * bags["train"].labels.long())
    classes = data.train_classes[bags["train"].index.numpy()]
    assert ((classes == 5) == bags["train"].positive.numpy()).all()
