"""Training of a head on bags of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common.learning_rate import set_cosine_rate
from torch import Tensor, nn

from features.heads import Candidates, Head, PatchNetwork, make_head_pooling
from features.margin import filled, used_cells
from features.runs import Predictions, predictions_of
from features.store import FeatureBags
from features.transform import Transform, fit_transform
from sgl_ops import BagLoss, BILLoss, LamSchedule, MMMLoss, SGLLoss, TopKSchedule

#: Steps between two measurements of the training AUC.
INTERVAL = 5


@dataclass(frozen=True)
class Settings:
    """All settings that decide a result, apart from the data and the seed: the options of train_features.py."""

    loss: str = "sgl"
    pooling: str = "topk"
    k: float = 8
    r: float | None = None
    k_start: float = 0.0
    head: str = "mlp"
    components: int = 0
    hidden: int = 32
    dropout: float = 0.0
    restarts: int = 1
    trial_epochs: int = 8
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
    rise: int | None = None  # None: 100, or a third of the steps if these are fewer
    cosine: bool = True
    noise: float = 0.0
    amp: str | None = None
    margin: float = 0.0

    @classmethod
    def of_run(cls, known: Mapping[str, object]) -> Settings:
        """The settings in ``settings.json`` of a run. A run of an older version lacks some, and has their defaults."""
        return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


class Batch(NamedTuple):
    """The bags of a step: packed features (T, D) float32, ``offsets`` (N + 1,), labels (N, C)."""

    features: Tensor
    offsets: Tensor
    labels: Tensor


class BagReader:
    """Reads bags of features as transformed float32 tensors, and keeps them in memory if they fit.

    Args:
        bags: the bags on disk.
        names: names of the bags to read.
        cache_bytes: keep the bags in memory if all of ``names`` take at most this many bytes.
        margin: leave out the cells near the edges of the images, see :func:`features.margin.used_cells`.
    """

    def __init__(self, bags: FeatureBags, names: Sequence[str], cache_bytes: float, margin: float = 0.0):
        self.bags = bags
        self.margin = margin
        self.instances = sum(map(self.count, names))
        self.cache_bytes = cache_bytes
        self.cache: dict[str, Tensor] | None = None
        self.fitted: tuple[str, ...] = ()
        self.transform: Transform | None = None

    def fit(self, names: Sequence[str], components: int) -> Transform:
        """Fits the transform that later reads apply, on the training bags ``names``. 0 ``components``: keep all."""
        if self.transform is None or self.fitted != tuple(names):
            self.fitted, self.transform, self.cache = tuple(names), None, None
            self.transform = fit_transform((self.read(name) for name in names), components)
            needed = self.instances * self.transform.weight.shape[1] * 4
            self.cache = {} if needed <= self.cache_bytes else None
        return self.transform

    def read(self, name: str) -> Tensor:
        """Features (L, D) of the used instances without the transform, float32."""
        bag = self.bags[name]
        features = torch.from_numpy(np.asarray(bag.features, np.float32))
        if self.margin:
            features = features[torch.from_numpy(used_cells(bag, self.margin))]
        return finite(features, f"{name} in {self.bags.folder}")

    def count(self, name: str) -> int:
        """The number of used instances of a bag."""
        count = self.bags.instances(name)  # also checks the file
        return int(used_cells(self.bags.places(name), self.margin).sum()) if self.margin else count

    def filled(self, name: str, instances: np.ndarray) -> np.ndarray:
        """Probabilities of all instances of a bag, from those of the used ones. The others have 0."""
        return filled(used_cells(self.bags.places(name), self.margin), instances) if self.margin else instances

    def __call__(self, name: str) -> Tensor:
        """Transformed features (L, K) of the used instances, float32."""
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        features = self.read(name)
        if self.transform is not None:
            features = self.transform(features)
        if self.cache is not None:
            self.cache[name] = features
        return features


def finite(features: Tensor, bag: str) -> Tensor:
    """The ``features`` (L, D) of a ``bag``. Raises ValueError if one is NaN or infinite."""
    broken = ~torch.isfinite(features).all(1)
    if broken.any():
        raise ValueError(
            f"{bag}: expected finite features, found NaN or infinite ones in {int(broken.sum())} of "
            f"{len(broken)} instances (the first is number {int(broken.nonzero()[0])}, from 0). Extract this bag again"
        )
    return features


def batches(
    reader: Callable[[str], Tensor], names: Sequence[str], labels: Tensor, size: int, order: Tensor
) -> Iterator[Batch]:
    """Yields batches of ``size`` of the bags ``names`` with ``labels`` (N, C), in ``order``."""
    for chosen in order.split(size):
        parts = [reader(names[i]) for i in chosen.tolist()]
        offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        yield Batch(torch.cat(parts), offsets, labels[chosen])


def make_loss(settings: Settings, width: int) -> nn.Module:
    """The loss of ``settings``. ``width`` is the width of the input of attention."""
    pooling = make_head_pooling(settings.head, settings.pooling, settings.k, width, settings.r)
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
        if settings.head == "patches":
            network = PatchNetwork(features, classes, settings.dropout)
            return nn.ModuleDict({"head": network, "loss": make_loss(settings, network.WIDTH)})
        hidden = 0 if settings.head == "linear" else settings.hidden
        head = Head(features, classes, hidden, settings.dropout)
        return nn.ModuleDict({"head": head, "loss": make_loss(settings, hidden or features)})


def bag_logits(model: nn.ModuleDict, logits: Tensor, batch: Batch, hidden: Tensor) -> Tensor:
    """Bag logits (N, C). For MMM, which has no pooling, the maximum."""
    pooling = getattr(model["loss"], "pooling", None)
    if pooling is None:
        pooling = make_head_pooling("mlp", "max", 1, 0)
    return pooling(logits, offsets=batch.offsets, features=hidden)


def loss_arguments(logits: Tensor, batch: Batch, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and keyword arguments of a loss. Bags of equal size form a dense batch, which is faster."""
    sizes = batch.offsets.diff()
    size = int(sizes[0])
    if size and bool((sizes == size).all()):
        shaped = logits.view(len(sizes), size, -1).transpose(1, 2)
        return shaped, {"features": hidden.view(len(sizes), size, -1)}
    return logits, {"offsets": batch.offsets, "features": hidden}


