"""The cases of bench_cpu.py as a pytest-benchmark suite, to compare two versions of the code:

    pytest benchmarks --benchmark-enable --benchmark-autosave
    pytest benchmarks --benchmark-enable --benchmark-compare

CI runs it without measuring, to test that every case runs and has a gradient. No test checks a time.
"""

from __future__ import annotations

import pytest
from baselines import bce_all_instances, eager_sgl
from bench_cpu import CASES
from measuring import draw, step

from sgl_ops import SGLLoss

LOSSES = {"sgl_ops": SGLLoss(), "eager": eager_sgl, "bce": bce_all_instances}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("shape", "share", "what"), CASES)
def test_step(benchmark, shape, share, what, name):
    logits, targets = draw(shape, shape[:2], share)
    logits.requires_grad_()
    benchmark.group = f"{what} {shape}, {share:.0%} positive"
    benchmark(step, LOSSES[name], logits, targets)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
