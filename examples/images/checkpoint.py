"""The trained network of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common.choices import Config
from common.files import load_state
from torch import nn

from images import nih
from images.models import PatchClassifier

#: Settings that configurations of older versions lack, with the values that these versions used.
OLDER = {
    "lam_delay": 0.0,
    "start_auc": 0.0,
    "rise": 100,
    "k_start": 0.0,
    "k_epochs": 5.0,
    "prior": 0.5,
    "cut": None,
    "freeze": 0,
    "dataset": nih.DESCRIPTION.kind,
    "title": nih.DESCRIPTION.title,
    "classes": list(nih.CLASSES),
    "channels": nih.DESCRIPTION.channels,
    "fit": nih.DESCRIPTION.fit,
}


def make_model(config: Config) -> PatchClassifier:
    return PatchClassifier(config["backbone"], config["output_stride"], len(config["classes"]), config["cut"])


def load_run(run: Path, device: str | torch.device, which: str | None = None) -> tuple[nn.Module, Config]:
    """A trained network, (n, 3, H, W) to logits (n, C, h, w), in evaluation mode, and its configuration.

    Args:
        which: ``"best"`` on the validation images, or ``"last"``; None: the best one if it exists, else the last.

    Raises:
        ValueError: the run, or this checkpoint of it, does not exist.
    """
    model, config, _ = load_network(run, device, which)
    return model, config


def load_network(
    run: Path, device: str | torch.device, which: str | None = None
) -> tuple[nn.Module, Config, dict[str, Any]]:
    """Like load_run. Also returns which checkpoint was loaded.

    Its keys are "network", ``"best"`` or ``"last"``, and "epoch", the number of complete epochs.
    """
    run = Path(run)
    which = which or ("best" if (run / "best.pt").exists() else "last")
    path = run / f"{which}.pt"
    if not path.is_file():
        raise ValueError(f"run: {run} holds no {path.name}")
    state = load_state(path)
    last = load_state(run / "last.pt", mmap=True)["config"]
    if any(state["config"].get(key) != last.get(key) for key in ("train_names_digest", "backbone", "loss", "seed")):
        raise ValueError(f"run: {path} and last.pt come from different trainings")
    state["config"] = OLDER | state["config"]
    model = make_model(state["config"])
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state["config"], {"network": which, "epoch": state["epoch"]}
