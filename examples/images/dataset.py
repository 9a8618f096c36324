"""A data set of images: names, labels, patients, split and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Index(NamedTuple):
    """What is known of n images.

    ``names`` as in the tables; ``labels`` (n, 14) float32, columns as in CLASSES, all 0 where there is no finding;
    ``patients`` (n,); ``test`` (n,) bool, those of the official test list; ``paths`` of the files; ``boxes`` by name:
    (class number, x, y, width, height), x and y of the upper left corner, in pixels of the BOX_SIDE x BOX_SIDE image;
    ``sizes`` (n, 2), width and height of the radiograph before it was made 1024x1024 (boxes do not refer to it);
    ``missing``: names that the tables have and the disk has not.
    """

    names: list[str]
    labels: np.ndarray
    patients: np.ndarray
    test: np.ndarray
    paths: list[Path]
    boxes: dict[str, list[tuple[int, float, float, float, float]]]
    sizes: np.ndarray
    missing: list[str]
