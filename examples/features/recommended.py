"""The defaults of train_features.py that depend on the pooling and the head, and the commands that are printed."""

from __future__ import annotations

import shlex
from pathlib import Path

#: The search for small objects, for top-k pooling. Chosen by cross-validation on the blood-smear photos of BCCD.
SEARCH: dict[str, float] = {"k_start": 0.2, "restarts": 4, "trial_epochs": 30, "epochs": 30}
WITHOUT_SEARCH: dict[str, float] = {"k_start": 0.0, "restarts": 1, "trial_epochs": 8, "epochs": 60}
#: The heads that can be searched.
SEARCHED_HEADS = ("linear", "mlp")
FOLDS = ("--folds", "4")


def defaults_of(pooling: str, head: str) -> dict[str, float]:
    """The values of ``k_start``, ``restarts``, ``trial_epochs`` and ``epochs`` that are not given."""
    return SEARCH if pooling == "topk" and head in SEARCHED_HEADS else WITHOUT_SEARCH


def search_options() -> str:
    """The options of the search, as text for a command."""
    names = ("k_start", "restarts", "trial_epochs")
    return " ".join(f"--{name.replace('_', '-')} {SEARCH[name]:g}" for name in names)


def training_command(features: Path, images: Path, maps: bool, patches: bool, missing: bool = False) -> str:
    """The command that trains on ``features`` of ``images``: with boxes.csv if it lies beside the images.

    Args:
        maps: the bags are maps of the images: their boxes can be evaluated.
        patches: the bags hold pixels of patches.
        missing: images were left out.
    """
    labels, boxes = images / "labels.csv", images / "boxes.csv"
    words = ["python", "train_features.py", "--features", features]
    words += ["--labels", labels if labels.is_file() else labels.name]
    words += ["--boxes", boxes] if maps and boxes.is_file() else []
    words += ["--images", images, *FOLDS]
    words += ["--head", "patches"] if patches else []
    words += ["--allow-missing"] if missing else []
    return shlex.join(map(str, [*words, "--out", Path("runs") / "sgl"]))


def prediction_command(run: Path, features: Path, images: Path, tuned: bool) -> str:
    """The command that applies the heads of ``run`` to ``features`` of new ``images``.

    Args:
        tuned: it is a run of finetune_features.py.
    """
    words = ["python", "predict_features.py", "--run", run, "--features", features, "--images", images]
    words += ["--before", "new_before"] if tuned else []
    return shlex.join(map(str, [*words, "--out", "found_tuned" if tuned else "found"]))
