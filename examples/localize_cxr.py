"""Evaluates the classification and localization of a trained network on the test images of a data set.

    python localize_cxr.py --run RUN --data-dir DIR                     writes into RUN/localization
    python localize_cxr.py --run RUN BASELINE --data-dir DIR --out OUT  compares two runs
    python localize_cxr.py --run RUN --data-dir DIR --threshold validation --gate validation

A map becomes a box as in section 4.4 of the paper (sgl_ops.localization.heatmap_to_box). A true box counts as found if
the IoU of the predicted box with it is greater than T_IoU. With the gate, the class must also be predicted. The options
set both thresholds, or the labels of the validation images determine them. True boxes do not influence them. It is an
error if the network was trained on test images.

Writes into --out metrics.json, details.json (settings, thresholds, intervals), predictions.csv (one row per image),
boxes.csv (one row per true box), localization.png and report.html. The tables of a second run go into OUT/baseline.
"""

from __future__ import annotations

import argparse
import sys

from common.options import exit_status, make_parser, next_step, path_of
from images.options import add_data_options
from images.run_options import add_box_options, add_network_options, check


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = add_data_options(parser, required=True).add_argument
    add("--cache", type=path_of, help="folder of decoded images, as for train_cxr.py")
    add_network_options(parser, "a run folder of train_cxr.py, and optionally a second one to compare with")
    add_box_options(parser, labels=True)
    add = parser.add_argument_group("report").add_argument
    add("--out", type=path_of, help="folder of the results (RUN/localization)")
    add("--draws", type=int, default=1000, help="bootstrap draws for the confidence intervals (1000)")
    add("--seed", type=int, default=0, help="seed of these draws (0)")
    add("--gallery", type=int, default=1000, help="largest number of boxes in the report; 0: no pictures (1000)")
    add("--gallery-size", type=int, default=320, help="side of the images in the report, in pixels (320)")
    args = parser.parse_args(argv)
    check(parser, args)
    if len(args.run) > 2:
        parser.error(f"--run: expected one or two, got {len(args.run)}")
    if args.draws < 1:
        parser.error(f"--draws: expected at least 1, got {args.draws}")
    args.out = args.out or args.run[0] / "localization"
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return exit_status(lambda: localize(args))


def localize(args: argparse.Namespace) -> None:
    """Evaluates the runs and writes the results.

    Raises:
        ValueError: the data set or a run cannot be used, or they do not match.
        OSError: a file cannot be written.
    """
    from images.dataset import with_classes
    from images.evaluation import evaluate, open_networks
    from images.figure import draw
    from images.open_dataset import open_dataset
    from images.provenance import trained_names, trained_patients
    from images.report import write_report
    from images.tables import clear_baseline, distinct_names, print_table, write_tables
    from images.truth import refuse_trained, truth_of

    networks = open_networks(args.run, args)
    config = networks[0].config
    if args.fit not in (None, config["fit"]):
        raise ValueError(f"fit: {args.run[0]} was trained with {config['fit']}, got {args.fit}")
    index = with_classes(open_dataset(args, args.allow_missing), config["classes"], f"run: {args.run[0]}")
    truth = truth_of(index._replace(about=index.about._replace(fit=config["fit"], channels=config["channels"])))
    part = index.about.test_name
    if not len(truth.rows):
        raise ValueError(f"data-dir: no image of the {part} is in {args.data_dir}")
    for run in args.run:
        names = trained_names(run)
        refuse_trained(truth, names, trained_patients(run, names, index), run)
    # fail before the networks run if the folder cannot be written
    args.out.mkdir(parents=True, exist_ok=True)
    baseline_folder = args.out / "baseline"
    clear_baseline(baseline_folder, len(args.run) > 1)
    boxed = len(set(truth.image))
    print(f"{len(truth.rows)} images of the {part}, {truth.box_count} boxes on {boxed} of them", flush=True)
    runs = [evaluate(network, truth, args) for network in networks]
    if len({run.name for run in runs}) < len(runs):
        names = distinct_names(args.run)
        runs = [run._replace(name=f"{run.name} ({name})") for run, name in zip(runs, names, strict=True)]
    for run, folder in zip(runs, (args.out, baseline_folder), strict=False):
        write_tables(run, truth, folder)
    if len(truth.boxes):
        draw(runs, truth, args.out / "localization.png", args.upsampling)
    sentences = write_report(runs, truth, args, args.out / "report.html")
    print_table(runs, truth.official)
    print("\n" + "\n".join(sentences))
    next_step(f"open {args.out / 'report.html'} in a browser")


if __name__ == "__main__":
    sys.exit(main())
