"""The options of train_cxr.py. Nothing here imports torch before the options are read."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from typing import Any

from common.choices import LOSSES, POOLINGS, Config
from common.options import default_device, device_name, make_parser, path_of

from images.backbones import BACKBONES, STRIDES, TORCHVISION

DEFAULT_POOLING = {"sgl": "softmax", "bag": "mean", "bil": "mean", "mmm": "max"}

#: Settings that decide a result. They must not change when a run is resumed, and neither must the images.
RESUME_KEYS = (
    "backbone", "weights", "cut", "freeze", "output_stride", "image_size", "loss", "pooling", "delta_l", "lam",
    "lam_delay", "lam_warmup", "start_auc", "rise", "k_start", "k_epochs", "mask_weight", "normalize", "rescale",
    "weighted", "prior", "epochs", "batch_size", "accumulate", "lr", "lr_step", "lr_factor", "weight_decay",
    "val_fraction", "seed", "amp", "batch_norm",
)  # fmt: skip

#: Settings of RESUME_KEYS that may be larger when a run is resumed. ``Training.config`` lacks them, so that no step can
#: depend on them.
EXTENDABLE = ("epochs",)

#: Defaults of --synthetic. Instances are counted within bags: with counts over the batch, no tried run learned to
#: classify from so few images.
DEMO = {
    "backbone": "local33", "weights": "none", "output_stride": 8, "image_size": 64, "pooling": "max", "lam": 1.0,
    "lam_delay": 2.0, "lam_warmup": 4.0, "normalize": "bag", "mask_weight": 0.0, "prior": 0.3, "epochs": 8,
    "batch_size": 8, "lr": 1e-3, "lr_step": 7, "workers": 0,
}  # fmt: skip

#: Default of --val-fraction, with which the official lists of ChestX-ray14 give the paper's 70, 10 and 20 percent.
VAL_FRACTION = 0.125
#: The images of --synthetic: a few frequent findings, so that a short training is enough.
DEMO_DATA = {"images": 1200, "size": 128, "findings": ("Atelectasis", "Effusion", "Infiltration", "Mass"), "rate": 3.0}


#: Settings that were better than the paper's on 1317 real images, for networks with random initial weights.
BETTER = "--pooling max --lam 3 --lam-delay 2 --lam-warmup 4 --normalize bag --mask-weight 0 --prior 0.3"
EPILOG = f"""The defaults are the paper's settings. On 1317 real images (ResNet-18 with random initial weights, 128
pixels, 12 epochs, three seeds, the network of the last epoch), SGL gave better results with

    {BETTER}

