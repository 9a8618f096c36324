"""Control experiment: the losses MMM and BIL as the authors' published code computes them.

These are not the formulas of the paper. In that code, the instances of a batch have the shape (N, L, 1, 1), and the
labels have the shape (N,). Their product has the shape (N, L, 1, N): every bag is combined with the labels of all bags.
The loss is linear in its target. So the mean over the last axis equals the loss with the mean label of the batch.
For the formulas use :class:`sgl_ops.MMMLoss` and :class:`sgl_ops.BILLoss`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgl_ops.pooling import make_pooling


def bce(p: Tensor, target: Tensor | float) -> Tensor:
    """Binary cross-entropy of probabilities. The 1e-8 limits it to 18.4."""
    return -(target * torch.log(p + 1e-8) + (1 - target) * torch.log(1 - p + 1e-8))


class AuthorsMMM(nn.Module):
    """The target of the mean term is half the mean label of the batch instead of half the label of the bag.

    Takes logits (T,), labels (N,) of 0 and 1, and offsets (N + 1,); returns a scalar.
    """

    def forward(self, logits: Tensor, labels: Tensor, *, offsets: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        largest, least, mean = (torch.segment_reduce(p, kind, offsets=offsets) for kind in ("max", "min", "mean"))
        return (bce(largest, labels) + bce(least, 0.0) + bce(mean, labels.mean() / 2)).mean() / 3


class AuthorsBIL(nn.Module):
    """The pseudo-labels are multiplied by the mean label of the batch instead of the label of the bag.

    Takes logits (T,), labels (N,) of 0 and 1, and offsets (N + 1,); returns a scalar. The pooling is the mean of the
    logits.
    """

    def forward(self, logits: Tensor, labels: Tensor, *, offsets: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        pseudo_labels = (p > 0.5).to(p.dtype) * labels.mean()
        instance = torch.segment_reduce(bce(p, pseudo_labels), "mean", offsets=offsets)
        bag = bce(torch.sigmoid(make_pooling("mean_logits")(logits, offsets=offsets)), labels)
        return torch.where(labels == 1, bag + (bag.detach() - instance) ** 2, instance).mean()


AUTHORS_LOSSES = {"mmm_authors": AuthorsMMM, "bil_authors": AuthorsBIL}
