"""Commands of the tests of pretrained features: options of a small network, a training, changed files."""

from __future__ import annotations

import train_features

#: Options of extract_features.py for a small network without pretrained weights.
NETWORK = ("--backbone", "resnet18", "--weights", "none", "--cut", "layer1")


def command(bag_folder, out, *options):
    """The exit status of train_features.py with ``options``, on the bags and labels of ``bag_folder``."""
    data = ["--features", str(bag_folder / "features"), "--labels", str(bag_folder / "labels.csv")]
    return train_features.main([*data, "--out", str(out), "--overlays", "1", *options])


def change(path, old, new):
    """Replaces ``old`` by ``new`` in a text file, which must contain ``old``."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
