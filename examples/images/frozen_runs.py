"""The first steps of frozen_cxr.py: features of all films, and runs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common.files import naming, write_json, write_text
from common.weights import read_weights
from torch import Tensor

from images.frozen import (
    FIRST,
    MIRRORED,
    Films,
    Predicted,
    evaluate,
    evaluated_boxes,
    extraction_settings,
    film_names,
    predict,
    read_films,
    reduce_features,
    train_head,
)
from images.frozen_files import refuse_other_settings
from images.frozen_means import mean_of_heads, mean_with_mirrored, on_cells_of
from images.frozen_methods import METHODS, Method

if TYPE_CHECKING:
    from images.frozen_tuning import Tuning

BACKBONE = "timm/tf_efficientnet_lite0"


def extract(args: argparse.Namespace) -> None:
    """Writes the feature maps (n, D, h, w) float16 of all images, and their names.

    Without --stages, the maps of the last two stages are concatenated on the grid of the last one, see
    :func:`last_two_stages`, and the input of the last two blocks is written for ``train --tune``. With --mirror, the
    maps of the mirrored images are written, too.
    """
    from images.nih import find_images

    paths = find_images(args.data_dir)
    names = sorted(f"{stem}.png" for stem in paths)
    args.out.mkdir(parents=True, exist_ok=True)
    maps_of, first = chosen_stages(args) if args.stages else last_two_stages(args)
    shapes = [maps.shape for maps in maps_of(_gray(paths[Path(names[0]).stem]))]
    files = [args.out / name for name in ("features.npy", "before.npy")][: len(shapes)]
    if args.mirror:
        shapes *= 2
        files += [path.with_name(MIRRORED + path.name) for path in files]
    needed = sum(2 * len(names) * math.prod(shape) for shape in shapes)
    free = disk_usage(args.out).free
    if needed > free:
        raise ValueError(f"{files[0]}: the features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    for name in ("before.npy", MIRRORED + "features.npy", MIRRORED + "before.npy"):
        (args.out / name).unlink(missing_ok=True)  # of an earlier extraction with other options
    # Written in order, not through a memory map, with which a full disk terminates the process by a signal.
    with ExitStack() as stack:
        opened = []
        for path, shape in zip(files, shapes, strict=True):
            with naming(path):
                opened.append(stack.enter_context(path.open("wb")))
                header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (len(names), *shape)}
                np.lib.format.write_array_header_1_0(opened[-1], header)
        for i, name in enumerate(names):
            image = _gray(paths[Path(name).stem])
            written = maps_of(image) + (maps_of(image.flip(3)) if args.mirror else [])
            for path, file, maps in zip(files, opened, written, strict=True):
                with naming(path):
                    file.write(np.ascontiguousarray(maps, np.float16).data)
            if i % 100 == 0:
                print(f"{i} of {len(names)} images", flush=True)
    settings = {"backbone": args.backbone, "stages": args.stages, "image_size": args.image_size, "first": first}
    write_json(settings, args.out / "settings.json")
    write_text("\n".join(names) + "\n", args.out / "names.txt")


def _gray(path: Path) -> Tensor:
    """The gray values (1, 1, H, W) of an image, 0 to 255."""
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))[None, None]


def last_two_stages(args: argparse.Namespace) -> tuple[Callable[[Tensor], list[np.ndarray]], float]:
    """The last two stages of EfficientNet-Lite0, and the input of its last two blocks: a function and FIRST.

    For the grid of the last stage, each cell of the finer map is the mean of the 3x3 cells around the same pixel.
    """
    from features.backbones import import_timm

    timm = import_timm()
    if args.backbone != BACKBONE:
        raise ValueError(f"backbone: without --stages, expected {BACKBONE}, got {args.backbone}")
    if len(args.image_size) > 1:
        raise ValueError(f"image size: without --stages, expected one size, got {len(args.image_size)}")
    network = timm.create_model(BACKBONE.removeprefix("timm/"), features_only=True, out_indices=(3, 4)).eval()
    state = read_weights(args.weights)
    missing, _ = network.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    if any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"weights: {args.weights} does not fit {BACKBONE}")
    kept = []
    network.blocks[5][2].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    side = args.image_size[0]

    @torch.no_grad()
    def maps_of(gray: Tensor) -> list[np.ndarray]:
        gray = F.interpolate(gray, (side, side), mode="bilinear", antialias=max(gray.shape[2:]) > side)
        fine, coarse = network(((gray - 127) / 128).expand(-1, 3, -1, -1))  # as the weights were trained in TensorFlow
        fine = F.avg_pool2d(F.pad(fine, (0, 1, 0, 1), mode="replicate"), 3, 2)
        return [torch.cat([coarse, fine], 1)[0].numpy(), kept.pop()[0].numpy()]

    return maps_of, FIRST


def chosen_stages(args: argparse.Namespace) -> tuple[Callable[[Tensor], list[np.ndarray]], float]:
    """The stages --stages of any network at all sizes, and the centre of the first cell in cells.

    The grid is that of the first stage at the first size. If a network without padding has fewer cells than the image
    has strides, the last row and column are repeated.
    """
    from features.backbones import load_backbone
    from features.extraction import map_of

    backbone = load_backbone(args.backbone, weights=args.weights, stages=args.stages)
    geometry, sizes = backbone.geometry, args.image_size
    field = None if geometry.field is None else geometry.field / max(sizes)
    sees = "the whole image" if field is None else f"{field:.2f} of the side of the image"
    print(f"a cell of the largest image sees {sees}", flush=True)

    def maps_of(gray: Tensor) -> list[np.ndarray]:
        image = F.interpolate(
            gray / 255, (sizes[0], sizes[0]), mode="bilinear", antialias=max(gray.shape[2:]) > sizes[0]
        )
        maps = map_of(backbone, image.expand(-1, 3, -1, -1), [size / sizes[0] for size in sizes], False)
        absent = [sizes[0] // geometry.stride - n for n in maps.shape[1:]]
        maps = F.pad(maps[None], (0, max(absent[1], 0), 0, max(absent[0], 0)), mode="replicate")[0]
        return [maps.numpy()]

    return maps_of, geometry.centre / geometry.stride


def train(args: argparse.Namespace) -> None:
    """Writes one file per run into ``args.out``: METHOD-seedSEED.json. Existing runs are skipped.

    With --tune, the head and the last blocks of the network are trained further before the evaluation. With several
    folds of --validate, a run trains heads for each fold, and the predictions of all folds are evaluated together. With
    --heads N, it trains N heads for each fold, with the seeds N SEED to N SEED + N - 1, and evaluates their means. With
    --mirror, it trains on all images and their mirrored images, and evaluates the means over both. With several folders
    of --features, it trains such heads on the features of each folder, and evaluates the means over the folders.

    Raises:
        ValueError: an unknown method, a part without images, features of other images, or an existing run had other
            settings.
    """
    methods = args.methods or list(METHODS)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    networks = read_networks(args)
    films = networks[0].films
    splits = films.splits(args.validate)
    if any(len(part) == 0 for split in splits for part in split):
        raise ValueError(f"validate: a fold, or one of the official lists, has no image of {args.data_dir}")
    sets = evaluated_boxes(films, np.concatenate([evaluated for _, evaluated in splits]))
    tuned = None if args.tune is None else {"blocks": args.tune, "epochs": args.tune_epochs, "lr": args.tune_lr}
    settings = {
        "validate": args.validate, "components": args.components, "heads": args.heads, "mirror": args.mirror,
        "margin": args.margin, "fractions": args.fractions, "tuned": tuned,
        "features": [extraction_settings(folder) for folder in args.features],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in methods:
            path = args.out / f"{method}-seed{seed}.json"
            if path.exists():
                refuse_other_settings(path, settings, sets)
                continue
            begun = time.monotonic()
            parts, starts = [], []
            for split in splits:
                of_networks = []
                for network in networks:
                    predicted, started = train_and_predict(network, *split, METHODS[method], seed, args)
                    of_networks.append(predicted)
                    starts += started
                parts.append(mean_of_heads(of_networks))
            result = evaluate(films, parts, args.fractions)
            result |= settings | {
                "method": method, "seed": seed, "lam_started_in_epoch": starts,
                "seconds": round(time.monotonic() - begun, 1),
            }  # fmt: skip
            write_json(result, path)
            shares = [f"{name} {np.mean(found['half']['hits'], 0).round(2)}" for name, found in result["boxes"].items()]
            print(f"{method}, seed {seed}: AUC {result['auc']:.3f}; boxes: {', '.join(shares)}", flush=True)


class Network(NamedTuple):
    """What the heads on the features of one folder need.

    Attributes:
        cells: (n, L, components), the used cells.
        tuning: for --tune, otherwise None.
        shown: the films with the features of the first folder. Maps are interpolated on their cells.
    """

    films: Films
    cells: Tensor
    tuning: Tuning | None
    shown: Films


def read_networks(args: argparse.Namespace) -> list[Network]:
    """The features of each folder of --features.

    Raises:
        ValueError: the folders hold features of different images, or in another order.
    """
    networks: list[Network] = []
    for folder in args.features:
        films = read_films(args.data_dir, args.tables, args.det10, folder, args.rsna, args.mirror, args.margin)
        if film_names(folder) != film_names(args.features[0]):
            raise ValueError(
                f"features: {args.features[0]} and {folder} do not hold the features of the same images in the same "
                "order; use extract with one --data-dir"
            )
        cells, transform = reduce_features(films, args.components)
        tuning = None
        if args.tune is not None:
            from images.frozen_tuning import Tuning

            tuning = Tuning(films, folder, transform, BACKBONE, str(args.weights), args.tune)
        networks.append(Network(films, cells, tuning, networks[0].films if networks else films))
    return networks


def train_and_predict(
    network: Network, trained: np.ndarray, evaluated: np.ndarray, method: Method, seed: int, args: argparse.Namespace
) -> tuple[Predicted, list[int | None]]:
    """The mean predictions of --heads heads for the images ``evaluated``, and the epochs in which lam began to rise."""
    films, cells = network.films, network.cells
    of_heads, starts = [], []
    for number in range(seed * args.heads, (seed + 1) * args.heads):
        head, pooling, started = train_head(cells, films, trained, method, number)
        shown = cells
        if network.tuning is not None:
            from images.frozen_tuning import tune, with_tuned

            blocks = tune(
                network.tuning, head, pooling, films, trained, method, started, number, args.tune_epochs, args.tune_lr
            )
            shown = with_tuned(cells, network.tuning, blocks, evaluated)
        of_heads.append(predict(head, pooling, shown, films, evaluated, method.grad_cam))
        starts.append(started)
    mean = mean_of_heads(of_heads)
    if args.mirror:
        mean = mean_with_mirrored(films, mean)
    return mean._replace(maps=on_cells_of(mean.maps, films, network.shown)), starts
