"""That the GPU benchmark runs: without a GPU, on tiny shapes, which tells nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

import sgl_ops


def test_bench_gpu_runs(tmp_path):
    script, out = ROOT / "benchmarks" / "bench_gpu.py", tmp_path / "out.json"
    result = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--smoke", "--json", str(out)],
        env={**os.environ, "PYTHONPATH": str(Path(sgl_ops.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Targets" in result.stdout
    report = json.loads(out.read_text())
    assert len(report["results"]) == 8  # two cases, dtypes and shares of positive labels each
    for row in report["results"]:
        assert set(row["ratio"]) == {"eager", "compiled", "reference", "bce", "compiled bce", "copy"}, row["failed"]
        assert all(value > 0 for value in row["median_us"].values())
    # none of the targets is met or missed by a CPU
    assert [target["holds"] for target in report["targets"]] == [None] * 5
