"""Converts images of any size to squares, and gives the positions of content, boxes and map cells in the square."""

from __future__ import annotations

import numpy as np

#: "square": images must be square; "pad": keep the aspect ratio and pad the shorter side evenly on both sides;
#: "squeeze": scale both sides to the square.
FITS = ("square", "pad", "squeeze")


def frames_of(sizes: np.ndarray, side: int, fit: str) -> np.ndarray:
    """The content (n, 4), x, y, width, height in whole pixels, of images of ``sizes`` (n, 2) in a square of ``side``.

    The content is never empty.
    """
    sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
    if fit != "pad":
        return np.tile(np.array([0, 0, side, side]), (len(sizes), 1))
    content = np.maximum(np.rint(side * sizes / sizes.max(1, keepdims=True)), 1).astype(int)
    return np.concatenate([(side - content) // 2, content], axis=1)


def to_square(boxes: np.ndarray, sizes: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) of images of ``sizes`` (..., 2), in the square where the content of the images is ``frames``."""
    scale = frames[..., 2:] / sizes
    return np.concatenate([boxes[..., :2] * scale + frames[..., :2], boxes[..., 2:] * scale], axis=-1)


def to_image(boxes: np.ndarray, sizes: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The inverse of ``to_square``."""
    scale = sizes / frames[..., 2:]
    return np.concatenate([(boxes[..., :2] - frames[..., :2]) * scale, boxes[..., 2:] * scale], axis=-1)


def clip_boxes(boxes: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The part (..., 4) of the boxes that lies in the content; four NaN stay."""
    low = np.maximum(boxes[..., :2], frames[..., :2])
    high = np.minimum(boxes[..., :2] + boxes[..., 2:], frames[..., :2] + frames[..., 2:])
    return np.concatenate([low, high - low], axis=-1)


def cell_mask(frames: np.ndarray, grid: tuple[int, int], centre: float, step: float) -> np.ndarray:
    """Whether the cells of maps of ``grid`` (h, w) have their centre in the content ``frames`` (n, 4): (n, h, w) bool.

    The first cell is centred at ``centre`` pixels from the edge, the next one ``step`` pixels further. If the content
    contains no centre, it gets the nearest cell, so that every image has a cell.
    """
    inside = []
    for axis, count in ((1, grid[0]), (0, grid[1])):
        centres = centre + step * np.arange(count)
        low, length = frames[:, axis, None], frames[:, axis + 2, None]
        within = (centres >= low) & (centres < low + length)
        nearest = np.abs(centres - (low + length / 2)).argmin(1)
        none = ~within.any(1)
        within[none, nearest[none]] = True
        inside.append(within)
    return inside[0][:, :, None] & inside[1][:, None, :]
