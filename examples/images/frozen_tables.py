"""The tables of frozen_cxr.py: the runs by method, and the differences between methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from common.csv_table import write_rows
from common.metrics import Interval, interval, signs

from images.frozen import T_IOU
from images.frozen_files import Runs, different_boxes, read_runs
from images.frozen_methods import METHODS

CENTRE = "centre box"


def table(args: argparse.Namespace) -> None:
    """Writes ``args.out``: a row for each method, set of boxes and rule, with every seed."""
    by_method = read_runs(args.runs)
    rows = []
    for method, of_seeds in by_method.items():
        runs = list(of_seeds.values())
        for boxes, rules in runs[0]["boxes"].items():
            for rule in rules:
                values = measured(runs, boxes, rule)
                row = {
                    "method": method, "boxes": boxes, "rule": rule, "seeds": len(runs), "count": values.hits.shape[1],
                    "auc": round(float(values.auc.mean()), 4), "auc_of_seeds": " ".join(f"{a:.3f}" for a in values.auc),
                }  # fmt: skip
                for k, least in enumerate(T_IOU):
                    of_seed = values.hits[:, :, k].mean(1)
                    low, high = interval_over_patients(values.hits[:, :, k].mean(0), values.patients)
                    row |= {
                        f"iou_{least}": round(float(of_seed.mean()), 4),
                        f"iou_{least}_interval": f"{low:.2f} to {high:.2f}",
                        f"iou_{least}_of_seeds": " ".join(f"{a:.2f}" for a in of_seed),
                    }
                row["pointing"] = round(float(values.pointing.mean()), 4)
                row["pointing_of_seeds"] = " ".join(f"{p:.2f}" for p in values.pointing)
                rows.append(row)
    (run, *_) = next(iter(by_method.values())).values()
    for boxes, rules in run["boxes"].items():
        centre = np.array(rules["half"]["centre"], float)
        shares = {f"iou_{t}": round(float(centre[:, k].mean()), 4) for k, t in enumerate(T_IOU)}
        rows.append({"method": CENTRE, "boxes": boxes, "count": len(centre)} | shares)
    write_rows(rows, args.out, list(rows[0]))
    print(f"{args.out}: {len(rows)} rows of {sum(map(len, by_method.values()))} runs")


def compare(args: argparse.Namespace) -> None:
    """Writes ``args.out``: a row for each pair of methods, set of boxes and rule, with their difference.

    Runs are paired by their seed. Sets of boxes, and rules, that only one of two runs has are left out. With --rules,
    there is one row for each pair and set of boxes: the first method with the first rule minus the second method with
    the second rule.

    Raises:
        ValueError: a method of --pair has no runs, two methods have no seed or no set of boxes in common, or a
            run has no rule of --rules.
    """
    firsts = read_runs(args.runs)
    folder = args.minus or args.runs
    seconds = read_runs(folder) if args.minus else firsts
    pairs = args.pair or ([(m, m) for m in firsts if m in seconds] if args.minus else usual_pairs(firsts))
    if not pairs:
        lacks = f"{args.runs} and {folder} have no method in common" if args.minus else f"{folder} has no run with SGL"
        raise ValueError(f"runs: {lacks}; name the methods with --pair")
    rows = []
    for first, second in pairs:
        if first not in firsts:
            raise ValueError(f"pair: {args.runs} has no runs of {first!r}")
        if second not in [*seconds, CENTRE]:
            raise ValueError(f"pair: {folder} has no runs of {second!r}")
        try:
            rows += _differences(first, second, firsts[first], seconds.get(second), args.rules)
        except ValueError as error:
            raise ValueError(f"runs: {first!r} of {args.runs} and {second!r} of {folder} {error}") from None
    printed = []
    for row in rows:
        intervals = {name: cell for name, cell in row.items() if isinstance(cell, Interval)}
        printed.append(row | {name: f"{i.low:.3f} to {i.high:.3f}" for name, i in intervals.items()})
        if args.rules or row["rule"] == "half":
            values = "; ".join(
                f"IoU > {t}: {row[f'iou_{t}']:+.2f} ({i.low:.2f} to {i.high:.2f}), {row[f'iou_{t}_seeds']}"
                for t, i in zip(T_IOU[:2], intervals.values(), strict=False)
            )
            print(f"{row['boxes']:5}  {row['method']} - {row['minus']}: {values}")
    write_rows(printed, args.out)
    print(f"{args.out}: {len(rows)} rows; seeds: above / equal / below")


def usual_pairs(methods: Sequence[str] | dict[str, Runs]) -> list[tuple[str, str]]:
    """Each SGL method with its own bag loss, the paper's baseline, CAM, Grad-CAM and the box in the centre."""
    pairs = []
    for method in methods:
        if METHODS[method].loss == "sgl":
            own = f"{method.split(' sgl ')[0]} bag"
            others = dict.fromkeys((own, "mean bag", "cam", "grad-cam"))
            pairs += [(method, other) for other in others if other in methods] + [(method, CENTRE)]
    return pairs


