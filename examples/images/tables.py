"""The output files of an evaluation, and its table in the terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from common.files import new_file, without_nan, write_json

from images import page
from images.evaluation import Evaluated
from images.report import localization_rows
from images.truth import Truth
from sgl_ops.localization import T_IOU

TABLES = ("metrics.json", "details.json", "predictions.csv", "boxes.csv")


def write_tables(run: Evaluated, truth: Truth, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = truth.class_names
    write_json(without_nan(run.metrics), folder / "metrics.json")
    write_json(without_nan(run.details), folder / "details.json")
    with new_file(folder / "predictions.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "patient", *(f"p_{c}" for c in names), *(f"label_{c}" for c in names)])
        for name, patient, p, y in zip(
            truth.names, truth.patients, run.predictions.probability, truth.labels, strict=True
        ):
            writer.writerow([name, patient, *(f"{v:.6g}" for v in p), *(f"{v:g}" for v in y)])
    with new_file(folder / "boxes.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        sides = ("x", "y", "w", "h")
        writer.writerow(["image", "patient", "class", "probability", "predicted",
                         *(f"true_{s}" for s in sides), *(f"found_{s}" for s in sides), "iou"])  # fmt: skip
        places, true = truth.in_pixels(run.found), truth.in_pixels(truth.best_boxes(run.found))
        for k, (i, c) in enumerate(zip(truth.image, truth.classes, strict=True)):
            found = ["" if math.isnan(v) else f"{v:g}" for v in places[k]]
            writer.writerow(
                [truth.names[i], truth.patients[i], names[c], f"{run.predictions.probability[i, c]:.6g}",
                 int(run.predicted[k]), *(f"{v:.6g}" for v in true[k]), *found, f"{run.overlaps[k]:.4f}"]
            )  # fmt: skip


def clear_baseline(folder: Path, needed: bool) -> None:
    """Deletes the tables of an earlier evaluation of two runs. Keeps any other files, because the folder may be a run.

    Raises:
        ValueError: the folder contains other files and is ``needed``.
    """
    if not folder.exists():
        return
    existing = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if existing == set(TABLES):
        for name in existing:
            (folder / name).unlink()
        folder.rmdir()
    elif needed and existing:
        raise ValueError(
            f"out: expected no other files in {folder}, the folder of the second run's tables; use another --out"
        )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that differs from the ends of the other paths."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def print_table(runs: Sequence[Evaluated], official: bool) -> None:
    print(f"\n{'mean over the classes':48}{'AUC':>7}" + "".join(f"{f'> {t:g}':>8}" for t in T_IOU))
    auc = {run.name: run.metrics["auc"]["mean"] for run in runs}
    for name, accuracy in localization_rows(runs, official):
        values = (accuracy.get(f"{t:g}", {}).get("mean") for t in T_IOU)
        print(f"{name:48}{page.number(auc.get(name)):>7}" + "".join(f"{page.number(v, 2):>8}" for v in values))
