"""The labels and true boxes of the test images, and boxes that need no network.

Boxes lie in a square of SQUARE x SQUARE units, into which each image is fitted by ``fit`` of its data set. For square
images, these are pixels of an image of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images.dataset import Index, take
from images.frames import clip_boxes, frames_of, to_image, to_square
from sgl_ops.localization import box_iou, centre_box, grid_ceiling, mean_boxes, whole_image_box

SQUARE = 1024


class Truth(NamedTuple):
    """The n existing images of the test part, and the k pairs of an image and a class with boxes in it.

    ``rows``: (n,), rows of the index. ``index``: all images. ``image``: (k,), the image of each pair, below n.
    ``classes``: (k,), its class. ``boxes``: k arrays (m, 4); if m > 1, the best match counts. ``sizes``: (n, 2), of the
    images. ``frames``: (n, 4), their content in the square.
    """

    index: Index
    rows: np.ndarray
    names: list[str]
    paths: list[Path]
    labels: np.ndarray
    patients: np.ndarray
    sizes: np.ndarray
    frames: np.ndarray
    image: np.ndarray
    classes: np.ndarray
    boxes: list[np.ndarray]

    @property
    def official(self) -> bool:
        """Whether tables and lists are those of the paper. Some images may be missing."""
        return self.index.official

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.index.classes

    @property
    def box_count(self) -> int:
        return sum(map(len, self.boxes))

    @property
    def counted(self) -> str:
        """A name for the k pairs in reports: "boxes" if each pair has one box."""
        return "boxes" if self.box_count == len(self.boxes) else "pairs of an image and a class with boxes"

    def overlaps(self, found: np.ndarray) -> np.ndarray:
        """IoU (k,) or (k, s) of boxes (k, 4) or (k, s, 4) with the best matching true box of each pair."""
        if not self.boxes:
            return np.zeros(np.shape(found)[:-1])
        return np.array([box_iou(a[..., None, :], b).max(-1) for a, b in zip(found, self.boxes, strict=True)])

    def best_boxes(self, found: np.ndarray) -> np.ndarray:
        """The true box (k, 4) of each pair with the highest IoU with ``found`` (k, 4); the first one if all are 0."""
        chosen = [true[box_iou(box, true).argmax()] for box, true in zip(found, self.boxes, strict=True)]
        return np.array(chosen).reshape(-1, 4)

    def in_pixels(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (k, 4) of the pairs, converted to pixels of their images."""
        return to_image(boxes, self.sizes[self.image], self.frames[self.image])

    def frames_at(self, side: int) -> np.ndarray:
        """The content (n, 4) of the images in a square of ``side`` pixels."""
        return frames_of(self.sizes, side, self.index.about.fit)

    def from_network(self, boxes: np.ndarray, side: int) -> np.ndarray:
        """Boxes (k, ..., 4) of the pairs, converted from a square of ``side`` pixels to the square of SQUARE units."""
        between = (slice(None), *[None] * (np.ndim(boxes) - 2))
        sizes, frames, inside = (x[self.image][between] for x in (self.sizes, self.frames, self.frames_at(side)))
        return to_square(to_image(boxes, sizes, inside), sizes, frames)


def truth_of(index: Index) -> Truth:
    rows = np.flatnonzero(index.test)
    part = take(index, rows)
    frames = frames_of(part.sizes, SQUARE, index.about.fit)
    pairs: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    for i, name in enumerate(part.names):
        for c, *place in index.boxes.get(name, ()):
            pairs.setdefault((i, c), []).append(tuple(place))
    numbers = np.array(list(pairs), int).reshape(-1, 2)
    boxes = [to_square(np.array(found), part.sizes[i], frames[i]) for (i, _), found in pairs.items()]
    return Truth(index, rows, part.names, part.paths, part.labels, part.patients, part.sizes, frames, *numbers.T, boxes)


def refuse_trained(truth: Truth, trained: set[str], patients: set[str], run: Path) -> None:
    """Refuses a run that was trained on test images.

    Args:
        trained: names of the training and validation images of the run.
        patients: the patients of these images; empty if they cannot be compared with those of the data set.

    Raises:
        ValueError: images of the test part, or other images of their patients, were used for training or validation.
    """
    both = [name for name in truth.names if name in trained]
    part = truth.index.about.test_name
    if both:
        boxed = {truth.names[i] for i in truth.image} & trained
        raise ValueError(
            f"run: {run} was trained or validated on {len(both)} images of the {part}, {len(boxed)} of them with "
            f"boxes ({', '.join(both[:3])}{', ...' if len(both) > 3 else ''}); an evaluation on them would be invalid"
        )
    shared = patients & set(truth.patients.astype(str).tolist())
    if shared:
        raise ValueError(
            f"run: {run} was trained or validated on other images of {len(shared)} patients of the {part} "
            f"(e.g. {min(shared)}); an evaluation on them would be invalid"
        )


def trivial_boxes(truth: Truth, grid: Sequence[int], first: float, side: int) -> dict[str, np.ndarray]:
    """Boxes (k, 4) that need no network, and the best boxes that consist of cells of a map of ``grid`` (h, w).

    The latter are in whole pixels of a network's input of ``side`` by ``side`` pixels. ``first`` is the centre of the
    first cell, in cells.
    """
    if not truth.boxes:
        return {name: np.zeros((0, 4)) for name in TRIVIAL}
    frames, unit = truth.frames[truth.image], np.array([0, 0, SQUARE, SQUARE])
    square = np.tile([SQUARE, SQUARE], (len(frames), 1))

    def placed(box: np.ndarray) -> np.ndarray:
        """Boxes of an image that fills the square, moved into the content of each image."""
        return to_square(np.broadcast_to(box, frames.shape), square, frames)

    counts = [len(true) for true in truth.boxes]
    pair = np.repeat(np.arange(len(counts)), counts)
    flat = np.concatenate(truth.boxes)
    starts = np.cumsum([0, *counts[:-1]])
    relative = to_image(flat, square[pair], frames[pair])
    means = mean_boxes(relative, truth.classes[pair], truth.patients[truth.image][pair])[starts]
    inside = truth.frames_at(side)[truth.image]
    in_network = to_square(to_image(flat, square[pair], frames[pair]), square[pair], inside[pair])
    cells = clip_boxes(grid_ceiling(in_network, (grid[0], grid[1]), (side, side), first), inside[pair])
    quality = box_iou(cells, in_network)
    best = [int(s + quality[s : s + n].argmax()) for s, n in zip(starts, counts, strict=True)]
    boxes = (
        placed(whole_image_box(tuple(unit[2:]))),
        placed(centre_box(tuple(unit[2:]))),
        to_square(means, square, frames),
        truth.from_network(cells[best], side),
    )
    return dict(zip(TRIVIAL, boxes, strict=True))


#: Names of the boxes that need no network. The last one is the ceiling of boxes that consist of cells.
CEILING = "ceiling of the grid"
TRIVIAL = ("whole image", "centre box", "mean box of the class", CEILING)
