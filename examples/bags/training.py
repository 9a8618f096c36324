"""Trains a network on bags of images with one of the losses: the loop, checkpoints, and metrics.

A configuration is a flat dictionary of all settings that decide a result. On the CPU, the same configuration and seed
give bitwise the same result, also after an interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.choices import Config
from common.csv_table import write_rows
from common.files import load_state, save_atomically
from common.losses import k_at, pooling_of
from common.losses import make_criterion as make_common_criterion
from common.metrics import auc
from torch import Tensor, nn
from tqdm import tqdm

from bags.authors_losses import AUTHORS_LOSSES
from bags.drawing import Bags, take
from bags.metrics import METRICS, iou, iou_pooled
from bags.options import OLDER
from sgl_ops import BagLoss, SGLLoss
from sgl_ops.pooling import MaxPooling, TopKPooling


def make_criterion(config: Config) -> nn.Module:
    """The loss of a configuration, including the losses of the authors' code."""
    return AUTHORS_LOSSES[config["loss"]]() if config["loss"] in AUTHORS_LOSSES else make_common_criterion(config)


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def forward(model: nn.Module, images: Tensor, index: Tensor) -> Tensor:
    """Logits (T,) of the images ``index`` (T,).

    On the CPU, the images are processed in small groups, whose activations fit into the cache and into memory that is
    reused in every step. This makes a small network nearly twice as fast. A network with batch normalization gets all
    images at once, because it normalizes them together.
    """
    group = 256 if images.device.type == "cpu" else 4096
    if model.training and has_batch_norm(model):
        group = len(index)
    return torch.cat([model(images[part]).reshape(-1).float() for part in index.split(max(group, 1))])


def instance_logits(model: nn.Module, images: Tensor, index: Tensor) -> Tensor:
    """Logits (T,) of the images ``index`` (T,), without gradient. The network computes each distinct image once."""
    unique, where = index.unique(return_inverse=True)
    with torch.inference_mode():
        return forward(model, images, unique)[where]


def set_progress(criterion: nn.Module, config: Config, epochs: int) -> None:
    """Sets k of top-k pooling, and lam, for the next epoch after ``epochs`` epochs. lam is 0 while k falls."""
    if not config["k_start"]:
        return
    criterion.pooling.k = k_at(config, config["k"], round(config["bag_size"]), epochs)
    if isinstance(criterion, SGLLoss):
        criterion.lam = config["lam"] if epochs >= config["k_epochs"] else 0.0


def measure(logits: Tensor, bags: Bags, pooling: nn.Module) -> dict[str, float]:
    """AUC of the bags and both IoUs of their instances at p > 0.5, from instance logits (T,)."""
    scores = pooling(logits, offsets=bags.offsets)
    found, positive, offsets = (x.cpu().numpy() for x in (logits > 0, bags.positive, bags.offsets))
    return {
        "auc": auc(scores.cpu().numpy(), bags.labels.cpu().numpy()),
        "iou": iou(found, positive, offsets),
        "iou_pooled": iou_pooled(found, positive, offsets),
    }


def train_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    bags: Bags,
    batch_size: int,
    order: Tensor,
) -> float:
    """Trains one epoch over the bags in ``order``. Returns the mean loss of a bag."""
    total = 0.0
    for which in order.split(batch_size):
        optimizer.zero_grad()
        loss = backward(model, criterion, images, take(bags, which))
        optimizer.step()
        total += loss * len(which)
    return total / len(order)


def backward(model: nn.Module, criterion: nn.Module, images: Tensor, batch: Bags) -> float:
    """Adds the gradient of the loss of ``batch`` to the parameters. Returns the loss.

    A network without batch normalization computes every distinct image of the batch once. With max or top-k pooling,
    the bag loss has a gradient for a few instances of a bag only. The network then computes all images without
    gradient, and these few a second time with gradient.
    """
    if has_batch_norm(model):
        loss = criterion(forward(model, images, batch.index), batch.labels, offsets=batch.offsets)
        loss.backward()
        return float(loss.detach())
    unique, where = batch.index.unique(return_inverse=True)
    bag_loss = isinstance(criterion, BagLoss) or (isinstance(criterion, SGLLoss) and criterion.lam == 0)
    few = bag_loss and isinstance(criterion.pooling, (MaxPooling, TopKPooling))
    with torch.set_grad_enabled(not few):
        logits = forward(model, images, unique)
    if not few:
        loss = criterion(logits[where], batch.labels, offsets=batch.offsets)
        loss.backward()
        return float(loss.detach())
    logits.requires_grad_()
    loss = criterion(logits[where], batch.labels, offsets=batch.offsets)
    (gradient,) = torch.autograd.grad(loss, logits)
    # NaN != 0, so that a NaN gradient also reaches the parameters
    nonzero = gradient.nonzero()[:, 0]
    if len(nonzero):
        forward(model, images, unique[nonzero]).backward(gradient[nonzero])
    return float(loss.detach())


