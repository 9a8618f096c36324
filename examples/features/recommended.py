"""The recommended options of train_features.py, for the commands that use or print them.

docs/own-features.md shows the same options.
"""

from __future__ import annotations

import shlex
from pathlib import Path

#: The search for small objects. They were chosen by cross-validation on the blood-smear photos of BCCD.
SEARCH = ("--k-start", "0.2", "--restarts", "4", "--trial-epochs", "30")
#: All options of the head for small objects.
SMALL_OBJECTS = (*SEARCH, "--epochs", "30")
FOLDS = ("--folds", "4")


def training_command(features: Path, images: Path, maps: bool, patches: bool) -> str:
    """The command that trains on ``features`` of ``images``: with boxes.csv if it lies beside the images.

    Args:
        maps: the bags are maps of the images: their boxes can be evaluated.
        patches: the bags hold pixels of patches.
    """
    labels, boxes = images / "labels.csv", images / "boxes.csv"
    words = ["python", "train_features.py", "--features", features]
    words += ["--labels", labels if labels.is_file() else labels.name]
    words += ["--boxes", boxes] if maps and boxes.is_file() else []
    words += ["--images", images, *FOLDS]
    words += ["--head", "patches"] if patches else SMALL_OBJECTS
    return shlex.join(map(str, [*words, "--out", Path("runs") / "sgl"]))


def prediction_command(run: Path, features: Path, images: Path, tuned: bool) -> str:
    """The command that applies the heads of ``run`` to ``features`` of new ``images``.

    Args:
        tuned: it is a run of finetune_features.py.
    """
    words = ["python", "predict_features.py", "--run", run, "--features", features, "--images", images]
    words += ["--before", "new_before"] if tuned else []
    return shlex.join(map(str, [*words, "--out", "found_tuned" if tuned else "found"]))
