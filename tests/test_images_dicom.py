"""images/dicom.py: windows, lookup tables, palettes and colours of DICOM files, and errors that name the file."""

from __future__ import annotations

import numpy as np
import pytest
from features.extraction import find_images
from images import pixels
from images.folder import load_folder, without_labels
from images.label_tables import name_among
from test_images_pixels import random_image

Image = pytest.importorskip("PIL.Image")


def write_dicom(path, values, syntax="ExplicitVRLittleEndian", **tags):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = uid = getattr(pydicom.uid, syntax)
    encoding = {"is_implicit_VR": uid.is_implicit_VR, "is_little_endian": uid.is_little_endian}
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128, **encoding)
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


def lookup_table(first, entries, bits, stored=np.uint16, count=None):
    """A sequence with one DICOM lookup table. ``stored`` None: numbers, not bytes."""
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    count = len(entries) if count is None else count
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [count, first, bits])
    if stored is None:
        item.add_new("LUTData", "US", list(entries))
    else:
        item.add_new("LUTData", "OW", np.asarray(entries, stored).tobytes())
    return [item]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"VOILUTSequence": (0, [51 * (v // 100) for v in range(501)], 8)}, [0, 51, 102, 153, 204, 255]),
        # a table of 8 bits in bytes; it has a precedence over the window
        ({"VOILUTSequence": (100, [200] * 100 + [100] * 150, 8, np.uint8), "WindowCenter": 1, "WindowWidth": 1},
         [200, 200, 100, 100, 100, 100]),
        # numbers instead of bytes; the table states 16 bits and uses 10
        ({"VOILUTSequence": (0, range(501), 16, None)}, [0, 25, 50, 75, 100, 125]),
        # after rescale slope and intercept: the values are -2 to 3
        ({"RescaleSlope": 0.01, "RescaleIntercept": -2, "VOILUTSequence": (-2, [0, 204, 409, 614, 818, 1023], 10)},
         [0, 51, 102, 153, 204, 255]),
        ({"VOILUTSequence": (0, range(0, 4008, 8), 12), "PhotometricInterpretation": "MONOCHROME1"},
         [255, 205, 155, 106, 56, 6]),
        # the modality table comes first: v -> 500 - v, and the window is in its values
        ({"ModalityLUTSequence": (0, [500 - v for v in range(501)], 16)}, [255, 204, 153, 102, 51, 0]),
        ({"ModalityLUTSequence": (0, [500 - v for v in range(501)], 16), "WindowCenter": 250.5, "WindowWidth": 201},
         [255, 255, 191, 64, 0, 0]),
        ({"ModalityLUTSequence": (0, [v // 100 for v in range(501)], 8),
          "VOILUTSequence": (0, [0, 16, 32, 64, 128, 255], 8)}, [0, 16, 32, 64, 128, 255]),
        ({"VOILUTSequence": []}, [0, 51, 102, 153, 204, 255]),
    ],
)  # fmt: skip
def test_lookup_tables_of_dicom_are_applied(tmp_path, tags, expected):
    tags = {name: lookup_table(*value) if isinstance(value, tuple) else value for name, value in tags.items()}
    write_dicom(tmp_path / "x.dcm", VALUES, **tags)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten().astype(int)
    assert np.abs(shown - expected).max() <= 1


@pytest.mark.parametrize("signed", [False, True])
def test_lookup_tables_of_dicom_agree_with_pydicom(tmp_path, signed):
    """All values of 12 bits, and values beyond both ends of the tables."""
    pixel_functions = pytest.importorskip("pydicom.pixels")
    low = -2048 if signed else 0
    values = np.arange(low, low + 4096).reshape(64, 64).astype(np.int16 if signed else np.uint16)
    rng = np.random.default_rng(3)
    modality = lookup_table(low + 100, np.sort(rng.integers(0, 4096, 3000)), 16)
    voi = lookup_table(50, np.sort(rng.integers(0, 65536, 3500)), 16)
    write_dicom(tmp_path / "x.dcm", values, ModalityLUTSequence=modality, VOILUTSequence=voi)
    data = pytest.importorskip("pydicom").dcmread(tmp_path / "x.dcm")
    found = pixel_functions.apply_voi(pixel_functions.apply_modality_lut(data.pixel_array, data), data)
    expected = np.rint(255 * (found / 65535))
    np.testing.assert_array_equal(np.asarray(pixels.read_image(tmp_path / "x.dcm")), expected)


def test_more_than_256_entries_of_8_bits(tmp_path):
    """The places in the table need more bits than its entries."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    write_dicom(tmp_path / "x.dcm", values, VOILUTSequence=lookup_table(0, values.flatten() // 16, 8, np.uint8))
    np.testing.assert_array_equal(np.asarray(pixels.read_image(tmp_path / "x.dcm")), values // 16)


def test_65536_entries(tmp_path):
    """The descriptor of this table has the number 0."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    table = lookup_table(0, values.flatten()[::-1].copy(), 16, count=0)
    write_dicom(tmp_path / "x.dcm", values, VOILUTSequence=table)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).astype(int)
    np.testing.assert_array_equal(shown, np.rint((65535 - values.astype(int)) / 257))


LINEAR = np.rint(np.linspace(0, 65535, 501)).astype(np.uint16)
IMPLICIT = "ImplicitVRLittleEndian"


@pytest.mark.parametrize(
    ("values", "syntax", "first", "tags"),
    [
        (VALUES, IMPLICIT, -250, {"RescaleSlope": 1, "RescaleIntercept": -250}),
        (VALUES.astype(np.int16) - 250, IMPLICIT, -250, {}),
        (VALUES.astype(np.int16), IMPLICIT, 40000,
         {"ModalityLUTSequence": (0, [40000 + v for v in range(501)], 16)}),
        (VALUES.astype(np.int16) - 250, "ExplicitVRLittleEndian", 65286, {}),  # not in the standard, but seen in files
        (VALUES, IMPLICIT, 0, {}),
        (VALUES, "ExplicitVRBigEndian", 0, {}),
    ],
)  # fmt: skip
def test_first_value_of_the_table_has_the_sign_of_its_input(tmp_path, values, syntax, first, tags):
    """DICOM PS3.3, C.11.2.1.1: the file does not state the sign."""
    tags = {name: lookup_table(*value) if isinstance(value, tuple) else value for name, value in tags.items()}
    if "Big" in syntax:  # pydicom writes bytes as they are
        values, table = values.astype(">u2"), lookup_table(first, LINEAR, 16, ">u2")
    else:
        table = lookup_table(first, LINEAR, 16)
    write_dicom(tmp_path / "x.dcm", values, syntax, VOILUTSequence=table, **tags)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
    assert shown.tolist() == [0, 51, 102, 153, 204, 255]


@pytest.mark.filterwarnings("ignore:Invalid value")  # pydicom notes the negative number
@pytest.mark.parametrize("signed", [False, True])
def test_table_of_more_than_32767_entries(tmp_path, signed):
    """With signed pixels, pydicom reads the number of entries as -25536."""
    values = (VALUES * 60).astype(np.int16 if signed else np.uint16)
    table = lookup_table(0, np.minimum(np.arange(40000) * 2, 60000), 16)
    write_dicom(tmp_path / "x.dcm", values, IMPLICIT, VOILUTSequence=table)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
    assert shown.tolist() == np.rint(VALUES.flatten() * 120 / 257).tolist()


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_table_of_8_bits_with_two_entries_in_a_word(tmp_path, syntax):
    words = np.array([0, 51, 102, 153, 204, 255], np.uint8).view("<u2")
    values = np.arange(6, dtype=np.uint16).reshape(2, 3)
    for stored in (None, "<u2" if "Little" in syntax else ">u2"):
        table = lookup_table(0, words.tolist(), 8, stored, count=6)
        order = values.astype("<u2" if "Little" in syntax else ">u2")
        write_dicom(tmp_path / "x.dcm", order, syntax, VOILUTSequence=table)
        shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
        assert shown.tolist() == [0, 51, 102, 153, 204, 255]


def test_padding_of_dicom_does_not_set_the_range(tmp_path):
    values = np.append(VALUES, [[60000, 60001, 0]], 0).astype(np.uint16)
    write_dicom(tmp_path / "x.dcm", values, PixelPaddingValue=60001, PixelPaddingRangeLimit=60000)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm"))
    assert shown.tolist() == [[0, 51, 102], [153, 204, 255], [255, 255, 0]]
    write_dicom(tmp_path / "x.dcm", np.full((2, 2), 7, np.uint16), PixelPaddingValue=7)
    assert np.asarray(pixels.read_image(tmp_path / "x.dcm")).max() == 0


def test_window_of_an_enhanced_file_with_one_frame_is_used(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    group, window, rescale = (pydicom.Dataset() for _ in range(3))
    window.WindowCenter, window.WindowWidth = 0.5, 401
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -500
    group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [rescale]
    write_dicom(tmp_path / "x.dcm", VALUES, SharedFunctionalGroupsSequence=[group])
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
    assert shown.tolist() == [0, 0, 64, 191, 255, 255]


@pytest.mark.parametrize("tags", [{"BitsStored": 12, "HighBit": 11}, {"HighBit": None}, {"HighBit": 7}])
def test_dicom_values_in_the_lowest_bits_are_read(tmp_path, tags):
    """HighBit is not used if all bits are."""
    write_dicom(tmp_path / "x.dcm", VALUES, **tags)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
    assert shown.tolist() == [0, 51, 102, 153, 204, 255]


@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_values_beyond_64_bits_meet_the_ends_of_a_table(tmp_path, name):
    tags = {name: lookup_table(0, LINEAR, 16), "RescaleSlope": "1e30" if name[0] == "V" else "1"}
    write_dicom(tmp_path / "x.dcm", VALUES, **tags)
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
    assert shown.tolist() == ([0, 255, 255, 255, 255, 255] if name[0] == "V" else [0, 51, 102, 153, 204, 255])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((0, [1, 2, 3], 20), "VOILUTSequence: expected entries of 8 to 16 bits, got 20"),
        ((0, [1, 2, 3], 16, np.uint16, 5), "VOILUTSequence: expected 5 entries, got 3"),
        ((0, [1, 2, 3], 16, None, 5), "VOILUTSequence: expected 5 entries, got 3"),
        (None, "VOILUTSequence: the table cannot be read"),
    ],
)
def test_incomplete_lookup_table_of_dicom_is_an_error(tmp_path, table, message):
    pydicom = pytest.importorskip("pydicom")
    item = [pydicom.Dataset()] if table is None else lookup_table(*table)
    write_dicom(tmp_path / "x.dcm", VALUES, VOILUTSequence=item)
    with pytest.raises(ValueError, match=rf"x\.dcm: {message}"):
        pixels.read_image(tmp_path / "x.dcm")


@pytest.mark.parametrize("syntax", [b"1.2.840.10008.1.2.99", b""])
def test_error_names_the_dicom_file_with_an_unknown_transfer_syntax(tmp_path, syntax):
    write_dicom(tmp_path / "x.dcm", VALUES, BitsStored=12, HighBit=15)
    content = (tmp_path / "x.dcm").read_bytes()
    known = b"1.2.840.10008.1.2.1\0"
    (tmp_path / "x.dcm").write_bytes(content.replace(known, syntax.ljust(len(known), b"\0"), 1))
    with pytest.raises(ValueError, match=r"x\.dcm: "):
        pixels.read_image(tmp_path / "x.dcm")


def test_high_bit_of_compressed_pixels_is_not_used(tmp_path):
    """A compressed image holds its values, not their bits in a word."""
    pydicom = pytest.importorskip("pydicom")
    write_dicom(tmp_path / "x.dcm", VALUES)
    data = pydicom.dcmread(tmp_path / "x.dcm")
    data.compress(pydicom.uid.RLELossless)
    data.BitsStored, data.HighBit = 12, 15
    data.save_as(tmp_path / "x.dcm")
    shown = np.asarray(pixels.read_image(tmp_path / "x.dcm")).flatten()
    assert shown.tolist() == [0, 51, 102, 153, 204, 255]


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
        ({"BitsStored": 12, "HighBit": 15}, "expected the HighBit 11 for BitsStored 12, got 15"),
        ({"Rows": []}, "expected an image, but this DICOM file has no Rows or Columns"),
        ({"NumberOfFrames": 12}, "expected one image, but the file has 12 frames; save each frame as a file"),
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


#: Names of exported DICOM files: numbers that differ in their last part, no suffix, and the suffix of one vendor
EXPORTED = ("1.2.840.10008.1", "1.2.840.10008.2", "IM0003", "SLICE.IMA")


@pytest.fixture
def exported(tmp_path):
    """A folder with four DICOM files whose suffix does not tell this, and with other files."""
    folder = tmp_path / "photos"
    (folder / "series").mkdir(parents=True)
    for name in EXPORTED:
        write_dicom(folder / "series" / name, VALUES)
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "short.txt").write_text("no image")
    (folder / "1.2.840.10008.3").write_bytes(b"\0" * 200)
    return folder


