"""CIFAR10-Bags: a network that is told only "this bag contains a dog" learns which of the pictures are the dogs.

    python train_cifar10_bags.py --data-dir DIR                            SGL beside max pooling, five runs of each
    python train_cifar10_bags.py --data FILE.npz --positives 10 --bag-size 100 --loss sgl
    python train_cifar10_bags.py --data digits --bags 40 --epochs 2 --runs 1    what it does, in minutes, on a CPU

Meant for a GPU: 50 epochs of 2500 bags of 50 are 6 million pictures through a ResNet-18. --stem imagenet takes a
fifth to an eighth of the time on a CPU, with a quarter of the resolution in each direction.

Writes into --out metrics.json, history.csv, bags.png and a checkpoint per seed; without --loss into a folder for SGL
and one for max pooling, with comparison.png beside them.
"""

from __future__ import annotations

import argparse
import sys

import torch
from bags import experiment
from bags.experiment import COMMON, DECISIVE, check, make_parser, run
from common.choices import Config
from common.import_torchvision import import_torchvision
from torch import Tensor, nn


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with one logit per image (n, channels, 32, 32), trained from nothing.

    ``stem="cifar"``: a 3x3 convolution of stride 1 in place of the 7x7 of stride 2 and its pooling, which leave of
    32x32 only 8x8; ``"imagenet"``: as it is. ``bf16``: the network under autocast; the logits are float32.
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


def make_model(config: Config, channels: int) -> ResNet18:
    return ResNet18(channels, config["stem"], config["bf16"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        **COMMON,
        data="cifar10",
        target=5,
        positives=5,
        bags=2500,
        val_bags=500,
        test_bags=5000,
        epochs=50,
        lr=1e-4,
        runs=5,
    )
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers (cifar)")
    parser.add_argument("--bf16", action="store_true", help="the network in bfloat16 where autocast allows it")
    return check(parser, parser.parse_args(argv))


def configs_of(args: argparse.Namespace) -> dict[str, Config]:
    return experiment.configs_of(args, (*DECISIVE, "stem", "bf16"))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run("cifar10_bags", args, configs_of(args), make_model)


if __name__ == "__main__":
    sys.exit(main())
