"""From an image classifier to bounding boxes: the recipe of docs/recipe.md as a script.

    python recipe.py                                            generated images, half a minute on one core
    python recipe.py --backbone timm/resnet18 --weights FILE    another network of timm, with weights of a file
    python recipe.py --backbone torchvision/resnet18 --cut -1   a whole network of torchvision

The script trains a classifier with one label per image. It makes the classifier fully convolutional, which does not
change its output. Then it continues the training with SGLLoss, and measures the boxes before and after. The boxes are
used for measuring only.
The steps are functions of images/recipe_steps.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.options import exit_status, make_parser, next_step


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--backbone",
        default="timm/test_resnet",
        metavar="NAME",
        help="timm/NAME or torchvision/NAME (timm/test_resnet)",
    )
    network.add_argument("--weights", type=Path, metavar="FILE", help="a state dict; default: random weights")
    network.add_argument(
        "--cut",
        type=int,
        default=0,
        metavar="STAGE",
        help="use the network up to this stage; -1: the whole network (0)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--images", type=int, default=200, metavar="N", help="training images to generate (200)")
    training.add_argument(
        "--epochs", type=int, default=6, help="epochs of the classifier; SGLLoss trains for twice as many (6)"
    )
    training.add_argument(
        "--lam", type=float, default=1.0, help="lam of SGLLoss; 0: the bag loss alone, for comparison (1)"
    )
    training.add_argument("--seed", type=int, default=0, help="seed of images and weights (0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from images.recipe_steps import run

    def run_and_advise() -> None:
        run(args)
        next_step("python recipe.py --lam 0, the bag loss alone on the same images; docs/recipe.md explains each step")

    return exit_status(run_and_advise, "stopped")


if __name__ == "__main__":
    sys.exit(main())
