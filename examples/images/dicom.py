"""Reads the pixels of a DICOM file as they are displayed."""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from images.depth import bits_used

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
    2. the first VOI lookup table; without one, the first window; without both, the lowest value becomes 0 and the
       highest 255, where PixelPaddingValue does not count
    3. MONOCHROME1 is inverted

    Raises:
        ValueError: the file cannot be read, or has several frames, another kind of pixels, or a wrong attribute.
    """
    data = _open(path)
    _size(data, path)
    frames = _number(data, "NumberOfFrames", path) or 1
    if frames > 1:
        raise ValueError(f"{path}: expected one image, but the file has {frames:g} frames; save each frame as a file")
    interpretation = _value(data, INTERPRETATION, path)
    if interpretation not in (*GREY, PALETTE, *COLOURS):
        raise ValueError(
            f"{path}: expected the {INTERPRETATION} {', '.join((*GREY, PALETTE, *COLOURS))}, got "
            f"{interpretation or 'nothing'}; convert the image to one of them"
        )
    _refuse_other_high_bit(data, path)
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


def begins_as_dicom(path: Path) -> bool:
    """Whether the first bytes are those of a DICOM file.

    The file DICOMDIR, a table of contents, does not count. Neither do hidden files and copies (NAME.bak, NAME~).
    """
    if path.name.upper() == "DICOMDIR" or path.name.startswith(".") or path.name.endswith((".bak", "~")):
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


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


def _refuse_other_high_bit(data: Any, path: Path) -> None:
    """Raises ValueError if uncompressed values do not use the lowest bits, where pydicom expects them."""
    allocated, stored, high = (_number(data, name, path) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    syntax = data.file_meta.get("TransferSyntaxUID")
    known = None not in (allocated, stored, high) and getattr(syntax, "is_transfer_syntax", False)
    if known and not syntax.is_compressed and stored != allocated and high != stored - 1:
        raise ValueError(
            f"{path}: expected the HighBit {stored - 1:g} for BitsStored {stored:g}, got {high:g}; shift the values to "
            "the lowest bits and correct HighBit"
        )


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
    _move_functional_groups(data)
    signed = bool(_number(data, "PixelRepresentation", path))
    table = _lookup_table(data, "ModalityLUTSequence", signed, path)
    if table is None:
        slope, intercept = (_number(data, name, path) for name in ("RescaleSlope", "RescaleIntercept"))
        x = values * (1.0 if slope is None else slope) + (intercept or 0.0)
        signed = signed or (slope or 1.0) < 0 or (intercept or 0.0) < 0
    else:
        x = table.of(values)
        signed = False
    if not (np.isfinite(values).all() and np.isfinite(x).all()):
        raise ValueError(f"{path}: expected finite pixels, got NaN or infinity")
    table = _lookup_table(data, "VOILUTSequence", signed, path)
    share = _windowed(x, ~_padding(values, data, path), data, path) if table is None else table.shares_of(x)
    if data.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    return np.rint(255 * share).astype(np.uint8)


def _move_functional_groups(data: Any) -> None:
    """Copies the rescaling and the window of an enhanced file with one frame to the place of a plain file."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (data.get(groups) or [])[:1]:
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in (group.get(name) or [])[:1]:
                    data.update(item)


def _padding(values: np.ndarray, data: Any, path: Path) -> np.ndarray:
    """(h, w) bool: the pixels outside of the image, which PixelPaddingValue marks."""
    value, limit = (_number(data, name, path) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return np.zeros(values.shape, bool)
    low, high = sorted((value, value if limit is None else limit))
    return (values >= low) & (values <= high)


class _Table(NamedTuple):
    """A lookup table: ``entries`` (n,) of ``bits`` bits, for the values ``first`` to ``first + n - 1``.

    pydicom 3 also applies tables, but not a modality table of 12 bits, and a VOI table of 8 bits with more than 256
    entries wrongly.
    """

    first: int
    entries: np.ndarray
    bits: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """The entries of ``values``. Values beyond an end of the table have the entry at this end."""
        limited = np.clip(values, self.first, self.first + len(self.entries) - 1)
        return self.entries[np.rint(limited).astype(np.int64) - self.first]

    def shares_of(self, values: np.ndarray) -> np.ndarray:
        """The entries of ``values`` as fractions of the range, 0 to 1. Some files state more bits than they use."""
        used = min(self.bits, bits_used(int(self.entries.max())))
        return np.minimum(self.of(values) / (2**used - 1), 1)


def _lookup_table(data: Any, sequence: str, signed: bool, path: Path) -> _Table | None:
    """The first table of a sequence of tables; None if there is none.

    Args:
        signed: the input of the table may be negative. The file does not always tell this (DICOM PS3.3, C.11.2.1.1).
    """
    try:
        items = data.get(sequence)
        if not items:
            return None
        descriptor, stored = items[0].get("LUTDescriptor"), items[0].get("LUTData")
        if not descriptor or stored is None:
            raise ValueError("expected a LUTDescriptor and LUTData")
        # numbers of 16 bits, which pydicom reads as signed ones in some files
        count, first, bits = (int(value) & 0xFFFF for value in descriptor)
        if isinstance(stored, bytes):
            words = np.frombuffer(stored, "<u2" if data.original_encoding[1] else ">u2")
        else:
            words = np.array(stored, np.int64, ndmin=1) & 0xFFFF
    except Exception as error:  # a table of another form
        raise ValueError(f"{path}: {sequence}: the table cannot be read: {error}") from None
    count = count or 65536  # 65536 does not fit into the attribute
    entries = words
    if bits <= 8 and len(words) < count:  # two entries in a word
        entries = words.astype("<u2").view(np.uint8)
    if len(entries) < count:
        raise ValueError(f"{path}: {sequence}: expected {count} entries, got {len(entries)}")
    if not 8 <= bits <= 16:
        raise ValueError(f"{path}: {sequence}: expected entries of 8 to 16 bits, got {bits}")
    return _Table(first - 0x10000 if signed and first > 0x7FFF else first, entries[:count].astype(np.int64), bits)


def _windowed(x: np.ndarray, inside: np.ndarray, data: Any, path: Path) -> np.ndarray:
    """The values ``x`` (h, w) in the first window as fractions, 0 to 1.

    Without a window, the range is that of the pixels ``inside`` (h, w) of the image.
    """
    centre, width = (_number(data, name, path) for name in ("WindowCenter", "WindowWidth"))
    function = _value(data, "VOILUTFunction", path) or WINDOWS[0]
    if function not in WINDOWS:
        raise ValueError(f"{path}: expected the VOILUTFunction {', '.join(WINDOWS)}, got {function}")
    if centre is None or width is None:
        known = x[inside] if inside.any() else x
        share = (x - known.min()) / ((known.max() - known.min()) or 1.0)
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
