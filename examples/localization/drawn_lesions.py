"""Generated images with lesions of known boxes. A small network learns them in half a minute on one core.

An image has a textured background and up to four elliptic lesions of four kinds: brighter, darker, and two gratings
that differ only in direction. A small patch is enough to distinguish each kind from the background, but most lesions
are larger than such a patch. So the images test how much of a lesion a network finds, not whether it recognizes the
lesion. An image has at most one lesion per kind, so that each has a box. Lesions do not overlap. The background has
spots that are as bright or dark as faint lesions, but smaller.

make_synthetic_cxr.py has findings that need the whole image, rare findings, and correlated findings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

CLASSES = ("bright", "dark", "stripes", "bars")
#: The frequency of a class in the images, if there is enough space.
RATE = 0.4
#: Half axes, as fractions of the side of the image.
SMALLEST, LARGEST = 1 / 12, 1 / 4
#: Strength of the strongest lesion, in standard deviations of the background. The faintest has half of it.
STRENGTH = {"bright": 3.0, "dark": 3.0, "stripes": 1.3, "bars": 1.3}
PERIOD = 6.0  # of the gratings, in pixels


class Drawn(NamedTuple):
    """Images (n, size, size) uint8, labels (n, C) float32, boxes (n, C, 4) in pixels, NaN where there is no lesion."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def draw(count: int, size: int, seed: int | tuple[int, ...]) -> Drawn:
    rng = np.random.default_rng(seed)
    images = np.empty((count, size, size), np.uint8)
    boxes = np.full((count, len(CLASSES), 4), np.nan)
    for i in range(count):
        image = background(size, rng)
        taken: list[np.ndarray] = []  # x, y, radius of a circle around each lesion
        for c in rng.permutation(len(CLASSES)):
            if rng.random() < RATE:
                half = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST), 2).mean() + rng.uniform(-0.3, 0.3, 2))
                half = np.clip(half, SMALLEST, LARGEST) * size
                centre = place(half, size, taken, rng)
                if centre is not None:
                    taken.append(np.array([*centre, half.max()]))
                    boxes[i, c] = add_lesion(image, CLASSES[c], centre, half, rng)
        images[i] = np.clip(128 + 32 * image, 0, 255)
    return Drawn(images, (~np.isnan(boxes[..., 0])).astype(np.float32), boxes)


def background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A filtered periodic noise (size, size) of clouds, spots and grain, with mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    # Gaussian spots of s pixels. The factor s normalizes their power, so that every size contributes equally.
    power = sum((s * np.exp(-2 * np.square(np.pi * s * frequency))) ** 2 for s in (2, 4, 16)) + 0.05
    image = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * np.sqrt(power), (size, size))
    return (image - image.mean()) / image.std()


def place(half: np.ndarray, size: int, taken: list[np.ndarray], rng: np.random.Generator) -> np.ndarray | None:
    """A centre for an ellipse with half axes ``half`` (x, y) inside the image that touches none of ``taken``."""
    for _ in range(20):
        centre = rng.uniform(half, size - half)
        if all(np.hypot(*(centre - other[:2])) > half.max() + other[2] for other in taken):
            return centre
    return None


def add_lesion(
    image: np.ndarray, name: str, centre: np.ndarray, half: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draws a lesion into ``image``. Returns the box (x, y, w, h) of the area with more than half of its strength."""
    y, x = np.mgrid[: len(image), : len(image)] + 0.5
    outward = np.hypot((x - centre[0]) / half[0], (y - centre[1]) / half[1])
    where = 1 / (1 + np.exp(np.clip((outward - 1) * half.min(), -30, 30)))  # an edge of about two pixels
    look: float | np.ndarray = {"bright": 1.0, "dark": -1.0}.get(name, 0.0)
    if not look:
        angle = rng.uniform(-0.25, 0.25) + (np.pi / 2 if name == "bars" else 0.0)
        phase = 2 * np.pi * rng.random()
        look = np.sqrt(2) * np.sin(2 * np.pi / PERIOD * (y * np.cos(angle) + x * np.sin(angle)) + phase)
    image += STRENGTH[name] * rng.uniform(0.5, 1) * look * where
    (rows, columns), *_ = ndimage.find_objects((where > 0.5).astype(int))
    return columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start
