"""MNIST-Bags: a network that is told only "this bag contains a 9" learns which of the digits are the 9s.

    python train_mnist_bags.py                                    SGL beside max pooling on scikit-learn's digits
    python train_mnist_bags.py --data mnist --data-dir DIR        the same on MNIST, 300 epochs
    python train_mnist_bags.py --data mnist --data-dir DIR --loss bil --pooling mean_logits --runs 3

Writes into --out metrics.json, history.csv, bags.png and a checkpoint per seed; without --loss into a folder for SGL
and one for max pooling, with comparison.png beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bags import Bags, draw_bags, to_device
from instances import Instances, load_instances
from plots import draw_bags as draw_panels
from torch import Tensor, nn
from training import (
    DEFAULT_POOLING,
    LOSSES,
    METRICS,
    Config,
    instance_logits,
    make_criterion,
    summarize,
    train_epoch,
    train_run,
    write_history,
    write_json,
)

from sgl_ops.pooling import POOLINGS

#: What decides a result, and so what a run has to agree in to be continued.
DECISIVE = (
    "data", "target", "bag_size", "bag_std", "bags", "val_bags", "test_bags", "epochs", "batch_size", "lr",
    "weight_decay", "val_every", "loss", "pooling", "delta_l", "lam", "rescale", "weighted",
)  # fmt: skip


class LeNet(nn.Module):
    """LeNet-5 on 32x32 with two parallel second layers whose outputs are added; a logit per image."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 5)
        self.left = nn.Conv2d(6, 16, 5)
        self.right = nn.Conv2d(6, 16, 5)
        # the third convolution leaves one pixel: a matrix product
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 1)
        )
        # this, and the two second layers as one convolution, make it half as fast again on a CPU
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(self.first(x))
        weight = torch.cat((self.left.weight, self.right.weight))
        left, right = pooled(F.conv2d(x, weight, torch.cat((self.left.bias, self.right.bias)))).chunk(2, 1)
        return self.head(left + right)


