"""Training on bags: an epoch, what is measured after it, and checkpoints that an interrupted run continues from."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bags import Bags, take
from metrics import auc, iou, iou_pooled
from torch import Tensor, nn

from sgl_ops import SGLLoss

Row = dict[str, Any]


def instance_logits(network: nn.Module, images: Tensor, index: Tensor, chunk: int = 256) -> Tensor:
    """Logits of the images ``index``, (T,), of a network to which every image is alone.

    So each image goes through once, however many bags hold it, and few at a time, so that they stay in the cache.
    """
    unique, place = torch.unique(index, return_inverse=True)
    logits = torch.cat([network(images[part]) for part in unique.split(chunk)])
    return logits.index_select(0, place)


def train_epoch(
    network: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    bags: Bags,
    batch_size: int,
    max_steps: int | None = None,
) -> Row:
    """One pass over the bags in random order. Returns the loss and, where there are, its terms: means over the bags."""
    network.train()
    sums: dict[str, float] = {}
    for which in torch.randperm(len(bags.labels)).split(batch_size)[:max_steps]:
        batch = take(bags, which.to(bags.labels.device))
        logits = instance_logits(network, images, batch.index)
        if isinstance(criterion, SGLLoss):
            terms = criterion.terms(logits, batch.labels, offsets=batch.offsets)
            parts = {"loss": terms.total, "bag": terms.bag, "instance": terms.instance}
        else:
            parts = {"loss": criterion(logits, batch.labels, offsets=batch.offsets)}
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(which)
    return {name: value / len(bags.labels) for name, value in sums.items()}


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, bags: Bags) -> Tensor:
    """Instance logits (T,)."""
    network.eval()
    return instance_logits(network, images, bags.index)


@torch.inference_mode()
def measure(logits: Tensor, bags: Bags, pooling: nn.Module) -> Row:
    """AUC of the bags, and both IoUs of their instances with those whose probability is above 0.5."""
    bag_logits = pooling(logits, offsets=bags.offsets).cpu().numpy()
    found, positive, offsets = ((logits > 0).cpu().numpy(), bags.positive.cpu().numpy(), bags.offsets.cpu().numpy())
    return {
        "auc": auc(bag_logits, bags.labels.cpu().numpy()),
        "iou": iou(found, positive, offsets),
        "iou_pooled": iou_pooled(found, positive, offsets),
    }


def is_better(row: Row, best: Row | None) -> bool:
    """Whether an epoch beats the best one so far on the validation bags: by AUC, then by loss."""
    return best is None or (row["val_auc"], -row["val_loss"]) > (best["val_auc"], -best["val_loss"])


def rng_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``path`` holds either what it held before or all that ``write`` writes, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp" + path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The state that was saved under the same ``config``."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    for name in sorted(config.keys() | state["config"].keys()):
        before, now = state["config"].get(name), config.get(name)
        if before != now:
            raise ValueError(f"resume: {path} was made with {name} = {before!r}, not {now!r}")
    return state


def write_json(path: Path, value: object) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_csv(path: Path, rows: list[Row]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
