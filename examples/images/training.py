"""The state of a training (network, loss, optimizer, counters), the loss of a batch, and validation."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common.choices import Config
from common.files import load_state, save_atomically
from common.losses import k_at, lam_at, make_criterion
from common.metrics import auc
from common.processes import Processes
from torch import Tensor, nn

from images.batches import batches_of, crop_of, loader_of
from images.checkpoint import OLDER, make_model
from images.frames import cell_mask
from images.initial_head import set_initial_head
from images.items import LabelledImages
from images.models import load_weights
from images.options import EXTENDABLE
from images.pixels import to_input
from images.provenance import DATA
from sgl_ops import LamSchedule, SGLLoss
from sgl_ops.pooling import make_pooling

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TERMS = ("loss", "bag", "instance", "mask")


def normalize(images: Tensor, device: torch.device) -> Tensor:
    """The input of a network, from pixels (n, height, width[, 3]) uint8, on ``device`` and in channels_last."""
    return to_input(images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)


def terms_of(criterion: nn.Module, logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss, and TERMS (4,) detached."""
    if isinstance(criterion, SGLLoss):
        terms = criterion.terms(logits, labels, mask=mask)
        return terms.total, torch.stack([terms.total.detach(), terms.bag, terms.instance, terms.mask])
    loss = criterion(logits, labels, mask=mask)
    return loss, torch.stack([loss.detach(), loss.detach(), *torch.zeros_like(loss.detach()).expand(2)])


