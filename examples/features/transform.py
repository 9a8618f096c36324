"""The transform of the features before a head: standardization, and principal components."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """``(x - mean) @ weight`` for features x (L, D), with ``mean`` (D,) and ``weight`` (D, K)."""

    mean: Tensor
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.weight if self.weight.shape[0] > 1 else (x - self.mean) * self.weight


def fit_transform(bags: Iterable[Tensor], components: int) -> Transform:
    """Fits the transform on all instances of ``bags`` (L_i, D), in one pass: standardization and principal components.

    Every feature is standardized. With ``components`` K > 0, the result is the first K principal components of the
    standardized features, each divided by its standard deviation.

    Raises:
        ValueError: there are no instances, or more components than features.
    """
    count = 0
    total = products = torch.zeros((), dtype=torch.float64)
    origin = None
    for x in bags:
        if not len(x):
            continue
        origin = x.mean(0) if origin is None else origin  # near the mean, for precise products
        x = x - origin
        count += len(x)
        total = total + x.sum(0).double()
        products = products + (x.T @ x if components else x.square().sum(0)).double()
    if origin is None:
        raise ValueError("features: the training bags hold no instances")
    if components > len(origin):
        raise ValueError(f"components: expected at most the {len(origin)} features, got {components}")
    shift = total / count
    if not components:
        std = (products / count - shift.square()).clamp(min=1e-8).sqrt()
        return Transform(origin + shift.float(), (1 / std).float().unsqueeze(0))
    covariance = products / count - shift.outer(shift)
    std = covariance.diagonal().clamp(min=1e-8).sqrt()
    values, vectors = torch.linalg.eigh(covariance / std.outer(std))
    vectors = (vectors / values.clamp(min=1e-6).sqrt())[:, -components:].flip(1) / std.unsqueeze(1)
    return Transform(origin + shift.float(), vectors.float())
