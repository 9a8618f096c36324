"""The settings of a run of train_features.py or finetune_features.py, and of the extraction of its features."""

from __future__ import annotations

from pathlib import Path

from common.files import read_json
from images.thresholds import map_threshold

from features.store import FeatureBags

#: The file of a run of train_features.py with its options, its classes, and the settings of the extraction.
SETTINGS = "settings.json"
#: There, in a run of finetune_features.py: the settings of the run that it continued.
BASE = "base"


def extraction_of(folder: Path) -> dict:
    """The settings of the extraction of a folder of features, or of those that a run of train_features.py used.

    Raises:
        ValueError: the folder is neither, or its run is older than these settings.
    """
    if not (folder / SETTINGS).is_file():
        return FeatureBags(folder).settings
    return extraction_of_run(folder)


def settings_of_run(folder: Path) -> tuple[dict, dict]:
    """``settings.json`` of a run, and the settings of the run of train_features.py that it continued.

    Both are the same unless ``folder`` is a run of finetune_features.py, which keeps the settings under ``BASE``.

    Raises:
        ValueError: ``folder`` is no run, or an older version made it.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"run: expected a folder of train_features.py, found no {path}")
    own = read_json(path)
    if "before" not in own:
        return own, own
    if BASE not in own:
        raise ValueError(f"run: {folder} was made by an older version; fine-tune again, into another --out")
    return own, own[BASE]


def threshold_of_run(known: dict) -> float:
    """The option --threshold, from the settings of a run. Runs of older versions have 0.5."""
    return map_threshold(known.get("threshold") or "0.5", labels=False)


def extraction_of_run(folder: Path) -> dict:
    """The settings of the extraction of the features of a run's heads. Raises ValueError if they are unknown."""
    _, known = settings_of_run(folder)
    if "extraction" not in known:
        raise ValueError(
            f"{folder}: expected a run of train_features.py, with the settings of its features; an older run gets "
            "them from the same command with --resume"
        )
    return known["extraction"]
