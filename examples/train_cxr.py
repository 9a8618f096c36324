"""ChestX-ray14: a network that is told only which findings an image has learns where they are.

    python train_cxr.py --data-dir DIR --out RUN                                     the paper's settings
    torchrun --nproc-per-node 8 train_cxr.py --data-dir DIR --out RUN --amp bf16     on eight GPUs
    python train_cxr.py --data-dir DIR --out RUN --loss bag --pooling mean           the paper's baseline
    python train_cxr.py --data-dir DIR --out RUN --backbone local33 --pooling max    patches that see 33 pixels
    python train_cxr.py --synthetic                                                  drawn images, two minutes, a report

DIR is looked at first, as by check_cxr.py. RUN gets config.json, split.csv (which images were trained on), history.csv,
last.pt and best.pt (of the highest validation AUC), and logs for TensorBoard where it is installed. After an
interruption, Ctrl-C or worse, the same command with --resume goes on: on the CPU, to the same bits.

--cache DIR keeps the images decoded and small; it is built at the first start, and makes every later epoch as fast as
the network. Of the tests localize_cxr.py tells.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from check_cxr import checked_index
from cxr_data import CLASSES, Index, Radiographs, open_cache, path_of, to_input, validation_patients
from cxr_models import BACKBONES, STRIDES, TORCHVISION, PatchClassifier, load_weights
from metrics import auc
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from training import (
    LOSSES,
    Config,
    device_name,
    load_state,
    make_criterion,
    message_of,
    save_atomically,
    write_json,
)

from sgl_ops import SGLLoss
from sgl_ops.pooling import POOLINGS, make_pooling

POOLING_OF = {"sgl": "softmax", "bag": "mean", "bil": "mean", "mmm": "max"}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TERMS = ("loss", "bag", "instance", "mask")
#: What decides a result, and so what a run has to agree in to be continued, beside the images.
DECISIVE = (
    "backbone", "weights", "output_stride", "image_size", "loss", "pooling", "delta_l", "lam", "lam_delay",
    "lam_warmup", "mask_weight", "normalize", "rescale", "weighted", "prior", "epochs", "batch_size", "accumulate",
    "lr", "lr_step", "lr_factor", "weight_decay", "val_fraction", "seed", "amp", "batch_norm",
)  # fmt: skip
#: In split.csv, the part of the images that the run has seen through the weights of another.
THROUGH = "weights"
#: What else a run has to agree in, as it is told.
DATA = {
    "train_names_digest": "choice of images",
    "train_labels_digest": "entry table (the labels of its images have changed since)",
    "train_files_digest": "content of its images (their files have other sizes)",
    "weights_names_digest": "run that the weights are of",
}
#: The tour: what --synthetic changes of the defaults. Instances are counted within bags: counted over the batch, no run
#: that was tried with so few images learned to classify.
TOUR = {
    "backbone": "local33", "weights": "none", "output_stride": 8, "image_size": 64, "pooling": "max", "lam": 1.0,
    "lam_delay": 2.0, "lam_warmup": 4.0, "normalize": "bag", "mask_weight": 0.0, "prior": 0.3, "epochs": 8,
    "batch_size": 8, "lr": 1e-3, "lr_step": 7, "workers": 0,
}  # fmt: skip
#: And what it draws: few findings, often, for there is little time.
TOUR_DATA = {"images": 1200, "size": 128, "findings": ("Atelectasis", "Effusion", "Infiltration", "Mass"), "rate": 3.0}


class Processes(NamedTuple):
    """This process among those that torchrun started; alone without it."""

    rank: int
    count: int
    device: torch.device
    group: Any

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of torchrun: gloo on the CPU, nccl on GPUs, one each."""
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if len(given) < 5:  # some systems for jobs set some of them
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"WORLD_SIZE: several processes are started by torchrun; of its variables only {given} are set"
            )
        yield Processes(0, 1, torch.device(device), None)
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        count = dist.get_world_size()
        where = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        yield Processes(dist.get_rank(), count, where, dist.group.WORLD if count > 1 else None)
    finally:
        dist.destroy_process_group()


