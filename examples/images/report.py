"""The figure and the report of one evaluated run, or of two compared runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.choices import Config
from common.files import write_text
from sklearn.metrics import roc_curve

from images import gallery, page, paper
from images.evaluation import Evaluated, boxes_at, trivial_of
from images.figure import caption_of, first_of_each_class
from images.metrics import FEW_PATIENTS
from images.pixels import load_image
from images.thresholds import HALF, VALIDATION, shown
from images.truth import SQUARE, Truth
from images.verdict import compare_boxes, verdict
from sgl_ops.localization import T_IOU, per_class

#: Largest number of compared runs. The colours after theirs are for boxes without a network.
COMPARED = 2


def with_interval(value: float, ci: Sequence[float]) -> str:
    low, high = ci
    return page.number(value) if math.isnan(low) else f"{value:.3f} ({low:.3f}-{high:.3f})"


def auc_section(runs: Sequence[Evaluated], truth: Truth) -> page.Markup:
    official = truth.official
    details, units = runs[0].details, truth.index.about.units
    patients, without = details["patients"], details["patients_without"]
    papers = paper.AUC if official else {}
    rows, bars = [], []
    for name in (*(name for name in truth.class_names if patients[name]), "mean"):
        few = name != "mean" and min(patients[name], without[name]) < FEW_PATIENTS
        marked = f"{name}*" if few else name
        values = [(run.metrics["auc"][name], run.metrics["auc_ci"][name]) for run in runs]
        printed = [page.number(row.get(name), 2) for row in papers.values()]
        counts = [count.get(name, "") for count in (patients, without)]
        rows.append([marked, *(with_interval(*v) for v in values), *printed, *counts])
        spans = [page.Span(ci[0], value, ci[1], k) for k, (value, ci) in enumerate(values)]
        bars.append((marked, spans))
    lowest = min([0.5, *(span.low for _, spans in bars for span in spans if not math.isnan(span.low))])
    notes = []
    if any(row[0].endswith("*") for row in rows):
        about = f"* fewer than {FEW_PATIENTS} {units} with it, or without it: the AUC and its interval are unreliable."
        notes.append(page.paragraph(about, "note"))
    if official:
        notes.append(page.paragraph(paper.NOTE, "note"))
    return page.section(
        "Classification",
        page.table(
            ["class", *(run.name for run in runs), *papers, f"{units} with it", f"{units} without it"],
            rows,
            f"AUC over {runs[0].metrics['images']} test images, 95 % interval over {units}",
        ),
        *notes,
        page.intervals(bars, "AUC and its interval", math.floor(10 * lowest) / 10, 1.0),
        page.legend([(run.name, k, False) for k, run in enumerate(runs)]),
    )


def localization_rows(runs: Sequence[Evaluated], official: bool) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """(name, accuracy by T_IoU and class) of all compared methods, with the paper's rows on the official test list."""
    rows = []
    for run in runs:
        rows.append((run.name, run.metrics["localization"]))
        rows.append((f"{run.name}, without gate", run.metrics["localization_ungated"]))
        if "localization_relative" in run.metrics:
            rows.append((f"{run.name}, T_p {HALF}", run.metrics["localization_relative"]))
            rows.append((f"{run.name}, T_p {HALF}, without gate", run.metrics["localization_relative_ungated"]))
        rows.append((f"{run.name}, MaxBoxAcc", run.metrics["max_box_acc"]))
    for name, accuracy in runs[0].metrics["baselines"].items():
        rows.append((name, accuracy))
        other = runs[-1].metrics["baselines"][name]
        if other != accuracy:  # the maps have different grids
            rows[-1] = (f"{name}, {runs[0].name}", accuracy)
            rows.append((f"{name}, {runs[-1].name}", other))
    return [*rows, *(paper.LOCALIZATION.items() if official else ())]


