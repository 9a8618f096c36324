"""Trains a network with image labels so that it also localizes the classes: ChestX-ray14, CheXpert, your own images.

    python train_cxr.py --data-dir DIR --out RUN                                     the paper's settings
    torchrun --nproc-per-node 8 train_cxr.py --data-dir DIR --out RUN --amp bf16     on eight GPUs
    python train_cxr.py --data-dir DIR --out RUN --loss bag --pooling mean           the paper's baseline
    python train_cxr.py --data-dir DIR --out RUN --backbone local33 --pooling max    a receptive field of 33 pixels
    python train_cxr.py --data-dir DIR --out RUN --backbone timm/resnet50.tv_in1k    a network of timm
    python train_cxr.py --synthetic                                                  a demonstration, two minutes

The command first checks DIR as check_cxr.py does. It writes into RUN: config.json, split.csv (the images of each part),
history.csv, last.pt, best.pt (the epoch with the highest validation AUC), and TensorBoard logs if TensorBoard is
installed. After an interruption or a crash, the same command with --resume continues. On the CPU, the result is bitwise
equal to that of an uninterrupted run.

--cache DIR stores the decoded and resized images, so that later epochs do not decode them again. For evaluation see
localize_cxr.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.interrupt import Interrupt
from common.options import message_of, next_step
from common.progress import Progress
from images.options import config_of, given_data_options, parse

if TYPE_CHECKING:  # torch is imported after the options are read: --help is fast
    import numpy as np
    from common.choices import Config
    from common.processes import Processes
    from images.items import LabelledImages
    from images.training import Training
    from torch import Tensor


def take_step(training: Training, passes: list[tuple[Tensor, ...]], progress: float) -> None:
    """One optimizer step over ``passes`` of (images, labels, frames), ``progress`` epochs after the start."""
    training.set_progress(progress)
    for number, (images, labels, frames) in enumerate(passes):
        with training.gradients_of_pass(last=number == len(passes) - 1):
            loss, terms = training.loss_of(images, labels, frames)
            training.scaler.scale(loss / len(passes)).backward()
        training.sums += terms / len(passes)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad()


def train_epoch(
    training: Training, data: LabelledImages, numbers: np.ndarray, args: argparse.Namespace, checkpoint: Path
) -> float:
    """Trains the rest of the epoch on the images ``numbers``. Saves ``checkpoint`` every ``--save-every`` steps.

    Returns:
        images per second, summed over the processes.
    """
    from images.batches import batches_of, loader_of

    config, processes = training.config, training.processes
    accumulate, first_step = config["accumulate"], training.step
    batches = batches_of(numbers, config, training.epoch, processes.rank, processes.count)
    steps = len(batches) // accumulate
    training.train_mode()
    loader = iter(loader_of(data, batches[first_step * accumulate :], args))
    start = time.perf_counter()
    progress = Progress(
        range(first_step, steps), desc=f"epoch {training.epoch + 1}", initial=first_step, total=steps, unit="step",
        disable=not processes.first, mininterval=0.5,
    )  # fmt: skip
    for step in progress:
        Interrupt.raise_again()
        passes = [next(loader)[:3] for _ in range(accumulate)]
        take_step(training, passes, training.epoch + step / steps)
        training.step = step + 1
        if training.step % 50 == 0 and not progress.disable:
            progress.set_postfix(loss=f"{float(training.sums[0]) / training.step:.3f}")
        if training.step % args.save_every == 0 and training.step < steps:
            training.save(checkpoint)
    seconds = time.perf_counter() - start
    return (steps - first_step) * config["batch_size"] / seconds if steps > first_step else math.nan


def finish_epoch(
    training: Training, data: LabelledImages, numbers: np.ndarray, args: argparse.Namespace, speed: float
) -> tuple[dict[str, Any], bool]:
    """Validates on the images ``numbers``, and moves ``training`` to the next epoch.

    Returns:
        the epoch's row of history.csv, and whether its network is the best so far.
    """
    from images.training import validate

    row = training.row_of_epoch(speed)
    better = False
    if len(numbers):
        validation = validate(training, data, numbers, args)
        row |= validation
        score = [-1.0 if math.isnan(validation["val_auc"]) else validation["val_auc"], -validation["val_loss"]]
        better = training.best_score is None or score > training.best_score
        training.best_score = score if better else training.best_score
    training.next_epoch(row)
    return row, better


def train(args: argparse.Namespace, config: Config, processes: Processes) -> None:
    """Trains one run.

    Raises:
        ValueError: the data or the settings are invalid, or ``--out`` holds a run with other settings.
    """
    from common.losses import lam_warning
    from images.run_folder import RunFolder, locked, refuse_existing
    from images.sources import open_sources
    from images.training import Training, dry_run

    sources = open_sources(args, config)
    with locked(args.out) if processes.first and not args.dry_run else contextlib.nullcontext():
        last = (Path() if args.dry_run else args.out) / "last.pt"
        if not args.dry_run and (processes.first or last.exists()):  # the first process may remove best.pt at this time
            refuse_existing(args.out, args.resume)
        if processes.first:
            print(sources.report, flush=True)
        train_data, eval_data = sources.data(args, config)
        training = Training(config, processes, args.compile)
        if processes.first:
            print(training.network.description(config["image_size"]), flush=True)
            if (warning := lam_warning(config)) is not None:
                print(warning, flush=True)
        if args.dry_run:
            dry_run(training, train_data, sources.split.train, args, take_step)
            return
        if args.resume and last.exists():
            training.restore(last)
        folder = RunFolder(args.out, sources, training, args.resume) if processes.first else None
        while training.epoch < config["epochs"]:
            speed = train_epoch(training, train_data, sources.split.train, args, last)
            row, better = finish_epoch(training, eval_data, sources.split.val, args, speed)
            if folder is not None:
                folder.save_epoch(training, row, better)
        if processes.first and (warning := lam_warning(config, training.history, training.lam_schedule)) is not None:
            print(f"\n{warning}", flush=True)


def next_command(args: argparse.Namespace) -> str:
    """The command to run after a training."""
    if args.dry_run:
        return "the same command without --dry-run"
    return f"python localize_cxr.py --run {args.out} {given_data_options(args)}"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv, __doc__)
    Interrupt.listen()
    try:
        from common.processes import joined

        with joined(args.device) as processes:
            if args.synthetic:
                from images.demo import demonstrate

                return demonstrate(args, processes, train)
            train(args, config_of(args), processes)
            if processes.first:
                next_step(next_command(args))
    except (Exception, KeyboardInterrupt) as error:
        if not Interrupt.received and not isinstance(error, KeyboardInterrupt):
            if not isinstance(error, (ValueError, OSError)):
                raise
            print(f"error: {message_of(error)}", file=sys.stderr)
            return 2
        if os.environ.get("RANK", "0") == "0":
            advice = "" if args.dry_run else "; the same command with --resume continues after the last checkpoint"
            print(f"\nstopped{advice}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
