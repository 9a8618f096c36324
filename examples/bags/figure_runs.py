"""The runs of the figures of bags: methods, sizes, numbers of bags and seeds."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

#: name: (label, options of train_mnist_bags.py). Mean pooling is that of the authors, the mean of logits.
METHODS = {
    "sgl": ("SGL", ["--loss", "sgl"]),
    "max": ("max pooling", ["--loss", "bag", "--pooling", "max"]),
    "mean": ("mean pooling", ["--loss", "bag", "--pooling", "mean_logits"]),
    "mmm": ("MMM", ["--loss", "mmm"]),
    "bil": ("BIL", ["--loss", "bil", "--pooling", "mean_logits"]),
    "sgl_plain": ("max + instance loss", ["--loss", "sgl", "--no-rescale", "--no-weight"]),
    "sgl_rescaled": ("+ rescaling", ["--loss", "sgl", "--no-weight"]),
    "topk": ("top-8 pooling", ["--loss", "bag", "--pooling", "topk"]),
    "falling_k": ("falling k", ["--loss", "bag", "--pooling", "topk", "--k", "1", "--k-start", "0.5"]),
    "sgl_falling_k": ("falling k, then SGL", ["--loss", "sgl", "--pooling", "topk", "--k", "1", "--k-start", "0.5"]),
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
    "start": ["max", "sgl", "topk", "falling_k", "sgl_falling_k"],
}
#: The figures whose runs form the queue.
QUEUE = ("control", "4", "5a")
#: Runs of the queue with up to this cost (instances per epoch) have ten seeds. The others have three.
CHEAP = 1500
DEFAULTS = {"data": "mnist", "bags": BAGS, "seeds": 10, "epochs": 300, "sizes": [50], "positives": [0]}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "4": {"sizes": [10, 50, 100]},
    "5a": {},
    "5b": {"bags": [150], "seeds": 1},
    "control": {"bags": [100, 150], "seeds": 3},
    "start": {"sizes": [10, 50, 100], "bags": [50, 100, 150, 200, 300]},
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
    "start": QUICK_MNIST | {"sizes": [50]},
    "6": {"sizes": [10], "bags": [100], "positives": [1, 3, 5], "seeds": 1, "epochs": 5},
}
#: Ten times the learning rate and a fifth of the epochs. With 150 bags of 50, a tenth of the epochs is too few for SGL
#: (IoU 0.28; max pooling 0.54). With a fifth, SGL has 0.64.
QUICK_OPTIONS = {figure: ["--lr", "1e-3"] for figure in ("4", "5a", "5b", "control", "start")} | {
    "6": ["--stem", "imagenet", "--lr", "1e-3", "--batch-size", "10", "--val-bags", "50", "--val-every", "5"]
}


class Run(NamedTuple):
    method: str
    size: int
    bags: int
    seed: int
    positives: int = 0  # 0: a random number of positives (MNIST-Bags)

    @property
    def name(self) -> str:
        positives = f"positives{self.positives}_" if self.positives else ""
        return f"size{self.size}_{positives}bags{self.bags}_{self.method}_seed{self.seed}"

    @property
    def cost(self) -> int:
        """The number of instances in an epoch."""
        return self.size * self.bags


def queue() -> list[Run]:
    """All runs of the figures in QUEUE without duplicates, in the order of computation."""
    priority: dict[Run, int] = {}  # 0: computed first
    for figure in QUEUE:
        settings = DEFAULTS | DEFAULTS_OF[figure]
        for method, size, bags in itertools.product(FIGURES[figure], settings["sizes"], settings["bags"]):
            for seed in range(10 if size * bags <= CHEAP else 3):
                first = figure == "control" or method in ("sgl", "max")
                priority.setdefault(Run(method, size, bags, seed), 2 if seed else 0 if first else 1)
    control = min(
        DEFAULTS_OF["control"]["bags"]
    )  # of each priority, the cheapest point of the control is computed first

    def order(run: Run) -> tuple[int, bool, int, int]:
        return priority[run], (run.bags, run.method.endswith("authors")) != (control, True), run.cost, run.seed

    return sorted(priority, key=order)
