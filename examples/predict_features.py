"""Applies the networks of a run to other bags: probabilities, maps and boxes. Needs no labels.

    python extract_features.py --like runs/sgl --images NEW --out new_features
    python predict_features.py --run runs/sgl --features new_features --images NEW --out found

    python extract_features.py --like before --images NEW --out new_before                         # after fine-tuning
    python predict_features.py --run runs/tuned --features new_features --before new_before --images NEW --out found

A probability is the mean over the trainings of the run (its seeds, folds and repeats). The trainings that seem to have
failed are left out. Writes bags.csv (a row per bag), instances.csv (a row per cell or instance), boxes.csv (a row per
box, in pixels of the image; only bags above --gate have boxes) and report.html.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import options
from images.thresholds import share, shown, threshold_text
from train_features import refuse_below

#: The value of --gate that takes the thresholds from the run.
RUN = "run"


def gate_of(text: str) -> float | str:
    """For argparse: a probability below 1, or ``run``."""
    return text if text == RUN else share(text, f"a probability below 1, or {RUN}")


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="folder of train_features.py or finetune_features.py"
    )
    data.add_argument("--features", type=Path, required=True, metavar="DIR", help="folder with the bags of features")
    data.add_argument(
        "--before",
        type=Path,
        metavar="DIR",
        help="for a run of finetune_features.py: features like those of its --before",
    )
    data.add_argument("--images", type=Path, metavar="DIR", help="folder of images for the overlays in the report")
    data.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    data.add_argument("--with-failed", action="store_true", help="use the trainings that seem to have failed, too")
    found = parser.add_argument_group("results")
    found.add_argument(
        "--gate",
        type=gate_of,
        default=RUN,
        help="a bag is positive for a class above this probability; run: the probability that separates the positive "
        "and the negative test bags of the run best (run)",
    )
    found.add_argument(
        "--threshold",
        type=threshold_text,
        help="boxes enclose pixels above it: a probability, or a fraction of the largest one of the map such as 0.3max "
        "(that of the run)",
    )
    found.add_argument("--overlays", type=int, default=12, metavar="N", help="bags in the report (12)")
    found.add_argument("--threads", type=int, metavar="N", help="number of threads of torch")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    refuse_below(parser, args, {"overlays": 0, "threads": 1})
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    return options.exit_status(lambda: predict(args))


def predict(args: argparse.Namespace) -> None:
    """Predicts all bags of ``args.features`` and writes tables and report."""
    from common.csv_table import write_csv
    from common.predicted_boxes import write_boxes
    from features.extraction import find_images
    from features.images_of_bags import missing_images
    from features.margin import refuse_threshold_without_maps, refuse_without_cells
    from features.prediction_report import write_report
    from features.run_settings import settings_of_run, threshold_of_run
    from features.runs import predicted_boxes, refuse_empty, write_instances
    from features.store import FeatureBags
    from features.trained import bags_of_training, load_heads, mean_predictions, refuse_other_features, thresholds_of
    from images.dataset import some

    for name in ("run", "features", "before", "images"):
        folder = getattr(args, name)
        if folder is not None and folder.resolve() == args.out.resolve():
            raise ValueError(f"out: expected another folder than --{name}, got {args.out}")
    files = find_images(args.images) if args.images is not None else {}
    before = None if args.before is None else FeatureBags(args.before)
    run = load_heads(args.run, args.with_failed, before)
    bags = FeatureBags(args.features)
    if files and not set(files) & set(bags.names):
        raise ValueError(f"images: {args.images} holds no image of the bags in {args.features}")
    if files and (note := missing_images(files, bags, bags.names)) is not None:
        print(f"note: {note}", flush=True)
    refuse_other_features(run, bags)
    refuse_empty(bags, bags.names)
    refuse_without_cells(bags, bags.names, run.margin)
    threshold = threshold_of_run(vars(args) if args.threshold else settings_of_run(args.run)[1])
    refuse_threshold_without_maps(bags, threshold)
    args.out.mkdir(parents=True, exist_ok=True)
    used = f"{len(run.heads)} trainings of {args.run}" if len(run.heads) > 1 else f"one training of {args.run}"
    many = len(run.classes) > 1
    left = [f"{n}{f' for {label}' if many else ''}" for label, n in zip(run.classes, run.left_out, strict=True) if n]
    used += f"; left out, because they seem to have failed: {', '.join(left)}" if left else ""
    print(f"{len(bags)} bags, {used}", flush=True)
    if run.hopeless:
        print(
            f"warning: all trainings seem to have failed for {', '.join(run.hopeless)}: do not use these predictions; "
            f"see {args.run / 'report.html'}",
            flush=True,
        )
    known = bags_of_training(run)
    if known is not None and (seen := [name for name in bags.names if name in known]):
        print(
            f"note: {len(seen)} of these bags have the name of a bag of {args.run} ({some(seen)}): if they were in the "
            "training, their probabilities do not show how well new bags are predicted",
            flush=True,
        )
    predictions = mean_predictions(run, bags, bags.names)
    rows = ([name, *(f"{v:.6g}" for v in p)] for name, p in zip(bags.names, predictions.bags, strict=True))
    write_csv(["bag", *run.classes], rows, args.out / "bags.csv")
    write_instances(args.out, predictions.by_bag(), run.classes, bags)
    found = thresholds_of(run) if args.gate == RUN else [args.gate] * len(run.classes)
    for label, gate in zip(run.classes, found, strict=True):
        if gate is None:
            print(
                f"warning: the test bags of the run give no threshold for {label}: 0.5 is used; see --gate", flush=True
            )
    gates = [0.5 if gate is None else gate for gate in found]
    boxes = predicted_boxes(predictions, bags, run.classes, gates, threshold)
    maps = bags.shape(bags.names[0]).grid is not None
    if maps or (args.out / "boxes.csv").is_file():  # an older table would belong to other bags
        write_boxes(boxes, args.out / "boxes.csv")
    write_report(args.out, predictions, run.classes, bags, files, args.overlays, used, gates, boxes, threshold)
    for c, (name, gate) in enumerate(zip(run.classes, gates, strict=True)):
        positive = int((predictions.bags[:, c] > gate).sum())
        counted = f", {sum(row[1] == name for row in boxes)} boxes" if maps else ""
        print(f"{name}: p > {shown(gate)} in {positive} of {len(bags)} bags{counted}")
    options.next_step(f"open {args.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
