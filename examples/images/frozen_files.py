"""The files of the runs of frozen_cxr.py: reading them, and the settings that they were made with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from common.files import read_json

from images.frozen_methods import METHODS

#: The runs of a method by seed.
Runs = dict[int, dict[str, Any]]
#: The settings of a run, with the values of runs of older versions.
SETTINGS: dict[str, Any] = {
    "validate": [],
    "heads": 1,
    "mirror": False,
    "margin": 0.0,
    "fractions": [],
    "tuned": None,
}
#: The options of frozen_cxr.py that set them, where the name differs.
OPTIONS = {"tuned": "tune"}
#: Settings that a run of an older version may not name. They count as equal.
UNNAMED = ("components", "features")


def settings_of(run: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``run``. A run of an older version lacks some, and its "validate" is true or false.

    Args:
        others: the values of the settings UNNAMED in a run that does not name them.
    """
    unnamed = {name: others.get(name) for name in UNNAMED}
    known = {name: run.get(name, value) for name, value in (SETTINGS | unnamed).items()}
    if isinstance(known["validate"], bool):
        known["validate"] = [0] if known["validate"] else []
    return known


def refuse_other_settings(path: Path, settings: dict[str, Any], boxes: Collection[str]) -> None:
    """Raises ValueError if the run in ``path`` had other ``settings``, or other sets of ``boxes``."""
    run = read_json(path)
    known = settings_of(run, settings)
    changed = [name for name in settings if known[name] != settings[name]]
    changed += [name for name in ("det10", "rsna") if (name in run["boxes"]) != (name in boxes)]
    if changed:
        option = OPTIONS.get(changed[0], changed[0])
        raise ValueError(f"out: {path} was made with another --{option}; choose another --out")


def read_runs(folder: Path) -> dict[str, Runs]:
    """The runs in ``folder`` by method, in the order of METHODS.

    Raises:
        ValueError: there are no runs or no boxes, a file is no run, or the runs have different settings or boxes.
    """
    runs: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        if not isinstance(run, dict) or not {"method", "seed", "auc", "boxes"} <= run.keys():
            raise ValueError(f"runs: {path} is not a run of frozen_cxr.py train")
        if run["method"] not in METHODS:
            raise ValueError(f"runs: {path} has an unknown method: {run['method']!r}")
        if runs:
            _refuse_unequal(path, run, runs[0], folder)
        runs.append(run)
    if not runs:
        raise ValueError(f"runs: {folder} holds no run")
    if not runs[0]["boxes"]:
        raise ValueError(f"runs: the runs of {folder} have no boxes; --validate needs --det10 or --rsna")
    found: dict[str, Runs] = {method: {} for method in METHODS if any(run["method"] == method for run in runs)}
    for run in sorted(runs, key=lambda run: run["seed"]):
        found[run["method"]][run["seed"]] = run
    return found


def _refuse_unequal(path: Path, run: dict[str, Any], other: dict[str, Any], folder: Path) -> None:
    expected = settings_of(other, run)
    settings = settings_of(run, expected)
    changed = [name for name in settings if settings[name] != expected[name]]
    if changed:
        option = OPTIONS.get(changed[0], changed[0])
        raise ValueError(f"runs: {path} was made with another --{option} than the other runs of {folder}")
    if list(run["boxes"]) != list(other["boxes"]):
        raise ValueError(
            f"runs: expected equal sets of boxes in all runs of {folder}; use --det10, and --rsna, for all or none"
        )
    for boxes, rules in run["boxes"].items():
        if different_boxes(rules, other["boxes"][boxes]):
            raise ValueError(f"runs: {path} has other boxes of {boxes} than the other runs of {folder}")


def different_boxes(rules: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether the patients of two sets of boxes differ, or how well the box in the centre fits them.

    Neither depends on the rule.
    """
    return any(rules["half"][key] != others["half"][key] for key in ("patients", "centre"))
