"""Heads: from the features of an instance to its logits, one per class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_ops import prior_bias
from sgl_ops.pooling import POOLINGS, AttentionPooling, TopKPooling


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


class PatchNetwork(nn.Module):
    """Instance logits (L, C) of square color patches (L, 3 S S): the small network of Ilse et al. (2018).

    Two convolutions with max pooling and two layers of 512 features. In training, all patches of a step are flipped and
    rotated in the same random way. The convolutions process ``GROUP`` patches at once, in channels-last memory. Their
    activations then stay in the cache of a CPU.

    Args:
        features: 3 S S, the number of pixel values of a patch. S is at least 12.
        classes: C.
        dropout: dropout probability after each of the two layers.

    Raises:
        ValueError: ``features`` is not a number of values of a square patch, or the patch is too small.
    """

    WIDTH = 512
    GROUP = 128

    def __init__(self, features: int, classes: int, dropout: float):
        super().__init__()
        self.side = math.isqrt(features // 3)
        if 3 * self.side**2 != features or self.side < 12:
            raise ValueError(
                f"head: patches needs square patches of at least 12 pixels, got {features} features; "
                "extract_features.py --backbone pixels --patch PIXELS writes them"
            )
        cells = ((self.side - 3) // 2 - 2) // 2
        self.dropout = dropout
        # pooling before ReLU, so that the ReLU processes a quarter of the values
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 36, 4), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(36, 48, 3), nn.MaxPool2d(2), nn.ReLU()
        ).to(memory_format=torch.channels_last)
        self.first = nn.Linear(48 * cells**2, self.WIDTH)
        self.second = nn.Linear(self.WIDTH, self.WIDTH)
        self.last = nn.Linear(self.WIDTH, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, C), and the input of attention (L, 512)."""
        patches = x.view(-1, 3, self.side, self.side)
        if self.training:
            turns, flip = (int(torch.randint(n, ())) for n in (4, 2))
            patches = torch.rot90(patches.flip(3) if flip else patches, turns, (2, 3))
        groups = (group.contiguous(memory_format=torch.channels_last) for group in patches.split(self.GROUP))
        out = torch.cat([self.convolutions(group).flatten(1) for group in groups])
        for layer in (self.first, self.second):
            out = F.dropout(F.relu(layer(out)), self.dropout, self.training)
        return self.last(out), out

    @torch.no_grad()
    def start(self, labels: Tensor, share: float) -> None:
        """As :meth:`Head.start`."""
        self.last.bias.copy_(prior_bias(labels, share=share))


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


def make_head_pooling(head: str, pooling: str, k: float, width: int, r: float | None = None) -> nn.Module:
    """The pooling of a head: attention for the heads ``attention`` and ``gated``, otherwise ``pooling``.

    Args:
        k: k of ``topk``: a number of instances, or a fraction of the bag if below 1.
        width: width of the input of attention.
        r: r of ``lse`` and ``generalized_mean``; None: the default of the pooling.
    """
    if head in ("attention", "gated"):
        return AttentionPooling(width, gated=head == "gated")
    if pooling == "topk":
        return TopKPooling(k if k < 1 else int(k))
    return POOLINGS[pooling](**({} if r is None else {"r": r}))