It found 0.27 of the boxes at IoU > 0.1 (0.16 with the paper's loss settings), with an AUC of 0.64 (0.62). The bag loss
with mean pooling found 0.19, with an AUC of 0.64. None of them was better than a box in the centre. See "Results on a
thousand real images" in examples/README.md."""


def add_data_options(parser: argparse.ArgumentParser, required: bool = False) -> argparse._ArgumentGroup:
    """Adds the options that name the data set, the same in all commands, and returns their group."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data-dir", type=path_of, required=required, help="folder with the images and the tables")
    add("--tables", type=path_of, help="folder with the tables (DATA_DIR)")
    add("--dataset", choices=("nih", "folder", "chexpert"), help="kind of data set (recognized by its tables)")
    add("--view", choices=("PA", "AP", "frontal", "lateral"), help="only images of this view (nih, chexpert; all)")
    add("--uncertain", choices=("unknown", "0", "1"), help="value of uncertain labels (chexpert; unknown)")
    add("--fit", choices=("pad", "squeeze"), help="how an image becomes a square (folder, chexpert; pad)")
    add("--split-seed", type=int, default=0, help="seed of the split of a folder without one (0)")
    add("--allow-missing", action="store_true", help="leave out missing images")
    return group


def given_data_options(args: argparse.Namespace) -> str:
    """The given options of add_data_options as text, for the suggested next command."""
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest != "help" and value != action.default:
            words += action.option_strings if value is True else [*action.option_strings, shlex.quote(str(value))]
    return " ".join(words)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of train_cxr.py, in groups."""
    group = add_data_options(parser)

    def add(name: str, default: Any, text: str, **more: Any) -> None:
        shown = "" if default is None else f" ({default:g})" if isinstance(default, float) else f" ({default})"
        kind = {} if "type" in more or default is None else {"type": type(default)}
        group.add_argument(f"--{name}", default=default, help=text + shown, **kind, **more)

    def switch(name: str, text: str) -> None:
        group.add_argument(f"--{name}", action="store_true", help=text)

    group.add_argument(
        "--cache", type=path_of, help="folder for decoded images, shared by runs with the same image size"
    )
    sizes = "width and height of resized images; training crops 7/8 of them (512; timm/NAME: the size of its training)"
    add("image-size", None, sizes, type=int, metavar="PIXELS")
    add("val-fraction", VAL_FRACTION, "fraction of the training patients used for validation")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=path_of, help="folder of the run")
    switch("resume", "continue the run in --out, if there is one")
    switch("synthetic", "demonstration: generated images, SGL and the bag loss")
    switch("dry-run", "run one training step and write nothing")
    add("seed", 0, "seed of weights, order, crops and validation patients")
    add("save-every", 200, "steps between checkpoints; each epoch also ends with one")
    group = parser.add_argument_group("network")
    networks = f"network without its head: {', '.join(BACKBONES)}, or timm/NAME, any convolutional network of timm"
    add("backbone", "resnet50", networks, type=backbone_name, metavar="NAME")
    add("weights", None, "imagenet, none, or a file with a state_dict (imagenet; local and bagnet: none)")
    add(
        "cut",
        None,
        "with timm/NAME: use the network up to this stage (0: the first), for a smaller receptive field",
        type=int,
        metavar="STAGE",
    )
    add("freeze", 0, "with timm/NAME: do not train the first N stages (0: train all)", metavar="N")
    strides = (
        "pixels between neighbouring patches: 32, 16 or 8 (32; local and bagnet: 8; timm/NAME: that of the network)"
    )
    add("output-stride", None, strides, type=int, metavar="N")
    add("prior", 0.5, "initial probability of a patch; use a value below 0.5 if training starts from random weights")
    norms = "statistics of batch norm: own, per process; sync, over all processes; frozen, those of the weights"
    add("batch-norm", "own", norms, choices=("own", "sync", "frozen"))
    group = parser.add_argument_group("loss")
    add("loss", "sgl", "loss function", choices=LOSSES)
    add(
        "pooling",
        None,
        "pooling (sgl: softmax; bag, bil: mean; mmm has a fixed one); generalized_mean has r = 1, which is the mean",
        choices=POOLINGS,
    )
    add("delta-l", 0.3, "threshold of the ternary targets, in [0, 0.5]")
    add("lam", 20.0, "weight of the instance loss")
    add("lam-delay", 0.0, "epochs without the instance loss, because an untrained network cannot guide itself")
    add("lam-warmup", 0.0, "epochs after the delay in which lam rises from 0")
    add(
        "start-auc",
        0.0,
        "lam rises when the AUC of the latest training images reaches this value, instead of after --lam-delay; 0: off",
    )
    add("rise", 100, "with --start-auc: steps from lam 0 to lam")
    add("k-start", 0.0, "topk: k at the beginning, as a fraction of the map; 0: off")
    add("k-epochs", 5.0, "with --k-start: epochs in which k falls to its final value")
    add("mask-weight", 1.0, "weight of the mask penalty; the paper does not state it")
    add(
        "normalize", "batch", "count instances in each part over the batch or within each bag", choices=("batch", "bag")
    )
    switch("no-rescale", "theta = p instead of Eq. 5")
    switch("no-weight", "w = 1 instead of Eq. 7 and 8")
    group = parser.add_argument_group("optimization")
    add("epochs", 20, "passes over the training images")
    add("batch-size", 32, "images per step, over all processes")
    add("accumulate", 1, "forward passes per step; the loss counts instances within each")
    add("lr", 1e-4, "learning rate of Adam")
    add("lr-step", 10, "epochs after which the learning rate is multiplied by --lr-factor")
    add("lr-factor", 0.1, "factor of the learning rate")
    add("weight-decay", 1e-4, "weight decay of Adam")
    group = parser.add_argument_group("machine")
    add("amp", "off", "mixed precision", choices=("off", "bf16", "fp16"))
    switch("compile", "compile the network with torch.compile")
    add("workers", min(8, os.cpu_count() or 1), "image-loading processes per training process")
    add("device", None, "cpu or cuda (cuda if there is a GPU)", type=device_name)


def backbone_name(text: str) -> str:
    """For argparse: one of BACKBONES, or ``timm/NAME``. Whether timm has the network is checked later."""
    if text not in BACKBONES and not (text.startswith("timm/") and len(text) > 5):
        raise argparse.ArgumentTypeError(f"expected timm/NAME or one of {', '.join(BACKBONES)}, got {text!r}")
    return text


