"""The loss of a configuration, and the schedules of lam and k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from common.choices import LOSSES, Config
from sgl_ops import BagLoss, BILLoss, LamSchedule, MMMLoss, SGLLoss, TopKSchedule
from sgl_ops.pooling import POOLINGS, TopKPooling


def pooling_of(config: Config) -> nn.Module:
    """The pooling of a configuration. Top-k pooling has the k of the end of the training."""
    pooling = config["pooling"]
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    return TopKPooling(config["k"]) if pooling == "topk" and "k" in config else POOLINGS[pooling]()


def make_criterion(config: Config, process_group: Any = None) -> nn.Module:
    """The loss of a configuration. With ``process_group``, SGL counts instances over all processes.

    The other losses only divide by the number of bags and classes, which is the same in every process.
    """
    pooling = pooling_of(config)
    if config["loss"] == "sgl":
        return SGLLoss(
            delta_l=config["delta_l"],
            lam=config["lam"],
            pooling=pooling,
            rescale=config["rescale"],
            weighted=config["weighted"],
            normalize=config.get("normalize", "batch"),
            mask_weight=config.get("mask_weight", 0.0),
            **({} if process_group is None else {"process_group": process_group}),
        )
    if config["loss"] == "bag":
        return BagLoss(pooling=pooling)
    if config["loss"] == "bil":
        return BILLoss(pooling=pooling)
    if config["loss"] == "mmm":
        return MMMLoss()
    raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {config['loss']!r}")


def deciding_auc(auc: Sequence[float], needed: Sequence[float]) -> tuple[float, float] | None:
    """The AUC of the class that decides whether lam rises, and the AUC that it needs; None if no class counts.

    lam rises if half of the classes that count have their AUC. So the class that decides is in the middle of the
    distances to the needed AUC; with an even number of classes, it is the better one of the two in the middle.

    Args:
        auc: the AUC of each class, NaN = undefined.
        needed: the AUC that each class needs, NaN = the class does not count: :meth:`sgl_ops.LamSchedule.needed_auc`.
    """
    counting = [pair for pair in zip(auc, needed, strict=True) if not math.isnan(pair[1])]
    # an undefined AUC is the worst one
    ranked = sorted(counting, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[1] - pair[0])
    decides = ranked[(len(ranked) + 1) // 2 - 1] if ranked else (math.nan, math.nan)
    return None if math.isnan(decides[0]) else decides


def lam_warning(
    config: Config, history: Sequence[dict[str, Any]] = (), schedule: LamSchedule | None = None
) -> str | None:
    """A warning if lam is 0 in every step although the configuration has an instance loss; else None.

    Args:
        history: the rows of the finished epochs, with ``lam``. With ``start_auc``, only they show whether lam rose.
        schedule: that of lam, with ``start_auc``, for the AUC at its last measurement.
    """
    if config["loss"] != "sgl" or config["lam"] == 0:
        return None
    if config["start_auc"]:
        if not history or any(row["lam"] for row in history):
            return None
        auc, needed = (None, None) if schedule is None else (schedule.class_auc, schedule.class_needed)
        decides = None if auc is None or needed is None else deciding_auc(auc.tolist(), needed.tolist())
        which = "This AUC was" if auc is not None and len(auc) == 1 else "The AUC of the class that decides was"
        found = f" {which} {decides[0]:.3f} at the end, and it needs {decides[1]:.3f}." if decides else ""
        better = "" if config["k_start"] else ", or start with --pooling topk --k-start 0.2"
        return (
            "warning: lam stayed 0, because the AUC of the training images did not reach --start-auc "
            f"{config['start_auc']:g}.{found} The run trained with the bag loss only: SGL had no effect. Raise "
            f"--epochs, or lower --start-auc{better}"
        )
    if config["lam_delay"] < config["epochs"]:
        return None
    return (
        f"warning: lam stays 0, because --lam-delay {config['lam_delay']:g} is not below --epochs {config['epochs']}. "
        "The run trains with the bag loss only: SGL has no effect. Raise --epochs, or lower --lam-delay"
    )


def lam_at(config: Config, progress: float) -> float:
    """The weight of the instance loss after ``progress`` epochs: first 0, then rising to ``lam``, then ``lam``."""
    since_delay = progress - config["lam_delay"]
    warmup = config["lam_warmup"]
    return config["lam"] * min(max(since_delay / warmup if warmup else float(since_delay >= 0), 0.0), 1.0)


def k_at(config: Config, k: int, instances: int, progress: float) -> int:
    """k of top-k pooling after ``progress`` epochs: from a fraction ``k_start`` of ``instances`` down to ``k``.

    k falls during ``k_epochs`` epochs, as in :class:`sgl_ops.TopKSchedule`.
    """
    if progress >= config["k_epochs"]:
        return k
    schedule = TopKSchedule(k, start=max(round(config["k_start"] * instances), k), steps=1000)
    schedule.progress = int(1000 * progress / config["k_epochs"])
    return schedule.step()
