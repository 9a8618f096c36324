"""SGLLoss by the other kernel, csrc/cuda/exchange.cuh, where the package was built with SGL_OPS_EXCHANGE=1.

Its forward writes the gradient for grad_output = 1, which is wasted where no backward follows, and its backward scales
that gradient in place, so there can be one only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgl_ops import SGLLoss, _fused


def available(logits: Tensor) -> bool:
    return hasattr(torch.ops.sgl_ops, "sgl_exchange") and logits.is_cuda and logits.dtype == torch.float32


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, criterion, ops):
        total, _, ctx.grad = ops.sgl_exchange(
            logits, targets, None, criterion.class_weight, criterion.pos_weight, criterion.delta_l, criterion.lam,
            criterion.mask_weight, *_fused.code_of(criterion.pooling), criterion.normalize == "bag", criterion.rescale,
            criterion.weighted,
        )  # fmt: skip
        ctx.ops = ops
        return total

    @staticmethod
    def backward(ctx, grad_output):
        grad, ctx.grad = ctx.grad, None
        ctx.ops.sgl_scale(grad_output, grad)
        return grad, None, None, None


class ExchangedLoss:
    """The same loss of (logits, targets), dense bags."""

    def __init__(self, criterion: SGLLoss, ops: Any = torch.ops.sgl_ops):
        self.criterion, self.ops = criterion, ops

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return _Exchanged.apply(logits, targets, self.criterion, self.ops)
