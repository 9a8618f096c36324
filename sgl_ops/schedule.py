r"""The start of a training with :class:`~sgl_ops.SGLLoss`: when the instance loss begins, and with which bias.

The instance loss takes its targets from the network's own ranking of the instances. At the start, the network does not
separate positive from negative bags, and its ranking is random. The instance loss would train it to keep this ranking.
:class:`LamSchedule` keeps lam at 0 until the bag loss has learnt, and raises it afterwards. :class:`TopKSchedule` lets
top-k pooling begin with many instances of a large bag and end with few. :func:`prior_bias` computes a bias of the last
layer from the frequencies of the labels.

>>> import torch
>>> from sgl_ops import LamSchedule, SGLLoss, prior_bias
>>> images, labels = torch.randn(64, 1, 12, 12), torch.arange(64).remainder(2).float().unsqueeze(1)
>>> images[labels[:, 0] == 1, :, 3:6, 3:6] += 2                     # what positive images have, and where
>>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1))
>>> with torch.no_grad():
...     _ = model[-1].bias.copy_(prior_bias(labels, share=0.1))
>>> criterion, schedule = SGLLoss(), LamSchedule.from_scratch(1.0)
>>> optimizer = torch.optim.Adam(model.parameters(), 1e-2)
>>> for step in range(3):
...     logits = model(images)
...     criterion.lam = schedule.step(criterion.pooling(logits), labels)
...     loss = criterion(logits, labels)
...     optimizer.zero_grad()
...     loss.backward()
...     optimizer.step()
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_count, check_number, check_values, looks_at_values
from ._ranking import Ranking, rank_bags
from ._ranks import Group, SharesGroup, all_reduce_sum, check_group
from .pooling import check_places

__all__ = ["LamSchedule", "TopKSchedule", "prior_bias"]


class LamSchedule(SharesGroup):
    r"""lam of each step: 0 until the bag loss has learnt, then a linear rise to the final value.

    *The measurement.* The schedule keeps the bag logits and labels of the last ``window`` training bags and
    computes the AUC of each class over them. A class has learnt when

    .. math:: AUC_c \ge \max(a, \; 1/2 + 3 \sigma_c), \quad \sigma_c^2 = \frac{n_1 + n_0 + 1}{12\, n_1 n_0}

    with a = ``auc`` and :math:`\sigma_c` the standard deviation of the AUC of random scores for :math:`n_1` positive
    and :math:`n_0` negative bags in the window. With few bags, the required AUC is higher. A class counts if
    :math:`1/2 + 3 \sigma_c` is below 1. This needs, for example, 7 positive and 7 negative bags, or 4 and 16.

    *Several classes.* lam is one number for all classes. It rises

    * when at least half of the classes that count have learnt,
    * or when any class has learnt and ``patience`` steps have passed since the first class has learnt. So a class that
      never learns (wrong labels, too few bags) delays the others by at most ``patience`` steps.

    *The rise.* lam is ``lam * k / rise`` after k steps in which this condition was true, up to ``lam``. In a step in
    which it is not true, lam keeps its value. So if the AUC of one window is high by chance, the rise stops after a few
    steps.

    *If nothing is learnt,* lam stays 0, and the training continues with the bag loss alone. :func:`sgl_ops.diagnose`
    says what to change. This often happens in large bags with max pooling: use
    :class:`~sgl_ops.pooling.TopKPooling`.

    *Unknown labels* (NaN) and bag logits that are not finite do not count.

    *Process groups.* With ``process_group`` the counts of pairs are summed over the ranks, so that every rank has the
    same lam. The window of a rank has ``window`` bags of this rank. All ranks must call ``step`` equally often.

    Args:
        lam: the value after the rise, finite, >= 0.
        auc: the AUC that a class needs, in [0.5, 1].
        rise: steps from 0 to ``lam``, >= 1.
        window: number of bags from which the AUC is computed, >= 8. If the last step has more bags, all of them count.
            With fewer than 14 bags on all ranks together, no class counts.
            Use about an epoch of a small data set, and more if positive bags are rare.
        patience: steps after the first class has learnt, >= 0.
        interval: steps between two measurements, >= 1. A measurement copies the bag logits of the window to the host.
        process_group: the ranks that share the batch, as in :class:`~sgl_ops.SGLLoss`.

    Attributes:
        value: lam of the last step.
        progress: steps of the rise that are done, 0 to ``rise``.
        class_auc: (C,) float64, the AUC of each class at the last measurement. NaN for a class without positive or
            without negative bags in the window. None before the first measurement.
        class_needed: (C,) float64, the AUC that each class needed at the last measurement, see :meth:`needed_auc`. None
            before the first measurement after the construction or :meth:`load_state_dict`.

    :meth:`pretrained` and :meth:`from_scratch` have settings to begin with.

    >>> import torch
    >>> from sgl_ops import LamSchedule
    >>> schedule = LamSchedule(2.0, rise=4, interval=1)
    >>> labels = torch.tensor([0.0, 1.0]).repeat(8)
    >>> schedule.step(torch.zeros(16), labels)                       # all bags alike: AUC 0.5
    0.0
    >>> [schedule.step(labels * 3, labels) for step in range(6)]     # positive bags above negative ones
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    """

    def __init__(
        self,
        lam: float = 1.0,
        *,
        auc: float = 0.75,
        rise: int = 200,
        window: int = 256,
        patience: int = 500,
        interval: int = 10,
        process_group: Group = None,
    ):
        check_number("lam", lam)
        if not 0.0 <= lam < math.inf:
            raise ValueError(f"lam: expected finite and >= 0, got {lam}")
        check_number("auc", auc)
        if not 0.5 <= auc <= 1.0:
            raise ValueError(f"auc: expected 0.5 <= auc <= 1, got {auc}")
        rise, window, patience, interval = (
            check_count(name, number, least)
            for name, number, least in (
            ("rise", rise, 1), ("window", window, 8), ("patience", patience, 0), ("interval", interval, 1)
            )
        )  # fmt: skip
        check_group(process_group)
        self.lam = lam
        self.auc = auc
        self.rise = rise
        self.window = window
        self.patience = patience
        self.interval = interval
        self.process_group = process_group
        self.value = 0.0
        self.progress = 0
        self.class_auc: Tensor | None = None
        self.class_needed: Tensor | None = None
        self._steps = 0
        self._since_first: int | None = None  # steps since the first class had learnt
        self._rising = False  # the outcome of the last measurement
        self._bags: list[tuple[Tensor, Tensor]] = []  # (logits, targets) of each step, the latest last

    @classmethod
    def pretrained(cls, lam: float = 1.0, **settings: Any) -> LamSchedule:
        """For a pretrained network: AUC 0.8, a rise of 100 steps. ``settings`` are those of the constructor."""
        return cls(lam, **({"auc": 0.8, "rise": 100} | settings))

    @classmethod
    def from_scratch(cls, lam: float = 1.0, **settings: Any) -> LamSchedule:
        """For a network with random weights: AUC 0.7, a rise of 300 steps. ``settings`` are those of the constructor.

        Without pretrained features, the network needs the instance loss earlier, because it has to learn the features.
        """
        return cls(lam, **({"auc": 0.7, "rise": 300} | settings))

    def step(self, bag_logits: Tensor, targets: Tensor) -> float:
        """lam for the loss of this step. Call it once a step, in training only.

        Args:
            bag_logits: (N, C) or (N,), for example ``criterion.pooling(logits)``. No gradient flows through them.
            targets: bag labels, (N, C) or (N,): 0, 1, or NaN = unknown. Their values are checked on the CPU only.
        """
        scores, labels = _per_class("bag_logits", bag_logits), _per_class("targets", targets)
        if scores.shape != labels.shape:
            raise ValueError(f"targets: expected shape {tuple(bag_logits.shape)}, got {tuple(targets.shape)}")
        if looks_at_values(labels, None):
            check_values(labels, None, 0)
        if self._bags and self._bags[-1][0].shape[1] != scores.shape[1]:
            raise ValueError(f"bag_logits: expected {self._bags[-1][0].shape[1]} classes, got {scores.shape[1]}")
        if self.progress < self.rise:
            self._remember(scores, labels)
            if self._steps % self.interval == 0:
                self._measure()
            self._steps += 1
            if self._since_first is not None:
                self._since_first += 1
            self.progress += self._rising
            self.value = self.lam * (self.progress / self.rise)  # exactly lam at the end
        else:
            self._bags = []
            self.value = self.lam
        return self.value

    def needed_auc(self, targets: Tensor) -> Tensor:
        r"""The AUC that each class needs if the window has these targets: (C,) float64, max(a, 1/2 + 3 sigma_c).

        NaN for a class that does not count, because it has too few positive or too few negative bags.

        Args:
            targets: bag labels, (N, C) or (N,): 0, 1, or NaN = unknown.

        >>> import torch
        >>> from sgl_ops import LamSchedule
        >>> LamSchedule(auc=0.75).needed_auc(torch.tensor([0.0, 1.0]).repeat(50))
        tensor([0.7500], dtype=torch.float64)
        >>> LamSchedule(auc=0.75).needed_auc(torch.tensor([0.0, 1.0]).repeat(8))
        tensor([0.9463], dtype=torch.float64)
        >>> LamSchedule(auc=0.75).needed_auc(torch.tensor([0.0, 1.0]).repeat(3))
        tensor([nan], dtype=torch.float64)
        """
        labels = _per_class("targets", targets)
        check_values(labels, None, 0)
        return self._needed(rank_bags(torch.zeros_like(labels), labels))

    def _needed(self, ranking: Ranking) -> Tensor:
        bound = 0.5 + 3 * ranking.chance_deviation
        return torch.where(bound < 1, bound.clamp(min=self.auc), torch.nan)

    def _remember(self, scores: Tensor, labels: Tensor) -> None:
        if self._bags and self._bags[-1][0].device != scores.device:  # of a checkpoint on another device
            self._bags = [(bags.to(scores.device), known.to(scores.device)) for bags, known in self._bags]
        self._bags.append((scores.detach().clone(), labels.detach().clone()))
        held = sum(len(bags) for bags, _ in self._bags)
        while held - len(self._bags[0][0]) >= self.window:
            held -= len(self._bags.pop(0)[0])

    def _measure(self) -> None:
        scores = torch.cat([bags for bags, _ in self._bags])
        ranking = rank_bags(scores, torch.cat([labels for _, labels in self._bags]))
        # the counts travel on the device of the logits, which a process group of NCCL needs
        counts = torch.stack(ranking).to(scores.device, torch.float32 if scores.device.type == "mps" else torch.float64)
        ranking = Ranking(*all_reduce_sum(counts, self.process_group).cpu().double().unbind())
        self.class_auc = ranking.auc
        self.class_needed = needed = self._needed(ranking)
        counting, learnt = ~needed.isnan(), ranking.auc >= needed  # False for NaN
        if self._since_first is None and bool(learnt.any()):
            self._since_first = 0
        enough = bool(learnt.any()) and 2 * int(learnt.sum()) >= int(counting.sum())
        waited = self._since_first is not None and self._since_first >= self.patience
        self._rising = enough or (waited and bool(learnt.any()))

    def state_dict(self) -> dict[str, Any]:
        """The state for ``torch.save``. After :meth:`load_state_dict` training continues as without an interruption.

        It does not contain the settings. With a process group, save it for each rank: the windows of the ranks differ.
        """
        return {
            "value": self.value,
            "progress": self.progress,
            "class_auc": self.class_auc,
            "steps": self._steps,
            "since_first": self._since_first,
            "rising": self._rising,
            "bags": list(self._bags),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`. Its tensors may be on another device.

        Raises:
            ValueError: an entry is missing. The schedule does not change.
        """
        _check_state(state, self.state_dict())
        self.value = state["value"]
        self.progress = state["progress"]
        self.class_auc, self.class_needed = state["class_auc"], None
        self._steps = state["steps"]
        self._since_first = state["since_first"]
        self._rising = state["rising"]
        self._bags = list(state["bags"])

    def __repr__(self) -> str:
        return (
            f"LamSchedule({self.lam}, auc={self.auc}, rise={self.rise}, window={self.window}, "
            f"patience={self.patience}, interval={self.interval})"
        )


