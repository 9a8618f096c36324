"""Converts an image file to grey or colour values, and these to the input of a network."""

from __future__ import annotations

import functools
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from images.depth import bits_used
from images.dicom import DICOM, begins_as_dicom, read_dicom, read_dicom_header
from images.frames import frames_of

#: Mean and standard deviation per channel of the images that torchvision's networks were trained on.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Values of the padding: the integers nearest to MEAN, so that the network gets about 0.
PADDING = tuple(round(255 * value) for value in MEAN)
ORIENTATION = 0x0112  # EXIF tag; values of 5 and more exchange width and height


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that can be read, in lower case."""
    from PIL import Image

    # Pillow writes more formats than it reads, such as PDF
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN) | set(DICOM)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its suffix, or by its first bytes if it has no suffix of an image."""
    suffix = path.suffix.lower()
    return suffix in DICOM or (suffix not in image_suffixes() and begins_as_dicom(path))


def is_image(path: Path) -> bool:
    """Whether ``path`` is a file with the suffix of an image, or a DICOM file with any suffix or none."""
    return path.is_file() and (path.suffix.lower() in image_suffixes() or is_dicom(path))


def name_without_suffix(path: PurePath) -> str:
    """The last part of ``path`` without the suffix of an image. Other suffixes stay: the name may be a number 1.2.3."""
    return path.stem if path.suffix.lower() in image_suffixes() else path.name


def read_header(path: Path) -> tuple[int, int, bool]:
    """Width and height of the displayed image, and whether it has colours, without decoding it.

    Raises:
        ValueError: not a readable image.
    """
    from PIL import Image

    if is_dicom(path):
        return read_dicom_header(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from None
    return (height, width, not grey) if turned else (width, height, not grey)


def read_image(path: Path) -> Any:
    """The displayed image, a Pillow image of mode L or RGB.

    The EXIF orientation is applied, and an alpha channel is dropped. Grey images of 16 bits are scaled by the number of
    used bits (8, 10, 12, 14 or 16: the smallest that holds the brightest pixel). For 16 bits per colour, the upper 8
    bits are read; it is an error if they use less than a quarter of the range.

    Raises:
        ValueError: the image cannot be read completely, or has an unsupported kind of pixels.
    """
    from PIL import Image, ImageOps

    if is_dicom(path):
        return Image.fromarray(read_dicom(path))
    try:
        with Image.open(path) as image:
            image.load()
            deep = image.format == "PNG" and _png_depth(path) == 16
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from None
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), path))
    if image.mode == "F":
        raise ValueError(f"{path}: expected 8 or 16 bits, got floating point")
    if deep and max(high for _, high in _extrema(image)) < 64:
        raise ValueError(
            f"{path}: 16 bits per colour, but the upper 8 bits only reach {max(high for _, high in _extrema(image))} "
            "of 255; scale the image to 8 bits first"
        )
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _extrema(image: Any) -> list[tuple[int, int]]:
    """The lowest and highest value of each colour, without an alpha channel."""
    bands = image.split()
    return [band.getextrema() for band, name in zip(bands, image.getbands(), strict=True) if name != "A"]


def _png_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError(f"{path}: expected 8 or 16 bits, got values {wide.min()} to {wide.max()}")
    return (wide >> (bits_used(int(wide.max())) - 8)).astype(np.uint8)


def load_image(path: Path, size: int, channels: int = 1, fit: str = "square") -> np.ndarray:
    """The image as a square, grey (size, size) or in colour (size, size, 3), uint8.

    Args:
        channels: 1 or 3; colours become grey, and grey becomes three equal colours.
        fit: one of images.frames.FITS.

    Raises:
        ValueError: as read_image; also if ``fit`` is "square" and the image is not square.
    """
    from PIL import Image

    image = read_image(path)
    if fit == "square" and image.width != image.height:
        raise ValueError(f"{path}: expected a square image, got {image.width}x{image.height}")
    image = image.convert("L" if channels == 1 else "RGB")
    ((x, y, width, height),) = frames_of(np.array([image.size]), size, fit).tolist()
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # with antialiasing
    if (width, height) != (size, size):
        padding = round(sum(PADDING) / 3) if channels == 1 else PADDING
        square = Image.new(image.mode, (size, size), padding)
        square.paste(image, (x, y))
        image = square
    return np.array(image)


def to_input(images: np.ndarray | Tensor) -> Tensor:
    """The input of a network (n, 3, height, width) float32, from images (n, height, width[, 3]) uint8."""
    x = torch.as_tensor(images)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return (x.float() / 255 - mean) / std
