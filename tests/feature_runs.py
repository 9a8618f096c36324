"""Runs of train_features.py on the bags of the fixture ``bag_folder``."""

from __future__ import annotations

import train_features


def command(bag_folder, out, *options):
    """The exit status of train_features.py with ``options``, on the bags and labels of ``bag_folder``."""
    data = ["--features", str(bag_folder / "features"), "--labels", str(bag_folder / "labels.csv")]
    return train_features.main([*data, "--out", str(out), "--overlays", "1", *options])
