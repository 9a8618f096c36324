"""images/pixels.py: orientation, 16 bits, colours and padding."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from images import pixels

Image = pytest.importorskip("PIL.Image")


def write_png16(path, values):
    """Writes ``values`` (h, w, 3) uint16 as a PNG of 16 bits per colour, which Pillow cannot do."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def random_image(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """The marked corner of the file is shown where the EXIF tag places it."""
    stored = np.zeros((20, 40), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    size = (40, 20) if orientation < 5 else (20, 40)
    assert pixels.read_header(tmp_path / "x.png") == (*size, False)
    shown = np.asarray(pixels.read_image(tmp_path / "x.png"))
    assert shown.shape == size[::-1]
    # EXIF tag: the sides of the displayed image that the first row and the first column of the file are on
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    assert (shown[-1 if bottom else 0, -1 if right else 0], shown.astype(int).sum()) == (255, 64 * 255)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_16_bits_is_scaled_by_the_used_bits(tmp_path, bits):
    values = random_image(30, 30).astype(np.uint16) << (bits - 8)
    values[0, 0] = 2**bits - 1
    Image.fromarray(values).save(tmp_path / "x.png")
    expected = random_image(30, 30)
    expected[0, 0] = 255
    assert np.array_equal(np.asarray(pixels.read_image(tmp_path / "x.png")), expected)


def test_colours_of_16_bits_are_scaled_or_an_error(tmp_path):
    values = random_image(10, 12, 3)
    write_png16(tmp_path / "x.png", values.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(pixels.read_image(tmp_path / "x.png")), values)
    write_png16(tmp_path / "x.png", values.astype(np.uint16) << 4)  # 12 bits: nearly black
    with pytest.raises(ValueError, match=r"x\.png: 16 bits per colour, but the upper 8 bits only reach 15 of 255"):
        pixels.read_image(tmp_path / "x.png")


def test_floating_point_images_are_an_error(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="expected 8 or 16 bits, got floating point"):
        pixels.read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L"])
def test_colour_and_grey_images_are_converted(tmp_path, mode):
    Image.fromarray(random_image(16, 16, 3)).convert(mode).save(tmp_path / "x.tiff")
    colour = pixels.load_image(tmp_path / "x.tiff", 16, channels=3)
    assert colour.shape == (16, 16, 3)
    assert (colour[..., 0] == colour[..., 1]).all() == (mode == "L")
    assert pixels.load_image(tmp_path / "x.tiff", 16).shape == (16, 16)
    assert pixels.read_header(tmp_path / "x.tiff") == (16, 16, mode != "L")


def test_oblong_image_is_padded_squeezed_or_an_error(tmp_path):
    Image.fromarray(np.full((20, 40, 3), (255, 0, 0), np.uint8)).save(tmp_path / "x.png")
    padded = pixels.load_image(tmp_path / "x.png", 32, 3, "pad")
    assert (padded[8:24] == (255, 0, 0)).all()
    assert (padded[:8] == pixels.PADDING).all()
    assert (padded[24:] == pixels.PADDING).all()
    assert abs(pixels.to_input(padded[None])[0, :, 0, 0]).max() < 0.01  # the network gets 0
    assert (pixels.load_image(tmp_path / "x.png", 32, 3, "squeeze") == (255, 0, 0)).all()
    with pytest.raises(ValueError, match="expected a square image, got 40x20"):
        pixels.load_image(tmp_path / "x.png", 32)


def test_input_of_the_network_keeps_the_colours():
    x = pixels.to_input(np.array([[[[255, 0, 0]]]], np.uint8))
    assert x.shape == (1, 3, 1, 1)
    np.testing.assert_allclose(x.flatten(), [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)
