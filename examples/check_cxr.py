"""What there is of NIH ChestX-ray14 in a folder, and what is not, in seconds.

    python check_cxr.py --data-dir DIR                    tables, splits, counts, and that the files look whole
    python check_cxr.py --data-dir DIR --decode           the same, and every image is decoded
    python check_cxr.py --data-dir DIR --tables OTHER     resized copies, with the tables elsewhere

Exit status: 0, training may start; 1, images are missing or broken; 2, the tables or the folder cannot be used.
"""

from __future__ import annotations

import argparse
import sys

from common.options import path_of
from images.check import inspect


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=path_of, required=True, help="folder with the images, and the tables")
    parser.add_argument("--tables", type=path_of, help="folder with the tables, where they are elsewhere")
    parser.add_argument("--allow-missing", action="store_true", help="images that are not there are no fault")
    parser.add_argument("--list-missing", action="store_true", help="name them all")
    parser.add_argument("--decode", action="store_true", help="decode every image, not some")
    args = parser.parse_args(argv)
    try:
        found = inspect(args.data_dir, args.tables, args.decode)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(found.report)
    if args.list_missing:
        print("\nmissing:", *found.index.missing, sep="\n")
    missing = bool(found.index.missing) and not args.allow_missing
    if missing:
        print("\nimages are missing; --allow-missing, of this command and of train_cxr.py, goes on without them")
    return int(missing or bool(found.broken))


if __name__ == "__main__":
    sys.exit(main())
