"""The paper's figures of bags, from runs that are computed where they are missing.

    python reproduce_figures.py --figure 4 --data-dir DIR --quick        minutes, coarse
    python reproduce_figures.py --figure 4 --data-dir DIR                the whole of it: days of one core
    python reproduce_figures.py --figure 5a --data-dir DIR --bags 50 150 --seeds 3
    python reproduce_figures.py --figure 6 --data cifar10.npz            for a GPU
    python reproduce_figures.py --figure queue --data-dir DIR --workers 1     Figure 4, Figure 5a and the control, below

Figure 4: five losses on MNIST-Bags, and top-8 pooling beside them, against the number of training bags, for bags of
10, 50 and 100. Figure 5a: what each part of SGL brings; 5b: what networks say of single bags. Figure 6: CIFAR10-Bags,
against the number of dogs in a bag. ``control``: MMM and BIL by their formulas, and as the authors' code computes them.
``queue`` computes all runs of 4, 5a and the control with one command, in an order that makes the figures useful early:
first the control and SGL and max pooling with seed 0, then the other losses with seed 0, then the other seeds; cheap
runs first. Every run leaves one small file in --out, and is continued after an interruption. A figure, its table and
its numbers are drawn from all files in --out and all rows of --table; --collect adds files to that table.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import sys
import types
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import train_cifar10_bags
import train_mnist_bags
from bags.run_table import content_of, merged, read_table, row_of, settings_of, text_of, write_table
from common.choices import Config
from common.options import default_device, device_name, make_parser, message_of, next_step

if TYPE_CHECKING:  # torch is imported after the options are read: --help is fast
    import torch
    from bags.drawing import Bags
    from bags.instances import Instances

#: name: (label, what train_mnist_bags.py is told). The means are the authors': of logits.
METHODS = {
    "sgl": ("SGL", ["--loss", "sgl"]),
    "max": ("max pooling", ["--loss", "bag", "--pooling", "max"]),
    "mean": ("mean pooling", ["--loss", "bag", "--pooling", "mean_logits"]),
    "mmm": ("MMM", ["--loss", "mmm"]),
    "bil": ("BIL", ["--loss", "bil", "--pooling", "mean_logits"]),
    "sgl_plain": ("max + instance loss", ["--loss", "sgl", "--no-rescale", "--no-weight"]),
    "sgl_rescaled": ("+ rescaling", ["--loss", "sgl", "--no-weight"]),
    "topk": ("top-8 pooling", ["--loss", "bag", "--pooling", "topk"]),
    "mmm_authors": ("MMM, authors' code", ["--loss", "mmm_authors"]),
    "bil_authors": ("BIL, authors' code", ["--loss", "bil_authors"]),
}
BAGS = [50, 100, 150, 200, 300, 400, 500]
FIGURES = {
    "4": ["sgl", "max", "mean", "mmm", "bil", "topk"],
    "5a": ["max", "sgl_plain", "sgl_rescaled", "sgl"],
    "5b": ["max", "sgl"],
    "6": ["sgl", "max", "mean", "bil"],
    "control": ["sgl", "mmm", "mmm_authors", "bil", "bil_authors"],
}
#: Figures whose runs are one queue.
QUEUE = ("control", "4", "5a")
#: Runs of the queue with up to this cost (instances in an epoch) have ten seeds, the others three.
CHEAP = 1500
DEFAULTS = {"data": "mnist", "bags": BAGS, "seeds": 10, "epochs": 300, "sizes": [50], "positives": [0]}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "4": {"sizes": [10, 50, 100]},
    "5a": {},
    "5b": {"bags": [150], "seeds": 1},
    "control": {"bags": [100, 150], "seeds": 3},
    "6": {
        "data": "cifar10", "sizes": [50, 100], "bags": [2500], "positives": [1, 2, 5, 10, 20], "seeds": 5, "epochs": 50,
    },
}  # fmt: skip
QUICK_MNIST = {"bags": [50, 150], "seeds": 1, "epochs": 60}
QUICK = {
    "4": QUICK_MNIST | {"sizes": [10, 50]},
    "5a": QUICK_MNIST,
    "5b": QUICK_MNIST | {"bags": [150]},
    "control": QUICK_MNIST | {"bags": [150]},
    "6": {"sizes": [10], "bags": [100], "positives": [1, 3, 5], "seeds": 1, "epochs": 5},
}
#: Ten times the rate and a fifth of the epochs. In a tenth SGL has hardly begun with 150 bags of 50: IoU 0.28, max
#: pooling 0.54; in a fifth SGL has 0.64.
QUICK_OPTIONS = {figure: ["--lr", "1e-3"] for figure in ("4", "5a", "5b", "control")} | {
    "6": ["--stem", "imagenet", "--lr", "1e-3", "--batch-size", "10", "--val-bags", "50", "--val-every", "5"]
}
#: What a run is named by, and what is asked for apart: --options must not say otherwise.
DECIDED = {
    "--data", "--data-dir", "--bag-size", "--bags", "--epochs", "--seed", "--runs", "--device", "--positives", "--loss",
    "--pooling", "--no-rescale", "--no-weight", "--out", "--resume", "--dry-run",
}  # fmt: skip
X_AXIS = dict.fromkeys(QUEUE, ("bags", "training bags")) | {"6": ("positives", "positive instances")}
LABELS_5A = {"sgl": "+ weighting (SGL)"}
COLOURS = {
    "sgl": "#d55e00", "max": "#0072b2", "mean": "#009e73", "mmm": "#cc79a7", "bil": "#e69f00",
    "sgl_plain": "#999999", "sgl_rescaled": "#56b4e9", "topk": "#000000", "mmm_authors": "#7f3f66",
    "bil_authors": "#7a5200",
}  # fmt: skip
METRICS = {"auc": "AUC of bags", "iou": "IoU, mean over bags", "iou_pooled": "IoU, pooled over 64 bags"}


#: Seconds between two checkpoints of a run: at most so much is computed twice after an interruption.
SAVE_EVERY = 60.0
#: Beside the table: what the networks of Figure 5b say of single instances.
SHOWN = "figure5b.json"


class Run(NamedTuple):
    method: str
    size: int
    bags: int
    seed: int
    positives: int = 0  # 0: MNIST-Bags, where chance decides

    @property
    def name(self) -> str:
        positives = f"positives{self.positives}_" if self.positives else ""
        return f"size{self.size}_{positives}bags{self.bags}_{self.method}_seed{self.seed}"

    @property
    def cost(self) -> int:
        """In instances of an epoch."""
        return self.size * self.bags

    @property
    def example(self) -> types.ModuleType:
        return train_cifar10_bags if self.positives else train_mnist_bags


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("figure").add_argument
    add("--figure", choices=[*FIGURES, "queue"], required=True, help="what is computed and drawn")
    add(
        "--data",
        help="mnist, digits, cifar10, or an .npz file (train_mnist_bags.py --help) (mnist; 6: cifar10)",
    )
    add("--data-dir", default="data", help="folder of MNIST or CIFAR-10")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--sizes", nargs="+", type=int, help="instances in a bag (4: 10 50 100; 5a, 5b: 50; 6: 50 100)")
    add("--bags", nargs="+", type=int, help=f"training bags ({' '.join(map(str, BAGS))}; 5b: 150; 6: 2500)")
    add("--positives", nargs="+", type=int, help="6: instances of the target class in a positive bag (1 2 5 10 20)")
    add("--seeds", type=int, help="runs of everything (10; 5b: 1; 6: 5)")
    add("--epochs", type=int, help="passes over the training bags (300; 6: 50)")
    add("--quick", action="store_true", help="a coarse version: small bags and few of them, 1 seed, few epochs")
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, default=0, help="runs at once (a core each; on a GPU 1)")
    add("--device", type=device_name, help="cpu or cuda (cuda where there is a GPU)")
    add("--out", type=Path, help="folder of the files (runs/figures, runs/figures_quick)")
    add("--table", type=Path, help="CSV of runs, a row each; runs in it are not computed again (OUT/runs.csv)")
    add(
        "--collect", nargs="+", type=Path, metavar="FOLDER", default=[],
        help="add the runs whose files are in these folders to --table first; the files stay",
    )  # fmt: skip
    add("--draw-only", action="store_true", help="compute nothing")
    add(
        "--options",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: more for the training command, as --options --stem imagenet --lr 1e-3",
    )
    args = parser.parse_args(argv)
    args.device = args.device or default_device()
    if args.figure == "queue" and any((args.methods, args.sizes, args.bags, args.seeds, args.quick, args.options)):
        parser.error(
            "--figure queue: --methods, --sizes, --bags, --seeds, --quick and --options are those of its figures"
        )
    defaults = DEFAULTS | DEFAULTS_OF.get(args.figure, {}) | (QUICK[args.figure] if args.quick else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.options = [*(QUICK_OPTIONS[args.figure] if args.quick else []), *args.options]
    taken = DECIDED & {option.split("=")[0] for option in args.options}
    if taken:
        parser.error(
            f"--options: {', '.join(sorted(taken))} is decided by the figure, or has an option of its own here"
        )
    if args.figure == "6" and len(args.bags) > 1:
        parser.error("--bags: figure 6 is of one number of training bags")
    if (args.figure == "6") != any(args.positives):
        parser.error("--positives: expected at least 1 for figure 6, and for no other")
    if min(*args.sizes, *args.bags, args.seeds, args.epochs) < 1 or min(args.workers, *args.positives) < 0:
        parser.error("--sizes, --bags, --seeds, --epochs: expected at least 1, --workers at least 0")
    args.methods = args.methods or FIGURES.get(args.figure)
    args.out = args.out or Path("runs", "figures_quick" if args.quick else "figures")
    args.table = args.table or args.out / "runs.csv"
    args.workers = args.workers or (1 if args.device != "cpu" else os.cpu_count() or 1)
    return args


def options_of(run: Run, args: argparse.Namespace) -> list[str]:
    """What the training command would be told."""
    options = [
        "--data", args.data, "--data-dir", args.data_dir, "--bag-size", str(run.size), "--bags", str(run.bags),
        "--epochs", str(args.epochs), "--seed", str(run.seed), "--device", args.device,
    ]  # fmt: skip
    if run.positives:
        options += ["--positives", str(run.positives), "--runs", "1"]
    else:
        # a figure shows the last network alone
        options += ["--val-every", str(args.epochs), "--lr", "1e-4"]
    return [*options, *METHODS[run.method][1], *args.options]


def config_of(run: Run, args: argparse.Namespace) -> Config:
    (config,) = run.example.configs_of(run.example.parse(options_of(run, args))).values()
    return config


def compute(run: Run, args: argparse.Namespace) -> Path:
    """Train, test, and write the run's file; from the last full epoch on where it was interrupted."""
    import torch
    from bags.experiment import bags_of, numbers_to_show
    from bags.training import train_run
    from common.environment import commit, machine
    from common.files import write_json

    if args.device == "cpu":
        torch.set_num_threads(1)  # as many runs at once as there are cores
    config = config_of(run, args)
    target, checkpoint = args.out / f"{run.name}.json", args.out / f"{run.name}.pt"
    instances = loaded(args.data, args.data_dir)
    images, bags = bags_of(instances, config, run.seed, args.device)
    trained_by = commit()
    channels = instances.train_images.shape[1]
    make_model = run.example.make_model
    entry, history, model = train_run(
        lambda: make_model(config, channels), config, run.seed, images, bags, checkpoint, resume=True, quiet=True,
        save_every=SAVE_EVERY,
    )  # fmt: skip
    state = torch.load(checkpoint, weights_only=True)
    content = {
        "run": run._asdict(),
        "config": config | {"data": Path(args.data).name},
        "result": entry,
        "training_loss": round(history[-1]["loss"], 6),
        "shown": [shown(model, images["test"], bags["test"], n) for n in numbers_to_show(bags["test"], 3, 1)],
        "command": f"python {run.example.__name__}.py " + " ".join(without_paths(options_of(run, args))),
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
    """The instances; a process that computes several runs loads them once."""
    from bags.instances import load_instances

    return load_instances(data, data_dir)


def shown(model: torch.nn.Module, images: torch.Tensor, bags: Bags, number: int) -> dict[str, Any]:
    """What Figure 5b needs of test bag ``number``, of the network of the last epoch."""
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
    """What others can type: the folder of the data is theirs."""
    named = {"--data-dir": lambda path: "DIR", "--data": lambda path: Path(path).name}
    return [named.get(before, str)(option) for before, option in zip(["", *options], options, strict=False)]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def compute_all(runs: list[Run], found: Collection[Run], args: argparse.Namespace) -> None:
    """Those that are not in ``found``: the runs of the queue in its order; else seed by seed, cheap ones first."""
    from bags.instances import load_instances
    from common.workers import compute_in_workers
    from tqdm import tqdm

    args.out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if run not in found]
    if args.figure != "queue":
        missing.sort(key=lambda run: (run.seed, run.cost))
    print(f"{len(runs)} runs, {len(missing)} of them to compute, {args.workers} at once, into {args.out}/", flush=True)
    if not missing:
        return
    # one load, so that a wrong folder is told at once and a download happens once
    load_instances(args.data, args.data_dir)
    unit = sum(run.cost for run in missing) / 1000
    bar = "{l_bar}{bar}| {elapsed} gone, {remaining} to go{postfix}"
    with tqdm(total=1000, bar_format=bar, disable=None) as progress:
        for run, path in compute_in_workers(compute, missing, args.workers, args):
            result = read(path)["result"]["last"]
            progress.update(run.cost / unit)
            progress.write(f"{run.name}: " + ", ".join(f"{name} {result[name]:.3f}" for name in METRICS))


