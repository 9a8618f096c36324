"""Heads: from the features of an instance to its logits, one per class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_ops import prior_bias
from sgl_ops.pooling import AttentionPooling, TopKPooling, make_pooling

HEADS = ("linear", "mlp", "attention", "gated")


class Head(nn.Module):
    """Instance logits (L, C) of features (L, D): a linear layer, or two with a ReLU between.

    Args:
        features: D.
        classes: C.
        hidden: width H of the hidden layer; 0 = a linear head.
        dropout: dropout probability of the hidden layer.
    """

    def __init__(self, features: int, classes: int, hidden: int, dropout: float):
        super().__init__()
        self.first = nn.Linear(features, hidden or classes)
        self.last = nn.Linear(hidden, classes) if hidden else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, C), and the input of attention: the hidden layer (L, H), or the features (L, D)."""
        out = self.first(x)
        if self.last is None:
            return out, x
        hidden = F.dropout(F.relu(out), self.dropout, self.training)
        return self.last(hidden), hidden

    @torch.no_grad()
    def start(self, labels: Tensor, share: float) -> None:
        """The bias of the last layer from the labels (N, C) of the training bags: see :func:`sgl_ops.prior_bias`."""
        (self.last or self.first).bias.copy_(prior_bias(labels, share=share))


class Candidates(nn.Module):
    """R heads that are computed together: logits (L, R C) of features (L, D), head after head.

    They share one matrix product. The bag loss treats them as separate classes, so they do not influence each other.
    """

    def __init__(self, heads: list[Head]):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.cat([getattr(head.first, name) for head in heads]).detach().clone())
            for name in ("weight", "bias")
        )
        self.lasts = nn.ModuleList(head.last for head in heads if head.last is not None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if not self.lasts:
            return out
        parts = F.relu(out).chunk(len(self.lasts), 1)
        return torch.cat([last(part) for last, part in zip(self.lasts, parts, strict=True)], 1)

    @torch.no_grad()
    def copy_to(self, head: Head, number: int) -> None:
        """Copies the weights of candidate ``number`` to ``head``."""
        rows = slice(number * len(head.first.bias), (number + 1) * len(head.first.bias))
        head.first.weight.copy_(self.weight[rows])
        head.first.bias.copy_(self.bias[rows])
        if head.last is not None:
            head.last.load_state_dict(self.lasts[number].state_dict())


def make_head_pooling(head: str, pooling: str, k: float, width: int) -> nn.Module:
    """The pooling of a head: attention for the heads ``attention`` and ``gated``, otherwise ``pooling``.

    Args:
        k: k of ``topk``: a number of instances, or a fraction of the bag if below 1.
        width: width of the input of attention.
    """
    if head in ("attention", "gated"):
        return AttentionPooling(width, gated=head == "gated")
    if pooling == "topk":
        return TopKPooling(k if k < 1 else int(k))
    return make_pooling(pooling)
