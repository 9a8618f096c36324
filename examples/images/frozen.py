"""Heads on the feature maps of a frozen network: methods, training, evaluation. Used by frozen_cxr.py."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common.files import read_json
from features.heads import make_head_pooling
from features.transform import Transform
from torch import Tensor, nn

from images.frozen_methods import Method
from images.metrics import auc_per_class
from images.nih import CLASSES, load_index
from sgl_ops import BagLoss, BILLoss, LamSchedule, MMMLoss, SGLLoss, prior_bias
from sgl_ops.localization import box_iou, centre_box, contains, heatmap_to_box, heatmap_to_point

SIDE = 256  # pixels of the image that boxes are measured in
FIRST = 31.5 / 32  # centre of the first cell of EfficientNet-Lite0's last map, which pads as TensorFlow does
T_IOU = (0.1, 0.3, 0.5)
MIRRORED = "mirrored_"  # begins the name of a file with the maps of the mirrored images
FOLDS = 4  # of a cross-validation over the patients of the training list

#: Rules from map to box: title, threshold, whether relative to the maximum, and whether the map is rescaled first.
MAPS = {"half": (0.5, True, False), "absolute": (0.5, False, False), "rescaled": (0.5, True, True)}


def rules_with(fractions: Sequence[float]) -> dict[str, tuple[float, bool, bool]]:
    """MAPS, and a rule for each other fraction of the maximum. The title of such a rule is the fraction."""
    return MAPS | {f"{fraction:g}": (fraction, True, False) for fraction in fractions}


class Films(NamedTuple):
    """Images with their feature maps, labels and boxes.

    Attributes:
        features: (n, D, h, w), on disk.
        labels: (n, 14) float32.
        patients: (n,).
        test: (n,) bool, those of the official test list.
        boxes: sets of boxes by name: (image, class) to boxes (k, 4) in pixels of an image of 1024 pixels.
        first: centre of the first cell of a map, in cells from the edge of the image.
        mirrored: whether the second half of the rows are the mirrored images of the first half, in the same order.
            ``boxes`` has the first half only.
        margin: cells are not used if their centre is nearer to an edge than this fraction of the side of the image.
    """

    features: np.ndarray
    labels: Tensor
    patients: np.ndarray
    test: np.ndarray
    boxes: dict[str, dict[tuple[int, int], np.ndarray]]
    first: float = FIRST
    mirrored: bool = False
    margin: float = 0.0

    @property
    def inside(self) -> np.ndarray:
        """The cells of a map that are used, (h, w) bool: all without a margin, also those with a centre outside."""
        if not self.margin:
            return np.ones(self.features.shape[2:], bool)
        rows, columns = (  # 1e-9 allows for rounding
            abs((np.arange(n) + self.first) / n - 0.5) <= 0.5 - self.margin + 1e-9 for n in self.features.shape[2:]
        )
        return rows[:, None] & columns

    def splits(self, folds: Sequence[int] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of the numbers of the training and of the evaluation images: by default one pair, the official lists.

        Args:
            folds: a pair for each of these folds over the patients of the training list. The images of the fold are
                evaluated, and those of the other folds are trained on.
        """
        train = np.flatnonzero(~self.test)
        if not folds:
            return [(train, np.flatnonzero(self.test))]
        fold = fold_of(self.patients[train])
        return [(train[fold != k], train[fold == k]) for k in folds]


