"""Trains a head on bags of features and evaluates its predictions for bags, instances and boxes.

    python train_features.py --features DIR --labels labels.csv --folds 5 --out runs/sgl
    python train_features.py --features DIR --labels labels.csv --out runs/mean --folds 10 --repeats 5 --pooling mean
    python train_features.py --features SLIDES --labels labels.csv --out runs/slides --folds 5 --head gated

--features: a folder of extract_features.py, or one with BAG.h5 (features, coords; CLAM, TRIDENT) or BAG.pt.
labels.csv: the same tables as for train_cxr.py. A column image (or bag): the file name of the bag, with or without its
suffix. Then a column labels (class names joined by |, empty for none), or for each class a column of 0 and 1 (empty:
unknown). Optional columns: split (train, val, test) and patient. All bags of a patient are in the same fold. Without
--folds and without a column split, split.csv beside labels.csv gives the split.

Writes metrics.json, runs.csv, bags.csv, instances.csv and report.html. An interrupted command continues with --resume.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from common import options
from common.choices import LOSSES, POOLINGS
from common.files import read_json, save_atomically, write_json
from features.recommended import SEARCHED_HEADS, defaults_of
from images.thresholds import threshold_text

#: The poolings with the parameter r.
WITH_R = ("lse", "generalized_mean")
HEADS = ("linear", "mlp", "attention", "gated", "patches")
#: Options that do not change a result.
FREE = (
    "out", "resume", "threads", "cache_gb", "images", "overlays", "repeats", "instance_labels", "boxes", "threshold",
)  # fmt: skip
#: Values of options in the settings of a run that is older than the option.
OLDER = {"margin": 0.0, "allow_missing": False}


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--features", type=Path, required=True, metavar="DIR", help="folder with the bags of features")
    data.add_argument("--labels", type=Path, required=True, metavar="CSV", help="labels of the bags")
    data.add_argument("--classes", nargs="+", metavar="NAME", help="classes to use (all)")
    data.add_argument(
        "--patient", default="patient", metavar="COLUMN", help="column with the patient of a bag (patient)"
    )
    data.add_argument("--allow-missing", action="store_true", help="leave out the bags of --labels without features")
    data.add_argument("--instance-labels", type=Path, metavar="CSV", help="image (or bag), class: one row per instance")
    data.add_argument("--boxes", type=Path, metavar="CSV", help="image, label, x, y, w, h in pixels of the image")
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of images for the overlays in the report")
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    data.add_argument(
        "--margin",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="maps of images: do not use cells whose centre is nearer to an edge than this fraction of the side (0)",
    )
    data.add_argument(
        "--threshold",
        type=threshold_text,
        help="predicted boxes enclose pixels above it: a probability, or a fraction of the largest one of the map "
        "such as 0.3max (0.5)",
    )
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--folds", type=int, metavar="K", help="folds of cross-validation; without it, the column split is used"
    )
    protocol.add_argument(
        "--repeats", type=int, default=1, metavar="R", help="repeats of the folds, or number of seeds (1)"
    )
    protocol.add_argument(
        "--test", choices=("test", "val"), help="part for evaluation; val: train on train only (test)"
    )
    protocol.add_argument("--resume", action="store_true", help="keep the finished runs in --out")
    model = parser.add_argument_group("head")
    model.add_argument(
        "--head",
        choices=HEADS,
        default="mlp",
        help="network on the features; patches: a small network on the pixels of patches, without pretraining (mlp)",
    )
    model.add_argument(
        "--components", type=int, default=0, metavar="K", help="principal components of the features (0: all features)"
    )
    model.add_argument("--hidden", type=int, default=32, help="width of the hidden layer (32)")
    model.add_argument("--dropout", type=float, default=0.0, help="dropout of the hidden layer (0)")
    model.add_argument(
        "--share", type=float, default=0.05, help="estimated fraction of positive instances in a positive bag (0.05)"
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", choices=LOSSES, default="sgl", help="loss function (sgl)")
    loss.add_argument(
        "--pooling", choices=POOLINGS, default="topk", help="pooling; unused by attention heads and mmm (topk)"
    )
    loss.add_argument(
        "--k", type=float, default=8, help="k of topk: a number of instances, or a fraction of the bag below 1 (8)"
    )
    loss.add_argument(
        "--r", type=float, help="r of lse (10) and generalized_mean (3; 1 is the mean, a large r is near the maximum)"
    )
    loss.add_argument("--lam", type=float, default=1.0, help="weight of the instance loss (1)")
    loss.add_argument("--delta-l", type=float, default=0.3, help="lower threshold of the self-guidance (0.3)")
    loss.add_argument(
        "--normalize",
        choices=("batch", "bag"),
        default="batch",
        help="count instances in each part over the batch or within each bag",
    )
    loss.add_argument("--mask-weight", type=float, default=0.0, help="weight of the mask penalty (0)")
    start = parser.add_argument_group("start of the instance loss")
    start.add_argument(
        "--start",
        choices=("measured", "at_once"),
        default="measured",
        help="start of lam; measured: when the training AUC is high enough (measured)",
    )
    start.add_argument("--start-auc", type=float, default=0.8, help="training AUC at which lam starts to rise (0.8)")
    start.add_argument(
        "--rise",
        type=int,
        help="steps from lam 0 to lam (100; a third of the steps if there are fewer than 300)",
    )
    training = parser.add_argument_group("training")
    start.add_argument(
        "--restarts",
        type=int,
        metavar="R",
        help="number of initial heads to try with the bag loss (topk with the heads linear and mlp: 4; else 1)",
    )
    start.add_argument(
        "--trial-epochs",
        type=int,
        help="epochs of a trial; training continues with the best head (topk, linear and mlp: 30; else 8)",
    )
    start.add_argument(
        "--k-start",
        type=float,
        metavar="SHARE",
        help="topk: k at the start of the trials, as a fraction of the bag; 0: off (linear and mlp: 0.2)",
    )
    training.add_argument(
        "--epochs", type=int, help="passes over the training bags after the trials (topk, linear and mlp: 30; else 60)"
    )
    training.add_argument("--batch-size", type=int, default=32, help="bags per step (32)")
    training.add_argument("--lr", type=float, default=3e-3, help="learning rate of AdamW (0.003)")
    training.add_argument("--weight-decay", type=float, default=1e-2, help="weight decay of AdamW (0.01)")
    training.add_argument(
        "--noise", type=float, default=0.0, help="standard deviation of noise added to the features (0)"
    )
    training.add_argument(
        "--constant-lr",
        dest="cosine",
        action="store_false",
        help="constant learning rate instead of a cosine schedule to 0",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--amp",
        choices=("bf16",),
        help="train the network in mixed precision; faster on processors with bfloat16 instructions (float32)",
    )
    machine.add_argument("--threads", type=int, metavar="N", help="number of threads of torch")
    machine.add_argument("--cache-gb", type=float, default=2.0, help="keep features in memory up to this size (2)")
    machine.add_argument(
        "--overlays", type=int, default=12, metavar="N", help="bags in the report, taken evenly from all folds (12)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    known = stored_options(args) if args.resume else {}
    for name, value in {**defaults_of(args.pooling, args.head), "rise": None, "threshold": "0.5"}.items():
        if getattr(args, name) is None:
            setattr(args, name, known.get(name, value))
    if not 0.0 <= args.k_start < 1.0:
        parser.error(f"--k-start: expected at least 0 and below 1, got {args.k_start}")
    least = dict.fromkeys(("epochs", "batch_size", "repeats", "rise", "restarts", "trial_epochs"), 1)
    least |= {"hidden": 1, "threads": 1, "components": 0, "overlays": 0, "noise": 0, "lr": 0}
    least |= {"weight_decay": 0, "cache_gb": 0}
    refuse_below(parser, args, least)
    if not (0 < args.k < 1 or (args.k >= 1 and args.k % 1 == 0)):
        parser.error(f"--k: expected a whole number of at least 1, or a fraction between 0 and 1, got {args.k:g}")
    if args.r is not None and args.pooling not in WITH_R:
        parser.error(f"--r: expected --pooling {' or '.join(WITH_R)}, got {args.pooling}")
    if args.r is not None and not 0 < args.r < math.inf:
        parser.error(f"--r: expected a finite number above 0, got {args.r:g}")
    if args.r is None and args.pooling == "generalized_mean":
        args.r = 3.0  # the default of the library, 1, is the mean
    if not 0 <= args.margin < 0.5:
        parser.error(f"--margin: expected at least 0 and below 0.5, got {args.margin:g}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout: expected at least 0 and below 1, got {args.dropout:g}")
    if args.k_start and args.pooling != "topk":
        parser.error(f"--k-start: expected --pooling topk, got {args.pooling}")
    if (args.k_start or args.restarts > 1) and args.head not in SEARCHED_HEADS:
        parser.error(f"--k-start, --restarts: expected --head linear or mlp, got {args.head}")
    twice = [name for name in args.classes or () if args.classes.count(name) > 1]
    if twice:
        parser.error(f"--classes: expected each class once, got {twice[0]} twice")
    if args.folds is not None and args.folds < 2:
        parser.error(f"--folds: expected at least 2, got {args.folds}")
    if args.folds is not None and args.test is not None:
        parser.error("--test: expected without --folds, which test every bag")
    args.test = args.test or "test"
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    return options.exit_status(lambda: run(args), "stopped; the same command with --resume continues")


def stored_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the runs in --out, which --resume continues: those that are not given keep their values."""
    from features.run_settings import SETTINGS

    path = args.out / SETTINGS
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except ValueError:
        return {}  # keep_settings names the file


