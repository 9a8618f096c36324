"""What there is of a data set in a folder, and what is not, in seconds.

    python check_cxr.py --data-dir DIR                    tables, splits, counts, and that the files look whole
    python check_cxr.py --data-dir DIR --decode           the same, and every image is decoded
    python check_cxr.py --data-dir DIR --tables OTHER     resized copies, with the tables elsewhere

The last line is "ok", or says what is wrong.

Exit status: 0, training may start; 1, images are missing or broken, or of one value only and not in the test part; 2,
the tables or the folder cannot be used.
"""

from __future__ import annotations

import argparse
import sys

from common.options import make_parser, next_step
from images.options import add_data_options, given_data_options


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_data_options(parser, required=True)
    add = parser.add_argument_group("check").add_argument
    add("--list-missing", action="store_true", help="name all images that are not there")
    add("--decode", action="store_true", help="decode every image, not some")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from images.check import inspect

    try:
        found = inspect(args, args.decode)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if args.tables is None and args.data_dir.is_dir() and not list(args.data_dir.glob("*.csv")):
            print(f"{args.data_dir} has no table (*.csv): --tables names the folder that has them", file=sys.stderr)
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
    if found.constant:
        wrong.append(f"{len(found.constant)} images outside the test part have one value only")
    if wrong:
        print(f"\nwrong: {'; '.join(wrong)}")
        return 1
    next_step(f"python train_cxr.py {given_data_options(args)} --out RUN")
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