def localization_section(runs: Sequence[Evaluated], truth: Truth) -> page.Markup:
    steps = [f"{t:g}" for t in T_IOU]
    heads = [f"IoU\u00a0> {step}" for step in steps]  # no line break before ">"
    details, units = runs[0].details, truth.index.about.units
    present = [name for name, count in details["boxes"].items() if count]
    counts = ", ".join(f"{name} {details['boxes'][name]}" for name in present)

    def chosen(key: str) -> str:
        if details[key] != VALIDATION:
            return str(details[key])
        rest = details["classes_at_0.5"]
        but = f", 0.5 for {', '.join(rest)}, whose validation labels are all equal" if rest else ""
        return f"chosen with the labels of {details['validation_images']} validation images{but}"

    def cells(accuracy: dict[str, float], names: Sequence[str]) -> list[str]:
        return [page.number(accuracy.get(name), 2) for name in names]

    rows = localization_rows(runs, truth.official)
    overview = [[name, *(page.number(accuracy[step]["mean"], 2) for step in steps)] for name, accuracy in rows]
    intervals = [
        [
            run.name + end,
            *(with_interval(run.metrics[key][s]["mean"], run.details[f"{key}_ci"][s]["mean"]) for s in steps),
        ]
        for run in runs
        for key, end in (("localization", ""), ("localization_ungated", ", without gate"))
    ]
    columns = (*present, "mean")
    by_class = [
        page.table(["", *columns], [[name, *cells(accuracy[step], columns)] for name, accuracy in rows], head)
        for step, head in zip(steps, heads, strict=True)
    ]
    pointing = [[run.name, *cells(run.metrics["pointing_game"], columns)] for run in runs]
    return page.section(
        "Localization",
        page.paragraph(
            f"{truth.box_count} boxes: {counts}. T_p {chosen('threshold')}, gate {chosen('gate')}, "
            f"{details['upsampling']} upsampling, {details['raster']} raster, opening and closing by "
            f"{details['morphology']} pixels."
        ),
        page.table(["", *heads], overview, "share of boxes found, mean over the classes"),
        page.paragraph(
            "With the gate, a box counts only if its class is also predicted. Without the gate, and in all rows "
            "without a network, every box counts. MaxBoxAcc uses the threshold that is best for these test boxes. It "
            "shows what the maps could give, and is not a result of the method. The mean box of a class is the mean of "
            f"the boxes of other {units}. The ceiling is the best box that consists of whole cells of the map. If a "
            f"share is 0 or 1, its interval has no width, because all draws of {units} give the same share. "
            f"T_p {HALF}: the threshold of each map is half of its maximum.",
            "note",
        ),
        *several_boxes(truth),
        *([page.paragraph(paper.NOTE, "note")] if truth.official else []),
        page.table(["", *heads], intervals, f"the same with 95 % intervals over {units}"),
        page.details("By class", *by_class),
        page.table(
            ["", *columns], pointing, "pointing game: share of boxes with the centre of the cell with the largest value"
        ),
    )


def several_boxes(truth: Truth) -> list[page.Markup]:
    """A note on images with several boxes of one class, if there are any."""
    count = sum(len(true) > 1 for true in truth.boxes)
    if not count:
        return []
    about = (
        "Several boxes of one class in an image count once: the best match is compared with the found box. This occurs "
        f"{count} times. So all tables of boxes have {len(truth.boxes)} comparisons."
    )
    return [page.paragraph(about, "note")]


def curves_section(runs: Sequence[Evaluated], truth: Truth, upsampling: str) -> page.Markup:
    def share(hits: np.ndarray) -> list[float]:
        """The mean over the classes of every column of hits (k, steps)."""
        return [per_class(column, truth.classes, truth.class_names)["mean"] for column in hits.T]

    at = np.linspace(0, 1, 41)
    lines = []
    for k, run in enumerate(runs):
        hits = run.overlaps[:, None] > at
        lines.append(page.Line(run.name, at, share(hits & run.predicted[:, None]), k))
        lines.append(page.Line(f"{run.name}, without gate", at, share(hits), k, True))
    for k, (name, found) in enumerate(trivial_of(truth, runs[0].predictions).items(), COMPARED):
        lines.append(page.Line(name, at, share(truth.overlaps(found)[:, None] > at), k, True))
    charts = [page.chart(lines, "Boxes found, mean over the classes", "T_IoU", "share")]

    thresholds = np.arange(100) / 100
    overlaps = [truth.overlaps(boxes_at(run.predictions, truth, thresholds, upsampling)) for run in runs]
    for t in (0.3, 0.5):
        lines = [page.Line(run.name, thresholds, share(overlaps[k] > t), k) for k, run in enumerate(runs)]
        charts.append(page.chart(lines, f"Effect of T_p: IoU > {t:g}, no gate, no morphology", "T_p", "share"))

    at = np.linspace(0, 1, 101)
    rocs = []
    for c, name in enumerate(truth.class_names):
        known = ~np.isnan(truth.labels[:, c])
        labels = truth.labels[known, c]
        if 0 < labels.sum() < len(labels):
            curves = [roc_curve(labels, run.predictions.probability[known, c])[:2] for run in runs]
            lines = [
                page.Line(run.name, at, np.interp(at, *curve), k)
                for k, (run, curve) in enumerate(zip(runs, curves, strict=True))
            ]
            rocs.append(page.chart(lines, name, "1 - specificity", "sensitivity"))
    return page.section(
        "Curves",
        page.side_by_side(*charts),
        page.paragraph("The curves over T_p use the test boxes. They were not used to choose a threshold.", "note"),
        page.details("ROC of every class", page.side_by_side(*rocs)),
    )


def cards_of(runs: Sequence[Evaluated], truth: Truth, order: Sequence[int], side: int) -> list[gallery.Card]:
    """A card for each box of ``order``, with images of ``side`` pixels."""
    cards, about = [], truth.index.about
    for k in order:
        i, c = truth.image[k], truth.classes[k]
        views = [
            gallery.View(
                run.name, run.predictions.maps[k], run.found[k], caption_of(run, truth, k), run.predictions.first
            )
            for run in runs
        ]
        cards.append(
            gallery.Card(
                title=f"{truth.class_names[c]} · {truth.names[i]}",
                group=truth.class_names[c],
                image=load_image(truth.paths[i], side, about.channels, about.fit),
                side=SQUARE,
                boxes=truth.boxes[k],
                views=views,
                best=float(runs[0].overlaps[k]),
            )
        )
    return cards


