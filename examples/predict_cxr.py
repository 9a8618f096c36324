"""Applies trained networks to images without labels: probabilities, boxes, and a report with maps.

    python predict_cxr.py --run RUN --images NEW --out OUT
    python predict_cxr.py --run RUN_0 RUN_1 RUN_2 --images NEW --out OUT    the mean of three networks
    python predict_cxr.py --run RUN --images NEW --out OUT --like REPORT    the thresholds of an evaluation
    python predict_cxr.py --run RUN --images NEW --out OUT --maps           the maps as files

--run is a folder of train_cxr.py. Its settings determine how an image is prepared. With several runs, the probabilities
of the images, and those of each cell of their maps, are averaged. --images is a folder of images, with or without
subfolders. It needs no tables. Images that cannot be read are left out.

A map becomes boxes as in localize_cxr.py. Here every component above T_p gives a box, if the class is predicted
(--gate). --like takes the options from maps to boxes, the thresholds of each class and the checkpoint from a report of
localize_cxr.py. Options of the command have priority over it.

Writes into --out predictions.csv (one row per image), boxes.csv (one row per predicted box, in pixels of the image) and
report.html (for each class, the images with the highest probability).

Exit status: 0 if all images are predicted; 1 if some cannot be read; 2 if there is an error.
"""

from __future__ import annotations

import argparse
import sys
import time

from common.options import exit_status, make_parser, next_step, path_of, warn_of_unreadable
from images.run_options import add_box_options, add_network_options, check, settings_of_report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--images", type=path_of, required=True, metavar="DIR", help="folder of images, with or without subfolders")
    add_network_options(parser, "a run folder of train_cxr.py, or several, whose probabilities are averaged")
    add_box_options(parser, labels=False)
    parser.add_argument_group("evaluation").add_argument(
        "--like", type=path_of, metavar="REPORT", help="folder of localize_cxr.py with the thresholds and other options"
    )
    add = parser.add_argument_group("results").add_argument
    add("--out", type=path_of, required=True, help="folder of the results")
    add("--maps", action="store_true", help="also write the maps of each image: OUT/maps/IMAGE.npz")
    add("--gallery", type=int, default=12, help="images of each class in the report; 0: no pictures (12)")
    add("--gallery-size", type=int, default=320, help="side of the images in the report, in pixels (320)")
    args = parser.parse_args(argv)
    if args.like is not None:
        try:
            parser.set_defaults(**settings_of_report(args.like))
        except ValueError as error:
            parser.error(f"--like: {error}")
        args = parser.parse_args(argv)
    check(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    problems: list[str] = []
    return exit_status(lambda: problems.extend(predict(args))) or int(bool(problems))


def predict(args: argparse.Namespace) -> list[str]:
    """Predicts the images and writes the results.

    Returns:
        A message for each image that cannot be read.

    Raises:
        ValueError: a run cannot be used, the runs do not match, or no image can be read.
        OSError: a file cannot be written.
    """
    from images.folder import without_labels
    from images.new_images import open_ensemble, warn_of_others, write_predictions
    from images.new_report import write_report

    networks = open_ensemble(args.run, args)
    if args.like is not None:
        warn_of_others(args.like, args.run, networks)
    index = without_labels(args.images, networks[0].config)
    # fail before the networks run if the folder cannot be written
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(index.names)} images in {args.images}", flush=True)
    begun = time.time()
    results = write_predictions(networks, index, args, args.out)
    # a file system may round the time of a file down
    older = sum(path.stat().st_mtime < begun - 2 for path in (args.out / "maps").rglob("*.npz"))
    if older:
        print(f"note: {args.out / 'maps'} also holds maps of an earlier call (files: {older})", flush=True)
    write_report(networks, index, results, args, args.out / "report.html")
    width = max(20, *(len(name) + 2 for name in index.classes))
    print(f"\n{'':{width}}{'images with p > gate':>21}{'boxes':>10}")
    for name, images, boxes in zip(index.classes, results.predicted, results.boxes, strict=True):
        print(f"{name:{width}}{images:>21}{boxes:>10}")
    warn_of_unreadable(results.problems)
    next_step(f"open {args.out / 'report.html'} in a browser")
    return results.problems


if __name__ == "__main__":
    sys.exit(main())
