"""Compares the boxes of SGL and the bag loss for several receptive fields and poolings, on generated images.

    python compare_localization.py                                        the whole table: an hour on one core
    python compare_localization.py --rows 17/max --seeds 1                two minutes: a local network, max pooling
    python compare_localization.py --rows 17/max/sgl 33/max/sgl/lam=3     single rows, one with another setting
    python compare_localization.py --rows local17/max                     a network of train_cxr.py
    python compare_localization.py --draw-only                            draws the tables, trains nothing

A row is named RECEPTIVE FIELD / POOLING / LOSS. The start of a name (17, 17/max, 17/max/bag) selects all rows that
begin with it. The receptive field may also be the name of a local network of images/models.py. The losses are bag (the
bag loss alone), sgl, and mask (SGL with its mask penalty). Settings after the loss replace those of
localization/rows.py. The seed decides the images (localization/drawn_lesions.py), the initial weights and the order of
training. Each run evaluates the network of the last epoch. The thresholds T_p are fixed: boxes do not choose them.

Every run adds one row to OUT/runs.csv. After an interruption, the same command continues. The tables and the picture
show all rows of that file. A row with other settings is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.files import write_text
from common.options import exit_status, make_parser, next_step
from common.workers import compute_in_workers
from localization.rows import FIELDS, SEEDS, T_P, Run, rows_of


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("runs").add_argument
    add(
        "--rows",
        nargs="+",
        default=list(FIELDS),
        metavar="ROW",
        help="rows to compute, as described above (17 33 65: all 27)",
    )
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help=f"seeds of every row ({' '.join(map(str, SEEDS))})")
    add("--workers", type=int, default=1, help="parallel runs, one core each (1)")
    add(
        "--out",
        type=Path,
        default=Path("runs", "localization"),
        help="folder of runs.csv and the tables (runs/localization)",
    )
    add("--draw-only", action="store_true", help="draw the tables without training")
    args = parser.parse_args(argv)
    try:
        args.rows = list(dict.fromkeys(row for name in args.rows for row in rows_of(name)))
    except ValueError as error:
        parser.error(str(error))
    if min(args.seeds) < 0 or args.workers < 1:
        parser.error("--seeds: expected at least 0; --workers: at least 1")
    return args


def compute_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Computes the missing runs in the order of ``runs``."""
    from localization.comparison import compute
    from localization.tables import add_run, collect

    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "runs.csv"
    computed = collect(table)
    missing = [run for run in runs if run not in computed]
    print(f"{len(runs)} runs, {len(missing)} of them to compute, {args.workers} at once, into {args.out}/", flush=True)
    if not missing:
        return
    for number, (run, content) in enumerate(compute_in_workers(compute, missing, args.workers), 1):
        add_run(content, table)
        result = content["result"]
        accuracies = (f"T_p {t:g}: " + " ".join(f"{v['mean']:.2f}" for v in result[f"{t:g}"]["accuracy"].values())
                      + f", {result[f'{t:g}']['area_median']:.1f}x" for t in T_P)  # fmt: skip
        print(f"{number}/{len(missing)} {run.row.name}, seed {run.seed}, {content['seconds']:.0f} s: "
              f"AUC {result['auc']['mean']:.3f}; " + "; ".join(accuracies), flush=True)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_status(lambda: compare(args), "stopped; the same command continues")


def compare(args: argparse.Namespace) -> None:
    """Computes the missing runs, and writes the tables and the figure."""
    from localization.tables import collect, draw_maps, tables_of

    collect(args.out / "runs.csv")  # a run with other settings is an error before the first computation
    if not args.draw_only:
        compute_all([Run(row, seed) for row in args.rows for seed in args.seeds], args)
    found = collect(args.out / "runs.csv")
    if not found:
        raise ValueError(f"out: there is no run in {args.out / 'runs.csv'}")
    table = tables_of(found)
    write_text(table + "\n", args.out / "localization.md")
    draw_maps(found, args.out / "localization.png")
    print(table)
    next_step(f"open {args.out / 'localization.png'}")


if __name__ == "__main__":
    sys.exit(main())