# what is trained on


class Split(NamedTuple):
    """Numbers of images in the index."""

    train: np.ndarray
    val: np.ndarray
    val_patients: np.ndarray


def split_of(index: Index, config: Config) -> Split:
    patients = validation_patients(index, config["val_fraction"], config["seed"])
    val = np.isin(index.patients, patients) & ~index.test
    return Split(np.flatnonzero(~index.test & ~val), np.flatnonzero(val), patients)


def digest_of(lines: list[str]) -> str:
    """Of the names of images, or of names and labels, in any order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def batches_of(numbers: np.ndarray, config: Config, epoch: int, rank: int, count: int) -> list[list[tuple[int, int]]]:
    """The (epoch, number) of every image that process ``rank`` of ``count`` sees in an epoch, by forward pass.

    The order depends on seed and epoch alone. A step is ``batch_size`` images, of all processes, cut into
    ``accumulate`` passes, each of which the processes share. What is left over at the end waits for another epoch.
    """
    size = config["batch_size"]
    order = np.random.default_rng((config["seed"], 1 + epoch)).permutation(numbers)
    steps = len(order) // size
    share = size // config["accumulate"] // count
    passes = order[: steps * size].reshape(steps * config["accumulate"], count, share)[:, rank]
    return [[(epoch, int(number)) for number in some] for some in passes]


def crop_of(config: Config) -> int:
    """7/8 of the image, in whole patches."""
    return config["image_size"] * 7 // 8 // config["output_stride"] * config["output_stride"]


class Interrupt:
    """Ctrl-C, remembered: what it raises while a process starts is dropped, and elsewhere may become an error."""

    came = False

    @classmethod
    def listen(cls) -> None:
        cls.came = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, cls.handle)

    @classmethod
    def handle(cls, *_: Any) -> None:
        cls.came = True
        raise KeyboardInterrupt

    @classmethod
    def raise_again(cls) -> None:
        if cls.came:
            raise KeyboardInterrupt


def leave_interrupts(_: int) -> None:
    """In a process that loads images: Ctrl-C goes to all, and were this one the first to end, it would be an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader_of(data: Radiographs, batches: list[list[tuple[int, int]]], args: argparse.Namespace) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=args.workers,
        worker_init_fn=leave_interrupts,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else it would take a number from the one of the training
    )


# a network


def make_model(config: Config) -> PatchClassifier:
    return PatchClassifier(config["backbone"], config["output_stride"], len(CLASSES))


def load_run(run: Path, device: str | torch.device, which: str | None = None) -> tuple[nn.Module, Config]:
    """A trained network, (n, 3, H, W) to logits (n, 14, h, w), in evaluation mode, and its configuration.

    Args:
        which: ``"best"`` on the validation images, or ``"last"``; None: the best, where there were such images.

    Raises:
        ValueError: there is no such run, or not yet.
    """
    model, config, _ = load_network(run, device, which)
    return model, config


def load_network(
    run: Path, device: str | torch.device, which: str | None = None
) -> tuple[nn.Module, Config, dict[str, Any]]:
    """The same, and which it is: "network", ``"best"`` or ``"last"``, and "epoch", after how many (whole) ones."""
    run = Path(run)
    which = which or ("best" if (run / "best.pt").exists() else "last")
    path = run / f"{which}.pt"
    if not path.is_file():
        raise ValueError(f"run: {run} holds no {path.name}")
    state = load_state(path)
    last = load_state(run / "last.pt", mmap=True)["config"]
    if any(state["config"].get(key) != last.get(key) for key in ("train_names_digest", "backbone", "loss", "seed")):
        raise ValueError(f"run: {path} and last.pt are of different trainings")
    model = make_model(state["config"])
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state["config"], {"network": which, "epoch": state["epoch"]}


