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
    y = targets.unsqueeze(-1)
    theta = (p - low) / (high - low)
    ternary = torch.where(theta < delta_l, 0.0, torch.where(theta > 1 - delta_l, 1.0, theta)) * y
    weight = torch.exp2(torch.maximum(high - median, 1 - y) - 1)
    n_negative, n_positive = (ternary == 0).sum(), (ternary == 1).sum()
    n_ambiguous = ternary.numel() - n_negative - n_positive
    share = torch.where(ternary == 0, 1 / n_negative, torch.where(ternary == 1, 1 / n_positive, 1 / n_ambiguous))
    instance = F.binary_cross_entropy_with_logits(logits, ternary, weight * share, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits.amax(-1), targets) + instance
