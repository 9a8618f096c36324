"""Tests of the machine code that nvcc generates from the CUDA kernels, run by the interpreters of tests/device_code.

They are a separate tier: ``pytest -m device_code``. It covers sm_90 with every dtype, sm_75 and sm_120 with float32 and
bfloat16, two seeded faults and the counts. It spends most of its time on compiling the kernels. With
``--all-device-code`` it also covers every shipped architecture with every dtype, PTX, other orders of threads and every
seeded fault. The release check uses this option.
"""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import ROOT

HERE = ROOT / "tests" / "device_code"
sys.path += [str(HERE), str(ROOT / "tools"), str(ROOT / "benchmarks")]
import bench_device_code  # noqa: E402
import build_device_code  # noqa: E402
import faults  # noqa: E402
from cuda_toolkit import ARCHITECTURES  # noqa: E402

MISSING = build_device_code.missing()
pytestmark = [pytest.mark.device_code, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

QUICK = ["90", "75", "120"]
ALL = [name.replace(".", "") for name in ARCHITECTURES]
CASES = HERE / "device_cases.py"


@pytest.fixture
def whole_tier(request) -> bool:
    return request.config.getoption("--all-device-code")


def has_two_types(architecture: str, whole_tier: bool) -> bool:
    """Whether the tests of an architecture compile the kernels for float32 and bfloat16 only, in half the time."""
    return architecture != QUICK[0] and not whole_tier


def run_cases(code: build_device_code.DeviceCode, *arguments: str) -> str:
    """The failed cases, one per line; empty if all agree."""
    result = code.run(CASES, *arguments)
    lines = result.stdout.splitlines()
    if result.returncode == 0:
        assert lines[-1].endswith("M lane instructions"), result.stdout
        return ""
    return "\n".join(line for line in lines if line.endswith("FAILED")) or result.stdout + result.stderr


@pytest.mark.parametrize("architecture", ALL)
def test_machine_code_agrees_with_the_reference(architecture, whole_tier):
    if architecture not in QUICK and not whole_tier:
        pytest.skip("needs --all-device-code")
    code = build_device_code.build([architecture], two_types=has_two_types(architecture, whole_tier))
    assert not run_cases(code, architecture, "sass", "--quick")


@pytest.mark.parametrize("architecture", ALL)
def test_no_kernel_has_a_stack_frame_or_spills(architecture, whole_tier):
    """In the compiler's report, either means that the values of a thread do not fit into registers."""
    if architecture not in QUICK and not whole_tier:
        pytest.skip("needs --all-device-code")
    two_types = has_two_types(architecture, whole_tier)
    report = (build_device_code.compiled(architecture, two_types=two_types) / "report.txt").read_text()
    assert "warning" not in report, report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = re.findall(r"Compiling entry function '\S*(?:forward|backward)_kernel\S*' for '(sm_\w+)'", report)
    assert kernels == [f"sm_{architecture}"] * 2 * (2 if two_types else 4)  # forward and backward of each dtype
    assert len(frames) >= len(kernels)
    assert set(frames) == {("0", "0", "0")}, report


@pytest.mark.parametrize("architecture", ALL)
def test_ptx_agrees_with_the_reference(architecture, whole_tier):
    if not whole_tier:
        pytest.skip("needs --all-device-code")
    assert not run_cases(build_device_code.build([architecture]), architecture, "ptx", "--quick")


@pytest.mark.parametrize(
    "arguments",
    [
        ["ptx", "--quick", "--policy", "2", "--resident", "3"],
        ["sass", "--quick", "--policy", "2", "--resident", "4", "--ulp", "1"],
        ["sass", "--quick", "--policy", "1", "--multiprocessors", "16"],
        ["sass", "--multiprocessors", "132"],
    ],
    ids=" ".join,
)
def test_other_orders_of_threads(arguments, whole_tier):
    if not whole_tier:
        pytest.skip("needs --all-device-code")
    assert not run_cases(build_device_code.build(["90"]), "90", *arguments)


@pytest.mark.parametrize("name", [*faults.QUICK, *faults.OTHER])
def test_finds_a_fault(name, tmp_path, whole_tier):
    if name not in faults.QUICK and not whole_tier:
        pytest.skip("needs --all-device-code")
    fault = (faults.QUICK | faults.OTHER)[name]
    code = build_device_code.build(["90"], fault.copy(tmp_path), two_types=True)
    failed = run_cases(code, "90", "sass", "--quick", "--only", fault.cases, "--first-failure")
    assert "FAILED" in failed, failed


COUNTED = json.loads(bench_device_code.COUNTS.read_text())


@pytest.mark.parametrize("case", bench_device_code.CASES, ids=lambda case: case.name)
def test_no_count_regresses_by_more_than_3_percent(case):
    """After an intended change: ``bench_device_code.py --update``, and a row in the log of benchmarks/README.md."""
    if build_device_code.nvcc_version() != COUNTED["nvcc"]:
        pytest.skip(f"the counts are of nvcc {COUNTED['nvcc']}, this is {build_device_code.nvcc_version()}")
    code = build_device_code.build([case.architecture])  # with every type, as the tests above: compiled once
    counts = bench_device_code.kept(bench_device_code.measure(case, code))
    assert not bench_device_code.risen(COUNTED["cases"][case.name], counts)


@pytest.mark.parametrize(
    "name", ["forward", "backward", "forward_fp64", "forward_load_sectors", "load_sectors", "store_sectors"]
)
def test_a_count_that_rises_by_4_percent_is_found(name):
    for before in COUNTED["cases"].values():
        assert not bench_device_code.risen(before, before)
        assert list(bench_device_code.risen(before, {**before, name: 1.04 * before[name] + 0.01})) == [name]
