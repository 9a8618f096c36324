"""The tables of the figures of bags: all points, the failed runs, and SGL beside the other losses."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common.csv_table import write_rows
from common.files import write_text
from common.metrics import signs

from bags.figure_runs import Run
from bags.figures import METRICS, X_AXIS, label_of, values_of

#: A run failed if the AUC of its bags is below this value.
FAILED_AUC = 0.7
#: The method that the others are compared with, by figure.
COMPARED = {"start": "sgl_falling_k"}

Found = dict[Run, dict[str, Any]]


def write_tables(found: Found, args: argparse.Namespace) -> list[Path]:
    """Writes the tables of a figure.

    The CSV has the mean, the worst and the best seed of every point. The Markdown has these, the failed runs (not in
    Figure 6), the differences between SGL and the other losses, and the points without a run.
    """
    axis, axis_title = X_AXIS[args.figure]
    lines = _head("bags of", axis_title, "loss", "seeds", *METRICS.values())
    rows = []
    missing: dict[tuple[int, str], list[str]] = {}
    for size, x, method in itertools.product(args.sizes, getattr(args, axis), args.methods):
        values = {metric: values_of(found, metric, size=size, method=method, **{axis: x}) for metric in METRICS}
        if not values["auc"]:
            missing.setdefault((size, label_of(method, args.figure)), []).append(str(x))
            continue
        row: dict[str, Any] = {"size": size, axis: x, "method": method, "seeds": len(values["auc"])}
        for metric, of_seeds in values.items():
            row |= {metric: np.mean(of_seeds), f"{metric}_worst": min(of_seeds), f"{metric}_best": max(of_seeds)}
        rows.append({name: round(float(v), 4) if isinstance(v, float) else v for name, v in row.items()})
        cells = (f"{np.mean(v):.3f} ({min(v):.3f}-{max(v):.3f})" for v in values.values())
        lines.append(_row(size, x, label_of(method, args.figure), row["seeds"], *cells))
    if axis == "bags":
        lines += _failures(found, args)
    lines += _comparisons(found, args)
    if missing:
        lines += ["", f"## Not computed ({axis_title})", ""]
        lines += [f"- bags of {size}, {label}: {', '.join(places)}" for (size, label), places in missing.items()]
    table, numbers = (args.out / f"figure{args.figure}.{kind}" for kind in ("md", "csv"))
    write_text("\n".join(lines) + "\n", table)
    write_rows(rows, numbers)
    return [table, numbers]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*titles: str) -> list[str]:
    return [_row(*titles), "|---" * len(titles) + "|"]


def _failures(found: Found, args: argparse.Namespace) -> Iterator[str]:
    """The number of failed runs of each loss, and the failed runs."""
    failed = {run for run, content in found.items() if content["result"]["last"]["auc"] < FAILED_AUC}
    if not failed:
        return
    yield from ("", "## Failed runs", "", f"A run failed if the AUC of its bags is below {FAILED_AUC}.")
    yield "The losses were not run at the same points."
    if any(_without_loss(found[run]) for run in failed):
        yield "The training loss of some older runs was not recorded."
    yield ""
    yield from _head("loss", "failed runs", "runs")
    for method in args.methods:
        runs = [run for run in found if run.method == method]
        if runs:
            yield _row(label_of(method, args.figure), len(failed.intersection(runs)), len(runs))
    yield ""
    yield from _head("loss", "bags of", "training bags", "seed", "AUC", "IoU", "training loss")
    for run in sorted(failed, key=lambda run: (args.methods.index(run.method), run.size, run.bags, run.seed)):
        last = found[run]["result"]["last"]
        loss = "" if _without_loss(found[run]) else f"{found[run]['training_loss']:.3f}"
        numbers = (f"{last['auc']:.3f}", f"{last['iou']:.3f}", loss)
        yield _row(label_of(run.method, args.figure), run.size, run.bags, run.seed, *numbers)


def _without_loss(content: dict[str, Any]) -> bool:
    return content.get("training_loss") is None


def _comparisons(found: Found, args: argparse.Namespace) -> Iterator[str]:
    """The differences between one method and each other one, over the seeds that both have."""
    first = COMPARED.get(args.figure, "sgl")
    axis, axis_title = X_AXIS[args.figure]
    others = [method for method in args.methods if method != first]
    lines = []
    for size, x, other in itertools.product(args.sizes, getattr(args, axis), others):
        pairs = [
            (content["result"]["last"], found[run._replace(method=other)]["result"]["last"])
            for run, content in found.items()
            if run.method == first and (run.size, getattr(run, axis)) == (size, x)
            if run._replace(method=other) in found
        ]
        if pairs:
            cells = []
            for metric in METRICS:
                change = np.array([own[metric] - minus[metric] for own, minus in pairs])
                cells.append(f"{change.mean():+.3f}, {signs(change)}")
            lines.append(_row(size, x, label_of(other, args.figure), len(pairs), *cells))
    if lines:
        label = label_of(first, args.figure)
        yield from ("", f"## {label} minus the other losses", "")
        yield "Each value is the mean over the seeds that both have, and the number of seeds above / equal / below 0."
        yield ""
        yield from _head("bags of", axis_title, f"{label} minus", "seeds", *METRICS.values())
        yield from lines
