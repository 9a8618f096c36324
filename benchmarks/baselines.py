"""What the loss is measured against: the code that people would otherwise write."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_all_instances(logits: Tensor, targets: Tensor) -> Tensor:
    """Plain BCE-with-logits of every instance against its bag's label: the cheapest loss that sees every instance."""
    return F.binary_cross_entropy_with_logits(logits, targets.unsqueeze(-1).expand_as(logits))


def eager_sgl(logits: Tensor, targets: Tensor, delta_l: float = 0.3) -> Tensor:
    """Eq. 5-9 with max pooling and lam = 1 for dense (N, C, L) logits, in whole-tensor operations.

    As somebody who knows PyTorch writes it for this one layout: no masks, no unknown labels, no guard against constant
    bags, empty parts or saturated sigmoids. What sgl_ops adds in safety is not charged to this baseline.
    """
    x = logits.detach()
    p = torch.sigmoid(x)
    low, high = p.amin(-1, keepdim=True), p.amax(-1, keepdim=True)
    median = p.median(-1, keepdim=True).values
    instance = _instance_loss(logits, p, low, high, median, targets.unsqueeze(-1), delta_l)
    return F.binary_cross_entropy_with_logits(logits.amax(-1), targets) + instance


def _instance_loss(
    logits: Tensor, p: Tensor, low: Tensor, high: Tensor, median: Tensor, y: Tensor, delta_l: float
) -> Tensor:
    theta = (p - low) / (high - low)
    ternary = torch.where(theta < delta_l, 0.0, torch.where(theta > 1 - delta_l, 1.0, theta)) * y
    weight = torch.exp2(torch.maximum(high - median, 1 - y) - 1)
    n_negative, n_positive = (ternary == 0).sum(), (ternary == 1).sum()
    n_ambiguous = ternary.numel() - n_negative - n_positive
    share = torch.where(ternary == 0, 1 / n_negative, torch.where(ternary == 1, 1 / n_positive, 1 / n_ambiguous))
    return F.binary_cross_entropy_with_logits(logits, ternary, weight * share, reduction="sum")


class Packed:
    """The same baselines for (T, C) rows of bags whose sizes are known on the host, which costs them nothing here."""

    def __init__(self, sizes: list[int], device: torch.device):
        self.sizes = sizes
        self.lengths = torch.tensor(sizes, device=device)

    def rows_of(self, per_bag: Tensor) -> Tensor:
        return per_bag.repeat_interleave(self.lengths, 0, output_size=sum(self.sizes))

    def bce_all_instances(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, self.rows_of(targets))

    def eager_sgl(self, logits: Tensor, targets: Tensor, delta_l: float = 0.3) -> Tensor:
        """Reductions bag by bag, the rest in whole-tensor operations.

        For a few long bags that is faster than segment_reduce, a thread to a bag and class, and than scatter_reduce,
        whose atomics meet in a few places.
        """
        p = torch.sigmoid(logits.detach())
        bags = p.T.contiguous().split(self.sizes, 1)  # reductions along memory
        low = self.rows_of(torch.stack([bag.amin(1) for bag in bags]))
        high = self.rows_of(torch.stack([bag.amax(1) for bag in bags]))
        median = self.rows_of(torch.stack([bag.median(1).values for bag in bags]))
        instance = _instance_loss(logits, p, low, high, median, self.rows_of(targets), delta_l)
        largest = torch.stack([bag.amax(0) for bag in logits.split(self.sizes)])
        return F.binary_cross_entropy_with_logits(largest, targets) + instance
