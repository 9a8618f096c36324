"""The methods that frozen_cxr.py compares: losses, poolings and their settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """The settings of a method. ``hidden`` 0: a linear head, whose map is the class activation map (CAM)."""

    loss: str
    pooling: str
    lam: float = 0.0
    mask_weight: float = 0.0
    share: float = 0.3  # fraction of positive instances in a positive bag, for the bias of the head
    hidden: int = 64
    weight_decay: float = 1.0
    at_once: bool = False  # lam from the first step on, without LamSchedule
    grad_cam: bool = False  # boxes from Grad-CAM maps of the pooled logit, not from instance probabilities


METHODS = {
    "cam": Method("bag", "mean_logits", share=1.0, hidden=0),
    "mean bag": Method("bag", "mean"),
    "grad-cam": Method("bag", "mean", grad_cam=True),
    "softmax bag": Method("bag", "softmax"),
    "top 30 % bag": Method("bag", "topk"),
    "max bag": Method("bag", "max", share=0.1),
    "attention bag": Method("bag", "attention"),
    "gated bag": Method("bag", "gated"),
    "mean sgl 3 mask 1": Method("sgl", "mean", 3.0, 1.0),
    "softmax sgl 3 mask 1": Method("sgl", "softmax", 3.0, 1.0),
    "attention sgl 3 mask 1": Method("sgl", "attention", 3.0, 1.0),
    "gated sgl 3 mask 1": Method("sgl", "gated", 3.0, 1.0),
    "mean sgl 3": Method("sgl", "mean", 3.0),
    "softmax sgl 0.3": Method("sgl", "softmax", 0.3),
    "softmax sgl 1": Method("sgl", "softmax", 1.0),
    "softmax sgl 1 mask 1": Method("sgl", "softmax", 1.0, 1.0),
    "softmax sgl 3": Method("sgl", "softmax", 3.0),
    "softmax sgl 20": Method("sgl", "softmax", 20.0),
    "softmax sgl 20 at once": Method("sgl", "softmax", 20.0, at_once=True),
    "top 30 % sgl 1": Method("sgl", "topk", 1.0),
    "max sgl 1": Method("sgl", "max", 1.0, share=0.1),
    "max sgl 1 at once": Method("sgl", "max", 1.0, share=0.1, at_once=True),
    "mmm": Method("mmm", "max", share=0.1),
    "bil": Method("bil", "mean"),
}