def test_files_without_the_suffix_are_found_by_their_content(exported):
    assert {name: path.name for name, path in find_images(exported).items()} == {name: name for name in EXPORTED}
    config = {"classes": ["red"], "fit": "pad", "channels": 1}
    assert without_labels(exported, config).names == [f"series/{name}" for name in EXPORTED]
    rows = "".join(f"{name},{'red' if n < 2 else ''}\n" for n, name in enumerate(EXPORTED))
    (exported / "labels.csv").write_text(f"image,labels\n{rows}")
    index = load_folder(exported)
    assert [path.name for path in index.paths] == list(EXPORTED) == index.names
    assert index.sizes.tolist() == [[3, 2]] * 4
    for path in index.paths:
        assert np.array_equal(np.asarray(pixels.read_image(path)), [[0, 51, 102], [153, 204, 255]])


def test_names_that_are_numbers_do_not_lose_their_last_part(exported):
    """1.2.840.10008 is not the image 1.2.840.10008.1, and 1.2.840.10008.3 is no image."""
    (exported / "labels.csv").write_text("image,labels\nIM0003,red\n1.2.840.10008,\n1.2.840.10008.3,red\n")
    with pytest.raises(ValueError, match=r"1\.2\.840\.10008, 1\.2\.840\.10008\.3"):
        load_folder(exported)


def test_numbers_name_the_bags_of_features(exported):
    names = name_among(["1.2.840", "1.2.840.1", "SLICE.IMA", "a"])
    assert [names(cell) for cell in ("1.2.840.1", "1.2.840", "1.2.840.1.dcm", "SLICE.IMA")] == [
        "1.2.840.1", "1.2.840", "1.2.840.1", "SLICE.IMA"
    ]  # fmt: skip
    assert names("1.2.840.7") is None and names("a.svs") == "a"


def test_hidden_files_and_copies_are_not_images(exported):
    for name in ("._IM0003", "IM0003.bak", "IM0003~"):
        write_dicom(exported / name, VALUES)
    assert set(find_images(exported)) == set(EXPORTED)


def test_a_file_with_the_suffix_of_another_format_is_not_dicom(tmp_path):
    write_dicom(tmp_path / "x.png", VALUES)
    with pytest.raises(ValueError, match="not a readable image"):
        pixels.read_image(tmp_path / "x.png")
