"""The steps of frozen_cxr.py: features of all films, runs, and the table of runs."""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path
from shutil import disk_usage

import numpy as np
import torch
import torch.nn.functional as F
from common.files import naming, write_json

from images.frozen import METHODS, evaluate, read_films, reduce_features, train_head

BACKBONE = "timm/tf_efficientnet_lite0"


def extract(args: argparse.Namespace) -> None:
    """Writes the feature maps (n, D, h, w) float16 of all images, and their names.

    The maps of the last two stages are concatenated on the grid of the last one. For this, each cell of the finer map
    is the mean of the 3x3 cells around the same pixel.
    """
    from features.backbones import import_timm
    from PIL import Image

    from images.nih import find_images
    from images.timm_networks import read_state

    timm = import_timm()
    network = timm.create_model(BACKBONE.removeprefix("timm/"), features_only=True, out_indices=(3, 4)).eval()
    state = read_state(args.weights)
    missing, _ = network.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    if any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"weights: {args.weights} does not fit {BACKBONE}")
    paths = find_images(args.data_dir)
    names = sorted(f"{stem}.png" for stem in paths)
    args.out.mkdir(parents=True, exist_ok=True)
    side = args.image_size // 32
    shape = (len(names), sum(network.feature_info.channels()), side, side)
    path, needed, free = args.out / "features.npy", 2 * math.prod(shape), disk_usage(args.out).free
    if needed > free:
        raise ValueError(f"{path}: the features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")

    def features_of(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            gray = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))[None, None]
        size = (args.image_size, args.image_size)
        gray = F.interpolate(gray, size, mode="bilinear", antialias=max(gray.shape[2:]) > args.image_size)
        with torch.no_grad():  # as the weights were trained in TensorFlow
            fine, coarse = network(((gray - 127) / 128).expand(-1, 3, -1, -1))
        fine = F.avg_pool2d(F.pad(fine, (0, 1, 0, 1), mode="replicate"), 3, 2)
        return torch.cat([coarse, fine], 1)[0].numpy()

    # Written in order, not through a memory map, with which a full disk terminates the process by a signal.
    with naming(path):
        file = path.open("wb")
    with file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
        with naming(path):
            np.lib.format.write_array_header_1_0(file, header)
        for i, name in enumerate(names):
            features = np.ascontiguousarray(features_of(paths[Path(name).stem]), np.float16)
            with naming(path):
                file.write(features.data)
            if i % 100 == 0:
                print(f"{i} of {len(names)} images", flush=True)
    with naming(args.out / "names.txt"):
        (args.out / "names.txt").write_text("\n".join(names) + "\n")


def train(args: argparse.Namespace) -> None:
    """Writes one file per run into ``args.out``: METHOD-seedSEED.json. Existing runs are skipped."""
    methods = args.methods or list(METHODS)
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    films = read_films(args.data_dir, args.tables, args.det10, args.features)
    cells = reduce_features(films, args.components)
    train_numbers, eval_numbers = films.split(args.validate)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for method in methods:
            path = args.out / f"{method}-seed{seed}.json"
            if path.exists():
                continue
            begun = time.monotonic()
            head, pooling, started = train_head(cells, films, train_numbers, METHODS[method], seed)
            result = evaluate(head, pooling, cells, films, eval_numbers, METHODS[method].grad_cam)
            result |= {
                "method": method, "seed": seed, "validate": args.validate, "lam_started_in_epoch": started,
                "seconds": round(time.monotonic() - begun, 1),
            }  # fmt: skip
            write_json(result, path)
            shares = [f"{name} {np.mean(found['half']['hits'], 0).round(2)}" for name, found in result["boxes"].items()]
            print(f"{method}, seed {seed}: AUC {result['auc']:.3f}; boxes: {', '.join(shares)}", flush=True)


def table(args: argparse.Namespace) -> None:
    """films.csv: one row per method, set of boxes and rule of the box, with every seed."""
    runs = [json.loads(path.read_text()) for path in sorted(args.runs.glob("*.json"))]
    if not runs:
        raise ValueError(f"runs: {args.runs} holds no run")
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
                for k, least in enumerate((0.1, 0.3, 0.5)):
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
        row |= {f"iou_{t}": round(float(np.mean([c[k] for c in centre])), 4) for k, t in enumerate((0.1, 0.3, 0.5))}
        rows.append(row)
    with naming(args.out), args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{args.out}: {len(rows)} rows of {len(runs)} runs")


def interval_over_patients(values: np.ndarray, patients: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean of ``values`` (n,), by a bootstrap over patients."""
    _, number = np.unique(patients, return_inverse=True)
    sums, counts = np.bincount(number, values), np.bincount(number)
    chosen = np.random.default_rng(0).integers(len(sums), size=(draws, len(sums)))
    means = sums[chosen].sum(1) / counts[chosen].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
