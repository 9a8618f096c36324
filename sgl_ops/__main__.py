"""``python -m sgl_ops``: versions and kernels for a bug report, and a test of the kernels on this machine.

Exit status 1 if a kernel does not give the result of the reference.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from . import SGLLoss, __version__, _fused
from .pooling import POOLINGS

#: Allowed error of loss and gradient against the reference in float64, relative to the largest value.
TOLERANCE = 1e-5

Step = Callable[[], tuple[Tensor, Tensor]]


def about() -> list[str]:
    """Versions, and the loaded kernels."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    lines = [
        f"sgl_ops   {__version__} in {Path(__file__).parent}",
        f"python    {platform.python_version()}, {platform.platform()}",
        f"torch     {torch.__version__} ({cuda}), {torch.get_num_threads()} threads; numpy {numpy.__version__}",
    ]
    if not _fused.DEVICES:
        lines.append(f"extension not loaded, the reference is used everywhere: {_fused.REASON}")
        if (Path(__file__).parents[1] / "setup.py").exists():
            lines.append("this is a source tree: to check what is installed, run the command in another folder")
        return lines
    ops = torch.ops.sgl_ops
    asked = os.environ.get("SGL_OPS_CPU")
    lines.append(f"cpu       kernels for {ops.cpu_level()}" + (f" (SGL_OPS_CPU={asked})" if asked else ""))
    compiled = ops.cuda_architectures()
    if not compiled:
        lines.append(
            "cuda      no kernels: built without a CUDA toolkit, or beside a torch without CUDA, or SGL_OPS_CUDA=0"
        )
    elif not _fused.HAS_CUDA:
        lines.append(f"cuda      kernels for {compiled}, not used: this torch has no CUDA")
    else:
        lines.append(f"cuda      kernels for {compiled}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} ({major}.{minor})"
        lines.append(f"gpu {index}     {name}: {'runs' if runs_on(compiled, major, minor) else 'NOT among'} these")
    return lines


def runs_on(compiled: str, major: int, minor: int) -> bool:
    """Whether a GPU of this capability runs code for ``compiled``, as in "7.5 8.0 9.0+PTX".

    Code for a GPU runs on later GPUs of the same generation (the major number). PTX runs on all later GPUs. Code for
    "9.0a" runs on this GPU alone.
    """
    for have_major, have_minor, alone, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", compiled):
        have = (int(have_major), int(have_minor))
        if have == (major, minor) or (not alone and have <= (major, minor) and (ptx or have[0] == major)):
            return True
    return False


def step_of(impl: str, logits: Tensor, targets: Tensor, **options: Any) -> Step:
    loss = SGLLoss(impl=impl, check=False, **options)

    def step() -> tuple[Tensor, Tensor]:
        x = logits.detach().requires_grad_()
        value = loss(x, targets)
        (grad,) = torch.autograd.grad(value, x)
        return value.detach(), grad

    return step


def error_of(step: Step, exact: Step) -> float:
    """The larger of the errors of loss and gradient, each relative to its largest value."""
    return max(
        float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
        for got, expected in zip(step(), exact(), strict=True)
    )


def microseconds(step: Step, device: torch.device) -> float:
    def timed() -> float:
        start = time.perf_counter()
        for _ in range(5):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / 5

    timed()
    return statistics.median(timed() for _ in range(5)) * 1e6


def self_test(device: torch.device) -> tuple[str, bool]:
    """(result as text, whether it is correct) for maps of 14 classes with few positive labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((16, 14, 256), generator=generator).mul(2).to(device)
    targets = (torch.rand((16, 14), generator=generator) < 0.2).float()
    targets[0, 0] = torch.nan
    targets = targets.to(device)
    worst = 0.0
    for pooling in POOLINGS:
        options = {"pooling": pooling, "mask_weight": 0.5}
        exact = step_of("reference", logits.double(), targets, **options)
        worst = max(worst, error_of(step_of("fused", logits, targets, **options), exact))
    ours, reference = (microseconds(step_of(impl, logits, targets), device) for impl in ("fused", "reference"))
    right = worst <= TOLERANCE
    verdict = "right" if right else f"WRONG: more than {TOLERANCE:g}"
    return (
        f"error {worst:.1e}, {verdict}; forward + backward {ours:.0f} us, {reference / ours:.1f} times as fast as the "
        "reference",
        right,
    )


def main() -> int:
    print("\n".join(about()), flush=True)
    devices = [torch.device("cpu")] if "cpu" in _fused.DEVICES else []
    if "cuda" in _fused.DEVICES:
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    results = []
    for device in devices:
        try:
            text, right = self_test(device)
        except RuntimeError as error:  # no kernel for this GPU, out of memory, ...
            text, right = f"FAILED: {error}", False
        print(f"self-test {device}: {text}", flush=True)
        results.append(right)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
