"""How an image of any size becomes a square, and where its content, its boxes and the cells of its map then are."""

from __future__ import annotations

import numpy as np

#: "square": images have to be square; "pad": the aspect is kept, and the shorter side is padded evenly on both sides;
#: "squeeze": both sides are scaled to the square.
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
    """Which cells (n, h, w) bool of maps of ``grid`` (h, w) have their centre in the content ``frames`` (n, 4).

    The first cell is centred at ``centre`` pixels from the edge, the next one ``step`` further. Content that holds no
    centre has the nearest cell, so that no image is without a cell.
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