def train_run(
    make_model: Callable[[], nn.Module],
    config: Config,
    seed: int,
    images: dict[str, Tensor],
    bags: dict[str, Bags],
    checkpoint: Path,
    resume: bool,
    quiet: bool = False,
    save_every: float = 0.0,
) -> tuple[dict[str, Any], list[dict[str, Any]], nn.Module]:
    """Trains one network and tests it.

    ``images`` and ``bags`` have the keys train, val and test. After the training, two networks are evaluated on the
    test bags: that of the last epoch, and that of the epoch with the highest validation AUC (ties: the lowest loss). If
    both are the same epoch, it is tested once. Epochs are validated every ``val_every`` epochs, and the last one
    always.

    Args:
        save_every: seconds between two checkpoints; 0 saves every epoch. The last epoch is always saved.

    Returns:
        the entry in metrics.json, the history (one row per epoch), and the network of the last epoch.
    """
    torch.manual_seed(seed)
    device = bags["train"].labels.device
    model = make_model().to(device)
    criterion, pooling = make_criterion(config).to(device), pooling_of(config)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config["lr"], betas=(0.9, 0.999), weight_decay=config["weight_decay"]
    )
    state: dict[str, Any] = {"epoch": 0, "history": [], "best": None, "seconds": 0.0, "cpu_seconds": 0.0}
    if resume and checkpoint.exists():
        state = load_state(checkpoint)
        stored = OLDER | state["config"]
        if stored != config:
            different = [key for key in config if stored.get(key) != config[key]]
            raise ValueError(f"resume: {checkpoint} was trained with another {', '.join(different)}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    description = f"{config['loss']} ({config['pooling']}) seed {seed}"
    progress = tqdm(
        range(state["epoch"] + 1, config["epochs"] + 1),
        desc=description,
        initial=state["epoch"],
        total=config["epochs"],
        disable=quiet or None,
        mininterval=0.5,
    )
    saved = time.monotonic()
    for epoch in progress:
        start, cpu_start = time.perf_counter(), time.process_time()
        # drawn from seed and epoch, so that a checkpoint does not need the state of the generator
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(bags["train"].labels), generator=generator).to(device)
        model.train()
        set_progress(criterion, config, epoch - 1)
        loss = train_epoch(model, criterion, optimizer, images["train"], bags["train"], config["batch_size"], order)
        row = {"epoch": epoch, "loss": loss} | dict.fromkeys(("val_loss", *(f"val_{name}" for name in METRICS)))
        if epoch % config["val_every"] == 0 or epoch == config["epochs"]:
            model.eval()
            logits = instance_logits(model, images["val"], bags["val"].index)
            val_loss = float(criterion(logits, bags["val"].labels, offsets=bags["val"].offsets))
            validation = measure(logits, bags["val"], pooling)
            row |= {"val_loss": val_loss} | {f"val_{k}": v for k, v in validation.items()}
            best_score = (validation["auc"], -val_loss)
            if state["best"] is None or best_score > tuple(state["best"]["merit"]):
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                state["best"] = {"merit": list(best_score), "epoch": epoch, "model": weights}
            progress.set_postfix(loss=f"{loss:.3f}", val_auc=f"{validation['auc']:.3f}")
        state["history"].append(row)
        if progress.disable and not quiet:  # the output is a file or a pipe: print one line per epoch
            validated = "" if row["val_auc"] is None else f", validation AUC {row['val_auc']:.3f}"
            print(f"{description}: epoch {epoch} of {config['epochs']}, loss {loss:.3f}{validated}", flush=True)
        state |= {
            "epoch": epoch,
            "seconds": state["seconds"] + time.perf_counter() - start,
            "cpu_seconds": state.get("cpu_seconds", 0.0) + time.process_time() - cpu_start,
            "config": config,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        if epoch == config["epochs"] or time.monotonic() - saved >= save_every:
            save_atomically(state, checkpoint)
            saved = time.monotonic()
    progress.close()
    model.eval()
    entry = {"seed": seed, "epoch": state["epoch"]}
    entry["last"] = measure(instance_logits(model, images["test"], bags["test"].index), bags["test"], pooling)
    entry["best_val"] = dict(entry["last"])
    if state["best"]["epoch"] != state["epoch"]:
        best = make_model().to(device)
        best.load_state_dict(state["best"]["model"])
        best.eval()
        logits = instance_logits(best, images["test"], bags["test"].index)
        entry["best_val"] = measure(logits, bags["test"], pooling)
    entry["best_val"] |= {"epoch": state["best"]["epoch"], "validation_auc": state["best"]["merit"][0]}
    return entry, state["history"], model


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over the runs of the metrics of both networks. With several runs, also the worst and the best."""
    kinds: dict[str, Callable[[list[float]], float]] = {"mean": lambda v: float(np.mean(v))}
    if len(runs) > 1:
        kinds |= {"worst": min, "best": max}
    return {
        kind: {
            which: {name: of([run[which][name] for run in runs]) for name in METRICS} for which in ("last", "best_val")
        }
        for kind, of in kinds.items()
    }


def write_history(histories: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """One row per seed and epoch."""
    write_rows([{"seed": seed} | row for seed, rows in histories.items() for row in rows], path)