def expected_settings(run: Run, args: argparse.Namespace) -> dict[str, str]:
    """The settings that a row of the table has if the run was trained as it would be now."""
    return settings_of({k: text_of(v) for k, v in (config_of(run, args) | {"data": Path(args.data).name}).items()})


def differing(settings: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of the settings in which two runs differ. A setting that an older run does not name is no difference."""
    return [name for name in expected if settings.get(name, expected[name]) != expected[name]]


def collect(runs: list[Run], args: argparse.Namespace) -> dict[Run, dict[str, Any]]:
    """What the files in --out and the rows of the table hold of ``runs``, by run.

    Raises:
        ValueError: a file is of a run that was trained otherwise. Rows of other settings are no error.
    """
    found = {}
    rows = [(row["seed"], settings_of(row), row) for row in read_table(args.table)]
    kept = read(args.out / SHOWN) if (args.out / SHOWN).exists() else []
    for run in runs:
        path = args.out / f"{run.name}.json"
        expected = expected_settings(run, args)
        if path.exists():
            found[run] = content = read(path)
            settings = settings_of({name: text_of(value) for name, value in content["config"].items()})
            other = differing(settings, expected)
            if other:
                there, here = ({name: each.get(name) for name in other} for each in (settings, expected))
                raise ValueError(f"out: {path} is of {there}, not {here}")
            continue
        for seed, settings, row in rows:
            if seed == str(run.seed) and not differing(settings, expected):
                found[run] = content_of(row)
                for entry in kept:
                    if entry["run"] == run.name and not differing(entry["settings"], expected):
                        found[run]["shown"] = entry["shown"]
                break
    return found


def add_to_table(folders: list[Path], args: argparse.Namespace) -> None:
    """Adds the runs of the files in ``folders`` to the table, and what Figure 5b shows of them to a file beside it."""
    from common.files import write_json

    contents = [read(path) for folder in folders for path in sorted(folder.glob("size*.json"))]
    args.table.parent.mkdir(parents=True, exist_ok=True)
    write_table(merged(read_table(args.table), map(row_of, contents)), args.table)
    wanted = parse_arguments(["--figure", "5b", "--data", args.data])
    path = args.table.parent / SHOWN
    kept = read(path) if path.exists() else []
    for run in (Run(method, wanted.sizes[0], wanted.bags[0], 0) for method in wanted.methods):
        for content in contents:
            settings = settings_of({name: text_of(value) for name, value in content["config"].items()})
            same = content["run"] == run._asdict() and not differing(settings, expected_settings(run, wanted))
            if same and "shown" in content and run.name not in [entry["run"] for entry in kept]:
                kept.append({"run": run.name, "settings": settings, "shown": content["shown"]})
    if kept:
        write_json(kept, path)


def queue() -> list[Run]:
    """All runs of the figures in QUEUE, each once, in the order in which they are computed."""
    third: dict[Run, int] = {}
    for figure in QUEUE:
        settings = DEFAULTS | DEFAULTS_OF[figure]
        for method, size, bags in itertools.product(FIGURES[figure], settings["sizes"], settings["bags"]):
            for seed in range(10 if size * bags <= CHEAP else 3):
                first = figure == "control" or method in ("sgl", "max")
                third.setdefault(Run(method, size, bags, seed), 2 if seed else 0 if first else 1)
    control = min(DEFAULTS_OF["control"]["bags"])  # its cheapest point comes before all other runs

    def order(run: Run) -> tuple[int, bool, int, int]:
        return third[run], (run.bags, run.method.endswith("authors")) != (control, True), run.cost, run.seed

    return sorted(third, key=order)


def label_of(method: str, figure: str) -> str:
    return LABELS_5A.get(method, METHODS[method][0]) if figure == "5a" else METHODS[method][0]


def values_of(found: dict[Run, dict[str, Any]], metric: str, **point: Any) -> list[float]:
    """What the networks of the last epoch reached, a value for each seed."""
    return [
        content["result"]["last"][metric]
        for run, content in found.items()
        if all(getattr(run, name) == value for name, value in point.items())
    ]


def draw(found: dict[Run, dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """A row for each metric, a column for each size; lines are means, bands reach from the worst seed to the best."""
    import numpy as np
    from common.files import naming
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis, axis_title = X_AXIS[args.figure]
    sizes = [size for size in args.sizes if any(run.size == size for run in found)]
    figure = Figure(figsize=(3.6 * len(sizes) + 1.6, 2.5 * len(METRICS)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(METRICS), len(sizes), squeeze=False, sharex="col", sharey="row")
    for (row, (metric, title)), (column, size) in itertools.product(enumerate(METRICS.items()), enumerate(sizes)):
        axes = grid[row, column]
        for method in args.methods:
            points = {x: values_of(found, metric, method=method, size=size, **{axis: x}) for x in getattr(args, axis)}
            points = {x: values for x, values in points.items() if values}
            if not points:
                continue
            x = list(points)
            axes.plot(x, [np.mean(v) for v in points.values()], marker="o", ms=4, color=COLOURS[method],
                      label=label_of(method, args.figure))  # fmt: skip
            low, high = ([of(v) for v in points.values()] for of in (min, max))
            axes.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, lw=0)
        axes.grid(alpha=0.3)
        axes.set_xticks(sorted({getattr(run, axis) for run in found}))
        axes.set(ylim=(0.4 if metric == "auc" else 0.0, 1.0))
        if row == 0:
            axes.set_title(f"bags of {size}")
        if column == 0:
            axes.set_ylabel(title)
        if row == len(METRICS) - 1:
            axes.set_xlabel(axis_title)
    # a column may lack methods that others have
    lines = {line.get_label(): line for axes in reversed(grid[0]) for line in axes.get_lines()}
    labels = [label for label in (label_of(method, args.figure) for method in args.methods) if label in lines]
    figure.legend([lines[label] for label in labels], labels, loc="outside right upper", frameon=False)
    paths = [args.out / f"figure{args.figure}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        with naming(path):
            figure.savefig(path)
    return paths


def draw_examples(found: dict[Run, dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """Figure 5b: the first test bags, and beside each other what the methods say of them."""
    import numpy as np
    from bags.experiment import pictures_of
    from bags.instances import load_instances
    from bags.plots import draw_bags

    (size, *_), (bags, *_) = args.sizes, args.bags
    contents = {run.method: content for run, content in found.items() if run[1:4] == (size, bags, 0)}
    if not contents:
        raise ValueError(f"out: {args.out} has no run of {bags} bags of {size} and seed 0")
    if any("shown" not in content for content in contents.values()):
        raise ValueError(f"out: runs in {args.out} do not hold what their networks say of single bags; remove them")
    images = load_instances(args.data, args.data_dir).test_images
    panels = []
    for number in range(len(next(iter(contents.values()))["shown"])):
        for method, content in contents.items():
            bag = {name: np.array(value) for name, value in content["shown"][number].items()}
            positive = bag["positive"].astype(bool)
            label = "positive" if positive.any() else "negative"
            title = f"{METHODS[method][0]}, test bag {bag['number']}: labelled {label}"
            panels.append((pictures_of(images[bag["index"]]), bag["probability"], positive, title))
    paths = [args.out / f"figure5b.{kind}" for kind in ("png", "svg")]
    heading = f"What the networks say of single instances, after training with {bags} bags of {size}"
    for path in paths:
        draw_bags(panels, len(contents), heading, path, shown=20)
    return paths


def write_tables(found: dict[Run, dict[str, Any]], args: argparse.Namespace) -> list[Path]:
    """Means, worst and best of every point, as Markdown for people and as CSV for machines."""
    import numpy as np
    from common.files import naming

    axis, axis_title = X_AXIS[args.figure]
    lines = [
        f"| bags of | {axis_title} | loss | seeds | " + " | ".join(METRICS.values()) + " |",
        "|---" * (4 + len(METRICS)) + "|",
    ]
    rows = []
    for size, x, method in itertools.product(args.sizes, getattr(args, axis), args.methods):
        cells = []
        row: dict[str, Any] = {"size": size, axis: x, "method": method}
        for metric in METRICS:
            values = values_of(found, metric, size=size, method=method, **{axis: x})
            if not values:
                break
            row |= {"seeds": len(values), metric: np.mean(values)}
            row |= {f"{metric}_worst": min(values), f"{metric}_best": max(values)}
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        else:
            cells = [str(size), str(x), label_of(method, args.figure), str(row["seeds"]), *cells]
            lines.append("| " + " | ".join(cells) + " |")
            rows.append({name: round(float(v), 4) if isinstance(v, float) else v for name, v in row.items()})
    table, numbers = (args.out / f"figure{args.figure}.{kind}" for kind in ("md", "csv"))
    with naming(table):
        table.write_text("\n".join(lines) + "\n")
    with naming(numbers), numbers.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [table, numbers]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.figure == "queue":
        runs = queue()
    else:
        points = itertools.product(args.methods, args.sizes, args.bags, range(args.seeds), args.positives)
        runs = [Run(*point) for point in points]
    try:
        if args.collect:
            add_to_table(args.collect, args)
        found = collect(runs, args)  # a file that does not fit is reported before anything is computed
        if not args.draw_only:
            compute_all(runs, found, args)
        found = collect(runs, args)
        if not found:
            raise ValueError(f"out: there is no run of figure {args.figure} in {args.out}")
        if args.figure == "queue":
            print(f"{len(found)} of {len(runs)} runs of the queue are in {args.out}")
            next_step(f"python reproduce_figures.py --figure 4 --data-dir {args.data_dir} --out {args.out} --draw-only")
            return 0
        if args.figure == "5b":
            paths = draw_examples(found, args)
        else:
            paths = [*draw(found, args), *write_tables(found, args)]
            print((args.out / f"figure{args.figure}.md").read_text())
    except (ValueError, OSError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    print("written:", ", ".join(map(str, paths)))
    next_step(f"open {paths[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
