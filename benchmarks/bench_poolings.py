"""Forward + backward of BagLoss for each pooling, beside its reference and beside the formula as people write it.

    python benchmarks/bench_poolings.py [--rounds N] [--threads N] [--poolings NAME ...] [--shapes N,C,L ...]

The three run in turn, round after round. The first step of each turn is not timed: the contender before it has left
the caches in a different state. A time is the median over the rounds. A ratio is the median of the ratios within a
round. Times are wall clock; they mean nothing on a busy machine, and the script warns of one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from measuring import Loss, commit, draw, step, warn_of_load
from torch import Tensor

from sgl_ops import BagLoss
from sgl_ops.pooling import POOLINGS

#: The rows of bench_cpu.py, and a map of a chest X-ray at 1024 pixels.
SHAPES = [(16, 14, 1024), (32, 14, 256), (32, 14, 4096), (64, 527, 64), (8, 4, 8192), (64, 1, 50)]


def _of_probability(pool: Callable[[Tensor], Tensor]) -> Loss:
    """BCE of a pooled probability. Rounding may take it above 1, which binary_cross_entropy refuses."""
    return lambda x, y: F.binary_cross_entropy(pool(x.sigmoid()).clamp(0.0, 1.0), y)


#: No masks, no unknown labels, and infinite where a probability rounds to 0 or 1.
NAIVE: dict[str, Loss] = {
    "max": lambda x, y: F.binary_cross_entropy_with_logits(x.amax(-1), y),
    "mean": _of_probability(lambda p: p.mean(-1)),
    "mean_logits": lambda x, y: F.binary_cross_entropy_with_logits(x.mean(-1), y),
    "softmax": _of_probability(lambda p: (p * p.softmax(-1)).sum(-1)),
    "linear_softmax": _of_probability(lambda p: (p * p).sum(-1) / p.sum(-1)),
    "topk": _of_probability(lambda p: p.topk(min(8, p.shape[-1]), -1).values.mean(-1)),
    "lse": _of_probability(lambda p: (10 * p).exp().mean(-1).log() / 10),
    "noisy_or": _of_probability(lambda p: 1 - (1 - p).prod(-1)),
    "generalized_mean": _of_probability(lambda p: p.pow(1.0).mean(-1).pow(1.0)),
}


def measure(name: str, shape: tuple[int, int, int], rounds: int) -> tuple[float, dict[str, float]]:
    """(our median time in microseconds, the median ratio to ours of each contender)."""
    logits, targets = draw(shape, shape[:2], 0.3)
    logits.requires_grad_()
    losses: dict[str, Loss] = {
        "ours": BagLoss(name, impl="fused"),
        "naive": NAIVE[name],
        "reference": BagLoss(name, impl="reference"),
    }
    times: dict[str, list[float]] = {contender: [] for contender in losses}
    calls = min(60, max(1, 200_000 // logits.numel()))
    for _ in range(rounds):
        for contender, loss in losses.items():
            step(loss, logits, targets)
            start = time.perf_counter()
            for _ in range(calls):
                step(loss, logits, targets)
            times[contender].append((time.perf_counter() - start) / calls)
    ours = times.pop("ours")
    ratios = {
        contender: median(theirs / own for theirs, own in zip(values, ours, strict=True))
        for contender, values in times.items()
    }
    return median(ours) * 1e6, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--poolings", nargs="+", choices=list(POOLINGS), default=list(POOLINGS))
    parser.add_argument("--shapes", nargs="+", help="N,C,L")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, text.split(","))) for text in options.shapes] if options.shapes else SHAPES
    level = torch.ops.sgl_ops.cpu_level()
    print(f"torch {torch.__version__}, {options.threads} thread(s), {level}, commit {commit()}")
    warn_of_load()
    print("| pooling | (N, C, L) | ours, us | naive / ours | reference / ours |\n|---|---|---|---|---|")
    for name in options.poolings:
        for shape in shapes:
            ours, ratios = measure(name, shape, options.rounds)
            print(f"| {name} | {shape} | {ours:.0f} | {ratios['naive']:.2f} | {ratios['reference']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
