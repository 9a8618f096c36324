"""examples/features/training.py and heads.py: transform, heads, the start of the training, memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import feature_packages  # noqa: F401
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from features import extraction, store, training, transform
from features.heads import Candidates, Head, PatchNetwork

EXAMPLES = ROOT / "examples"


def test_standardization_and_principal_components():
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1]) + 100
    x = torch.cat([x, x[:, :1] * 2], 1)
    parts = [x[:7], x[7:7], x[7:]]
    plain = transform.fit_transform(parts, 0)(x)
    torch.testing.assert_close(plain.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(plain.std(0), torch.ones(4), atol=1e-2, rtol=0)
    few = transform.fit_transform(parts, 2)(x)
    torch.testing.assert_close(few.T.cov(), torch.eye(2), atol=1e-2, rtol=0)
    # the first feature and its double are one direction, the first component
    assert abs(torch.corrcoef(torch.stack([few[:, 0], x[:, 0]]))[0, 1]) > 0.99
    with pytest.raises(ValueError, match="expected at most the 4 features, got 5"):
        transform.fit_transform(parts, 5)


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


def test_small_network_reads_patches_of_the_image(image_folder):
    image = extraction.read_image(image_folder / "im0.png")
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


def precisions(settings, bag_folder, monkeypatch):
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
    bags = store.FeatureBags(bag_folder / "features")
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
def test_mixed_precision_is_that_of_the_network_in_training(bag_folder, monkeypatch, options):
    settings = training.Settings(epochs=1, amp="bf16", **options)
    with monkeypatch.context() as patched:
        layers, logits = precisions(settings, bag_folder, patched)
    assert torch.bfloat16 in layers and logits == {torch.float32}
    # the layers of attention belong to the loss
    assert (torch.float32 in layers) == (settings.head == "gated")
    with monkeypatch.context() as patched:
        assert precisions(replace(settings, amp=None), bag_folder, patched) == ({torch.float32}, {torch.float32})


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
def test_restarts_find_the_object_from_poor_initial_weights(bag_folder):
    """Max pooling with a linear head: some initial weights never use feature 0, the best of eight do."""
    bags = store.FeatureBags(bag_folder / "features")
    reader = training.BagReader(bags, bags.names, 1e9)
    values = torch.tensor([[float(i % 2)] for i in range(40)])
    settings = training.Settings(
        loss="bag", pooling="max", head="linear", epochs=10, batch_size=8, lr=0.05, share=0.3, trial_epochs=10
    )

    def weights(restarts):
        found = []
        for seed in range(6):
            model = training.train(reader, bags.names, values, replace(settings, restarts=restarts), seed)
            found.append(model["head"].first.weight[0, 0].item())
        return found

    assert min(weights(1)) < 0.5 < min(weights(8))


def test_k_falls_during_the_trials_to_its_final_value(bag_folder):
    bags = store.FeatureBags(bag_folder / "features")
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


def test_lam_stays_zero_for_random_labels(bag_folder):
    bags = store.FeatureBags(bag_folder / "features")
    reader = training.BagReader(bags, bags.names, 1e9)
    values = torch.randint(0, 2, (40, 1), generator=torch.Generator().manual_seed(1)).float()
    history = []
    settings = training.Settings(epochs=3, batch_size=10, lr=1e-5, share=0.3)
    training.train(reader, bags.names, values, settings, 0, history.append)
    assert [row["lam"] for row in history] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("size", "first"), [(10, 2), (20, 3), (40, 1), (2, 2)])
def test_training_auc_is_logged_when_it_covers_all_bags(bag_folder, size, first):
    """It is measured in the steps 0, 5, 10, ...: in the first epoch, over a part of the bags. ``size``: of a batch."""
    bags = store.FeatureBags(bag_folder / "features")
    reader = training.BagReader(bags, bags.names, 1e9)
    values = (torch.arange(40) % 2).float().unsqueeze(1)
    history = []
    training.train(reader, bags.names, values, training.Settings(epochs=4, batch_size=size, lr=1e-5), 0, history.append)
    assert [row["epoch"] for row in history if row["auc"]] == list(range(first, 5))


def test_initial_probability_of_the_head_is_the_prior():
    head = Head(5, 2, 0, 0.0)
    head.start(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), 0.1)
    torch.testing.assert_close(torch.sigmoid(head.first.bias), torch.tensor([0.0625, 0.0125]))


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
