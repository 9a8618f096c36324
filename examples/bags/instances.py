"""Loads instances: images with one class each, split into train and test, scaled to 32x32."""

from __future__ import annotations

import errno
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common.import_torchvision import import_torchvision
from torch import Tensor

SIDE = 32


class Instances(NamedTuple):
    """Images (n, channels, 32, 32), float32, normalized by mean and deviation of the training images; classes (n,)."""

    train_images: Tensor
    train_classes: np.ndarray
    test_images: Tensor
    test_classes: np.ndarray


def load_instances(data: str, data_dir: str) -> Instances:
    """Instances of ``data``: ``"digits"``, ``"mnist"`` or ``"cifar10"`` (of ``data_dir``), or the path of an .npz file.

    An .npz holds x_train (n, height, width) or (n, height, width, channels), y_train (n,), x_test and y_test.
    """
    if data == "digits":
        arrays = _digits()
    elif data == "mnist":
        arrays = _mnist(Path(data_dir))
    elif data == "cifar10":
        arrays = _cifar10(data_dir)
    elif data.endswith(".npz"):
        arrays = _npz(Path(data))
    else:
        raise ValueError(f"data: expected 'digits', 'mnist', 'cifar10' or the path of an .npz file, got {data!r}")
    x_train, y_train, x_test, y_test = arrays
    train, test = _scaled(x_train), _scaled(x_test)
    mean = train.mean(dim=(0, 2, 3), keepdim=True)
    std = train.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-6)
    return Instances((train - mean) / std, y_train, (test - mean) / std, y_test)


def _digits() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))  # shuffle: the data set is sorted by writer
    train, test = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    return digits.images[train], digits.target[train], digits.images[test], digits.target[test]


def _mnist(data_dir: Path) -> tuple[np.ndarray, ...]:
    datasets = import_torchvision().datasets
    with tempfile.TemporaryDirectory() as scratch:
        try:
            both = [datasets.MNIST(str(data_dir), train=train, download=True) for train in (True, False)]
        except OSError as error:  # a read-only folder with packed files: unpack them elsewhere
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raw = Path(scratch, "MNIST", "raw")
            raw.mkdir(parents=True)
            for packed in (data_dir / "MNIST" / "raw").glob("*.gz"):
                (raw / packed.name).symlink_to(packed.resolve())
            both = [datasets.MNIST(scratch, train=train, download=True) for train in (True, False)]
    train, test = both
    return train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy()


def _cifar10(data_dir: str) -> tuple[np.ndarray, ...]:
    datasets = import_torchvision().datasets
    train, test = (datasets.CIFAR10(data_dir, train=train, download=True) for train in (True, False))
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def _npz(path: Path) -> tuple[np.ndarray, ...]:
    if not path.is_file():
        raise ValueError(f"data: no such file: {path}")
    try:
        opened = np.load(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} is not a readable .npz file ({error})") from None
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise ValueError(f"data: expected a file of numpy.savez, got a single array in {path}")
    with opened as file:
        names = ("x_train", "y_train", "x_test", "y_test")
        missing = [name for name in names if name not in file]
        if missing:
            raise ValueError(f"data: {path} has no {', '.join(missing)}")
        arrays = tuple(file[name] for name in names)
    for kind, x, y in (("train", *arrays[:2]), ("test", *arrays[2:])):
        if x.ndim not in (3, 4) or x.shape[0] == 0 or x.dtype.kind not in "uifb":
            raise ValueError(
                f"x_{kind}: expected numbers (n, height, width) or (n, height, width, channels), "
                f"got {x.dtype} {x.shape}"
            )
        if y.shape != x.shape[:1] or y.dtype.kind not in "ui":
            raise ValueError(f"y_{kind}: expected {x.shape[0]} integers, one per image, got {y.dtype} {y.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"x_{kind}: expected finite values, got {np.count_nonzero(~np.isfinite(x))} that are not")
    if arrays[0].shape[3:] != arrays[2].shape[3:]:
        raise ValueError(f"x_test: expected as many channels as x_train, got {arrays[2].shape} and {arrays[0].shape}")
    return arrays


def _scaled(images: np.ndarray) -> Tensor:
    """(n, channels, 32, 32) float32 of (n, height, width[, channels])."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32)
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return x.contiguous()
