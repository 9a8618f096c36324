"""Reproduces the paper's figures of bags: computes the missing runs and draws the figures.

    python reproduce_figures.py --figure 4 --data-dir DIR --quick        a coarse version, in minutes
    python reproduce_figures.py --figure 4 --data-dir DIR                the whole figure: days on one core
    python reproduce_figures.py --figure 5a --data-dir DIR --bags 50 150 --seeds 3    a part of a figure
    python reproduce_figures.py --figure 6 --data cifar10.npz            for a GPU
    python reproduce_figures.py --figure queue --data-dir DIR --workers 1     Figure 4, Figure 5a and the control, below

Figure 4: five losses, and top-8 pooling, on MNIST-Bags with 10, 50 and 100 instances per bag, over the number
of training bags. Figure 5a: the effect of each part of SGL. Figure 5b: the predictions of networks for single bags.
Figure 6: CIFAR10-Bags, over the number of dogs in a bag. ``control``: MMM and BIL by their formulas and by the authors'
code. ``start``: max pooling, SGL and top-8 pooling, and both losses after a start with top-k pooling whose k falls from
half of the bag to 1. ``queue`` computes all runs of 4, 5a and the control, in an order that gives useful figures early:
first the control, SGL and max pooling with seed 0, then the other losses with seed 0, then the other seeds. Within each
of these groups, cheap runs come first.

Every run writes one small file into --out. After an interruption, the same command continues. A figure and its table
show all files in --out and all rows of --table. --collect adds the files to that table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import types
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train_cifar10_bags
import train_mnist_bags
from bags.figure_runs import BAGS, DEFAULTS, DEFAULTS_OF, FIGURES, METHODS, QUICK, QUICK_OPTIONS, Run, queue
from bags.figures import METRICS, draw, draw_examples
from bags.run_table import merged, read_table, row_of_run, run_of_row, settings_of, text_of, write_table
from common.choices import Config
from common.files import read_json, write_json
from common.options import default_device, device_name, exit_status, make_parser, next_step

if TYPE_CHECKING:  # torch is imported after the options are read: --help is fast
    import torch
    from bags.drawing import Bags
    from bags.instances import Instances

#: Options that the figure, or an option of this command, decides. --options must not contain them.
DECIDED = {
    "--data", "--data-dir", "--bag-size", "--bags", "--epochs", "--seed", "--runs", "--device", "--positives", "--loss",
    "--pooling", "--no-rescale", "--no-weight", "--out", "--resume", "--dry-run",
}  # fmt: skip
#: Seconds between two checkpoints of a run. At most this much work is lost by an interruption.
SAVE_EVERY = 60.0
#: A file in the folder of the table: the predictions of the networks of Figure 5b for single instances.
SHOWN = "figure5b.json"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("figure").add_argument
    add("--figure", choices=[*FIGURES, "queue"], required=True, help="the figure to compute and draw")
    add(
        "--data",
        help="mnist, digits, cifar10, or an .npz file (train_mnist_bags.py --help) (mnist; 6: cifar10)",
    )
    add("--data-dir", default="data", help="folder of MNIST or CIFAR-10")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"methods of the figure, of {', '.join(METHODS)}")
    add("--sizes", nargs="+", type=int, help="instances in a bag (4: 10 50 100; 5a, 5b: 50; 6: 50 100)")
    add("--bags", nargs="+", type=int, help=f"training bags ({' '.join(map(str, BAGS))}; 5b: 150; 6: 2500)")
    add("--positives", nargs="+", type=int, help="6: instances of the target class in a positive bag (1 2 5 10 20)")
    add("--seeds", type=int, help="seeds of every method and size (10; 5b: 1; 6: 5)")
    add("--epochs", type=int, help="passes over the training bags (300; 6: 50)")
    add("--quick", action="store_true", help="a coarse version: few small bags, 1 seed, few epochs")
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=0, help="parallel runs (one per core; on a GPU 1)")
    add("--device", type=device_name, help="cpu or cuda (cuda if there is a GPU)")
    add("--out", type=Path, help="folder of the files (runs/figures, runs/figures_quick)")
    add("--table", type=Path, help="CSV with one row per run; its runs are not computed again (OUT/runs.csv)")
    add(
        "--collect", nargs="+", type=Path, metavar="FOLDER", default=[],
        help="first add the runs in these folders to --table; their files stay",
    )  # fmt: skip
    add("--draw-only", action="store_true", help="draw the figure without computing runs")
    add(
        "--options",
        nargs=argparse.REMAINDER,
        default=[],
        help="more options of the training command, after all others: --options --stem imagenet --lr 1e-3",
    )
    args = parser.parse_args(argv)
    args.device = args.device or default_device()
    if args.figure == "queue" and any((args.methods, args.sizes, args.bags, args.seeds, args.quick, args.options)):
        parser.error("--figure queue: sets --methods, --sizes, --bags, --seeds, --quick and --options; leave them out")
    defaults = DEFAULTS | DEFAULTS_OF.get(args.figure, {}) | (QUICK[args.figure] if args.quick else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.options = [*(QUICK_OPTIONS[args.figure] if args.quick else []), *args.options]
    forbidden = DECIDED & {option.split("=")[0] for option in args.options}
    if forbidden:
        parser.error(
            f"--options: {', '.join(sorted(forbidden))} cannot be given here: the figure or another option sets it"
        )
    if args.figure == "6" and len(args.bags) > 1:
        parser.error(f"--bags: expected one number for figure 6, got {args.bags}")
    if (args.figure == "6" and not all(args.positives)) or (args.figure != "6" and any(args.positives)):
        parser.error("--positives: expected at least 1 for figure 6, and none for other figures")
    if min(*args.sizes, *args.bags, args.seeds, args.epochs) < 1 or min(args.workers, *args.positives) < 0:
        parser.error("--sizes, --bags, --seeds, --epochs: expected at least 1, --workers at least 0")
    args.methods = args.methods or FIGURES.get(args.figure)
    args.out = args.out or Path("runs", "figures_quick" if args.quick else "figures")
    args.table = args.table or args.out / "runs.csv"
    args.workers = args.workers or (1 if args.device != "cpu" else os.cpu_count() or 1)
    return args


def command_of(run: Run) -> types.ModuleType:
    """The module of the command that trains ``run``."""
    return train_cifar10_bags if run.positives else train_mnist_bags


def options_of(run: Run, args: argparse.Namespace) -> list[str]:
    """The options of the training command for ``run``."""
    options = [
        "--data", args.data, "--data-dir", args.data_dir, "--bag-size", str(run.size), "--bags", str(run.bags),
        "--epochs", str(args.epochs), "--seed", str(run.seed), "--device", args.device,
    ]  # fmt: skip
    if run.positives:
        options += ["--positives", str(run.positives), "--runs", "1"]
    else:
        # a figure shows only the network of the last epoch
        options += ["--val-every", str(args.epochs), "--lr", "1e-4"]
    return [*options, *METHODS[run.method][1], *args.options]


def config_of(run: Run, args: argparse.Namespace) -> Config:
    command = command_of(run)
    (config,) = command.configs_of(command.parse(options_of(run, args))).values()
    return config


def compute(run: Run, args: argparse.Namespace) -> Path:
    """Trains, tests, and writes the file of the run. Continues an interrupted run after its last checkpoint."""
    import torch
    from bags.experiment import bags_of, numbers_to_show
    from bags.training import train_run
    from common.environment import commit, machine

    if args.device == "cpu":
        torch.set_num_threads(1)  # one run per core
    config = config_of(run, args)
    target, checkpoint = args.out / f"{run.name}.json", args.out / f"{run.name}.pt"
    instances = loaded(args.data, args.data_dir)
    images, bags = bags_of(instances, config, run.seed, args.device)
    trained_by = commit()
    channels = instances.train_images.shape[1]
    command = command_of(run)
    entry, history, model = train_run(
        lambda: command.make_model(config, channels), config, run.seed, images, bags, checkpoint, resume=True,
        quiet=True, save_every=SAVE_EVERY,
    )  # fmt: skip
    state = torch.load(checkpoint, weights_only=True)
    content = {
        "run": run._asdict(),
        "config": config | {"data": Path(args.data).name},
        "result": entry,
        "training_loss": round(history[-1]["loss"], 6),
        "shown": [shown(model, images["test"], bags["test"], n) for n in numbers_to_show(bags["test"], 3, 1)],
        "command": f"python {command.__name__}.py " + " ".join(without_paths(options_of(run, args))),
        "seconds": round(state["seconds"], 1),
        "cpu_seconds": round(state["cpu_seconds"], 1),
        "commit": trained_by,
        "machine": f"{args.device}, {machine()}, torch {torch.__version__}",
    }
    write_json(content, target)
    checkpoint.unlink()
    return target


@functools.lru_cache(maxsize=1)
def loaded(data: str, data_dir: str) -> Instances:
    """The instances. A process that computes several runs loads them once."""
    from bags.instances import load_instances

    return load_instances(data, data_dir)


def shown(model: torch.nn.Module, images: torch.Tensor, bags: Bags, number: int) -> dict[str, Any]:
    """The data of test bag ``number`` for Figure 5b, with the network of the last epoch."""
    import torch
    from bags.training import instance_logits

    inside = slice(int(bags.offsets[number]), int(bags.offsets[number + 1]))
    probability = torch.sigmoid(instance_logits(model, images, bags.index[inside]))
    return {
        "number": number,
        "index": bags.index[inside].tolist(),
        "positive": bags.positive[inside].int().tolist(),
        "probability": [round(p, 4) for p in probability.tolist()],
    }


def without_paths(options: list[str]) -> list[str]:
    """``options`` without the folder of the data."""
    named = {"--data-dir": lambda path: "DIR", "--data": lambda path: Path(path).name}
    return [named.get(before, str)(option) for before, option in zip(["", *options], options, strict=False)]


def compute_all(runs: list[Run], found: Collection[Run], args: argparse.Namespace) -> None:
    """Computes the runs that are not in ``found``: those of the queue in its order, others by seed and cost."""
    from bags.instances import load_instances
    from common.progress import Progress
    from common.workers import compute_in_workers

    args.out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if run not in found]
    if args.figure != "queue":
        missing.sort(key=lambda run: (run.seed, run.cost))
    print(f"{len(runs)} runs, {len(missing)} of them to compute, {args.workers} at once, into {args.out}/", flush=True)
    if not missing:
        return
    # Load the data before the workers start: a wrong folder is reported at once, and data are downloaded only once.
    load_instances(args.data, args.data_dir)
    unit = sum(run.cost for run in missing) / 1000
    bar = "{l_bar}{bar}| {elapsed} elapsed, {remaining} left{postfix}"
    with Progress(total=1000, bar_format=bar) as progress:
        for run, path in compute_in_workers(compute, missing, args.workers, args):
            result = read_json(path)["result"]["last"]
            progress.update(run.cost / unit)
            progress.write(f"{run.name}: " + ", ".join(f"{name} {result[name]:.3f}" for name in METRICS))


def expected_settings(run: Run, args: argparse.Namespace) -> dict[str, str]:
    """The settings that the row of ``run`` has if it is trained by this command."""
    return settings_of({k: text_of(v) for k, v in (config_of(run, args) | {"data": Path(args.data).name}).items()})


def differing(settings: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of the settings in which two runs differ. A setting that is missing in an older run is no difference."""
    return [name for name in expected if settings.get(name, expected[name]) != expected[name]]


