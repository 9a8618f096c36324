"""Instructions and memory sectors of the CUDA kernels per element, counted on interpreted machine code without a GPU.

    python benchmarks/bench_device_code.py                          # the cases of device_code_counts.json
    python benchmarks/bench_device_code.py --shape 32x14x256 --positives 0.05 --dtype bfloat16 --pooling softmax
    python benchmarks/bench_device_code.py --shape 8x25000x4 --packed   # bags x instances x classes
    python benchmarks/bench_device_code.py --update                 # writes device_code_counts.json

These are counts and a model, not times. The model divides the counts by peak rates: a real kernel is slower, by what
latency, caches and uneven work cost. It needs nvcc and ``pip install nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests" / "device_code"
COUNTS = HERE / "device_code_counts.json"
sys.path.append(str(TESTS))
import build_device_code  # noqa: E402

#: Lane instructions per clock and multiprocessor of the pipes that are alike on the GPUs below.
PIPES = {"fp32": 128, "alu": 64, "imad": 64, "mufu": 16, "shuffle": 32}
#: Of a multiprocessor. Each issues one instruction of a warp per clock, and has a quarter of each pipe.
SCHEDULERS = 4


@dataclass(frozen=True)
class GPU:
    """Peak rates. Lane instructions are per clock and multiprocessor, as the CUDA programming guide lists them."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    fp64: float
    convert: float


GPUS = [
    GPU("H100", 132, 1.7e9, 3.35e12, 64, 16),
    GPU("H200", 132, 1.7e9, 4.8e12, 64, 16),
    GPU("RTX 4090", 128, 2.52e9, 1.01e12, 2, 2),  # 128 x 128 x 2 x 2.52 GHz = 82.6 TFLOP/s; double at 1/64
]


@dataclass(frozen=True)
class Case:
    """``shape`` is (N, C, L). ``multiprocessors`` scales the GPU with a batch that is a part of a larger one."""

    shape: tuple[int, int, int]
    positives: float
    packed: bool = False
    dtype: str = "float32"
    multiprocessors: int = 132
    architecture: str = "90"
    settings: dict[str, Any] = field(default_factory=dict)
    profile: str | None = None

    @property
    def name(self) -> str:
        bags, classes, length = self.shape
        shape = f"packed {bags} x {length} x {classes}" if self.packed else f"({bags}, {classes}, {length})"
        settings = "".join(f" {value}" for value in self.settings.values())
        return (
            f"{shape} {self.dtype} {self.positives:.0%}{settings}, sm_{self.architecture}, {self.multiprocessors} SMs"
        )


#: What device_code_counts.json keeps, small enough for a test. The first stands for any large map.
CASES = [
    Case((20, 14, 4096), 0.05, multiprocessors=2),
    Case((20, 14, 4096), 0.5, multiprocessors=2),
    Case((20, 14, 4096), 0.05, multiprocessors=2, dtype="bfloat16"),
    Case((8, 14, 4096), 0.05, multiprocessors=33),
    Case((32, 14, 256), 0.05),
    Case((64, 14, 256), 0.05, multiprocessors=16),
    Case((8, 527, 64), 0.05, multiprocessors=16),
    Case((256, 14, 49), 0.05),
    Case((2, 4, 25000), 0.05, packed=True, multiprocessors=33),
]


def measure(case: Case, code: build_device_code.DeviceCode | None = None) -> dict[str, Any]:
    """Counts per element of forward and backward, as tests/device_code/measure.py gives them."""
    code = code or build_device_code.build([case.architecture], two_types=case.dtype in ("float32", "bfloat16"))
    result = code.run(TESTS / "measure.py", json.dumps(asdict(case)), guarded=False)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return json.loads(result.stdout)


def sectors(count: dict[str, float]) -> float:
    """Sectors asked for, in units of those that the bytes would fill."""
    return count["sectors"] / count["ideal"] if count["ideal"] else 0.0


def kept(counts: dict[str, Any]) -> dict[str, float]:
    """The numbers of a case that device_code_counts.json keeps."""
    forward, backward = counts["forward"], counts["backward"]
    return {
        "forward": round(forward["issued"], 2),
        "backward": round(backward["issued"], 2),
        "forward_fp64": round(forward["by_class"]["fp64"], 2),
        "forward_load_sectors": round(sectors(forward["loads"]), 3),
        "load_sectors": round(sectors(backward["loads"]), 3),
        "store_sectors": round(sectors(backward["stores"]), 3),
    }


