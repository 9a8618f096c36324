"""MNIST-Bags: a network that is told only "this bag contains a 9" learns which of the digits are the 9s.

    python train_mnist_bags.py                                    the demonstration: SGL and max pooling, three seeds
                                                                  each, on scikit-learn's digits; less than a minute
    python train_mnist_bags.py --data mnist --data-dir DIR        the same on MNIST, 300 epochs
    python train_mnist_bags.py --data mnist --data-dir DIR --loss bil --pooling mean_logits --runs 3

Writes into --out metrics.json, history.csv, bags.png and a checkpoint per seed; without --loss into a folder for SGL
and one for max pooling, with comparison.png beside them.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from bags.experiment import COMMON, check, configs_of, make_parser, run
from common.choices import Config
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 on 32x32 with two parallel second layers whose outputs are added; a logit per image."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 5)
        self.left = nn.Conv2d(6, 16, 5)
        self.right = nn.Conv2d(6, 16, 5)
        # the third convolution leaves one pixel: a matrix product
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 1)
        )
        # this, and the two second layers as one convolution, make it half as fast again on a CPU
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(self.first(x))
        weight = torch.cat((self.left.weight, self.right.weight))
        left, right = pooled(F.conv2d(x, weight, torch.cat((self.left.bias, self.right.bias)))).chunk(2, 1)
        return self.head(left + right)


def pooled(x: Tensor) -> Tensor:
    """ReLU and 2x2 max pooling, in the order that leaves the ReLU a quarter of the work."""
    return F.relu(F.max_pool2d(x, 2))


def make_model(config: Config, channels: int) -> LeNet:
    return LeNet(channels)


#: The defaults of the demonstration on scikit-learn's digits: three seeds of two losses in less than a minute.
DEMO = {"bags": 50, "val_bags": 20, "test_bags": 300, "epochs": 15, "batch_size": 10, "lr": 2e-3, "runs": 3}
#: The paper's settings, for every other data set.
PAPER = {"bags": 100, "val_bags": 100, "test_bags": 1000, "epochs": 300, "batch_size": 64, "lr": 1e-4, "runs": 1}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    common = {name: value for name, value in COMMON.items() if name not in PAPER}
    hints = {name: f"digits: {DEMO[name]}, other data: {PAPER[name]}" for name in PAPER}
    parser = make_parser(__doc__, hints, **common, data="digits", target=9, positives=0)
    args = parser.parse_args(argv)
    for name, value in (DEMO if args.data == "digits" else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return check(parser, args)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run("mnist_bags", args, configs_of(args), make_model)


if __name__ == "__main__":
    sys.exit(main())
