"""MNIST-Bags: learn from "this bag contains a 9" which of its images are 9s.

    python examples/train_mnist_bags.py

trains the Self-Guiding Loss and max pooling on scikit-learn's digits, minutes in all, and prints them side by side.
Any argument makes it one training run of one method (``--help``); examples/README.md has the commands of its figures.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from bags import Bags, draw_bags, to_device
from instances import Instances, load_instances
from plots import Panel, draw_comparison, draw_panels
from torch import Tensor, nn
from tqdm import tqdm
from training import (
    Row,
    is_better,
    load_checkpoint,
    measure,
    predict,
    rng_state,
    save_checkpoint,
    set_rng_state,
    train_epoch,
    write_csv,
    write_json,
)

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss
from sgl_ops.pooling import POOLINGS, MaxPooling

#: What the run without arguments trains with: enough to see, in little time.
QUICK = "--bag-size 20 --bag-std 2 --bags 200 --epochs 60 --batch-size 16 --lr 5e-4"
METHODS = {"max pooling": "--loss bag --pooling max", "SGL": "--loss sgl"}
DEFAULT_POOLING = {"sgl": "max", "bag": "max", "bil": "mean", "mmm": "max"}
MEASURES = ("auc", "iou", "iou_pooled")
#: What may differ between a run and its continuation.
NOT_RESULT = ("data_dir", "seed", "runs", "device", "out", "resume", "dry_run")


class LeNet5(nn.Module):
    """LeNet-5 on 32x32 as the authors of the loss have it: two parallel branches in the middle, added."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2a = nn.Conv2d(6, 16, 5)
        self.conv2b = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.linear4 = nn.Linear(120, 84)
        self.linear5 = nn.Linear(84, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n,) of images (n, channels, 32, 32)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2a(x)), 2) + F.max_pool2d(F.relu(self.conv2b(x)), 2)
        x = F.relu(self.conv3(x)).flatten(1)
        return self.linear5(F.relu(self.linear4(x))).squeeze(1)


class Data(NamedTuple):
    """Images and the bags that one seed draws from them. Training, validation and test bags share no image."""

    train_images: Tensor
    test_images: Tensor
    train: Bags
    val: Bags
    test: Bags


class Tested(NamedTuple):
    """What one run gives on the test bags."""

    metrics: dict[str, Any]
    data: Data
    logits: Tensor  # (T,), of the last epoch
    bag_logits: Tensor  # (N,)


def make_data(instances: Instances, args: argparse.Namespace, seed: int, device: torch.device) -> Data:
    order = np.random.default_rng([seed, 0]).permutation(len(instances.train_classes))
    held_out = max(1, len(order) // 6)
    test_pool = np.arange(len(instances.test_classes))
    drawn = [
        draw_bags(pool, classes == args.target, count, args.bag_size, args.bag_std, np.random.default_rng([seed, part]))
        for part, pool, classes, count in (
            (1, order[held_out:], instances.train_classes, args.bags),
            (2, order[:held_out], instances.train_classes, args.val_bags),
            (3, test_pool, instances.test_classes, args.test_bags),
        )
    ]
    images = [
        x.to(device, memory_format=torch.channels_last) for x in (instances.train_images, instances.test_images)
    ]
    return Data(*images, *(to_device(bags, device) for bags in drawn))


def make_model(args: argparse.Namespace, channels: int, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Network, criterion, and the pooling that gives the probability of a bag."""
    network = LeNet5(channels).to(device, memory_format=torch.channels_last)
    if args.loss == "mmm":
        return network, MMMLoss().to(device), MaxPooling()
    if args.loss == "sgl":
        criterion: nn.Module = SGLLoss(
            delta_l=args.delta_l,
            lam=args.lam,
            pooling=args.pooling,
            rescale=not args.no_rescale,
            weighted=not args.no_weight,
        )
    else:
        criterion = {"bag": BagLoss, "bil": BILLoss}[args.loss](args.pooling)
    criterion.to(device)
    return network, criterion, criterion.pooling


def train(instances: Instances, args: argparse.Namespace, seed: int) -> Tested:
    """One run: train, measure on the validation bags after every epoch, on the test bags at the end."""
    device = torch.device(args.device)
    data = make_data(instances, args, seed, device)
    torch.manual_seed(seed)
    network, criterion, pooling = make_model(args, data.train_images.shape[1], device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    checkpoint = checkpoint_path(args, seed)
    config = result_config(args)
    history: list[Row] = []
    best: dict[str, Any] = {"row": None, "network": None}
    if args.resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, config)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        history, best = state["history"], state["best"]

    progress = tqdm(
        range(len(history) + 1, args.epochs + 1),
        initial=len(history),
        total=args.epochs,
        desc=f"{method_name(args)}, seed {seed}",
        unit="epoch",
        disable=None,
    )
    for epoch in progress:
        losses = train_epoch(network, criterion, optimizer, data.train_images, data.train, args.batch_size)
        if not math.isfinite(losses["loss"]):
            raise FloatingPointError(f"the loss is {losses['loss']} in epoch {epoch}: try a smaller --lr")
        logits = predict(network, data.train_images, data.val)
        val = {"loss": criterion(logits, data.val.labels, offsets=data.val.offsets).item()}
        val |= measure(logits, data.val, pooling)
        row: Row = {"seed": seed, "epoch": epoch, **losses, **{f"val_{name}": value for name, value in val.items()}}
        history.append(row)
        if is_better(row, best["row"]):
            best = {"row": row, "network": {name: value.clone() for name, value in network.state_dict().items()}}
        state = {
            "config": config,
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": rng_state(),
            "history": history,
            "best": best,
        }
        save_checkpoint(checkpoint, state)
        progress.set_postfix(loss=f"{losses['loss']:.3f}", val_auc=f"{val['auc']:.3f}", val_iou=f"{val['iou']:.3f}")

    last_logits = predict(network, data.test_images, data.test)
    last = measure(last_logits, data.test, pooling)
    network.load_state_dict(best["network"])
    best_val = measure(predict(network, data.test_images, data.test), data.test, pooling)
    metrics = {"seed": seed, "last": last, "best_val": best_val, "epoch": args.epochs, "best_epoch": best["row"]["epoch"]}
    write_csv(Path(args.out) / f"history-{seed}.csv", history)
    return Tested(metrics, data, last_logits, pooling(last_logits, offsets=data.test.offsets))
