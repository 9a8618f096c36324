"""Random bags: the instances of each bag, and which of them are positive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Bags(NamedTuple):
    """N bags of T instances altogether; bag i is ``index[offsets[i]:offsets[i + 1]]``."""

    index: Tensor  # (T,) int64: the index of the image of each instance
    positive: Tensor  # (T,) bool: the instance is of the target class; for evaluation only
    offsets: Tensor  # (N + 1,) int64
    labels: Tensor  # (N,) float32: 1 if the bag has a positive instance


def draw_bags(
    pool: np.ndarray,
    is_target: np.ndarray,
    count: int,
    size: float,
    size_std: float,
    rng: np.random.Generator,
    positives: int = 0,
) -> Bags:
    """``count`` bags of the images ``pool``, half of them positive, in random order.

    The size of a bag is drawn from a normal distribution and rounded, and is at least 1. The instances of a bag are
    drawn at random. A positive bag has ``positives`` targets. If that is 0, it has a random number of targets, at least
    one. A negative bag is drawn from the other images. A bag holds an image twice only if there are too few images.

    Args:
        pool: (n,), indices of the images to draw from.
        is_target: bool, for every image that ``pool`` may contain.
    """
    targets, others = pool[is_target[pool]], pool[~is_target[pool]]
    for kind, images in (("of the target class", targets), ("of another class", others)):
        if len(images) == 0:
            raise ValueError(f"data: expected at least one image {kind} among the {len(pool)} to draw bags from")
    if count < 1:
        raise ValueError(f"count: expected at least 1 bag, got {count}")
    if positives > size or (positives and size_std):
        raise ValueError(f"positives: expected up to {size:g}, and bags of one size, got {positives}")
    sizes = np.maximum(1, np.rint(rng.normal(size, size_std, count))).astype(np.int64)
    labels = rng.permutation(np.arange(count) % 2 == 0)
    rate = len(targets) / len(pool)
    index, positive = [], []
    for length, label in zip(sizes, labels, strict=True):
        number = (positives or _at_least_one(length, rate, rng)) if label else 0
        bag = np.concatenate((_choose(targets, number, rng), _choose(others, length - number, rng)))
        order = rng.permutation(length)
        index.append(bag[order])
        positive.append((np.arange(length) < number)[order])
    return Bags(
        torch.from_numpy(np.concatenate(index).astype(np.int64)),
        torch.from_numpy(np.concatenate(positive)),
        torch.from_numpy(np.concatenate(([0], np.cumsum(sizes)))),
        torch.from_numpy(labels.astype(np.float32)),
    )


def take(bags: Bags, which: Tensor) -> Bags:
    """The bags ``which``, in that order."""
    lengths = bags.offsets.diff()[which]
    offsets = torch.cat((bags.offsets.new_zeros(1), lengths.cumsum(0)))
    shift = (bags.offsets[which] - offsets[:-1]).repeat_interleave(lengths)
    rows = torch.arange(len(shift), device=shift.device) + shift
    return Bags(bags.index[rows], bags.positive[rows], offsets, bags.labels[which])


def to_device(bags: Bags, device: torch.device) -> Bags:
    return Bags(*(part.to(device) for part in bags))


def _choose(images: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(images, number, replace=number > len(images))


def _at_least_one(trials: int, rate: float, rng: np.random.Generator) -> int:
    """A binomial number under the condition that it is not 0."""
    # `first` is the number of the first success, given that there is one. The later trials are independent.
    u = rng.random() * -np.expm1(trials * np.log1p(-rate))
    first = min(int(np.log1p(-u) / np.log1p(-rate)) + 1, trials)
    return 1 + int(rng.binomial(trials - first, rate))
