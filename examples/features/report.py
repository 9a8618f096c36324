"""A page with the metrics of a run, and its predictions for some of the test bags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from common.drawing import FOUND, TRUE
from common.files import write_text

from features.extraction import find_images
from features.pictures import legend, picture_of
from features.runs import Predictions, Truth, unit_of
from features.store import FeatureBags

STYLE = f"""body{{font:15px sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}}table{{border-collapse:collapse}}
td,th{{padding:.2em .8em;text-align:right;border-bottom:1px solid #ccc}}img{{max-width:100%}}p{{max-width:60em}}
.warning{{border-left:.4em solid #d33;padding-left:.8em}}
.true,.found{{display:inline-block;width:1em;height:.8em;border:3px solid;outline:1px solid #000}}
.true{{border-color:{TRUE}}}.found{{border-color:{FOUND}}}"""
#: Columns of the tables: the metric, and its title. UNIT is "image" or "bag".
COLUMNS = (
    ("auc", "UNIT AUC"),
    ("auc_low", "95 % from"),
    ("auc_high", "to"),
    ("auc_of_folds", "AUC in folds"),
    ("instance_auc", "instance AUC"),
    ("instance_ap", "AP"),
    ("instance_iou", "IoU at 0.5"),
    ("pointing", "pointing game"),
    ("iou_0.1", "box IoU > 0.1"),
    ("iou_0.3", "box IoU > 0.3"),
    ("iou_0.5", "box IoU > 0.5"),
)
#: The row of the metrics of mean probabilities.
MEANS = "mean probabilities"
#: The explanation of the columns, by the first column that needs it.
MEANINGS = {
    "auc": "UNIT AUC: the chance that a positive UNIT has a higher probability than a negative one. 0.5 is chance.",
    "auc_low": "95 % from, to: the interval of this AUC if other UNITs of the same kind were tested (bootstrap over "
    "the UNITs). The trained networks stay the same. So the interval does not contain the differences between "
    "trainings.",
    "auc_of_folds": "AUC in folds: the mean of the AUC within each fold. The UNIT AUC compares the UNITs of all folds, "
    "although each fold has another network. This makes the UNIT AUC too low, most of all for rare classes.",
    "instance_auc": "Instance AUC, AP and IoU: of the instances in positive UNITs.",
    "pointing": "Pointing game: fraction of the images whose largest probability lies in a true box.",
    "of_means": f"{MEANS[0].upper()}{MEANS[1:]}: the metrics of the mean of the probabilities over the repeats. The "
    "other rows have the mean of the metrics. predict_features.py uses mean probabilities over all trainings, without "
    "those that seem to have failed. Here these are included.",
    "iou_0.1": "Box IoU: fraction of the images whose predicted box overlaps a true box so much. IoU is the area of "
    "the intersection divided by the area of the union.",
}


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
    warnings: Sequence[str] = (),
) -> None:
    """``report.html``: metrics by class, and ``count`` positive test bags of the first class: by name, fold by fold.

    Args:
        parts: predictions of the first repeat, one per fold.
        images: folder of the images of the bags; None: draw the positions without an image.
        training: the loss and the number of trainings, in words.
        folds: the rows of :func:`features.runs.rows_of_trainings`; empty without folds.
        warnings: about the trainings, shown first.
    """
    unit = unit_of(bags)
    rows = [{"class": name, **values} for name, values in result.items()]
    rows += [{"class": f"{row['class']}, {MEANS}", **row["of_means"]} for row in rows if "of_means" in row]
    table = _table(rows, ["class"], unit)
    if folds:
        table += f"<h2>Each fold</h2>{_table(folds, ['repeat', 'fold', 'class'], unit)}"
    found = "".join(f"<p>{escape(line)}</p>" for name, v in result.items() if (line := _boxes_in_words(name, v, folds)))
    meanings = [text for key, text in MEANINGS.items() if any(key in row for row in rows)]
    notes = "".join(f"<li>{_with_unit(text, unit)}</li>" for text in meanings)
    files = find_images(images) if images is not None else {}
    figures = ""
    for fold, i in _in_turn([_positive(part, truth) for part in parts])[:count]:
        name = escape(str(parts[fold].names[i]))
        title = f"{name} (fold {fold}{' of repeat 0' if _repeats(folds) > 1 else ''})" if folds else name
        picture = picture_of(parts[fold], i, 0, truth, bags, files)
        figures += f"<h3>{title}</h3><img src='data:image/jpeg;base64,{picture}'>"
    first = escape(truth.labels.classes[0])
    shown = f"The first positive test {unit}s of {first}{' in each fold' if folds else ''}"
    warned = "".join(f"<p class=warning><strong>Warning:</strong> {escape(text)}</p>" for text in warnings)
    write_text(
        f"<!doctype html><meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>"
        f"<h1>Results</h1>{warned}<p>{escape(training)}</p>{found}{table}<ul>{notes}</ul>"
        f"<h2>{shown}</h2>{legend(unit, threshold=truth.threshold)}{figures}",
        folder / "report.html",
    )


def _with_unit(text: str, unit: str) -> str:
    text = text.replace("UNIT", unit)
    return text[0].upper() + text[1:]


def _in_turn(parts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(part, element): the first of each part, then the second of each part, and so on."""
    rounds = max(map(len, parts), default=0)
    return [(k, part[n]) for n in range(rounds) for k, part in enumerate(parts) if n < len(part)]


def _repeats(folds: Sequence[Mapping[str, object]]) -> int:
    return len({row["repeat"] for row in folds})


def _table(rows: Sequence[Mapping[str, object]], names: Sequence[str], unit: str) -> str:
    """A table of the columns ``names`` and of the metrics that any row has."""
    shown = [(key, title) for key, title in COLUMNS if any(key in row for row in rows)]
    titles = "".join(f"<th>{title.replace('UNIT', unit)}</th>" for title in (*names, *(title for _, title in shown)))
    lines = [
        "".join(f"<th>{escape(str(row[name]))}</th>" for name in names)
        + "".join(f"<td>{row[key]:.3f}</td>" if key in row else "<td></td>" for key, _ in shown)
        for row in rows
    ]
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def range_of_folds(folds: Sequence[Mapping[str, object]], name: str, key: str, form: str = ".3f") -> str:
    """The lowest and highest value of metric ``key`` of class ``name`` in the folds, in words; empty without folds."""
    values = [row[key] for row in folds if row["class"] == name and key in row]
    values = [value for value in values if not np.isnan(value)]
    return f"folds: {min(values):{form}} to {max(values):{form}}" if values else ""


def _boxes_in_words(name: str, values: Mapping[str, float], folds: Sequence[Mapping[str, object]]) -> str:
    """How often the predicted box of class ``name`` is right; empty without true boxes."""
    if "iou_0.3" not in values:
        return ""
    low, share, high = (values[key] for key in ("iou_0.3_low", "iou_0.3", "iou_0.3_high"))
    count = round(values["images"])
    between = range_of_folds(folds, name, "iou_0.3", ".0%")
    interval = f"The 95 % interval is {low:.0%} to {high:.0%} if other images are tested with the same networks."
    if values["iou_0.3_worst"] < values["iou_0.3_best"] or _repeats(folds) > 1:
        repeats = f"repeats: {values['iou_0.3_worst']:.0%} to {values['iou_0.3_best']:.0%}"
        ranges = "; ".join(filter(None, (repeats, between)))
        return (
            f"{count} test images have true boxes of {name}. On average over the repeats, the predicted box overlaps a "
            f"true box with IoU > 0.3 in {share:.0%} of these images ({ranges}). {interval}"
        )
    between = f" ({between})" if between else ""
    return (
        f"{count} test images have true boxes of {name}. In {round(share * count)} of them ({share:.0%}), the "
        f"predicted box overlaps a true box with IoU > 0.3{between}. {interval}"
    )


def _positive(predictions: Predictions, truth: Truth) -> list[int]:
    """The indices of the bags that are positive for the first class, in the order of their names."""
    labels = dict(zip(truth.labels.names, truth.labels.values[:, 0].tolist(), strict=True))
    return [i for i in np.argsort(predictions.names).tolist() if labels[str(predictions.names[i])] == 1]