def best_and_worst(run: Evaluated, truth: Truth, count: int) -> tuple[list[int], list[int]]:
    """Indices of the ``count`` boxes with the highest IoU and of those with the lowest, each at most half of all boxes.

    For equal IoUs, the probability of the class decides. Among the best boxes, a higher probability is better. Among
    the worst boxes, it is worse: a confident miss comes first.
    """
    sure = run.predictions.probability[truth.image, truth.classes]
    count = min(count, len(truth.boxes) // 2 or 1)
    best = np.lexsort((-sure, -run.overlaps))[:count].tolist()
    worst = [int(k) for k in np.lexsort((-sure, run.overlaps)) if k not in best][:count]
    return best, worst


def pictures_section(runs: Sequence[Evaluated], truth: Truth, upsampling: str, side: int) -> page.Markup:
    """The best and the worst boxes of the first run."""
    best, worst = best_and_worst(runs[0], truth, 3)
    smooth = upsampling == "bilinear"
    parts = [
        page.paragraph(f"The boxes of {runs[0].name} with the highest IoU. To enlarge one, click it or press Enter."),
        gallery.KEY,
        gallery.gallery(cards_of(runs, truth, best, side), smooth, "best", "map"),
    ]
    if worst:
        parts += [
            page.paragraph("The boxes with the lowest IoU. If IoUs are equal, the most confident come first."),
            gallery.gallery(cards_of(runs, truth, worst, side), smooth, "worst", ""),
        ]
    return page.section("Best and worst", *parts)


def gallery_section(runs: Sequence[Evaluated], truth: Truth, upsampling: str, count: int, side: int) -> page.Markup:
    """``count`` boxes on images of ``side`` pixels, starting with the first box of each class."""
    first = first_of_each_class(truth)
    order = [*first, *(k for k in range(len(truth.boxes)) if k not in set(first))][:count]
    cards = cards_of(runs, truth, order, side)
    about = f"{len(cards)} of {len(truth.boxes)} {truth.counted}, beginning with one of each class. "
    about += "To enlarge one, click it or press Enter."
    return page.section(
        "Gallery", page.paragraph(about), gallery.KEY, gallery.gallery(cards, upsampling == "bilinear", "all")
    )


def verdict_section(sentences: Sequence[str], units: str) -> page.Markup:
    about = (
        f"A run is better if the 95 % interval of the difference, over draws of {units}, lies above 0. "
        "Its mean AUC must also be above chance (0.5). Boxes are compared without the gate."
    )
    return page.section("Verdict", page.bullets(sentences), page.paragraph(about, "note"))


def settings_table(which: Mapping[str, Any], config: Config) -> page.Markup:
    """The settings of the training of a network, and its checkpoint: ``which``, with "network" and "epoch"."""
    checkpoint = ("network", f"{which['network']}, of epoch {which['epoch']}")
    return page.table(["setting", "value"], [checkpoint, *config.items()])


def write_report(runs: Sequence[Evaluated], truth: Truth, args: argparse.Namespace, path: Path) -> list[str]:
    """Writes the page of ``runs`` at ``path``.

    Returns:
        The sentences of the verdict.
    """
    comparisons = compare_boxes(runs, truth, args.draws, args.seed) if len(truth.boxes) else []
    sentences = verdict(runs, truth, comparisons, args.draws, args.seed)
    sections = [verdict_section(sentences, truth.index.about.units)]
    if truth.index.missing:
        about = f"{len(truth.index.missing)} images of the tables are missing and were left out."
        sections.append(page.paragraph(about, "warning"))
    if len(truth.boxes) and args.gallery:
        sections.append(pictures_section(runs, truth, args.upsampling, args.gallery_size))
    sections.append(auc_section(runs, truth))
    if len(truth.boxes):
        sections.append(localization_section(runs, truth))
        sections.append(curves_section(runs, truth, args.upsampling))
        sections.append(gallery_section(runs, truth, args.upsampling, args.gallery, args.gallery_size))
    else:
        sections.append(page.paragraph("None of these images has a box.", "warning"))
    settings = []
    for run in runs:
        of_class = [run.details[f"{key}_of_class"] for key in ("threshold", "gate")]
        settings.append(
            page.details(
                run.name,
                settings_table(run.details, run.details["config"]),
                page.table(
                    ["class", "T_p", "gate"], [[c, *(shown(v[c]) for v in of_class)] for c in truth.class_names]
                ),
            )
        )
    about = truth.index.about
    lead = f"{' compared with '.join(run.name for run in runs)}, on {len(truth.rows)} images of the {about.test_name}."
    content = page.page(
        f"{about.title}: classification and localization", lead, *sections, page.section("Settings", *settings)
    )
    write_text(content, path)
    return sentences
