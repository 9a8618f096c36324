"""The report of predictions for images without labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common.files import write_text

from images import gallery, page
from images.dataset import Index
from images.evaluation import Network
from images.new_images import Found, Results, limits_of, title_of
from images.pixels import load_image
from images.prediction import first_cell, name_of
from images.report import settings_table
from images.thresholds import shown


def caption_of(found: Found) -> str:
    """The caption of an image of the gallery: the probability of the class, and the number of boxes."""
    if not found.predicted:
        return f"p {found.probability:.2f}, not predicted"
    count = len(found.boxes)
    return f"p {found.probability:.2f}, {count or 'no'} box{'' if count == 1 else 'es'}"


def cards_of(
    networks: Sequence[Network], index: Index, results: Results, args: argparse.Namespace
) -> list[gallery.Card]:
    """A card for each image of ``results.highest``, class by class."""
    config, first = networks[0].config, first_cell(networks[0].model, args.raster)
    cards = []
    for label, images in zip(index.classes, results.highest, strict=True):
        for found in images:
            width, height = index.sizes[found.row]
            view = gallery.View(label, found.heatmap, found.boxes, caption_of(found), first)
            card = gallery.Card(
                title=index.names[found.row],
                group=label,
                image=load_image(index.paths[found.row], args.gallery_size, config["channels"], config["fit"]),
                side=config["image_size"],
                boxes=np.zeros((0, 4)),
                views=[view],
                best=0.0,
                frame=found.frame.tolist(),
                aspect=width / height,
            )
            cards.append(card)
    return cards


def summary_section(index: Index, results: Results) -> page.Markup:
    rows = [
        [
            label,
            results.predicted[c],
            results.boxes[c],
            *(page.number(value) for value in np.quantile(results.probability[:, c], (1, 0.5, 0))),
        ]
        for c, label in enumerate(index.classes)
    ]
    return page.section(
        "Predictions",
        page.table(
            ["class", "images with p > gate", "boxes", "highest p", "median p", "lowest p"],
            rows,
            f"{len(results.rows)} images; p: the probability that the image shows the class",
        ),
        page.paragraph(
            "These images have no labels, so nothing on this page says how often the predictions are right. "
            "localize_cxr.py measures this on labelled images.",
            "note",
        ),
    )


def gallery_section(
    networks: Sequence[Network], index: Index, results: Results, args: argparse.Namespace
) -> page.Markup:
    cards = cards_of(networks, index, results, args)
    about = (
        "For each class, the images with the highest probability, the highest first. To enlarge one, click it or press "
        "Enter."
    )
    return page.section(
        "Images with the highest probability",
        page.paragraph(about),
        gallery.KEY_WITHOUT_LABELS,
        gallery.gallery(cards, args.upsampling == "bilinear", "all", "groups"),
    )


def settings_section(networks: Sequence[Network], classes: Sequence[str], args: argparse.Namespace) -> page.Markup:
    names = ("images", "upsampling", "raster", "morphology", *(["like"] if args.like is not None else []))
    limits = [
        (label, shown(t_p), shown(gate)) for label, (t_p, gate) in zip(classes, limits_of(args, classes), strict=True)
    ]
    runs = []
    for run, network in zip(args.run, networks, strict=True):
        config = {key: value for key, value in network.config.items() if not isinstance(value, list)}
        runs.append(page.details(f"{run}: {name_of(config)}", settings_table(network.which, config)))
    return page.section(
        "Settings",
        page.table(["setting", "value"], [(name, getattr(args, name)) for name in names]),
        page.table(["class", "T_p", "gate"], limits),
        *runs,
    )


def write_report(
    networks: Sequence[Network], index: Index, results: Results, args: argparse.Namespace, path: Path
) -> None:
    """Writes the page of the predictions at ``path``.

    Raises:
        ValueError: an image has changed since it was predicted, and cannot be read.
        OSError: the page cannot be written.
    """
    sections = []
    if results.problems:
        about = f"{len(results.problems)} images cannot be read. They are in none of the tables."
        sections += [page.paragraph(about, "warning"), page.details("Their names", page.bullets(results.problems))]
    sections.append(summary_section(index, results))
    if args.gallery:
        sections.append(gallery_section(networks, index, results, args))
    sections.append(settings_section(networks, index.classes, args))
    lead = f"{title_of(networks)}, on {len(results.rows)} images of {args.images}."
    write_text(page.page(f"{index.about.title}: predictions", lead, *sections), path)
