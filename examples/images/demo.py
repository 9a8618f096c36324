"""The demonstration of train_cxr.py --synthetic: generated images, runs with SGL and the bag loss, a report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from common.processes import Processes

from images.options import DEMO_DATA, config_of
from images.synthetic_set import write_dataset


def demonstrate(args: argparse.Namespace, processes: Processes, train: Callable[..., None]) -> int:
    """Generates images, trains with SGL and with the bag loss alone, and writes a report of both."""
    args.out = Path("runs/cxr") if args.out is None else args.out
    args.data_dir = args.out / "data"
    if processes.first and not (args.resume and args.data_dir.exists()):
        if args.data_dir.exists():
            raise ValueError(
                f"out: {args.out} holds a demonstration; continue it with --resume, or name another folder"
            )
        temporary = args.out / "data.part"  # renamed when complete
        shutil.rmtree(temporary, ignore_errors=True)
        write_dataset(temporary, seed=args.seed, workers=os.cpu_count() or 1, **DEMO_DATA)
        os.replace(temporary, args.data_dir)
    if processes.group is not None:
        dist.barrier()
    args.cache = args.out / "cache"
    out = args.out
    for name in ("sgl", "bag"):
        args.out, args.loss = out / name, name
        print(f"\n{name}: training with the labels of the images\n")
        train(args, config_of(args), processes)
    if not processes.first or importlib.util.find_spec("localize_cxr") is None:
        return 0
    import localize_cxr

    return localize_cxr.main([
        "--run", str(out / "sgl"), str(out / "bag"), "--data-dir", str(args.data_dir), "--cache", str(args.cache),
        "--out", str(out / "report"), "--device", args.device,
    ])  # fmt: skip
