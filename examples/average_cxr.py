"""A Markdown table of evaluations by ``localize_cxr.py``. One row holds the runs that differ only by their seed.

    python average_cxr.py NAME_0.json NAME_1.json NAME_2.json              metrics.json of runs, renamed NAME_SEED.json
    python average_cxr.py NAME_0.json NAME_1.json --table runs.csv         also adds these runs to a table of runs
    python average_cxr.py --table results/chestxray14/runs.csv             the runs of that table

A cell is the mean over the seeds, with the lowest and the highest value in parentheses. The columns IoU are the
localization accuracy with the gate. MaxBoxAcc and the pointing game use no gate. The last rows are the boxes that need
no network, and the ceiling of the grid. Equal rows are shown once.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.csv_table import flattened, nested, read_rows, write_rows
from common.files import read_json, rounded
from common.options import make_parser, message_of

T_IOU = ("0.1", "0.3", "0.5")
HEADER = ["network", "seeds", "AUC", *(f"IoU > {t}" for t in T_IOU), f"MaxBoxAcc {T_IOU[1]}", "pointing game"]

#: The metrics of a run by (network, seed).
Runs = dict[tuple[str, int], dict[str, Any]]


def values_of(metrics: dict[str, Any]) -> list[float]:
    """The cells of one run: means over the classes. The localization accuracy is that with the gate."""
    return [
        metrics["auc"]["mean"],
        *(metrics["localization"][t]["mean"] for t in T_IOU),
        metrics["max_box_acc"][T_IOU[1]]["mean"],
        metrics["pointing_game"]["mean"],
    ]


def cell(values: Sequence[float]) -> str:
    if any(value is None for value in values):
        raise ValueError("a mean is not defined: no class has boxes, or no class has both positive and negative images")
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def read(path: Path) -> dict[str, Any]:
    try:
        metrics = read_json(path)
        values_of(metrics)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a metrics.json of localize_cxr.py") from None
    return metrics  # type: ignore[no-any-return]


def read_files(paths: Iterable[Path]) -> Runs:
    """The runs of files NAME_SEED.json."""
    runs = {}
    for path in paths:
        name = re.fullmatch(r"(.+)_(\d+)", path.stem)
        if name is None:
            raise ValueError(f"{path}: expected a file NAME_SEED.json")
        run = name[1], int(name[2])
        if run in runs:
            raise ValueError(f"{path}: expected each NAME_SEED once, got {path.stem} twice; rename one of the files")
        runs[run] = read(path)
    return runs


def read_table(path: Path) -> Runs:
    """The runs of a table that ``write_table`` wrote; none if there is no such file."""
    runs = {}
    for cells in read_rows(path):
        try:
            metrics = nested(cells)
            run = str(metrics.pop("network")), int(metrics.pop("seed"))
            values_of(metrics)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: not a table of runs that average_cxr.py wrote") from None
        runs[run] = metrics
    return runs


def write_table(runs: Runs, path: Path) -> None:
    """Writes a CSV with one row per run: network, seed, and every number of its metrics.json."""
    write_rows(
        (flattened({"network": name, "seed": seed} | rounded(runs[name, seed], 6)) for name, seed in sorted(runs)), path
    )


def table_of(runs: Runs) -> str:
    """The Markdown table.

    Raises:
        ValueError: runs have other images or boxes than the first one, or a mean is not defined.
    """
    seeds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(runs):
        seeds[run[0]].append(runs[run])
    first = next(iter(runs.values()))
    for (name, seed), metrics in runs.items():
        if any(metrics[k] != first[k] for k in ("images", "boxes")):
            raise ValueError(f"{name}, seed {seed}: evaluated on other images or boxes than the other runs")
    rows = [
        [name, str(len(found)), *(cell(column) for column in zip(*map(values_of, found), strict=True))]
        for name, found in seeds.items()
    ]
    baselines: dict[tuple[str, ...], None] = {}  # equal rows once: grids of the same size have the same ceiling
    for found in seeds.values():
        for name, of_iou in found[0]["baselines"].items():
            baselines[(name, "", "", *(f"{of_iou[t]['mean']:.2f}" for t in T_IOU), "", "")] = None
    lines = [HEADER, ["---"] * len(HEADER), *rows, *baselines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="NAME_SEED.json", help="metrics.json of a run")
    parser.add_argument("--table", type=Path, help="CSV with one row per run; the runs of the files are added to it")
    args = parser.parse_args(argv)
    try:
        runs = read_table(args.table) if args.table else {}
        runs |= read_files(args.files)
        if not runs:
            raise ValueError(f"expected files NAME_SEED.json or a table of runs, got {args.table or 'neither'}")
        table = table_of(runs)
        if args.files and args.table:
            write_table(runs, args.table)
        print(table)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 1
    # on stderr, because stdout may be redirected to a file
    print("\nnext: the boxes of each run are in its report.html", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
