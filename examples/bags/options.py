"""The options of the commands that train on bags of images. Nothing here imports torch before the options are read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.choices import LOSSES, POOLINGS, Config
from common.options import default_device, device_name
from common.options import make_parser as make_plain_parser

#: The names of ``bags.authors_losses.AUTHORS_LOSSES``.
AUTHORS_LOSSES = ("mmm_authors", "bil_authors")
DEFAULT_POOLING = {
    "sgl": "max", "bag": "max", "bil": "mean", "mmm": "max", "mmm_authors": "max", "bil_authors": "mean_logits",
}  # fmt: skip
#: The settings that decide a result. They must not change when a run is resumed.
RESUME_KEYS = (
    "data", "target", "bag_size", "bag_std", "positives", "bags", "val_bags", "test_bags", "epochs", "batch_size", "lr",
    "weight_decay", "val_every", "loss", "pooling", "k", "k_start", "k_epochs", "delta_l", "lam", "rescale", "weighted",
)  # fmt: skip
#: Settings that older runs do not hold, with the value that they had.
OLDER = {"k": 8, "k_start": 0.0, "k_epochs": 0.0}


def make_parser(description: str, hints: Mapping[str, str] | None = None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all commands share.

    ``defaults`` are those of the command; ``hints`` describe a default that depends on another option.
    """
    parser = make_plain_parser(description)
    group = parser.add_argument_group("bags")
    hints = hints or {}

    def add(name: str, *, kind: Any = int, text: str, **more: Any) -> None:
        key = name.replace("-", "_")
        value = defaults.get(key)
        shown = hints.get(key) or (f"{value:g}" if isinstance(value, float) else value)
        text += "" if shown is None else f" ({shown})"
        group.add_argument(f"--{name}", type=kind, default=value, help=text, **more)

    add("data", kind=str, text="digits, mnist, cifar10, or an .npz file of x_train, y_train, x_test, y_test")
    add("data-dir", kind=str, text="folder of MNIST or CIFAR-10; missing data are downloaded into it")
    add("target", text="the class that makes a bag positive")
    add("bag-size", kind=float, text="mean number of instances in a bag")
    add("bag-std", kind=float, text="standard deviation of the number of instances")
    add("positives", text="instances of the target class in a positive bag; 0: a random number, at least one")
    add("bags", text="training bags")
    add("val-bags", text="validation bags")
    add("test-bags", text="test bags")
    group = parser.add_argument_group("loss")
    add("loss", kind=str, choices=(*LOSSES, *AUTHORS_LOSSES), text="loss (both sgl, and bag with max pooling)")
    add(
        "pooling",
        kind=str,
        choices=POOLINGS,
        text="pooling (sgl, bag: max; bil: mean); generalized_mean has r = 1, which is the mean",
    )
    add("k", text="topk: number of the largest probabilities whose mean is the probability of the bag")
    add(
        "k-start",
        kind=float,
        text="topk: k at the beginning, as a fraction of --bag-size; 0: off. lam is 0 while k falls",
    )
    add("k-epochs", kind=float, text="with --k-start: epochs in which k falls to --k (half of --epochs)")
    add("delta-l", kind=float, text="threshold of the ternary targets, in [0, 0.5]")
    add("lam", kind=float, text="weight of the instance loss")
    group.add_argument("--no-rescale", action="store_true", help="theta = p instead of Eq. 5")
    group.add_argument("--no-weight", action="store_true", help="w = 1 instead of Eq. 7 and 8")
    group = parser.add_argument_group("optimization")
    add("epochs", text="passes over the training bags")
    add("batch-size", text="bags per step")
    add("lr", kind=float, text="learning rate of Adam")
    add("weight-decay", kind=float, text="weight decay of Adam")
    add("val-every", text="validate every N epochs and in the last one")
    group = parser.add_argument_group("run")
    add("seed", text="first seed")
    add("runs", text="number of seeds")
    group.add_argument("--device", type=device_name, help="cpu or cuda (cuda if there is a GPU)")
    group.add_argument("--out", type=Path, help="folder of the results (the next free name in runs/)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    group.add_argument("--dry-run", action="store_true", help="run one training step and write nothing")
    return parser


#: The settings that the two experiments of the paper share.
COMMON = {
    "data_dir": "data", "bag_size": 50.0, "bag_std": 0.0, "batch_size": 64, "weight_decay": 1e-4, "val_every": 1,
    "k": 8, "k_start": 0.0, "delta_l": 0.3, "lam": 1.0, "seed": 0,
}  # fmt: skip


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Ends the command with an error that names the option if a value is out of range."""
    for name in ("bags", "val_bags", "test_bags", "epochs", "batch_size", "runs", "val_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.bag_size < 1 or args.bag_std < 0:
        parser.error(f"--bag-size, --bag-std: expected >= 1 and >= 0, got {args.bag_size} and {args.bag_std}")
    if args.positives < 0 or (args.positives and (args.bag_std or args.positives > args.bag_size)):
        parser.error(
            f"--positives: expected 0, or up to --bag-size with a --bag-std of 0, got {args.positives} "
            f"with {args.bag_size:g} and {args.bag_std:g}"
        )
    if not 0 <= args.delta_l <= 0.5 or not 0 <= args.lam < float("inf"):
        parser.error(f"--delta-l, --lam: expected 0 to 0.5 and finite >= 0, got {args.delta_l} and {args.lam}")
    if args.loss in ("mmm", *AUTHORS_LOSSES) and args.pooling:
        parser.error(f"--pooling: expected none, because {args.loss} has fixed poolings, got {args.pooling}")
    if args.k < 1 or not 0 <= args.k_start < 1:
        parser.error(f"--k, --k-start: expected at least 1, and 0 to below 1, got {args.k} and {args.k_start:g}")
    if args.k_start and (args.pooling != "topk" or not args.loss):
        parser.error("--k-start: expected --loss and --pooling topk")
    if args.k_epochs is None:
        args.k_epochs = args.epochs / 2 if args.k_start else 0.0
    if not 0 <= args.k_epochs <= args.epochs or (args.k_epochs > 0) != (args.k_start > 0):
        parser.error(f"--k-epochs: expected above 0 and at most --epochs with --k-start only, got {args.k_epochs:g}")
    if args.resume and args.out is None:
        parser.error("--resume: expected --out, the folder of the run to continue")
    args.device = args.device or default_device()
    return args


def configs_of(args: argparse.Namespace, keys: tuple[str, ...] = RESUME_KEYS) -> dict[str, Config]:
    """The configurations by name: of one method, or of SGL and the max-pooling baseline."""
    common = vars(args) | {"rescale": not args.no_rescale, "weighted": not args.no_weight}
    methods = {args.loss: {"loss": args.loss}} if args.loss else {"sgl": {"loss": "sgl"}, "max": {"loss": "bag"}}
    configs = {}
    for name, method in methods.items():
        pooling = args.pooling if args.pooling and name != "max" else DEFAULT_POOLING[method["loss"]]
        config = common | method | {"pooling": pooling}
        configs[name] = {key: config[key] for key in keys} | {"data": Path(args.data).name}
    return configs
