"""Reads the pixels of a DICOM file as they are displayed."""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Suffixes of files.
DICOM = (".dcm", ".dicom")
INTERPRETATION = "PhotometricInterpretation"
#: Values of this attribute. pydicom converts COLOURS to RGB.
GREY, PALETTE = ("MONOCHROME1", "MONOCHROME2"), "PALETTE COLOR"
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
WINDOWS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")  # values of the attribute VOILUTFunction


def read_dicom_header(path: Path) -> tuple[int, int, bool]:
    """Width and height, and whether the image has colours, without decoding it.

    Raises:
        ValueError: not an image, or not a readable file.
    """
    data = _open(path, stop_before_pixels=True)
    colour = _value(data, "SamplesPerPixel", path) == 3 or _value(data, INTERPRETATION, path) == PALETTE
    return *_size(data, path), colour


def read_dicom(path: Path) -> np.ndarray:
    """The displayed image (h, w) or (h, w, 3) uint8.

    Grey values are converted in this order:

    1. the modality lookup table, or rescale slope and intercept
    2. the first VOI lookup table, whose highest entry becomes 255; without one, the first window; without both, the
       lowest value becomes 0 and the highest 255
    3. MONOCHROME1 is inverted

    Raises:
        ValueError: the file cannot be read, or has several frames, another kind of pixels, or a wrong attribute.
    """
    data = _open(path)
    _size(data, path)
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
    return _palette_colours(values, data, path) if interpretation == PALETTE else _displayed(values, data, path)


def _open(path: Path, **options: Any) -> Any:
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


def _size(data: Any, path: Path) -> tuple[int, int]:
    """Width and height."""
    width, height = (_number(data, name, path) for name in ("Columns", "Rows"))
    if not width or not height:
        raise ValueError(f"{path}: expected an image, but this DICOM file has no Rows or Columns")
    return int(width), int(height)


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


def _displayed(values: np.ndarray, data: Any, path: Path) -> np.ndarray:
    """Grey ``values`` (h, w) of a DICOM file as uint8."""
    table = _lookup_table(data, "ModalityLUTSequence", path)
    x = _rescaled(values, data, path) if table is None else table.of(values)
    table = _lookup_table(data, "VOILUTSequence", path)
    share = _windowed(x, data, path) if table is None else table.of(x) / max(table.entries.max(), 1)
    if data.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.rint(255 * share).astype(np.uint8)


def _rescaled(values: np.ndarray, data: Any, path: Path) -> np.ndarray:
    slope, intercept = (_number(data, name, path) for name in ("RescaleSlope", "RescaleIntercept"))
    x = values * (1.0 if slope is None else slope) + (intercept or 0.0)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: expected finite pixels, got NaN or infinity")
    return x


class _Table(NamedTuple):
    """A lookup table: ``entries`` (n,) for the values ``first`` to ``first + n - 1``."""

    first: int
    entries: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        """The entries of ``values``. Values beyond an end of the table have the entry at this end."""
        return self.entries[np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)]


def _lookup_table(data: Any, sequence: str, path: Path) -> _Table | None:
    """The first table of a sequence of tables; None if there is none."""
    try:
        items = data.get(sequence)
        if not items:
            return None
        count, first, bits = (int(value) for value in items[0].LUTDescriptor)
        stored = items[0].LUTData
        count = count or 65536  # 65536 does not fit into the 16 bits of the attribute
        if isinstance(stored, bytes):
            in_bytes = bits <= 8 and len(stored) < 2 * count  # 8 bits may be stored in words, too
            order = "<" if data.original_encoding[1] else ">"
            entries = np.frombuffer(stored, "u1" if in_bytes else f"{order}u2")
        else:
            entries = np.array(stored, np.int64, ndmin=1)
    except Exception as error:  # a table that is missing or incomplete
        raise ValueError(f"{path}: {sequence}: the table cannot be read: {error}") from None
    if len(entries) < count:
        raise ValueError(f"{path}: {sequence}: expected {count} entries, got {len(entries)}")
    return _Table(first, entries[:count].astype(np.int64))


def _windowed(x: np.ndarray, data: Any, path: Path) -> np.ndarray:
    """The values ``x`` (h, w) in the first window as fractions, 0 to 1. Without a window, in their own range."""
    centre, width = (_number(data, name, path) for name in ("WindowCenter", "WindowWidth"))
    function = _value(data, "VOILUTFunction", path) or WINDOWS[0]
    if function not in WINDOWS:
        raise ValueError(f"{path}: expected the VOILUTFunction {', '.join(WINDOWS)}, got {function}")
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
    return np.clip(share, 0, 1)


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
