"""The training images of a run: the digests in its configuration, and split.csv."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
from common.choices import Config
from common.files import load_state

from images import nih
from images.batches import Split
from images.dataset import Index

#: The part in split.csv of images on which the initial weights were trained by another run.
PRETRAINED_PART = "weights"

#: Other properties that must not change when a run is resumed, with their names in messages.
DATA = {
    "train_names_digest": "choice of images",
    "train_labels_digest": "entry table (the labels of its images have changed since)",
    "train_files_digest": "content of its images (their files have other sizes)",
    "weights_names_digest": "run of the initial weights",
}


def about_of(index: Index) -> Config:
    """The properties of the data set that a network needs on another data set."""
    about = index.about
    return {
        "dataset": about.kind, "title": about.title, "classes": list(about.classes), "channels": about.channels,
        "fit": about.fit,
    }  # fmt: skip


def digest_of(lines: list[str]) -> str:
    """A digest of names of images, or of names and labels. Their order does not matter."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def digests_of(index: Index, split: Split, seen: list[str]) -> Config:
    """The digests of the images in the configuration of a run. ``seen``: images that the weights were trained on."""
    learned = (*split.train, *split.val)
    digests = {
        **about_of(index),
        "val_patients": split.val_patients.tolist(),
        "train_names_digest": digest_of([index.names[n] for n in learned]),
        "train_labels_digest": digest_of(
            [f"{index.names[n]} {np.nan_to_num(index.labels[n], nan=-1).astype(int)}" for n in learned]
        ),
        "train_files_digest": digest_of([f"{index.names[n]} {index.paths[n].stat().st_size}" for n in learned]),
    }
    return digests | ({"weights_names_digest": digest_of(seen)} if seen else {})


def trained_patients(run: Path, names: set[str], index: Index) -> set[str]:
    """The patients of the training images ``names``. Empty if ``index`` belongs to another kind of data set.

    In ChestX-ray14, file names begin with the number of the patient. For other data sets, split.csv has the patients.
    """
    if index.about.kind == nih.DESCRIPTION.kind:
        return {str(int(name[:8])) for name in names if nih.NAME.fullmatch(name)}
    config = load_state(Path(run) / "last.pt", mmap=True)["config"]
    if config.get("dataset") != index.about.kind:
        return set()
    with (Path(run) / "split.csv").open(newline="", encoding="utf-8") as file:
        return {row["patient"] for row in csv.DictReader(file) if row.get("patient")}


def trained_names(run: Path) -> set[str]:
    """The training and validation images of a run, and those of the run that its initial weights came from.

    Raises:
        ValueError: split.csv is missing or was changed.
    """
    path = Path(run) / "split.csv"
    if not path.is_file():
        raise ValueError(f"run: {run} holds no split.csv, the list of its training images")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["image"], row["part"]) for row in csv.DictReader(file)]
    config = load_state(Path(run) / "last.pt", mmap=True)["config"]
    own, pretrained = (
        [n for n, part in rows if (part == PRETRAINED_PART) == of_weights] for of_weights in (False, True)
    )
    if digest_of(own) != config["train_names_digest"] or digest_of(pretrained) != config.get(
        "weights_names_digest", digest_of([])
    ):
        raise ValueError(f"{path}: these are not the images that the run was trained on")
    return {name for name, _ in rows}


def names_of_weights(weights: str) -> list[str]:
    """The images that the weights were trained on, if a run of train_cxr.py wrote them.

    Raises:
        ValueError: a run wrote them, but its split.csv is not in the same folder.
    """
    path = Path(weights)
    if not path.is_file():
        return []
    config = load_state(path).get("config", {})  # not memory-mapped, because older file formats do not support it
    if not isinstance(config, dict) or "train_names_digest" not in config:
        return []
    try:
        names = trained_names(path.parent)
    except ValueError as error:
        raise ValueError(
            f"weights: {weights} comes from a training, but its training images are unknown: {error}"
        ) from None
    if load_state(path.parent / "last.pt", mmap=True)["config"]["train_names_digest"] != config["train_names_digest"]:
        raise ValueError(f"weights: expected a checkpoint of the run in {path.parent}, got {weights} of another run")
    return sorted(names)
