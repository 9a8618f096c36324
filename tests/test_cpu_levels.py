"""The CPU kernels at every instruction set: the accuracy of their own functions, and the same loss from each level."""

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

from sgl_ops.pooling import POOLINGS

pytest.importorskip("sgl_ops._C", reason="the extension sgl_ops._C is not built", exc_type=ImportError)

LEVELS = ["baseline", "avx2", "avx512"]

# What a subprocess runs: SGL_OPS_CPU is read once, so that each level needs a process of its own.
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
            # the reference computes in float64 from what the fused operator reads
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
    # an odd size, so that loops have a tail
    exp = torch.cat([torch.linspace(-104.5, 40.0, 400_001), special])
    unit = torch.cat([torch.linspace(0.0, 1.0, 400_001), torch.logspace(-44, 0, 10_001)])
    product = torch.cat([unit, torch.logspace(0, 64, 400_001, base=2)])  # of 64 factors of at most 2
    expm1 = torch.cat([torch.linspace(-110.0, 0.0, 400_001), -torch.logspace(-44, 0, 10_001), special[special <= 0]])
    inverse = torch.linspace(1.0, 2.0, 400_001)  # what sigmoids divide by
    return {"exp": exp, "log1p_unit": unit, "log1p": product, "expm1": expm1, "reciprocal": inverse}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, 61) * 3
    logits[0, 0] -= 60  # scaled pairs
    logits[0, 1] += 60
    logits[0, 2, 0, :40] = 7e3
    logits[1, 1] = 0.25  # all alike
    inputs = {
        "math": math_inputs(),
        "logits": logits,
        "targets": torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, float("nan")], [0, 1, 1]]),
        "mask": torch.rand(4, 5, 61) > 0.2,
    }
    inputs["mask"][1, 0, 0] = True
    torch.save(inputs, folder / "inputs.pt")

    @cache  # of a level that this machine lacks as well
    def run(level: str) -> dict:
        out = folder / f"{level}.pt"
        subprocess.run(
            [sys.executable, "-c", REPORT, str(folder / "inputs.pt"), str(out)],
            env={**os.environ, "SGL_OPS_CPU": level},
            cwd=folder,  # not in the checkout, whose sgl_ops has no extension
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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("function", ["exp", "log1p_unit", "log1p", "expm1", "reciprocal"])
def test_functions_are_within_2_ulp(report, level, function):
    x, y = math_inputs()[function], report(level)[function]
    exact = getattr(torch, function.removesuffix("_unit"))(x.double())
    assert torch.isfinite(y).all()
    assert ulp_error(y, exact).max() <= 2


@pytest.mark.parametrize("level", LEVELS)
def test_functions_at_nan_and_infinity(report, level):
    exp = report(level)["exp", "special"]  # made for arguments <= 40
    assert exp[0].isnan()
    assert exp[2] == 0.0
    expm1 = report(level)["expm1", "special"]  # made for arguments <= 0
    assert expm1[0].isnan()
    assert expm1[2] == -1.0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_level_gives_the_reference(report, level, pooling, dtype):
    result = report(level)
    loss, grad = result[dtype, pooling, "fused"]
    expected_loss, expected_grad = result[dtype, pooling, "reference"]
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert abs(loss - expected_loss) <= 20 * working * abs(expected_loss)
    # rounded once to the dtype; half a step of its smallest number where that underflows
    limits = torch.finfo(dtype)
    rounding = (limits.eps * expected_grad.abs() + limits.smallest_normal * limits.eps) / 2
    # p - M cancels: what is lost is measured by the terms, of which the largest gradient of the bag-class tells the
    # size (below 1e-30 nothing is asked for: float32 ends there). In float64 the reference rounds as well.
    terms = expected_grad.abs().amax((2, 3), keepdim=True).clamp(min=1e-30)
    factor = 64 if dtype == torch.float64 else 16
    assert ((grad - expected_grad).abs() <= rounding + factor * working * terms).all()


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler made of it


@pytest.fixture(scope="module")
def functions():
    """Instructions of every function of the extension, as a disassembler writes them."""
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


def test_no_level_is_called_by_another(functions):
    """A function that several files share must not be the copy that was compiled for a machine with more."""
    for name, instructions in functions.items():
        # some names of lambdas are too much for the demangler
        if "sgl" in name and not re.search(r"sgl::avx(2|512)(::|_kernels)|sgl\d+avx(2|512)", name):
            assert not any(re.search("%[yz]mm", line) for line in instructions), name


@pytest.mark.parametrize(("level", "register"), [("baseline", "xmm"), ("avx2", "ymm"), ("avx512", "zmm")])
def test_passes_are_loops_of_vectors(functions, level, register):
    """Speed is not tested, but this much of it: no instance goes alone, as one in a loop that fell back would."""
    passes = {name: lines for name, lines in functions.items() if re.search(rf"sgl::{level}::\w+_pass<.*float", name)}
    for kind in ("negative", "extremes", "count_up_to", "guided", "gradient", "pooled"):
        # (float const*, ...): others choose among the poolings, and call these
        chosen = {name: lines for name, lines in passes.items() if re.search(rf"::{kind}_pass<.*\(float const\*", name)}
        assert chosen, kind
        for name, lines in chosen.items():
            if "NoPooling" in name:  # adds nothing up
                continue
            assert any(register in line for line in lines), name
            assert not any(re.match(r"v?(mul|div|fn?madd\d*)ss\b", line) for line in lines), name
