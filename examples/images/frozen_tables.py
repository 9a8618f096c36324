"""The tables of frozen_cxr.py: the runs by method, and the differences between methods."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.csv_table import write_rows
from common.files import read_json
from common.metrics import above_equal_below, interval

from images.frozen import METHODS, T_IOU

CENTRE = "centre box"

#: The runs of a method by seed, as the files of frozen_cxr.py train hold them.
Runs = dict[int, dict[str, Any]]


def read_runs(folder: Path) -> dict[str, Runs]:
    """The runs in ``folder`` by method, in the order of METHODS.

    Raises:
        ValueError: there are no runs, no boxes, or the runs have different sets of boxes.
    """
    runs = [read_json(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise ValueError(f"runs: {folder} holds no run")
    if any(list(run["boxes"]) != list(runs[0]["boxes"]) for run in runs):
        raise ValueError(
            f"runs: expected equal sets of boxes in all runs of {folder}; use --det10, and --rsna, for all or none"
        )
    if not runs[0]["boxes"]:
        raise ValueError(f"runs: the runs of {folder} have no boxes; --validate needs --det10 or --rsna")
    found: dict[str, Runs] = {method: {} for method in METHODS if any(run["method"] == method for run in runs)}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found[run["method"]][run["seed"]] = run
    return found


def table(args: argparse.Namespace) -> None:
    """Writes ``args.out``: a row for each method, set of boxes and rule of MAPS, with every seed."""
    by_method = read_runs(args.runs)
    rows = []
    for method, of_seeds in by_method.items():
        runs = list(of_seeds.values())
        aucs = [run["auc"] for run in runs]
        for boxes, rules in runs[0]["boxes"].items():
            for rule in rules:
                hits, patients = hits_of(runs, boxes, rule)
                row = {
                    "method": method, "boxes": boxes, "rule": rule, "seeds": len(runs), "count": hits.shape[1],
                    "auc": round(float(np.mean(aucs)), 4), "auc_of_seeds": " ".join(f"{a:.3f}" for a in aucs),
                }  # fmt: skip
                for k, least in enumerate(T_IOU):
                    of_seed = hits[:, :, k].mean(1)
                    row |= {
                        f"iou_{least}": round(float(of_seed.mean()), 4),
                        f"iou_{least}_interval": interval_over_patients(hits[:, :, k].mean(0), patients),
                        f"iou_{least}_of_seeds": " ".join(f"{a:.2f}" for a in of_seed),
                    }
                pointing = [run["boxes"][boxes][rule]["pointing"] for run in runs]
                row["pointing"] = round(float(np.mean(pointing)), 4)
                row["pointing_of_seeds"] = " ".join(f"{p:.2f}" for p in pointing)
                rows.append(row)
    (run, *_) = next(iter(by_method.values())).values()
    for boxes, rules in run["boxes"].items():
        centre = np.array(rules["half"]["centre"], float)
        shares = {f"iou_{t}": round(float(centre[:, k].mean()), 4) for k, t in enumerate(T_IOU)}
        rows.append({"method": CENTRE, "boxes": boxes, "count": len(centre)} | shares)
    write_rows(rows, args.out, list(rows[0]))
    print(f"{args.out}: {len(rows)} rows of {sum(map(len, by_method.values()))} runs")


def compare(args: argparse.Namespace) -> None:
    """Writes ``args.out``: a row for each pair of methods, set of boxes and rule of MAPS, with their difference.

    Raises:
        ValueError: a method of --pair has no runs, or two methods have no seed, or other boxes, in common.
    """
    firsts = read_runs(args.runs)
    seconds = read_runs(args.minus) if args.minus else firsts
    pairs = args.pair or (usual_pairs(firsts) if seconds is firsts else [(m, m) for m in firsts if m in seconds])
    if not pairs:
        raise ValueError(f"runs: {args.runs} has no two methods to compare; name them with --pair")
    rows = []
    for first, second in pairs:
        if first not in firsts:
            raise ValueError(f"pair: {args.runs} has no runs of {first!r}")
        if second not in [*seconds, CENTRE]:
            raise ValueError(f"pair: {args.minus or args.runs} has no runs of {second!r}")
        own, others = firsts[first], seconds.get(second)
        if others and not own.keys() & others.keys():
            raise ValueError(f"pair: the runs of {first!r} and {second!r} have no seed in common")
        rows += list(_differences(first, second, own, others))
    for row in rows:
        if row["rule"] == "half":
            values = (
                f"IoU > {t}: {row[f'iou_{t}']:+.2f} ({row[f'iou_{t}_interval']}), {row[f'iou_{t}_seeds']}"
                for t in T_IOU[:2]
            )
            print(f"{row['boxes']:5}  {row['method']} - {row['minus']}: {'; '.join(values)}")
    write_rows(rows, args.out)
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


def _differences(first: str, second: str, own: Runs, others: Runs | None) -> Iterator[dict[str, Any]]:
    """The rows of ``first`` minus ``second``; without ``others``, ``second`` is the box in the centre."""
    seeds = [seed for seed in own if not others or seed in others]
    runs, minus = [own[seed] for seed in seeds], [others[seed] for seed in seeds] if others else []
    for boxes, rules in runs[0]["boxes"].items():
        for rule in rules:
            hits, patients = hits_of(runs, boxes, rule)
            if minus:
                if boxes not in minus[0]["boxes"]:
                    continue
                other_hits, other_patients = hits_of(minus, boxes, rule)
                if not np.array_equal(patients, other_patients):
                    raise ValueError(f"pair: the runs of {first!r} and {second!r} have other boxes of {boxes}")
            else:
                other_hits = np.array([run["boxes"][boxes][rule]["centre"] for run in runs], float)
            row: dict[str, Any] = {
                "method": first, "minus": second, "boxes": boxes, "rule": rule, "seeds": len(seeds),
                "count": hits.shape[1],
            }  # fmt: skip
            row |= {"auc": "", "auc_seeds": "", "pointing": "", "pointing_seeds": ""}
            if minus:
                values = {
                    "auc": [(a["auc"], b["auc"]) for a, b in zip(runs, minus, strict=True)],
                    "pointing": [
                        tuple(run["boxes"][boxes][rule]["pointing"] for run in pair)
                        for pair in zip(runs, minus, strict=True)
                    ],
                }
                for name, of_seeds in values.items():
                    change = -np.diff(of_seeds)[:, 0]
                    row |= {name: round(float(change.mean()), 4), f"{name}_seeds": signs(change)}
            for k, least in enumerate(T_IOU):
                change = hits[:, :, k] - other_hits[:, :, k]
                row |= {
                    f"iou_{least}": round(float(change.mean()), 4),
                    f"iou_{least}_interval": interval_over_patients(change.mean(0), patients),
                    f"iou_{least}_seeds": signs(change.mean(1)),
                }
            yield row


def hits_of(runs: Sequence[dict[str, Any]], boxes: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether each box is found, (seeds, boxes, thresholds), and the patients (boxes,)."""
    found = [run["boxes"][boxes][rule] for run in runs]
    return np.array([f["hits"] for f in found], float), np.array(found[0]["patients"])


def signs(differences: np.ndarray) -> str:
    """The number of seeds with a difference above, equal to and below 0: "ABOVE / EQUAL / BELOW"."""
    return " / ".join(map(str, above_equal_below(differences)))


def interval_over_patients(values: np.ndarray, patients: np.ndarray, draws: int = 2000) -> str:
    """The 95 % interval of the mean of ``values`` (n,), by a bootstrap over patients: "LOW to HIGH"."""
    _, number = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    low, high = interval(sums[chosen].sum(1) / counts[chosen].sum(1))
    return f"{low:.2f} to {high:.2f}"
