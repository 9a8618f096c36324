"""A page with the metrics of a run, and its predictions for some of the test bags."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from common.files import naming
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from features.evaluation import box_of
from features.extraction import find_images, read_image
from features.runs import Predictions, Truth, first_of, joined
from features.store import FeatureBags
from sgl_ops.localization import overlay

STYLE = """body{font:15px sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ccc}img{max-width:100%}"""
COLUMNS = (
    ("auc", "bag AUC"),
    ("auc_low", "95 % from"),
    ("auc_high", "to"),
    ("instance_auc", "instance AUC"),
    ("instance_ap", "AP"),
    ("instance_iou", "IoU at 0.5"),
    ("pointing", "pointing game"),
    ("iou_0.1", "box IoU > 0.1"),
    ("iou_0.3", "box IoU > 0.3"),
    ("iou_0.5", "box IoU > 0.5"),
)
#: The explanation of the columns, by the first column that needs it.
MEANINGS = {
    "auc": "Bag AUC: the chance that a positive bag has a higher probability than a negative one. 0.5 is chance.",
    "instance_auc": "Instance AUC, AP and IoU: of the instances in positive bags.",
    "pointing": "Pointing game: fraction of the images whose largest probability lies in a true box.",
    "iou_0.1": "Box IoU: fraction of the images whose predicted box overlaps a true box so much. IoU is the area of "
    "the intersection divided by the area of the union.",
}
TRUE, FOUND = "#2ee62e", "#ff9d1e"


def write_report(
    folder: Path,
    parts: Sequence[Predictions],
    truth: Truth,
    bags: FeatureBags,
    result: dict[str, dict[str, float]],
    images: Path | None,
    count: int,
    training: str,
    folds: Sequence[Mapping[str, object]],
    advice: str | None = None,
) -> None:
    """``report.html``: metrics by class, and the first ``count`` positive test bags (by name) of the first class.

    Args:
        parts: predictions of the first repeat.
        images: folder of the images of the bags; None: draw the positions without an image.
        training: the loss and the number of trainings, in words.
        folds: the rows of :func:`features.runs.rows_of_folds`.
        advice: a warning about the training, shown first.
    """
    table = _table([{"class": name, **values} for name, values in result.items()], ["class"])
    if folds:
        table += f"<h2>Each fold</h2>{_table(folds, ['repeat', 'fold', 'class'])}"
    found = "".join(f"<p>{escape(line)}</p>" for line in map(_boxes_in_words, result, result.values()) if line)
    notes = "".join(f"<li>{text}</li>" for key, text in MEANINGS.items() if any(key in v for v in result.values()))
    predictions = joined(parts)
    files = find_images(images) if images is not None else {}
    figures = "".join(
        f"<h3>{escape(name)}</h3><img src='data:image/png;base64,{_figure(predictions, i, truth, bags, files)}'>"
        for name, i in _positive(predictions, truth)[:count]
    )
    first = escape(truth.labels.classes[0])
    warning = "" if advice is None else f"<p><strong>Warning:</strong> {escape(advice)}</p>"
    with naming(folder / "report.html"):
        (folder / "report.html").write_text(
            f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>"
            f"<h1>Results</h1>{warning}<p>{escape(training)}</p>{found}{table}<ul>{notes}</ul>"
            f"<h2>The first positive test bags of {first}</h2><p>Colour: probability of an instance; low ones are "
            f"transparent. Orange: the predicted box, where p > 0.5. Green: true boxes.</p>{figures}"
        )


def _table(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """A table of the columns ``names`` and of the metrics that any row has."""
    shown = [(key, title) for key, title in COLUMNS if any(key in row for row in rows)]
    titles = "".join(f"<th>{title}</th>" for title in (*names, *(title for _, title in shown)))
    lines = [
        "".join(f"<th>{escape(str(row[name]))}</th>" for name in names)
        + "".join(f"<td>{row[key]:.3f}</td>" if key in row else "<td></td>" for key, _ in shown)
        for row in rows
    ]
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _boxes_in_words(name: str, values: Mapping[str, float]) -> str:
    """How often the predicted box of class ``name`` is right; empty without true boxes."""
    if "iou_0.3" not in values:
        return ""
    low, share, high = (values[key] for key in ("iou_0.3_low", "iou_0.3", "iou_0.3_high"))
    count = values["images"]
    return (
        f"{count:.0f} test images have true boxes of {name}. In {share * count:.3g} of them ({share:.0%}, 95 % "
        f"interval {low:.0%} to {high:.0%}), the predicted box overlaps a true box with IoU > 0.3."
    )


def _positive(predictions: Predictions, truth: Truth) -> list[tuple[str, int]]:
    labels = dict(zip(truth.labels.names, truth.labels.values[:, 0].tolist(), strict=True))
    return sorted((name, i) for i, name in enumerate(predictions.names.tolist()) if labels[name] == 1)


def _figure(predictions: Predictions, i: int, truth: Truth, bags: FeatureBags, files: dict[str, Path]) -> str:
    name = str(predictions.names[i])
    bag = bags.shape(name)
    coords = bags.coords(name)
    probabilities = predictions.instances[predictions.offsets[i] : predictions.offsets[i + 1], 0]
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    if name in files:
        image = read_image(files[name])[0].permute(1, 2, 0).numpy()
        for axes in (left, right):
            axes.imshow(image)
    if bag.grid is not None and bag.size is not None:
        heatmap = probabilities.reshape(bag.grid).astype(float)
        draw_map(right, heatmap, bag.size, first_of(bags))
        for boxes in (truth.boxes.get(truth.labels.classes[0], {}).get(name, ()),):
            for box in boxes:
                draw_box(left, box, TRUE)
    elif coords is not None:
        points = right.scatter(*np.asarray(coords).T, c=probabilities, s=8, cmap="turbo", vmin=0, vmax=1)
        figure.colorbar(points, ax=right)
        for axes in (left, right):
            axes.set_aspect("equal")
            if name not in files:
                axes.invert_yaxis()
        if name in truth.instances:
            left.scatter(*np.asarray(coords).T, c=truth.instances[name][:, 0], s=8, cmap="coolwarm", vmin=0, vmax=1)
    else:
        right.plot(np.sort(probabilities)[::-1])
    left.set_title("truth" if truth.boxes or truth.instances else "image")
    right.set_title(f"p of the bag {predictions.bags[i, 0]:.2f}, largest p of an instance {probabilities.max():.2f}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=70, bbox_inches="tight")
    return base64.b64encode(content.getvalue()).decode()


def draw_map(axes, heatmap: np.ndarray, size: tuple[int, int], first: float) -> None:
    """Draws a map (h, w) of probabilities over an image of ``size``, opaque where p is high, and the predicted box."""
    axes.imshow(overlay(heatmap, size, "bilinear", first))
    draw_box(axes, box_of(heatmap, size, first), FOUND)


def draw_box(axes, box: np.ndarray, colour: str) -> None:
    if not np.isnan(box).any():
        axes.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, color=colour, linewidth=2))
