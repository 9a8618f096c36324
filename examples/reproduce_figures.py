"""The paper's figures on MNIST-Bags, from runs that are computed where they are missing.

    python reproduce_figures.py --figure 4 --data mnist --data-dir DIR --quick      minutes, coarse
    python reproduce_figures.py --figure 4 --data mnist --data-dir DIR              the whole of it: days of one core
    python reproduce_figures.py --figure 5a --data mnist --data-dir DIR --sizes 50 --bags 50 150 --seeds 3

Figure 4: five losses against the number of training bags, for bags of 10, 50 and 100. Figure 5a: what each part of SGL
brings. Every run leaves one small file in --out, and is continued after an interruption; a figure, its table and its
numbers are drawn from all files that are there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bags import Bags
from instances import load_instances
from tqdm import tqdm
from train_mnist_bags import LeNet, bags_of, configs_of, numbers_to_show, parse
from training import instance_logits, train_run, write_json

#: name: (label, what train_mnist_bags.py is told). The means are the authors': of logits.
METHODS = {
    "sgl": ("SGL", ["--loss", "sgl"]),
    "max": ("max pooling", ["--loss", "bag", "--pooling", "max"]),
    "mean": ("mean pooling", ["--loss", "bag", "--pooling", "mean_logits"]),
    "mmm": ("MMM", ["--loss", "mmm"]),
    "bil": ("BIL", ["--loss", "bil", "--pooling", "mean_logits"]),
    "sgl_plain": ("max + instance loss", ["--loss", "sgl", "--no-rescale", "--no-weight"]),
    "sgl_rescaled": ("+ rescaling", ["--loss", "sgl", "--no-weight"]),
}
FIGURES = {"4": ["sgl", "max", "mean", "mmm", "bil"], "5a": ["max", "sgl_plain", "sgl_rescaled", "sgl"]}
SIZES = {"4": [10, 50, 100], "5a": [50]}
LABELS_5A = {"sgl": "+ weighting (SGL)"}
BAGS = [50, 100, 150, 200, 300, 400, 500]
COLOURS = {
    "sgl": "#d55e00", "max": "#0072b2", "mean": "#009e73", "mmm": "#cc79a7", "bil": "#e69f00",
    "sgl_plain": "#999999", "sgl_rescaled": "#56b4e9",
}  # fmt: skip
METRICS = {"auc": "AUC of bags", "iou": "IoU, mean over bags", "iou_pooled": "IoU, pooled over 64 bags"}


class Run(NamedTuple):
    method: str
    size: int
    bags: int
    seed: int

    @property
    def name(self) -> str:
        return f"size{self.size}_bags{self.bags}_{self.method}_seed{self.seed}"

    @property
    def cost(self) -> int:
        """In instances of an epoch: those that are trained; of 100 validation bags a third of a tenth."""
        return self.size * self.bags + self.size * 100 // 30


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--figure", choices=FIGURES, required=True)
    add("--data", default="digits", help="digits, mnist, or an .npz file (train_mnist_bags.py --help)")
    add("--data-dir", default="data", help="folder of MNIST")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--sizes", nargs="+", type=int, help="instances in a bag (4: 10 50 100; 5a: 50)")
    add("--bags", nargs="+", type=int, help=f"training bags ({' '.join(map(str, BAGS))})")
    add("--seeds", type=int, help="runs of everything (10)")
    add("--epochs", type=int, help="(300)")
    add(
        "--quick",
        action="store_true",
        help="bags of 10 and 50, 50 and 150 of them, 1 seed, 30 epochs at ten times the rate",
    )
    add("--workers", type=int, default=0, help="runs at once (a core each; on a GPU 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="folder of the files (runs/figures, runs/figures_quick)")
    add("--draw-only", action="store_true", help="compute nothing")
    args = parser.parse_args(argv)
    coarse = {"sizes": [10, 50] if args.figure == "4" else [50], "bags": [50, 150], "seeds": 1, "epochs": 30}
    full = {"sizes": SIZES[args.figure], "bags": BAGS, "seeds": 10, "epochs": 300}
    for name, value in (coarse if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(*args.sizes, *args.bags, args.seeds, args.epochs) < 1 or args.workers < 0:
        parser.error("--sizes, --bags, --seeds, --epochs: expected at least 1, --workers at least 0")
    args.methods = args.methods or FIGURES[args.figure]
    args.out = args.out or Path("runs", "figures_quick" if args.quick else "figures")
    args.workers = args.workers or (1 if args.device != "cpu" else os.cpu_count() or 1)
    return args


def options_of(run: Run, args: argparse.Namespace) -> list[str]:
    """What train_mnist_bags.py would be told."""
    rate = ["--val-every", "10", "--lr", "1e-3" if args.quick else "1e-4"]
    return [
        "--data", args.data, "--data-dir", args.data_dir, "--bag-size", str(run.size), "--bags", str(run.bags),
        "--epochs", str(args.epochs), "--seed", str(run.seed), "--device", args.device, *rate, *METHODS[run.method][1],
    ]  # fmt: skip


def compute(run: Run, args: argparse.Namespace) -> Path:
    """Train, test, and write the run's file; from the last full epoch on where it was interrupted."""
    if args.device == "cpu":
        torch.set_num_threads(1)  # as many runs at once as there are cores
    options = options_of(run, args)
    parsed = parse(options)
    (config,) = configs_of(parsed).values()
    target, checkpoint = args.out / f"{run.name}.json", args.out / f"{run.name}.pt"
    instances = load_instances(parsed.data, parsed.data_dir, run.seed)
    images, bags = bags_of(instances, config, run.seed, args.device)
    start = time.perf_counter()
    os.environ["TQDM_DISABLE"] = "1"
    channels = instances.train_images.shape[1]
    entry, _, model = train_run(lambda: LeNet(channels), config, run.seed, images, bags, checkpoint, resume=True)
    content = {
        "run": run._asdict(),
        "config": config,
        "result": entry,
        "shown": [shown(model, images["test"], bags["test"], n) for n in numbers_to_show(bags["test"], 3, 1)],
        "command": "python train_mnist_bags.py " + " ".join(without_paths(options)),
        "seconds": round(time.perf_counter() - start, 1),
        "commit": commit(),
        "machine": f"{args.device}, {machine()}, torch {torch.__version__}",
    }
    write_json(content, target)
    checkpoint.unlink()
    return target


