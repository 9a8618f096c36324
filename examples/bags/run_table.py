"""The table of the runs of an experiment: a CSV with one row per run.

A row holds the method, the seed and every setting. It also holds the results of two networks, that of the last epoch
and that of the best epoch on validation. The last columns hold its times, commit, machine and command. Runs with
different settings share a table.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.csv_table import write_rows

from bags.metrics import METRICS
from bags.options import OLDER

Row = dict[str, str]

#: The columns before and after the settings. An empty cell means unknown.
FIRST = ("method", "seed")
LAST = (
    *METRICS, "best_val_epoch", *(f"best_val_{name}" for name in METRICS), "training_loss", "seconds", "cpu_seconds",
    "commit", "machine", "command",
)  # fmt: skip
#: Settings that do not change the network of the last epoch.
WITHOUT_EFFECT = {"val_every"}


def text_of(value: Any) -> str:
    """The text of a cell: a string unchanged, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def row_of_run(content: dict[str, Any]) -> Row:
    """The row of a run's JSON file."""
    run, result = content["run"], content["result"]
    best = result["best_val"]
    values = {"method": run["method"], "seed": run["seed"]} | content["config"]
    values |= {name: round(result["last"][name], 6) for name in METRICS}
    values |= {f"best_val_{name}": round(best[name], 6) for name in METRICS} | {"best_val_epoch": best["epoch"]}
    values |= {name: content[name] for name in LAST if name in content}
    return {name: text_of(value) for name, value in values.items()}


def settings_of(row: Row) -> Row:
    """The settings of a row that decide its result, by name. Settings that an older row lacks have their value then."""
    decided = {name: cell for name, cell in row.items() if name not in (*FIRST, *LAST, *WITHOUT_EFFECT)}
    older = {name: text_of(value) for name, value in OLDER.items()}
    return older | {name: cell for name, cell in decided.items() if cell}


def run_of_row(row: Row) -> dict[str, Any]:
    """The content of the run's JSON file, from its row. Results are numbers, settings are text."""
    content: dict[str, Any] = {
        "config": settings_of(row),
        "result": {
            "last": {name: float(row[name]) for name in METRICS},
            "best_val": {name: float(row[f"best_val_{name}"]) for name in METRICS},
        },
    }
    if row.get("training_loss"):
        content["training_loss"] = float(row["training_loss"])
    return content | {name: row[name] for name in ("commit", "machine", "command") if row.get(name)}


def read_table(path: Path) -> list[Row]:
    """The rows of ``path``; none if there is no such file.

    Raises:
        ValueError: the file has no column of a name in FIRST or METRICS.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (*FIRST, *METRICS) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"table: {path} has no column {', '.join(missing)}")
        return list(reader)


def write_table(rows: Iterable[Row], path: Path) -> None:
    """Writes ``rows`` sorted by settings, method and seed. After a crash, the file is the old or the new one.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    rows = list(rows)
    settings = list(dict.fromkeys(name for row in rows for name in row if name not in (*FIRST, *LAST)))

    def number(cell: str) -> tuple[float, str]:
        try:
            return float(cell), ""
        except ValueError:
            return 0.0, cell

    rows.sort(key=lambda row: [number(row.get(name, "")) for name in ("bag_size", "bags", "method", *settings, "seed")])
    write_rows(rows, path, [*FIRST, *settings, *LAST])


def merged(rows: Iterable[Row], more: Iterable[Row]) -> list[Row]:
    """``rows``, and the rows of ``more`` whose seed and settings are not in ``rows``."""
    all_rows = {}
    for row in (*rows, *more):
        all_rows.setdefault((row["seed"], *sorted(settings_of(row).items())), row)
    return list(all_rows.values())
