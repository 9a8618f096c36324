"""The options --margin and --threshold for feature maps: the cells that are used, and bags without maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from images.thresholds import Relative

from features.store import Bag, FeatureBags

#: Allows for rounding: coordinates are stored as float32.
ROUNDING = 1e-6


def used_cells(bag: Bag, margin: float) -> np.ndarray:
    """Which instances of a bag are used, (L,) bool: those whose centre is far enough from all edges of the image.

    Args:
        bag: a map with ``coords`` and ``size``. ``margin`` 0 allows every bag.
        margin: least distance of a centre to an edge, as a fraction of the width or height. 0: all are used, also those
            with a centre beyond the image.

    Raises:
        ValueError: the bag is no map of an image.
    """
    if not margin:
        return np.ones(len(bag.features) if bag.coords is None else len(bag.coords), bool)
    if bag.grid is None or bag.size is None or bag.coords is None:
        raise ValueError("margin: expected feature maps of images, got points, slides or other instances")
    height, width = bag.size
    return (np.abs(bag.coords / (width, height) - 0.5) <= 0.5 - margin + ROUNDING).all(1)


def refuse_without_cells(bags: FeatureBags, names: Sequence[str], margin: float) -> None:
    """Raises ValueError if a margin leaves no cell of one of the bags ``names``, or if one of them is no map."""
    for name in names if margin else ():
        if not used_cells(bags.places(name), margin).any():
            raise ValueError(f"margin: no cell of {name} is farther than {margin:g} of the side from all edges")


def refuse_threshold_without_maps(bags: FeatureBags, threshold: float) -> None:
    """Raises ValueError if a threshold for boxes is given, and the bags are no maps, so that they have no boxes."""
    given = threshold != 0.5 or isinstance(threshold, Relative)
    if given and any(bags.shape(name).grid is None for name in bags.names[:1]):
        raise ValueError("threshold: expected feature maps of images, got points, slides or other instances")


def filled(used: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Probabilities (L, C) of all instances, from those of the used ones: 0 where ``used`` (L,) is False."""
    result = np.zeros((len(used), instances.shape[1]), instances.dtype)
    result[used] = instances
    return result