def trained_names(run: Path) -> set[str]:
    """The images that a run was trained or validated on, and those that the run was whose weights it began with.

    Raises:
        ValueError: split.csv is not there, or is not what the run wrote.
    """
    path = Path(run) / "split.csv"
    if not path.is_file():
        raise ValueError(f"run: {run} holds no split.csv, which says what it was trained on")
    with path.open(newline="") as file:
        rows = [(row["image"], row["part"]) for row in csv.DictReader(file)]
    config = load_state(Path(run) / "last.pt", mmap=True)["config"]
    own, before = ([name for name, part in rows if (part == THROUGH) == old] for old in (False, True))
    if digest_of(own) != config["train_names_digest"] or digest_of(before) != config.get(
        "weights_names_digest", digest_of([])
    ):
        raise ValueError(f"{path}: these are not the images that the run was trained on")
    return {name for name, _ in rows}


def names_of_weights(weights: str) -> list[str]:
    """The images that the weights have seen, where they are those of a run of this script.

    Raises:
        ValueError: they are, and what the run was trained on is not beside them.
    """
    path = Path(weights)
    if not path.is_file():
        return []
    config = load_state(path).get("config", {})  # not mapped: files of older kinds cannot be
    if not isinstance(config, dict) or "train_names_digest" not in config:
        return []
    try:
        names = trained_names(path.parent)
    except ValueError as error:
        raise ValueError(
            f"weights: {weights} is of a training, and what it was trained on is not known: {error}"
        ) from None
    if load_state(path.parent / "last.pt", mmap=True)["config"]["train_names_digest"] != config["train_names_digest"]:
        raise ValueError(f"weights: {weights} is not of the run beside it, which says what it was trained on")
    return sorted(names)


def normalize(images: Tensor, device: torch.device) -> Tensor:
    """What the network takes, of grey values (n, height, width) uint8, on ``device`` and channels_last."""
    return to_input(images.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)


def train_mode(model: nn.Module, config: Config) -> None:
    model.train()
    if config["batch_norm"] == "frozen":
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()


def lam_at(config: Config, progress: float) -> float:
    """The weight of the instance loss after ``progress`` epochs: first none, then rising, then whole."""
    begun = progress - config["lam_delay"]
    warmup = config["lam_warmup"]
    return config["lam"] * min(max(begun / warmup if warmup else float(begun >= 0), 0.0), 1.0)


