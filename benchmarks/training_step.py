"""Profiles a training step with the Self-Guiding Loss and with plain BCE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from baselines import bce_all_instances
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from sgl_ops import SGLLoss

CLASSES = 14


def small_network() -> nn.Module:
    """A fully convolutional network, from 64 x 64 pixels to a map of 16 x 16 logits per class."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, CLASSES, 1),
    )  # fmt: skip


def profile_training_step(folder: Path, steps: int = 20) -> None:
    """Prints a table of the operators for each loss. Writes it into ``folder``, with a trace for chrome://tracing."""
    folder.mkdir(parents=True, exist_ok=True)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sgl": SGLLoss(),
        "bce": lambda logits, targets: bce_all_instances(logits.flatten(2), targets),
    }
    for name, loss in losses.items():
        torch.manual_seed(0)
        network = small_network()
        optimizer = torch.optim.Adam(network.parameters())
        images, labels = torch.randn(32, 1, 64, 64), (torch.rand(32, CLASSES) < 0.05).float()

        def train(loss=loss, network=network, optimizer=optimizer, images=images, labels=labels) -> None:
            with record_function("network, forward"):
                logits = network(images)
            with record_function("loss, forward"):
                value = loss(logits, labels)
            with record_function("backward"):
                value.backward()
            with record_function("optimizer"):
                optimizer.step()
                optimizer.zero_grad()

        for _ in range(5):
            train()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                train()
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        profiler.export_chrome_trace(str(folder / f"{name}.json"))
        print(f"{steps} training steps with {name}, the map of a 64 x 64 image; {folder / name}.txt and .json\n{table}")
