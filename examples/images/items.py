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

from images.frames import clip_boxes, frames_of
from images.pixels import load_image


class LabelledImages(Dataset):
    """Square images with labels, for a torch DataLoader.

    ``images``: an array (n, size, size[, 3]) uint8, or n paths. Paths are decoded at each access, with ``channels`` and
    ``fit``. ``labels``: (n, C). ``sizes``: (n, 2), width and height of the files, needed if ``fit`` is "pad".

    The index of an item is (epoch, number). The item is (pixels (crop, crop[, 3]) uint8, labels (C,), frame (4,) int64,
    number). The frame is x, y, width, height of the content without padding. Without ``crop``, an item is the whole
    image. The position of the crop depends only on ``seed``, the epoch and the image's name in ``names`` (n,). It does
    not depend on workers, processes, interruptions or the other images.
    """

    def __init__(
        self,
        images: np.ndarray | Sequence[Path],
        labels: np.ndarray,
        size: int,
        crop: int | None = None,
        seed: int = 0,
        names: Sequence[str] = (),
        *,
        sizes: np.ndarray | None = None,
        channels: int = 1,
        fit: str = "square",
    ):
        if crop is not None and len(names) != len(labels):
            raise ValueError(f"names: expected one for each of the {len(labels)} images, got {len(names)}")
        if fit == "pad" and sizes is None:
            raise ValueError("sizes: needed if images are padded")
        self.images, self.labels, self.size, self.crop, self.seed, self.names = images, labels, size, crop, seed, names
        self.sizes, self.channels, self.fit = sizes, channels, fit

    def __getstate__(self) -> dict[str, Any]:
        # image-loading processes open the memory-mapped file instead of receiving its contents
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, int]:
        epoch, number = key
        image = self.images[number]
        if isinstance(image, Path):
            image = load_image(image, self.size, self.channels, self.fit)
        frame = np.array([0, 0, self.size, self.size])
        if self.fit == "pad":
            (frame,) = frames_of(self.sizes[number], self.size, self.fit)
        if self.crop is not None:
            rng = np.random.default_rng((self.seed, epoch, zlib.crc32(self.names[number].encode())))
            y, x = rng.integers(0, self.size - self.crop + 1, 2)
            image = image[y : y + self.crop, x : x + self.crop]
            frame = clip_boxes(frame - [x, y, 0, 0], np.array([0, 0, self.crop, self.crop]))
        return torch.from_numpy(np.array(image)), torch.from_numpy(self.labels[number]), torch.from_numpy(frame), number


class ReadableImages(Dataset):
    """The items of ``data``, each with the message of the error if its file cannot be read, else with an empty text.

    The pixels of an unreadable image are 0, so that the other images of its batch are returned.
    """

    def __init__(self, data: LabelledImages):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, int, str]:
        try:
            return *self.data[key], ""
        except ValueError as error:
            side, number = self.data.size, key[1]
            shape = (side, side) if self.data.channels == 1 else (side, side, self.data.channels)
            frame = torch.tensor([0, 0, side, side])
            return (
                torch.zeros(shape, dtype=torch.uint8),
                torch.from_numpy(self.data.labels[number]),
                frame,
                number,
                str(error),
            )
