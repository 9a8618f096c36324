"""Checks a data set: lists its tables, splits and counts, and finds missing or broken images.

    python check_cxr.py --data-dir DIR                    tables, splits, counts; up to 2000 images are decoded
    python check_cxr.py --data-dir DIR --decode           the same, and every image is decoded
    python check_cxr.py --data-dir DIR --tables OTHER     resized copies, with the tables elsewhere

If there are more images, the check reads the first and last bytes of every file, and decodes a sample. The last line
begins with "ok" or with "wrong". The line "wrong" lists the errors. The line "ok" has the number of decoded images if
some were not decoded.

Exit status: 0 if training may start; 1 if images are missing or broken, or if images outside the test part are
constant; 2 if the tables or the folder cannot be used.
"""

from __future__ import annotations

import argparse
import sys

from common.options import make_parser, next_step
from images.options import add_data_options, given_data_options

#: With fewer images for training, pretrained features with a small head are better than training a network.
FEW_IMAGES = 1000
#: The first command of docs/own-features.md.
FIRST_STEP = "python extract_features.py --backbone timm/tf_efficientnet_lite0 --list-stages"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_options(parser, required=True)
    add = parser.add_argument_group("check").add_argument
    add("--list-missing", action="store_true", help="list all missing images")
    add("--decode", action="store_true", help="decode every image")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from images.check import ADVICE, CHECKED, inspect

    try:
        found = inspect(args, None if args.decode else CHECKED)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if args.tables is None and args.data_dir.is_dir() and not list(args.data_dir.glob("*.csv")):
            print(
                f"{args.data_dir} contains no table (*.csv); give the folder of the tables with --tables",
                file=sys.stderr,
            )
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(found.report)
    if args.list_missing:
        print("\nmissing:", *found.index.missing, sep="\n")
    missing = bool(found.index.missing) and not args.allow_missing
    wrong = [f"{len(found.broken)} images cannot be read"] if found.broken else []
    if missing:
        count = len(found.index.missing)
        wrong.append(f"{count} images are missing (--allow-missing, here and in train_cxr.py, leaves them out)")
    if found.index.test.all():
        wrong.append("there is no image to train on")
    if found.constant:
        wrong.append(f"{len(found.constant)} images outside the test part are constant")
    if wrong:
        print(f"\nwrong: {'; '.join(wrong)}")
        if found.broken:
            print(ADVICE)
        return 1
    images, train = found.index, f"python train_cxr.py {given_data_options(args)} --out RUN"
    if images.about.kind == "folder" and (~images.test).sum() < FEW_IMAGES:
        next_step(
            f"with fewer than {FEW_IMAGES} images for training, use pretrained features (docs/own-features.md, first "
            f"{FIRST_STEP}); to train the whole network: {train}"
        )
    else:
        next_step(train)
    count = len(found.index.paths)
    print("ok" if found.decoded == count else f"ok: {found.decoded} of {count} images decoded; --decode decodes all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
