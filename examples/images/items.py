"""Images and labels for a torch DataLoader."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from images.pixels import load_image


class Radiographs(Dataset):
    """Images with labels, for a torch DataLoader.

    ``images``: an array (n, size, size) uint8, or n paths, decoded when asked for. ``labels``: (n, 14). An item is
    asked for by (epoch, number), and is (grey values (crop, crop) uint8, labels (14,), number). Without ``crop`` it is
    the whole image. Where it is cropped depends on ``seed``, epoch and its name of ``names`` (n,) alone, and so not on
    workers, processes, an interruption, or what other images there are.
    """

    def __init__(
        self,
        images: np.ndarray | Sequence[Path],
        labels: np.ndarray,
        size: int,
        crop: int | None = None,
        seed: int = 0,
        names: Sequence[str] = (),
    ):
        if crop is not None and len(names) != len(labels):
            raise ValueError(f"names: expected one for each of the {len(labels)} images, got {len(names)}")
        self.images, self.labels, self.size, self.crop, self.seed, self.names = images, labels, size, crop, seed, names

    def __getstate__(self) -> dict[str, Any]:
        # a process that loads images opens the file itself, instead of being sent what is in it
        state = dict(self.__dict__)
        if isinstance(self.images, np.memmap):
            state["images"] = (self.images.filename, self.images.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], tuple):
            name, shape = state["images"]
            state["images"] = np.memmap(name, dtype=np.uint8, mode="r", shape=shape)
        self.__dict__ = state

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, number = key
        image = self.images[number]
        if isinstance(image, Path):
            image = load_image(image, self.size)
        if self.crop is not None:
            rng = np.random.default_rng((self.seed, epoch, zlib.crc32(self.names[number].encode())))
            y, x = rng.integers(0, self.size - self.crop + 1, 2)
            image = image[y : y + self.crop, x : x + self.crop]
        return torch.from_numpy(np.array(image)), torch.from_numpy(self.labels[number]), number
