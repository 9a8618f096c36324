"""Heads on a frozen network for chest films: does SGL find more boxes than its bag loss, and than CAM?

    python frozen_cxr.py extract --data-dir DIR --weights FILE.safetensors --out FEATURES
    python frozen_cxr.py train --data-dir DIR --tables DIR --det10 chestxdet10.csv --features FEATURES --out RUNS
    python frozen_cxr.py table --runs RUNS --out films.csv
    python frozen_cxr.py compare --runs RUNS --out differences.csv
    python frozen_cxr.py probe --data-dir DIR --tables DIR --features FEATURES --out probe.csv

DIR contains images of ChestX-ray14 of any size. The official tables are in DIR or in --tables. ``extract`` computes the
feature maps once. ``train`` trains every method of --methods with every seed on the official training list. It
evaluates them on the official test list: the AUC, and the boxes of the NIH and of ChestX-Det10. ``table`` summarizes
the runs with confidence intervals over patients, and ``compare`` the differences between methods. ``train --validate``
is for choosing settings: it evaluates on a quarter of the patients of the training list instead of the test list, and
``--validate 0 1 2 3`` is a cross-validation over all of them. ``probe`` cross-validates a logistic regression on the
training list: how much about the labels the features hold.

``extract --stages`` takes other features: earlier stages, several image sizes, another network. ``--mirror`` of
``extract`` and ``train`` adds the mirrored images to the training and to the predictions. ``train --margin``
leaves out the cells near the edges. ``train --features`` with several folders trains heads on the features of each, for
example of two networks, and evaluates the mean predictions. ``train --fractions`` also cuts the maps at other
fractions of their maximum than half, and ``compare --rules`` compares two cuts. ``train --tune N`` trains the last N
blocks of EfficientNet-Lite0 behind each trained head, together with the head. ``--tune 0`` is the control: the head
alone is trained further.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.options import exit_status, make_parser, next_step


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("extract", allow_abbrev=False, help="compute the feature maps of all images")
    one.add_argument("--data-dir", type=Path, required=True, help="folder with the images")
    one.add_argument("--weights", type=Path, required=True, help="weights of the network: .safetensors, .pth or .pt")
    one.add_argument(
        "--backbone",
        default="timm/tf_efficientnet_lite0",
        metavar="NAME",
        help="timm/NAME or torchvision/NAME; needs --stages (timm/tf_efficientnet_lite0)",
    )
    one.add_argument(
        "--stages",
        nargs="+",
        default=[],
        metavar="STAGE",
        help="stages whose features are concatenated, as in extract_features.py (the last two of EfficientNet-Lite0)",
    )
    one.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[320],
        metavar="PIXELS",
        help="width and height of resized images; with --stages, the features of several sizes are concatenated (320)",
    )
    one.add_argument("--mirror", action="store_true", help="also the maps of the mirrored images, for train --mirror")
    one.add_argument("--out", type=Path, required=True, help="folder for the feature maps")
    two = commands.add_parser("train", allow_abbrev=False, help="train and evaluate heads")
    two.add_argument("--data-dir", type=Path, required=True, help="folder with the images")
    two.add_argument("--tables", type=Path, help="folder with the official tables (DATA_DIR)")
    two.add_argument(
        "--det10", type=Path, metavar="CSV", help="boxes of ChestX-Det10: csv with image_index, class, xmin, ..."
    )
    two.add_argument(
        "--rsna",
        type=Path,
        metavar="CSV",
        help="boxes of the RSNA Pneumonia Detection Challenge, for the map of Pneumonia: csv with image_index (name of "
        "the NIH), x, y, width, height in pixels of 1024",
    )
    two.add_argument(
        "--features",
        type=Path,
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="folders that extract wrote; heads are trained on each, and their mean predictions are evaluated",
    )
    two.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="names of METHODS in images/frozen_methods.py (all)"
    )
    two.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="seeds of every method (0 1 2 3 4)")
    two.add_argument(
        "--heads",
        type=int,
        default=1,
        metavar="N",
        help="heads that a run trains; their mean predictions are evaluated (1)",
    )
    two.add_argument(
        "--mirror",
        action="store_true",
        help="train on the images and the mirrored images, and evaluate the mean predictions for both; needs extract "
        "--mirror",
    )
    two.add_argument(
        "--margin",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="cells whose centre is nearer to an edge than this fraction of the side of the image are not used (0)",
    )
    two.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=[],
        metavar="F",
        help="also boxes of maps that are cut at these fractions of their maximum, above 0 and below 1; a rule in the "
        "tables has the fraction as its name (none)",
    )
    two.add_argument("--components", type=int, default=96, help="principal components of the features (96)")
    two.add_argument(
        "--tune",
        type=int,
        choices=(0, 1, 2),
        metavar="N",
        help="train the head and the last N blocks of the network further, N 0 to 2; 0: the head alone (off)",
    )
    two.add_argument("--weights", type=Path, help="with --tune: the weights of extract")
    two.add_argument("--tune-epochs", type=int, default=3, help="passes over the training images with --tune (3)")
    two.add_argument("--tune-lr", type=float, default=1e-4, help="learning rate with --tune, falling to 0 (0.0001)")
    two.add_argument(
        "--validate",
        type=int,
        nargs="*",
        choices=range(4),  # images.frozen.FOLDS, which is imported later
        metavar="FOLD",
        help="evaluate on these folds of the patients of the training list, 0 to 3; heads are trained for each, on the "
        "other folds (off; --validate alone: fold 0)",
    )
    two.add_argument("--out", type=Path, required=True, help="folder for the runs")
    three = commands.add_parser("table", allow_abbrev=False, help="summarize the runs in a table")
    three.add_argument("--runs", type=Path, required=True, help="folder that train wrote")
    three.add_argument("--out", type=Path, required=True, help="csv file")
    five = commands.add_parser("compare", allow_abbrev=False, help="the differences between methods in a table")
    five.add_argument("--runs", type=Path, required=True, help="folder that train wrote")
    five.add_argument(
        "--minus",
        type=Path,
        metavar="OTHER",
        help="subtract the runs of this folder; without --pair, each method minus the same method there (the folder of "
        "--runs)",
    )
    five.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar="METHOD",
        help="the first method, of --runs, minus the second, of --minus; the second can be 'centre box'; repeat the "
        "option for more pairs (SGL minus its bag loss, mean bag, cam, grad-cam and centre box)",
    )
    five.add_argument(
        "--rules",
        nargs=2,
        metavar="RULE",
        help="the rule for the first method and that for the second, for example 0.6 and half (each rule for both)",
    )
    five.add_argument("--out", type=Path, required=True, help="csv file")
    four = commands.add_parser("probe", allow_abbrev=False, help="cross-validate a logistic regression on the features")
    four.add_argument("--data-dir", type=Path, required=True, help="folder with the images")
    four.add_argument("--tables", type=Path, help="folder with the official tables (DATA_DIR)")
    four.add_argument("--features", type=Path, required=True, help="folder that extract wrote")
    four.add_argument("--regions", type=int, default=1, metavar="N", help="means of N x N regions of a film (1)")
    four.add_argument(
        "--c",
        type=float,
        nargs="+",
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        help="inverse penalties of scikit-learn (0.0001 to 0.01)",
    )
    four.add_argument("--partitions", type=int, nargs="+", default=[0, 1], help="seeds of folds over patients (0 1)")
    four.add_argument("--out", type=Path, required=True, help="csv file")
    args = parser.parse_args(argv)
    if args.command == "probe" and (args.regions < 1 or not min(args.c) > 0):
        parser.error(f"--regions, --c: expected above 0, got {args.regions} and {min(args.c):g}")
    if args.command == "train" and not 0 <= args.margin < 0.5:
        parser.error(f"--margin: expected 0 to less than 0.5, got {args.margin:g}")
    if args.command == "train" and not all(0 < fraction < 1 for fraction in args.fractions):
        parser.error(f"--fractions: expected above 0 and below 1, got {' '.join(f'{f:g}' for f in args.fractions)}")
    if args.command == "train" and args.tune is not None and len(args.features) > 1:
        parser.error(f"--tune: expected one folder of --features, got {len(args.features)}")
    if args.command == "train" and args.tune is not None and args.weights is None:
        parser.error("--tune: expected --weights, too")
    if args.command == "train":
        args.validate = sorted({*args.validate} or {0}) if args.validate is not None else []
        args.fractions = sorted({*args.fractions})
    if args.command == "train" and min(args.tune_epochs, args.heads) < 1:
        parser.error(f"--tune-epochs, --heads: expected at least 1, got {args.tune_epochs} and {args.heads}")
    return args


NEXT = {
    "extract": "python frozen_cxr.py train --features FEATURES, which trains heads on them",
    "train": "python frozen_cxr.py table --runs RUNS, which joins the runs",
    "table": "python frozen_cxr.py compare --runs RUNS, which compares the methods",
    "compare": "docs/when-sgl-helps.md says how to read it",
    "probe": "python frozen_cxr.py train --features FEATURES, whose AUC can be compared with this one",
}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: run(args), "stopped; the same command goes on with the runs that are missing")


def run(args: argparse.Namespace) -> None:
    """Does what ``args.command`` names."""
    if args.command == "probe":
        from images.linear_probe import probe

        probe(args)
    elif args.command in ("table", "compare"):
        from images import frozen_tables

        getattr(frozen_tables, args.command)(args)
    else:
        from images import frozen_runs

        getattr(frozen_runs, args.command)(args)
    next_step(NEXT[args.command])


if __name__ == "__main__":
    sys.exit(main())