def shown(model: torch.nn.Module, images: torch.Tensor, bags: Bags, number: int) -> dict[str, Any]:
    """What Figure 5b needs of test bag ``number``, of the network of the last epoch."""
    inside = slice(int(bags.offsets[number]), int(bags.offsets[number + 1]))
    probability = torch.sigmoid(instance_logits(model, images, bags.index[inside]))
    return {
        "number": number,
        "index": bags.index[inside].tolist(),
        "positive": bags.positive[inside].int().tolist(),
        "probability": [round(p, 4) for p in probability.tolist()],
    }


def end_with_parent() -> None:
    """Of a worker: killed by whatever signal, the script leaves nobody behind who goes on computing."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def without_paths(options: list[str]) -> list[str]:
    """What others can type: the folder of the data is theirs."""
    return [
        "DIR" if before == "--data-dir" else option for before, option in zip(["", *options], options, strict=False)
    ]


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def compute_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Those that are missing, the cheapest seeds of all methods first, so that a figure grows evenly."""
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not (args.out / f"{run.name}.json").exists()]
    missing.sort(key=lambda run: (run.seed, run.cost))
    print(f"{len(runs)} runs, {len(missing)} of them to compute, {args.workers} at once, into {args.out}/", flush=True)
    if not missing:
        return
    # one load, so that a wrong folder is told at once and a download happens once
    load_instances(args.data, args.data_dir, 0)
    unit = sum(run.cost for run in missing) / 1000
    progress = tqdm(total=1000, bar_format="{l_bar}{bar}| {elapsed} gone, {remaining} to go{postfix}", disable=None)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, mp_context=context, initializer=end_with_parent)
    try:
        futures = {pool.submit(compute, run, args): run for run in missing}
        for future in as_completed(futures):
            run = futures[future]
            result = read(future.result())["result"]["last"]
            progress.update(run.cost / unit)
            progress.write(f"{run.name}: " + ", ".join(f"{name} {result[name]:.3f}" for name in METRICS))
    except KeyboardInterrupt:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


