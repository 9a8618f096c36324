"""The results of finished runs: tables and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from features.report import write_report
from features.runs import Predictions, Run, Truth, load_predictions, rows_of_folds, summary, write_tables
from features.store import FeatureBags


def write_results(
    out: Path,
    runs: Sequence[Run],
    truth: Truth,
    bags: FeatureBags,
    images: Path | None,
    overlays: int,
    training: str,
    advice: str | None = None,
) -> dict[str, dict[str, float]]:
    """Writes the tables and the report of ``runs``, whose predictions are in ``out/parts``.

    Args:
        images, overlays, training, advice: as in :func:`features.report.write_report`.

    Returns:
        the metrics by class.
    """
    repeats: dict[int, list[Predictions]] = {}
    for run in runs:
        repeats.setdefault(run.repeat, []).append(load_predictions(out / "parts" / f"{run.name}.npz"))
    finished = list(repeats.values())
    result, rows = summary(finished, truth, bags)
    folds = rows_of_folds(finished, truth, bags)
    write_tables(out, finished, truth.labels, bags, result, rows, folds)
    write_report(out, finished[0], truth, bags, result, images, overlays, training, folds, advice)
    return result


def counted(repeats: int, folds: int | None) -> str:
    """The number of trainings in words."""
    return f"{repeats} x {folds} folds" if folds else f"{repeats} seeds" if repeats > 1 else "1 seed"