class TopKSchedule:
    r"""k of each step for :class:`~sgl_ops.pooling.TopKPooling`: from many instances of a bag down to a few.

    Top-k pooling gives its gradient to k instances. If k is a small part of a large bag, the random initial weights
    choose these instances, and the network may only learn to keep them. With many instances, the network first learns
    what distinguishes positive from negative bags on average. Then k falls geometrically:

    .. math:: k_t = k_0 \left(\frac{k_1}{k_0}\right)^{\min(t / T,\; 1)}, \quad t = 0, 1, \ldots

    with :math:`k_0` = ``start``, :math:`k_1` = ``k`` and T = ``steps``. A number of instances is rounded. The page
    "When SGL helps, and when not" has the measured gain. Begin the instance loss when k has its final value
    (:attr:`done`).

    Args:
        k: the value at the end, as for :class:`~sgl_ops.pooling.TopKPooling`: an int >= 1, or a fraction of the bag.
        start: the value at the beginning, of the same type as ``k`` and at least ``k``. Begin with a fifth of the bag.
        steps: steps from ``start`` to ``k``, >= 1. Begin with half of the steps of the training.

    Attributes:
        value: k of the last step; ``start`` before the first.
        progress: steps that are done, 0 to ``steps``.
        done: whether ``value`` is the final one.

    >>> from sgl_ops import TopKSchedule
    >>> from sgl_ops.pooling import TopKPooling
    >>> pooling, schedule = TopKPooling(8), TopKSchedule(8, start=240, steps=4)
    >>> pooling.k = schedule.step()                                  # before each step of the training
    >>> pooling
    TopKPooling(k=240)
    >>> [schedule.step() for step in range(5)]
    [103, 44, 19, 8, 8]
    """

    def __init__(self, k: int | float = 8, *, start: int | float, steps: int):
        self.k, self.start = check_places("k", k), check_places("start", start)
        if isinstance(self.k, int) != isinstance(self.start, int):
            kind = "a number of instances" if isinstance(self.k, int) else "a fraction of the bag"
            raise TypeError(f"start: expected {kind} ({type(self.k).__name__}), as k = {self.k}, got {start!r}")
        if self.start < self.k:
            raise ValueError(f"start: expected at least k = {k}, got {start}")
        self.steps = check_count("steps", steps, 1)
        self.value = self.start
        self.progress = 0

    @property
    def done(self) -> bool:
        return self.value == self.k

    def step(self) -> int | float:
        """k for this step. Call it once a step, in training only."""
        value = self.start * (self.k / self.start) ** (self.progress / self.steps)
        # at the end the very number, not one with rounding errors
        self.value = self.k if self.progress >= self.steps else round(value) if isinstance(self.k, int) else value
        self.progress = min(self.progress + 1, self.steps)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """The state for ``torch.save``. It does not contain the settings."""
        return {"value": self.value, "progress": self.progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`. Raises ValueError if an entry is missing."""
        _check_state(state, self.state_dict())
        self.value, self.progress = state["value"], state["progress"]

    def __repr__(self) -> str:
        return f"TopKSchedule({self.k}, start={self.start}, steps={self.steps})"


def prior_bias(targets: Tensor, *, share: float = 1.0) -> Tensor:
    r"""The bias of a network's last layer from the frequencies of the labels: (C,) float32, for ``bias.copy_``.

    .. math:: b_c = \mathrm{logit}\left(s \, \frac{n_1 + 1/2}{n_1 + n_0 + 1}\right)

    for :math:`n_1` positive and :math:`n_0` negative bags of class c. If the other terms of the logits are near 0, the
    initial probability of an instance is then the fraction of positive instances in the training bags. Without this
    bias, it is 0.5, and the first steps only change the bias. The initial P of a large bag with noisy-or pooling
    is near 1 without this bias.

    Args:
        targets: labels of the training bags, (N, C), or (N,) for one class; NaN = unknown.
        share: s, the fraction of the instances of a positive bag that are positive, in (0, 1]. A guess is enough: 1 if
            every instance of a positive bag shows the class, 0.02 if the class covers 2 % of the image.

    >>> import torch
    >>> from sgl_ops import prior_bias
    >>> labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, float("nan")]])
    >>> prior_bias(labels)
    tensor([ 0.8473, -1.9459])
    >>> prior_bias(labels, share=0.1)
    tensor([-2.5867, -4.3694])
    """
    labels = _per_class("targets", targets).detach()
    check_values(labels, None, 0)
    check_number("share", share)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: expected 0 < share <= 1, got {share}")
    # on the host: float64 is not everywhere
    labels = labels.cpu().double()
    known = ~torch.isnan(labels)
    frequency = ((labels == 1).sum(0) + 0.5) / (known.sum(0) + 1)
    return torch.logit(share * frequency).float().to(targets.device)


def _per_class(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dim() not in (1, 2) or 0 in value.shape:
        raise ValueError(f"{name}: expected shape (N, C) or (N,) with N >= 1, got {tuple(value.shape)}")
    return value.unsqueeze(1) if value.dim() == 1 else value


def _check_state(state: dict[str, Any], expected: dict[str, Any]) -> None:
    missing = [name for name in expected if name not in state]
    if missing:
        raise ValueError(f"state: expected the entries of state_dict(), got no {', '.join(missing)}")
