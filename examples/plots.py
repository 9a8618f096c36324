"""Pictures of bags: every instance with its probability, the true and the found positives framed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

TRUE, FOUND = "#0072b2", "#e69f00"  # apart for every kind of colour vision
COLUMNS = 10
SHOWN = 50  # instances of a bag, the most probable ones


def draw_bag(axes, images: np.ndarray, probability: np.ndarray, positive: np.ndarray, title: str) -> None:
    """``images`` (L, height, width[, 3]) in [0, 1], ordered by falling probability, COLUMNS in a row."""
    order = np.argsort(-probability, kind="stable")[:SHOWN]
    for place, j in enumerate(order):
        row, column = divmod(place, COLUMNS)
        extent = (column + 0.11, column + 0.89, row + 0.85, row + 0.07)
        axes.imshow(images[j], cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
        if positive[j]:
            axes.add_patch(Rectangle((column + 0.035, row + 0.01), 0.93, 0.9, fill=False, lw=2.2, ec=TRUE))
        if probability[j] > 0.5:
            axes.add_patch(Rectangle((column + 0.11, row + 0.07), 0.78, 0.78, fill=False, lw=2.2, ec=FOUND))
        axes.text(column + 0.5, row + 1.1, f"{probability[j]:.2f}", ha="center", va="bottom", fontsize=6.5, color="0.3")
    rows = -(-len(order) // COLUMNS)
    axes.set(xlim=(0, COLUMNS), ylim=(rows + 0.15, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_bags(
    panels: list[tuple[np.ndarray, np.ndarray, np.ndarray, str]], columns: int, heading: str, path: Path
) -> None:
    """Panels (images, probability, positive, title) in ``columns``, under one heading and legend."""
    rows = -(-len(panels) // columns)
    lines = max(-(-min(len(panel[1]), SHOWN) // COLUMNS) for panel in panels)
    figure = Figure(figsize=(5.4 * columns, (0.56 * lines + 0.4) * rows + 0.75), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.axis("on")
        draw_bag(axes, *panel)
    figure.suptitle(heading, fontsize=11)
    figure.legend(
        handles=[
            Patch(fill=False, ec=TRUE, lw=2.2, label="truly positive"),
            Patch(fill=False, ec=FOUND, lw=2.2, label="found (p > 0.5)"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)
