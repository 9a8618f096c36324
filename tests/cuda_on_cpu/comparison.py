"""Runs cases with the program of compare.cpp under a sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from build_emulated import ROOT, build_comparison
from cases import Case

SANITIZERS = {
    "none": [],
    # no checks for null: AddressSanitizer also reports accesses at address 0, and the checks would take a third of the
    # compile time
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}


class Comparison:
    """A process that runs cases until one fails. The test is skipped if the sanitizer is not available.

    Args:
        folder: a new folder for the reports of the sanitizer.
        name: a key of SANITIZERS.
        root: the folder of the kernels: the checkout, or a changed copy of it.
        environment: additional environment variables of the process.
    """

    def __init__(self, folder: Path, name: str, root: Path = ROOT, environment: Mapping[str, str] | None = None):
        folder.mkdir()
        sanitizer = SANITIZERS[name]
        trial = folder / "nothing.cpp"
        trial.write_text("int main() {}\n")
        for command in (["g++", *sanitizer, str(trial), "-o", str(folder / "nothing")], [str(folder / "nothing")]):
            if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip(f"g++ cannot compile programs that run here with {sanitizer}")
        self.program = build_comparison(sanitizer, root)
        self.reports = folder / "reports"  # standard error of the process
        # only PATH: the environment of the tests might contain options for sanitizers
        self.environment = {"PATH": "/usr/bin:/bin", "TSAN_OPTIONS": "halt_on_error=1", **(environment or {})}
        self.process: subprocess.Popen[str] | None = None
        self.failed: Case | None = None  # the last failing case

    def check(self, case: Case) -> None:
        """Runs a case. Raises AssertionError with the messages of the program, the emulator and the sanitizer."""
        if self.process is None:
            with open(self.reports, "w") as reports:
                self.process = subprocess.Popen(
                    [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=reports, text=True,
                    env=self.environment,
                )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        watchdog = threading.Timer(120, self.process.kill)
        watchdog.start()
        print(case.line(), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        watchdog.cancel()
        if answer != "ok\n":
            self.failed = case
            status = self.close()
            raise AssertionError(f"{answer}{self.reports.read_text()}exit status {status}, case: {case.line()}")

    def close(self) -> int:
        """Ends the process. Returns its exit status."""
        if self.process is None:
            return 0
        self.process.communicate(timeout=60)
        status, self.process = self.process.returncode, None
        return status
