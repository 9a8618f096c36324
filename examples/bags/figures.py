"""The figures of bags as pictures, from the results of runs."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from common.files import naming

from bags.figure_runs import METHODS, QUEUE, Run

X_AXIS = dict.fromkeys((*QUEUE, "start"), ("bags", "training bags")) | {"6": ("positives", "positive instances")}
LABELS_5A = {"sgl": "+ weighting (SGL)"}
#: Colour and mark of each method. Methods of one figure differ in both, for readers of any colour vision.
STYLES = {
    "sgl": ("#d55e00", "o"), "max": ("#0072b2", "s"), "mean": ("#009e73", "^"), "mmm": ("#cc79a7", "D"),
    "bil": ("#e69f00", "v"), "sgl_plain": ("#999999", "X"), "sgl_rescaled": ("#56b4e9", "P"),
    "topk": ("#000000", "P"), "mmm_authors": ("#7f3f66", "d"), "bil_authors": ("#7a5200", "<"),
    "falling_k": ("#009e73", "^"), "sgl_falling_k": ("#cc79a7", "D"),
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
    """Draws one row per metric and one column per size.

    Lines are means, and vertical lines go from the worst to the best seed. Points of one seed have an open mark. A line
    does not cross points without a run.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    axis, axis_title = X_AXIS[args.figure]
    sizes = [size for size in args.sizes if any(run.size == size for run in found)]
    figure = Figure(figsize=(3.6 * len(sizes) + 1.6, 2.5 * len(METRICS)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(METRICS), len(sizes), squeeze=False, sharex="col", sharey="row")
    for (row, (metric, title)), (column, size) in itertools.product(enumerate(METRICS.items()), enumerate(sizes)):
        axes = grid[row, column]
        for method in args.methods:
            points = {x: values_of(found, metric, method=method, size=size, **{axis: x}) for x in getattr(args, axis)}
            if not any(points.values()):
                continue
            x = list(points)
            mean, low, high = ([of(v) if v else np.nan for v in points.values()] for of in (np.mean, min, max))
            colour, mark = STYLES[method]
            axes.plot(x, mean, color=colour, marker=mark, ms=5, label=label_of(method, args.figure))
            single = [
                value if len(values) == 1 else np.nan for value, values in zip(mean, points.values(), strict=True)
            ]
            axes.plot(x, single, ls="none", color=colour, marker=mark, ms=5, mfc="white")
            axes.vlines(x, low, high, color=colour, lw=1.2, alpha=0.7)
        axes.grid(alpha=0.3)
        axes.set_xticks(sorted({getattr(run, axis) for run in found}))
        axes.tick_params(axis="x", labelsize=8)
        axes.set(ylim=(0.38 if metric == "auc" else -0.03, 1.03))
        if row == 0:
            axes.set_title(f"bags of {size}")
        if column == 0:
            axes.set_ylabel(title)
        if row == len(METRICS) - 1:
            axes.set_xlabel(axis_title)
    # a column may have fewer methods than others
    lines = {line.get_label(): line for axes in reversed(grid[0]) for line in axes.get_lines()}
    labels = [label for label in (label_of(method, args.figure) for method in args.methods) if label in lines]
    numbers = Counter(run._replace(seed=0) for run in found).values()
    for kind, shown, face in (
        ("one seed", 1 in numbers, "white"), ("several seeds: mean,\nand worst to best", max(numbers) > 1, "0.4")
    ):  # fmt: skip
        if shown:
            lines[kind] = Line2D([], [], color="0.4", marker="o", ms=5, mfc=face, ls="none")
            labels.append(kind)
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
    heading = f"Predictions for single instances, after training with {bags} bags of {size}"
    for path in paths:
        draw_bags(panels, len(contents), heading, path, shown=20)
    return paths
