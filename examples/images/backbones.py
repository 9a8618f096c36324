"""Names of networks, and the strides of their maps. Nothing here imports torch."""

from __future__ import annotations

#: The local networks, by receptive field: the number of blocks with a 3x3 convolution in each of the four stages.
THREES = {9: (1, 1, 0, 0), 17: (1, 1, 1, 0), 33: (1, 1, 1, 1), 65: (1, 1, 2, 2)}

TORCHVISION = ("resnet18", "resnet50", "densenet121")

BACKBONES = (*TORCHVISION, *(f"{kind}{field}" for kind in ("local", "bagnet") for field in THREES))

STRIDES = (32, 16, 8)
