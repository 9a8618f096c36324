"""The steps of frozen_cxr.py: features of all films, runs, and the table of runs."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from shutil import disk_usage

import numpy as np
import torch
import torch.nn.functional as F
from common.csv_table import write_rows
from common.files import naming, read_json, write_json, write_text
from common.metrics import Interval, interval
from common.weights import read_weights
from torch import Tensor

from images.frozen import FIRST, METHODS, T_IOU, evaluate, evaluated_boxes, read_films, reduce_features, train_head

BACKBONE = "timm/tf_efficientnet_lite0"


def extract(args: argparse.Namespace) -> None:
    """Writes the feature maps (n, D, h, w) float16 of all images, and their names.

    Without --stages, the maps of the last two stages are concatenated on the grid of the last one, see
    :func:`last_two_stages`, and the input of the last two blocks is written for ``train --tune``.
    """
    from images.nih import find_images

    paths = find_images(args.data_dir)
    names = sorted(f"{stem}.png" for stem in paths)
    args.out.mkdir(parents=True, exist_ok=True)
    maps_of, first = chosen_stages(args) if args.stages else last_two_stages(args)
    shapes = [maps.shape for maps in maps_of(_gray(paths[Path(names[0]).stem]))]
    files = [args.out / name for name in ("features.npy", "before.npy")][: len(shapes)]
    needed = sum(2 * len(names) * math.prod(shape) for shape in shapes)
    free = disk_usage(args.out).free
    if needed > free:
        raise ValueError(f"{files[0]}: the features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    (args.out / "before.npy").unlink(missing_ok=True)  # of an earlier extraction with other stages
    # Written in order, not through a memory map, with which a full disk terminates the process by a signal.
    with ExitStack() as stack:
        opened = []
        for path, shape in zip(files, shapes, strict=True):
            with naming(path):
                opened.append(stack.enter_context(path.open("wb")))
                header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (len(names), *shape)}
                np.lib.format.write_array_header_1_0(opened[-1], header)
        for i, name in enumerate(names):
            for path, file, maps in zip(files, opened, maps_of(_gray(paths[Path(name).stem])), strict=True):
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

    With --tune, the head and the last blocks of the network are trained further before the evaluation.

    Raises:
        ValueError: an unknown method, or an existing run had other settings.
    """
    methods = args.methods or list(METHODS)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    films = read_films(args.data_dir, args.tables, args.det10, args.features, args.rsna)
    cells, transform = reduce_features(films, args.components)
    tuning = None
    if args.tune is not None:
        from images.frozen_tuning import Tuning, tune, with_tuned

        tuning = Tuning(films, args.features, transform, BACKBONE, str(args.weights), args.tune)
    train_numbers, eval_numbers = films.split(args.validate)
    tuned = {"blocks": args.tune, "epochs": args.tune_epochs, "lr": args.tune_lr} if tuning is not None else None
    settings = {"validate": args.validate, "components": args.components, "tuned": tuned}
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in methods:
            path = args.out / f"{method}-seed{seed}.json"
            if path.exists():
                refuse_other_settings(path, settings, evaluated_boxes(films, eval_numbers))
                continue
            begun = time.monotonic()
            head, pooling, started = train_head(cells, films, train_numbers, METHODS[method], seed)
            shown = cells
            if tuning is not None:
                blocks = tune(
                    tuning, head, pooling, films, train_numbers, METHODS[method], started, seed, args.tune_epochs,
                    args.tune_lr,
                )  # fmt: skip
                shown = with_tuned(cells, tuning, blocks, eval_numbers)
            result = evaluate(head, pooling, shown, films, eval_numbers, METHODS[method].grad_cam)
            result |= settings | {
                "method": method, "seed": seed, "lam_started_in_epoch": started,
                "seconds": round(time.monotonic() - begun, 1),
            }  # fmt: skip
            write_json(result, path)
            shares = [f"{name} {np.mean(found['half']['hits'], 0).round(2)}" for name, found in result["boxes"].items()]
            print(f"{method}, seed {seed}: AUC {result['auc']:.3f}; boxes: {', '.join(shares)}", flush=True)


def refuse_other_settings(path: Path, settings: dict, boxes: Collection[str]) -> None:
    """Raises ValueError if the run in ``path`` had other ``settings``, or other sets of ``boxes``.

    A run of an older version has no components, and no key "tuned" if it was not tuned.
    """
    known = {"components": settings["components"], "tuned": None} | read_json(path)
    changed = [name for name in settings if known[name] != settings[name]]
    changed += [name for name in ("det10", "rsna") if (name in known["boxes"]) != (name in boxes)]
    if changed:
        option = changed[0].replace("tuned", "tune")
        raise ValueError(f"out: {path} was made with another --{option}; choose another --out")


def table(args: argparse.Namespace) -> None:
    """films.csv: one row per method, set of boxes and rule of the box, with every seed.

    Raises:
        ValueError: there are no runs, no boxes, or the runs have different sets of boxes.
    """
    runs = [read_json(path) for path in sorted(args.runs.glob("*.json"))]
    if not runs:
        raise ValueError(f"runs: {args.runs} holds no run")
    if any(list(run["boxes"]) != list(runs[0]["boxes"]) for run in runs):
        raise ValueError(
            f"runs: expected equal sets of boxes in all runs of {args.runs}; use --det10, and --rsna, for all or none"
        )
    if not runs[0]["boxes"]:
        raise ValueError(f"runs: the runs of {args.runs} have no boxes; --validate needs --det10 or --rsna")
    rows = []
    for method in [m for m in METHODS if any(run["method"] == m for run in runs)]:
        own = sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])
        aucs = [run["auc"] for run in own]
        for boxes in own[0]["boxes"]:
            for rule in own[0]["boxes"][boxes]:
                found = [run["boxes"][boxes][rule] for run in own]
                hits = np.array([f["hits"] for f in found], float)  # seeds, boxes, thresholds
                patients = np.array(found[0]["patients"])
                row = {
                    "method": method, "boxes": boxes, "rule": rule, "seeds": len(own), "count": hits.shape[1],
                    "auc": round(float(np.mean(aucs)), 4), "auc_of_seeds": " ".join(f"{a:.3f}" for a in aucs),
                }  # fmt: skip
                for k, least in enumerate(T_IOU):
                    per_seed = hits[:, :, k].mean(1)
                    low, high = interval_over_patients(hits[:, :, k].mean(0), patients)
                    row |= {
                        f"iou_{least}": round(float(per_seed.mean()), 4),
                        f"iou_{least}_interval": f"{low:.2f} to {high:.2f}",
                        f"iou_{least}_of_seeds": " ".join(f"{a:.2f}" for a in per_seed),
                    }
                row["pointing"] = round(float(np.mean([f["pointing"] for f in found])), 4)
                rows.append(row)
    for boxes, rules in runs[0]["boxes"].items():
        centre = rules["half"]["centre"]
        row = {"method": "centre box", "boxes": boxes, "count": len(centre)}
        row |= {f"iou_{t}": round(float(np.mean([c[k] for c in centre])), 4) for k, t in enumerate(T_IOU)}
        rows.append(row)
    write_rows(rows, args.out, list(rows[0]))
    print(f"{args.out}: {len(rows)} rows of {len(runs)} runs")


def interval_over_patients(values: np.ndarray, patients: np.ndarray, draws: int = 2000) -> Interval:
    """The 95 % interval of the mean of ``values`` (n,), by a bootstrap over patients."""
    _, number = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    return interval(sums[chosen].sum(1) / counts[chosen].sum(1))
