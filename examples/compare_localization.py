"""When the Self-Guiding Loss gives better boxes: receptive field, pooling and loss on drawn images with known boxes.

    python compare_localization.py                                        the whole table: an hour of one core
    python compare_localization.py --rows 17/max --seeds 1                two minutes: a local network, max pooling
    python compare_localization.py --rows 17/max/sgl 33/max/sgl/lam=3     single rows, and with another setting
    python compare_localization.py --rows local17/max                     a network that train_cxr.py has
    python compare_localization.py --draw-only                            nothing is trained

A row is RECEPTIVE FIELD / POOLING / LOSS, a part of it (17, 17/max, 17/max/bag) all rows that begin so; the name of a
local network of cxr_models.py may stand for the receptive field. The losses are bag (the bag loss alone), sgl, and mask
(SGL with its penalty on the mask); settings that follow replace those of
SETTINGS. A seed draws the images (drawn_lesions.py), the network's weights and the order of training. Every network is
that of the last epoch, and boxes decide nothing: the thresholds T_p are fixed.

Every run leaves one small file in --out, and the same command goes on where it was interrupted. Tables, numbers and a
picture are drawn from all files that are there. A run that was trained otherwise is refused, not mixed in.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import boxes as bx
import numpy as np
import torch
from cxr_metrics import auc_per_class
from cxr_models import BACKBONES, TORCHVISION, make_backbone
from drawn_lesions import CLASSES, Drawn, draw
from torch import nn
from train_cxr import lam_at
from training import Config, make_criterion, write_json
from workers import commit, compute_in_workers, machine

from sgl_ops.pooling import make_pooling

#: Pixels that a patch sees: how many of the three layers on the finished grid are 3x3 convolutions, the others 1x1.
FIELDS = {"17": 0, "33": 1, "65": 3}
#: And the local ones of train_cxr.py, which take several times as long.
NETWORKS = (*FIELDS, *(name for name in BACKBONES if name not in TORCHVISION))
STRIDE = 8
POOLINGS = ("max", "softmax", "mean")
LOSSES = {"bag": "bag only", "sgl": "SGL", "mask": "SGL, mask penalty"}
T_P = (0.5, 0.9)
SEEDS = (4, 5, 6)

#: What decides a run, beside its row and seed.
SETTINGS: Config = {
    "size": 96, "train_images": 1000, "test_images": 400, "epochs": 10, "batch_size": 32, "lr": 3e-3,
    "weight_decay": 1e-4, "prior": 0.1, "delta_l": 0.3, "lam": 1.0, "lam_delay": 2.0, "lam_warmup": 4.0,
    "normalize": "bag", "mask_weight": 0.0, "rescale": True, "weighted": True,
    "upsampling": "bilinear", "morphology": 5,
    "thresholds": 100,  # of MaxBoxAcc: maps that saturate have their best at 0.99
    "cell_centre": 4.5,  # of the first cell of every network here, in pixels: 17, 33 or 65 have their middle on a pixel
}  # fmt: skip
#: And what a pooling or a loss changes of it: the paper's lam is 1 with max pooling, 20 with a softmax.
SETTINGS_OF: dict[str, Config] = {
    "softmax": {"lam": 20.0},
    "mean": {"lam": 20.0},
    "max/mask": {"mask_weight": 1.0},
    "softmax/mask": {"mask_weight": 20.0},
    "mean/mask": {"mask_weight": 20.0},
}


class Row(NamedTuple):
    network: str
    pooling: str
    loss: str
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join([self.network, self.pooling, self.loss, *self.changes])

    @property
    def plain(self) -> bool:
        return not self.changes


class Run(NamedTuple):
    row: Row
    seed: int

    @property
    def file(self) -> str:
        return f"{self.row.name.replace('/', '_')}_seed{self.seed}.json"


TABLE = [Row(*row) for row in product(NETWORKS, POOLINGS, LOSSES)]


def rows_of(name: str) -> list[Row]:
    """The rows of the table that begin with ``name``, or the one with the settings that it ends with.

    Raises:
        ValueError: there is none.
    """
    parts = name.split("/")
    changes = tuple(part for part in parts if "=" in part)
    plain = parts[: len(parts) - len(changes)]
    rows = [row._replace(changes=changes) for row in TABLE if row.name.split("/")[: len(plain)] == plain]
    if not rows or parts[len(plain) :] != list(changes):
        raise ValueError(f"rows: expected FIELD/POOLING/LOSS of {TABLE[0].name} ... {TABLE[-1].name}, got {name!r}")
    for row in rows:
        settings_of(row)
    return rows


def settings_of(row: Row) -> Config:
    """
    Raises:
        ValueError: a change of what is no setting, or of no such kind.
    """
    settings = SETTINGS | {"loss": "bag" if row.loss == "bag" else "sgl", "pooling": row.pooling}
    for key in (row.pooling, row.loss, f"{row.pooling}/{row.loss}"):
        settings |= SETTINGS_OF.get(key, {})
    for change in row.changes:
        key, _, text = change.partition("=")
        if key not in SETTINGS or isinstance(SETTINGS[key], bool):
            raise ValueError(f"rows: {row.name}: {key!r} is no setting: {', '.join(SETTINGS)}")
        try:
            settings[key] = type(SETTINGS[key])(text)
        except ValueError:
            raise ValueError(f"rows: {row.name}: expected a number for {key}, got {text!r}") from None
    return settings


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", default=list(FIELDS), metavar="ROW", help="as above (17 33 65: all 27)")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help=f"({' '.join(map(str, SEEDS))})")
    add("--workers", type=int, default=1, help="runs at once, a core each (1)")
    add("--out", type=Path, default=Path("runs", "localization"), help="folder of the files (runs/localization)")
    add("--draw-only", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    try:
        args.rows = list(dict.fromkeys(row for name in args.rows for row in rows_of(name)))
    except ValueError as error:
        parser.error(str(error))
    if min(args.seeds) < 0 or args.workers < 1:
        parser.error("--seeds: expected at least 0; --workers: at least 1")
    return args


# a run


def make_network(name: str) -> nn.Sequential:
    """Logits (n, C, size / 8, size / 8) of images (n, 1, size, size), from a last layer of 1x1.

    The names of FIELDS: alike but for the kernels of three layers.
    """
    if name not in FIELDS:
        features, channels = make_backbone(name, STRIDE)
        return nn.Sequential(Coloured(), features, nn.Conv2d(channels, len(CLASSES), 1))
    # the first three see 17 pixels every 8; padded once, so that the cell is in the middle of them: padding each layer
    # alike would put the map half a cell too far to the lower right
    layers: list[nn.Module] = [nn.ZeroPad2d((4, 5, 4, 5))]
    channels = 1
    fine = [(64, 3 if k < FIELDS[name] else 1, 1) for k in range(3)]
    for width, kernel, stride in [(16, 5, 2), (32, 3, 2), (64, 3, 2), *fine]:
        padding = kernel // 2 if stride == 1 else 0
        convolution = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, len(CLASSES), 1))


class Coloured(nn.Module):
    """Grey images (n, 1, height, width) as the networks of cxr_models.py want them: (n, 3, height, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 3, -1, -1)