def collect(runs: list[Run], args: argparse.Namespace) -> dict[Run, dict[str, Any]]:
    """The results of ``runs`` in the files in --out and in the table, by run.

    Raises:
        ValueError: a file has a run with other settings. Rows of the table with other settings are no error.
    """
    found = {}
    rows = [(row["seed"], settings_of(row), row) for row in read_table(args.table)]
    shown = args.table.parent / SHOWN
    kept = read_json(shown) if shown.exists() else []
    for run in runs:
        path = args.out / f"{run.name}.json"
        expected = expected_settings(run, args)
        if path.exists():
            found[run] = content = read_json(path)
            settings = settings_of({name: text_of(value) for name, value in content["config"].items()})
            other = differing(settings, expected)
            if other:
                was, now = ({name: each.get(name) for name in other} for each in (settings, expected))
                raise ValueError(f"out: {path} was computed with {was}, not {now}")
            continue
        for seed, settings, row in rows:
            if seed == str(run.seed) and not differing(settings, expected):
                found[run] = run_of_row(row)
                for entry in kept:
                    if entry["run"] == run.name and not differing(entry["settings"], expected):
                        found[run]["shown"] = entry["shown"]
                break
    return found


def add_to_table(folders: list[Path], args: argparse.Namespace) -> None:
    """Adds the runs of the files in ``folders`` to the table, and their data for Figure 5b to the file SHOWN."""

    contents = [read_json(path) for folder in folders for path in sorted(folder.glob("size*.json"))]
    args.table.parent.mkdir(parents=True, exist_ok=True)
    write_table(merged(read_table(args.table), map(row_of_run, contents)), args.table)
    wanted = parse_arguments(["--figure", "5b", "--data", args.data])
    path = args.table.parent / SHOWN
    kept = read_json(path) if path.exists() else []
    for run in (Run(method, wanted.sizes[0], wanted.bags[0], 0) for method in wanted.methods):
        for content in contents:
            settings = settings_of({name: text_of(value) for name, value in content["config"].items()})
            same = content["run"] == run._asdict() and not differing(settings, expected_settings(run, wanted))
            if same and "shown" in content and run.name not in [entry["run"] for entry in kept]:
                kept.append({"run": run.name, "settings": settings, "shown": content["shown"]})
    if kept:
        write_json(kept, path)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return exit_status(lambda: reproduce(args), "stopped; the same command continues")


def reproduce(args: argparse.Namespace) -> None:
    """Collects and computes the runs, and draws the figure."""
    if args.figure == "queue":
        runs = queue()
    else:
        points = itertools.product(args.methods, args.sizes, args.bags, range(args.seeds), args.positives)
        runs = [Run(*point) for point in points]
    if args.collect:
        add_to_table(args.collect, args)
    found = collect(runs, args)  # a file with other settings is an error before the first computation
    if not args.draw_only:
        compute_all(runs, found, args)
    found = collect(runs, args)
    if not found:
        raise ValueError(f"out: there is no run of figure {args.figure} in {args.out}")
    if args.figure == "queue":
        print(f"{len(found)} of {len(runs)} runs of the queue are in {args.out}")
        next_step(f"python reproduce_figures.py --figure 4 --data-dir {args.data_dir} --out {args.out} --draw-only")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.figure == "5b":
        paths = draw_examples(found, args)
    else:
        from bags.figure_tables import write_tables

        paths = [*draw(found, args), *write_tables(found, args)]
        print((args.out / f"figure{args.figure}.md").read_text(encoding="utf-8"))
    print("written:", ", ".join(map(str, paths)))
    next_step(f"open {paths[0]}")


if __name__ == "__main__":
    sys.exit(main())