def parse(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description, EPILOG)
    add_options(parser)
    args = parser.parse_args(argv)
    if args.synthetic:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    check(parser, args)
    args.device = args.device or default_device()
    of_timm = args.backbone.startswith("timm/")
    local = not of_timm and args.backbone not in TORCHVISION
    if of_timm:
        fill_from_timm(parser, args)
    args.pooling = args.pooling or DEFAULT_POOLING[args.loss]
    args.weights = args.weights or ("none" if local else "imagenet")
    if args.weights not in ("none", "imagenet") and path_of(args.weights).is_file():
        args.weights = str(path_of(args.weights).resolve())  # absolute, to resume from any folder
    args.output_stride = args.output_stride or (8 if local else 32)
    args.image_size = args.image_size or 512
    if args.image_size % args.output_stride or crop_side(args.image_size, args.output_stride) < args.output_stride:
        parser.error(
            f"--image-size: expected a multiple of the output stride {args.output_stride}, whose crop (7/8) holds at "
            f"least one patch, got {args.image_size}"
        )
    return args


def fill_from_timm(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sets the stride and the image size of a network of timm if they are not given."""
    from images.timm_networks import defaults_of

    try:
        defaults = defaults_of(args.backbone, args.cut)
    except ValueError as error:
        parser.error(f"--{error}")
    trained = defaults.stages if args.cut is None else args.cut + 1
    if args.freeze > trained:
        parser.error(f"--freeze: expected at most the {trained} stages of the network, got {args.freeze}")
    args.output_stride = args.output_stride or defaults.stride
    if args.output_stride > defaults.stride:
        parser.error(f"--output-stride: expected up to {defaults.stride} at this stage, got {args.output_stride}")
    if args.image_size is None:  # training crops 7/8 of it
        least = -(-defaults.image_size * 8 // 7)
        args.image_size = -(-least // args.output_stride) * args.output_stride


def crop_side(image_size: int, output_stride: int) -> int:
    """The side of the training crops: 7/8 of the image, rounded down to whole patches."""
    return image_size * 7 // 8 // output_stride * output_stride


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command with an error that names the option if a value is invalid."""
    if args.synthetic:
        if args.data_dir:
            parser.error("--synthetic: generates its own data; leave out --data-dir")
        if args.dry_run:
            parser.error("--synthetic: cannot be combined with --dry-run")
        if args.cache is not None or args.loss != parser.get_default("loss"):
            option = "--cache" if args.cache is not None else "--loss"
            parser.error(f"--synthetic: trains with SGL and with the bag loss, with its own cache; leave out {option}")
    elif args.data_dir is None or (args.out is None and not args.dry_run):
        parser.error("expected --data-dir and --out, or --synthetic")
    if args.cut is not None and not args.backbone.startswith("timm/"):
        parser.error(f"--cut: expected a backbone of timm (timm/NAME), got {args.backbone}")
    if args.freeze and not args.backbone.startswith("timm/"):
        parser.error(f"--freeze: expected a backbone of timm (timm/NAME), got {args.backbone}")
    if args.output_stride is not None and not args.backbone.startswith("timm/") and args.output_stride not in STRIDES:
        parser.error(f"--output-stride: expected 32, 16 or 8, got {args.output_stride}")
    for name in ("epochs", "batch_size", "accumulate", "rise", "lr_step", "save_every", "image_size", "output_stride"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    for name in (
        "lam", "lam_delay", "lam_warmup", "k_epochs", "mask_weight", "lr", "lr_factor", "weight_decay", "workers",
        "seed", "freeze",
    ):  # fmt: skip
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')}: expected a finite number >= 0, got {getattr(args, name)}")
    if args.start_auc != 0 and not 0.5 <= args.start_auc <= 1:
        parser.error(f"--start-auc: expected 0 or 0.5 to 1, got {args.start_auc}")
    if args.start_auc and (args.lam_delay or args.lam_warmup):
        parser.error("--start-auc: cannot be combined with --lam-delay or --lam-warmup")
    if not 0 <= args.k_start < 1:
        parser.error(f"--k-start: expected at least 0 and below 1, got {args.k_start}")
    if args.k_start and args.pooling != "topk":
        parser.error("--k-start: expected --pooling topk")
    if not 0 <= args.delta_l <= 0.5:
        parser.error(f"--delta-l: expected 0 to 0.5, got {args.delta_l}")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction: expected 0 to less than 1, got {args.val_fraction}")
    if not 0 < args.prior < 1:
        parser.error(f"--prior: expected between 0 and 1, got {args.prior}")
    shares = args.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % shares:
        parser.error(f"--batch-size: expected a multiple of {shares}, passes times processes, got {args.batch_size}")
    if args.loss == "mmm" and args.pooling:
        parser.error(f"--pooling: expected none, because mmm has fixed poolings, got {args.pooling}")


def config_of(args: argparse.Namespace) -> Config:
    values = vars(args) | {"rescale": not args.no_rescale, "weighted": not args.no_weight}
    return {name: values[name] for name in RESUME_KEYS}
