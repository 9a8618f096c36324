"""images/pixels.py: orientation, 16 bits, colours, padding and DICOM; check_cxr.py on constant images."""

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


def write_dicom(path, values, **tags):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns, data.SamplesPerPixel = *values.shape[:2], 3 if values.ndim == 3 else 1
    bits = 8 * values.itemsize
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelRepresentation = int(values.dtype == np.int16)
    data.PhotometricInterpretation = "MONOCHROME2"
    for name, value in tags.items():
        setattr(data, name, value)
        if value is None:
            delattr(data, name)
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=False)


VALUES = np.array([[0, 100, 200], [300, 400, 500]], np.uint16)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, [0, 51, 102, 153, 204, 255]),  # no window: the range of the image
        ({"PhotometricInterpretation": "MONOCHROME1"}, [255, 204, 153, 102, 51, 0]),
        ({"WindowCenter": 250.5, "WindowWidth": 201}, [0, 0, 64, 191, 255, 255]),
        ({"WindowCenter": [250.5, 7], "WindowWidth": [201, 7]}, [0, 0, 64, 191, 255, 255]),  # the first window is used
        ({"WindowCenter": 250, "WindowWidth": 200, "VOILUTFunction": "LINEAR_EXACT"}, [0, 0, 64, 191, 255, 255]),
        ({"WindowCenter": 200, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}, [30, 69, 128, 186, 225, 243]),
        # the window is in rescaled values
        (
            {"RescaleSlope": 2, "RescaleIntercept": -500, "WindowCenter": 0.5, "WindowWidth": 401},
            [0, 0, 64, 191, 255, 255],
        ),
        ({"RescaleSlope": -1, "RescaleIntercept": 0}, [255, 204, 153, 102, 51, 0]),
    ],
)  # fmt: skip
def test_dicom_is_windowed_to_8_bits(tmp_path, tags, expected):
    write_dicom(tmp_path / "x.dcm", VALUES, **tags)
    assert pixels.read_header(tmp_path / "x.dcm") == (3, 2, False)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten().astype(int)
    assert np.abs(shown - expected).max() <= 1


def test_error_names_the_unreadable_dicom_file(tmp_path):
    write_dicom(tmp_path / "x.dcm", VALUES)
    (tmp_path / "x.dcm").write_bytes((tmp_path / "x.dcm").read_bytes()[:-6])
    with pytest.raises(ValueError, match=r"x\.dcm: its pixels cannot be read"):
        pixels.read_image(tmp_path / "x.dcm")
    (tmp_path / "y.dcm").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"y\.dcm: not a readable DICOM file"):
        pixels.read_header(tmp_path / "y.dcm")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"RescaleSlope": "", "RescaleIntercept": ""}, [0, 51, 102, 153, 204, 255]),
        ({"RescaleSlope": "", "WindowCenter": 250.5, "WindowWidth": 201}, [0, 0, 64, 191, 255, 255]),
        ({"WindowCenter": "", "WindowWidth": 201}, [0, 51, 102, 153, 204, 255]),
        ({"WindowCenter": [], "WindowWidth": []}, [0, 51, 102, 153, 204, 255]),
        ({"WindowCenter": 250.5, "WindowWidth": 201, "VOILUTFunction": ""}, [0, 0, 64, 191, 255, 255]),
    ],
)
def test_empty_dicom_attribute_counts_as_absent(tmp_path, tags, expected):
    write_dicom(tmp_path / "x.dcm", VALUES, **tags)
    assert pixels.read_header(tmp_path / "x.dcm") == (3, 2, False)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten().astype(int)
    assert np.abs(shown - expected).max() <= 1


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"WindowCenter": 250, "WindowWidth": 0}, "expected a WindowWidth above 0, got 0"),
        ({"WindowCenter": 250, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"}, "a WindowWidth above 0, got -5"),
        ({"WindowCenter": 1, "WindowWidth": 9, "VOILUTFunction": "CUBIC"},
         "expected the VOILUTFunction LINEAR, LINEAR_EXACT, SIGMOID, got CUBIC"),
        ({"PhotometricInterpretation": "HSV"}, "expected the PhotometricInterpretation MONOCHROME1, .* got HSV"),
        ({"PhotometricInterpretation": "YBR_PARTIAL_422"}, "got YBR_PARTIAL_422"),
        ({"PhotometricInterpretation": ""}, "expected the PhotometricInterpretation MONOCHROME1, .* got nothing"),
        ({"PhotometricInterpretation": None}, "expected the PhotometricInterpretation MONOCHROME1, .* got nothing"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "its palette cannot be read"),
        ({"PhotometricInterpretation": "RGB"}, r"expected one image of 8 bits per colour, got .* \(2, 3\)"),
        ({"Rows": None, "Columns": None}, "expected an image, but this DICOM file has no Rows or Columns"),
        ({"SamplesPerPixel": []}, "its pixels cannot be read"),
        ({"Rows": []}, "expected an image, but this DICOM file has no Rows or Columns"),
    ],
)  # fmt: skip
def test_error_names_the_unsupported_dicom_attribute(tmp_path, tags, message):
    write_dicom(tmp_path / "x.dcm", VALUES, **tags)
    with pytest.raises(ValueError, match=rf"x\.dcm: .*{message}"):
        pixels.read_image(tmp_path / "x.dcm")
    if "Rows" in tags:
        with pytest.raises(ValueError, match=message):
            pixels.read_header(tmp_path / "x.dcm")


