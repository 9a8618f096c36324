"""The networks of the two experiments: one logit per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common.import_torchvision import import_torchvision
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 for 32x32 pixels with two parallel second layers, whose outputs are added: one logit per image."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 5)
        self.left = nn.Conv2d(6, 16, 5)
        self.right = nn.Conv2d(6, 16, 5)
        # a convolution over all remaining pixels, written as a matrix product
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 1)
        )
        # channels_last, and one convolution for both second layers, make the network 1.5 times as fast on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(self.first(x))
        weight = torch.cat((self.left.weight, self.right.weight))
        left, right = pooled(F.conv2d(x, weight, torch.cat((self.left.bias, self.right.bias)))).chunk(2, 1)
        return self.head(left + right)


def pooled(x: Tensor) -> Tensor:
    """2x2 max pooling, then ReLU. In this order, the ReLU processes a quarter of the values."""
    return F.relu(F.max_pool2d(x, 2))


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with one logit per image (n, channels, 32, 32) and random initial weights.

    ``stem="imagenet"`` keeps the first layers of torchvision, which reduce 32x32 pixels to 8x8. ``stem="cifar"``
    replaces them by a 3x3 convolution of stride 1. ``bf16`` runs the network under autocast; the logits are float32.
    """

    def __init__(self, channels: int = 3, stem: str = "cifar", bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        import_torchvision()
        from torchvision.models import resnet18

        self.network = resnet18(num_classes=1)
        if stem == "cifar":
            self.network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            self.network.maxpool = nn.Identity()
        elif channels != 3:
            self.network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x.contiguous(memory_format=torch.channels_last)).float()
