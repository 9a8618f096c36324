"""Converts an image file to grey or colour values, and these to the input of a network."""

from __future__ import annotations

import functools
import math
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from images.frames import frames_of

#: Mean and standard deviation per channel of the images that torchvision's networks were trained on.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Values of the padding: the integers nearest to MEAN, so that the network gets about 0.
PADDING = tuple(round(255 * value) for value in MEAN)
DICOM = (".dcm", ".dicom")
INTERPRETATION = "PhotometricInterpretation"
#: Values of this DICOM attribute. pydicom converts COLOURS to RGB.
GREY, PALETTE = ("MONOCHROME1", "MONOCHROME2"), "PALETTE COLOR"
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
WINDOWS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # values of the DICOM attribute VOILUTFunction
ORIENTATION = 0x0112  # EXIF tag; values of 5 and more exchange width and height


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that can be read, in lower case."""
    from PIL import Image

    # Pillow writes more formats than it reads, such as PDF
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN) | set(DICOM)


def read_header(path: Path) -> tuple[int, int, bool]:
    """Width and height of the displayed image, and whether it has colours, without decoding it.

    Raises:
        ValueError: not a readable image.
    """
    from PIL import Image

    if path.suffix.lower() in DICOM:
        data = _dicom(path, stop_before_pixels=True)
        colour = _value(data, "SamplesPerPixel", path) == 3 or _value(data, INTERPRETATION, path) == PALETTE
        return *_dicom_size(data, path), colour
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

    if path.suffix.lower() in DICOM:
        return Image.fromarray(_read_dicom(path))
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


def bits_used(brightest: int) -> int:
    """8, 10, 12, 14 or 16: the smallest number of bits that holds ``brightest``."""
    return max(8, brightest.bit_length() + brightest.bit_length() % 2)


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError(f"{path}: expected 8 or 16 bits, got values {wide.min()} to {wide.max()}")
    return (wide >> (bits_used(int(wide.max())) - 8)).astype(np.uint8)


def _dicom(path: Path, **options: Any) -> Any:
    try:
        import pydicom.pixels
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: DICOM needs pydicom 3 or later, which is not installed: pip install 'pydicom>=3'"
        ) from None
    try:
        return pydicom.dcmread(path, **options)
    except Exception as error:  # a truncated file raises many types
        raise ValueError(f"{path}: not a readable DICOM file: {error}") from None


def _dicom_size(data: Any, path: Path) -> tuple[int, int]:
    """Width and height."""
    width, height = (_number(data, name, path) for name in ("Columns", "Rows"))
    if not width or not height:
        raise ValueError(f"{path}: expected an image, but this DICOM file has no Rows or Columns")
    return int(width), int(height)


def _read_dicom(path: Path) -> np.ndarray:
    """(h, w) or (h, w, 3) uint8.

    Grey images: rescale slope and intercept, the first window, MONOCHROME1 inverted. Without a window the lowest value
    becomes 0 and the highest 255.
    """
    data = _dicom(path)
    _dicom_size(data, path)
    interpretation = _value(data, INTERPRETATION, path)
    if interpretation not in (*GREY, PALETTE, *COLOURS):
        raise ValueError(
            f"{path}: expected the {INTERPRETATION} {', '.join((*GREY, PALETTE, *COLOURS))}, got "
            f"{interpretation or 'nothing'}; convert the image to one of them"
        )
    try:
        values = data.pixel_array
    except Exception as error:  # a compression that needs another package, or a truncated file
        raise ValueError(f"{path}: its pixels cannot be read: {error}") from None
    if interpretation in COLOURS:
        if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
            raise ValueError(
                f"{path}: expected one image of 8 bits per colour, got pixels of shape {values.shape} and type "
                f"{values.dtype}"
            )
        return values
    if values.ndim != 2:
        raise ValueError(f"{path}: expected one grey image, got pixels of shape {values.shape}")
    return _palette_colours(values, data, path) if interpretation == PALETTE else _windowed(values, data, path)


def _palette_colours(indices: np.ndarray, data: Any, path: Path) -> np.ndarray:
    """The colours (h, w, 3) uint8 of ``indices`` (h, w) in the palette of a DICOM file."""
    from pydicom.pixels import apply_color_lut

    try:
        entries, first, bits = (int(value) for value in data.RedPaletteColorLookupTableDescriptor)
        # 0 means 65536. pydicom converts the indices to the type of the colours before it limits them
        limited = np.clip(indices.astype(np.int64), first, first + (entries or 65536) - 1)
        colours = apply_color_lut(limited, data)[..., :3]  # without an alpha channel
    except Exception as error:  # a palette that is missing, incomplete or unsupported
        raise ValueError(f"{path}: its palette cannot be read: {error}") from None
    brightest = int(colours.max())
    if brightest > 255:
        return (colours >> 8).astype(np.uint8)
    if bits == 16 and colours.dtype == np.uint16 and brightest > 0:
        raise ValueError(
            f"{path}: 16 bits per colour, but the palette only reaches {brightest} of 65535; convert the image to RGB "
            "first"
        )
    return colours.astype(np.uint8)  # 8 bits, which may be stored in words


def _windowed(values: np.ndarray, data: Any, path: Path) -> np.ndarray:
    """Grey ``values`` (h, w) of a DICOM file as uint8."""
    slope, intercept, centre, width = (
        _number(data, name, path) for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth")
    )
    function = _value(data, "VOILUTFunction", path) or WINDOWS[0]
    if function not in WINDOWS:
        raise ValueError(f"{path}: expected the VOILUTFunction {', '.join(WINDOWS)}, got {function}")
    x = values * (1.0 if slope is None else slope) + (intercept or 0.0)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: expected finite pixels, got NaN or infinity")
    if centre is None or width is None:
        share = (x - x.min()) / ((x.max() - x.min()) or 1.0)
    elif width <= 0:
        raise ValueError(f"{path}: expected a WindowWidth above 0, got {width:g}; correct or delete the window")
    elif function == "SIGMOID":
        share = 1 / (1 + np.exp(-4 * (x - centre) / width))
    elif function == "LINEAR_EXACT":
        share = (x - centre) / width + 0.5
    else:  # DICOM PS3.3, C.11.2.1.2
        share = (x - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    share = np.clip(share, 0, 1)
    if data.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.rint(255 * share).astype(np.uint8)


def _value(data: Any, name: str, path: Path) -> Any:
    """The first value of a DICOM attribute, which may hold several; None if it is absent or empty."""
    try:
        value = data.get(name)  # pydicom converts the content of the file here
    except Exception as error:
        raise ValueError(f"{path}: {name}: {error}") from None
    first = next(iter(value), None) if isinstance(value, MutableSequence) else value
    return None if first == "" else first


def _number(data: Any, name: str, path: Path) -> float | None:
    value = _value(data, name, path)
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{path}: {name}: expected a finite number, got {value}")
    return number


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
