"""sgl-ops: the Self-Guiding Loss for multiple instance learning, as a fast and exact PyTorch loss.

>>> import torch
>>> from sgl_ops import SGLLoss
>>> criterion = SGLLoss()
>>> logits = torch.randn(4, 14, 16, 16, requires_grad=True)    # a map of patch logits per class
>>> labels = torch.randint(0, 2, (4, 14))                      # one label per image and class
>>> criterion(logits, labels).backward()
"""

from importlib.metadata import PackageNotFoundError, version

from . import functional, pooling, reference
from .diagnosis import Diagnosis, diagnose
from .functional import SelfGuidance, SGLTerms
from .losses import BagLoss, BILLoss, MMMLoss, SGLLoss
from .schedule import LamSchedule, TopKSchedule, prior_bias
from .settings import SGLSettings

__all__ = [
    "BILLoss",
    "BagLoss",
    "Diagnosis",
    "LamSchedule",
    "MMMLoss",
    "SGLLoss",
    "SGLSettings",
    "SGLTerms",
    "SelfGuidance",
    "TopKSchedule",
    "diagnose",
    "functional",
    "pooling",
    "prior_bias",
    "reference",
]

try:
    __version__ = version("sgl-ops")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"