def collect(runs: list[Run], args: argparse.Namespace) -> dict[tuple[str, int, int], list[dict[str, float]]]:
    """What the networks of the last epoch reached, by method, size and bags, a seed each."""
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for run in runs:
        path = args.out / f"{run.name}.json"
        if path.exists():
            content = read(path)
            if content["config"]["epochs"] != args.epochs:
                raise ValueError(f"out: {path} is of {content['config']['epochs']} epochs, not {args.epochs}")
            found.setdefault((run.method, run.size, run.bags), []).append(content["result"]["last"])
    return found


def label_of(method: str, figure: str) -> str:
    return LABELS_5A.get(method, METHODS[method][0]) if figure == "5a" else METHODS[method][0]


def draw(found: dict[tuple[str, int, int], list[dict[str, float]]], args: argparse.Namespace) -> list[Path]:
    """A row for each metric, a column for each size; lines are means, bands reach from the worst seed to the best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [size for size in args.sizes if any(key[1] == size for key in found)]
    figure = Figure(figsize=(3.6 * len(sizes) + 1.6, 2.5 * len(METRICS)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(METRICS), len(sizes), squeeze=False, sharex="col", sharey="row")
    for (row, (metric, title)), (column, size) in itertools.product(enumerate(METRICS.items()), enumerate(sizes)):
        axes = grid[row, column]
        for method in args.methods:
            points = {bags: [r[metric] for r in found[method, size, bags]] for bags in args.bags
                      if (method, size, bags) in found}  # fmt: skip
            if not points:
                continue
            x = list(points)
            axes.plot(x, [np.mean(v) for v in points.values()], marker="o", ms=4, color=COLOURS[method],
                      label=label_of(method, args.figure))  # fmt: skip
            low, high = ([of(v) for v in points.values()] for of in (min, max))
            axes.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, lw=0)
        axes.grid(alpha=0.3)
        axes.set(ylim=(0.4 if metric == "auc" else 0.0, 1.0))
        if row == 0:
            axes.set_title(f"bags of {size}")
        if column == 0:
            axes.set_ylabel(title)
        if row == len(METRICS) - 1:
            axes.set_xlabel("training bags")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    paths = [args.out / f"figure{args.figure}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path)
    return paths


def write_tables(found: dict[tuple[str, int, int], list[dict[str, float]]], args: argparse.Namespace) -> list[Path]:
    """Means, worst and best of every point, as Markdown for people and as CSV for machines."""
    lines = [
        "| bags of | training bags | loss | seeds | " + " | ".join(METRICS) + " |",
        "|---" * (4 + len(METRICS)) + "|",
    ]
    rows = []
    for size, bags, method in itertools.product(args.sizes, args.bags, args.methods):
        results = found.get((method, size, bags))
        if not results:
            continue
        cells = []
        row: dict[str, Any] = {"size": size, "bags": bags, "method": method, "seeds": len(results)}
        for metric in METRICS:
            values = [result[metric] for result in results]
            row |= {metric: np.mean(values), f"{metric}_worst": min(values), f"{metric}_best": max(values)}
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        lines.append(f"| {size} | {bags} | {label_of(method, args.figure)} | {len(results)} | {' | '.join(cells)} |")
        rows.append({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()})
    table, numbers = (args.out / f"figure{args.figure}.{kind}" for kind in ("md", "csv"))
    table.write_text("\n".join(lines) + "\n")
    with numbers.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [table, numbers]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    runs = [Run(*point) for point in itertools.product(args.methods, args.sizes, args.bags, range(args.seeds))]
    try:
        if not args.draw_only:
            compute_all(runs, args)
        found = collect(runs, args)
        if not found:
            raise ValueError(f"out: there is no run of figure {args.figure} in {args.out}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    paths = [*draw(found, args), *write_tables(found, args)]
    print((args.out / f"figure{args.figure}.md").read_text())
    print("written:", ", ".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