def terms_of(criterion: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and TERMS (4,) detached."""
    if isinstance(criterion, SGLLoss):
        terms = criterion.terms(logits, labels)
        return terms.total, torch.stack([terms.total.detach(), terms.bag, terms.instance, terms.mask])
    loss = criterion(logits, labels)
    return loss, torch.stack([loss.detach(), loss.detach(), *torch.zeros_like(loss.detach()).expand(2)])


class Training:
    """What changes while training, and is kept in last.pt."""

    def __init__(self, config: Config, processes: Processes, compiled: bool):
        torch.manual_seed(config["seed"])
        torch.backends.cudnn.benchmark = True  # all crops are of one size
        self.config, self.processes = config, processes
        self.network = make_model(config)
        if processes.first or config["weights"] != "imagenet":
            load_weights(self.network, config["backbone"], config["weights"])  # the others get them from the first
        with torch.no_grad():
            self.network.head.bias.add_(math.log(config["prior"] / (1 - config["prior"])))
        if config["batch_norm"] == "sync" and processes.group is not None:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.network.to(processes.device, memory_format=torch.channels_last)
        self.model: nn.Module = self.network
        if processes.group is not None:
            ids = [processes.device] if processes.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.network, device_ids=ids)
        if compiled:
            self.model = torch.compile(self.model)
        self.criterion = make_criterion(config, processes.group).to(processes.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, config["lr_step"], config["lr_factor"])
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config["amp"] == "fp16")
        self.epoch = self.step = 0  # whole epochs, and steps of the one that has begun
        self.sums = torch.zeros(len(TERMS), dtype=torch.float64, device=processes.device)
        self.history: list[dict[str, Any]] = []
        self.merit: list[float] | None = None

    def state(self) -> dict[str, Any]:
        device = self.processes.device
        return {
            "config": self.config, "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict(), "epoch": self.epoch,
            "step": self.step, "sums": self.sums, "history": self.history, "merit": self.merit,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }  # fmt: skip

    def share_sums(self) -> None:
        """Makes ``sums`` the mean over the processes, in all of them. Where there are several, all have to call it.

        What one process has seen of an epoch is its share alone, and a checkpoint is written by one.
        """
        if self.processes.group is not None:
            dist.all_reduce(self.sums, group=self.processes.group)
            self.sums /= self.processes.count

    def refuse_not_finite(self) -> None:
        """Before a checkpoint is written: the last one that could be gone on with stays.

        Raises:
            ValueError: the loss of the epoch so far, or a parameter, is not finite.
        """
        finite = math.isfinite(float(self.sums[0]))
        if not finite or not all(bool(p.isfinite().all()) for p in self.network.parameters()):
            what = "parameters that are not finite" if finite else f"a loss of {float(self.sums[0]):g}"
            raise ValueError(f"loss: {what} in epoch {self.epoch + 1}; a lower --lr may help, with another --out")

    def restore(self, path: Path) -> None:
        """Raises ValueError where ``path`` was trained otherwise."""
        state = load_state(path)
        different = [key for key in self.config if state["config"].get(key) != self.config[key]]
        if "epochs" in different and self.config["epochs"] >= state["epoch"]:
            different.remove("epochs")  # no epoch depends on how many come after it
        if "train_names_digest" in different:  # of other images
            different = [key for key in different if key not in ("train_labels_digest", "train_files_digest")]
        if different:
            told = ", ".join(DATA.get(key, key) for key in different)
            raise ValueError(f"resume: {path} was trained with another {told}; --out another folder starts anew")
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history, self.merit = (state[k] for k in ("epoch", "step", "history", "merit"))
        self.sums = state["sums"].to(self.processes.device)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.processes.device)

    def autocast(self) -> torch.autocast:
        dtype = AMP[self.config["amp"]]
        return torch.autocast(self.processes.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def take_step(self, passes: list[tuple[Tensor, Tensor]], progress: float) -> None:
        """One step of the optimizer on the (images, labels) of its forward passes."""
        if isinstance(self.criterion, SGLLoss):
            self.criterion.lam = lam_at(self.config, progress)
        for number, (images, labels) in enumerate(passes):
            alone = self.processes.group is None or number == len(passes) - 1
            # the gradients of all processes meet in the last pass
            with contextlib.nullcontext() if alone else self.model.no_sync():
                with self.autocast():
                    logits = self.model(normalize(images, self.processes.device))
                loss, terms = terms_of(self.criterion, logits.float(), labels.to(self.processes.device))
                self.scaler.scale(loss / len(passes)).backward()
            self.sums += terms / len(passes)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def train_epoch(training: Training, data: Radiographs, split: Split, args: argparse.Namespace, keep: Path) -> float:
    """What is left of the epoch, with a checkpoint into ``keep`` every ``--save-every`` steps; images per second."""
    config, processes = training.config, training.processes
    accumulate, begun = config["accumulate"], training.step
    batches = batches_of(split.train, config, training.epoch, processes.rank, processes.count)
    steps = len(batches) // accumulate
    train_mode(training.model, config)
    loader = iter(loader_of(data, batches[begun * accumulate :], args))
    start = time.perf_counter()
    progress = tqdm(
        range(begun, steps), desc=f"epoch {training.epoch + 1}", initial=begun, total=steps, unit="step",
        disable=None if processes.first else True, mininterval=0.5,
    )  # fmt: skip
    for step in progress:
        Interrupt.raise_again()
        passes = [next(loader)[:2] for _ in range(accumulate)]
        training.take_step(passes, training.epoch + step / steps)
        training.step = step + 1
        if training.step % 50 == 0 and not progress.disable:
            progress.set_postfix(loss=f"{float(training.sums[0]) / training.step:.3f}")
        if training.step % args.save_every == 0 and training.step < steps:
            training.share_sums()
            training.refuse_not_finite()
            if processes.first:
                save_atomically(training.state(), keep)
    return (steps - begun) * config["batch_size"] / (time.perf_counter() - start) if steps > begun else math.nan


def predict(training: Training, data: Radiographs, numbers: np.ndarray, args: argparse.Namespace) -> Tensor:
    """Bag logits (n, 14) float32 of whole images, each process its share, in every process the whole."""
    config, processes = training.config, training.processes
    pooling = make_pooling(config["pooling"])
    mine = np.arange(processes.rank, len(numbers), processes.count)
    size = max(config["batch_size"] // config["accumulate"] // processes.count, 1)
    batches = [[(0, int(n)) for n in numbers[mine[k : k + size]]] for k in range(0, len(mine), size)]
    if processes.group is not None:  # statistics that each process took of its own images; the first's are saved
        for buffer in training.network.buffers():
            dist.broadcast(buffer, 0, group=processes.group)
    training.network.eval()
    logits = torch.zeros(len(numbers), len(CLASSES))
    some = [torch.zeros(0, len(CLASSES))]
    with torch.inference_mode():
        for images, _, _ in loader_of(data, batches, args):
            with training.autocast():
                maps = training.network(normalize(images, processes.device))
            some.append(pooling(maps.float()).cpu())
    logits[mine] = torch.cat(some)
    if processes.group is not None:
        logits = logits.to(processes.device)
        dist.all_reduce(logits, group=processes.group)  # the shares of the others are 0
    return logits.cpu()


def validate(training: Training, data: Radiographs, numbers: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """The bag loss, and AUC per class and mean over the classes that have images of both kinds."""
    logits = predict(training, data, numbers, args)
    labels = torch.from_numpy(data.labels[numbers])
    values = {f"val_auc_{name}": auc(logits[:, c].numpy(), labels[:, c].numpy()) for c, name in enumerate(CLASSES)}
    defined = [value for value in values.values() if not math.isnan(value)]
    mean = float(np.mean(defined)) if defined else math.nan
    return {"val_loss": float(F.binary_cross_entropy_with_logits(logits, labels)), "val_auc": mean} | values


def train(args: argparse.Namespace, config: Config, processes: Processes) -> None:
    """The command for one run.

    Raises:
        ValueError: the data, the run in ``--out`` or the settings do not fit.
    """
    index, report = checked_index(args.data_dir, args.allow_missing, args.tables)
    split = split_of(index, config)
    if index.test.all():
        raise ValueError(f"data-dir: no image of the training list is in {args.data_dir}")
    if not len(split.train):
        raise ValueError(f"val-fraction: {config['val_fraction']:g} leaves no image to train on")
    if config["val_fraction"] and not len(split.val) and processes.first:
        print("warning: no patient validates, so that there is no best network", file=sys.stderr)
    if len(split.train) < config["batch_size"]:
        raise ValueError(f"batch-size: {config['batch_size']} is more than the {len(split.train)} training images")
    learned = (*split.train, *split.val)
    config |= {
        "val_patients": split.val_patients.tolist(),
        "train_names_digest": digest_of([index.names[n] for n in learned]),
        "train_labels_digest": digest_of([f"{index.names[n]} {index.labels[n].astype(int)}" for n in learned]),
        "train_files_digest": digest_of([f"{index.names[n]} {index.paths[n].stat().st_size}" for n in learned]),
    }
    seen = names_of_weights(config["weights"])
    if seen:
        config["weights_names_digest"] = digest_of(seen)
    with locked(args.out) if processes.first and not args.dry_run else contextlib.nullcontext():
        train_into(args, config, processes, index, report, split, seen)


def train_into(
    args: argparse.Namespace, config: Config, processes: Processes, index: Index, report: str, split: Split,
    seen: list[str],
) -> None:  # fmt: skip
    """All that happens in ``--out``. ``seen``: the images that the weights have seen."""
    out = Path() if args.dry_run else args.out
    last = out / "last.pt"
    if not args.dry_run and (processes.first or last.exists()):  # a best.pt the first may be taking away
        refuse_what_is_there(out, args.resume)
    if processes.first:
        print(report)
        print(
            f"\n{len(split.train)} images train, {len(split.val)} of {len(split.val_patients)} other patients validate"
        )
    images = index.paths if args.cache is None else open_cache(args.cache, index.paths, config["image_size"])
    fed = Radiographs(images, index.labels, config["image_size"], crop_of(config), config["seed"], index.names)
    whole = Radiographs(images, index.labels, config["image_size"])
    training = Training(config, processes, args.compile)
    if args.dry_run:
        some = loader_of(fed, batches_of(split.train, config, 0, processes.rank, processes.count), args)
        train_mode(training.model, config)
        training.take_step([next(iter(some))[:2]] * config["accumulate"], 0.0)
        if processes.first:
            print(f"loss of one step {float(training.sums[0]):.4f}; nothing written")
        return
    if args.resume and last.exists():
        training.restore(last)
    elif processes.first:
        if args.resume:
            print(f"{out} holds no last.pt to go on from: training begins")
        (out / "best.pt").unlink(missing_ok=True)  # of a training that ended before its first last.pt
    logs = None
    if processes.first:
        write_beginning(out, config, index, split, seen, report)
        if training.history:  # it may have ended before this was written
            write_history(training.history, out / "history.csv")
        logs = tensorboard(out, training.epoch)
    if training.epoch == config["epochs"] and processes.first:
        print(f"{out} is trained, all {training.epoch} epochs; more --epochs go on from there")
    while training.epoch < config["epochs"]:
        speed = train_epoch(training, fed, split, args, last)
        training.share_sums()
        training.refuse_not_finite()
        means = training.sums / max(training.step, 1)
        values = dict(zip(TERMS, means.tolist(), strict=True))
        row = {"epoch": training.epoch + 1, "lr": training.scheduler.get_last_lr()[0], "images_per_s": round(speed, 2)}
        if config["loss"] == "sgl":
            row["lam"] = training.criterion.lam
        row |= values
        better = False
        if len(split.val):
            validation = validate(training, whole, split.val, args)
            row |= validation
            merit = [-1.0 if math.isnan(validation["val_auc"]) else validation["val_auc"], -validation["val_loss"]]
            better = training.merit is None or merit > training.merit
            training.merit = merit if better else training.merit
        training.scheduler.step()
        training.history.append(row)
        training.epoch, training.step = training.epoch + 1, 0
        training.sums.zero_()
        if processes.first:
            # the best first: were it killed between the two, it would come to the same best once more
            if better:
                best = {"config": config, "model": training.network.state_dict(), "epoch": training.epoch}
                save_atomically(best, out / "best.pt")
            save_atomically(training.state(), last)
            write_history(training.history, out / "history.csv")
            if logs is not None:
                for name, value in row.items():
                    logs.add_scalar(name, value, training.epoch)
                logs.flush()
            shown = f", val AUC {row['val_auc']:.3f}" if len(split.val) else ""
            print(f"epoch {training.epoch}: loss {row['loss']:.4f}{shown}, {speed:.1f} images/s", flush=True)


# what is written


def refuse_what_is_there(out: Path, resume: bool) -> None:
    """Raises ValueError where ``out`` holds what this training would overwrite."""
    if (out / "last.pt").exists():
        if not resume:
            raise ValueError(f"out: {out} holds a run; continue it with --resume, or name another folder")
        return
    # an end at the end of the first epoch leaves a best.pt without these two, which is nothing to keep
    if (out / "best.pt").exists() and (out / "history.csv").exists():
        raise ValueError(f"out: {out} holds a best.pt and a history.csv, but no last.pt; name another folder")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from training into ``out``, as long as this one lives.

    Raises:
        ValueError: one does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which processes that load images would keep
        except (BlockingIOError, PermissionError):
            raise ValueError(f"out: another training is at work in {out}") from None
        except OSError:  # a file system without locks
            pass
        yield


def write_beginning(out: Path, config: Config, index: Index, split: Split, seen: list[str], report: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(config, out / "config.json")
    (out / "data.txt").write_text(report + "\n")
    (out / "missing.txt").unlink(missing_ok=True)
    if index.missing:
        (out / "missing.txt").write_text("\n".join(index.missing) + "\n")
    with (out / "split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "part"])
        writer.writerows([index.names[n], part] for part in ("train", "val") for n in getattr(split, part))
        writer.writerows([name, THROUGH] for name in seen)


def write_history(history: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def tensorboard(out: Path, epoch: int) -> Any:
    """Where numbers go for TensorBoard, after those of ``epoch``; None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=epoch + 1)


