"""The table of runs of compare_localization.py, the tables of means, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.csv_table import flattened, nested, read_rows, write_rows
from common.files import naming

from localization.comparison import drawn_for, shown_of
from localization.drawn_lesions import CLASSES
from localization.rows import DRAWN, LOSSES, STRIDE, T_P, TABLE, Row, Run, rows_of, settings_of
from sgl_ops import localization as bx

Found = dict[Run, dict[str, Any]]


def collect(path: Path) -> Found:
    """All runs of the table ``path``, in the order of the rows; rows with other settings last.

    Raises:
        ValueError: a run has other settings than the command uses now.
    """
    found = {}
    for cells in read_rows(path):
        content = nested(cells)
        (row,) = rows_of(content["row"])
        run, expected = Run(row, content["seed"]), settings_of(row)
        stored = content["settings"]
        other = [key for key in {**expected, **stored} if stored.get(key) != expected.get(key)]
        if other:
            was, now = ({key: settings.get(key) for key in other} for settings in (stored, expected))
            raise ValueError(f"out: {path}: {row.name}, seed {run.seed} was computed with {was}, not {now}")
        found[run] = content
    return {run: found[run] for run in sorted(found, key=order_of)}


def order_of(run: Run) -> tuple[Any, ...]:
    return (not run.row.plain, TABLE.index(run.row._replace(changes=())), run)


def add_run(content: dict[str, Any], path: Path) -> None:
    """Adds a run to the table ``path``, in the order of the rows.

    Raises:
        OSError: it cannot be written.
    """

    def order(cells: dict[str, str]) -> tuple[Any, ...]:
        (row,) = rows_of(cells["row"])
        return order_of(Run(row, int(cells["seed"])))

    write_rows(sorted([*read_rows(path), flattened(content)], key=order), path)


def numbers_of(result: dict[str, Any], threshold: float) -> dict[str, float]:
    """The columns of the tables at T_p ``threshold``; accuracies are means over the classes."""
    at = result[f"{threshold:g}"]
    numbers = {"auc": result["auc"]["mean"]}
    numbers |= {f"accuracy_{t}": accuracy["mean"] for t, accuracy in at["accuracy"].items()}
    numbers |= {name: at[name] for name in ("area_median", "area_mean", "no_box")}
    return numbers | {f"max_box_{t}": accuracy["mean"] for t, accuracy in result["max_box"].items()}


def over_seeds(found: Found, row: Row, threshold: float, base: Row | None = None) -> dict[str, list[float]]:
    """The columns with one value per seed. With ``base``, the differences from ``base`` with the same seeds."""
    columns: dict[str, list[float]] = {}
    for seed in sorted(run.seed for run in found if run.row == row):
        numbers = numbers_of(found[Run(row, seed)]["result"], threshold)
        if base is not None:
            if Run(base, seed) not in found:
                continue
            other = numbers_of(found[Run(base, seed)]["result"], threshold)
            numbers = {name: value - other[name] for name, value in numbers.items()}
        for name, value in numbers.items():
            columns.setdefault(name, []).append(value)
    return columns


def cell(values: Sequence[float], form: str = ".2f") -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def label_of(row: Row) -> str:
    return ", ".join([LOSSES[row.loss], *row.changes])


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def tables_of(found: Found) -> str:
    """Tables of means, of accuracies at each T_p, and of differences from the bag loss with the same network and
    images."""
    rows = list(dict.fromkeys(run.row for run in found))
    accuracies = [f"accuracy_{t:g}" for t in bx.T_IOU]
    lines = []
    for row in rows:
        columns = over_seeds(found, row, T_P[0])
        line = [row.network, row.pooling, label_of(row), str(len(columns["auc"])), f"{np.mean(columns['auc']):.3f}"]
        for threshold in T_P:
            columns = over_seeds(found, row, threshold)
            means = " ".join(f"{np.mean(columns[name]):.2f}" for name in accuracies)
            line.append(f"{means}, {np.mean(columns['area_median']):.1f}x")
        lines.append(line)
    head = ["field", "pooling", "loss", "seeds", "AUC", *(f"T_p {threshold:g}" for threshold in T_P)]
    over = " / ".join(f"{t:g}" for t in bx.T_IOU)
    parts = [f"Means over the seeds: accuracy at IoU {over}; median of found over true area\n\n" + table(head, lines)]
    for threshold in T_P:
        head = ["field", "pooling", "loss", "seeds", *(["AUC"] if threshold == T_P[0] else []),
                *(f"IoU > {t:g}" for t in bx.T_IOU), "area"]  # fmt: skip
        if threshold == T_P[0]:
            head.append("MaxBoxAcc 0.5")
        lines = []
        for row in rows:
            columns = over_seeds(found, row, threshold)
            line = [row.network, row.pooling, label_of(row), str(len(columns["auc"]))]
            line += [cell(columns["auc"], ".3f")] if threshold == T_P[0] else []
            line += [*(cell(columns[name]) for name in accuracies), f"{np.mean(columns['area_median']):.1f}x"]
            lines.append(line + ([cell(columns["max_box_0.5"])] if threshold == T_P[0] else []))
        note = "; MaxBoxAcc: every map scaled to 0 ... 1, at the threshold that is best for these boxes"
        parts.append(f"T_p {threshold:g}{note if threshold == T_P[0] else ''}\n\n" + table(head, lines))
    lines = []
    for row in rows:
        base = row._replace(loss="bag", changes=())
        for threshold in T_P if row != base else ():
            more = over_seeds(found, row, threshold, base)
            if more:
                line = [row.network, row.pooling, label_of(row), f"{threshold:g}", str(len(more["auc"]))]
                lines.append([*line, cell(more["auc"], "+.3f"), *(cell(more[name], "+.2f") for name in accuracies)])
    head = ["field", "pooling", "loss", "T_p", "seeds", "AUC", *(f"IoU > {t:g}" for t in bx.T_IOU)]
    parts.append("More than the bag loss alone, seed by seed\n\n" + table(head, lines))
    return "\n".join([*parts, *best_of(found)])


def best_of(found: Found) -> list[str]:
    """The highest mean at IoU 0.5 of the bag loss and of all rows, at any T_p, of rows with the most seeds.

    The test boxes choose both rows, and there are more rows with SGL. So the two values are not a fair comparison.
    """
    count = max(sum(run.row == other.row for other in found) for run in found)
    lines = []
    kinds: dict[str, Callable[[Row], bool]] = {
        "bag loss alone": lambda row: row.loss == "bag",
        "self-guided": lambda row: row.loss != "bag",
    }
    for name, belongs in kinds.items():
        points = [
            (float(np.mean(columns["accuracy_0.5"])), row.name, threshold)
            for row in {run.row for run in found}
            for threshold in T_P
            if belongs(row) and len((columns := over_seeds(found, row, threshold))["auc"]) == count
        ]
        if points:
            value, row_name, threshold = max(points)
            lines.append(f"Best {name} at IoU > 0.5: {value:.3f}, {row_name} at T_p {threshold:g} ({count} seeds).")
    return lines


def draw_maps(found: Found, path: Path) -> None:
    """Draws the first test image of each class, and the maps of bag loss and SGL for a small and a large field."""
    from bags.plots import FOUND, TRUE
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    seeds = sorted(run.seed for run in found if run.row == DRAWN[0])
    if not seeds:
        return
    seed = seeds[0]
    rows = [row for row in DRAWN if Run(row, seed) in found]
    settings = settings_of(rows[0])
    data = drawn_for(settings, seed, "test")
    shown = shown_of(data)
    figure = Figure(figsize=(2.0 * (1 + len(rows)), 2.0 * len(shown) + 0.9), dpi=60, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), 1 + len(rows), squeeze=False)
    size = data.images.shape[1:]
    for number, (image, c) in enumerate(shown):
        maps = [np.array(found[Run(row, seed)]["shown"][number]) / 1000 for row in rows]
        for axes, row, heatmap in zip(grid[number], [None, *rows], [None, *maps], strict=True):
            boxes = [(data.boxes[image, c], TRUE)]
            axes.imshow(data.images[image], cmap="gray", vmin=0, vmax=255)
            if row is not None:
                mode, side = settings["upsampling"], settings["morphology"]
                first = settings["cell_centre"] / STRIDE
                axes.imshow(bx.upsample(heatmap, size, mode, first), cmap="magma", vmin=0, vmax=1, alpha=0.75)
                boxes.append((bx.heatmap_to_box(heatmap, size, T_P[0], mode, side, first), FOUND))
            for (x, y, w, h), colour in boxes:
                if not math.isnan(x):
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, lw=2, ec=colour))
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title("test image" if row is None else f"{row.network} px, {LOSSES[row.loss]}", fontsize=9)
        grid[number, 0].set_ylabel(CLASSES[c], fontsize=9)
    figure.legend(
        handles=[
            Patch(fill=False, ec=TRUE, lw=2, label="true box"),
            Patch(fill=False, ec=FOUND, lw=2, label=f"found at T_p = {T_P[0]:g}"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    with naming(path):
        figure.savefig(path)
