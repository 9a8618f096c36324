"""The figure of an evaluation: the first box of each class, with the maps of one or two runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common.drawing import FOUND, OPACITY, TRUE, draw_box
from common.files import naming
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from images.evaluation import Evaluated
from images.pixels import load_image
from images.truth import SQUARE, Truth
from sgl_ops.localization import COLOURS, overlay


def first_of_each_class(truth: Truth) -> list[int]:
    """Indices of the first box of each class. They are not selected by their result."""
    return [
        int(np.flatnonzero(truth.classes == c)[0]) for c in range(len(truth.class_names)) if (truth.classes == c).any()
    ]


def caption_of(run: Evaluated, truth: Truth, k: int) -> str:
    """The caption of box ``k``: the probability of its class in the image, and the IoU."""
    iou = "no box" if np.isnan(run.found[k]).any() else f"IoU {run.overlaps[k]:.2f}"
    return f"p {run.predictions.probability[truth.image[k], truth.classes[k]]:.2f}, {iou}"


def draw(runs: Sequence[Evaluated], truth: Truth, path: Path, upsampling: str) -> None:
    """Draws the first box of each class: the radiograph, and the map of each run over it, as in the paper's Fig. 7."""
    shown, about = first_of_each_class(truth), truth.index.about
    columns = 1 + len(runs)
    pairs = 2 if len(shown) > 4 else 1  # classes per row
    rows = -(-len(shown) // pairs)
    figure = Figure(figsize=(2.4 * columns * pairs, 2.55 * rows + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns * pairs, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, k in enumerate(shown):
        row, pair = divmod(place, pairs)
        i, c = truth.image[k], truth.classes[k]
        picture = load_image(truth.paths[i], 512, about.channels, about.fit)
        for column in range(columns):
            axes = grid[row, pair * columns + column]
            extent = (0, SQUARE, SQUARE, 0)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
            axes.set(xlim=(0, SQUARE), ylim=(SQUARE, 0))
            framed = [(box, TRUE) for box in truth.boxes[k]]
            title = truth.class_names[c]
            if column:
                run = runs[column - 1]
                predictions = run.predictions
                layer = overlay(
                    predictions.maps[k], picture.shape[:2], upsampling, predictions.first, opacity=OPACITY / 100
                )
                axes.imshow(layer, extent=extent, interpolation="nearest")
                framed.append((run.found[k], FOUND))
                title = f"{run.name}\n{caption_of(run, truth, k)}"
            for box, colour in framed:
                draw_box(axes, box, colour)
            axes.set_title(title, fontsize=7.5)
    colours = LinearSegmentedColormap.from_list("map", COLOURS / 255)
    figure.colorbar(ScalarMappable(cmap=colours), ax=grid, shrink=0.5, label="probability of the class")
    frames = [
        Patch(fill=False, ec=colour, lw=2, label=name) for name, colour in (("true box", TRUE), ("found box", FOUND))
    ]
    frames.append(Patch(fill=False, ec="none", label='"no box": no pixel of the map is above T_p'))
    # on one line, the legend is 6 inches wide
    ncols = 3 if figure.get_figwidth() > 7 else 1
    figure.legend(handles=frames, loc="outside lower center", ncols=ncols, frameon=False)
    with naming(path):
        figure.savefig(path)
