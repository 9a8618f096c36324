"""The figures of bags as pictures and as tables, from the results of runs."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from common.csv_table import write_rows
from common.files import naming, write_text

from bags.figure_runs import METHODS, QUEUE, Run

X_AXIS = dict.fromkeys((*QUEUE, "start"), ("bags", "training bags")) | {"6": ("positives", "positive instances")}
LABELS_5A = {"sgl": "+ weighting (SGL)"}
COLOURS = {
    "sgl": "#d55e00", "max": "#0072b2", "mean": "#009e73", "mmm": "#cc79a7", "bil": "#e69f00",
    "sgl_plain": "#999999", "sgl_rescaled": "#56b4e9", "topk": "#000000", "mmm_authors": "#7f3f66",
    "bil_authors": "#7a5200", "falling_k": "#0b5d3b", "sgl_falling_k": "#8b1a1a",
}  # fmt: skip
METRICS = {"auc": "AUC of bags", "iou": "IoU, mean over bags", "iou_pooled": "IoU, pooled over 64 bags"}


def label_of(method: str, figure: str) -> str:
    return LABELS_5A.get(method, METHODS[method][0]) if figure == "5a" else METHODS[method][0]


def values_of(found: dict[Run, dict[str, Any]], metric: str, **point: Any) -> list[float]:
    """The results of the networks of the last epoch, one value per seed."""
    return [
        content["result"]["last"][metric]
        for run, content in found.items()
        if all(getattr(run, name) == value for name, value in point.items())
    ]


def draw(found: dict[Run, dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """Draws one row per metric and one column per size. Lines are means; bands show the worst and the best seed."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis, axis_title = X_AXIS[args.figure]
    sizes = [size for size in args.sizes if any(run.size == size for run in found)]
    figure = Figure(figsize=(3.6 * len(sizes) + 1.6, 2.5 * len(METRICS)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(METRICS), len(sizes), squeeze=False, sharex="col", sharey="row")
    for (row, (metric, title)), (column, size) in itertools.product(enumerate(METRICS.items()), enumerate(sizes)):
        axes = grid[row, column]
        for method in args.methods:
            points = {x: values_of(found, metric, method=method, size=size, **{axis: x}) for x in getattr(args, axis)}
            points = {x: values for x, values in points.items() if values}
            if not points:
                continue
            x = list(points)
            axes.plot(x, [np.mean(v) for v in points.values()], marker="o", ms=4, color=COLOURS[method],
                      label=label_of(method, args.figure))  # fmt: skip
            low, high = ([of(v) for v in points.values()] for of in (min, max))
            axes.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, lw=0)
        axes.grid(alpha=0.3)
        axes.set_xticks(sorted({getattr(run, axis) for run in found}))
        axes.set(ylim=(0.4 if metric == "auc" else 0.0, 1.0))
        if row == 0:
            axes.set_title(f"bags of {size}")
        if column == 0:
            axes.set_ylabel(title)
        if row == len(METRICS) - 1:
            axes.set_xlabel(axis_title)
    # a column may have fewer methods than others
    lines = {line.get_label(): line for axes in reversed(grid[0]) for line in axes.get_lines()}
    labels = [label for label in (label_of(method, args.figure) for method in args.methods) if label in lines]
    figure.legend([lines[label] for label in labels], labels, loc="outside right upper", frameon=False)
    paths = [args.out / f"figure{args.figure}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with naming(path):
            figure.savefig(path)
    return paths


def draw_examples(found: dict[Run, dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """Figure 5b: the first test bags, with the predictions of the methods side by side."""
    import numpy as np

    from bags.experiment import pictures_of
    from bags.instances import load_instances
    from bags.plots import draw_bags

    (size, *_), (bags, *_) = args.sizes, args.bags
    contents = {run.method: content for run, content in found.items() if run[1:4] == (size, bags, 0)}
    if not contents:
        raise ValueError(f"out: {args.out} has no run of {bags} bags of {size} and seed 0")
    if any("shown" not in content for content in contents.values()):
        raise ValueError(f"out: runs in {args.out} do not hold the predictions for single bags; remove these runs")
    images = load_instances(args.data, args.data_dir).test_images
    panels = []
    for number in range(len(next(iter(contents.values()))["shown"])):
        for method, content in contents.items():
            bag = {name: np.array(value) for name, value in content["shown"][number].items()}
            positive = bag["positive"].astype(bool)
            label = "positive" if positive.any() else "negative"
            title = f"{METHODS[method][0]}, test bag {bag['number']}: labelled {label}"
            panels.append((pictures_of(images[bag["index"]]), bag["probability"], positive, title))
    paths = [args.out / f"figure5b.{kind}" for kind in ("png", "svg")]
    heading = f"What the networks say of single instances, after training with {bags} bags of {size}"
    for path in paths:
        draw_bags(panels, len(contents), heading, path, shown=20)
    return paths


def write_tables(found: dict[Run, dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """Means, worst and best of every point, as Markdown and as CSV."""
    import numpy as np

    axis, axis_title = X_AXIS[args.figure]
    lines = [
        f"| bags of | {axis_title} | loss | seeds | " + " | ".join(METRICS.values()) + " |",
        "|---" * (4 + len(METRICS)) + "|",
    ]
    rows = []
    for size, x, method in itertools.product(args.sizes, getattr(args, axis), args.methods):
        cells = []
        row: dict[str, Any] = {"size": size, axis: x, "method": method}
        for metric in METRICS:
            values = values_of(found, metric, size=size, method=method, **{axis: x})
            if not values:
                break
            row |= {"seeds": len(values), metric: np.mean(values)}
            row |= {f"{metric}_worst": min(values), f"{metric}_best": max(values)}
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        else:
            cells = [str(size), str(x), label_of(method, args.figure), str(row["seeds"]), *cells]
            lines.append("| " + " | ".join(cells) + " |")
            rows.append({name: round(float(v), 4) if isinstance(v, float) else v for name, v in row.items()})
    table, numbers = (args.out / f"figure{args.figure}.{kind}" for kind in ("md", "csv"))
    write_text("\n".join(lines) + "\n", table)
    write_rows(rows, numbers)
    return [table, numbers]
