"""One run of compare_localization.py: its row of the table, the settings, training and measures."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from common.choices import Config
from common.environment import commit, machine
from common.files import rounded
from common.losses import lam_at, make_criterion
from images.metrics import auc_per_class
from images.models import make_backbone
from torch import nn

from localization.drawn_lesions import CLASSES, Drawn, draw
from localization.rows import DRAWN, FIELDS, STRIDE, T_P, Row, Run, settings_of
from sgl_ops import localization as bx
from sgl_ops.pooling import make_pooling


def make_network(name: str) -> nn.Sequential:
    """A network from images (n, 1, size, size) to logits (n, C, size / 8, size / 8), with a last layer of 1x1.

    The networks of FIELDS differ only in the kernel sizes of three layers.
    """
    if name not in FIELDS:
        features, channels = make_backbone(name, STRIDE)
        return nn.Sequential(Coloured(), features, nn.Conv2d(channels, len(CLASSES), 1))
    # The first three layers have a receptive field of 17 pixels and a stride of 8. The image is padded once, so that a
    # cell is in the middle of its receptive field. Equal padding in each layer would move the map half a cell to the
    # lower right.
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
    """Grey images (n, 1, height, width) as input for images/models.py: (n, 3, height, width)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 3, -1, -1)


def to_input(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(images).unsqueeze(1).float()
    return ((x - 128) / 32).contiguous(memory_format=torch.channels_last)


def drawn_for(settings: Config, seed: int, part: str) -> Drawn:
    return draw(settings[f"{part}_images"], settings["size"], (seed, ("train", "test").index(part) + 1))


def train(row: Row, seed: int) -> nn.Module:
    """The network of the last epoch. The learning rate falls linearly to 0."""
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


def predict(network: nn.Module, images: np.ndarray, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, C) and maps of probabilities (n, C, h, w)."""
    with torch.inference_mode():
        # float64: in float32, the sigmoid of logits above 17 is exactly 1
        logits = torch.cat([network(to_input(some)) for some in np.array_split(images, -(-len(images) // 64))]).double()
        return make_pooling(pooling)(logits).numpy(), torch.sigmoid(logits).numpy()


def measure(scores: np.ndarray, maps: np.ndarray, data: Drawn, settings: Config) -> dict[str, Any]:
    """AUC, and for each T_p the accuracy, the area relative to the true boxes, and the share of maps without a box."""
    image, classes = np.nonzero(data.labels)
    true, size = data.boxes[image, classes], data.images.shape[1:]
    result: dict[str, Any] = {"auc": auc_per_class(scores, data.labels, CLASSES), "boxes": len(true)}
    chosen, mode, side = maps[image, classes], settings["upsampling"], settings["morphology"]
    first = settings["cell_centre"] / STRIDE
    for threshold in T_P:
        found = np.array([bx.heatmap_to_box(m, size, threshold, mode, side, first) for m in chosen])
        area = np.nan_to_num(found[:, 2:].prod(1) / true[:, 2:].prod(1))
        result[f"{threshold:g}"] = {
            "accuracy": bx.localization_accuracy(bx.box_iou(found, true), classes, CLASSES),
            "area_mean": float(area.mean()),
            "area_median": float(np.median(area)),
            "no_box": float(np.isnan(found[:, 0]).mean()),
        }
    result["max_box"] = bx.max_box_accuracy(
        chosen, true, classes, CLASSES, size, mode, steps=settings["thresholds"], first=first
    )
    return rounded(result, 4)


def shown_of(data: Drawn) -> list[tuple[int, int]]:
    """(image, class) of the drawn maps: the first test image of each class."""
    return [(int(np.argmax(data.labels[:, c])), c) for c in range(len(CLASSES))]


def compute(run: Run) -> dict[str, Any]:
    """Trains and measures ``run``: its row, seed and settings, the results, and where they were computed."""
    torch.set_num_threads(1)  # one run per core
    began, trained_by = time.perf_counter(), commit()
    network = train(run.row, run.seed)
    trained = time.perf_counter()
    settings = settings_of(run.row)
    data = drawn_for(settings, run.seed, "test")
    scores, maps = predict(network, data.images, run.row.pooling)
    content = {
        "row": run.row.name,
        "seed": run.seed,
        "settings": settings,
        "result": measure(scores, maps, data, settings),
        "command": f"python compare_localization.py --rows {run.row.name} --seeds {run.seed}",
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_training": round(trained - began, 1),
        "commit": trained_by,
        "machine": f"one thread, {machine()}, torch {torch.__version__}",
    }
    if run.row in DRAWN:  # in thousandths
        content["shown"] = [np.rint(1000 * maps[where]).astype(int).tolist() for where in shown_of(data)]
    return content
