"""The baselines of the benchmarks: losses in plain PyTorch that users would write without this package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_all_instances(logits: Tensor, targets: Tensor) -> Tensor:
    """Plain BCE-with-logits of every instance against the label of its bag: the cheapest loss over all instances."""
    return F.binary_cross_entropy_with_logits(logits, targets.unsqueeze(-1).expand_as(logits))


def eager_sgl(logits: Tensor, targets: Tensor, delta_l: float = 0.3) -> Tensor:
    """Eq. 5-9 with max pooling and lam = 1 for dense (N, C, L) logits, in whole-tensor operations.

    It supports this layout only: no masks, no unknown labels, and no protection against constant bags, empty parts or
    saturated sigmoids. So its time contains none of these checks.
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
    """The same baselines for packed rows (T, C). The bag sizes are given on the host, outside of the measured time."""

    def __init__(self, sizes: list[int], device: torch.device):
        self.sizes = sizes
        self.lengths = torch.tensor(sizes, device=device)

    def rows_of(self, per_bag: Tensor) -> Tensor:
        return per_bag.repeat_interleave(self.lengths, 0, output_size=sum(self.sizes))

    def bce_all_instances(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, self.rows_of(targets))

    def eager_sgl(self, logits: Tensor, targets: Tensor, delta_l: float = 0.3) -> Tensor:
        """SGL with reductions bag by bag and all other operations on whole tensors.

        For a few long bags, this is faster than segment_reduce, which uses one thread per bag and class. It is also
        faster than scatter_reduce, whose atomic operations collide.
        """
        p = torch.sigmoid(logits.detach())
        bags = p.T.contiguous().split(self.sizes, 1)  # reductions over contiguous memory
        low = self.rows_of(torch.stack([bag.amin(1) for bag in bags]))
        high = self.rows_of(torch.stack([bag.amax(1) for bag in bags]))
        median = self.rows_of(torch.stack([bag.median(1).values for bag in bags]))
        instance = _instance_loss(logits, p, low, high, median, self.rows_of(targets), delta_l)
        largest = torch.stack([bag.amax(0) for bag in logits.split(self.sizes)])
        return F.binary_cross_entropy_with_logits(largest, targets) + instance
