"""From an image file to grey values, and from grey values to the input of a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Mean and deviation per channel of what torchvision's networks were trained on.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_image(path: Path, size: int) -> np.ndarray:
    """The radiograph as grey values (size, size) uint8.

    Colours become grey, an alpha channel is dropped, 16 bits become the upper 8.

    Raises:
        ValueError: it cannot be read to its end, it is not square (so that boxes would not fit), or its pixels are
            neither 8 nor 16 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from None
    if image.width != image.height:
        raise ValueError(f"{path}: expected a square image, got {image.width}x{image.height}")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"{path}: expected 8 or 16 bits, got values {wide.min()} to {wide.max()}")
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(f"{path}: expected 8 or 16 bits, got floating point")
    image = image.convert("L")
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # of all pixels that fall into one
    return np.array(image)


def to_input(images: np.ndarray | Tensor) -> Tensor:
    """What a network takes, (n, 3, height, width) float32, of grey values (n, height, width) uint8."""
    x = torch.as_tensor(images)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x.unsqueeze(1).float() / 255 - mean) / std
