"""Compares two runs of train_features.py on the same test bags: SGL with the bag loss, other features, other options.

    python compare_features.py --runs runs/sgl runs/bag
    python compare_features.py --runs runs/tuned runs/sgl --out comparison.csv

Shows each metric of the two runs (the mean over the seeds or repeats), the difference, and its 95 % interval: patients
are drawn with replacement, the same in both runs, and the trained networks stay the same. If the interval contains 0,
the difference may be chance. "above", "equal" and "below" count the repeats in which the first run is better, equal or
worse. A run of finetune_features.py is also accepted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import options
from train_features import refuse_below


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser(__doc__)
    parser.add_argument(
        "--runs", type=Path, nargs=2, required=True, metavar="DIR", help="two folders of train_features.py"
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="also write the table to this file")
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="draws of the intervals (1000)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_below(parser, args, {"draws": 1})
    return options.exit_status(lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Prints the table, and writes it into ``args.out``."""
    from common.csv_table import write_rows
    from features.comparison import differences
    from features.opened_run import open_run

    first, second = (open_run(folder) for folder in args.runs)
    rows = differences(first, second, args.draws)
    if not rows:
        raise ValueError("runs: no class has positive and negative test bags, or boxes, in both runs")
    print(f"first: {args.runs[0]}\nsecond: {args.runs[1]}\n")
    width = max(len("class"), *(len(row.label) for row in rows))
    print(f"{'class':{width}}  {'metric':16}  first  second  difference  95 % interval     above equal below")
    for row in rows:
        between = f"{row.low:+.3f} to {row.high:+.3f}"
        print(
            f"{row.label:{width}}  {row.metric:16}  {row.first:.3f}   {row.second:.3f}      {row.difference:+.3f}  "
            f"{between}  {row.above:5} {row.equal:5} {row.below:5}"
        )
    if args.out:
        write_rows(
            [{"class": row.label} | {k: v for k, v in row._asdict().items() if k != "label"} for row in rows], args.out
        )
    options.next_step(f"open {args.runs[0] / 'report.html'} and {args.runs[1] / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