def _differences(
    first: str, second: str, own: Runs, others: Runs | None, chosen: tuple[str, str] | None = None
) -> list[dict[str, Any]]:
    """The rows of ``first`` minus ``second``; without ``others``, ``second`` is the box in the centre.

    Args:
        chosen: the rule of each of the two. By default, each rule that both have.
    """
    seeds = [seed for seed in own if not others or seed in others]
    runs, minus = [own[seed] for seed in seeds], [others[seed] for seed in seeds] if others else []
    if not runs:
        raise ValueError("have no seed in common")
    sets = [boxes for boxes in runs[0]["boxes"] if not minus or boxes in minus[0]["boxes"]]
    if not sets:
        raise ValueError("have no set of boxes in common")
    rows = []
    for boxes in sets:
        rules = runs[0]["boxes"][boxes]
        if minus and different_boxes(rules, minus[0]["boxes"][boxes]):
            raise ValueError(f"have different boxes of {boxes}; use the same --validate and the same table of boxes")
        of_others = minus[0]["boxes"][boxes] if minus else rules
        for rule, other_rule in [chosen] if chosen else [(rule, rule) for rule in rules if rule in of_others]:
            for title, known in ((rule, rules), (other_rule, of_others)):
                if title not in known:
                    raise ValueError(f"have no rule {title!r}, only {', '.join(known)}; train with --fractions")
            own_values = measured(runs, boxes, rule)
            row: dict[str, Any] = {
                "method": first, "minus": second, "boxes": boxes,
                "rule": rule if rule == other_rule else f"{rule} - {other_rule}", "seeds": len(seeds),
                "count": own_values.hits.shape[1],
            }  # fmt: skip
            row |= {"auc": "", "auc_seeds": "", "pointing": "", "pointing_seeds": ""}
            subtracted = own_values.centre
            if minus:
                other_values = measured(minus, boxes, other_rule)
                subtracted = other_values.hits
                for name in ("auc", "pointing"):
                    change = getattr(own_values, name) - getattr(other_values, name)
                    row |= {name: round(float(change.mean()), 4), f"{name}_seeds": signs(change)}
            for k, least in enumerate(T_IOU):
                change = (own_values.hits - subtracted)[:, :, k]
                row |= {
                    f"iou_{least}": round(float(change.mean()), 4),
                    f"iou_{least}_interval": interval_over_patients(change.mean(0), own_values.patients),
                    f"iou_{least}_seeds": signs(change.mean(1)),
                }
            rows.append(row)
    return rows


class Measured(NamedTuple):
    """The results of runs with several seeds, for a set of boxes and a rule.

    Attributes:
        auc, pointing: (seeds,).
        hits: (seeds, boxes, thresholds), 1 where the IoU of the predicted box is above the threshold, otherwise 0.
        centre: (boxes, thresholds), the same for the box in the centre.
        patients: (boxes,).
    """

    auc: np.ndarray
    pointing: np.ndarray
    hits: np.ndarray
    centre: np.ndarray
    patients: np.ndarray


def measured(runs: Sequence[dict[str, Any]], boxes: str, rule: str) -> Measured:
    found = [run["boxes"][boxes][rule] for run in runs]
    return Measured(
        np.array([run["auc"] for run in runs], float),
        np.array([f["pointing"] for f in found], float),
        np.array([f["hits"] for f in found], float),
        np.array(found[0]["centre"], float),
        np.array(found[0]["patients"]),
    )


def interval_over_patients(values: np.ndarray, patients: np.ndarray, draws: int = 2000) -> Interval:
    """The 95 % interval of the mean of ``values`` (n,), by a bootstrap over patients."""
    _, number = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    return interval(sums[chosen].sum(1) / counts[chosen].sum(1))