def risen(before: dict[str, float], now: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The counts that are more than 3 % above those kept before, as (before, now). Rounding may add 0.01."""
    return {name: (count, now[name]) for name, count in before.items() if now[name] > 1.03 * count + 0.01}


def busy_schedulers(case: Case, launch: dict[str, Any]) -> int:
    """The schedulers that have a warp of the launch. A block runs on one multiprocessor."""
    return min(launch["warps"], SCHEDULERS * min(launch["blocks"], case.multiprocessors))


def clocks(gpu: GPU, case: Case, counts: dict[str, Any]) -> dict[str, float]:
    """The clocks that the launches of a kernel need, by what limits them: issue, the longest warp, the busiest pipe.

    A warp issues at most one instruction per clock, so no launch ends before its longest warp.
    """
    rates = {**PIPES, "fp64": gpu.fp64, "convert": gpu.convert}
    result = dict.fromkeys(("issue", "warp", "pipe"), 0.0)
    for launch in counts["launches"]:
        schedulers = busy_schedulers(case, launch)
        result["issue"] += launch["instructions"] / schedulers
        result["warp"] += launch["longest"]
        busiest = max(launch["by_class"][name] * 32 / rate for name, rate in rates.items())
        result["pipe"] += busiest * SCHEDULERS / schedulers
    return result


def picoseconds(gpu: GPU, case: Case, counts: dict[str, Any]) -> dict[str, float]:
    """The model's time per element of one kernel, by what limits it: as :func:`clocks`, and memory."""
    elements = counts["elements"] * gpu.multiprocessors / case.multiprocessors
    size = {"float32": 4, "float64": 8}.get(case.dtype, 2)
    written = size if counts["stores"]["bytes"] > size / 2 else 0
    times = {name: count / gpu.clock / elements * 1e12 for name, count in clocks(gpu, case, counts).items()}
    return {**times, "memory": (size + written) / gpu.bandwidth * 1e12}


def report(case: Case, counts: dict[str, Any]) -> str:
    lines = [case.name]
    for name in ("forward", "backward"):
        count = counts[name]
        classes = ", ".join(f"{key} {value:.1f}" for key, value in count["by_class"].items() if value >= 0.05)
        lines += [
            f"  {name:8s} {count['issued']:6.1f} lane instructions, {count['active']:6.1f} of them by active lanes; "
            f"{count['branches']:.1f} branches; {count['blocks']} blocks",
            f"           {classes}",
            f"           sectors / needed: loads {sectors(count['loads']):.2f}, stores {sectors(count['stores']):.2f}",
        ]
        lines += [
            f"           launch: {launch['warps']} warps on {busy_schedulers(case, launch)} schedulers, "
            f"{launch['instructions'] / launch['warps']:.0f} instructions a warp, {launch['longest']} at most"
            for launch in count["launches"]
        ]
    for gpu in GPUS:
        limits = [picoseconds(gpu, case, counts[name]) for name in ("forward", "backward")]
        size = {"float32": 4, "float64": 8}.get(case.dtype, 2)
        copy = 2 * size / gpu.bandwidth * 1e12
        total = sum(max(limit.values()) for limit in limits)
        names = " / ".join(max(limit, key=lambda name: limit[name]) for limit in limits)
        issue = sum(max(limit["issue"], limit["memory"]) for limit in limits)
        lines.append(
            f"  {gpu.name:8s} model: {total:6.2f} ps, {total / copy:5.2f} copies, limited by {names}; "
            f"by issue and memory alone {issue / copy:5.2f} copies"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="NxCxL; with --packed NxLxC")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--positives", type=float, default=0.05, help="share of the positive labels")
    parser.add_argument("--pooling", default="max")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--architecture", default="90")
    parser.add_argument("--profile", type=Path, help="a file for the issue counts of every instruction")
    parser.add_argument("--update", action="store_true", help="write device_code_counts.json")
    options = parser.parse_args()
    cases = CASES
    if options.shape:
        first, second, third = map(int, options.shape.split("x"))
        shape = (first, third, second) if options.packed else (first, second, third)
        settings = {} if options.pooling == "max" else {"pooling": options.pooling}
        profile = str(options.profile.resolve()) if options.profile else None
        cases = [
            Case(
                shape, options.positives, options.packed, options.dtype, options.multiprocessors, options.architecture,
                settings, profile,
            )
        ]  # fmt: skip
    stored = {}
    for case in cases:
        counts = measure(case)
        stored[case.name] = kept(counts)
        print(report(case, counts), flush=True)
    if options.update:
        COUNTS.write_text(
            json.dumps({"nvcc": build_device_code.nvcc_version(), "cases": stored}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