def fold_of(patients: np.ndarray, seed: int = 0) -> np.ndarray:
    """The fold (n,) of each image, 0 to FOLDS - 1, drawn by patient: images of a patient are in the same fold.

    The folds have an equal number of patients; the last one also has the remainder.
    """
    unique, number = np.unique(patients, return_inverse=True)
    place = np.argsort(np.random.default_rng(seed).permutation(len(unique)))
    return np.minimum(place // max(1, len(unique) // FOLDS), FOLDS - 1)[number]


def read_det10(path: Path) -> Iterator[tuple[str, str, list[float]]]:
    """Image, class and box (x, y, width, height) of each row of the table of ChestX-Det10."""
    for row in _rows(path, ("image_index", "class", "xmin", "ymin", "xmax", "ymax")):
        if row["class"]:
            x0, y0, x1, y1 = (float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            yield row["image_index"], row["class"], [x0, y0, x1 - x0, y1 - y0]


def read_rsna(path: Path) -> Iterator[tuple[str, str, list[float]]]:
    """Image, "Pneumonia" and box of each row with a box of the RSNA Pneumonia Detection Challenge.

    The boxes mark opacities of the lung that may be pneumonia.
    """
    for row in _rows(path, ("image_index", "x", "y", "width", "height")):
        if row["x"]:
            yield row["image_index"], "Pneumonia", [float(row[key]) for key in ("x", "y", "width", "height")]


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: expected the columns {', '.join(columns)}, found no {', '.join(missing)}")
        yield from reader


def read_films(
    data_dir: Path,
    tables: Path | None,
    det10: Path | None,
    features: Path,
    rsna: Path | None = None,
    mirrored: bool = False,
    margin: float = 0.0,
) -> Films:
    """The films of a folder of frozen_cxr.py extract, with the official tables and the boxes of ChestX-Det10 and RSNA.

    Args:
        mirrored: also the mirrored images, see Films.
        margin: see Films.

    Raises:
        ValueError: a file is missing, the features belong to other images, or no cell is far enough from the edges.
    """
    names = film_names(features)
    index = load_index(data_dir, allow_missing=True, tables=tables)
    number = {name: i for i, name in enumerate(index.names)}
    absent = [name for name in names if name not in number]
    if absent:
        raise ValueError(f"features: {absent[0]} is not among the images of {data_dir}")
    order = np.array([number[name] for name in names])
    first = extraction_settings(features)["first"]
    where = {name: i for i, name in enumerate(names)}
    boxes: dict[str, dict[tuple[int, int], list]] = {"nih": {}}
    for name, found in index.boxes.items():
        for kind, *box in found:
            if name in where:
                boxes["nih"].setdefault((where[name], kind), []).append(box)
    for name, path, read in (("det10", det10, read_det10), ("rsna", rsna, read_rsna)):
        if path is not None:
            boxes[name] = {}
            for image, kind, box in read(path):
                if kind in CLASSES and image in where:
                    boxes[name].setdefault((where[image], CLASSES.index(kind)), []).append(box)
    if mirrored:
        order = np.tile(order, 2)
    films = Films(
        load_maps(features, "features.npy", mirrored),
        torch.from_numpy(index.labels[order]).float(),
        index.patients[order],
        index.test[order],
        {name: {key: np.array(found) for key, found in some.items()} for name, some in boxes.items()},
        first,
        mirrored,
        margin,
    )
    if not films.inside.any():
        raise ValueError(f"margin: no cell is farther than {margin:g} of the side from all edges")
    return films


def film_names(folder: Path) -> list[str]:
    """The names of the images of a folder of frozen_cxr.py extract, in the order of the features."""
    path = folder / "names.txt"
    if not path.is_file():
        raise ValueError(f"features: {folder} holds no names.txt; frozen_cxr.py extract writes it")
    return path.read_text(encoding="utf-8").split()


def extraction_settings(folder: Path) -> dict[str, Any]:
    """The settings of frozen_cxr.py extract that made ``folder``. Older versions only had EfficientNet-Lite0."""
    path = folder / "settings.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {"first": FIRST}
    return settings


def load_maps(folder: Path, name: str, mirrored: bool) -> np.ndarray:
    """The maps ``name`` of a folder of frozen_cxr.py extract. With ``mirrored``, those of the mirrored images follow.

    Raises:
        ValueError: there are none.
    """
    names = [name, MIRRORED + name] if mirrored else [name]
    for missing in (file for file in names if not (folder / file).is_file()):
        options = " --mirror" if missing.startswith(MIRRORED) else ""
        options += " without --stages" if name == "before.npy" else ""
        raise ValueError(f"features: {folder} holds no {missing}; frozen_cxr.py extract{options} writes it")
    maps = [np.load(folder / file, mmap_mode="r") for file in names]
    return np.concatenate(maps) if mirrored else maps[0]


def reduce_features(films: Films, components: int) -> tuple[Tensor, Transform]:
    """Principal components (n, L, components) of the L used cells, and the transform of features that computes them.

    They are fitted on all cells of the training list and partly whitened: each component is divided by the square root
    of its standard deviation. Then all are divided by their common standard deviation.
    """
    maps = torch.from_numpy(np.array(films.features)).float()
    cells = maps.flatten(2).transpose(1, 2)
    train = cells[torch.from_numpy(~films.test)].reshape(-1, cells.shape[2])
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-4)
    standard = (train - mean) / deviation
    values, vectors = torch.linalg.eigh(standard.T @ standard / len(standard))
    project = vectors[:, -components:] / (values[-components:].clamp(min=0).sqrt() + 1e-3).sqrt()
    reduced = torch.stack([(film - mean) / deviation @ project for film in cells])
    scale = reduced.std()
    return (reduced / scale)[:, films.inside.ravel()], Transform(mean, project / deviation.unsqueeze(1) / scale)


class Head(nn.Module):
    """Logits (n, L, C) of cells (n, L, D), and the features of attention: linear, or with one hidden layer.

    The features of attention are the hidden layer (n, L, H), or the cells.
    """

    def __init__(self, features: int, hidden: int, classes: int):
        super().__init__()
        self.first = nn.Linear(features, hidden) if hidden else None
        self.last = nn.Linear(hidden or features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.first is not None:
            x = F.dropout(F.relu(self.first(x)), 0.3, self.training)
        return self.last(x), x


def train_head(
    cells: Tensor, films: Films, numbers: np.ndarray, method: Method, seed: int, epochs: int = 14, batch_size: int = 64
) -> tuple[Head, nn.Module, int | None]:
    """Trains a head on the images ``numbers``. Returns it, its pooling, and the epoch in which lam began to rise."""
    torch.manual_seed(seed)
    labels = films.labels
    head = Head(cells.shape[2], method.hidden, labels.shape[1])
    with torch.no_grad():
        head.last.bias.copy_(prior_bias(labels[numbers], share=method.share))
    pooling = make_head_pooling(method.pooling, method.pooling, 0.3, method.hidden)
    criterion = make_criterion(method, pooling)
    optimizer = torch.optim.AdamW([*head.parameters(), *pooling.parameters()], 3e-3, weight_decay=method.weight_decay)
    steps = epochs * (len(numbers) // batch_size)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    schedule = LamSchedule(method.lam, auc=0.65, rise=60, window=len(numbers), interval=5)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.as_tensor(numbers)
    started = None
    for epoch in range(1, epochs + 1):
        order = numbers[torch.randperm(len(numbers), generator=generator)]
        for batch in order.split(batch_size)[: len(numbers) // batch_size]:
            logits, hidden = head(cells[batch])
            logits = logits.transpose(1, 2)
            if method.loss == "sgl" and not method.at_once:
                with torch.no_grad():
                    criterion.lam = schedule.step(pooling(logits, features=hidden), labels[batch])
                started = epoch if started is None and criterion.lam > 0 else started
            loss = criterion(logits, labels[batch], features=hidden)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return head.eval(), pooling, started


def make_criterion(method: Method, pooling: nn.Module) -> nn.Module:
    """The loss of ``method`` with ``pooling``."""
    if method.loss == "sgl":
        return SGLLoss(lam=method.lam, pooling=pooling, mask_weight=method.mask_weight)
    return MMMLoss() if method.loss == "mmm" else {"bag": BagLoss, "bil": BILLoss}[method.loss](pooling)


def grad_cam(head: Head, pooling: nn.Module, cells: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) of the pooled logits: maps (n, C, L) of cells (n, L, D), maximum 1.

    The weight of a feature is the mean over the cells of the gradient of the pooled logit of a class. The map is the
    positive part of the weighted sum of the features, divided by its maximum. A map without positive values is 0.
    """
    cells = cells.detach().requires_grad_()
    with torch.enable_grad():
        logits, hidden = head(cells)
        pooled = pooling(logits.transpose(1, 2), features=hidden).sum(0)
        gradients = [torch.autograd.grad(score, cells, retain_graph=True)[0] for score in pooled]
    weights = torch.stack(gradients, 1).mean(2)  # (n, C, D)
    maps = F.relu(weights @ cells.detach().transpose(1, 2))
    return maps / maps.amax(2, keepdim=True).clamp(min=1e-12)


def evaluated_boxes(films: Films, numbers: np.ndarray) -> list[str]:
    """The sets with boxes on the images ``numbers``. The NIH boxes, for example, are all on the test list."""
    inside = set(numbers.tolist())
    return [name for name, found in films.boxes.items() if any(image in inside for image, _ in found)]


class Predicted(NamedTuple):
    """The predictions of a trained head.

    Attributes:
        numbers: (n,), the images.
        scores: (n, C), the pooled predictions.
        maps: (n, C, h, w), instance probabilities, or the maps of :func:`grad_cam`.
    """

    numbers: np.ndarray
    scores: np.ndarray
    maps: np.ndarray


@torch.no_grad()
def predict(
    head: Head, pooling: nn.Module, cells: Tensor, films: Films, numbers: np.ndarray, with_grad_cam: bool = False
) -> Predicted:
    """The predictions for the images ``numbers``, with the maps of :func:`grad_cam` on request.

    The value of a cell that is not used is 0. So with a margin, the rules "half" and "rescaled" of MAPS are equal.
    """
    logits, hidden = head(cells[numbers])
    logits = logits.transpose(1, 2)
    heat = grad_cam(head, pooling, cells[numbers]) if with_grad_cam else torch.sigmoid(logits)
    scores = pooling(logits, features=hidden).numpy()
    maps = np.zeros((*scores.shape, *films.inside.shape))
    maps[:, :, films.inside] = heat.numpy()
    return Predicted(numbers, scores, maps)


def evaluate(films: Films, parts: Sequence[Predicted], fractions: Sequence[float] = ()) -> dict[str, Any]:
    """AUC of all images of ``parts`` together, and the hits of their boxes by set of boxes and rule.

    The rules are those of :func:`rules_with`.
    """
    numbers, scores, heat = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    aucs = auc_per_class(scores, films.labels[numbers].numpy(), CLASSES)
    maps = dict(zip(numbers.tolist(), heat, strict=True))
    return {
        "auc": aucs["mean"],
        "auc_of_classes": aucs,
        "boxes": {
            name: _boxes(maps, films, films.boxes[name], rules_with(fractions))
            for name in evaluated_boxes(films, numbers)
        },
    }


def _boxes(
    maps: dict[int, np.ndarray],
    films: Films,
    true: dict[tuple[int, int], np.ndarray],
    rules: dict[str, tuple[float, bool, bool]],
) -> dict[str, Any]:
    keys = sorted(key for key in true if key[0] in maps)
    found: dict[str, Any] = {}
    for title, (threshold, relative, rescaled) in rules.items():
        hits, pointing, centre = [], [], []
        for image, kind in keys:
            boxes = true[image, kind] * (SIDE / 1024)
            heat = maps[image][kind]
            if rescaled:  # Eq. 5
                heat = (heat - heat.min()) / max(heat.max() - heat.min(), 1e-12)
            box = heatmap_to_box(
                heat, (SIDE, SIDE), threshold, mode="bilinear", side=1, first=films.first, relative=relative
            )
            hits.append(_over(box, boxes))
            centre.append(_over(centre_box((SIDE, SIDE)), boxes))
            pointing.append(bool(contains(boxes, heatmap_to_point(heat, (SIDE, SIDE), films.first)).any()))
        patients = [int(films.patients[image]) for image, _ in keys]
        found[title] = {"hits": hits, "pointing": float(np.mean(pointing)), "centre": centre, "patients": patients}
    return found


def _over(box: np.ndarray, boxes: np.ndarray) -> Sequence[bool]:
    best = np.nan_to_num(box_iou(box, boxes)).max()
    return [bool(best > least) for least in T_IOU]
