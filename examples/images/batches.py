"""Which images train and validate, and which of them each step of each process sees."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from common.choices import Config
from common.interrupt import leave_interrupts
from torch.utils.data import DataLoader

from images.dataset import Index
from images.items import LabelledImages
from images.options import crop_side


class Split(NamedTuple):
    """Numbers of images in the index."""

    train: np.ndarray
    val: np.ndarray
    val_patients: np.ndarray


def validation_patients(index: Index, fraction: float, seed: int) -> np.ndarray:
    """The patients outside the test part that validate: ``fraction`` of them, drawn by ``seed``; sorted.

    1/8 makes of the official lists of ChestX-ray14 the paper's 70, 10 and 20 percent.
    """
    patients = np.unique(index.patients[~index.test])
    count = round(fraction * len(patients))
    return np.sort(np.random.default_rng(seed).permutation(patients)[:count])


def split_of(index: Index, config: Config) -> Split:
    """The split of the data set; where it does not say who validates, a part of the patients is drawn."""
    if index.val is not None:
        return Split(
            np.flatnonzero(~index.test & ~index.val), np.flatnonzero(index.val), np.unique(index.patients[index.val])
        )
    patients = validation_patients(index, config["val_fraction"], config["seed"])
    val = np.isin(index.patients, patients) & ~index.test
    return Split(np.flatnonzero(~index.test & ~val), np.flatnonzero(val), patients)


def batches_of(numbers: np.ndarray, config: Config, epoch: int, rank: int, count: int) -> list[list[tuple[int, int]]]:
    """The (epoch, number) of every image that process ``rank`` of ``count`` sees in an epoch, by forward pass.

    The order depends on seed and epoch alone. A step is ``batch_size`` images, of all processes, cut into
    ``accumulate`` passes, each of which the processes share. What is left over at the end waits for another epoch.
    """
    size = config["batch_size"]
    order = np.random.default_rng((config["seed"], 1 + epoch)).permutation(numbers)
    steps = len(order) // size
    share = size // config["accumulate"] // count
    passes = order[: steps * size].reshape(steps * config["accumulate"], count, share)[:, rank]
    return [[(epoch, int(number)) for number in some] for some in passes]


def crop_of(config: Config) -> int:
    return crop_side(config["image_size"], config["output_stride"])


def loader_of(data: LabelledImages, batches: list[list[tuple[int, int]]], args: argparse.Namespace) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=args.workers,
        worker_init_fn=leave_interrupts,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else it would take a number from the one of the training
    )
