"""Shared parts of the commands that train on bags of images: random bags, and the output files.

A command adds a network, its defaults and its own options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.choices import Config
from common.files import without_nan, write_json
from common.options import message_of, next_step
from torch import Tensor, nn

from bags.drawing import Bags, draw_bags, to_device
from bags.instances import Instances, load_instances
from bags.metrics import METRICS
from bags.plots import draw_bags as draw_panels
from bags.training import (
    instance_logits,
    make_criterion,
    summarize,
    train_epoch,
    train_run,
    write_history,
)

MakeModel = Callable[[Config, int], nn.Module]

#: A run with a lower AUC on the test bags has not learned. Chance is 0.5.
FAILED = 0.7


def bags_of(instances: Instances, config: Config, seed: int, device: str) -> tuple[dict[str, Tensor], dict[str, Bags]]:
    """Images and bags for train, val and test. No image is in two of these parts."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(instances.train_classes))
    cut = len(order) // 5
    parts = {
        "train": (instances.train_images, instances.train_classes, order[cut:], config["bags"]),
        "val": (instances.train_images, instances.train_classes, order[:cut], config["val_bags"]),
        "test": (
            instances.test_images, instances.test_classes, np.arange(len(instances.test_classes)), config["test_bags"],
        ),
    }  # fmt: skip
    images, bags = {}, {}
    for name, (pictures, classes, pool, count) in parts.items():
        drawn = draw_bags(pool, classes == config["target"], count, config["bag_size"], config["bag_std"], rng,
                          config["positives"])  # fmt: skip
        images[name], bags[name] = pictures.to(device), to_device(drawn, torch.device(device))
    return images, bags


