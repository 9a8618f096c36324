"""The program of compare.cpp under a sanitizer, asked case by case."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from build_emulated import ROOT, build_comparison
from cases import Case

SANITIZERS = {
    "none": [],
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}


class Comparison:
    """One process for as long as it finds nothing wrong; skips where there is no such sanitizer."""

    def __init__(self, folder: Path, name: str, root: Path = ROOT):
        folder.mkdir()
        sanitizer = SANITIZERS[name]
        trial = folder / "nothing.cpp"
        trial.write_text("int main() {}\n")
        for command in (["g++", *sanitizer, str(trial), "-o", str(folder / "nothing")], [str(folder / "nothing")]):
            if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip(f"no programs can be compiled and run here with {sanitizer}")
        self.program = build_comparison(sanitizer, root)
        self.reports = folder / "reports"  # of sanitizers
        self.process: subprocess.Popen[str] | None = None
        self.failed: Case | None = None  # the last that did

    def check(self, case: Case) -> None:
        """An AssertionError with what the program, its sanitizer or the emulator say is wrong."""
        if self.process is None:
            # nothing of the environment: options for sanitizers would change what they do
            environment = {"PATH": "/usr/bin:/bin", "TSAN_OPTIONS": "halt_on_error=1"}
            with open(self.reports, "w") as reports:
                self.process = subprocess.Popen(
                    [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=reports, text=True,
                    env=environment,
                )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        too_long = threading.Timer(120, self.process.kill)
        too_long.start()
        print(case.line(), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        too_long.cancel()
        if answer != "ok\n":
            self.failed = case
            status = self.close()
            raise AssertionError(f"{answer}{self.reports.read_text()}exit status {status}, asked {case.line()}")

    def close(self) -> int:
        if self.process is None:
            return 0
        self.process.communicate(timeout=60)
        status, self.process = self.process.returncode, None
        return status
