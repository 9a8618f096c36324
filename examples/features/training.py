"""Training of a head on bags of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from features.heads import Head, make_head_pooling
from features.store import FeatureBags
from sgl_ops import BagLoss, BILLoss, LamSchedule, MMMLoss, SGLLoss


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result besides the data and the seed; the options of train_features.py."""

    loss: str = "sgl"
    pooling: str = "topk"
    k: float = 8
    head: str = "mlp"
    hidden: int = 32
    dropout: float = 0.0
    epochs: int = 60
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 1e-2
    share: float = 0.05
    lam: float = 1.0
    delta_l: float = 0.3
    normalize: str = "batch"
    mask_weight: float = 0.0
    start: str = "measured"
    start_auc: float = 0.8
    rise: int = 100
    cosine: bool = True
    noise: float = 0.0


class Batch(NamedTuple):
    """Bags of a step: packed features (T, D) float32, ``offsets`` (N + 1,), labels (N, C)."""

    features: Tensor
    offsets: Tensor
    labels: Tensor


class BagReader:
    """Reads bags of features as float32 tensors, and keeps them in memory while they fit.

    Args:
        bags: the bags on disk.
        names: those that are read.
        cache_bytes: kept in memory if all of ``names`` take at most as many.
    """

    def __init__(self, bags: FeatureBags, names: Sequence[str], cache_bytes: float):
        self.bags = bags
        needed = sum(bags.instances(name) for name in names) * bags.features * 4
        self.cache: dict[str, Tensor] | None = {} if needed <= cache_bytes else None

    def __call__(self, name: str) -> Tensor:
        """Features (L, D), float32."""
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        features = torch.from_numpy(np.asarray(self.bags[name].features, np.float32))
        if not torch.isfinite(features).all():
            raise ValueError(f"{name}: expected finite features")
        if self.cache is not None:
            self.cache[name] = features
        return features

    def moments(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (D,) over all instances of the bags, read one bag at a time."""
        count = sum(self.bags.instances(name) for name in names)
        if not count:
            raise ValueError("features: the training bags hold no instances")
        total = sum(self(name).double().sum(0) for name in names)
        mean = total / count
        squares = sum((self(name).double() - mean).square().sum(0) for name in names)
        return mean.float(), (squares / count).sqrt().clamp(min=1e-4).float()


def batches(reader: BagReader, names: Sequence[str], labels: Tensor, size: int, order: Tensor) -> Iterator[Batch]:
    """The bags ``names`` with ``labels`` (N, C), ``size`` at a time, in ``order``."""
    for chosen in order.split(size):
        parts = [reader(names[i]) for i in chosen.tolist()]
        offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        yield Batch(torch.cat(parts), offsets, labels[chosen])


def make_loss(settings: Settings, width: int) -> nn.Module:
    """The loss that ``settings`` name; ``width`` of what attention looks at."""
    pooling = make_head_pooling(settings.head, settings.pooling, settings.k, width)
    if settings.loss == "sgl":
        return SGLLoss(
            lam=settings.lam,
            delta_l=settings.delta_l,
            pooling=pooling,
            normalize=settings.normalize,
            mask_weight=settings.mask_weight,
        )
    if settings.loss == "mmm":
        return MMMLoss()
    return {"bag": BagLoss, "bil": BILLoss}[settings.loss](pooling)


def make_model(settings: Settings, features: int, classes: int, seed: int) -> nn.ModuleDict:
    """``head`` and ``loss`` with the initial weights of ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = 0 if settings.head == "linear" else settings.hidden
        head = Head(features, classes, hidden, settings.dropout)
        return nn.ModuleDict({"head": head, "loss": make_loss(settings, hidden or features)})


def bag_logits(model: nn.ModuleDict, logits: Tensor, batch: Batch, hidden: Tensor) -> Tensor:
    """Bag logits (N, C); the maximum for MMM, which has no pooling of its own."""
    pooling = getattr(model["loss"], "pooling", None)
    if pooling is None:
        pooling = make_head_pooling("mlp", "max", 1, 0)
    return pooling(logits, offsets=batch.offsets, features=hidden)


def loss_arguments(logits: Tensor, batch: Batch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and keyword arguments of a loss. Bags of one size are a plain batch, which is faster than packed bags."""
    sizes = batch.offsets.diff()
    size = int(sizes[0])
    if size and bool((sizes == size).all()):
        shaped = logits.view(len(sizes), size, -1).transpose(1, 2)
        return shaped, {"features": hidden.view(len(sizes), size, -1)}
    return logits, {"offsets": batch.offsets, "features": hidden}


def train(
    reader: BagReader,
    names: Sequence[str],
    labels: Tensor,
    settings: Settings,
    seed: int,
    log: Callable[[dict], None] = lambda _: None,
) -> nn.ModuleDict:
    """A head trained on the bags ``names`` with ``labels`` (N, C); NaN = unknown.

    Args:
        log: called after each epoch with the epoch's number, loss, lam and training AUC per class.
    """
    model = make_model(settings, reader.bags.features, labels.shape[1], seed)
    head, criterion = model["head"], model["loss"]
    mean, std = reader.moments(names)
    head.mean.copy_(mean)
    head.std.copy_(std)
    head.start(labels, settings.share)
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(names) / settings.batch_size)
    schedule = LamSchedule(
        settings.lam, auc=settings.start_auc, rise=settings.rise, window=max(8, len(names)), interval=5
    )
    generator = torch.Generator().manual_seed(seed)
    step = 0
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in range(1, settings.epochs + 1):
            total = 0.0
            order = torch.randperm(len(names), generator=generator)
            for batch in batches(reader, names, labels, settings.batch_size, order):
                if settings.cosine:
                    for group in optimizer.param_groups:
                        group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                features = batch.features
                if settings.noise:
                    features = features + settings.noise * head.std * torch.randn_like(features)
                logits, hidden = head(features)
                shaped, given = loss_arguments(logits, batch, hidden)
                if settings.loss == "sgl" and settings.start == "measured":
                    with torch.no_grad():
                        criterion.lam = schedule.step(criterion.pooling(shaped, **given), batch.labels)
                loss = criterion(shaped, batch.labels, **given)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * (len(batch.offsets) - 1)
                step += 1
            log({"epoch": epoch, "loss": total / len(names), "lam": getattr(criterion, "lam", 0.0)})
    return model.eval()


@torch.no_grad()
def predict(model: nn.ModuleDict, reader: BagReader, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Per bag its name, probabilities (C,) of the bag and (L, C) of its instances."""
    for name in names:
        x = reader(name)
        logits, hidden = model["head"](x)
        batch = Batch(x, torch.tensor([0, len(x)]), torch.empty(1, logits.shape[1]))
        pooled = bag_logits(model, logits, batch, hidden)
        yield name, torch.sigmoid(pooled[0]), torch.sigmoid(logits)