# the command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, default: Any, text: str, **more: Any) -> None:
        shown = "" if default is None else f" ({default:g})" if isinstance(default, float) else f" ({default})"
        kind = {} if "type" in more or default is None else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=text + shown, **kind, **more)

    parser.add_argument("--data-dir", type=path_of, help="folder with the images, and the tables")
    parser.add_argument("--tables", type=path_of, help="folder with the tables, where they are elsewhere")
    parser.add_argument("--allow-missing", action="store_true", help="leave out images that are not there")
    parser.add_argument("--cache", type=path_of, help="folder for the decoded images, of all runs of that size")
    parser.add_argument("--out", type=path_of, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue what is in --out, if there is something")
    parser.add_argument("--synthetic", action="store_true", help="the tour: drawn images, SGL beside max pooling")
    parser.add_argument("--dry-run", action="store_true", help="one step of training, and write nothing")
    add("backbone", "resnet50", "network without its head", choices=BACKBONES)
    add("weights", None, "imagenet, none, or a file with a state_dict (imagenet; of local and bagnet: none)")
    add("output-stride", None, "pixels of the image per patch (32; of local and bagnet: 8)", type=int, choices=STRIDES)
    add("image-size", 512, "images are made this wide and high; training crops 7/8 of it")
    add("loss", "sgl", "what is minimized", choices=LOSSES)
    add("pooling", None, "sgl: softmax; bag, bil: mean; mmm has its own", choices=list(POOLINGS))
    add("delta-l", 0.3, "threshold of the ternary targets, in [0, 0.5]")
    add("lam", 20.0, "weight of the instance loss")
    add("lam-delay", 0.0, "epochs without it: what an untrained network says of patches is no guide")
    add("lam-warmup", 0.0, "epochs in which it then rises from 0")
    add("mask-weight", 1.0, "weight of the penalty on the mask, which the paper does not tell")
    add("normalize", "batch", "where instances are counted", choices=("batch", "bag"))
    parser.add_argument("--no-rescale", action="store_true", help="theta = p instead of Eq. 5")
    parser.add_argument("--no-weight", action="store_true", help="w = 1 instead of Eq. 7 and 8")
    add("epochs", 20, "passes over the training images")
    add("batch-size", 32, "images in a step, of all processes together")
    add("accumulate", 1, "forward passes that a step is cut into; the loss counts instances in each")
    add("lr", 1e-4, "learning rate of Adam")
    add("lr-step", 10, "epochs after which it is multiplied by --lr-factor")
    add("lr-factor", 0.1, "what it is multiplied by")
    add("weight-decay", 1e-4, "of Adam")
    add("val-fraction", 0.125, "part of the training list's patients that validates")
    add("seed", 0, "of weights, order, crops and validation patients")
    add("prior", 0.5, "probability of a patch before training; small, where training starts from nothing")
    add("amp", "off", "mixed precision", choices=tuple(AMP))
    norms = "statistics: own, of each process; sync, of all; frozen, as they came with the weights"
    add("batch-norm", "own", norms, choices=("own", "sync", "frozen"))
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    add("workers", min(8, os.cpu_count() or 1), "processes that load images, per process that trains")
    add("save-every", 200, "steps between checkpoints, beside that at the end of an epoch")
    add("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda", type=device_name)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.synthetic:
        parser.set_defaults(**TOUR)
        args = parser.parse_args(argv)
    check(parser, args)
    local = args.backbone not in TORCHVISION
    args.pooling = args.pooling or POOLING_OF[args.loss]
    args.weights = args.weights or ("none" if local else "imagenet")
    if args.weights not in ("none", "imagenet") and path_of(args.weights).is_file():
        args.weights = str(path_of(args.weights).resolve())  # the same from any folder, when a run is continued
    args.output_stride = args.output_stride or (8 if local else 32)
    if args.image_size % args.output_stride or crop_of(vars(args)) < args.output_stride:
        parser.error(
            f"--image-size: expected a multiple of the output stride {args.output_stride} whose crop, 7/8 of it, holds "
            f"a patch, got {args.image_size}"
        )
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command, naming the option, where a value makes no sense."""
    if args.synthetic:
        if args.data_dir:
            parser.error("--synthetic: draws its own data, and takes no --data-dir")
        if args.dry_run:
            parser.error("--synthetic: has no --dry-run")
    elif args.data_dir is None or (args.out is None and not args.dry_run):
        parser.error("--data-dir and --out are needed, or --synthetic")
    for name in ("epochs", "batch_size", "accumulate", "lr_step", "save_every", "image_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    for name in ("lam", "lam_delay", "lam_warmup", "mask_weight", "lr", "lr_factor", "weight_decay", "workers", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')}: expected a finite number >= 0, got {getattr(args, name)}")
    if not 0 <= args.delta_l <= 0.5:
        parser.error(f"--delta-l: expected 0 to 0.5, got {args.delta_l}")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction: expected 0 to less than 1, got {args.val_fraction}")
    if not 0 < args.prior < 1:
        parser.error(f"--prior: expected between 0 and 1, got {args.prior}")
    shares = args.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % shares:
        parser.error(f"--batch-size: {args.batch_size} is no multiple of passes times processes, {shares}")
    if args.loss == "mmm" and args.pooling:
        parser.error("--pooling: mmm has poolings of its own")


def config_of(args: argparse.Namespace) -> Config:
    values = vars(args) | {"rescale": not args.no_rescale, "weighted": not args.no_weight}
    return {name: values[name] for name in DECISIVE}


def tour(args: argparse.Namespace, processes: Processes) -> int:
    """Draws images, trains with SGL and with max pooling alone, and has both reported."""
    from make_synthetic_cxr import write_dataset

    args.out = Path("runs/cxr") if args.out is None else args.out
    args.data_dir = args.out / "data"
    if processes.first and not (args.resume and args.data_dir.exists()):
        if args.data_dir.exists():
            raise ValueError(f"out: {args.out} holds a tour; continue it with --resume, or name another folder")
        beside = args.out / "data.part"  # so that what is there under its name is whole
        shutil.rmtree(beside, ignore_errors=True)
        write_dataset(beside, seed=args.seed, workers=os.cpu_count() or 1, **TOUR_DATA)
        os.replace(beside, args.data_dir)
    if processes.group is not None:
        dist.barrier()
    args.cache = args.out / "cache"
    out = args.out
    for name in ("sgl", "bag"):
        args.out, args.loss = out / name, name
        print(f"\n{name}: told only which findings an image has\n")
        train(args, config_of(args), processes)
    if not processes.first or importlib.util.find_spec("localize_cxr") is None:
        return 0
    import localize_cxr

    return localize_cxr.main([
        "--run", str(out / "sgl"), str(out / "bag"), "--data-dir", str(args.data_dir), "--cache", str(args.cache),
        "--out", str(out / "report"), "--device", args.device,
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    Interrupt.listen()
    try:
        with joined(args.device) as processes:
            if args.synthetic:
                return tour(args, processes)
            train(args, config_of(args), processes)
    except (Exception, KeyboardInterrupt) as error:
        if not Interrupt.came and not isinstance(error, KeyboardInterrupt):
            if not isinstance(error, (ValueError, OSError)):
                raise
            print(f"error: {message_of(error)}", file=sys.stderr)
            return 2
        if os.environ.get("RANK", "0") == "0":
            how = "" if args.dry_run else "; the same command with --resume goes on after the last checkpoint"
            print(f"\nstopped{how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
