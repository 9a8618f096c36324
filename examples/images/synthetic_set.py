"""Generates a data set in the layout and the file formats of NIH ChestX-ray14. synthetic.py describes the images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.files import naming, new_file, write_text
from common.progress import Progress
from PIL import Image

from images.nih import (
    BOX_HEADER,
    BOXED,
    BOXES,
    CLASSES,
    DRAWN,
    ENTRIES,
    ENTRY_HEADER,
    NO_FINDING,
    TEST_LIST,
    TRAIN_VAL_LIST,
)
from images.synthetic import FILE, PLAN, TABLES, draw_image

#: Frequency of the findings in images of the training list, before the factors of TOGETHER.
RATES = {
    "Atelectasis": 0.08, "Cardiomegaly": 0.06, "Consolidation": 0.05, "Edema": 0.03, "Effusion": 0.11,
    "Emphysema": 0.04, "Fibrosis": 0.04, "Hernia": 0.02, "Infiltration": 0.15, "Mass": 0.09, "Nodule": 0.10,
    "Pleural_Thickening": 0.05, "Pneumonia": 0.05, "Pneumothorax": 0.08,
}  # fmt: skip
#: (finding, other finding): factor by which the first one makes the other one more frequent.
TOGETHER = {("Effusion", "Atelectasis"): 3.0, ("Cardiomegaly", "Edema"): 4.0, ("Pneumonia", "Infiltration"): 2.5}
#: The share of patients in the test list, and the factor of the frequency of findings there.
TEST_SHARE, TEST_RATE = 0.2, 1.4
#: The probability that a finding remains in the next image of the patient.
STAYS = 0.7


class Plan(NamedTuple):
    """An image to draw."""

    patient: int
    follow_up: int
    findings: list[str]
    ap: bool
    test: bool

    @property
    def name(self) -> str:
        return f"{self.patient:08}_{self.follow_up:03}.png"


def plan_images(count: int, seed: int, findings_drawn: Sequence[str] = CLASSES, rate: float = 1.0) -> list[Plan]:
    """The findings of ``count`` images, or up to seven more. About a fifth of the patients is in the test list."""
    rates = {name: rate * RATES[name] for name in findings_drawn}
    plans: list[Plan] = []
    patient = 0
    while len(plans) < count:
        patient += 1
        rng = np.random.default_rng((seed, PLAN, patient))
        test = rng.random() < TEST_SHARE
        findings: list[str] = []
        for follow_up in range(min(int(rng.geometric(0.42)), 8)):
            more = TEST_RATE if test else 1
            findings = draw_findings([f for f in findings if rng.random() < STAYS], rng, rates, more)
            plans.append(Plan(patient, follow_up, findings, bool(rng.random() < (0.57 if test else 0.35)), test))
    return plans


def draw_findings(kept: list[str], rng: np.random.Generator, rates: dict[str, float], rate: float) -> list[str]:
    """The findings of an image in the order of CLASSES. A patient keeps some findings of the previous image."""
    found = set(kept)
    for name in sorted(rates, key=lambda name: any(name == second for _, second in TOGETHER)):  # dependent ones last
        more = [factor for (first, second), factor in TOGETHER.items() if second == name and first in found]
        # findings must not accumulate over the images of a patient: new ones are as frequent as old ones disappear
        often = rate * rates[name] * float(np.prod(more)) * (1 if not kept else 1 - STAYS)
        if rng.random() < often:
            found.add(name)
    return [name for name in CLASSES if name in found]


def write_dataset(
    out: Path,
    images: int,
    size: int,
    seed: int,
    layout: str = "twelve",
    workers: int = 1,
    findings: Sequence[str] = CLASSES,
    rate: float = 1.0,
) -> list[Plan]:
    """Writes the data set into ``out``, the tables last. Returns the plans of the images.

    Only ``findings`` are drawn, with ``rate`` times their usual frequency.

    Raises:
        ValueError: ``out`` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: expected an empty folder, or one that does not exist")
    plans = plan_images(images, seed, findings, rate)
    folders = [out / f"images_{k:03}" / "images" for k in range(1, 13)]
    folders = {"twelve": folders, "one": [out / "images"], "flat": [out]}[layout]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)

    def draw(numbered: tuple[int, Plan]) -> dict[str, tuple[float, float, float, float]]:
        number, plan = numbered
        pixels, boxes = draw_image(size, seed, plan.patient, plan.follow_up, plan.findings, plan.ap)
        image = Image.fromarray(pixels)
        if np.random.default_rng((seed, FILE, number)).random() < 0.02:
            image = image.convert("RGBA")
        path = folders[number * len(folders) // len(plans)] / plan.name
        with naming(path):
            image.save(path)
        return boxes

    with ThreadPoolExecutor(workers) as pool:
        todo = Progress(enumerate(plans), total=len(plans), desc="drawing", unit="image")
        boxes = list(pool.map(draw, todo))
    write_text("These images are drawn by make_synthetic_cxr.py. They show no patient.\n", out / DRAWN)
    write_tables(out, plans, boxes, np.random.default_rng((seed, TABLES)))
    return plans


def write_tables(
    out: Path, plans: list[Plan], boxes: list[dict[str, tuple[float, float, float, float]]], rng: np.random.Generator
) -> None:
    for name, test in ((TRAIN_VAL_LIST, False), (TEST_LIST, True)):
        write_text("\n".join(plan.name for plan in plans if plan.test == test), out / name)
    with new_file(out / BOXES) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(BOX_HEADER)
        for label in BOXED:
            for plan, found in zip(plans, boxes, strict=True):
                if plan.test and label in found:
                    written = "Infiltrate" if label == "Infiltration" else label
                    writer.writerow([plan.name, written, *found[label]])
    with new_file(out / ENTRIES[0]) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(ENTRY_HEADER)
        for plan in plans:
            width, height = rng.choice([[2048, 2500], [2500, 2048], [3056, 2544], [2992, 2991]])
            writer.writerow([
                plan.name, "|".join(plan.findings) or NO_FINDING, plan.follow_up, plan.patient,
                20 + plan.patient % 60, "FM"[plan.patient % 2], "AP" if plan.ap else "PA", width, height, 0.143, 0.143,
            ])  # fmt: skip
