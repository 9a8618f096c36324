"""Advice for a training whose instance loss never started."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from features.training import Settings
from sgl_ops import LamSchedule


def lam_advice(histories: Sequence[Sequence[dict]], labels: Sequence[np.ndarray], settings: Settings) -> str | None:
    """What lam 0 in whole runs means, and what to change. None if lam rose in every run.

    Args:
        histories: the rows of the epochs of each run, as ``train`` logs them.
        labels: the labels (N, C) of the training bags of each run.
    """
    if settings.loss != "sgl" or settings.lam == 0:
        return None
    idle = [run for run, history in enumerate(histories) if history and all(row["lam"] == 0 for row in history)]
    if not idle:
        return None
    found = [value for run in idle for row in histories[run] for value in row["auc"] if not math.isnan(value)]
    best = f"{max(found):.2f}" if found else "unknown"
    text = (
        f"lam stayed 0 in {len(idle)} of {len(histories)} runs. These runs trained with the bag loss only: SGL had no "
        f"effect. The instance loss starts when the training AUC of half of the classes reaches --start-auc "
        f"{settings.start_auc:g}, or more with few bags. The highest AUC was {best}. "
    )
    if not any(can_learn(labels[run], settings.start_auc) for run in idle):
        return text + "There are too few training bags: a class needs at least four positive and four negative ones."
    changes = [f"train longer (--epochs {2 * settings.epochs})"]
    if settings.pooling != "topk":
        changes.append("use --pooling topk")
    if settings.head in ("linear", "mlp") and not (settings.k_start and settings.restarts > 1):
        changes.append("find small objects with --k-start 0.2 --restarts 4 --trial-epochs 30")
    changes.append("extract other features (--stages, --cut, larger images)")
    return (
        text + f"To change this: {'; '.join(changes)}. If the highest AUC is close to the threshold, lower "
        "--start-auc. --start at_once uses the instance loss from the first step."
    )


def can_learn(labels: np.ndarray, auc: float) -> bool:
    """Whether lam rises if the bags with ``labels`` (N, C) are separated perfectly: False for too few bags."""
    targets = torch.from_numpy(labels)
    schedule = LamSchedule(1.0, auc=auc, rise=1, window=max(8, len(labels)), interval=1)
    return schedule.step(targets.nan_to_num(), targets) > 0
