"""The results of finished runs: tables, report, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import write_json

from features.advice import TRAINED_WITHOUT, box_size_advice, failures, training_warnings
from features.plan import Run, missing_kinds
from features.report import MEANS, range_of_folds, write_report
from features.runs import Predictions, Truth, load_predictions, rows_of_trainings, summary, unit_of, write_tables
from features.store import FeatureBags
from features.training import Settings

#: The file with the names of the trainings that seem to have failed, and the reasons by class.
FAILED = "failed.json"
#: The metrics that are printed.
PRINTED = (
    "auc", "auc_of_folds", "instance_auc", "instance_ap", "instance_iou", "pointing", "iou_0.3", "iou_0.5",
)  # fmt: skip


def write_results(
    out: Path,
    runs: Sequence[Run],
    truth: Truth,
    bags: FeatureBags,
    images: Path | None,
    overlays: int,
    training: str,
    settings: Settings,
    histories: Sequence[Sequence[Mapping]] = (),
    failed_before: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> None:
    """Writes the tables and the report of ``runs``, whose predictions are in ``out/parts``. Prints the metrics.

    Args:
        images, overlays, training: as in :func:`features.report.write_report`.
        histories: the rows of the epochs of each run, as ``train`` logs them. Empty: the losses are not examined.
        failed_before: for fine-tuned trainings, the content of ``FAILED`` of the run that they continued. A training
            that has failed there counts as failed here.
    """
    repeats: dict[int, list[Predictions]] = {}
    for run in runs:
        repeats.setdefault(run.repeat, []).append(load_predictions(out / "parts" / f"{run.name}.npz"))
    finished = list(repeats.values())
    result, rows = summary(finished, truth, bags)
    trainings = rows_of_trainings(finished, truth, bags)
    many_folds = len(finished[0]) > 1
    by_key = {(run.repeat, run.fold): run for run in runs}
    known = dict(zip(by_key, histories, strict=bool(histories)))
    failed = failures(trainings, known, settings)
    for key, run in sorted(by_key.items()):
        for label, reasons in (failed_before or {}).get(run.name, {}).items():
            # missing labels are added below: they are the same ones
            before = [f"before fine-tuning: {text}" for text in reasons if not text.startswith(TRAINED_WITHOUT)]
            if before:
                failed.setdefault(key, {})[label] = [*before, *failed.get(key, {}).get(label, [])]
    for key, run in by_key.items():
        for label, kinds in missing_kinds(truth.labels, run.train).items():
            reason = f"{TRAINED_WITHOUT} {' or '.join(kinds)} labels"
            failed.setdefault(key, {}).setdefault(label, []).append(reason)
    failed = dict(sorted(failed.items()))
    write_json({by_key[key].name: reasons for key, reasons in failed.items()}, out / FAILED)
    warnings = training_warnings(
        failed,
        trainings,
        known,
        {key: truth.labels.values[run.train] for key, run in by_key.items()},
        settings,
        many_folds,
        fine_tuned=failed_before is not None,
        extracted=bool(bags.settings),
    )
    warnings += box_size_advice(result, settings, bool(bags.settings))
    folds = trainings if many_folds else []
    write_tables(out, finished, truth.labels, bags, result, rows, folds)
    counted = f"{training}; {trainings_in_words(runs, unit_of(bags))}."
    write_report(out, finished[0], truth, bags, result, images, overlays, counted, folds, warnings)
    for text in warnings:
        print(f"warning: {text}", flush=True)
    for name, values in result.items():
        line = ", ".join(
            f"{key} {values[key]:.3f}" + (f" ({found})" if (found := range_of_folds(folds, name, key)) else "")
            for key in PRINTED
            if key in values
        )
        print(f"{name}: {line}")
        means = values.get("of_means", {})
        if means:
            print(f"{name}, {MEANS}: {', '.join(f'{key} {means[key]:.3f}' for key in PRINTED if key in means)}")


def trainings_in_words(runs: Sequence[Run], unit: str) -> str:
    """The number of trainings, and how often each bag is tested."""
    repeats, folds = len({run.repeat for run in runs}), len({run.fold for run in runs})
    times = "once" if repeats == 1 else f"{repeats} times"
    if folds > 1:
        how = f"({folds} folds, {repeats} repeat{'s' if repeats > 1 else ''})"
        return f"{len(runs)} trainings {how}; each {unit} is tested {times}"
    trainings = f"{repeats} training{'s' if repeats > 1 else ''}"
    return f"{trainings} with the given split; each {unit} of the test part is tested {times}"
