"""The data of a run: the checked data set, its split, and the training images of the initial weights."""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from common.choices import Config

from images.batches import Split, crop_of, split_of
from images.cache import open_cache
from images.check import checked_index
from images.dataset import Index
from images.items import LabelledImages
from images.options import VAL_FRACTION
from images.provenance import digests_of, names_of_weights


class Sources(NamedTuple):
    """The data of a run.

    ``report``: the output of check_cxr.py, and the split. ``seen``: the images that the initial weights were trained
    on.
    """

    index: Index
    split: Split
    report: str
    seen: list[str]

    def data(self, args: argparse.Namespace, config: Config) -> tuple[LabelledImages, LabelledImages]:
        """Cropped images for training and whole images for validation, from the cache if there is one."""
        index, size = self.index, config["image_size"]
        loading = {"channels": index.about.channels, "fit": index.about.fit}
        images = index.paths if args.cache is None else open_cache(args.cache, index.paths, size, **loading)
        loading["sizes"] = index.sizes
        train_data = LabelledImages(images, index.labels, size, crop_of(config), config["seed"], index.names, **loading)
        return train_data, LabelledImages(images, index.labels, size, **loading)


def open_sources(args: argparse.Namespace, config: Config) -> Sources:
    """Reads and checks the data set of ``--data-dir``. Adds the digests of the images to ``config``.

    Raises:
        ValueError: the data set cannot be used, or leaves too few images.
    """
    index, report = checked_index(args)
    split = split_of(index, config)
    if index.test.all():
        raise ValueError(f"data-dir: there is no training image in {args.data_dir}")
    if not len(split.train):
        raise ValueError(f"val-fraction: {config['val_fraction']:g} leaves no training image")
    if index.val is not None and config["val_fraction"] != VAL_FRACTION:
        print("note: --val-fraction has no effect, because the data set names its validation images", file=sys.stderr)
    if config["val_fraction"] and not len(split.val):
        print("warning: there are no validation images, so no best network is chosen", file=sys.stderr)
    if len(split.train) < config["batch_size"]:
        raise ValueError(
            f"batch-size: expected at most the {len(split.train)} training images, got {config['batch_size']}"
        )
    seen = names_of_weights(config["weights"])
    config |= digests_of(index, split, seen)
    patients = f" of {len(split.val_patients)} other patients" if index.about.units == "patients" else ""
    counts = f"{len(split.train)} training images, {len(split.val)} validation images{patients}"
    return Sources(index, split, f"{report}\n\n{counts}", seen)
