"""A heat map as a transparent layer of colour."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ._maps import Size, Values, to_array, upsample

#: Colours of the values 0 ... 1, RGB (5, 3): blue, light blue, green, light green. Lighter is more, also without colour
#: vision. They differ from the pink and violet of stained cells, and from grey images.
COLOURS = np.array([(24, 32, 160), (0, 104, 224), (0, 180, 232), (40, 230, 170), (190, 255, 70)], np.uint8)


def overlay(
    heatmap: Values,
    size: Size,
    mode: str = "nearest",
    first: float = 0.5,
    *,
    limits: tuple[float, float] | None = (0.0, 1.0),
    opacity: float = 0.6,
    colours: Values = COLOURS,
) -> npt.NDArray[np.uint8]:
    """The map as an RGBA layer, uint8 (height, width, 4), to be drawn over an image of ``size``.

    The opacity of a pixel is proportional to its value, q = (p - low) / (high - low) clipped to 0 ... 1:

        alpha = 255 * opacity * q

    So the tint is weak where the class is improbable.

    Args:
        heatmap: (h, w), finite, usually probabilities.
        size: (height, width) of the layer in pixels.
        mode: "nearest" or "bilinear", as in ``upsample``.
        first: centre of the first cell, in cells from the edge of the image.
        limits: low and high. None: the smallest and the largest value of the layer; then a constant map is transparent.
        opacity: the opacity of q = 1, from 0 to 1.
        colours: (n, 3) uint8 RGB, n >= 2, of q from 0 to 1 in equal steps, interpolated.

    Raises:
        ValueError: an argument is not as described.

    >>> layer = overlay([[0.0, 1.0]], (1, 2))
    >>> layer[0, :, 3].tolist()
    [0, 153]
    """
    image = upsample(heatmap, size, mode, first)
    low, high = (float(image.min()), float(image.max())) if limits is None else limits
    if limits is not None and not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"limits: expected two finite numbers, low < high, got {limits}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    table = to_array(colours)
    if table.ndim != 2 or table.shape[1] != 3 or len(table) < 2 or table.dtype != np.uint8:
        raise ValueError(f"colours: expected uint8 (n, 3) with n >= 2, got {table.dtype} {table.shape}")
    share = np.clip((image - low) / ((high - low) or 1.0), 0, 1)
    steps = np.linspace(0, 1, len(table))
    channels = [np.interp(share, steps, table[:, c]) for c in range(3)]
    return np.stack([*channels, 255 * opacity * share], axis=-1).round().astype(np.uint8)
