"""Colours and frames of boxes and maps over images: visible on pink, grey, dark and light images."""

from __future__ import annotations

import numpy as np

#: Colours of true and of predicted boxes. Each frame has a black edge.
TRUE, FOUND = "#ff4fc3", "#ffe02e"
#: Opacity of a map in percent, where p is 1.
OPACITY = 80


def draw_box(axes, box: np.ndarray, colour: str, width: float = 2.0) -> None:
    """Draws a box (4,) x, y, w, h as a frame of ``colour`` with a black edge. NaN: draws nothing.

    Args:
        axes: of matplotlib.
        width: of the coloured line, in points.
    """
    from matplotlib.patches import Rectangle

    if np.isnan(box).any():
        return
    x, y, w, h = (float(side) for side in box)
    axes.add_patch(Rectangle((x, y), w, h, fill=False, color="black", linewidth=1.8 * width))
    axes.add_patch(Rectangle((x, y), w, h, fill=False, color=colour, linewidth=width))
