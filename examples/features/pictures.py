"""Pictures of a bag and its probabilities: a map over an image, places of instances, or a curve over time."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from common.drawing import FOUND, OPACITY, TRUE, draw_box
from images.thresholds import Relative
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from scipy.spatial import KDTree

from features.evaluation import boxes_of, pixels_of
from features.extraction import read_image
from features.runs import Predictions, Truth, cells_of, unit_of
from features.store import FeatureBags
from sgl_ops.localization import overlay


def in_words(threshold: float) -> str:
    """Where boxes are drawn, for a page: p above a threshold of :func:`features.evaluation.box_of`."""
    return f"p &gt; {float(threshold):g}{' of the largest p' if isinstance(threshold, Relative) else ''}"


def legend(unit: str, evaluated: bool = True, threshold: float = 0.5) -> str:
    """What a picture shows. ``evaluated``: the boxes are compared with true boxes."""
    if unit != "image":
        return "<p>Colour, or height of a curve: the probability p of an instance.</p>"
    meaning = (
        "Each is drawn, but only the thick one is evaluated: it contains the largest probability. <span "
        "class=true></span> True boxes."
    )
    return (
        "<p>Colour: the probability of a cell of the map, from transparent blue (low) to light green (high). <span "
        f"class=found></span> Predicted boxes, around the places with {in_words(threshold)}. "
        f"{meaning if evaluated else 'The thick one contains the largest probability.'}</p>"
    )


def picture_of(*arguments, **options) -> str:
    """The result of :func:`figure_of` as a JPEG file in base64."""
    content = io.BytesIO()
    figure = figure_of(*arguments, **options)
    figure.savefig(content, format="jpeg", dpi=80, bbox_inches="tight", pil_kwargs={"quality": 90})
    return base64.b64encode(content.getvalue()).decode()


def figure_of(
    predictions: Predictions,
    i: int,
    c: int,
    truth: Truth,
    bags: FeatureBags,
    files: Mapping[str, Path],
    with_boxes: bool = True,
) -> Figure:
    """The bag ``i`` and its probabilities for class ``c``.

    - a map of an image: over the image, with the boxes
    - instances at points of an image: in colour at their points
    - instances at points without an image, such as the tiles of a slide: squares that nearly touch
    - instances on a horizontal line (all y are equal), such as the frames of a recording: a curve
    - instances without coordinates: a curve, in the order of the probability

    If the image, true boxes or true labels of the instances are known, they are beside it, or in the curve.

    Args:
        files: the images, by the names of the bags.
        with_boxes: draw the predicted boxes of a map.
    """
    name, unit = str(predictions.names[i]), unit_of(bags)
    bag, coords = bags.shape(name), bags.coords(name)
    if coords is not None and len(np.unique(coords, axis=0)) < min(2, len(coords)):
        coords = None  # unknown
    probabilities = predictions.instances[predictions.offsets[i] : predictions.offsets[i + 1], c]
    labels = truth.instances[name][:, c] if name in truth.instances else None
    image = read_image(files[name])[0].permute(1, 2, 0).numpy() if name in files else None
    is_map = bag.grid is not None and bag.size is not None
    if is_map or (coords is not None and (image is not None or len(np.unique(coords[:, 1])) > 1)):
        boxes = truth.boxes.get(truth.labels.classes[c], {}).get(name, ()) if is_map else ()
        known = image is not None or len(boxes) > 0 or (labels is not None and not is_map)
        figure = Figure(figsize=(15 if known else 7.5, 6), layout="constrained")
        left, right = figure.subplots(1, 2) if known else (None, figure.subplots())
        axes_of_image = [axes for axes in (left, right) if axes is not None]
        for axes in axes_of_image if image is not None else ():
            axes.imshow(image, extent=extent_of(image.shape[:2]))
        if is_map:
            draw_map(
                right,
                probabilities.reshape(bag.grid).astype(float),
                bag.size,
                *cells_of(bags),
                boxes=with_boxes,
                threshold=truth.threshold,
            )
            for box in boxes:
                draw_box(left, box, TRUE)
            for axes in axes_of_image:
                axes.set(xlim=(0, bag.size[1]), ylim=(bag.size[0], 0), aspect="equal")
        else:
            draw = draw_tiles if image is None else draw_points
            figure.colorbar(draw(right, coords, probabilities, "turbo"), ax=right)
            if labels is not None:
                draw(left, coords, labels, "coolwarm")
            for axes in axes_of_image:
                axes.set_aspect("equal")
        if left is not None:
            left.set_title("truth" if truth.boxes or truth.instances else "image")
    else:
        figure = Figure(figsize=(15, 3), layout="constrained")
        right = figure.subplots()
        places = np.arange(len(probabilities)) if coords is None else coords[:, 0]
        order = np.argsort(-probabilities if coords is None else places, kind="stable")
        right.plot(np.sort(places), probabilities[order], color="C0", label="p")
        if labels is not None:
            right.step(np.sort(places), labels[order], where="mid", color="0.6", zorder=1, label="truth")
            right.legend()
        name_of_x = "number of the instance, in the order of p" if coords is None else "x"
        right.set(xlabel=name_of_x, ylabel="p", ylim=(-0.03, 1.03))
    part = "a cell" if unit == "image" else "an instance"
    right.set_title(f"p of the {unit} {predictions.bags[i, c]:.2f}, largest p of {part} {probabilities.max():.2f}")
    return figure


def extent_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The extent of matplotlib for an image of ``size`` (height, width): pixel i covers i to i + 1, as in boxes."""
    return 0, size[1], size[0], 0


def draw_points(axes, coords: np.ndarray, values: np.ndarray, colours: str):
    """Draws values (L,), 0 to 1, as points at ``coords`` (L, 2). Returns the collection of matplotlib."""
    return axes.scatter(*coords.T, c=values, cmap=colours, s=8, vmin=0, vmax=1)


def draw_tiles(axes, coords: np.ndarray, values: np.ndarray, colours: str):
    """Draws values (L,), 0 to 1, as squares around ``coords`` (L, 2), y downwards. Returns the collection.

    The side of a square is the median distance of a place to its nearest neighbour.
    """
    places = np.unique(np.asarray(coords, float), axis=0)
    distances, _ = KDTree(places).query(places, k=2)
    half = np.median(distances[:, 1]) / 2
    corners = coords[:, None] + half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    tiles = axes.add_collection(PolyCollection(corners, array=values, cmap=colours, clim=(0, 1)))
    axes.set(xlim=(corners[..., 0].min(), corners[..., 0].max()), ylim=(corners[..., 1].max(), corners[..., 1].min()))
    return tiles


def draw_map(
    axes,
    heatmap: np.ndarray,
    size: tuple[int, int],
    first: float,
    stride: float | None = None,
    width: float = 3.0,
    boxes: bool = True,
    threshold: float = 0.5,
) -> None:
    """Draws a map (h, w) of probabilities over an image of ``size``, opaque where p is high, and its boxes.

    The frame of the first box, which is evaluated, has the ``width`` in points. The others have half of it.
    """
    layer = overlay(pixels_of(heatmap, size, first, stride), size, opacity=OPACITY / 100)
    axes.imshow(layer, extent=extent_of(size))
    for number, box in enumerate(boxes_of(heatmap, size, first, stride, threshold) if boxes else ()):
        draw_box(axes, box, FOUND, width / 2 if number else width)
