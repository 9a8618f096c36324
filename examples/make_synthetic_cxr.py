"""Generates a data set in the layout and file formats of NIH ChestX-ray14, to try the commands without the real data.

    python make_synthetic_cxr.py --out DIR                                 images of 1024x1024 pixels, as the real ones
    python make_synthetic_cxr.py --out DIR --images 3000 --size 128        small images; boxes in 1024x1024 pixels

images/synthetic.py describes the images.
"""

from __future__ import annotations

import argparse
import sys

from common.options import exit_status, make_parser, next_step, path_of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from images.nih import CLASSES

    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--out", type=path_of, required=True, help="an empty or new folder")
    add("--layout", choices=("twelve", "one", "flat"), default="twelve", help="layout of the folders (twelve)")
    add("--workers", type=int, default=1, help="number of threads (1)")
    add = parser.add_argument_group("images").add_argument
    add(
        "--images",
        type=int,
        default=2000,
        help="number of images, rounded up to whole patients by at most seven (2000)",
    )
    add("--size", type=int, default=1024, help="width and height of the images in pixels (1024)")
    add("--seed", type=int, default=0, help="seed of the data set (0)")
    add("--findings", nargs="+", choices=CLASSES, default=CLASSES, help="findings to draw (all 14)")
    add("--rate", type=float, default=1.0, help="factor of the frequency of the findings (1)")
    args = parser.parse_args(argv)
    if args.images < 1 or args.size < 32 or args.workers < 1 or args.seed < 0 or not args.rate > 0:
        parser.error("--images, --workers: at least 1; --size: at least 32; --seed: at least 0; --rate: more than 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: make(args), f"stopped; {args.out} contains an incomplete data set. Remove it")


def make(args: argparse.Namespace) -> None:
    """Writes the data set."""
    from images.synthetic_set import write_dataset

    plans = write_dataset(
        args.out, args.images, args.size, args.seed, args.layout, args.workers, args.findings, args.rate
    )
    print(f"{len(plans)} images of {plans[-1].patient} patients are in {args.out}")
    next_step(f"python check_cxr.py --data-dir {args.out}")


if __name__ == "__main__":
    sys.exit(main())
