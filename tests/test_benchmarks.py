"""The benchmarks run: on tiny shapes, and bench_gpu.py on the CPU. These tests measure no speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_kernel

import sgl_ops

sys.path.append(str(ROOT / "benchmarks"))


@pytest.mark.integration
@needs_kernel
def test_bench_cpu_writes_tables_and_a_plot(tmp_path, monkeypatch, capsys):
    import bench_cpu
    import measuring

    tiny = ((4, 2, 16), 0.5, "tiny")
    monkeypatch.setattr(bench_cpu, "CASES", [tiny])
    monkeypatch.setattr(bench_cpu, "SIZES", [(2, 3, 8), (2, 3, 32)])
    monkeypatch.setattr(measuring.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    monkeypatch.setattr(measuring.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(measuring, "WIDE_SPREAD", -1.0)
    for arguments in (
        ["--json", str(tmp_path / "table.json")],
        ["--plot", str(tmp_path / "sizes.png")],
        ["--where", "--json", str(tmp_path / "where.json")],
        ["--layouts", "--json", str(tmp_path / "layouts.json")],
    ):
        monkeypatch.setattr(sys, "argv", ["bench_cpu.py", "--quick", *arguments])
        bench_cpu.main()
    (row,) = json.loads((tmp_path / "table.json").read_text())["results"]
    assert set(row["ratio"]) == {"eager", "bce"}
    printed = capsys.readouterr().out.splitlines()
    assert "warning: the machine is busy: load average 9.0 on 2 cores before the measurement" in printed
    head, cells = (line.split() for line in printed[2:4])
    assert head[5:7] == ["us", "IQR"]
    # The shape fills three of the columns. "-" stands for the time of the loss that was not compiled.
    assert cells[4:6] == [str(row["median_us"]["sgl_ops"]), str(row["iqr_us"]["sgl_ops"])]
    assert cells[7] == "-"
    assert printed[4].startswith("warning: (4, 2, 16), 50%: wide interquartile range")
    assert (tmp_path / "sizes.png").stat().st_size > 10_000
    (row,) = json.loads((tmp_path / "where.json").read_text())["results"]
    parts = row["median_us"]
    assert parts["step"] == pytest.approx(sum(parts[name] for name in ("forward", "backward", "autograd", "rest")))


def test_busy_machine_or_wide_spread_warns_and_idle_machine_does_not(monkeypatch, capsys):
    import measuring

    monkeypatch.setattr(measuring.os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    monkeypatch.setattr(measuring.os, "cpu_count", lambda: 2)
    measuring.warn_of_load()
    measuring.warn_of_spread({"ours": 100.0, "bce": 50.0}, {"ours": 9.0, "bce": 4.0}, "row")
    assert capsys.readouterr().out == ""
    measuring.warn_of_spread({"ours": 100.0, "bce": 50.0}, {"ours": 9.0, "bce": 10.0}, "row")
    assert capsys.readouterr().out.endswith(": bce 20%\n")


def test_count_instructions_prints_the_difference_of_two_processes(monkeypatch, capsys):
    import count_instructions

    def valgrind(command, **options):
        assert command[0] == "valgrind" and options["env"]["OMP_NUM_THREADS"] == "1"
        total = 7_000_000 + 6_400 * int(command[command.index("--run") + 1])
        return subprocess.CompletedProcess(command, 0, "", f"==1== I   refs:      {total:,}\n")

    monkeypatch.setattr(count_instructions.subprocess, "run", valgrind)
    monkeypatch.setattr(sys, "argv", ["count_instructions.py", "--shape", "4,2,9", "--steps", "2", "12"])
    count_instructions.main()
    assert capsys.readouterr().out == ("sgl, max, (4,2,9): 6,400 instructions a step, 800 for each (bag, class) pair\n")
    failed = subprocess.CompletedProcess([], 1, "", "valgrind: no such tool")
    monkeypatch.setattr(count_instructions.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no such tool"):
        count_instructions.main()


@needs_kernel
def test_count_instructions_executes_steps(monkeypatch):
    import count_instructions
    import measuring

    steps = []
    monkeypatch.setattr(measuring, "step", lambda loss, logits, targets: steps.append((loss, logits.shape)))
    threads = torch.get_num_threads()
    arguments = ["--loss", "bag", "--pooling", "mean", "--shape", "4,2,9", "--run", "3"]
    monkeypatch.setattr(sys, "argv", ["count_instructions.py", *arguments])
    count_instructions.main()
    torch.set_num_threads(threads)
    assert len(steps) == 3
    assert isinstance(steps[0][0], sgl_ops.BagLoss) and steps[0][1] == (4, 2, 9)


@needs_kernel
def test_bench_poolings_measures_every_pooling(monkeypatch, capsys):
    import bench_poolings

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench_poolings.py", "--rounds", "2", "--shapes", "3,2,20"])
    bench_poolings.main()
    torch.set_num_threads(threads)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == list(bench_poolings.POOLINGS)
    # Logits below 0: the naive formula of noisy_or is inexact where P rounds to 1.
    logits, targets = torch.randn(3, 2, 20) - 4, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for name, naive in bench_poolings.NAIVE.items():
        torch.testing.assert_close(naive(logits, targets), sgl_ops.BagLoss(name)(logits, targets))


def test_profile_names_the_parts_of_a_training_step(tmp_path, capsys):
    from training_step import profile_training_step

    profile_training_step(tmp_path, steps=2)
    for name, operator in (("sgl", "sgl_ops::sgl_forward"), ("bce", "aten::binary_cross_entropy_with_logits")):
        trace = json.loads((tmp_path / f"{name}.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"network, forward", "loss, forward", "backward", "optimizer"} <= names
        if name == "bce" or "cpu" in sgl_ops._fused.DEVICES:
            assert operator in names
    assert "Self CPU" in capsys.readouterr().out


@pytest.mark.integration
def test_bench_gpu_runs_on_the_cpu(tmp_path):
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
    assert len(report["results"]) == 8  # 2 cases x 2 dtypes x 2 shares of positive labels
    for row in report["results"]:
        assert set(row["ratio"]) == {"eager", "compiled", "reference", "bce", "compiled bce", "copy"}, row["failed"]
        assert all(value > 0 for value in row["median_us"].values())
    # the targets apply to a GPU only
    assert [target["holds"] for target in report["targets"]] == [None] * 5