def to_input(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(images).unsqueeze(1).float()
    return ((x - 128) / 32).contiguous(memory_format=torch.channels_last)


def drawn_for(settings: Config, seed: int, part: str) -> Drawn:
    return draw(settings[f"{part}_images"], settings["size"], (seed, ("train", "test").index(part) + 1))


def train(row: Row, seed: int) -> nn.Module:
    """The network of the last epoch. The learning rate falls to nothing, so that the last is as good as any."""
    settings = settings_of(row)
    data = drawn_for(settings, seed, "train")
    torch.manual_seed(seed)
    network = make_network(row.network).to(memory_format=torch.channels_last)
    with torch.no_grad():
        network[-1].bias.add_(math.log(settings["prior"] / (1 - settings["prior"])))
    criterion = make_criterion(settings)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    labels = torch.from_numpy(data.labels)
    steps = len(labels) // settings["batch_size"]
    for epoch in range(settings["epochs"]):
        order = torch.randperm(len(labels))[: steps * settings["batch_size"]]
        for step, some in enumerate(order.split(settings["batch_size"])):
            progress = epoch + step / steps
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * (1 - progress / settings["epochs"])
            if settings["loss"] == "sgl":
                criterion.lam = lam_at(settings, progress)
            loss = criterion(network(to_input(data.images[some])), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def ask(network: nn.Module, images: np.ndarray, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, C) and maps of probabilities (n, C, h, w)."""
    with torch.inference_mode():
        # in float32 every logit above 17 would be the same probability
        logits = torch.cat([network(to_input(some)) for some in np.array_split(images, -(-len(images) // 64))]).double()
        return make_pooling(pooling)(logits).numpy(), torch.sigmoid(logits).numpy()


def measure(scores: np.ndarray, maps: np.ndarray, data: Drawn, settings: Config) -> dict[str, Any]:
    """AUC, and for each T_p how many boxes are found, how large they are against the true ones, how many are none."""
    image, classes = np.nonzero(data.labels)
    true, size = data.boxes[image, classes], data.images.shape[1:]
    result: dict[str, Any] = {"auc": auc_per_class(scores, data.labels, CLASSES), "boxes": len(true)}
    chosen, mode, side = maps[image, classes], settings["upsampling"], settings["morphology"]
    first = settings["cell_centre"] / STRIDE
    for threshold in T_P:
        found = np.array([bx.heatmap_to_box(m, size, threshold, mode, side, first) for m in chosen])
        area = np.nan_to_num(found[:, 2:].prod(1) / true[:, 2:].prod(1))
        result[f"{threshold:g}"] = {
            "accuracy": bx.localization_accuracy(bx.iou(found, true), classes, CLASSES),
            "area_mean": float(area.mean()),
            "area_median": float(np.median(area)),
            "no_box": float(np.isnan(found[:, 0]).mean()),
        }
    result["max_box"] = bx.max_box_accuracy(
        chosen, true, classes, CLASSES, size, mode, steps=settings["thresholds"], first=first
    )
    return rounded(result)


def rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    return round(content, 4) if isinstance(content, float) else content


def shown_of(data: Drawn) -> list[tuple[int, int]]:
    """(image, class) of what is drawn: the first test image of each class, not the one that looks best."""
    return [(int(np.argmax(data.labels[:, c])), c) for c in range(len(CLASSES))]


def compute(run: Run, out: Path) -> Path:
    torch.set_num_threads(1)  # as many runs at once as there are cores
    began, trained_by = time.perf_counter(), commit()
    network = train(run.row, run.seed)
    trained = time.perf_counter()
    settings = settings_of(run.row)
    data = drawn_for(settings, run.seed, "test")
    scores, maps = ask(network, data.images, run.row.pooling)
    content = {
        "row": run.row.name,
        "seed": run.seed,
        "settings": settings,
        "result": measure(scores, maps, data, settings),
        # in thousandths
        "shown": [np.rint(1000 * maps[where]).astype(int).tolist() for where in shown_of(data)],
        "command": f"python compare_localization.py --rows {run.row.name} --seeds {run.seed}",
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_training": round(trained - began, 1),
        "commit": trained_by,
        "machine": f"one thread, {machine()}, torch {torch.__version__}",
    }
    write_json(content, out / run.file)
    return out / run.file


def compute_all(runs: list[Run], args: argparse.Namespace) -> None:
    """Those that are missing, in the order in which they are asked for, a seed of all rows after the other."""
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not (args.out / run.file).exists()]
    print(f"{len(runs)} runs, {len(missing)} of them to compute, {args.workers} at once, into {args.out}/", flush=True)
    if not missing:
        return
    for number, (run, path) in enumerate(compute_in_workers(compute, missing, args.workers, args.out), 1):
        content = json.loads(path.read_text())
        result = content["result"]
        accuracies = (f"T_p {t:g}: " + " ".join(f"{v['mean']:.2f}" for v in result[f"{t:g}"]["accuracy"].values())
                      + f", {result[f'{t:g}']['area_median']:.1f}x" for t in T_P)  # fmt: skip
        print(f"{number}/{len(missing)} {run.row.name}, seed {run.seed}, {content['seconds']:.0f} s: "
              f"AUC {result['auc']['mean']:.3f}; " + "; ".join(accuracies), flush=True)  # fmt: skip


# what is drawn of them

Found = dict[Run, dict[str, Any]]


def collect(out: Path) -> Found:
    """All runs in ``out``, in the order of the table, rows with other settings last.

    Raises:
        ValueError: one was trained or measured otherwise than it would be now.
    """
    found = {}
    for path in out.glob("*_seed*.json"):
        content = json.loads(path.read_text())
        (row,) = rows_of(content["row"])
        run, expected = Run(row, content["seed"]), settings_of(row)
        there = content["settings"]
        other = [key for key in {**expected, **there} if there.get(key) != expected.get(key)]
        if other:
            there, here = ({key: settings.get(key) for key in other} for settings in (there, expected))
            raise ValueError(f"out: {path} is of {there}, not {here}")
        found[run] = content["result"] | {"shown": content["shown"]}
    order = sorted(found, key=lambda run: (not run.row.plain, TABLE.index(run.row._replace(changes=())), run))
    return {run: found[run] for run in order}


def numbers_of(result: dict[str, Any], threshold: float) -> dict[str, float]:
    """The columns of the tables at T_p ``threshold``; accuracies are means over the classes."""
    at = result[f"{threshold:g}"]
    numbers = {"auc": result["auc"]["mean"]}
    numbers |= {f"accuracy_{t}": accuracy["mean"] for t, accuracy in at["accuracy"].items()}
    numbers |= {name: at[name] for name in ("area_median", "area_mean", "no_box")}
    return numbers | {f"max_box_{t}": accuracy["mean"] for t, accuracy in result["max_box"].items()}


def over_seeds(found: Found, row: Row, threshold: float, base: Row | None = None) -> dict[str, list[float]]:
    """The columns, a value per seed; of ``base`` those of the same seeds are taken away."""
    columns: dict[str, list[float]] = {}
    for seed in sorted(run.seed for run in found if run.row == row):
        numbers = numbers_of(found[Run(row, seed)], threshold)
        if base is not None:
            if Run(base, seed) not in found:
                continue
            other = numbers_of(found[Run(base, seed)], threshold)
            numbers = {name: value - other[name] for name, value in numbers.items()}
        for name, value in numbers.items():
            columns.setdefault(name, []).append(value)
    return columns


def cell(values: Sequence[float], form: str = ".2f") -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def label_of(row: Row) -> str:
    return ", ".join([LOSSES[row.loss], *row.changes])


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def tables_of(found: Found) -> str:
    """The means; accuracies at each T_p; what each loss has more than the bag loss with the same network and images."""
    rows = list(dict.fromkeys(run.row for run in found))
    accuracies = [f"accuracy_{t:g}" for t in bx.T_IOU]
    lines = []
    for row in rows:
        columns = over_seeds(found, row, T_P[0])
        line = [row.network, row.pooling, label_of(row), str(len(columns["auc"])), f"{np.mean(columns['auc']):.3f}"]
        for threshold in T_P:
            columns = over_seeds(found, row, threshold)
            means = " ".join(f"{np.mean(columns[name]):.2f}" for name in accuracies)
            line.append(f"{means}, {np.mean(columns['area_median']):.1f}x")
        lines.append(line)
    head = ["field", "pooling", "loss", "seeds", "AUC", *(f"T_p {threshold:g}" for threshold in T_P)]
    over = " / ".join(f"{t:g}" for t in bx.T_IOU)
    parts = [f"Means over the seeds: accuracy at IoU {over}; median of found over true area\n\n" + table(head, lines)]
    for threshold in T_P:
        head = ["field", "pooling", "loss", "seeds", *(["AUC"] if threshold == T_P[0] else []),
                *(f"IoU > {t:g}" for t in bx.T_IOU), "area"]  # fmt: skip
        if threshold == T_P[0]:
            head.append("MaxBoxAcc 0.5")
        lines = []
        for row in rows:
            columns = over_seeds(found, row, threshold)
            line = [row.network, row.pooling, label_of(row), str(len(columns["auc"]))]
            line += [cell(columns["auc"], ".3f")] if threshold == T_P[0] else []
            line += [*(cell(columns[name]) for name in accuracies), f"{np.mean(columns['area_median']):.1f}x"]
            lines.append(line + ([cell(columns["max_box_0.5"])] if threshold == T_P[0] else []))
        note = "; MaxBoxAcc: every map scaled to 0 ... 1, at the threshold that is best for these boxes"
        parts.append(f"T_p {threshold:g}{note if threshold == T_P[0] else ''}\n\n" + table(head, lines))
    lines = []
    for row in rows:
        base = row._replace(loss="bag", changes=())
        for threshold in T_P if row != base else ():
            more = over_seeds(found, row, threshold, base)
            if more:
                line = [row.network, row.pooling, label_of(row), f"{threshold:g}", str(len(more["auc"]))]
                lines.append([*line, cell(more["auc"], "+.3f"), *(cell(more[name], "+.2f") for name in accuracies)])
    head = ["field", "pooling", "loss", "T_p", "seeds", "AUC", *(f"IoU > {t:g}" for t in bx.T_IOU)]
    parts.append("More than the bag loss alone, seed by seed\n\n" + table(head, lines))
    return "\n".join([*parts, *best_of(found)])


def best_of(found: Found) -> list[str]:
    """The highest mean at IoU 0.5 of the bag loss, and of all, at any T_p of the table, over as many seeds as any.

    The boxes choose both, and among more rows that are self-guided than rows that are not: a comparison of tables, no
    measure of either.
    """
    count = max(sum(run.row == other.row for other in found) for run in found)
    lines = []
    kinds: dict[str, Callable[[Row], bool]] = {
        "bag loss alone": lambda row: row.loss == "bag",
        "self-guided": lambda row: row.loss != "bag",
    }
    for name, belongs in kinds.items():
        points = [
            (float(np.mean(columns["accuracy_0.5"])), row.name, threshold)
            for row in {run.row for run in found}
            for threshold in T_P
            if belongs(row) and len((columns := over_seeds(found, row, threshold))["auc"]) == count
        ]
        if points:
            value, row_name, threshold = max(points)
            lines.append(f"Best {name} at IoU > 0.5: {value:.3f}, {row_name} at T_p {threshold:g} ({count} seeds).")
    return lines


def write_numbers(found: Found, path: Path) -> None:
    rows = list(dict.fromkeys(run.row for run in found))
    lines = []
    for row, threshold in product(rows, T_P):
        columns = over_seeds(found, row, threshold)
        line: dict[str, Any] = {"row": row.name, "T_p": threshold, "seeds": len(columns["auc"])}
        for name, values in columns.items():
            line |= {name: np.mean(values), f"{name}_lowest": min(values), f"{name}_highest": max(values)}
        lines.append(rounded({name: float(v) if isinstance(v, np.floating) else v for name, v in line.items()}))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def draw_maps(found: Found, path: Path) -> None:
    """The first test image of each class, and the maps of bag loss and SGL with max pooling, small field and large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from plots import FOUND, TRUE

    rows = [Row(network, "max", loss) for network in ("17", "65") for loss in ("bag", "sgl")]
    seeds = sorted(run.seed for run in found if run.row == rows[0])
    if not seeds:
        return
    seed = seeds[0]
    rows = [row for row in rows if Run(row, seed) in found]
    settings = settings_of(rows[0])
    data = drawn_for(settings, seed, "test")
    shown = shown_of(data)
    figure = Figure(figsize=(2.0 * (1 + len(rows)), 2.0 * len(shown) + 0.9), dpi=60, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), 1 + len(rows), squeeze=False)
    size = data.images.shape[1:]
    for number, (image, c) in enumerate(shown):
        maps = [np.array(found[Run(row, seed)]["shown"][number]) / 1000 for row in rows]
        for axes, row, heatmap in zip(grid[number], [None, *rows], [None, *maps], strict=True):
            boxes = [(data.boxes[image, c], TRUE)]
            axes.imshow(data.images[image], cmap="gray", vmin=0, vmax=255)
            if row is not None:
                mode, side = settings["upsampling"], settings["morphology"]
                first = settings["cell_centre"] / STRIDE
                axes.imshow(bx.upsample(heatmap, size, mode, first), cmap="magma", vmin=0, vmax=1, alpha=0.75)
                boxes.append((bx.heatmap_to_box(heatmap, size, T_P[0], mode, side, first), FOUND))
            for (x, y, w, h), colour in boxes:
                if not math.isnan(x):
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, lw=2, ec=colour))
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title("test image" if row is None else f"{row.network} px, {LOSSES[row.loss]}", fontsize=9)
        grid[number, 0].set_ylabel(CLASSES[c], fontsize=9)
    figure.legend(
        handles=[
            Patch(fill=False, ec=TRUE, lw=2, label="true box"),
            Patch(fill=False, ec=FOUND, lw=2, label=f"found at T_p = {T_P[0]:g}"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        collect(args.out)  # what is there and does not fit is told before anything is computed
        if not args.draw_only:
            compute_all([Run(row, seed) for row in args.rows for seed in args.seeds], args)
        found = collect(args.out)
        if not found:
            raise ValueError(f"out: there is no run in {args.out}")
        (args.out / "localization.md").write_text(tables_of(found) + "\n")
        write_numbers(found, args.out / "localization.csv")
        draw_maps(found, args.out / "localization.png")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    print((args.out / "localization.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
