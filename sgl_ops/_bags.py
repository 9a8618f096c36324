"""Bags of instances in every layout, and the per-bag reductions that plain PyTorch lacks.

The other files use two kinds of tensors: one value per instance, and one value per (bag, class) pair. Only this file
knows whether the instances are a dense ``(N, C, L)`` block or packed ``(T, C)`` rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import instance_shape


def bags_of(logits: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Bags:
    """The bags of validated logits: packed if ``offsets`` are given, else dense."""
    return DenseBags(logits, mask) if offsets is None else PackedBags(logits, offsets)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a loss is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Bags(ABC):
    """N bags of instances with C classes.

    :meth:`instances` converts a tensor from the user's layout to the inner layout, (N, C, L) or (T, C) for packed bags.
    The reductions take tensors in the inner layout and return (N, C), without the instances that a mask removes.

    Attributes:
        size: (N, 1) int64, the number of instances of each bag.
        instance_shape: (N, L), or (T,) for packed bags.
    """

    one_class: bool  # the logits have no class axis
    real: Tensor | None  # broadcasts against instances; None: every instance is real
    size: Tensor  # (N, 1) int64, real instances of each bag
    instance_shape: tuple[int, ...]  # the shape of instance features without D

    @abstractmethod
    def instances(self, logits: Tensor) -> Tensor:
        """A tensor in the layout of the logits, in the inner layout, as float32 or float64."""

    @abstractmethod
    def layout(self, instances: Tensor) -> Tensor:
        """A tensor in the inner layout, in the layout of the logits."""

    @abstractmethod
    def features(self, features: Tensor) -> Tensor:
        """Features (N, L, D) or (T, D), with 0 for instances that are not real."""

    @abstractmethod
    def expand_to_instances(self, per_bag: Tensor) -> Tensor:
        """An (N, C) tensor that broadcasts against the inner layout."""

    @abstractmethod
    def per_class(self, v: Tensor) -> Tensor:
        """A (C,) tensor that broadcasts against the inner layout."""

    @abstractmethod
    def _sum(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _max(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _ranked(self, x: Tensor, rank: Tensor) -> Tensor:
        """The instance with the rank ``rank`` (N, 1) of every (bag, class) pair. Rank 0 is the smallest."""

    def bag_logits(self, z: Tensor) -> Tensor:
        """(N, C), or (N,) where the logits have no class axis."""
        return z.squeeze(1) if self.one_class else z

    def fill(self, x: Tensor, value: float) -> Tensor:
        """``x`` with ``value`` in place of instances that are not real. The replaced ones get no gradient."""
        return x if self.real is None else torch.where(self.real, x, value)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the bag, 0 for an empty bag."""
        return self._sum(self.fill(x, 0.0))

    def count(self, condition: Tensor) -> Tensor:
        """The number of real instances that fulfil ``condition``: (N, C) int64."""
        condition = condition if self.real is None else condition & self.real
        return self._sum(condition.to(torch.int64))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the bag, 0 for an empty bag."""
        return self.sum(x) / self.size.clamp(min=1)

    def max(self, x: Tensor) -> Tensor:
        """The largest instance, 0 for an empty bag. Constant: no gradient flows through it."""
        return torch.where(self.size > 0, self._max(self.fill(x.detach(), -torch.inf)), 0.0)

    def min(self, x: Tensor) -> Tensor:
        """The smallest instance, 0 for an empty bag. Constant: no gradient flows through it."""
        return -self.max(-x)

    def median(self, x: Tensor) -> Tensor:
        """The lower median, 0 for an empty bag. Constant. By sorting: ``torch.median`` is not deterministic on CUDA."""
        rank = (self.size - 1).clamp(min=0) // 2
        return torch.where(self.size > 0, self._ranked(self.fill(x.detach(), torch.inf), rank), 0.0)

    def kth_largest(self, x: Tensor, k: Tensor) -> Tensor:
        """The k-th largest instance for k (N, 1) in [1, size], 0 for an empty bag. Constant."""
        rank = (self.size - k).clamp(min=0)
        return torch.where(self.size > 0, self._ranked(self.fill(x.detach(), torch.inf), rank), 0.0)

    def quantile(self, x: Tensor, q: float) -> Tensor:
        """The instance at the rank floor(q (n - 1)) of n, 0 for an empty bag. Constant. ``q`` in [0, 1]."""
        rank = ((self.size - 1).clamp(min=0) * q).to(torch.int64)
        return torch.where(self.size > 0, self._ranked(self.fill(x.detach(), torch.inf), rank), 0.0)

    def tied_max(self, x: Tensor) -> Tensor:
        """The largest instance, with its gradient shared equally among those tied for it."""
        m = self.max(x)
        tied = x == self.expand_to_instances(m)
        shared = self.sum(torch.where(tied, x, 0.0)) / self.count(tied).clamp(min=1)
        return shared + (m - shared).detach()  # exactly m, even if the mean of equal values is rounded

    def logsumexp(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """log sum exp over the real instances (in ``keep``, if given); 0 with gradient 0 if there are none."""
        kept = x if keep is None else torch.where(keep, x, -torch.inf)
        kept = self.fill(kept, -torch.inf)
        m = torch.where(self.size > 0, self._max(kept.detach()), 0.0)
        m = torch.where(m == -torch.inf, 0.0, m)
        s = self._sum(torch.exp(kept - self.expand_to_instances(m)))
        # an empty sum is replaced before the log: 0 * inf in the backward would be NaN for every learned parameter
        return torch.log(torch.where(s == 0, 1.0, s)) + m

    def propagate_nonfinite(self, x: Tensor) -> Tensor:
        """``x`` in which every (bag, class) pair with a NaN or infinite instance is NaN, in value and gradient.

        A product does this: any gradient times NaN is NaN, so that such a bag is never dropped without notice.
        """
        broken = self.count(~torch.isfinite(x)) > 0
        return x * self.expand_to_instances(torch.where(broken, torch.nan, 1.0).to(x.dtype))


class DenseBags(Bags):
    """(N, L), (N, C, L) or (N, C, spatial …), with a mask (N, L) or (N, spatial …): instances are (N, C, L)."""

    def __init__(self, logits: Tensor, mask: Tensor | None):
        self.one_class = logits.dim() == 2
        self.shape = logits.shape
        self.instance_shape = instance_shape(logits, None)
        length = self.instance_shape[1]
        self.padded = length == 0  # torch cannot reduce over an empty axis: pad one instance that is not real
        if self.padded:
            self.real = torch.zeros(logits.shape[0], 1, 1, dtype=torch.bool, device=logits.device)
        else:
            self.real = None if mask is None else mask.flatten(1).unsqueeze(1)
        if self.real is None:
            self.size = torch.full((logits.shape[0], 1), length, dtype=torch.int64, device=logits.device)
        else:
            self.size = self.real.sum(-1)

    def instances(self, logits: Tensor) -> Tensor:
        x = logits.to(working_dtype(logits.dtype))
        x = x.unsqueeze(1) if self.one_class else x.flatten(2)
        return self.fill(F.pad(x, (0, 1)) if self.padded else x, 0.0)

    def layout(self, instances: Tensor) -> Tensor:
        if self.padded:
            instances = instances[..., :0]
        return instances.reshape(self.shape)

    def features(self, features: Tensor) -> Tensor:
        if self.padded:
            features = F.pad(features, (0, 0, 0, 1))
        return features if self.real is None else torch.where(self.real.transpose(1, 2), features, 0.0)

    def expand_to_instances(self, per_bag: Tensor) -> Tensor:
        return per_bag.unsqueeze(-1)

    def per_class(self, v: Tensor) -> Tensor:
        return v.unsqueeze(-1)

    def _sum(self, x: Tensor) -> Tensor:
        return x.sum(-1)

    def _max(self, x: Tensor) -> Tensor:
        return x.amax(-1)

    def _ranked(self, x: Tensor, rank: Tensor) -> Tensor:
        index = rank.unsqueeze(-1).expand(-1, x.shape[1], -1)
        return x.sort(-1).values.gather(-1, index).squeeze(-1)


class PackedBags(Bags):
    """(T, C) or (T,) rows with offsets (N + 1,): instances are (T, C)."""

    def __init__(self, logits: Tensor, offsets: Tensor):
        self.one_class = logits.dim() == 1
        self.real = None
        self.rows = logits.shape[0]
        self.instance_shape = (self.rows,)
        self.bags = offsets.shape[0] - 1
        self.start = offsets[:-1].to(torch.int64)
        self.size = (offsets.to(torch.int64).diff()).unsqueeze(1)
        # the bag of a row = the number of bags that end at or before it
        row = torch.arange(self.rows, device=logits.device, dtype=offsets.dtype)
        self.bag = torch.searchsorted(offsets[1:].contiguous(), row, right=True).clamp(max=self.bags - 1)

    def instances(self, logits: Tensor) -> Tensor:
        x = logits.to(working_dtype(logits.dtype))
        return x.unsqueeze(1) if self.one_class else x

    def layout(self, instances: Tensor) -> Tensor:
        return instances.squeeze(1) if self.one_class else instances

    def features(self, features: Tensor) -> Tensor:
        return features

    def expand_to_instances(self, per_bag: Tensor) -> Tensor:
        return per_bag.index_select(0, self.bag)

    def per_class(self, v: Tensor) -> Tensor:
        return v

    def _sum(self, x: Tensor) -> Tensor:
        # sequential additions: in float32 a bag of 100,000 instances would lose three digits
        wide = torch.float64 if x.is_floating_point() and x.device.type != "mps" else x.dtype
        return x.new_zeros(self.bags, x.shape[1], dtype=wide).index_add(0, self.bag, x.to(wide)).to(x.dtype)

    def _max(self, x: Tensor) -> Tensor:
        index = self.bag.unsqueeze(1).expand_as(x)
        return x.new_full((self.bags, x.shape[1]), -torch.inf).scatter_reduce(0, index, x, "amax")

    def _ranked(self, x: Tensor, rank: Tensor) -> Tensor:
        if self.rows == 0:
            return x.new_zeros(self.bags, x.shape[1])
        by_value, order = x.sort(dim=0)
        # stable: the rows of a bag keep the order of their values
        by_bag = self.bag[order].sort(dim=0, stable=True).indices
        row = (self.start.unsqueeze(1) + rank).clamp(0, self.rows - 1)  # offsets may be unchecked
        return by_value.gather(0, by_bag).gather(0, row.expand(-1, x.shape[1]))
