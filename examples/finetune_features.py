"""Fine-tunes the last blocks of a network and the heads that train_features.py trained on its features.

    python extract_features.py --images DIR --backbone timm/tf_efficientnet_lite0 --stages blocks.3 --out features
    python extract_features.py --images DIR --backbone timm/tf_efficientnet_lite0 --stages blocks.3.0 --out before
    python train_features.py --features features --labels labels.csv --out runs/sgl
    python finetune_features.py --run runs/sgl --before before --blocks blocks.3.1 blocks.3.2 --out runs/tuned

Every run of --run is continued with its own split, seed and loss. The blocks before --blocks are not computed again:
their output is in --before. --freeze with the number of --blocks trains the head alone. This is a control: it tells
whether a change comes from the blocks or from the additional steps. All images must have the same size. The statistics
of batch norm do not change. SGL begins with the lam that the run reached. Writes the same files as train_features.py.
An interrupted command continues with --resume.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from common import options
from common.files import save_atomically
from train_features import keep_settings, refuse_below

#: Settings of the run that is continued that are kept beside those of its training.
CONTINUED = (
    "features", "labels", "classes", "patient", "folds", "test", "repeats", "instance_labels", "boxes", "images",
    "class_names", "extraction", "threshold",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of train_features.py")
    data.add_argument(
        "--before", type=Path, required=True, metavar="DIR", help="features of the stage before the first of --blocks"
    )
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    data.add_argument("--resume", action="store_true", help="keep the finished runs in --out")
    data.add_argument("--repeats", type=int, metavar="R", help="only the first R repeats or seeds of --run (all)")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--weights",
        default="pretrained",
        metavar="FILE",
        help="weights of the extraction: pretrained, or a file (pretrained)",
    )
    network.add_argument(
        "--blocks", nargs="+", required=True, metavar="BLOCK", help="the blocks to train, up to the first stage"
    )
    network.add_argument(
        "--freeze", type=int, default=0, metavar="N", help="do not train the first N of --blocks; all: head only (0)"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=4, help="passes over the training bags (4)")
    training.add_argument("--batch-size", type=int, default=16, help="bags per step (16)")
    training.add_argument("--lr", type=float, default=3e-4, help="learning rate of AdamW, falling to 0 (0.0003)")
    training.add_argument("--threads", type=int, metavar="N", help="number of threads of torch")
    training.add_argument("--overlays", type=int, default=12, metavar="N", help="bags shown in the report (12)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_below(parser, args, {"epochs": 1, "batch_size": 1, "repeats": 1, "threads": 1, "overlays": 0})
    if not 0 <= args.freeze <= len(args.blocks):
        parser.error(f"--freeze: expected 0 to {len(args.blocks)}, got {args.freeze}")
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    return options.exit_status(lambda: run(args), "stopped; the same command with --resume continues")


def run(args: argparse.Namespace) -> None:
    """Fine-tunes the runs that are not finished, and writes tables and report."""
    import copy
    from dataclasses import replace

    import torch
    from common.files import read_json
    from features.finetuning import (
        BLOCKS,
        BlocksHead,
        MapReader,
        load_blocks,
        refuse_other_view,
        split_blocks,
        width_of,
    )
    from features.opened_run import open_run
    from features.results import FAILED, write_results
    from features.run_settings import BASE, extraction_of_run
    from features.runs import save_predictions
    from features.store import FeatureBags
    from features.training import Settings, fit, make_model, predicted
    from features.transform import Transform

    opened = open_run(args.run, args.repeats)
    if opened.tuned:
        raise ValueError(f"run: expected a folder of train_features.py, got {args.run} of finetune_features.py")
    known, after, labels, truth, runs = opened.settings, opened.bags, opened.labels, opened.truth, opened.runs
    settings = Settings.of_run(known)
    if settings.margin:
        raise ValueError(f"run: expected a run without --margin, got {args.run}: the blocks are trained on whole maps")
    extraction_of_run(args.run)  # an older run does not have it
    before = FeatureBags(args.before)
    refuse_other_view(after, before)
    original = load_blocks(after.settings["backbone"], args.weights, args.blocks, after.settings.get("output_stride"))
    width = width_of(original, before, after, labels.names)
    frozen, blocks = split_blocks(original, args.freeze)
    reader = MapReader(before, after, labels.names, width, frozen)
    parts = args.out / "parts"
    base = {name: known[name] for name in (*Settings.__dataclass_fields__, *CONTINUED) if name in known}
    keep_settings(args, parts, opened.data, {"extraction_before": before.settings, BASE: base})
    save_atomically(original.state_dict(), args.out / BLOCKS)
    targets = torch.tensor(labels.values)
    for number, one in enumerate(runs, 1):
        if (parts / f"{one.name}.npz").exists():
            continue
        begun = time.process_time()
        state = torch.load(args.run / "parts" / f"{one.name}.pt", weights_only=True)
        history = state.get("history", [])
        # a checkpoint of an older version has no history
        lam = history[-1]["lam"] if history else settings.lam
        transform = Transform(**state["transform"])
        model = make_model(settings, transform.weight.shape[1], len(labels.classes), one.seed)
        model.load_state_dict(state["model"])
        model["head"] = BlocksHead(copy.deepcopy(blocks), model["head"], transform, reader.inputs, reader.grid)
        if settings.loss == "sgl":
            model["loss"].lam = lam
        own = replace(settings, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, start="at_once", noise=0.0)
        names = [labels.names[i] for i in one.train]
        log: list[dict] = []
        fit(model, reader, names, targets[torch.from_numpy(one.train)], own, one.seed, log.append)
        predictions = predicted(model, reader, [labels.names[i] for i in one.test])
        save_atomically({"model": model.state_dict(), "history": log}, parts / f"{one.name}.pt")
        save_predictions(parts / f"{one.name}.npz", predictions)
        losses = " ".join(f"{row['loss']:.3f}" for row in log)
        seconds = time.process_time() - begun
        print(f"run {number} of {len(runs)}: loss {losses}, {seconds:.0f} s of processor time", flush=True)
    images = Path(known["images"]) if known["images"] else None
    training = f"Fine-tuned: {', '.join(args.blocks)}. Loss: {settings.loss}"
    failed = read_json(args.run / FAILED) if (args.run / FAILED).is_file() else {}
    write_results(args.out, runs, truth, after, images, args.overlays, training, settings, failed_before=failed)
    options.next_step(f"open {args.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