def refuse_below(parser: argparse.ArgumentParser, args: argparse.Namespace, least: dict[str, int]) -> None:
    """Exits with an error if an option is given that is below its smallest value, or NaN."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and not value >= smallest:
            parser.error(f"--{name.replace('_', '-')}: expected at least {smallest}, got {value}")


def run(args: argparse.Namespace) -> None:
    """Trains the runs that are not finished, and writes tables and report."""
    import numpy as np
    import torch
    from features import labels as tables
    from features.extraction import find_images
    from features.images_of_bags import missing_images
    from features.margin import refuse_threshold_without_maps, refuse_without_cells
    from features.plan import plan, refuse_one_kind, untested, untrained
    from features.results import write_results
    from features.run_settings import threshold_of_run
    from features.runs import Truth, digests_of, refuse_empty, refuse_other_folds, save_predictions
    from features.store import FeatureBags
    from features.training import BagReader, Settings, predicted, train
    from images.dataset import some
    from images.label_tables import notes_of_classes

    if args.features.resolve() == args.out.resolve():
        raise ValueError(f"out: expected another folder than --features, got {args.out}")
    files = {} if args.images is None else find_images(args.images)  # a wrong folder is an error before the training
    bags = FeatureBags(args.features)
    labels = tables.labels_of_run(vars(args), bags.names)
    truth = Truth(
        labels,
        tables.read_instance_labels(args.instance_labels, labels.classes, labels.names) if args.instance_labels else {},
        tables.read_boxes(args.boxes, labels.classes, labels.names, bags.size) if args.boxes else {},
        threshold_of_run(vars(args)),
    )
    for name, values in truth.instances.items():
        if len(values) != bags.instances(name):
            raise ValueError(f"instance labels: {name} has {len(values)} rows, but {bags.instances(name)} instances")
    refuse_empty(bags, labels.names)
    refuse_without_cells(bags, labels.names, args.margin)
    refuse_threshold_without_maps(bags, truth.threshold)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    parts = args.out / "parts"
    keep_settings(args, parts, digests_of(labels, bags), {"class_names": labels.classes, "extraction": bags.settings})
    reader = BagReader(bags, labels.names, args.cache_gb * 1e9, args.margin)
    targets = torch.tensor(labels.values)
    notes = [
        missing_images(files, bags, labels.names) if files else None,
        tables.unknown_boxes(args.boxes, bags.names) if args.boxes else None,
        *notes_of_classes(labels.classes, labels.values),
    ]
    runs = list(plan(labels, args.folds, args.repeats, args.test))
    refuse_other_folds(parts, runs, labels)
    refuse_one_kind(labels, runs)
    for name, column in zip(labels.classes, labels.values.T, strict=True):
        counts = f"{(column == 1).sum()} positive, {(column == 0).sum()} negative, {np.isnan(column).sum()} unknown"
        print(f"{name}: {len(column)} bags, {counts}")
    if labels.absent:
        count = len(labels.absent)
        print(f"note: {count} bags of {args.labels.name} have no features and are left out ({some(labels.absent, 10)})")
    unlabelled = sorted(set(bags.names) - set(labels.names))
    if unlabelled:
        print(
            f"note: {len(unlabelled)} of {len(bags.names)} bags with features are not in {args.labels.name} "
            f"and are not used ({some(unlabelled)})"
        )
    patients = len(set(labels.groups))
    if (labels.groups != np.array(labels.names)).any():
        print(f"{len(labels.names)} bags of {patients} patients (column {args.patient})")
    elif args.folds:
        print(f"note: {args.labels.name} has no column {args.patient}: bags of one patient may be in several folds")
    notes += [*tables.boxes_on_negatives(labels, truth.boxes), *(untested(labels, runs) if args.folds else ())]
    for line in filter(None, notes):
        print(f"note: {line}")
    for line in untrained(labels, runs):
        print(f"warning: {line}", flush=True)
    print(f"first run: {len(runs[0].train)} bags for training, {len(runs[0].test)} for the test", flush=True)
    for number, one in enumerate(runs, 1):
        path = parts / f"{one.name}.npz"
        if path.exists():
            continue
        names = [labels.names[i] for i in one.train]
        history: list[dict] = []
        model = train(reader, names, targets[torch.from_numpy(one.train)], settings, one.seed, history.append)
        predictions = predicted(model, reader, [labels.names[i] for i in one.test], reader.filled)
        state = {"model": model.state_dict(), "transform": reader.transform._asdict(), "history": history}
        save_atomically(state, parts / f"{one.name}.pt")
        save_predictions(path, predictions)
        begun = next((row["epoch"] for row in history if row["lam"] > 0), None)
        lam = "stayed 0" if begun is None else f"rose from epoch {begun} on, and is {history[-1]['lam']:.3g} at the end"
        note = f", lam {lam}" if args.loss == "sgl" else ""
        print(f"run {number} of {len(runs)}: loss {history[-1]['loss']:.3f}{note}", flush=True)
    # a checkpoint of an older version has no history
    saved = [torch.load(parts / f"{one.name}.pt", weights_only=True).get("history", []) for one in runs]
    training = f"Loss: {args.loss}, pooling: {args.pooling}, head: {args.head}"
    write_results(args.out, runs, truth, bags, args.images, args.overlays, training, settings, saved)
    options.next_step(f"open {args.out / 'report.html'}")


def keep_settings(args: argparse.Namespace, parts: Path, data: dict[str, str], facts: dict[str, object]) -> None:
    """Writes ``settings.json``. A folder with results is an error unless --resume is given and the settings are equal.

    Args:
        data: the digests of the data.
        facts: what else is written: what predict_features.py needs. A dictionary in it may hold settings.

    Raises:
        ValueError: the folder holds runs and --resume is missing, or its settings or data differ.
    """
    from features.run_settings import SETTINGS
    from features.runs import refuse_other_data

    # absolute: finetune_features.py may run in another folder
    settings = {key: str(v.resolve()) if isinstance(v, Path) else v for key, v in vars(args).items()}
    path = args.out / SETTINGS
    if path.exists() and any(parts.glob("*.npz")):
        if not args.resume:
            raise ValueError(f"out: {args.out} holds runs; pass --resume to continue, or another --out")
        known = OLDER | read_json(path)
        changed = [key for key in settings if key not in FREE and not _equal(known.get(key), settings[key])]
        if changed:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise ValueError(f"out: {args.out} was made with another {names}")
        refuse_other_data(args.out, known.get("data", {}), data, "choose another --out, or restore the old ones")
        for key, fact in facts.items():
            if key in known and _differ(known[key], fact):
                raise ValueError(f"out: {args.out} was made with another {key.replace('_', ' ')}; choose another --out")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(settings | {"data": data} | facts, path)


def _differ(known: object, given: object) -> bool:
    """Whether two facts differ, without the settings that do not decide a result."""
    from features.extraction_settings import changed_settings

    if isinstance(known, dict) and isinstance(given, dict):
        older = {name: value for name, value in OLDER.items() if name in given}
        return bool(set(changed_settings(older | known, given)) - set(FREE))
    return known != given


def _equal(known: object, given: object) -> bool:
    """Whether two options are equal, or two forms of the same path."""
    if isinstance(known, str) and isinstance(given, str):
        return known == given or Path(known).resolve() == Path(given).resolve()
    return known == given


if __name__ == "__main__":
    sys.exit(main())