def pooled(x: Tensor) -> Tensor:
    """ReLU and 2x2 max pooling, in the order that leaves the ReLU a quarter of the work."""
    return F.relu(F.max_pool2d(x, 2))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist, or an .npz file of x_train, y_train, x_test, y_test")
    add("--data-dir", default="data", help="folder of MNIST, downloaded into it where missing (data)")
    add("--target", type=int, default=9, help="the class that makes a bag positive (9)")
    add("--bag-size", type=float, default=50, help="mean number of instances in a bag (50)")
    add("--bag-std", type=float, default=0.0, help="its standard deviation (0)")
    add("--bags", type=int, default=100, help="training bags (100)")
    add("--val-bags", type=int, default=100, help="validation bags (100)")
    add("--test-bags", type=int, default=1000, help="test bags (1000)")
    add("--epochs", type=int, help="300; of digits 70")
    add("--batch-size", type=int, default=64, help="bags in a step (64)")
    add("--lr", type=float, help="learning rate of Adam: 1e-4; of digits, to be quick, 1e-3")
    add("--weight-decay", type=float, default=1e-4, help="(1e-4)")
    add("--val-every", type=int, default=1, help="validate in every N-th epoch, and in the last (1)")
    add("--loss", choices=LOSSES, help="without it sgl, and bag with max pooling beside it")
    add("--pooling", choices=list(POOLINGS), help="sgl, bag: max; bil: mean")
    add("--delta-l", type=float, default=0.3, help="threshold of the ternary targets, in [0, 0.5] (0.3)")
    add("--lam", type=float, default=1.0, help="weight of the instance loss (1)")
    add("--no-rescale", action="store_true", help="theta = p instead of Eq. 5")
    add("--no-weight", action="store_true", help="w = 1 instead of Eq. 7 and 8")
    add("--seed", type=int, default=0, help="first seed (0)")
    add("--runs", type=int, default=1, help="number of seeds (1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="folder to write into (runs/mnist_bags, or the next free name)")
    add("--resume", action="store_true", help="continue what is in --out")
    add("--dry-run", action="store_true", help="one step of training, and write nothing")
    args = parser.parse_args(argv)
    args.quick = args.data == "digits"
    args.epochs = (70 if args.quick else 300) if args.epochs is None else args.epochs
    args.lr = (1e-3 if args.quick else 1e-4) if args.lr is None else args.lr
    for name in ("bags", "val_bags", "test_bags", "epochs", "batch_size", "runs", "val_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.bag_size < 1 or args.bag_std < 0:
        parser.error(f"--bag-size, --bag-std: expected >= 1 and >= 0, got {args.bag_size} and {args.bag_std}")
    if not 0 <= args.delta_l <= 0.5 or not 0 <= args.lam < float("inf"):
        parser.error(f"--delta-l, --lam: expected 0 to 0.5 and finite >= 0, got {args.delta_l} and {args.lam}")
    if args.loss == "mmm" and args.pooling:
        parser.error("--pooling: mmm has poolings of its own")
    if args.resume and args.out is None:
        parser.error("--resume: say with --out what to continue")
    return args


def configs_of(args: argparse.Namespace) -> dict[str, Config]:
    """What to train, by name: one method, or SGL and the max-pooling baseline."""
    common = vars(args) | {"rescale": not args.no_rescale, "weighted": not args.no_weight}
    methods = {args.loss: {"loss": args.loss}} if args.loss else {"sgl": {"loss": "sgl"}, "max": {"loss": "bag"}}
    configs = {}
    for name, method in methods.items():
        pooling = args.pooling if args.pooling and name != "max" else DEFAULT_POOLING[method["loss"]]
        config = common | method | {"pooling": pooling}
        configs[name] = {key: config[key] for key in DECISIVE}
    return configs


def bags_of(instances: Instances, config: Config, seed: int, device: str) -> tuple[dict[str, Tensor], dict[str, Bags]]:
    """Images and bags for train, val and test; no image lies in two of them."""
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
        drawn = draw_bags(pool, classes == config["target"], count, config["bag_size"], config["bag_std"], rng)
        images[name], bags[name] = pictures.to(device), to_device(drawn, torch.device(device))
    return images, bags


def pictures_of(images: Tensor) -> np.ndarray:
    """(n, height, width[, 3]) in [0, 1] of normalized images (n, channels, height, width)."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    shown = ((images - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).cpu().numpy()
    return shown[..., 0] if shown.shape[-1] != 3 else shown


def panel(model: nn.Module, images: Tensor, bags: Bags, number: int, title: str) -> tuple[Any, ...]:
    """What draw_panels shows of test bag ``number``."""
    inside = slice(int(bags.offsets[number]), int(bags.offsets[number + 1]))
    index = bags.index[inside]
    probability = torch.sigmoid(instance_logits(model, images, index)).cpu().numpy()
    return pictures_of(images[index]), probability, bags.positive[inside].cpu().numpy(), title


def numbers_to_show(bags: Bags, positives: int, negatives: int) -> list[int]:
    """The first test bags of both kinds: not the ones that look best."""
    labels = bags.labels.cpu()
    return [*labels.nonzero()[:positives, 0].tolist(), *(labels == 0).nonzero()[:negatives, 0].tolist()]


def title_of(bags: Bags, number: int) -> str:
    return f"test bag {number}: labelled {'positive' if bags.labels[number] else 'negative'}"


def train_method(
    name: str, config: Config, args: argparse.Namespace, instances: Instances, folder: Path
) -> tuple[dict[str, Any], nn.Module]:
    """All seeds of one method, with everything that it writes; its metrics and the last network of the first seed."""
    channels = instances.train_images.shape[1]
    runs, histories, first = [], {}, None
    start = time.perf_counter()
    for seed in range(args.seed, args.seed + args.runs):
        images, bags = bags_of(instances, config, seed, args.device)
        entry, history, model = train_run(
            lambda: LeNet(channels), config, seed, images, bags, folder / f"seed{seed}.pt", args.resume
        )
        runs.append(entry)
        histories[seed] = history
        if first is None:
            first = model
            panels = [panel(model, images["test"], bags["test"], n, title_of(bags["test"], n))
                      for n in numbers_to_show(bags["test"], 3, 1)]  # fmt: skip
            heading = f"{name}: what the network says of each instance (class {config['target']} makes a bag positive)"
            draw_panels(panels, 2, heading, folder / "bags.png")
        metrics = {"config": config, "runs": runs, **summarize(runs), "seconds": round(time.perf_counter() - start, 1)}
        write_json(metrics, folder / "metrics.json")
        write_history(histories, folder / "history.csv")
    return metrics, first


def compare(models: dict[str, nn.Module], images: Tensor, bags: Bags, target: int, path: Path) -> None:
    """Both methods on the same test bags, side by side; the twenty most probable instances of each."""
    panels = [
        panel(models[name], images, bags, n, f"{label}, {title_of(bags, n)}")
        for n in numbers_to_show(bags, 4, 1)
        for name, label in (("max", "max pooling"), ("sgl", "SGL"))
    ]
    draw_panels(panels, 2, f"Told only which bags hold a {target}: the probability of each instance", path, shown=20)


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'':10}{'':10}" + "".join(f"{name:>12}" for name in METRICS))
    for name, metrics in results.items():
        for which in ("last", "best_val"):
            print(f"{name:10}{which:10}" + "".join(f"{metrics['mean'][which][m]:12.3f}" for m in METRICS))
            if len(metrics["runs"]) > 1:
                span = (f"{metrics['worst'][which][m]:.3f}-{metrics['best'][which][m]:.3f}" for m in METRICS)
                print(f"{'':20}" + "".join(f"{s:>12}" for s in span))


def free_folder() -> Path:
    base = Path("runs")
    names = ["mnist_bags", *(f"mnist_bags{k}" for k in range(2, 1000))]
    return next(base / name for name in names if not (base / name).exists())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        configs = configs_of(args)
        instances = load_instances(args.data, args.data_dir, args.seed)
        images, bags = bags_of(instances, next(iter(configs.values())), args.seed, args.device)
        for split, some in bags.items():
            print(f"{split:6}{len(some.labels):5} bags, {int(some.labels.sum())} positive;"
                  f" {len(some.index)} instances, {int(some.positive.sum())} of class {args.target}")  # fmt: skip
        if args.dry_run:
            for name, config in configs.items():
                model = LeNet(instances.train_images.shape[1]).to(args.device)
                optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
                first = torch.arange(min(config["batch_size"], config["bags"]), device=args.device)
                loss = train_epoch(
                    model, make_criterion(config), optimizer, images["train"], bags["train"], len(first), first
                )
                print(f"{name}: {config}\n{name}: loss of one step {loss:.4f}; nothing written")
            return 0
        out = free_folder() if args.out is None else args.out
        if not args.resume and any(out.glob("**/seed*.pt")):
            raise ValueError(f"out: {out} holds runs; continue them with --resume, or name another folder")
        results, models = {}, {}
        for name, config in configs.items():
            folder = out if args.loss else out / name
            folder.mkdir(parents=True, exist_ok=True)
            results[name], models[name] = train_method(name, config, args, instances, folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; --resume with the same --out and options goes on after the last full epoch", file=sys.stderr)
        return 130
    if len(models) > 1:
        compare(models, images["test"], bags["test"], args.target, out / "comparison.png")
    print_table(results)
    print(f"\nTest bags; the pictures and figures are in {out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
