"""Measures forward + backward of SGLLoss on the CPU, compared with losses in plain PyTorch.

    python benchmarks/bench_cpu.py [--quick] [--json FILE]     the table
    python benchmarks/bench_cpu.py --plot FILE.png             a plot of time over bag size
    python benchmarks/bench_cpu.py --where                     the time of a step by operator, torch and Python
    python benchmarks/bench_cpu.py --layouts                   other layouts and dtypes, and a second thread
    python benchmarks/bench_cpu.py --profile DIR               a profile of a training step with SGL and with plain BCE

All losses run in the same process, in turn, in several rounds. A time is the median over the rounds. IQR is their
interquartile range. A ratio is the median of the ratios of the rounds, so that a slow phase of the machine affects all
losses equally. The script warns if the machine was busy before the measurement, and if a row has a wide IQR.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import bce_all_instances, eager_sgl
from measuring import Loss, commit, draw, figures, ratio, step, timed, warn_of_load, warn_of_spread
from training_step import profile_training_step

from sgl_ops import SGLLoss, _fused

CASES = [
    # (N, C, L), fraction of positive labels, use case
    ((32, 14, 256), 0.05, "chest X-ray map"),
    ((32, 14, 4096), 0.05, "fine map"),
    ((32, 14, 4096), 0.5, "fine map"),
    ((64, 527, 64), 0.05, "sound events"),
    ((8, 4, 8192), 0.5, "slides"),
    ((64, 1, 50), 0.5, "MNIST-Bags"),
]

# sizes of the plot, with 5 % positive labels
SIZES = [(32, 14, 4**k) for k in range(2, 8)]


#: Modes in which the baseline is compiled. The fastest one is used.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "cpp_wrapper": {"options": {"cpp_wrapper": True}},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}


def contenders(compiled: Loss | None) -> dict[str, Loss]:
    losses: dict[str, Loss] = {"sgl_ops": SGLLoss(impl="fused"), "eager": eager_sgl, "bce": bce_all_instances}
    return losses if compiled is None else losses | {"compiled": compiled}


def compile_at_best(logits: torch.Tensor, targets: torch.Tensor) -> tuple[Loss, dict[str, float]]:
    """The baseline, compiled in the fastest mode for these tensors, and the microseconds of a step in each mode."""
    torch._dynamo.reset()  # compile for these shapes only
    compiled: dict[str, Loss] = {mode: torch.compile(eager_sgl, dynamic=False, **how) for mode, how in MODES.items()}
    times: dict[str, list[float]] = {mode: [] for mode in compiled}
    for loss in compiled.values():
        for _ in range(5):
            step(loss, logits, targets)
    calls = max(1, 2_000_000 // logits.numel())
    for _ in range(5):
        for mode, loss in compiled.items():
            times[mode].append(timed(lambda loss=loss: step(loss, logits, targets), calls))
    medians, _ = figures(times)
    return compiled[min(medians, key=medians.__getitem__)], medians


def measure(shape: tuple[int, int, int], share: float, rounds: int, compiled: bool) -> dict[str, object]:
    logits, targets = draw(shape, shape[:2], share)
    logits.requires_grad_()
    best, modes = compile_at_best(logits, targets) if compiled else (None, {})
    losses = contenders(best)
    expected = eager_sgl(logits, targets)
    torch.testing.assert_close(losses["sgl_ops"](logits, targets), expected, rtol=1e-4, atol=1e-5)
    calls = {}
    for name, loss in losses.items():
        for _ in range(5):
            step(loss, logits, targets)
        once = timed(lambda loss=loss: step(loss, logits, targets), 3)
        calls[name] = max(1, int(0.02 / once))
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(timed(lambda loss=loss: step(loss, logits, targets), calls[name]))
    medians, spreads = figures(times)
    return {
        "shape": shape,
        "positives": share,
        "median_us": medians,
        "iqr_us": spreads,
        "compiled_us": modes,
        "ratio": {name: ratio(times[name], times["sgl_ops"]) for name in losses if name != "sgl_ops"},
    }


def machine() -> dict[str, object]:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "simd": torch.ops.sgl_ops.cpu_level(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def measure_all(rounds: int, compiled: bool) -> list[dict[str, object]]:
    print(
        f"{'(N, C, L)':>16} {'pos':>5} {'ours us':>9} {'IQR':>7} {'eager':>8} {'compiled':>9} {'bce':>7}   times ours"
    )
    results = []
    for shape, share, what in CASES:
        row = measure(shape, share, rounds, compiled)
        results.append({"what": what, **row})
        ratios, ours = row["ratio"], f"{row['median_us']['sgl_ops']:9.1f} {row['iqr_us']['sgl_ops']:7.1f}"
        compiled_cell = f"{ratios['compiled']:9.2f}" if "compiled" in ratios else f"{'-':>9}"
        cells = f"{ours} {ratios['eager']:8.2f} {compiled_cell} {ratios['bce']:7.2f}"
        print(f"{shape!s:>16} {share:5.0%} {cells}   {what}", flush=True)
        warn_of_spread(row["median_us"], row["iqr_us"], f"{shape}, {share:.0%}")
    return results


class Nothing(torch.autograd.Function):
    """A loss that computes nothing. Its time is the overhead of an autograd function in Python."""

    @staticmethod
    def forward(ctx, logits, total):
        ctx.save_for_backward(logits)
        return total.view_as(total)

    @staticmethod
    def backward(ctx, grad_output):
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits), None


def parts_of_a_step(shape: tuple[int, int, int], share: float) -> dict[str, Callable[[], object]]:
    logits, targets = draw(shape, shape[:2], share)
    leaf = logits.clone().requires_grad_()
    settings = (0.3, 1.0, 0.0, 1, 1.0, False, True, True, 0)
    total, _, saved = _fused._forward(logits, targets, None, None, None, None, *settings)
    loss = SGLLoss(impl="fused")
    return {
        "step": lambda: step(loss, leaf, targets),
        "forward": lambda: _fused._forward(logits, targets, None, None, None, None, *settings),
        "backward": lambda: _fused._backward(total, logits, None, None, None, saved, 0.3, 1, 1.0, True),
        "autograd": lambda: step(lambda x, _: Nothing.apply(x, total), leaf, targets),
    }


def where(rounds: int) -> list[dict[str, object]]:
    """Measures the parts of a step separately, in microseconds. The rest is mostly Python code before the operator."""
    print(f"{'(N, C, L)':>16} {'pos':>5} {'step':>9} {'forward':>9} {'backward':>9} {'autograd':>9} {'rest':>9}   us")
    results = []
    for shape, share, what in CASES:
        parts = parts_of_a_step(shape, share)
        times: dict[str, list[float]] = {name: [] for name in parts}
        calls = max(1, 1_000_000 // math.prod(shape))
        for run in parts.values():
            timed(run, 5)
        for _ in range(rounds):
            for name, run in parts.items():
                times[name].append(timed(run, calls))
        medians, spreads = figures(times)
        warn_of_spread(medians, spreads, f"{shape}, {share:.0%}")
        medians["rest"] = round(medians["step"] - sum(medians[name] for name in ("forward", "backward", "autograd")), 1)
        results.append({"what": what, "shape": shape, "positives": share, "median_us": medians})
        cells = " ".join(f"{value:9.1f}" for value in medians.values())
        print(f"{shape!s:>16} {share:5.0%} {cells}   {what}", flush=True)
    return results


def layouts_of(shape: tuple[int, int, int], share: float) -> dict[str, Callable[[], object]]:
    """A step of the same bags in every layout and dtype."""
    n, c, length = shape
    logits, targets = draw(shape, shape[:2], share)
    loss = SGLLoss(impl="fused")
    mask = torch.rand(n, length, generator=torch.Generator().manual_seed(1)) < 0.9
    calls: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {
        "contiguous": (logits, {}),
        "masked": (logits, {"mask": mask}),
        "packed": (logits.transpose(1, 2).reshape(n * length, c), {"offsets": torch.arange(n + 1) * length}),
        "channels_last": (logits.unsqueeze(-1).contiguous(memory_format=torch.channels_last), {}),
        "bfloat16": (logits.bfloat16(), {}),
        "float16": (logits.half(), {}),
        "float64": (logits.double(), {}),
    }

    def step_of(x: torch.Tensor, options: dict[str, torch.Tensor]) -> Callable[[], object]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        return lambda: step(lambda a, b: loss(a, b, **options), leaf, targets)

    return {name: step_of(*call) for name, call in calls.items()}


def layouts(rounds: int) -> list[dict[str, object]]:
    """ns per instance and class with one thread, and how many times as fast a contiguous step is with all of them."""
    results, threads = [], torch.get_num_threads()
    for shape, share, what in [*CASES[:-1], ((1, 1, 1_000_000), 1.0, "one long bag")]:
        steps = layouts_of(shape, share)
        calls = max(1, 100_000 // math.prod(shape))
        try:
            times: dict[str, list[float]] = {name: [] for name in [*steps, "all threads"]}
            for _ in range(rounds):
                torch.set_num_threads(1)
                for name, run in steps.items():
                    times[name].append(timed(run, calls))
                torch.set_num_threads(threads)
                times["all threads"].append(timed(steps["contiguous"], calls))
        finally:
            torch.set_num_threads(threads)
        medians, spreads = figures(times)
        warn_of_spread(medians, spreads, f"{shape}, {share:.0%}")
        per_instance = {name: round(medians[name] * 1e3 / math.prod(shape), 2) for name in steps}
        speed_up = ratio(times["contiguous"], times["all threads"])
        results.append({"what": what, "shape": shape, "positives": share, "ns": per_instance, "speed_up": speed_up})
        cells = ", ".join(f"{name} {value}" for name, value in per_instance.items())
        print(f"{shape!s:>16} {share:5.0%} {cells} ns; {threads} threads {speed_up} times as fast", flush=True)
    return results


def plot(path: Path, about: dict[str, object], rounds: int, compiled: bool) -> list[dict[str, object]]:
    """Nanoseconds per instance and class against the size of a bag, every contender a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [measure(shape, 0.05, rounds, compiled) for shape in SIZES]
    names = {"eager": "SGL, eager PyTorch", "compiled": "SGL, torch.compile", "bce": "plain BCE", "sgl_ops": "sgl_ops"}
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, label in names.items():
        if name not in results[0]["median_us"]:
            continue
        lengths = [shape[2] for shape in SIZES]
        numbers = [n * c * length for n, c, length in SIZES]
        times = [row["median_us"][name] * 1e3 / number for row, number in zip(results, numbers, strict=True)]
        axes.plot(lengths, times, marker="o", label=label, linewidth=2.5 if name == "sgl_ops" else 1.5)
    axes.set(
        xscale="log", yscale="log", xlabel="instances in a bag (32 bags, 14 classes, 5 % positive)",
        ylabel="ns per instance and class, forward + backward", xticks=lengths, xticklabels=lengths,
    )  # fmt: skip
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{about['cpu']}, {about['threads']} threads, {about['simd']}, torch {about['torch']}", fontsize=8)
    figure.savefig(path, dpi=150)
    print("drawn:", path)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds and no torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="time against the size of a bag, as PNG or SVG")
    parser.add_argument("--where", action="store_true", help="the parts of a step")
    parser.add_argument("--layouts", action="store_true", help="other layouts and dtypes, and a second thread")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="tables and Chrome traces of a training step")
    args = parser.parse_args()
    rounds = 5 if args.quick else 25
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    warn_of_load()
    if args.profile:
        profile_training_step(args.profile)
        return
    if args.where:
        results = where(rounds)
    elif args.layouts:
        results = layouts(rounds)
    elif args.plot:
        results = plot(args.plot, about, rounds, compiled=not args.quick)
    else:
        results = measure_all(rounds, compiled=not args.quick)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": about, "rounds": rounds, "results": results}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
