"""Measures forward + backward of SGLLoss on a GPU, compared with losses in plain PyTorch.

    python benchmarks/bench_gpu.py [--quick] [--json FILE]
    python benchmarks/bench_gpu.py --device cpu --smoke      # a test of the script with tiny shapes, no valid times

All losses run in the same process, in turn, in several rounds. A time is the median over the rounds, with their
interquartile range. A ratio is the median of the ratios of the rounds. README.md in this folder describes the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import Packed, bce_all_instances, eager_sgl
from measuring import Loss, commit, draw, figures, ratio, step, timed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sgl_ops import SGLLoss, _fused

OURS, COPY = "sgl_ops", "copy"
# modes in which the baselines are compiled; the fastest one is used
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """(N, C, L) bags. If ``spread`` is not 0, packed rows of N bags with C classes and about L instances."""

    what: str
    shape: tuple[int, int, int]
    spread: float = 0.0

    @property
    def sizes(self) -> list[int]:
        n, _, length = self.shape
        g = torch.Generator().manual_seed(1)
        return (length * (1 + self.spread * (2 * torch.rand(n, generator=g) - 1))).long().tolist()

    @property
    def logits_shape(self) -> tuple[int, ...]:
        return (sum(self.sizes), self.shape[1]) if self.spread else self.shape


# the cases of the targets come first, because the time for compiling is limited
CASES = [
    Case("chest X-ray map", (32, 14, 256)),
    Case("fine map, large batch", (2048, 14, 4096)),
    Case("packed slides", (8, 4, 100_000), spread=0.5),
    Case("fine map", (256, 14, 4096)),
    Case("fine map, small batch", (32, 14, 4096)),
    Case("sound events", (64, 527, 64)),
    Case("MNIST-Bags", (64, 1, 50)),
]
SMOKE_CASES = [Case("tiny map", (3, 2, 16)), Case("tiny packed", (3, 2, 20), spread=0.5)]


class Machine:
    """Measures times, launches and memory of a device. On the CPU only times, to test the script without a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.is_gpu = device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], None], calls: int) -> float:
        """Device time per call, from two events around a batch of calls."""
        if not self.is_gpu:
            return timed(run, calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def host_seconds(self, run: Callable[[], None], calls: int) -> float:
        """Host time to enqueue a call. Few calls are measured, because the host waits if the queue is full."""
        self.wait()
        seconds = timed(run, calls)
        self.wait()
        return seconds

    def launches(self, run: Callable[[], None]) -> int | None:
        if not self.is_gpu:
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            run()
            self.wait()
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events()) or None

    def peak(self, run: Callable[[], None]) -> int | None:
        """Peak memory of a call in bytes, in addition to the memory allocated before it."""
        if not self.is_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def clocks(self) -> str:
        """The current SM clock, memory clock and power."""
        return self._query("clocks.sm,clocks.mem,power.draw") if self.is_gpu else ""

    def about(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"commit": commit(), "torch": torch.__version__, "device": "CPU, nothing to quote"}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(self.device)
            facts |= {
                "device": properties.name,
                "multiprocessors": properties.multi_processor_count,
                "l2_bytes": properties.L2_cache_size,
                "cuda": torch.version.cuda,
                "driver": self._query("driver_version"),
                "largest clocks (SM, memory), power limit": self._query("clocks.max.sm,clocks.max.mem,power.limit"),
                "clocks (SM, memory), power at the start": self.clocks(),
            }
        return facts

    def _query(self, what: str) -> str:
        command = ["nvidia-smi", f"--id={self.device.index or 0}", f"--query-gpu={what}", "--format=csv,noheader"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""


class Problem:
    """A case on the device, and the losses of it as functions of (logits, targets)."""

    def __init__(self, case: Case, dtype: torch.dtype, share: float, device: torch.device):
        logits, self.targets = (t.to(device) for t in draw(case.logits_shape, case.shape[:2], share))
        self.logits = logits.to(dtype).requires_grad_()
        self.copy = torch.empty_like(self.logits, requires_grad=False)
        criterion = SGLLoss()
        if case.spread:
            packed = Packed(case.sizes, device)
            offsets = torch.tensor([0, *case.sizes]).cumsum(0).to(device)
            self.ours: Loss = functools.partial(criterion, offsets=offsets)
            self.reference: Loss = functools.partial(SGLLoss(impl="reference"), offsets=offsets)
            sgl, bce = packed.eager_sgl, packed.bce_all_instances
        else:
            self.ours, self.reference = criterion, SGLLoss(impl="reference")
            sgl, bce = eager_sgl, bce_all_instances
        # half-precision logits are converted to float32, as autocast does: in bfloat16, theta would have two digits
        self.eager: Loss = lambda x, y: sgl(x.float(), y)
        self.bce: Loss = lambda x, y: bce(x.float(), y)

    def step_of(self, loss: Loss) -> Callable[[], None]:
        return functools.partial(step, loss, self.logits, self.targets)

    def step_with_a_ready_gradient(self, loss: Loss) -> Callable[[], None]:
        """A step with a given grad_output. Otherwise backward() creates it with a launch that no loss causes."""
        one = torch.ones((), device=self.logits.device)

        def run() -> None:
            self.logits.grad = None
            loss(self.logits, self.targets).backward(one)

        return run

    def copy_step(self) -> None:
        with torch.no_grad():
            self.copy.copy_(self.logits)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Compiler:
    """Compiles a baseline in every mode and keeps the fastest, while there is time."""

    def __init__(self, machine: Machine, seconds: float, modes: dict[str, dict[str, Any]]):
        self.machine, self.left, self.modes = machine, seconds, modes

    def best(self, loss: Loss, problem: Problem, modes: list[str]) -> tuple[Loss | None, str | None, dict[str, Any]]:
        """(compiled loss, its mode, microseconds or reason of each mode)."""
        found: dict[str, Any] = {}
        compiled: dict[str, Loss] = {}
        for mode in modes:
            if self.left <= 0:
                found[mode] = "not compiled: out of time"
                continue
            start = time.perf_counter()
            try:
                compiled[mode] = torch.compile(loss, dynamic=False, **self.modes[mode])
                run = problem.step_of(compiled[mode])
                for _ in range(4):  # compilation; with graphs: warm-up, recording, replay
                    run()
                calls = calls_for(self.machine, run)
                found[mode] = round(min(self.machine.seconds(run, calls) for _ in range(3)) * 1e6, 1)
            except Exception as error:  # compilers raise many types
                found[mode] = first_line(error)
                compiled.pop(mode, None)
                self.machine.free()
            self.left -= time.perf_counter() - start
        if not compiled:
            return None, None, found
        fastest = min(compiled, key=lambda mode: found[mode])
        return compiled[fastest], fastest, found


def calls_for(machine: Machine, run: Callable[[], None], seconds: float = 4e-3) -> int:
    """The number of calls that take about this time."""
    return max(1, min(200, round(seconds / machine.seconds(run, 3))))


def measure(
    case: Case,
    dtype: torch.dtype,
    share: float,
    machine: Machine,
    rounds: int,
    compiled: dict[str, Any],
    launches: dict[str, int | None] | None,
) -> dict[str, Any]:
    """A row of the table. ``launches``: those of an earlier row of the same shape; None: count them, which is slow."""
    problem = Problem(case, dtype, share, machine.device)
    losses: dict[str, Loss] = {
        OURS: problem.ours,
        "eager": problem.eager,
        "reference": problem.reference,
        "bce": problem.bce,
    }
    for name in ("compiled", "compiled bce"):
        if compiled[name]["loss"] is not None:
            losses[name] = compiled[name]["loss"]
    torch.testing.assert_close(
        problem.ours(problem.logits, problem.targets), problem.eager(problem.logits, problem.targets), rtol=1e-3, atol=0
    )
    failed: dict[str, str] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name, loss in losses.items():
        run = problem.step_of(loss)
        try:
            for _ in range(4):
                run()
            machine.wait()
            steps[name] = run
        except RuntimeError as error:  # out of memory is a RuntimeError
            if name == OURS:
                raise
            failed[name] = first_line(error)
            machine.free()
    steps[COPY] = problem.copy_step
    problem.copy_step()
    if machine.is_gpu:
        for name in (OURS, "eager", "bce"):
            if name not in steps:
                continue
            try:
                steps[f"graph of {name}"] = captured(steps[name])
            except RuntimeError as error:
                if name == OURS:
                    raise
                failed[f"graph of {name}"] = first_line(error)
                machine.free()

    counted, peaks = launches or {}, {}
    gradient = problem.logits.numel() * problem.logits.element_size()
    for name, loss in losses.items():
        if name not in steps:
            continue
        run = problem.step_with_a_ready_gradient(loss)
        run()
        if launches is None:
            counted[name] = machine.launches(run)
        problem.logits.grad = None
        peak = machine.peak(run)
        # a compiled graph has a separate memory pool
        if peak is not None and compiled.get(name, {}).get("mode") != "reduce-overhead":
            peaks[name] = round(peak / gradient, 3)

    calls = {name: calls_for(machine, run) for name, run in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            times[name].append(machine.seconds(run, calls[name]))
            host[name].append(machine.host_seconds(run, min(4, calls[name])))
    medians, spreads = figures(times)
    ours = medians[OURS] * 1e-6
    l2 = torch.cuda.get_device_properties(machine.device).L2_cache_size if machine.is_gpu else 0
    return {
        "what": case.what,
        "shape": case.shape,
        "elements": problem.logits.numel(),
        "dtype": str(dtype).removeprefix("torch."),
        "positives": share,
        "fits_l2": 2 * gradient <= l2,  # logits and gradient
        "median_us": medians,
        "iqr_us": spreads,
        "host_us": figures(host)[0],
        "ratio": {name: ratio(times[name], times[OURS]) for name in steps if name != OURS},
        "ratio_of_graphs": {
            name: ratio(times[name], times[f"graph of {OURS}"])
            for name in steps
            if name.startswith("graph of ") and name != f"graph of {OURS}"
        },
        "in_copies": ratio(times[OURS], times[COPY]),
        "launches": counted,
        "peak_in_gradients": peaks,
        "gb_per_s_of_three_passes": round(3 * gradient / ours / 1e9, 1),
        "compiled_with": {name: {k: v for k, v in c.items() if k != "loss"} for name, c in compiled.items()},
        "failed": failed,
        "clocks": machine.clocks(),
    }


COLUMNS = ["eager", "compiled", "reference", "bce", "compiled bce", COPY]


def print_head() -> None:
    ratios = " ".join(f"{short:>7}" for short in ("eager", "comp.", "ref.", "bce", "bce c.", "copy"))
    print(f"\n{'':16} {'':12} | ours: device and host us, GB/s, launches, memory | times ours, < 1 is faster")
    print(
        f"{'(N, C, L)':>16} {'dtype':>8} {'pos':>3} | {'us':>8} {'iqr':>6} {'host':>6} {'GB/s':>5} {'run':>3} "
        f"{'mem':>6} | {ratios} | as graphs: {'us':>8} {'eager':>7} {'bce':>7}"
    )


def print_row(row: dict[str, Any]) -> None:
    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"

    ratios = " ".join(cell(row["ratio"].get(name), 7, 2) for name in COLUMNS)
    graphs = " ".join(cell(row["ratio_of_graphs"].get(f"graph of {name}"), 7, 2) for name in ("eager", "bce"))
    print(
        f"{row['shape']!s:>16} {row['dtype']:>8} {row['positives']:3.0%} | {row['median_us'][OURS]:8.1f} "
        f"{row['iqr_us'][OURS]:6.1f} {row['host_us'][OURS]:6.1f} {row['gb_per_s_of_three_passes']:5.0f} "
        f"{cell(row['launches'].get(OURS), 3, 0)} {cell(row['peak_in_gradients'].get(OURS), 6, 3)} | {ratios} | "
        f"{'':10} {cell(row['median_us'].get(f'graph of {OURS}'), 8, 1)} {graphs}   {row['what']}",
        flush=True,
    )
    for name, reason in row["failed"].items():
        print(f"{'':16} {name} failed: {reason}")


def print_compiled(compiled: dict[str, Any]) -> None:
    for name, how in compiled.items():
        bad = "".join(f"; {mode}: {found}" for mode, found in how["modes"].items() if isinstance(found, str))
        print(f"{'':16} {name}: {how['mode'] or 'none'}{bad}")


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, the measured values (None: not measured), and whether the targets hold."""

    def found(get: Callable[[dict[str, Any]], float | None], which: Callable[[dict[str, Any]], bool]) -> list[float]:
        values = [get(row) for row in rows if which(row)]
        return [value for value in values if value is not None]

    def large(row: dict[str, Any]) -> bool:
        return row["elements"] >= 64 * 2**20 and row["dtype"] == "float32" and row["positives"] == 0.05

    def small(row: dict[str, Any]) -> bool:
        return tuple(row["shape"]) == (32, 14, 256) and row["dtype"] == "float32"

    # forward saves 12 numbers per pair (bag, class), which is little compared with bags of thousands
    def long(row: dict[str, Any]) -> bool:
        return row["elements"] >= 8 * 2**20

    copies = found(lambda row: row["in_copies"], large)
    memory = found(lambda row: row["peak_in_gradients"].get(OURS), long)
    launches = found(lambda row: row["launches"].get(OURS), small)
    eager = found(lambda row: row["ratio"].get("eager"), small)
    compiled = found(lambda row: row["ratio"].get("compiled"), small)
    table = [
        ("time in copies, >= 64M float32, 5 % positive", copies, 1.7, max),
        ("peak memory in gradients, >= 8M elements", memory, 1.01, max),
        ("launches at (32, 14, 256)", launches, 2, max),
        ("times faster than eager at (32, 14, 256)", eager, 10, min),
        ("times faster than torch.compile there", compiled, 2, min),
    ]
    results = []
    for name, values, bound, worst_of in table:
        worst = worst_of(values) if values else None
        holds = None if worst is None else worst <= bound if worst_of is max else worst >= bound
        results.append(
            {"target": name, "bound": f"{'<=' if worst_of is max else '>='} {bound}", "worst": worst, "holds": holds}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases, few rounds, one mode of torch.compile")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and two rounds: does the script run?")
    parser.add_argument(
        "--compile-seconds", type=float, default=120.0, help="what does not compile in this time together is left out"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("no GPU: torch.cuda.is_available() is False (--device cpu --smoke tries the script without one)")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        if _fused.unavailable(device):
            sys.exit(f"nothing to measure: {_fused.unavailable(device)}")
    elif not args.smoke:
        sys.exit("--device cpu: figures of a CPU are bench_cpu.py's; here it goes with --smoke")
    cases, rounds, modes = CASES, 15, MODES
    if args.quick:
        cases, rounds, modes = CASES[:3], 5, {"default": {}}
    if args.smoke:
        cases, rounds, modes = SMOKE_CASES, 2, {"aot_eager": {"backend": "aot_eager"}}

    machine = Machine(device)
    about = machine.about()
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    started = time.perf_counter()
    compiler = Compiler(machine, args.compile_seconds, modes)
    rows: list[dict[str, Any]] = []
    print_head()
    for case in cases:
        chosen = list(modes)  # the fastest mode for float32 is also used for bfloat16
        for dtype in (torch.float32, torch.bfloat16):
            torch._dynamo.reset()
            problem = Problem(case, dtype, 0.05, device)
            compiled = {}
            contenders = (("compiled", problem.eager, chosen), ("compiled bce", problem.bce, list(modes)[:1]))
            for name, loss, tried in contenders:
                best, mode, found = compiler.best(loss, problem, tried)
                compiled[name] = {"loss": best, "mode": mode, "modes": found}
            if compiled["compiled"]["mode"] is not None:
                chosen = [compiled["compiled"]["mode"]]
            del problem
            print_compiled(compiled)
            launches = None
            for share in (0.05, 0.5):
                rows.append(measure(case, dtype, share, machine, rounds, compiled, launches))
                launches = rows[-1]["launches"]
                print_row(rows[-1])
                machine.free()

    targets = targets_of(rows)
    print("\nTargets")
    for target in targets:
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[target["holds"]]
        print(f"  {target['target']}: {target['bound']}, measured {target['worst']}: {verdict}")
    seconds = round(time.perf_counter() - started)
    clocks = machine.clocks()
    print(f"\n{seconds} s; clocks (SM, memory), power at the end: {clocks or '-'}")
    if args.json:
        about |= {"clocks (SM, memory), power at the end": clocks, "seconds": seconds}
        text = json.dumps({"machine": about, "rounds": rounds, "results": rows, "targets": targets}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
