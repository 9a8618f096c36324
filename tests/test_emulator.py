"""Tests of the emulator that runs CUDA kernels on the CPU: correct kernels pass, and kernels with a bug fail."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.sanitizer

SOURCE = ROOT / "tests" / "cuda_on_cpu" / "selftest.cpp"

BUILDS = {
    "plain": [],
    "ucontext": ["-DEMULATOR_UCONTEXT"],  # the implementation for other processors than x86-64
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
# exit statuses of selftest.cpp and of the sanitizers
PASSED, SANITIZER, WRONG, EXCEPTION, RACE = 0, 1, 2, 3, 66

# The bugs of selftest.cpp: name, builds, schedules, exit status, message. Builds that are not listed may miss the bug.
ALL = ["plain", "memory", "threads"]
BUGS = [
    ("no_barrier", ["plain"], [0, 1, 2], WRONG, "wrong"),
    ("no_barrier", ["threads"], [0, 1, 2], RACE, "data race"),
    # schedule 0 hides the bug from the plain build, but not from ThreadSanitizer
    ("no_barrier_hidden", ["plain"], [0], PASSED, ""),
    ("no_barrier_hidden", ["plain"], [1], WRONG, "wrong"),
    ("no_barrier_hidden", ["threads"], [0, 1], RACE, "data race"),
    ("no_barrier_before_reuse", ["plain"], [0, 1], WRONG, "wrong"),
    ("no_barrier_before_reuse", ["threads"], [0, 1], RACE, "data race"),
    ("no_syncwarp", ["threads"], [0, 1], RACE, "data race"),
    ("read_past_end", ["memory"], [0, 1], SANITIZER, "heap-buffer-overflow"),
    ("write_past_shared_end", ["memory"], [0, 1], SANITIZER, "heap-buffer-overflow"),
    ("unwritten_shared", ALL, [0, 1], WRONG, "wrong"),
    ("unwritten_bool", ["memory"], [0, 1], SANITIZER, "not a valid value for type 'bool'"),
    ("exit_before_shuffle", ALL, [0, 1], EXCEPTION, r"reads lane 5, which has exited .*, in __shfl_xor_sync"),
    ("exit_before_barrier", ALL, [0, 1], EXCEPTION, r"__syncthreads at .*has exited|has exited.*__syncthreads at"),
    ("divergent_barrier", ALL, [0, 1], EXCEPTION, r"__syncthreads at .*has exited|has exited.*__syncthreads at"),
    ("two_barriers", ALL, [0, 1], EXCEPTION, r"waits in __syncthreads at .*, but thread .* waits in __syncthreads at"),
    ("barrier_and_shuffle", ALL, [0, 1], EXCEPTION, r"deadlock: .*; 32 threads, .* __shfl_sync .* __syncthreads"),
    ("two_collectives", ALL, [0, 1], EXCEPTION, r"is in __\w+_sync .*, but thread .* of the same warp is in __\w+"),
    ("lane_not_in_mask", ALL, [0, 1], EXCEPTION, "reads lane 2, which is not in the mask"),
    ("not_in_own_mask", ALL, [0, 1], EXCEPTION, "is not in its own mask"),
    ("no_fence", ["threads"], [0, 1], RACE, "data race"),
    ("fence_too_early", ["threads"], [0, 1], RACE, "data race"),
    ("block_scope_fence", ["threads"], [0, 1], RACE, "data race"),
    ("no_fence_after", ["threads"], [0, 1], RACE, "data race"),
    ("wait_forever", ["plain"], [0, 1], EXCEPTION, "spins forever: 4194304 atomics"),
]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Only PATH: the environment of the tests might contain options for sanitizers.
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PATH": "/usr/bin:/bin"})


@pytest.fixture(scope="session")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs selftest.cpp. Each requested build is compiled once."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("emulator")
    programs: dict[str, Path | str] = {}  # path, or the reason why the build is not possible

    def program(build: str) -> Path | str:
        nothing = folder / "nothing.cpp"
        nothing.write_text("int main() {}\n")
        trial = folder / f"nothing_{build}"
        if call([compiler, "-std=c++17", *BUILDS[build], str(nothing), "-o", str(trial)]).returncode != 0:
            return f"g++ has no runtime for {BUILDS[build][0]}"
        if call([str(trial)]).returncode != 0:
            return f"programs with {BUILDS[build][0]} do not run here"
        path = folder / build
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", *BUILDS[build], str(SOURCE), "-o", str(path)]
        result = call(command)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr, result.stderr
        return path

    def run(build: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        if build not in programs:
            programs[build] = program(build)
        path = programs[build]
        if isinstance(path, str):
            pytest.skip(path)
        return call([str(path), *map(str, arguments)])

    return run


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("schedule", "resident"), [(0, 1), (1, 1), (2, 1), (0, 3), (5, 4)])
def test_correct_kernels_pass(selftest, build, schedule, resident):
    result = selftest(build, "correct", schedule, resident)
    assert result.returncode == PASSED, result.stderr
    assert not result.stderr


@pytest.mark.parametrize(
    ("bug", "build", "schedule", "status", "text"),
    [(bug, build, k, status, text) for bug, builds, ks, status, text in BUGS for build in builds for k in ks],
)
def test_emulator_finds_the_bug(selftest, bug, build, schedule, status, text):
    resident = 1 + schedule % 2  # blocks one after the other, and concurrently
    result = selftest(build, bug, schedule, resident)
    assert result.returncode == status, result.stderr
    assert re.search(text, result.stderr), result.stderr


def test_every_bug_of_the_self_test_is_tested():
    names = re.findall(r'^      \{"(\w+)", ', SOURCE.read_text(), re.M)
    assert set(names) == {"correct", *(bug for bug, *_ in BUGS)}
