"""The rows of compare_localization.py, and the settings of each. Nothing here imports torch, so that --help is fast."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from common.choices import Config
from images.backbones import BACKBONES, TORCHVISION

#: By receptive field in pixels: the number of 3x3 convolutions in the last three layers; the others are 1x1.
FIELDS = {"17": 0, "33": 1, "65": 3}
#: Also the local networks of train_cxr.py, which take several times as long.
NETWORKS = (*FIELDS, *(name for name in BACKBONES if name not in TORCHVISION))
STRIDE = 8
POOLINGS = ("max", "softmax", "mean")
LOSSES = {"bag": "bag only", "sgl": "SGL", "mask": "SGL, mask penalty"}
T_P = (0.5, 0.9)
SEEDS = (4, 5, 6)

#: The settings of a run that do not follow from its row and seed.
SETTINGS: Config = {
    "size": 96, "train_images": 1000, "test_images": 400, "epochs": 10, "batch_size": 32, "lr": 3e-3,
    "weight_decay": 1e-4, "prior": 0.1, "delta_l": 0.3, "lam": 1.0, "lam_delay": 2.0, "lam_warmup": 4.0,
    "normalize": "bag", "mask_weight": 0.0, "rescale": True, "weighted": True,
    "upsampling": "bilinear", "morphology": 5,
    "thresholds": 100,  # of MaxBoxAcc; the best one for saturated maps is 0.99
    "cell_centre": 4.5,  # of the first cell of every network, in pixels; odd receptive fields have a middle pixel
}  # fmt: skip
#: The settings that a pooling or a loss changes. The paper's lam is 1 with max pooling and 20 with softmax pooling.
SETTINGS_OF: dict[str, Config] = {
    "softmax": {"lam": 20.0},
    "mean": {"lam": 20.0},
    "max/mask": {"mask_weight": 1.0},
    "softmax/mask": {"mask_weight": 20.0},
    "mean/mask": {"mask_weight": 20.0},
}


class Row(NamedTuple):
    network: str
    pooling: str
    loss: str
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join([self.network, self.pooling, self.loss, *self.changes])

    @property
    def plain(self) -> bool:
        return not self.changes


class Run(NamedTuple):
    row: Row
    seed: int


#: The rows whose maps are drawn.
DRAWN = [Row(network, "max", loss) for network in ("17", "65") for loss in ("bag", "sgl")]
TABLE = [Row(*row) for row in product(NETWORKS, POOLINGS, LOSSES)]


def rows_of(name: str) -> list[Row]:
    """The rows of the table that begin with ``name``, with the settings at the end of ``name``.

    Raises:
        ValueError: there is no such row.
    """
    parts = name.split("/")
    changes = tuple(part for part in parts if "=" in part)
    plain = parts[: len(parts) - len(changes)]
    rows = [row._replace(changes=changes) for row in TABLE if row.name.split("/")[: len(plain)] == plain]
    if not rows or parts[len(plain) :] != list(changes):
        raise ValueError(f"rows: expected FIELD/POOLING/LOSS of {TABLE[0].name} ... {TABLE[-1].name}, got {name!r}")
    for row in rows:
        settings_of(row)
    return rows


def settings_of(row: Row) -> Config:
    """The settings of a run of this row.

    Raises:
        ValueError: a setting is unknown, or a value has the wrong type.
    """
    settings = SETTINGS | {"loss": "bag" if row.loss == "bag" else "sgl", "pooling": row.pooling}
    for key in (row.pooling, row.loss, f"{row.pooling}/{row.loss}"):
        settings |= SETTINGS_OF.get(key, {})
    for change in row.changes:
        key, _, text = change.partition("=")
        if key not in SETTINGS or isinstance(SETTINGS[key], bool):
            raise ValueError(f"rows: {row.name}: expected one of the settings {', '.join(SETTINGS)}, got {key!r}")
        try:
            settings[key] = type(SETTINGS[key])(text)
        except ValueError:
            raise ValueError(f"rows: {row.name}: expected a number for {key}, got {text!r}") from None
    return settings
