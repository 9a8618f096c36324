"""Names that options choose from. Nothing here imports torch, so that ``--help`` is fast."""

from __future__ import annotations

from typing import Any

#: The settings that decide a result, as a flat dict.
Config = dict[str, Any]

LOSSES = ("sgl", "bag", "bil", "mmm")
#: The names of ``sgl_ops.pooling.POOLINGS``, in the same order.
POOLINGS = (
    "max", "mean", "mean_logits", "softmax", "linear_softmax", "topk", "lse", "noisy_or", "generalized_mean",
)  # fmt: skip
#: The names of ``sgl_ops.localization.UPSAMPLING``, in the same order.
UPSAMPLING = ("nearest", "bilinear")
