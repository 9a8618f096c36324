"""MNIST-Bags: from labels such as "this bag contains a 9", a network learns which digits are nines.

    python train_mnist_bags.py                                    the demonstration: SGL and max pooling, three seeds
                                                                  each, on scikit-learn's digits; 18 s on two idle cores
    python train_mnist_bags.py --data mnist --data-dir DIR        the same on MNIST, 300 epochs
    python train_mnist_bags.py --data mnist --data-dir DIR --loss bil --pooling mean_logits --runs 3

Writes metrics.json, history.csv, bags.png and a checkpoint per seed into --out. Without --loss, SGL and max pooling
each get a folder in --out, and comparison.png shows both.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from bags.options import COMMON, check, configs_of, make_parser

if TYPE_CHECKING:  # torch is imported after the options are read: --help is fast
    from bags.networks import LeNet
    from common.choices import Config


def make_model(config: Config, channels: int) -> LeNet:
    from bags.networks import LeNet

    return LeNet(channels)


#: The defaults of the demonstration on scikit-learn's digits.
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
    from bags.experiment import run

    return run("mnist_bags", args, configs_of(args), make_model)


if __name__ == "__main__":
    sys.exit(main())
