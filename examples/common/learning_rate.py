"""The learning rate of a step."""

from __future__ import annotations

import math

from torch.optim import Optimizer


def set_cosine_rate(optimizer: Optimizer, lr: float, step: int, steps: int) -> None:
    """Sets the learning rate of step ``step`` (0 ... ``steps`` - 1): lr/2 (1 + cos(pi step / steps))."""
    for group in optimizer.param_groups:
        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
