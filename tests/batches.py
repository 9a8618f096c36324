"""Batches of bags of unequal size, in every layout and on every device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgl_ops import _fused
from sgl_ops.pooling import GeneralizedMeanPooling


class Batch(NamedTuple):
    """``logits[i]`` (C, L_i) float64 of bag i and ``labels`` (N, C) float64 with NaN for unknown, on the CPU."""

    logits: list[Tensor]
    labels: Tensor

    @property
    def as_lists(self) -> tuple[list, list]:
        """(logits, labels) as the oracle takes them: lists of numbers, None for an unknown label."""
        labels = [[None if math.isnan(y) else int(y) for y in row] for row in self.labels.tolist()]
        return [bag.tolist() for bag in self.logits], labels

    def to(self, dtype: torch.dtype) -> Batch:
        """Rounded to ``dtype``, still held in float64."""
        return Batch([bag.to(dtype).double() for bag in self.logits], self.labels)


def random_batch(sizes, classes=2, *, scale=2.0, shift=0.0, positives=0.5, unknown=0.0, seed=0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(classes, size, generator=g, dtype=torch.float64) * scale + shift for size in sizes]
    labels = (torch.rand(len(sizes), classes, generator=g) < positives).double()
    labels[torch.rand(len(sizes), classes, generator=g) < unknown] = math.nan
    return Batch(logits, labels)


def near_threshold(batch: Batch, delta_l: float, rescale: bool = True) -> bool:
    """Whether rounding decides on which side of a threshold a theta lies. The loss is discontinuous there."""
    for bag in batch.logits:
        if bag.shape[1] == 0:
            continue
        p = torch.sigmoid(bag)
        low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
        theta = (p - low) / (high - low).clamp(min=1e-300) if rescale else p
        inner = (bag != bag.amin(1, keepdim=True)) & (bag != bag.amax(1, keepdim=True)) if rescale else True
        for delta in (delta_l, 1 - delta_l):
            if (((theta - delta).abs() < 1e-5) & inner).any():
                return True
    return False


def settled(logits: Tensor, delta_l: float = 0.3) -> Tensor:
    """Dense logits (…, L) with no theta close to a threshold: such an instance is set to the smallest logit."""
    p = torch.sigmoid(logits.double())
    low, high = p.amin(-1, keepdim=True), p.amax(-1, keepdim=True)
    theta = (p - low) / (high - low)  # NaN if all logits are equal; those stay unchanged
    near = ((theta - delta_l).abs() < 1e-4) | ((theta - (1 - delta_l)).abs() < 1e-4)
    return torch.where(near, logits.amin(-1, keepdim=True), logits)


def padded(batch: Batch, device: torch.device, dtype=torch.float64, padding=math.nan) -> tuple[Tensor, dict]:
    """(N, C, L) with a mask; padding positions hold ``padding``. Instances lie at random positions of the bag."""
    longest = max(bag.shape[1] for bag in batch.logits) + 2
    logits = torch.full((len(batch.logits), batch.labels.shape[1], longest), padding, dtype=dtype)
    mask = torch.zeros(len(batch.logits), longest, dtype=torch.bool)
    g = torch.Generator().manual_seed(1)
    for i, bag in enumerate(batch.logits):
        where = torch.randperm(longest, generator=g)[: bag.shape[1]].sort().values
        logits[i, :, where] = bag.to(dtype)
        mask[i, where] = True
    return logits.to(device), {"mask": mask.to(device)}


def packed(batch: Batch, device: torch.device, dtype=torch.float64) -> tuple[Tensor, dict]:
    sizes = torch.tensor([0] + [bag.shape[1] for bag in batch.logits])
    rows = torch.cat([bag.T for bag in batch.logits]).to(dtype).contiguous()
    return rows.to(device), {"offsets": sizes.cumsum(0).to(device)}


def bags_of(gradient: Tensor, call: dict) -> list[Tensor]:
    """The gradient (C, L_i) of each bag, from a gradient in the layout of padded() or packed()."""
    if "offsets" in call:
        return [part.T for part in gradient.tensor_split(call["offsets"][1:-1].cpu())]
    return [gradient[i][:, call["mask"][i]] for i in range(len(gradient))]


def run(loss, batch: Batch, device: torch.device, make=packed, dtype=torch.float64, grad_output=1.0, **call):
    """(value, list of gradients, one per bag) of a loss computed on ``device``. The results are on the CPU."""
    logits, layout = make(batch, device, dtype)
    logits.requires_grad_()
    value = loss(logits, batch.labels.to(device), **layout, **call)
    (value * grad_output).backward()
    return value.detach().cpu(), [g.double().cpu() for g in bags_of(logits.grad, layout)]


class ExternalPooling(GeneralizedMeanPooling):
    """A pooling without a kernel: the operators do not accept subclasses, because these may compute anything."""

    def __init__(self) -> None:
        super().__init__(2.0)


def external_pooling() -> ExternalPooling:
    pooling = ExternalPooling()
    assert _fused.code_of(pooling)[0] == _fused.EXTERNAL
    assert _fused.code_of(GeneralizedMeanPooling(2.0))[0] != _fused.EXTERNAL or not _fused.DEVICES
    return pooling
