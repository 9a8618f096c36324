"""Boxes from heat maps: the names under which the examples use ``sgl_ops.localization``."""

# ruff: noqa: F401

from sgl_ops.localization import (
    NO_BOX,
    T_IOU,
    UPSAMPLING,
    boxes_by_threshold,
    centre_box,
    contains,
    grid_ceiling,
    heatmap_to_box,
    localization_accuracy,
    max_box_accuracy,
    mean_boxes,
    per_class,
    seen_cells,
    upsample,
)
from sgl_ops.localization import box_iou as iou
from sgl_ops.localization import heatmap_to_point as peak_of
from sgl_ops.localization import whole_image_box as whole_image
