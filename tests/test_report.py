"""``python -m sgl_ops``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_kernel

import sgl_ops
from sgl_ops import __main__ as report
from sgl_ops import _fused


def test_report_runs_as_a_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(sgl_ops.__file__).parents[1])}
    command = [sys.executable, "-m", "sgl_ops"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"torch     {torch.__version__}" in result.stdout
    if _fused.DEVICES:
        assert f"kernels for {torch.ops.sgl_ops.cpu_level()}" in result.stdout
        assert "self-test cpu: error" in result.stdout
    else:
        assert "not loaded" in result.stdout


@pytest.mark.parametrize("source_tree", [True, False])
def test_report_in_a_source_tree_without_the_extension(monkeypatch, tmp_path, source_tree):
    monkeypatch.setattr(_fused, "DEVICES", frozenset())
    monkeypatch.setattr(report, "__file__", str((ROOT if source_tree else tmp_path) / "sgl_ops" / "__main__.py"))
    assert ("in another folder" in "\n".join(report.about())) == source_tree


@needs_kernel
def test_wrong_kernel_is_reported(monkeypatch, capsys):
    right = _fused._backward
    monkeypatch.setattr(_fused, "_backward", lambda *arguments: right(*arguments) * 1.0001)
    assert report.main() == 1
    assert "WRONG" in capsys.readouterr().out


@needs_kernel
def test_failing_kernel_is_reported(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(_fused, "_forward", fails)
    assert report.main() == 1
    assert "FAILED: no kernel image" in capsys.readouterr().out


def test_report_without_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(_fused, "DEVICES", frozenset())
    monkeypatch.setattr(_fused, "REASON", "no such file")
    assert report.main() == 0
    output = capsys.readouterr().out
    assert "the reference is used everywhere: no such file" in output
    assert "self-test" not in output


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        ("7.5 8.0 9.0", (8, 6), True),
        ("7.5 8.6", (8, 0), False),
        ("7.5 8.0 9.0", (12, 0), False),
        ("7.5 9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("12.0+PTX", (12, 1), True),
        ("", (9, 0), False),
    ],
)
def test_supported_gpus_are_recognized(compiled, capability, runs):
    assert report.runs_on(compiled, *capability) == runs