def autocast(settings: Settings) -> torch.autocast:
    """The precision of the network in training. The loss and all predictions are float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.amp == "bf16")


def train(
    reader: BagReader,
    names: Sequence[str],
    labels: Tensor,
    settings: Settings,
    seed: int,
    log: Callable[[dict], None] = lambda _: None,
) -> nn.ModuleDict:
    """Trains a head on the bags ``names`` with ``labels`` (N, C), NaN = unknown, and returns it.

    Args:
        log: called after each epoch with ``epoch``, ``loss``, ``bag_loss`` (its part without the instance loss),
            ``lam``, and ``auc``: the training AUC of each class over all training bags, or nothing before it is
            measured over all of them.
    """
    transform = reader.fit(names, settings.components)
    model = make_model(settings, transform.weight.shape[1], labels.shape[1], seed)
    model["head"].start(labels, settings.share)
    if settings.restarts > 1 or settings.k_start:
        choose_start(model, reader, names, labels, settings, seed)
    return fit(model, reader, names, labels, settings, seed, log)


def fit(
    model: nn.ModuleDict,
    reader: Callable[[str], Tensor],
    names: Sequence[str],
    labels: Tensor,
    settings: Settings,
    seed: int,
    log: Callable[[dict], None] = lambda _: None,
) -> nn.ModuleDict:
    """Trains ``model`` (``head`` and ``loss``) for ``settings.epochs``. For the arguments see :func:`train`."""
    head, criterion = model["head"], model["loss"]
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(names) / settings.batch_size)
    steps = settings.epochs * per_epoch
    rise = settings.rise or max(1, min(100, steps // 3))
    schedule = LamSchedule(
        settings.lam, auc=settings.start_auc, rise=rise, window=max(8, len(names)), interval=INTERVAL
    )
    generator = torch.Generator().manual_seed(seed)
    step = 0
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in range(1, settings.epochs + 1):
            total = bag_total = 0.0
            order = torch.randperm(len(names), generator=generator)
            for batch in batches(reader, names, labels, settings.batch_size, order):
                if settings.cosine:
                    set_cosine_rate(optimizer, settings.lr, step, steps)
                features = batch.features
                if settings.noise:
                    features = features + settings.noise * torch.randn_like(features)
                with autocast(settings):
                    logits, hidden = (out.float() for out in head(features))
                shaped, given = loss_arguments(logits, batch, hidden)
                if settings.loss == "sgl" and settings.start == "measured":
                    with torch.no_grad():
                        criterion.lam = schedule.step(criterion.pooling(shaped, **given), batch.labels)
                if settings.loss == "sgl":
                    terms = criterion.terms(shaped, batch.labels, **given)
                    loss, bag_loss = terms.total, terms.bag
                else:
                    loss = bag_loss = criterion(shaped, batch.labels, **given)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * (len(batch.offsets) - 1)
                bag_total += bag_loss.item() * (len(batch.offsets) - 1)
                step += 1
            of_all = (step - 1) // INTERVAL * INTERVAL + 1 >= per_epoch  # the steps at the last measurement
            auc = schedule.class_auc.tolist() if schedule.class_auc is not None and of_all else []
            means = {"loss": total / len(names), "bag_loss": bag_total / len(names)}
            log({"epoch": epoch, **means, "lam": getattr(criterion, "lam", 0.0), "auc": auc})
    return model.eval()


def choose_start(
    model: nn.ModuleDict, reader: BagReader, names: Sequence[str], labels: Tensor, settings: Settings, seed: int
) -> None:
    """Trains ``restarts`` heads with the bag loss for ``trial_epochs``, and copies the best one into ``model``.

    With ``k_start``, top-k pooling begins with this fraction of the largest training bag, and k falls to ``k`` during
    the trials. The best head has the lowest bag loss on the training bags in the last trial epoch. With some initial
    weights, top-k pooling of large bags converges to a minimum unrelated to the object. The loss of this minimum is
    higher.

    Raises:
        ValueError: a head that candidates do not support.
    """
    if settings.head not in ("linear", "mlp"):
        raise ValueError(f"restarts: expected the head linear or mlp, got {settings.head}")
    head, classes = model["head"], labels.shape[1]
    heads = [
        make_model(settings, head.first.in_features, classes, seed * 1000 + number)["head"]
        for number in range(1, settings.restarts)
    ]
    for other in heads:
        other.start(labels, settings.share)
    # the initial weights of the model are also a candidate
    own = Head(head.first.in_features, classes, 0 if head.last is None else settings.hidden, 0.0)
    own.load_state_dict(head.state_dict())
    candidates = Candidates([own, *heads])
    criterion = BagLoss(make_head_pooling(settings.head, settings.pooling, settings.k, 0, settings.r))
    optimizer = torch.optim.AdamW(candidates.parameters(), settings.lr, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    falling = falling_k(reader, names, settings)
    for _ in range(settings.trial_epochs):
        losses = torch.zeros(settings.restarts)
        order = torch.randperm(len(names), generator=generator)
        for batch in batches(reader, names, labels, settings.batch_size, order):
            if falling is not None:
                criterion.pooling.k = falling.step()
            with autocast(settings):
                logits = candidates(batch.features).float()
            shaped, given = loss_arguments(logits, batch, batch.features)
            targets = batch.labels.repeat(1, settings.restarts)
            loss = criterion(shaped, targets, **given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                pooled = criterion.pooling(shaped, **given)
                each = F.binary_cross_entropy_with_logits(pooled, targets.nan_to_num(), reduction="none")
                each = torch.where(targets.isnan(), 0.0, each)
                losses += each.sum(0).view(settings.restarts, classes).sum(1)
    candidates.copy_to(head, int(losses.argmin()))


def falling_k(reader: BagReader, names: Sequence[str], settings: Settings) -> TopKSchedule | None:
    """The k of each trial step before the last epoch. In the last epoch, it is ``k``. None without ``k_start``."""
    if not settings.k_start or settings.pooling != "topk":
        return None
    k = settings.k if settings.k < 1 else int(settings.k)
    start = settings.k_start if k < 1 else round(settings.k_start * max(map(reader.count, names)))
    steps = (settings.trial_epochs - 1) * math.ceil(len(names) / settings.batch_size)
    return TopKSchedule(k, start=max(start, k), steps=max(steps, 1))


@torch.no_grad()
def probabilities(model: nn.ModuleDict, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a bag with the transformed features ``x`` (L, K), (C,), and of its instances, (L, C)."""
    logits, hidden = model["head"](x)
    batch = Batch(x, torch.tensor([0, len(x)]), torch.empty(1, logits.shape[1]))
    return torch.sigmoid(bag_logits(model, logits, batch, hidden)[0]).numpy(), torch.sigmoid(logits).numpy()


def predicted(
    model: nn.ModuleDict,
    reader: Callable[[str], Tensor],
    names: Sequence[str],
    fill: Callable[[str, np.ndarray], np.ndarray] = lambda _, instances: instances,
) -> Predictions:
    """Probabilities of the bags ``names`` and of their instances, computed bag by bag.

    Args:
        fill: adds the instances that ``reader`` leaves out, see :meth:`BagReader.filled`.
    """

    def found() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in names:
            bag, instances = probabilities(model, reader(name))
            yield bag, fill(name, instances)

    return predictions_of(names, found())
