"""Draws a data set in the layout and the file formats of NIH ChestX-ray14, so that everything runs without it.

    python make_synthetic_cxr.py --out DIR                                 1024x1024, as the genuine ones
    python make_synthetic_cxr.py --out DIR --images 3000 --size 128        small copies, boxes still in 1024 pixels

What is drawn, and why, is in images/synthetic.py.
"""

from __future__ import annotations

import argparse
import sys

from common.options import path_of
from images.nih import BOX_SIDE, CLASSES
from images.synthetic_set import write_dataset


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_of, required=True, help="an empty folder, or one to make")
    parser.add_argument("--images", type=int, default=2000, help="how many, or up to seven more (2000)")
    parser.add_argument("--size", type=int, default=BOX_SIDE, help="width and height of the images (1024)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws another data set (0)")
    parser.add_argument("--layout", choices=("twelve", "one", "flat"), default="twelve", help="of the folders (twelve)")
    parser.add_argument("--workers", type=int, default=1, help="threads (1)")
    parser.add_argument("--findings", nargs="+", choices=CLASSES, default=CLASSES, help="draw only these (all 14)")
    parser.add_argument("--rate", type=float, default=1.0, help="how often, of what is usual (1)")
    args = parser.parse_args(argv)
    if args.images < 1 or args.size < 32 or args.workers < 1 or args.seed < 0 or not args.rate > 0:
        parser.error("--images, --workers: at least 1; --size: at least 32; --seed: at least 0; --rate: more than 0")
    try:
        plans = write_dataset(
            args.out, args.images, args.size, args.seed, args.layout, args.workers, args.findings, args.rate
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; {args.out} holds a part of a data set, and has to be removed", file=sys.stderr)
        return 130
    print(f"{len(plans)} images of {plans[-1].patient} patients are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
