"""CIFAR10-Bags: from labels such as "this bag contains a dog", a network learns which pictures are dogs.

    python train_cifar10_bags.py --data-dir DIR                            SGL and max pooling, five runs of each
    python train_cifar10_bags.py --data FILE.npz --positives 10 --bag-size 100 --loss sgl
    python train_cifar10_bags.py --data digits --bags 40 --epochs 2 --runs 1    a demonstration on a CPU, in minutes

This needs a GPU: 50 epochs of 2500 bags of 50 are 6 million pictures through a ResNet-18. On a CPU, --stem imagenet
takes a fifth to an eighth of the time, with a quarter of the resolution in each direction.

Writes metrics.json, history.csv, bags.png and a checkpoint per seed into --out. Without --loss, SGL and max pooling
each get a folder in --out, and comparison.png shows both.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from bags import options
from bags.options import COMMON, RESUME_KEYS, check, make_parser

if TYPE_CHECKING:  # torch is imported after the options are read: --help is fast
    from bags.networks import ResNet18
    from common.choices import Config


def make_model(config: Config, channels: int) -> ResNet18:
    from bags.networks import ResNet18

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
    add = parser.add_argument_group("network").add_argument
    add("--stem", choices=("cifar", "imagenet"), default="cifar", help="first layers of the ResNet (cifar)")
    add("--bf16", action="store_true", help="run the network under bfloat16 autocast")
    return check(parser, parser.parse_args(argv))


def configs_of(args: argparse.Namespace) -> dict[str, Config]:
    return options.configs_of(args, (*RESUME_KEYS, "stem", "bf16"))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from bags.experiment import run

    return run("cifar10_bags", args, configs_of(args), make_model)


if __name__ == "__main__":
    sys.exit(main())
