"""The CPU kernels for every instruction set (level): the accuracy of their math functions, and the loss."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch

from sgl_ops._fused import CPU_LEVELS
from sgl_ops.pooling import POOLINGS

pytest.importorskip("sgl_ops._C", reason="the extension sgl_ops._C is not built", exc_type=ImportError)

# The code of a subprocess. SGL_OPS_CPU is read once per process, so each level needs a separate one.
REPORT = """
import sys
import torch
import sgl_ops
ops = torch.ops.sgl_ops
inputs = torch.load(sys.argv[1], weights_only=True)
result = {"level": ops.cpu_level()}
for function, x in inputs["math"].items():
    result[function] = ops._math(x, function)
    result[function, "special"] = ops._math(torch.tensor([torch.nan, torch.inf, -torch.inf]), function)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for pooling in sgl_ops.pooling.POOLINGS:
        for impl in ("fused", "reference"):
            logits = inputs["logits"].to(dtype)
            # the reference computes in float64 from the same rounded logits
            x = logits.clone() if impl == "fused" else logits.to(torch.float64, copy=True)
            x.requires_grad_()
            loss = sgl_ops.functional.sgl_loss(
                x, inputs["targets"], mask=inputs["mask"], pooling=pooling, mask_weight=0.5, impl=impl
            )
            loss.backward()
            result[dtype, pooling, impl] = (loss.detach().double(), x.grad.double())
torch.save(result, sys.argv[2])
"""


def math_inputs() -> dict[str, torch.Tensor]:
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 1e-8, -1e-8, -88.5, -87.0, -20.0, -0.34657359])
    # an odd size, so that loops have a partial last vector
    exp = torch.cat([torch.linspace(-104.5, 40.0, 400_001), special])
    unit = torch.cat([torch.linspace(0.0, 1.0, 400_001), torch.logspace(-44, 0, 10_001)])
    product = torch.cat([unit, torch.logspace(0, 64, 400_001, base=2)])  # of 64 factors of at most 2
    expm1 = torch.cat([torch.linspace(-110.0, 0.0, 400_001), -torch.logspace(-44, 0, 10_001), special[special <= 0]])
    inverse = torch.linspace(1.0, 2.0, 400_001)  # the divisors of sigmoids
    return {"exp": exp, "log1p_unit": unit, "log1p": product, "expm1": expm1, "reciprocal": inverse}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, 61) * 3
    logits[0, 0] -= 60  # scaled pairs
    logits[0, 1] += 60
    logits[0, 2, 0, :40] = 7e3
    logits[1, 1] = 0.25  # all equal
    inputs = {
        "math": math_inputs(),
        "logits": logits,
        "targets": torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, float("nan")], [0, 1, 1]]),
        "mask": torch.rand(4, 5, 61) > 0.2,
    }
    inputs["mask"][1, 0, 0] = True
    torch.save(inputs, folder / "inputs.pt")

    @cache  # also for levels that this machine does not support
    def run(level: str) -> dict:
        out = folder / f"{level}.pt"
        subprocess.run(
            [sys.executable, "-c", REPORT, str(folder / "inputs.pt"), str(out)],
            env={**os.environ, "SGL_OPS_CPU": level},
            cwd=folder,  # outside the checkout, because sgl_ops there has no extension
            check=True,
        )
        return torch.load(out, weights_only=True)

    def report_of(level: str) -> dict:
        result = run(level)
        if result["level"] != level:
            pytest.skip(f"this machine has no {level}, only {result['level']}")
        return result

    return report_of


def ulp_error(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    rounded = exact.to(torch.float32)
    above = torch.nextafter(rounded.abs(), torch.tensor(torch.inf))
    return (y.double() - exact).abs() / (above.double() - rounded.abs().double())


@pytest.mark.parametrize("level", CPU_LEVELS)
@pytest.mark.parametrize("function", ["exp", "log1p_unit", "log1p", "expm1", "reciprocal"])
def test_math_functions_are_within_2_ulp(report, level, function):
    x, y = math_inputs()[function], report(level)[function]
    exact = getattr(torch, function.removesuffix("_unit"))(x.double())
    assert torch.isfinite(y).all()
    assert ulp_error(y, exact).max() <= 2


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_math_functions_at_nan_and_infinity(report, level):
    exp = report(level)["exp", "special"]  # for arguments <= 40
    assert exp[0].isnan()
    assert exp[2] == 0.0
    expm1 = report(level)["expm1", "special"]  # for arguments <= 0
    assert expm1[0].isnan()
    assert expm1[2] == -1.0


@pytest.mark.parametrize("level", CPU_LEVELS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_loss_and_gradient_of_every_level_equal_the_reference(report, level, pooling, dtype):
    result = report(level)
    loss, grad = result[dtype, pooling, "fused"]
    expected_loss, expected_grad = result[dtype, pooling, "reference"]
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert abs(loss - expected_loss) <= 20 * working * abs(expected_loss)
    # rounding to the dtype; half of its smallest subnormal number if the gradient underflows
    limits = torch.finfo(dtype)
    rounding = (limits.eps * expected_grad.abs() + limits.smallest_normal * limits.eps) / 2
    # p - M cancels, so the error is relative to its terms. The largest gradient of the pair estimates their size. The
    # clamp ignores gradients below 1e-30, near the end of the range of float32. In float64, the reference rounds, too.
    terms = expected_grad.abs().amax((2, 3), keepdim=True).clamp(min=1e-30)
    factor = 64 if dtype == torch.float64 else 16
    assert ((grad - expected_grad).abs() <= rounding + factor * working * terms).all()


# ---------------------------------------------------------------------------------------------------------------------
# The compiled code


@pytest.fixture(scope="module")
def functions():
    """A dictionary from each function of the extension to its disassembled instructions."""
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs an x86-64 machine and objdump")
    library = importlib.util.find_spec("sgl_ops._C").origin
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", "--section=.text", library]
    found, name = {}, ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            name = line[line.index("<") + 1 : -2]
            found[name] = []
        elif "\t" in line and name:
            found[name].append(line.split("\t", 1)[1])
    if not any("sgl::" in name for name in found):
        pytest.skip("the extension was stripped of its symbols")
    return found


def test_functions_outside_a_level_use_the_baseline_instructions(functions):
    """The linker keeps one copy of a function that several files define. It must not be that of a higher level."""
    for name, instructions in functions.items():
        # the demangler fails for the names of some lambdas
        if "sgl" in name and not re.search(r"sgl::avx(2|512)(::|_kernels)|sgl\d+avx(2|512)", name):
            assert not any(re.search("%[yz]mm", line) for line in instructions), name


@pytest.mark.parametrize(("level", "register"), [("baseline", "xmm"), ("avx2", "ymm"), ("avx512", "zmm")])
def test_passes_are_vectorized(functions, level, register):
    """No pass multiplies or divides single floats, as a loop that the compiler did not vectorize would."""
    passes = {name: lines for name, lines in functions.items() if re.search(rf"sgl::{level}::\w+_pass<.*float", name)}
    for kind in ("negative", "extremes", "count_up_to", "guided", "gradient", "pooled"):
        # only functions of (float const*, ...); the others select the pooling and call these
        chosen = {name: lines for name, lines in passes.items() if re.search(rf"::{kind}_pass<.*\(float const\*", name)}
        assert chosen, kind
        for name, lines in chosen.items():
            if "NoPooling" in name:  # sums nothing
                continue
            assert any(register in line for line in lines), name
            assert not any(re.match(r"v?(mul|div|fn?madd\d*)ss\b", line) for line in lines), name
