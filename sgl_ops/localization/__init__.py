"""Heat maps to bounding boxes, and metrics of the boxes. Needs scipy: ``pip install "sgl-ops[localization]"``.

Conventions, the same in every function:

- A box is ``x, y, w, h`` in pixels. x points right and y points down from the top left corner of the image. The box is
  half-open: it covers [x, x + w) and [y, y + h). Pixel (row r, column c) is the box (c, r, 1, 1).
- Boxes are returned as float64 arrays (..., 4). Four NaN mean "no box", which is a miss at every threshold.
- Sizes are (height, width) in pixels. Points are x, y in pixels.
- A heat map is an array (h, w) of cells, usually of probabilities. All its values must be finite: every function raises
  a ValueError for NaN and infinite values. Give a cell that must not count (padding) the smallest value of the map.
- A map of k cells along n pixels has one cell every n / k pixels. ``first`` is the centre of the first cell, in cells
  from the edge of the image. With 0.5, the cells divide the image evenly. ``first`` of a ResNet is near 0 (0.5 divided
  by the stride), because its layers pad evenly and take every second pixel, from the first one on. A pixel belongs to
  the cell with the nearest centre.
- Arguments may be NumPy arrays, nested lists or torch tensors on any device. Computation is in float64, so that boxes
  of unsigned integers do not wrap.

>>> from sgl_ops.localization import box_iou, heatmap_to_box, upsample
>>> heatmap = [[0.1, 0.9, 0.2, 0.0],
...            [0.0, 0.6, 0.1, 0.0]]
>>> upsample(heatmap, (2, 8))[0].tolist()        # 2 pixels high, 8 wide: each cell covers 1 x 2 pixels
[0.1, 0.1, 0.9, 0.9, 0.2, 0.2, 0.0, 0.0]
>>> box = heatmap_to_box(heatmap, (16, 32))      # column 1, rows 0 and 1, of cells of 8 x 8 pixels
>>> box.tolist()
[8.0, 0.0, 8.0, 16.0]
>>> float(box_iou(box, [8, 0, 8, 8]))
0.5
"""

from ._accuracy import (
    T_IOU,
    box_iou,
    contains,
    localization_accuracy,
    max_box_accuracy,
    per_class,
    pointing_game,
)
from ._boxes import COMPONENTS, NO_BOX, boxes_by_threshold, heatmap_to_box, heatmap_to_boxes, open_and_close
from ._maps import UPSAMPLING, cell_edges, heatmap_to_point, nearest_cells, seen_cells, upsample
from ._overlay import COLOURS, overlay
from ._references import centre_box, grid_ceiling, mean_boxes, whole_image_box

__all__ = [
    "COLOURS",
    "COMPONENTS",
    "NO_BOX",
    "T_IOU",
    "UPSAMPLING",
    "box_iou",
    "boxes_by_threshold",
    "cell_edges",
    "centre_box",
    "contains",
    "grid_ceiling",
    "heatmap_to_box",
    "heatmap_to_boxes",
    "heatmap_to_point",
    "localization_accuracy",
    "max_box_accuracy",
    "mean_boxes",
    "nearest_cells",
    "open_and_close",
    "overlay",
    "per_class",
    "pointing_game",
    "seen_cells",
    "upsample",
    "whole_image_box",
]
