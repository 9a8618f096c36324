"""The CUDA kernels without a GPU: run on the CPU, and under sanitizers.

All tests with the fixture ``impl`` test the values of these kernels, as impl "emulated". The tests of this file check
that the results do not depend on the order of threads and blocks, that sanitizers report no error in the kernels, and
that they report errors in kernels with seeded bugs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, cases
from comparison import Comparison
from conftest import ROOT, needs_kernel, use_emulated_operators
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sgl_ops import SGLLoss

sys.path.append(str(ROOT / "tools"))
from cuda_toolkit import architecture_flags, find_toolkit

# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.fixture
def kernels(emulated, monkeypatch):
    use_emulated_operators(monkeypatch)
    yield emulated
    emulated.set_schedule(0)
    emulated.set_resident(1)
    emulated.set_multiprocessors(3)
    emulated.set_capturing(False)


def step(logits, targets, **options):
    x = logits.clone().requires_grad_()
    loss = SGLLoss(impl="fused", mask_weight=0.5, **options)(x, targets)
    loss.backward()
    return loss.detach(), x.grad


@needs_kernel
@pytest.mark.parametrize("pooling", ["max", "softmax"])
@pytest.mark.parametrize("shape", [(40, 3, 9), (3, 2, 700), (2, 1, 9000)])
def test_order_of_threads_and_blocks_changes_no_bit(kernels, shape, pooling):
    logits, targets = torch.randn(shape), (torch.rand(shape[:2]) < 0.5).float()
    results = []
    for schedule, resident in ((0, 1), (1, 1), (5, 1), (0, 4), (7, 3)):
        kernels.set_schedule(schedule)
        kernels.set_resident(resident)
        results.append(step(logits, targets, pooling=pooling))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@needs_kernel
@pytest.mark.parametrize("multiprocessors", [1, 2, 16, 132])
@pytest.mark.parametrize("shape", [(70, 3, 9), (3, 2, 3000), (2, 1, 40_000)])
def test_number_of_multiprocessors_changes_rounding_only(kernels, shape, multiprocessors):
    logits, targets = torch.randn(shape, dtype=torch.float64), (torch.rand(shape[:2]) < 0.5).float()
    expected = SGLLoss(impl="reference", mask_weight=0.5)(logits, targets)
    kernels.set_multiprocessors(multiprocessors)
    torch.testing.assert_close(step(logits, targets)[0], expected, rtol=1e-13, atol=0)


@needs_kernel
def test_captured_launches_have_separate_counters(kernels):
    """More launches than the ring has counters: the last ones use a counter that the graph sets to 0."""
    logits, targets = torch.randn(50, 1, 4), torch.ones(50, 1)
    expected, _ = step(logits, targets)
    kernels.set_capturing(True)
    before = kernels.exchange_counters_taken(0xFFFF)
    assert torch.equal(step(logits, targets)[0], expected)  # takes the last counter
    for _ in range(3):
        assert torch.equal(step(logits, targets)[0], expected)
        assert kernels.exchange_counters_taken(0x10000) == 0x10000
    kernels.exchange_counters_taken(before)


@needs_kernel
def test_a_stream_keeps_its_counter(kernels):
    """No other stream gets the counter of a stream, however many launches are between two of its own."""
    logits, targets = torch.randn(50, 1, 4), torch.ones(50, 1)
    before = kernels.exchange_counters_taken(100)
    for stream in (11, 12, 11, 12, 13):
        kernels.set_stream_id(stream)
        step(logits, targets)
    assert kernels.exchange_counters_taken(before) == 103
    kernels.set_stream_id(1)


@needs_kernel
def test_an_error_is_reported_once(kernels):
    logits, targets = torch.randn(5, 1, 4), torch.ones(5, 1)
    kernels.fail_next_call(7)
    with pytest.raises(RuntimeError, match="CUDA error"):
        step(logits, targets)
    assert kernels.last_error() == 0
    step(logits, targets)


@needs_kernel
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
              torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)  # fmt: skip
def test_targets_may_have_any_dtype(kernels, dtype):
    logits, targets = torch.randn(6, 2, 5), torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0], [1, 0], [0, 1]])
    expected, _ = step(logits, targets.double())
    targets = targets.to(dtype)
    assert torch.equal(step(logits, targets)[0], expected)
    if dtype.is_floating_point:
        targets[2, 1] = float("nan")
        assert not torch.equal(step(logits, targets)[0], expected)
        assert step(logits, targets)[1][2, 1].eq(0).all()


@needs_kernel
@pytest.mark.parametrize("by", [1, 2, 3, 7, 14, 527, 641, 1 << 20, (1 << 30) + 1, (1 << 31) - 1])
def test_division_by_a_product_is_exact(kernels, by):
    most = (1 << 31) - 1
    near = [k * by + more for k in (0, 1, 2, 1000, most // by) for more in (-1, 0, 1)]
    for n in [*near, *torch.randint(most, (1000,)).tolist(), most]:
        if 0 <= n <= most:
            assert kernels.quotient_of(n, by) == n // by


@needs_kernel
def test_too_large_shapes_raise_an_error(kernels):
    """The tensors are expanded, so that they need no memory."""
    rows = torch.zeros(1).expand(1 << 30)
    with pytest.raises(RuntimeError, match="2\\^30 - 1 instances"):
        SGLLoss(impl="fused", check=False)(rows, torch.ones(1), offsets=torch.tensor([0, 1 << 30]))


# ---------------------------------------------------------------------------------------------------------------------
# Sanitizers


def check_all(program: Comparison, drawn: st.SearchStrategy[Case], examples: int, *phases: Phase) -> None:
    """Checks cases that hypothesis draws, until the program reports an error."""

    @settings(max_examples=examples, phases=phases, deadline=None, derandomize=True, database=None)
    @given(drawn)
    def check(case):
        program.check(case)

    check()


# Seeded bugs: the file, the original code, the code that has the bug if BUG is true, and the sanitizer that finds it.
# One program per sanitizer contains all its bugs, because compiling a program takes long. The environment variable
# SEEDED_BUG selects a bug. Without it, the kernels are correct.
BUGS = {
    "no barrier before the warps' sums are read": (
        "group.cuh", "    __syncthreads();\n    std::memcpy(&value",
        "    if (!BUG) __syncthreads();\n    std::memcpy(&value", "threads"),
    "one exchange buffer instead of two": ("group.cuh", "    turn_ ^= 1;\n", "    turn_ ^= !BUG;\n", "threads"),
    "no barrier before pairs are finalized": (
        "forward.cuh", "    __syncthreads();\n    const", "    if (!BUG) __syncthreads();\n    const", "threads"),
    "no fence before a block increments the counter": (
        "forward.cuh", "threadIdx.x];\n    __threadfence();\n", "threadIdx.x];\n    if (!BUG) __threadfence();\n",
        "threads"),
    "no fence before the last block reads the others": (
        "forward.cuh", "gridDim.x - 1;\n    __threadfence();\n", "gridDim.x - 1;\n    if (!BUG) __threadfence();\n",
        "threads"),
    "the counter is not reset": (
        "forward.cuh", "blocks_done, gridDim.x - 1)", "blocks_done, gridDim.x - !BUG)", "none"),
    "one instance too many": ("rows.cuh", "live = j < n;", "live = j < n + BUG;", "memory"),
    "one vector too many": ("rows.cuh", "n / Pack<In>::kSize :", "n / Pack<In>::kSize + BUG :", "memory"),
    "one logit too many in backward": ("backward.cuh", "<uint32_t>(n); }", "<uint32_t>(n + BUG); }", "memory"),
    "the tail of a row is left out": (
        "rows.cuh", "p * row.width < row.n", "p * row.width + BUG < row.n", "none"),
}  # fmt: skip
SEEDED_BUG = """#include <cstdlib>
inline const int seeded_bug = std::getenv("SEEDED_BUG") == nullptr ? -1 : std::atoi(std::getenv("SEEDED_BUG"));
"""


def program_with_bugs(folder: Path, sanitizer: str, bug: str | None = None) -> Comparison:
    """The program whose kernels contain every bug that the sanitizer must find, with one of them chosen, or none."""
    shutil.copytree(ROOT / "csrc", folder / "root" / "csrc")
    cuda = folder / "root" / "csrc" / "cuda"
    for number, (name, (file, right, wrong, found_by)) in enumerate(BUGS.items()):
        if found_by == sanitizer:
            text = (cuda / file).read_text()
            assert right in text, f"{name}: {file} does not contain the code to replace"
            (cuda / file).write_text(text.replace(right, wrong.replace("BUG", f"(seeded_bug == {number})")))
    launch = cuda / "launch.cu"
    launch.write_text(SEEDED_BUG + launch.read_text())
    environment = {} if bug is None else {"SEEDED_BUG": str(list(BUGS).index(bug))}
    return Comparison(folder / "program", sanitizer, folder / "root", environment)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("sanitizer", "examples"), [("none", 200), ("memory", 100), ("threads", 40)])
def test_sanitized_kernels_agree_with_the_cpu(tmp_path, sanitizer, examples):
    program = program_with_bugs(tmp_path, sanitizer)
    check_all(program, cases(small=sanitizer == "threads"), examples, Phase.generate, Phase.shrink)
    program.close()


def look_for(bug: str, folder: Path, *phases: Phase) -> Comparison:
    """Runs cases with the seeded bug until one fails."""
    sanitizer = BUGS[bug][3]
    program = program_with_bugs(folder, sanitizer, bug)
    # the sanitizer may miss an access out of bounds, which then changes the result
    report = "data race" if sanitizer == "threads" else "AddressSanitizer|runtime error|on the CPU|second launch"
    with pytest.raises(AssertionError, match=report):
        check_all(program, cases(sanitizer == "threads"), 200, *phases)
    return program


@pytest.mark.sanitizer
@pytest.mark.parametrize("bug", BUGS)
def test_sanitizer_finds_the_seeded_bug(tmp_path, bug):
    look_for(bug, tmp_path, Phase.generate)


@pytest.mark.sanitizer
def test_failing_case_is_minimized(tmp_path):
    case = look_for("the tail of a row is left out", tmp_path, Phase.generate, Phase.shrink).failed
    # The smallest row: its only instance belongs to the tail of a pass that top-k pooling needs.
    assert (case.sizes, case.classes, case.plan) == ([1], 1, [])


# ---------------------------------------------------------------------------------------------------------------------
# nvcc


@pytest.fixture(scope="module")
def toolkit():
    toolkit = find_toolkit()
    if toolkit is None:
        pytest.skip("no CUDA toolkit was found: set CUDA_HOME to its folder")
    return toolkit


def test_architectures_are_selected_by_name(toolkit, monkeypatch):
    nvcc = toolkit / "bin" / "nvcc"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert architecture_flags(nvcc) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST.*'Hopper'"):
        architecture_flags(nvcc)
