"""Functions that the benchmarks share: inputs, a step, and statistics of the measured times."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def draw(shape: tuple[int, ...], bags_and_classes: tuple[int, int], share: float) -> tuple[Tensor, Tensor]:
    """Logits and targets with the given fraction of positive labels, equal in every run."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).mul_(2)
    targets = (torch.rand(bags_and_classes, generator=generator) < share).float()
    targets[0, 0] = 1.0  # at least one positive (bag, class) pair
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
    """(median, interquartile range) of every loss, in microseconds."""
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return (
        {name: round(statistics.median(values) * 1e6, 1) for name, values in times.items()},
        {name: round((q[2] - q[0]) * 1e6, 1) for name, q in quartiles.items()},
    )


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of the rounds, so that a slow phase of the machine affects both equally."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 2)


#: Limits of the load average per core and of IQR / median. Above them, the times are unreliable.
BUSY_LOAD, WIDE_SPREAD = 0.3, 0.1


def warn_of_load() -> None:
    """Prints a warning if other processes used this machine in the last minute. Call it before the measurement."""
    if not hasattr(os, "getloadavg"):  # Windows
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY_LOAD * cores:
        print(f"warning: the machine is busy: load average {load:.1f} on {cores} cores before the measurement")


def warn_of_spread(medians: Mapping[str, float], spreads: Mapping[str, float], name: str) -> None:
    """Prints a warning if the times of a loss in the row ``name`` vary widely. The values are those of ``figures``."""
    wide = [f"{key} {spreads[key] / medians[key]:.0%}" for key in medians if spreads[key] > WIDE_SPREAD * medians[key]]
    if wide:
        print(f"warning: {name}: wide interquartile range, relative to the median: {', '.join(wide)}", flush=True)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
