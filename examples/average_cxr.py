"""A Markdown table of several evaluations of ``localize_cxr.py``, the runs that differ only by their seed in one row.

    python average_cxr.py results/chestxray14/*.json        metrics.json of every run, named NAME_SEED.json

A cell is the mean over the seeds, and the worst and the best of them; localization is behind the gate, MaxBoxAcc and
pointing game are without. What needs no network, and the ceiling of the grid, once where they are the same.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.options import make_parser

T_IOU = ("0.1", "0.3", "0.5")
HEADER = ["network", "seeds", "AUC", *(f"IoU > {t}" for t in T_IOU), f"MaxBoxAcc {T_IOU[1]}", "pointing game"]


def values_of(metrics: dict[str, Any]) -> list[float]:
    """What a row shows of one run: means over the classes; the localization is that behind the gate."""
    return [
        metrics["auc"]["mean"],
        *(metrics["localization"][t]["mean"] for t in T_IOU),
        metrics["max_box_acc"][T_IOU[1]]["mean"],
        metrics["pointing_game"]["mean"],
    ]


def cell(values: Sequence[float]) -> str:
    if any(value is None for value in values):
        raise ValueError("a mean is not defined: no class has boxes, or images of both kinds")
    mean = f"{sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def read(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text())
        values_of(metrics)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a metrics.json of localize_cxr.py") from None
    return metrics  # type: ignore[no-any-return]


def table_of(paths: Iterable[Path]) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(paths):
        name = re.fullmatch(r"(.+)_\d+", path.stem)
        if name is None:
            raise ValueError(f"{path}: expected a file NAME_SEED.json")
        runs[name[1]].append(read(path))
    first = next(iter(runs.values()))[0]
    for name, found in runs.items():
        for metrics in found:
            if any(metrics[k] != first[k] for k in ("images", "boxes")):
                raise ValueError(f"{name}: of other images or boxes than the rest")
    rows = [
        [name, str(len(found)), *(cell(column) for column in zip(*map(values_of, found), strict=True))]
        for name, found in sorted(runs.items())
    ]
    baselines: dict[tuple[str, ...], None] = {}  # once where the grids are alike
    for found in runs.values():
        for name, of_iou in found[0]["baselines"].items():
            baselines[(name, "", "", *(f"{of_iou[t]['mean']:.2f}" for t in T_IOU), "", "")] = None
    lines = [HEADER, ["---"] * len(HEADER), *rows, *baselines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="NAME_SEED.json", help="metrics.json of a run")
    args = parser.parse_args(argv)
    try:
        print(table_of(args.files))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # to stderr: the table may go into a file
    print("\nnext: the boxes of each run are in its report.html", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