def pictures_of(images: Tensor) -> np.ndarray:
    """(n, height, width[, 3]) in [0, 1] of normalized images (n, channels, height, width)."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).cpu().numpy()
    return shown[..., 0] if shown.shape[-1] != 3 else shown


def panel(model: nn.Module, images: Tensor, bags: Bags, number: int, title: str) -> tuple[Any, ...]:
    """The panel of test bag ``number`` for draw_panels."""
    inside = slice(int(bags.offsets[number]), int(bags.offsets[number + 1]))
    index = bags.index[inside]
    probability = torch.sigmoid(instance_logits(model, images, index)).cpu().numpy()
    return pictures_of(images[index]), probability, bags.positive[inside].cpu().numpy(), title


def numbers_to_show(bags: Bags, positives: int, negatives: int) -> list[int]:
    """The numbers of the first test bags of both kinds. None is selected by its result."""
    labels = bags.labels.cpu()
    return [*labels.nonzero()[:positives, 0].tolist(), *(labels == 0).nonzero()[:negatives, 0].tolist()]


SHOWN = "The bags are the first test bags: {} positive, {} negative."


def title_of(bags: Bags, number: int) -> str:
    return f"test bag {number}: labelled {'positive' if bags.labels[number] else 'negative'}"


def train_method(
    name: str, config: Config, args: argparse.Namespace, instances: Instances, make_model: MakeModel, folder: Path
) -> tuple[dict[str, Any], dict[int, nn.Module]]:
    """Trains all seeds of one method and writes its files. Returns its metrics, and its networks by seed."""
    channels = instances.train_images.shape[1]
    runs, histories, models = [], {}, {}
    start = time.perf_counter()
    for seed in range(args.seed, args.seed + args.runs):
        images, bags = bags_of(instances, config, seed, args.device)
        entry, history, model = train_run(
            lambda: make_model(config, channels), config, seed, images, bags, folder / f"seed{seed}.pt", args.resume
        )
        runs.append(entry)
        histories[seed], models[seed] = history, model
        if seed == args.seed:
            panels = [panel(model, images["test"], bags["test"], n, title_of(bags["test"], n))
                      for n in numbers_to_show(bags["test"], 3, 1)]  # fmt: skip
            heading = f"{name}, network of seed {seed}: the probability of each instance, the highest first"
            about = f"A bag with an instance of class {config['target']} is labelled positive."
            draw_panels(panels, 2, f"{heading}\n{about} {SHOWN.format(3, 1)}", folder / "bags.png")
        metrics = {"config": config, "runs": runs, **summarize(runs), "seconds": round(time.perf_counter() - start, 1)}
        write_json(without_nan(metrics), folder / "metrics.json")
        write_history(histories, folder / "history.csv")
    return metrics, models


def failed_seeds(metrics: dict[str, Any]) -> list[int]:
    """The seeds whose network of the last epoch does not separate the test bags: bag AUC below FAILED."""
    return [run["seed"] for run in metrics["runs"] if run["last"]["auc"] < FAILED]


def seed_to_show(results: dict[str, dict[str, Any]]) -> int:
    """The first seed with which every method learned; the first seed if there is none."""
    seeds = [run["seed"] for run in next(iter(results.values()))["runs"]]
    failed = {seed for metrics in results.values() for seed in failed_seeds(metrics)}
    return next((seed for seed in seeds if seed not in failed), seeds[0])


def chosen_by(results: dict[str, dict[str, Any]]) -> str:
    """The seed of the comparison, and how it was chosen."""
    seed = seed_to_show(results)
    learned = not any(seed in failed_seeds(metrics) for metrics in results.values())
    rule = "the first seed with which both losses learned" if learned else "the first seed; no seed learned with both"
    return f"seed {seed} ({rule})"


def marks(panels: Sequence[tuple[Any, ...]], name: str, target: int) -> str:
    """How many of the true instances in the bags of ``panels`` are marked (p > 0.5), and how many others."""
    marked = np.concatenate([panel[1] for panel in panels]) > 0.5
    true = np.concatenate([panel[2] for panel in panels]) > 0
    right, wrong = (marked & true).sum(), (marked & ~true).sum()
    return f"{name} marks {right} of {true.sum()} instances of class {target} and {wrong} others"


def compare(
    models: dict[str, nn.Module],
    images: Tensor,
    bags: Bags,
    chosen: str,
    args: argparse.Namespace,
    path: Path,
) -> str:
    """Draws the networks of both methods with the same seed on the same test bags. Returns the counts of the marks.

    Args:
        chosen: the seed and how it was chosen, in words.
    """
    shown = 20
    panels = [
        panel(models[name], images, bags, n, f"{label}, {title_of(bags, n)}")
        for n in numbers_to_show(bags, 4, 1)
        for name, label in (("max", "max pooling"), ("sgl", "SGL"))
    ]
    # of all instances in these bags, also of those that the picture leaves out
    counts = [marks(panels[k::2], name, args.target) for k, name in enumerate(("max pooling", "SGL"))]
    heading = (
        f"Networks of {chosen} after the last epoch,\ntrained with the label of each bag: does it hold a "
        f"{args.target}? Each picture shows the {shown} instances of a bag with the highest probability,\nin falling "
        f"order, row by row. {SHOWN.format(4, 1)}\n"
        f"In these bags, {counts[0]},\n{counts[1]}."
    )
    draw_panels(panels, 2, heading, path, shown)
    return ", ".join(counts)


def print_table(results: dict[str, dict[str, Any]], target: int) -> None:
    """The metrics of every method, and the meaning of the columns."""
    seeds = len(next(iter(results.values()))["runs"])
    print(f"\nTest bags, mean over {seeds} seeds (worst to best):\n" if seeds > 1 else "\nTest bags:\n")
    print(f"{'loss':6}{'network of':16}" + "".join(f"{name:>22}" for name in METRICS))
    for name, metrics in results.items():
        for which, label in (("last", "last epoch"), ("best_val", "best validation")):
            cells = []
            for metric in METRICS:
                cell = f"{metrics['mean'][which][metric]:.3f}"
                if seeds > 1:
                    cell += f" ({metrics['worst'][which][metric]:.3f}-{metrics['best'][which][metric]:.3f})"
                cells.append(f"{cell:>22}")
            print(f"{name:6}{label:16}" + "".join(cells))
    print(
        f"\nauc         area under the ROC curve of the bag labels: is there a {target} in the bag?\n"
        f"iou         IoU of the instances with p > 0.5 and the true ones (class {target}), mean over bags\n"
        "iou_pooled  the same for the instances of 64 bags together"
    )


def validation_table(results: dict[str, dict[str, Any]], config: Config) -> str:
    """The validation AUC and the test AUC of the network of the best epoch, for each method and seed."""
    lines = ["", 'AUC of each network of the row "best validation":', ""]
    lines.append(f"{'loss':6}{'seed':>4}{'epoch':>7}{'validation':>12}{'test':>7}")
    for name, metrics in results.items():
        for run in metrics["runs"]:
            best = run["best_val"]
            cells = f"{run['seed']:4}{best['epoch']:7}{best['validation_auc']:12.3f}{best['auc']:7.3f}"
            lines.append(f"{name:6}{cells}")
    return "\n".join(
        [
            *lines,
            "",
            f"The validation AUC is the highest of all epochs, on {config['val_bags']} bags. So it is too high,",
            "especially for a network that has not learned. Compare networks on the test bags.",
        ]
    )


def conclusion(results: dict[str, dict[str, Any]]) -> str:
    """The result of the comparison of SGL with max pooling, and the seeds that failed."""
    sgl, baseline = (results[name]["mean"]["last"] for name in ("sgl", "max"))
    parts = []
    for metric, text in (("auc", "bag AUC"), ("iou_pooled", "pooled IoU")):
        difference = sgl[metric] - baseline[metric]
        size = f"{abs(difference):.3f}"
        verdict = "equal" if size == "0.000" else f"{size} {'higher' if difference > 0 else 'lower'}"
        parts.append(f"{text} {sgl[metric]:.3f} against {baseline[metric]:.3f} ({verdict})")
    text = f"SGL against max pooling alone: {', '.join(parts)}."
    failed = {name: failed_seeds(results[name]) for name in ("sgl", "max")}
    for name, label in (("sgl", "SGL"), ("max", "Max pooling")):
        if failed[name]:
            seeds = ", ".join(map(str, failed[name]))
            text += f"\n{label} did not learn with {_seeds(failed[name])} {seeds} (bag AUC below {FAILED})."
    every = {seed for seeds in failed.values() for seed in seeds}
    left = {name: [run for run in results[name]["runs"] if run["seed"] not in every] for name in failed}
    if every and left["sgl"]:
        sgl, baseline = (np.mean([run["last"]["iou_pooled"] for run in left[name]]) for name in ("sgl", "max"))
        which = f"{'this' if len(every) == 1 else 'these'} {_seeds(every)}"
        text += f" Without {which} the pooled IoU is {sgl:.3f} against {baseline:.3f}."
    return text


def _seeds(numbers: Collection[int]) -> str:
    return "seed" if len(numbers) == 1 else "seeds"


def free_folder(name: str) -> Path:
    base = Path("runs")
    names = [name, *(f"{name}{k}" for k in range(2, 1000))]
    return next(base / name for name in names if not (base / name).exists())


def run(name: str, args: argparse.Namespace, configs: dict[str, Config], make_model: MakeModel) -> int:
    """Runs the command ``name``: trains the methods in ``configs``, and writes and prints their results.

    ``make_model(config, channels)`` returns a network from images (n, channels, 32, 32) to n logits. Returns the exit
    status of the command.
    """
    try:
        instances = load_instances(args.data, args.data_dir)
        images, bags = bags_of(instances, next(iter(configs.values())), args.seed, args.device)
        for split, some in bags.items():
            print(f"{split:6}{len(some.labels):5} bags, {int(some.labels.sum())} positive;"
                  f" {len(some.index)} instances, {int(some.positive.sum())} of class {args.target}")  # fmt: skip
        if args.dry_run:
            for method, config in configs.items():
                model = make_model(config, instances.train_images.shape[1]).to(args.device)
                optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
                first = torch.arange(min(config["batch_size"], config["bags"]), device=args.device)
                loss = train_epoch(
                    model, make_criterion(config), optimizer, images["train"], bags["train"], len(first), first
                )
                print(f"{method}: {config}\n{method}: loss of one step {loss:.4f}; nothing written")
            next_step("the same command without --dry-run")
            return 0
        out = free_folder(name) if args.out is None else args.out
        if not args.resume and any(out.glob("**/seed*.pt")):
            raise ValueError(f"out: {out} holds runs; continue them with --resume, or name another folder")
        results: dict[str, dict[str, Any]] = {}
        models: dict[str, dict[int, nn.Module]] = {}
        for method, config in configs.items():
            folder = out if args.loss else out / method
            folder.mkdir(parents=True, exist_ok=True)
            results[method], models[method] = train_method(method, config, args, instances, make_model, folder)
        if len(models) > 1:
            shown = seed_to_show(results)
            images, bags = bags_of(instances, next(iter(configs.values())), shown, args.device)
            networks = {method: of_seed[shown] for method, of_seed in models.items()}
            chosen = chosen_by(results)
            counts = compare(networks, images["test"], bags["test"], chosen, args, out / "comparison.png")
    except (ValueError, OSError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nstopped; --resume with the same --out and options continues after the last complete epoch",
            file=sys.stderr,
        )
        return 130
    print_table(results, args.target)
    print(validation_table(results, next(iter(configs.values()))))
    print()
    if len(models) > 1:
        print(conclusion(results))
        print(f"{out}/comparison.png shows the same test bags under both losses.")
        print(f"It shows the networks of {chosen}. In these bags, {counts}.")
    print(f"Figures and pictures are in {out}/.")
    next_step("train on your own data, see docs/own-loop.md and docs/own-data.md")
    return 0
