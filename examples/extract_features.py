"""Computes features of images with a pretrained network: the bags for train_features.py.

    python extract_features.py --images DIR --backbone timm/resnet18 --cut layer3 --out features
    python extract_features.py --images DIR --backbone timm/resnet50.tv_in1k --weights FILE.safetensors --out features
    python extract_features.py --images DIR --points nuclei.csv --backbone timm/resnet18 --out features
    python extract_features.py --images DIR --points nuclei.csv --backbone pixels --patch 27 --out patches
    python extract_features.py --backbone timm/resnet18 --list-stages
    python extract_features.py --like runs/sgl --images NEW --out new_features

A bag is an image. Its instances are the cells of the network's feature map, or the points of --points. The command
prints the stride of the map, its grid, and the receptive field of a cell. --backbone pixels stores the pixels of a
patch around each point, for train_features.py --head patches. --like repeats the settings of other features, for
predict_features.py. After an interruption, the same command continues.

Exit status: 0 if the features of all images are there; 1 if some images cannot be read; 2 if there is an error.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common import options

if TYPE_CHECKING:
    import numpy as np
    from features.store import Bag
    from torch import Tensor

    BagOf = Callable[[Tensor, str], Bag]


#: Options that --like sets.
REPEATED = ("backbone", "stages", "cut", "output_stride", "scales", "patch", "symmetric")


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of images; an image is a bag")
    data.add_argument("--points", type=Path, metavar="CSV", help="columns bag (or image), x, y: one instance per point")
    data.add_argument(
        "--points-from-one", action="store_true", help="the coordinates of the first pixel are 1, 1 (0, 0)"
    )
    data.add_argument("--out", type=Path, metavar="DIR", help="folder for the features")
    data.add_argument(
        "--format",
        choices=("store", "h5"),
        default="store",
        help="store: one file for all bags; h5: one BAG.h5 per bag (store)",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--backbone",
        default="timm/resnet18",
        metavar="NAME",
        help="timm/NAME, torchvision/NAME, or pixels (timm/resnet18)",
    )
    network.add_argument(
        "--weights", default="pretrained", metavar="FILE", help="pretrained (timm downloads them), none, or a file"
    )
    network.add_argument(
        "--stages", nargs="+", default=[], metavar="STAGE", help="stages whose features are concatenated; see --cut"
    )
    network.add_argument("--cut", metavar="STAGE", help="use the network up to this stage, a number or a name")
    network.add_argument(
        "--list-stages", action="store_true", help="print the stages of --backbone with their receptive fields"
    )
    network.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="use the network, the stages and the view of this folder of features, or of this run",
    )
    network.add_argument("--output-stride", type=int, choices=(8, 16, 32), help="dilate the network to this stride")
    view = parser.add_argument_group("view")
    view.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="scales of the image; the features are concatenated (1)"
    )
    view.add_argument("--patch", type=int, metavar="PIXELS", help="with --points: side of a square crop per point")
    view.add_argument("--symmetric", action="store_true", help="average the features over the 8 flips and rotations")
    view.add_argument("--threads", type=int, metavar="N", help="number of threads of torch")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    for name in ("threads", "patch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if not all(0 < scale < math.inf for scale in args.scales):
        parser.error(f"--scales: expected numbers above 0, got {' '.join(f'{scale:g}' for scale in args.scales)}")
    if args.like is not None:
        given = [name for name in REPEATED if getattr(args, name) != parser.get_default(name)]
        if given or args.list_stages:
            parser.error(f"--like: expected without --{(given or ['list_stages'])[0].replace('_', '-')}")
        if options.exit_status(lambda: repeat_settings(args)):
            return 2
    if args.patch is not None and args.points is None:
        parser.error("--patch: expected together with --points")
    if args.backbone == "pixels" and (args.patch is None or args.list_stages):
        parser.error("--backbone pixels: expected together with --points and --patch")
    without = ()  # options without an effect
    if args.patch is not None:
        without = ("scales",)
    if args.backbone == "pixels":
        without = ("scales", "stages", "cut", "output_stride", "symmetric", "weights")
    unused = [name for name in without if getattr(args, name) != parser.get_default(name)]
    if unused:
        option = "--backbone pixels" if args.backbone == "pixels" else "--patch"
        parser.error(f"{option}: expected without --{unused[0].replace('_', '-')}")
    if not args.list_stages and (args.images is None or args.out is None):
        parser.error("--images and --out are needed, or --list-stages")
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.list_stages:
        return options.exit_status(lambda: list_stages(args))
    problems: list[str] = []
    status = options.exit_status(lambda: problems.extend(extract(args)), "stopped; the same command continues")
    return status or int(bool(problems))


def repeat_settings(args: argparse.Namespace) -> None:
    """Sets the options REPEATED to the values of ``args.like``.

    Raises:
        ValueError: the folder does not tell them, or they need other --points or --weights.
    """
    from features.run_settings import extraction_of

    known = extraction_of(args.like)
    if "backbone" not in known:
        raise ValueError(
            f"like: expected features of extract_features.py, got {args.like}; compute the features of new bags with "
            "the program that made these features, and pass them to predict_features.py"
        )
    for name in REPEATED:
        if name in known:
            setattr(args, name, known[name])
    weights = known.get("weights", "pretrained")
    if args.weights == "pretrained" and weights == "none":
        args.weights = "none"
    if Path(args.weights).name != weights:
        wanted = "no --weights" if weights == "pretrained" else f"--weights {weights}"
        raise ValueError(f"weights: expected {wanted}, as for {args.like}, got {Path(args.weights).name}")
    if bool(known.get("points")) != (args.points is not None):
        expected = "--points" if known.get("points") else "no --points"
        raise ValueError(f"points: expected {expected}, as for {args.like}")


def list_stages(args: argparse.Namespace) -> None:
    """Prints the stages of ``args.backbone``."""
    from features.backbones import stage_table

    for line in stage_table(args.backbone):
        print(line, flush=True)


def extract(args: argparse.Namespace) -> list[str]:
    """Writes the bags of all images that are not yet in ``args.out``.

    Returns:
        A message for each image that cannot be read.
    """
    from features.extraction import find_images, first_readable, read_image, read_points, refuse_far_points
    from features.recommended import prediction_command, training_command
    from features.run_settings import SETTINGS, settings_of_run
    from features.store import FileWriter, StoreWriter
    from images.dataset import some

    images = find_images(args.images)
    points = None
    if args.points is not None:
        given = read_points(args.points, images)
        refuse_far_points(given, images, int(args.points_from_one))
        # continuous coordinates: the first pixel covers 0 to 1
        shift = -0.5 if args.points_from_one else 0.5
        points = {name: places + shift for name, places in given.items()}
        images = {name: path for name, path in images.items() if name in points}
    prepare = pixel_bags if args.backbone == "pixels" else network_bags
    bag_of, settings = prepare(args, first_readable(images.values()), points)
    writer = (StoreWriter if args.format == "store" else FileWriter)(args.out, settings)
    todo = [name for name in images if name not in writer.names]
    if len(todo) < len(images):
        print(f"{len(images) - len(todo)} of {len(images)} bags are there already", flush=True)
    newer = [name for name in images if name in writer.names and images[name].stat().st_mtime > writer.written(name)]
    if newer:
        print(
            f"note: images that are newer than their features: {len(newer)} ({some(newer)}); if their content has "
            f"changed, delete {args.out} and extract again",
            flush=True,
        )
    problems = []
    begun = time.monotonic()
    for done, name in enumerate(todo, 1):
        try:
            image = read_image(images[name])
        except ValueError as error:
            problems.append(str(error))
        else:
            writer.add(name, bag_of(image, name))
        if done % 20 == 0 or done == len(todo):
            left = (time.monotonic() - begun) / done * (len(todo) - done)
            written = done + len(images) - len(todo) - len(problems)
            print(f"{written} of {len(images)} bags, {left:.0f} s left", flush=True)
    advice = "Replace them and repeat the command, or pass --allow-missing to train_features.py."
    options.warn_of_unreadable(problems, advice if args.like is None else "")
    if args.like is None:
        options.next_step(
            training_command(args.out, args.images, points is None, args.backbone == "pixels", bool(problems))
        )
    else:
        own, known = settings_of_run(args.like) if (args.like / SETTINGS).is_file() else ({}, {})
        run = args.like if own else Path("runs") / "sgl"
        tuned = own != known
        if tuned:
            words = ["python", "extract_features.py", "--like", own["before"], "--images", args.images]
            words += [] if args.weights == "pretrained" else ["--weights", args.weights]
            print(f"also needed: {shlex.join(map(str, [*words, '--out', 'new_before']))}", flush=True)
        command = prediction_command(run, args.out, args.images, tuned)
        before = "" if own else f"; after fine-tuning, these may be the features for --before {args.out}"
        options.next_step(command + before)
    return problems


def digest_of(points: dict[str, np.ndarray]) -> str:
    """A short digest of the points of all bags."""
    from features.store import digest

    return digest({name: places.tolist() for name, places in points.items()})


def pixel_bags(args: argparse.Namespace, first: Tensor, points: dict[str, np.ndarray]) -> tuple[BagOf, dict]:
    """A function from an image and its name to its bag of patches, and the settings of the extraction."""
    from features.extraction import pixel_bag

    settings = {"backbone": args.backbone, "patch": args.patch, "points": digest_of(points)}
    return lambda image, name: pixel_bag(image, points[name], args.patch), settings


def network_bags(args: argparse.Namespace, first: Tensor, points: dict[str, np.ndarray] | None) -> tuple[BagOf, dict]:
    """A function from an image and its name to its bag of features, and the settings of the extraction.

    Args:
        first: the first image, whose grid is printed.
        points: the instances by image; None: the cells of the map.
    """
    from features.backbones import field_warning, load_backbone
    from features.extraction import grid_of, map_bag, patch_bag, point_bag
    from features.extraction_settings import CENTRE

    backbone = load_backbone(
        args.backbone, weights=args.weights, stages=args.stages, cut=args.cut, output_stride=args.output_stride
    )
    geometry = backbone.geometry
    # in pixels of the image
    field = None if geometry.field is None else geometry.field / min(args.scales)
    sees = "the whole image" if field is None else f"{field:g} pixels"
    grid = grid_of(backbone, first.shape[2:], args.scales[0])
    print(
        f"{args.backbone}, stages {', '.join(backbone.stages)}: stride {geometry.stride / args.scales[0]:g}, a cell "
        f"sees {sees}; the first image ({first.shape[3]}x{first.shape[2]}) has a grid of {grid[1]}x{grid[0]} cells",
        flush=True,
    )
    warning = None if args.patch is not None else field_warning(field, first.shape[3], first.shape[2])
    if warning is not None:
        print(f"{warning}: --list-stages prints the stages for --cut", flush=True)
    settings = {
        "backbone": args.backbone,
        "weights": Path(args.weights).name,
        "stages": list(backbone.stages),
        "output_stride": args.output_stride,
        "scales": args.scales,
        "patch": args.patch,
        "symmetric": args.symmetric,
        "points": False if points is None else digest_of(points),
        "stride": geometry.stride,
        CENTRE: backbone.cells(args.symmetric).centre,
        "field": geometry.field,
    }

    def bag_of(image: Tensor, name: str) -> Bag:
        if points is None:
            return map_bag(backbone, geometry, image, args.scales, args.symmetric)
        if args.patch is not None:
            return patch_bag(backbone, image, points[name], args.patch, args.symmetric)
        return point_bag(backbone, geometry, image, points[name], args.scales, args.symmetric)

    return bag_of, settings


if __name__ == "__main__":
    sys.exit(main())