def test_error_names_the_dicom_number_that_cannot_be_read(tmp_path):
    write_dicom(tmp_path / "x.dcm", VALUES, RescaleSlope="1234567")
    content = (tmp_path / "x.dcm").read_bytes()
    for text in (b"1,25000", b"nan    "):
        (tmp_path / "x.dcm").write_bytes(content.replace(b"1234567", text))
        with pytest.raises(ValueError, match=r"x\.dcm: RescaleSlope: "):
            pixels.read_image(tmp_path / "x.dcm")


PALETTE = np.random.default_rng(1).integers(0, 256, (3, 200), np.uint8)


def palette_tags(tables, first, bits):
    tags = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(table), first, bits]
        tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    return tags


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("tables", "bits"),
    [(PALETTE, 8), (PALETTE.astype(np.uint16) * 257, 16), (PALETTE.astype(np.uint16), 8), (PALETTE, 16)],
    ids=["8 bits", "16 bits", "8 bits in words", "bytes declared as 16 bits"],
)
def test_palette_of_dicom_is_applied(tmp_path, tables, bits, deep):
    """Indices below the first entry of the palette show the first entry, and those beyond the last show the last."""
    indices = np.arange(256).reshape(16, 16).astype(np.uint16 if deep else np.uint8)
    if deep:
        indices[-1, -1] = 300
    write_dicom(tmp_path / "x.dcm", indices, **palette_tags(tables, 10, bits))
    assert pixels.read_header(tmp_path / "x.dcm") == (16, 16, True)
    image = pixels.read_image(tmp_path / "x.dcm")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PALETTE.T[np.clip(indices.astype(int) - 10, 0, 199)])


def test_palette_of_dicom_that_does_not_use_its_bits_is_an_error(tmp_path):
    indices = np.arange(4, dtype=np.uint8).reshape(2, 2)
    for bits, message in ((16, "16 bits per colour, but the palette only reaches"), (12, "its palette cannot be read")):
        write_dicom(tmp_path / "x.dcm", indices, **palette_tags(PALETTE.astype(np.uint16), 0, bits))
        with pytest.raises(ValueError, match=rf"x\.dcm: {message}"):
            pixels.read_image(tmp_path / "x.dcm")


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL"])
def test_colours_of_dicom_are_read(tmp_path, interpretation):
    values = random_image(6, 5, 3)
    stored = np.asarray(Image.fromarray(values).convert("YCbCr")) if interpretation == "YBR_FULL" else values
    write_dicom(tmp_path / "x.dcm", stored, PhotometricInterpretation=interpretation)
    assert pixels.read_header(tmp_path / "x.dcm") == (5, 6, True)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).astype(int)
    assert np.abs(shown - values).max() <= 2  # rounding
    write_dicom(tmp_path / "x.dcm", values.astype(np.uint16), PhotometricInterpretation="RGB")
    with pytest.raises(ValueError, match=r"one image of 8 bits per colour, got .* \(6, 5, 3\) and type uint16"):
        pixels.read_image(tmp_path / "x.dcm")
