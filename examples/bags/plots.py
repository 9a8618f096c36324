"""Pictures of bags: every instance with its probability, and frames around true and predicted positives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common.files import naming
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

TRUE, FOUND = "#0072b2", "#e69f00"  # colours that people with any colour vision can distinguish
COLUMNS = 10

Panel = tuple[np.ndarray, np.ndarray, np.ndarray, str]  # images, probability, positive, title


def draw_bag(axes, images: np.ndarray, probability: np.ndarray, positive: np.ndarray, title: str, shown: int) -> None:
    """The ``shown`` most probable of ``images`` (L, height, width[, 3]) in [0, 1], most probable first."""
    order = np.argsort(-probability, kind="stable")[:shown]
    for place, j in enumerate(order):
        row, column = divmod(place, COLUMNS)
        extent = (column + 0.12, column + 0.88, row + 0.72, row + 0.07)
        axes.imshow(images[j], cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
        if positive[j]:
            axes.add_patch(Rectangle((column + 0.04, row + 0.0), 0.92, 0.79, fill=False, lw=2.2, ec=TRUE))
        if probability[j] > 0.5:
            axes.add_patch(Rectangle((column + 0.12, row + 0.07), 0.76, 0.65, fill=False, lw=2.2, ec=FOUND))
        axes.text(column + 0.5, row + 1.0, f"{probability[j]:.2f}", ha="center", va="bottom", fontsize=6.5, color="0.3")
    rows = -(-len(order) // COLUMNS)
    axes.set(xlim=(0, COLUMNS), ylim=(rows, -0.05), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_bags(panels: list[Panel], columns: int, heading: str, path: Path, shown: int = 50) -> None:
    """The panels in ``columns``, under one heading and with a legend."""
    rows = -(-len(panels) // columns)
    lines = max(-(-min(len(panel[1]), shown) // COLUMNS) for panel in panels)
    figure = Figure(figsize=(5.0 * columns, (0.6 * lines + 0.3) * rows + 0.75), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.axis("on")
        draw_bag(axes, *panel, shown)
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
    with naming(path):
        figure.savefig(path)
