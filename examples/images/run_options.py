"""Options of the commands that apply trained networks: the networks, and how their maps become boxes."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from common.choices import UPSAMPLING
from common.files import read_json
from common.options import default_device, device_name, path_of

from images.thresholds import RASTERS, VALIDATION, map_threshold, probability


def add_network_options(parser: argparse.ArgumentParser, run: str) -> None:
    """Adds the options that name the networks. ``run``: the help text of ``--run``."""
    add = parser.add_argument_group("networks").add_argument
    add("--run", nargs="+", type=path_of, required=True, help=run)
    add("--which", choices=("best", "last"), help="checkpoint of the runs (best, if there are validation images)")
    add("--batch-size", type=int, default=16, help="images per forward pass (16)")
    add("--workers", type=int, default=0, help="additional processes that decode images (0)")
    add("--device", type=device_name, help="cpu or cuda (cuda if there is a GPU)")


def add_box_options(parser: argparse.ArgumentParser, labels: bool) -> None:
    """Adds the options from a map to its boxes. ``labels``: the thresholds may be ``validation``."""
    add = parser.add_argument_group("from maps to boxes").add_argument
    chosen = f"; or {VALIDATION}: from labels" if labels else ""
    add(
        "--threshold",
        type=functools.partial(map_threshold, labels=labels),
        default=0.5,
        help=f"T_p: a probability, or a fraction of the map's maximum such as 0.5max{chosen} (0.5)",
    )
    add(
        "--gate",
        type=functools.partial(probability, labels=labels),
        default=0.5,
        help=f"a class is predicted above this probability{chosen} (0.5)",
    )
    add("--upsampling", choices=UPSAMPLING, default="nearest", help="interpolation from the map to the image (nearest)")
    add(
        "--raster",
        choices=RASTERS,
        default="network",
        help="position of the cells: network, the centres of their receptive fields; even, as in the paper (network)",
    )
    add("--morphology", type=int, default=5, help="side of the square for opening and closing, odd; 1: none (5)")


def settings_of_report(folder: Path) -> dict[str, Any]:
    """The options from a map to its boxes in a report of localize_cxr.py, and its checkpoint, by the names in ``args``.

    If the labels of validation images determined a threshold, it is a dict with the threshold of each class.

    Raises:
        ValueError: there is no report in the folder.
    """
    path = folder / "details.json"
    if not path.is_file():
        raise ValueError(f"expected a folder of localize_cxr.py, found no details.json in {folder}")
    try:
        details = read_json(path)
        values: dict[str, Any] = {name: details[name] for name in ("upsampling", "raster", "morphology")}
        for name, of_text in (("threshold", map_threshold), ("gate", probability)):
            value = of_text(str(details[name]))
            by_class = {label: float(limit) for label, limit in details[f"{name}_of_class"].items()}
            values[name] = by_class if value == VALIDATION else value
        return values | {"which": details["network"]}
    except (ValueError, KeyError, TypeError, AttributeError, argparse.ArgumentTypeError):
        raise ValueError(f"{path}: expected the details.json of localize_cxr.py, got other content") from None


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Completes ``--device``. Ends the command with an error that names the option if a value is invalid."""
    args.device = args.device or default_device()
    if len({run.resolve() for run in args.run}) < len(args.run):
        known = [run.resolve() for run in args.run]
        twice = next(run for run in args.run if known.count(run.resolve()) > 1)
        parser.error(f"--run: expected different runs, got {twice} twice")
    if args.morphology < 1 or args.morphology % 2 == 0:
        parser.error(f"--morphology: expected an odd number of pixels, got {args.morphology}")
    for name in ("batch_size", "gallery_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if min(args.gallery, args.workers) < 0:
        parser.error("--gallery, --workers: expected at least 0")
