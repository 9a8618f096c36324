"""The split into training and validation images, and the images of each step and process."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from common.choices import Config
from common.interrupt import ignore_interrupts
from torch.utils.data import DataLoader

from images.dataset import Index
from images.items import LabelledImages
from images.options import crop_side


class Split(NamedTuple):
    """Indices of the images of each part."""

    train: np.ndarray
    val: np.ndarray
    val_patients: np.ndarray


def validation_patients(index: Index, fraction: float, seed: int) -> np.ndarray:
    """The validation patients, sorted: a ``fraction`` of the patients outside the test part, drawn with ``seed``.

    With 1/8, the official lists of ChestX-ray14 give the paper's 70, 10 and 20 percent.
    """
    patients = np.unique(index.patients[~index.test])
    count = round(fraction * len(patients))
    return np.sort(np.random.default_rng(seed).permutation(patients)[:count])


def split_of(index: Index, config: Config) -> Split:
    """The split of the data set. Validation patients are drawn if the data set does not define them."""
    if index.val is not None:
        return Split(
            np.flatnonzero(~index.test & ~index.val), np.flatnonzero(index.val), np.unique(index.patients[index.val])
        )
    patients = validation_patients(index, config["val_fraction"], config["seed"])
    val = np.isin(index.patients, patients) & ~index.test
    return Split(np.flatnonzero(~index.test & ~val), np.flatnonzero(val), patients)


def batches_of(numbers: np.ndarray, config: Config, epoch: int, rank: int, count: int) -> list[list[tuple[int, int]]]:
    """The (epoch, number) of the images of process ``rank`` of ``count`` in an epoch, one list per forward pass.

    The order depends on seed and epoch only. A step has ``batch_size`` images over all processes. It is divided into
    ``accumulate`` passes, and the processes share each pass. Images that do not fill a last step are left out.
    """
    size = config["batch_size"]
    order = np.random.default_rng((config["seed"], 1 + epoch)).permutation(numbers)
    steps = len(order) // size
    share = size // config["accumulate"] // count
    passes = order[: steps * size].reshape(steps * config["accumulate"], count, share)[:, rank]
    return [[(epoch, int(number)) for number in one_pass] for one_pass in passes]


def crop_of(config: Config) -> int:
    """The side of the training crops in pixels."""
    return crop_side(config["image_size"], config["output_stride"])


def loader_of(data: LabelledImages, batches: list[list[tuple[int, int]]], args: argparse.Namespace) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=args.workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.device(args.device).type == "cuda",
        generator=torch.Generator().manual_seed(
            0
        ),  # with the default, the loader would change the random numbers of the training
    )
