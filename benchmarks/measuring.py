"""What the benchmarks share: the inputs, a step, and how times become figures."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def draw(shape: tuple[int, ...], bags_and_classes: tuple[int, int], share: float) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which the given share is positive, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).mul_(2)
    targets = (torch.rand(bags_and_classes, generator=generator) < share).float()
    targets[0, 0] = 1.0  # at least one positive bag-class, whatever the share
    return logits, targets


def step(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    logits.grad = None
    loss(logits, targets).backward()


def timed(run: Callable[[], None], calls: int) -> float:
    """Seconds of wall clock per call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def figures(times: Mapping[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """(median, interquartile range) of every contender, in microseconds."""
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return (
        {name: round(statistics.median(values) * 1e6, 1) for name, values in times.items()},
        {name: round((q[2] - q[0]) * 1e6, 1) for name, q in quartiles.items()},
    )


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' ratios, so that a slow phase of the machine strikes both alike."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 2)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