class Training:
    """The state of a training, which last.pt stores.

    ``config`` lacks the EXTENDABLE settings, which are in ``extendable``. So steps and validations cannot depend on the
    number of epochs. A run that is resumed with more epochs equals a run that had them from the start.
    """

    def __init__(self, config: Config, processes: Processes, compiled: bool):
        self.config = {key: value for key, value in config.items() if key not in EXTENDABLE}
        self.extendable = {key: config[key] for key in EXTENDABLE}
        del config
        torch.manual_seed(self.config["seed"])
        torch.backends.cudnn.benchmark = True  # all crops have the same size
        self.processes = processes
        self.network = make_model(self.config)
        if processes.first or self.config["weights"] != "imagenet":  # other processes get them from the first one
            load_weights(self.network, self.config["backbone"], self.config["weights"])
        if self.config["freeze"]:
            self.network.features.freeze(self.config["freeze"])
        set_initial_head(self.network, self.config["prior"])
        if self.config["batch_norm"] == "sync" and processes.group is not None:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.network.to(processes.device, memory_format=torch.channels_last)
        self.model: nn.Module = self.network
        if processes.group is not None:
            ids = [processes.device] if processes.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.network, device_ids=ids)
        if compiled:
            self.model = torch.compile(self.model)
        self.criterion = make_criterion(self.config, processes.group).to(processes.device)
        self.lam_schedule: LamSchedule | None = None
        if self.config["start_auc"] and isinstance(self.criterion, SGLLoss):
            rise = self.config["rise"] * self.config["accumulate"]  # the schedule counts passes
            self.lam_schedule = LamSchedule(
                self.config["lam"], auc=self.config["start_auc"], rise=rise, process_group=processes.group
            )
        self.final_k = self.criterion.pooling.k if self.config["k_start"] else None
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=self.config["lr"], weight_decay=self.config["weight_decay"]
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, self.config["lr_step"], self.config["lr_factor"]
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.config["amp"] == "fp16")
        self.epoch = self.step = 0  # complete epochs, and steps of the current epoch
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=processes.device)
        self.history: list[dict[str, Any]] = []
        self.best_score: list[float] | None = None

    # a batch

    def set_progress(self, progress: float) -> None:
        """Sets the weight of the instance loss and k of top-k pooling for ``progress`` epochs after the start."""
        if isinstance(self.criterion, SGLLoss) and self.lam_schedule is None:
            self.criterion.lam = lam_at(self.config, progress)
        if self.final_k is not None:
            cells = (crop_of(self.config) // self.config["output_stride"]) ** 2
            self.criterion.pooling.k = k_at(self.config, self.final_k, cells, progress)

    def train_mode(self) -> None:
        self.model.train()
        for part in self.model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                trained = part.weight is None or part.weight.requires_grad
                if self.config["batch_norm"] == "frozen" or not trained:
                    part.eval()

    def autocast(self) -> torch.autocast:
        dtype = AMP[self.config["amp"]]
        return torch.autocast(self.processes.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def gradients_of_pass(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for the forward and backward of a pass. Processes exchange gradients in the ``last`` one only."""
        return contextlib.nullcontext() if self.processes.group is None or last else self.model.no_sync()

    def loss_of(self, images: Tensor, labels: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and TERMS (4,) detached.

        Args:
            images: (n, height, width[, 3]) uint8.
            labels: (n, C), NaN for unknown.
            frames: (n, 4), the content without padding: x, y, width, height in pixels.
        """
        with self.autocast():
            logits = self.model(normalize(images, self.processes.device))
        logits, labels = logits.float(), labels.to(self.processes.device)
        mask = self.mask_of(frames, logits)
        if self.lam_schedule is not None:
            with torch.no_grad():
                self.criterion.lam = self.lam_schedule.step(self.criterion.pooling(logits, mask=mask), labels)
        return terms_of(self.criterion, logits, labels, mask)

    def mask_of(self, frames: Tensor, logits: Tensor) -> Tensor | None:
        """The mask (n, h, w) of cells that are not padding, for maps (n, C, h, w). None if images are not padded."""
        if self.config["fit"] != "pad":
            return None
        mask = cell_mask(frames.numpy(), tuple(logits.shape[2:]), *self.network.grid)
        return torch.from_numpy(mask).to(logits.device)

    # an epoch

    def row_of_epoch(self, speed: float) -> dict[str, Any]:
        """The epoch's row of history.csv, without validation. All processes must call it.

        Raises:
            ValueError: the loss or a parameter is not finite.
        """
        self.share_sums()
        self.refuse_not_finite()
        means = self.sums / max(self.step, 1)
        row = {"epoch": self.epoch + 1, "lr": self.scheduler.get_last_lr()[0], "images_per_s": round(speed, 2)}
        if self.config["loss"] == "sgl":
            row["lam"] = self.criterion.lam
        return row | dict(zip(TERMS, means.tolist(), strict=True))

    def next_epoch(self, row: dict[str, Any]) -> None:
        self.scheduler.step()
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()

    # checkpoints

    def full_config(self) -> Config:
        return self.config | self.extendable

    def state(self) -> dict[str, Any]:
        device = self.processes.device
        return {
            "config": self.full_config(), "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(), "epoch": self.epoch,
            "step": self.step, "sums": self.sums, "history": self.history, "best_score": self.best_score,
            "lam_schedule": None if self.lam_schedule is None else self.lam_schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes a checkpoint within an epoch. All processes must call it; the first one writes.

        Raises:
            ValueError: the loss or a parameter is not finite; the previous checkpoint stays.
        """
        self.share_sums()
        self.refuse_not_finite()
        if self.processes.first:
            save_atomically(self.state(), path)

    def share_sums(self) -> None:
        """Replaces ``sums`` by the mean over the processes. All processes must call it.

        Each process has only the sums of its own part, but the first process writes the checkpoint for all.
        """
        if self.processes.group is not None:
            dist.all_reduce(self.sums, group=self.processes.group)
            self.sums /= self.processes.count

    def refuse_not_finite(self) -> None:
        """Raises an error before a checkpoint is written, so that the last usable checkpoint stays.

        Raises:
            ValueError: the loss of the epoch so far, or a parameter, is not finite.
        """
        finite = math.isfinite(float(self.sums[0]))
        if not finite or not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            what = "parameters that are not finite" if finite else f"a loss of {float(self.sums[0]):g}"
            raise ValueError(f"loss: {what} in epoch {self.epoch + 1}; a lower --lr may help, in another --out")

    def restore(self, path: Path) -> None:
        """Loads the state from ``path``. Raises ValueError if it was trained with other settings."""
        state = load_state(path)
        # The title, which is the name of the folder, is not compared, nor are keys that older versions did not write.
        ignored = {"title", *({"train_labels_digest", "train_files_digest"} - set(state["config"]))}
        stored = OLDER | state["config"]
        different = [key for key in self.config if key not in ignored and stored.get(key) != self.config[key]]
        different += [key for key in EXTENDABLE if self.extendable[key] < state["epoch"]]
        if "train_names_digest" in different:  # the images differ
            different = [key for key in different if key not in ("train_labels_digest", "train_files_digest")]
        if different:
            shown = ", ".join(DATA.get(key, key) for key in different)
            raise ValueError(
                f"resume: {path} was trained with another {shown}; use the same settings, or another --out"
            )
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history = (state[key] for key in ("epoch", "step", "history"))
        self.best_score = state["best_score"] if "best_score" in state else state["merit"]  # the name in older runs
        if self.lam_schedule is not None:
            self.lam_schedule.load_state_dict(state["lam_schedule"])
        self.sums = state["sums"].to(self.processes.device)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.processes.device)


def dry_run(
    training: Training,
    data: LabelledImages,
    numbers: np.ndarray,
    args: argparse.Namespace,
    take_step: Callable[..., None],
) -> None:
    """Runs one step on the first batch, and writes nothing."""
    config, processes = training.config, training.processes
    loader = loader_of(data, batches_of(numbers, config, 0, processes.rank, processes.count), args)
    training.train_mode()
    take_step(training, [next(iter(loader))[:3]] * config["accumulate"], 0.0)
    if processes.first:
        print(f"loss of one step {float(training.sums[0]):.4f}; nothing written")


# validation


def predict(training: Training, data: LabelledImages, numbers: np.ndarray, args: argparse.Namespace) -> Tensor:
    """Bag logits (n, C) float32 of whole images. Each process computes a part; all processes get the result."""
    config, processes = training.config, training.processes
    pooling = make_pooling(config["pooling"])
    mine = np.arange(processes.rank, len(numbers), processes.count)
    size = max(config["batch_size"] // config["accumulate"] // processes.count, 1)
    batches = [[(0, int(n)) for n in numbers[mine[k : k + size]]] for k in range(0, len(mine), size)]
    if processes.group is not None:  # use the batch statistics of the first process, which are those in the checkpoint
        for buffer in training.network.buffers():
            dist.broadcast(buffer, 0, group=processes.group)
    training.network.eval()
    classes = len(config["classes"])
    logits = torch.zeros(len(numbers), classes)
    some = [torch.zeros(0, classes)]
    with torch.inference_mode():
        for images, _, frames, _ in loader_of(data, batches, args):
            with training.autocast():
                maps = training.network(normalize(images, processes.device))
            some.append(pooling(maps.float(), mask=training.mask_of(frames, maps)).cpu())
    logits[mine] = torch.cat(some)
    if processes.group is not None:
        logits = logits.to(processes.device)
        dist.all_reduce(logits, group=processes.group)  # the parts of the other processes are 0
    return logits.cpu()


def validate(
    training: Training, data: LabelledImages, numbers: np.ndarray, args: argparse.Namespace
) -> dict[str, float]:
    """The bag loss, and the AUC per class and its mean over classes with both labels. Ignores unknown labels."""
    logits = predict(training, data, numbers, args)
    labels = torch.from_numpy(data.labels[numbers])
    known = ~labels.isnan()
    values = {
        f"val_auc_{name}": auc(logits[known[:, c], c].numpy(), labels[known[:, c], c].numpy())
        for c, name in enumerate(training.config["classes"])
    }
    defined = [value for value in values.values() if not math.isnan(value)]
    mean = float(np.mean(defined)) if defined else math.nan
    return {
        "val_loss": float(F.binary_cross_entropy_with_logits(logits[known], labels[known])),
        "val_auc": mean,
    } | values
