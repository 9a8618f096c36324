"""A page with predictions without true labels: how many bags are positive, and the most probable ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from common.files import write_text
from images.thresholds import shown as shown_threshold

from features.labels import Labels
from features.pictures import in_words, legend, picture_of
from features.report import STYLE
from features.runs import Predictions, Truth, unit_of
from features.store import FeatureBags

NOTE = (
    "A probability p above the threshold is a positive {unit}. By default the threshold is the one that separates the "
    "positive and the negative test bags of the training best. p is not calibrated: it is no frequency."
)
#: Added if the bags are maps of images.
ABOUT_BOXES = " Boxes are drawn around places with {where}; a positive {unit} without such places has none."


def write_report(
    folder: Path,
    predictions: Predictions,
    classes: Sequence[str],
    bags: FeatureBags,
    files: Mapping[str, Path],
    count: int,
    trainings: str,
    gates: Sequence[float],
    boxes: Sequence[tuple],
    threshold: float = 0.5,
) -> None:
    """``report.html``: the number of positive bags by class, and ``count`` bags, the most probable of each class first.

    Args:
        files: images of the bags; without one, only the positions of the instances are drawn.
        trainings: the networks, in words.
        gates: for each class, a bag is positive above this probability.
        boxes: the rows of :func:`features.runs.predicted_boxes`.
        threshold: that of these boxes.
    """
    unit = unit_of(bags)
    truth = Truth(Labels([], list(classes), np.zeros((0, len(classes))), None, np.array([])), {}, {}, threshold)
    with_boxes = unit == "image"
    lines = ""
    for c, (name, gate) in enumerate(zip(classes, gates, strict=True)):
        positive = int((predictions.bags[:, c] > gate).sum())
        cells = [escape(name), shown_threshold(gate), positive, len(bags) - positive]
        cells += [sum(row[1] == name for row in boxes)] if with_boxes else []
        lines += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    titles = ["class", "threshold", f"{unit}s with a higher p", f"other {unit}s", *(["boxes"] if with_boxes else [])]
    head = "".join(f"<th>{title}</th>" for title in titles)
    figures = ""
    for i, c in _shown(predictions.bags, count):
        positive = bool(predictions.bags[i, c] > gates[c])
        note = "" if positive else f", not above the threshold{': without boxes' if with_boxes else ''}"
        figures += f"<h3>{escape(str(predictions.names[i]))}: {escape(classes[c])}{note}</h3>"
        picture = picture_of(predictions, i, c, truth, bags, files, positive)
        figures += f"<img src='data:image/jpeg;base64,{picture}'>"
    about = NOTE + (ABOUT_BOXES if with_boxes else "")
    shown = f"The {unit}s with the highest probability{' of each class' if len(classes) > 1 else ''}"
    write_text(
        f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>Predictions</h1><p>{len(bags)} {unit}s; {escape(trainings)}.</p>"
        f"<table><tr>{head}</tr>{lines}</table><p>{about.format(unit=unit, where=in_words(threshold))}</p>"
        f"<h2>{shown}</h2>{legend(unit, False, threshold)}{figures}",
        folder / "report.html",
    )


def _shown(probabilities: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(bag, class) of the ``count`` pictures: the most probable bag of each class, then the second, and so on."""
    order = np.argsort(-probabilities, axis=0, kind="stable")
    return [(int(i), c) for row in order for c, i in enumerate(row)][:count]
