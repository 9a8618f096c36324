"""The table of runs with different seeds: calculations by hand, and the committed table."""

from __future__ import annotations

import json

import average_cxr
import pytest
from conftest import ROOT

STEPS = ("0.1", "0.3", "0.5", "0.7")


def metrics_of(auc, found, ceiling=0.9, boxes=3):
    accuracy = {t: {"mean": found} for t in STEPS}
    return {
        "auc": {"mean": auc}, "localization": accuracy, "max_box_acc": {t: {"mean": 0.5} for t in STEPS},
        "pointing_game": {"mean": 0.25}, "images": 9, "boxes": boxes,
        "baselines": {
            "centre box": {t: {"mean": 0.125} for t in STEPS},
            "ceiling": {t: {"mean": ceiling} for t in STEPS},
        },
    }  # fmt: skip


def write_runs(folder, **runs):
    for name, metrics in runs.items():
        (folder / f"{name}.json").write_text(json.dumps(metrics))
    return [str(folder / f"{name}.json") for name in runs]


def test_row_has_the_mean_the_minimum_and_the_maximum(tmp_path, capsys):
    files = write_runs(tmp_path, b_0=metrics_of(0.5, 0.2), b_1=metrics_of(0.7, 0.4), a_b_0=metrics_of(0.9, 0.0, 0.8))
    assert average_cxr.main(files) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["a_b", "1", "0.90", "0.00", "0.00", "0.00", "0.50", "0.25"]
    assert rows[3][:4] == ["b", "2", "0.60 (0.50-0.70)", "0.30 (0.20-0.40)"]
    assert [row[0] for row in rows[4:]] == ["centre box", "ceiling", "ceiling"]  # the ceilings of two grids
    assert len({len(row) for row in rows[:4]}) == 1


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"a": metrics_of(0.5, 0.2)}, "NAME_SEED.json"),
        ({"a_0": metrics_of(0.5, 0.2), "a_1": metrics_of(0.5, 0.2, boxes=4)}, "other images or boxes"),
        ({"a_0": metrics_of(None, 0.2)}, "not defined"),
    ],
)
def test_wrong_files_are_an_error(tmp_path, capsys, runs, message):
    assert average_cxr.main(write_runs(tmp_path, **runs)) == 1
    assert message in capsys.readouterr().err


def test_two_files_of_a_run_are_an_error(tmp_path, capsys):
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        files += write_runs(folder, sgl_0=metrics_of(0.5, 0.2))
    assert average_cxr.main(files) == 1
    assert "expected each NAME_SEED once, got sgl_0 twice" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", "PNG", '{"auc": {"mean": 0.5}}'])
def test_error_names_a_file_with_other_contents(tmp_path, capsys, content):
    (tmp_path / "a_0.json").write_text(content)
    assert average_cxr.main([str(tmp_path / "a_0.json")]) == 1
    assert f"{tmp_path / 'a_0.json'}: not a metrics.json" in capsys.readouterr().err


def test_table_of_runs_keeps_every_number(tmp_path, capsys):
    first = metrics_of(0.5, 0.2) | {"auc": {"mean": 0.5, "A/B": None}, "auc_ci": {"mean": [0.25, 0.75]}}
    table = tmp_path / "runs.csv"
    files = write_runs(tmp_path, a_0=first, a_1=metrics_of(0.1234567, 0.4))
    assert average_cxr.main([*files, "--table", str(table)]) == 0
    printed = capsys.readouterr().out
    assert average_cxr.main(["--table", str(table)]) == 0
    assert capsys.readouterr().out == printed
    runs = average_cxr.read_table(table)
    assert runs["a", 1]["auc"] == {"mean": 0.123457}
    assert runs["a", 0]["auc_ci"] == first["auc_ci"]
    assert runs["a", 0]["localization"] == first["localization"]
    # a file replaces the run with the same name and seed; other runs are added
    files = write_runs(tmp_path, a_1=metrics_of(0.9, 0.4), b_0=metrics_of(0.3, 0.1))
    assert average_cxr.main([*files, "--table", str(table)]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[2:4]] == [["a", "2", "0.70 (0.50-0.90)"], ["b", "1", "0.30"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n1\n", "longer or shorter"), ("network,seed\na,0\n", "not a table of runs"), (None, "got")],
)
def test_wrong_or_missing_table_is_an_error(tmp_path, capsys, content, message):
    path = tmp_path / "runs.csv"
    if content:
        path.write_text(content)
    assert average_cxr.main(["--table", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_table_of_the_readme_is_computed_from_the_committed_runs():
    runs = average_cxr.read_table(ROOT / "examples" / "results" / "chestxray14" / "runs.csv")
    assert average_cxr.table_of(runs) in (ROOT / "examples" / "README.md").read_text()
