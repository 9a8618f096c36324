"""Data sets of your own images: labels.csv in both forms, the split, boxes, CheXpert, and the whole pipeline."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import unicodedata

import check_cxr
import localize_cxr
import numpy as np
import pytest
import torch
import train_cxr
from common.processes import Processes
from images import check, chexpert, folder, items, label_tables, nih, provenance, training, truth
from images import options as settings
from images.checkpoint import OLDER, load_run
from images.dataset import with_classes
from images.identical import identical_files
from images.open_dataset import open_dataset
from images.synthetic_set import write_dataset

Image = pytest.importorskip("PIL.Image")

SMALL = [
    "--backbone", "local17", "--image-size", "64", "--batch-size", "8", "--epochs", "2", "--workers", "0", "--device",
    "cpu", "--lr", "3e-3", "--pooling", "max", "--lam", "1", "--prior", "0.3",
]  # fmt: skip


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def open_with(data, *more):
    parser = argparse.ArgumentParser()
    settings.add_data_options(parser)
    return open_dataset(parser.parse_args(["--data-dir", str(data), *more]))


@pytest.fixture
def images(tmp_path):
    """Eight small colour photos of several sizes in subfolders."""
    data = tmp_path / "photos"
    (data / "a" / "b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        size = [(30, 20), (20, 30), (24, 24), (40, 10)][i % 4]
        place = data / ("a" if i % 2 else "a/b") / f"{i}.{'jpg' if i % 3 else 'png'}"
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(place)
    return data


def names_of(data):
    return sorted(path.name for path in data.rglob("*") if path.suffix in (".jpg", ".png"))


# labels.csv


def test_labels_in_one_column_are_read(images):
    names = names_of(images)
    labels = ["cat", "dog|cat", "", "dog", "", "", "cat", "bird"]
    write_csv(images / "labels.csv", ["image", "labels"], *zip(names, labels, strict=True))
    index = open_with(images)
    assert index.classes == ("bird", "cat", "dog")
    assert index.names == names
    assert index.labels[:3].tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert [path.name for path in index.paths] == names
    assert index.sizes[:4].tolist() == [[30, 20], [20, 30], [24, 24], [40, 10]]
    assert (index.about.kind, index.about.title, index.about.channels, index.about.fit) == (
        "folder",
        "photos",
        3,
        "pad",
    )
    assert index.patients.tolist() == names


def test_suffixes_are_optional_in_every_table(images):
    stems = [name.partition(".")[0] for name in names_of(images)]
    parts = ["train"] * 4 + ["test"] * 4
    for given in (stems, names_of(images)):
        write_csv(images / "labels.csv", ["bag", "cat"], *([name, i % 2] for i, name in enumerate(given)))
        write_csv(images / "split.csv", ["image", "split"], *zip(names_of(images), parts, strict=True))
        write_csv(images / "boxes.csv", ["image", "label", "x", "y", "w", "h"], [stems[1], "cat", 1, 2, 3, 4])
        index = open_with(images)
        assert index.names == given and [path.name for path in index.paths] == names_of(images)
        assert index.boxes == {given[1]: [(0, 1, 2, 3, 4)]}
        assert index.test.tolist() == [part == "test" for part in parts]


def test_a_cell_with_another_folder_is_another_image():
    name_of = label_tables.name_among(["a/1.png", "b/2.png", "c/2.png", "slide", "scan.001"])
    cells = ["1", "a/1", "1.png", "b/1.png", "2.png", "c/2", "x/slide.svs", "scan.002"]
    assert [name_of(cell) for cell in cells] == ["a/1.png"] * 3 + [None, None, "c/2.png", "slide", None]


def test_labels_in_columns_may_be_unknown(images):
    values = ["1", "0", "", "-1", "NaN", "nan", "1.0", "-1.0"]
    rows = [[name, value, "1"] for name, value in zip(names_of(images), values, strict=True)]
    write_csv(images / "labels.csv", ["image", "cat", "dog"], *rows)
    index = open_with(images)
    assert index.classes == ("cat", "dog")
    expected = [1, 0, math.nan, math.nan, math.nan, math.nan, 1, math.nan]
    np.testing.assert_array_equal(index.labels[:, 0], np.array(expected, np.float32))


def test_labels_in_one_column_may_be_unknown(images):
    cells = ["cat", "dog|cat", "", "NaN", "nan", "none", "No Finding", "dog"]
    write_csv(images / "labels.csv", ["image", "labels"], *zip(names_of(images), cells, strict=True))
    index = open_with(images)
    assert index.classes == ("cat", "dog")
    unknown, neither = [math.nan] * 2, [0, 0]
    expected = [[1, 0], [1, 1], neither, unknown, unknown, neither, neither, [0, 1]]
    np.testing.assert_array_equal(index.labels, np.array(expected, np.float32))
    # the column of a class may be the same labels once more
    columns = ["1", "1", "0", "", "NaN", "0", "0", "0"]
    rows = list(zip(names_of(images), cells, columns, strict=True))
    write_csv(images / "labels.csv", ["image", "labels", "cat"], *rows)
    np.testing.assert_array_equal(open_with(images).labels, np.array(expected, np.float32))
    rows[3] = (*rows[3][:2], "1")
    write_csv(images / "labels.csv", ["image", "labels", "cat"], *rows)
    with pytest.raises(ValueError, match="line 5: the column labels is 'NaN', but the column cat is '1'"):
        open_with(images)


@pytest.mark.parametrize("cell", ["0", "-1", "1", "1.0", "0.5", "cat|1", "cat|none", "No finding|cat", "NaN|cat"])
def test_number_in_the_column_labels_is_an_error(images, cell):
    write_csv(images / "labels.csv", ["image", "labels"], ["0.png", "cat"], ["1.jpg", cell])
    message = rf"line 3: labels: expected .*, got '{re.escape(cell)}'; .* one column per class"
    with pytest.raises(ValueError, match=message):
        open_with(images)


def test_nan_in_the_column_patient_is_a_missing_patient(images):
    patients = ["p", "NaN", "nan", "", "p", "NAN", "q", "q"]
    names = names_of(images)
    write_csv(images / "labels.csv", ["image", "patient", "cat"], *zip(names, patients, "01010101", strict=True))
    found = open_with(images).patients.tolist()
    assert found == ["p", *names[1:4], "p", names[5], "q", "q"]


FORMS = ("NFC", "NFD")


@pytest.mark.parametrize("of_file", FORMS)
@pytest.mark.parametrize("of_table", FORMS)
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_names_match_in_both_forms_of_unicode(tmp_path, of_file, of_table, suffix):
    """A file may have a composed name, or, on macOS, a decomposed one."""
    stem = "R\u00f6ntgen"
    (tmp_path / unicodedata.normalize(of_file, "\u00c4")).mkdir()
    place = tmp_path / unicodedata.normalize(of_file, f"\u00c4/{stem}.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(place)
    name, other = (unicodedata.normalize(form, stem) + suffix for form in (of_table, FORMS[of_table == "NFC"]))
    for folder_of in ("", unicodedata.normalize(of_table, "\u00c4/")):
        write_csv(tmp_path / "labels.csv", ["image", "cat"], [folder_of + name, "1"])
        write_csv(tmp_path / "split.csv", ["image", "split"], [other, "test"])
        write_csv(tmp_path / "boxes.csv", ["image", "label", "x", "y", "w", "h"], [other, "cat", 1, 2, 3, 4])
        index = open_with(tmp_path)
        assert (index.paths, index.test.tolist()) == ([place], [True])
        assert index.boxes == {folder_of + name: [(0, 1, 2, 3, 4)]}
    bag = unicodedata.normalize(of_file, stem)
    assert label_tables.name_among([bag, "other"])(name) == bag
    assert label_tables.name_among([bag, "other"])(f"x/{name.partition('.')[0]}.svs") == bag


def test_names_that_differ_in_their_form_only_are_ambiguous(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "\u00f6") for form in FORMS)
    name_of = label_tables.name_among([composed, decomposed])
    assert [name_of(composed), name_of(decomposed), name_of(f"{composed}.png")] == [composed, decomposed, None]


def test_paths_may_be_written_as_on_windows(images):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(images / "0.png")
    rows = [("./0.png", "train"), (r"a\b\0.png", "test"), (r".\a\1.jpg", "test"), ("a//b/2", "train")]
    write_csv(images / "labels.csv", ["image", "split", "cat"], *([name, part, 1] for name, part in rows))
    boxes = [["0.png", "cat", 0, 0, 1, 1], ["a/1.jpg", "cat", 0, 0, 2, 2]]
    write_csv(images / "boxes.csv", ["image", "label", "x", "y", "w", "h"], *boxes)
    index = open_with(images)
    places = ["0.png", "a/b/0.png", "a/1.jpg", "a/b/2.jpg"]
    assert [path.relative_to(images).as_posix() for path in index.paths] == places
    assert index.boxes == {"./0.png": [(0, 0, 0, 1, 1)], r".\a\1.jpg": [(0, 0, 0, 2, 2)]}


def test_files_may_be_named_with_or_without_folder(images):
    (images / "c").mkdir()
    (images / "c" / "0.png").write_bytes((images / "a" / "b" / "0.png").read_bytes())
    write_csv(images / "labels.csv", ["image", "cat"], ["0.png", "1"])
    with pytest.raises(ValueError, match=r"0\.png matches several files \(a/b/0\.png, c/0\.png\)"):
        open_with(images)
    write_csv(images / "labels.csv", ["image", "cat", "split"], ["a/b/0.png", "1", "train"], ["c/0.png", "0", "test"])
    index = open_with(images)
    assert [path.relative_to(images).as_posix() for path in index.paths] == ["a/b/0.png", "c/0.png"]
    assert any("7 images that are not in the table" in note for note in index.notes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [["picture", "cat"], ["0.png", "1"]],
            r"line 1: expected a column image or bag or file or filename, found the columns \['picture', 'cat'\]",
        ),
        ([["image", "cat", "cat"], ["0.png", "1", "1"]], "expected one name per column, each once, found the columns"),
        ([["image"], ["0.png"]], "expected a column labels, or one column per class"),
        ([["image", "cat"], ["0.png", "2"]], "line 2: cat: expected 1, 0, or nothing, NaN or -1 for unknown, got '2'"),
        ([["image", "cat"], ["0.png", "1"], ["0.png", "0"]], r"line 3: 0\.png is already in .*line 2"),
        ([["image", "cat"], ["0.png", "1", "1"]], "line 2: expected 2 cells, got 3"),
        ([["image", "cat"]], "there are no rows below the header"),
        ([["image", "labels"], ["0.png", ""]], "the column labels is empty in all rows"),
        ([["image", "cat", "split"], ["0.png", "1", "exam"]], "line 2: expected a split train, val, test, got 'exam'"),
        ([["image", "cat"], ["9.png", "1"]], "none of the 1 images"),
        ([["image", "cat"], ["0.png", "1"], ["0", "1"]], r"0 and 0\.png are both the image a/b/0\.png"),
        ([["image;cat"], ["0.png;1"]], "line 1: expected a column .*; cells are separated by commas"),
        ([["image", "cat"], ["0.png", "1"], ["9.png", "1"]], r"1 of 2 images of the tables are missing \(9\.png\)"),
        (
            [["image", "cat"], ["0.png", "1"], ["./a/b/0.png", "1"]],
            r"\./a/b/0\.png and 0\.png are both the image a/b/0\.png",
        ),
        (
            [["image", "patient", "split", "cat"], ["0.png", "p", "train", "1"], ["2.jpg", "p", "test", "1"]],
            r"1 patients are in more than one part of the split \(p\)",
        ),
    ],
)
def test_error_names_the_mistake_in_labels_csv(images, rows, message):
    write_csv(images / "labels.csv", *rows)
    with pytest.raises(ValueError, match=message):
        open_with(images)


def test_missing_images_may_be_left_out(images):
    write_csv(images / "labels.csv", ["image", "cat", "split"], ["9.png", "1", "train"], ["0.png", "1", "test"])
    index = folder.load_folder(images, allow_missing=True)
    assert (index.names, index.missing, index.test.tolist()) == (["0.png"], ["9.png"], [True])


# the split


def test_split_is_by_patient_seeded_and_saved(images):
    patients = np.array([f"p{k // 2}" for k in range(200)])
    parts = folder.draw_split(patients, 0)
    assert [int((parts == part).sum()) for part in folder.PARTS] == [140, 20, 40]
    assert all(len(set(parts[patients == p])) == 1 for p in set(patients))
    assert (folder.draw_split(patients, 0) == parts).all()
    assert (folder.draw_split(patients, 1) != parts).any()
    assert sorted(folder.draw_split(np.array(["a", "b", "c"]), 0)) == ["test", "train", "val"]

    names = names_of(images)
    rows = [[name, f"p{k // 2}", k % 2] for k, name in enumerate(names)]
    write_csv(images / "labels.csv", ["image", "patient", "cat"], *rows)
    index = open_with(images, "--split-seed", "3")
    written = {row["image"]: row["split"] for row in csv.DictReader((images / "split.csv").open())}
    assert {name for name, part in written.items() if part == "test"} == {
        name for name, test in zip(names, index.test, strict=True) if test
    }
    assert {name for name, part in written.items() if part == "val"} == {
        name for name, val in zip(names, index.val, strict=True) if val
    }
    again = open_with(images, "--split-seed", "4")  # the saved split does not change
    assert (again.test == index.test).all()
    write_csv(images / "split.csv", ["image", "split"], *([name, "train"] for name in names[1:]))
    with pytest.raises(ValueError, match=r"1 images of labels\.csv have no split there"):
        open_with(images)


def test_val_fraction_without_an_effect_is_named(images, capsys):
    rows = [[name, ("train", "train", "val", "test")[k % 4], k % 2] for k, name in enumerate(names_of(images))]
    write_csv(images / "labels.csv", ["image", "split", "cat"], *rows)
    command = [
        "--data-dir",
        str(images),
        "--dry-run",
        "--backbone",
        "local9",
        "--weights",
        "none",
        "--image-size",
        "64",
    ]
    command += ["--batch-size", "2", "--workers", "0", "--device", "cpu"]
    for options, noted in (([], False), (["--val-fraction", "0.5"], True)):
        assert train_cxr.main([*command, *options]) == 0
        assert ("--val-fraction has no effect" in capsys.readouterr().err) == noted


def test_image_in_two_parts_of_split_csv_is_an_error(images):
    names = names_of(images)
    write_csv(images / "labels.csv", ["image", "cat"], *([name, k % 2] for k, name in enumerate(names)))
    rows = [[name, "test" if k > 5 else "train"] for k, name in enumerate(names)]
    write_csv(images / "split.csv", ["image", "split"], *rows, [names[0], "train"])  # the same part once more
    assert open_with(images).test.tolist() == [False] * 6 + [True] * 2
    write_csv(images / "split.csv", ["image", "split"], *rows, [f"./{names[0]}", "test"])
    message = rf"split\.csv, line 10: {names[0]} is in the part test, but in the part train in .*split\.csv, line 2"
    with pytest.raises(ValueError, match=message):
        open_with(images)


# DICOM


def test_check_lists_dicom_files_that_are_no_images(images, capsys):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    report = pydicom.dataset.FileDataset("report.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
    report.Modality = "SR"
    report.save_as(images / "report.dcm", enforce_file_format=False)
    names = [*names_of(images), "report.dcm"]
    write_csv(images / "labels.csv", ["image", "cat"], *([name, k % 2] for k, name in enumerate(names)))
    assert check_cxr.main(["--data-dir", str(images)]) == 1
    printed = capsys.readouterr().out
    assert "1 images cannot be read:" in printed and "move them away and pass --allow-missing" in printed
    assert "report.dcm: expected an image, but this DICOM file has no Rows or Columns" in printed


# boxes.csv


def test_boxes_are_in_pixels_of_the_file(images):
    names = names_of(images)
    write_csv(images / "labels.csv", ["image", "split", "cat"], *([name, "test", "1"] for name in names))
    boxes = [["0.png", "cat", 3, 2, 6, 4], ["0.png", "cat", 20, 10, 10, 10], ["3.png", "cat", 0, 0, 40, 10]]
    write_csv(images / "boxes.csv", ["image", "label", "x", "y", "w", "h"], *boxes)
    found = truth.truth_of(open_with(images))
    assert (found.image.tolist(), found.classes.tolist(), found.box_count) == ([0, 3], [0, 0], 3)
    # an image of 30x20 pixels fills 1024x683 pixels of the square, starting at row 170
    expected = [3 * 1024 / 30, 170 + 2 * 683 / 20, 6 * 1024 / 30, 4 * 683 / 20]
    np.testing.assert_allclose(found.boxes[0][0], expected)
    np.testing.assert_allclose(found.in_pixels(np.array([found.boxes[0][1], found.boxes[1][0]])),
                               [[20, 10, 10, 10], [0, 0, 40, 10]])  # fmt: skip
    # the best of several boxes counts
    assert found.overlaps(np.array([found.boxes[0][1], found.boxes[1][0]])).tolist() == pytest.approx([1, 1])
    squeezed = truth.truth_of(open_with(images, "--fit", "squeeze"))
    np.testing.assert_allclose(squeezed.boxes[0][0], np.array([3 / 30, 2 / 20, 6 / 30, 4 / 20]) * 1024)


def test_a_broken_image_with_a_box_is_named_as_broken(images, capsys):
    write_csv(images / "labels.csv", ["image", "split", "cat"], *([name, "train", "1"] for name in names_of(images)))
    write_csv(images / "boxes.csv", ["image", "label", "x", "y", "w", "h"], ["0.png", "cat", 3, 2, 6, 4])
    (path,) = images.rglob("0.png")
    path.write_bytes(path.read_bytes()[:20])
    assert check_cxr.main(["--data-dir", str(images), "--decode"]) == 1
    printed = "".join(capsys.readouterr())
    assert "0.png" in printed and "exceeds" not in printed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0.png", "dog", 0, 0, 1, 1], "line 2: expected one of the classes cat, got 'dog'"),
        (["9.png", "cat", 0, 0, 1, 1], r"line 2: '9\.png' is not in labels\.csv"),
        (["0.png", "cat", 0, 0, "", 1], "line 2: expected numbers x, y, w, h"),
        (["0.png", "cat", -1, 0, 2, 1], "line 2: expected x, y of at least 0 and w, h above 0"),
        (["0.png", "cat", 25, 0, 6, 1], r"the box 25, 0, 6, 1 exceeds 0\.png, which is displayed with 30x20 pixels"),
    ],
)
def test_error_names_the_mistake_in_boxes_csv(images, row, message):
    write_csv(images / "labels.csv", ["image", "cat"], *([name, "1"] for name in names_of(images)))
    write_csv(images / "boxes.csv", ["image", "label", "x", "y", "w", "h"], row)
    with pytest.raises(ValueError, match=message):
        open_with(images)


# kinds of data sets


def test_kind_of_data_set_is_recognized_by_its_tables(images, tmp_path):
    with pytest.raises(ValueError, match=r"expected Data_Entry_2017_v2020\.csv .*give their folder with --tables"):
        open_with(images)
    write_csv(images / "labels.csv", ["image", "cat"], *([name, "1"] for name in names_of(images)))
    assert open_with(images).about.kind == "folder"
    (images / nih.ENTRIES[0]).write_text("")
    with pytest.raises(ValueError, match="found the tables of nih and of folder; choose one with --dataset"):
        open_with(images)
    assert open_with(images, "--dataset", "folder").about.kind == "folder"
    with pytest.raises(ValueError, match="uncertain: expected a data set chexpert, got folder"):
        open_with(images, "--dataset", "folder", "--uncertain", "1")
    with pytest.raises(ValueError, match="view: expected none with a data set folder, got PA"):
        open_with(images, "--dataset", "folder", "--view", "PA")


HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Cardiomegaly", "Edema", "Pleural Effusion"]


@pytest.fixture
def chexpert_data(tmp_path):
    """Five images of four patients, in the published layout."""
    data = tmp_path / "CheXpert-v1.0-small"
    rows = [
        ("train", 1, 1, "view1_frontal", "Frontal", "AP", "1.0", "", "", ""),
        ("train", 1, 1, "view2_lateral", "Lateral", "", "1.0", "", "", ""),
        ("train", 2, 1, "view1_frontal", "Frontal", "PA", "", "1.0", "-1.0", "0.0"),
        ("train", 3, 1, "view1_frontal", "Frontal", "AP", "", "", "-1.0", "1.0"),
        ("valid", 4, 1, "view1_frontal", "Frontal", "AP", "0.0", "1.0", "0.0", "1.0"),
    ]
    tables = {"train": [HEADER], "valid": [HEADER]}
    for part, patient, study, view, *cells in rows:
        place = f"CheXpert-v1.0-small/{part}/patient{patient:05}/study{study}/{view}.jpg"
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(patient).integers(0, 256, (32, 39), np.uint8)).save(tmp_path / place)
        tables[part].append([place, "Female", "68", *cells])
    for part, table in tables.items():
        write_csv(data / f"{part}.csv", *table)
    return data


@pytest.mark.parametrize(("uncertain", "value"), [("unknown", math.nan), ("0", 0), ("1", 1)])
def test_chexpert_in_its_published_layout_is_read(chexpert_data, uncertain, value):
    index = open_with(chexpert_data, "--uncertain", uncertain)
    assert index.about.kind == "chexpert"
    assert index.classes == ("Cardiomegaly", "Edema", "Pleural Effusion")
    expected = np.array([[0, 0, 0], [0, 0, 0], [1, value, 0], [0, value, 1], [1, 0, 1]], np.float32)
    np.testing.assert_array_equal(index.labels, expected)
    assert index.test.tolist() == [False] * 4 + [True]
    assert index.about.test_name == "official validation list"
    assert index.patients.tolist() == ["patient00001", "patient00001", "patient00002", "patient00003", "patient00004"]
    assert index.sizes.tolist() == [[39, 32]] * 5


@pytest.mark.parametrize(("view", "count"), [("frontal", 4), ("lateral", 1), ("AP", 3), ("PA", 1)])
def test_views_of_chexpert_can_be_selected(chexpert_data, view, count):
    assert len(open_with(chexpert_data, "--view", view).names) == count


def test_error_names_the_mistake_in_chexpert(chexpert_data):
    path = chexpert_data / "valid.csv"
    content = path.read_text()
    path.write_text(content.replace("1.0,0.0,1.0", "7,0.0,1.0"))
    with pytest.raises(ValueError, match="line 2: Cardiomegaly: expected 1, 0, -1 or nothing, got '7'"):
        open_with(chexpert_data)
    path.write_text(content.replace("patient00004", "patient00003"))
    with pytest.raises(ValueError, match="1 patients are in more than one part of the split"):
        open_with(chexpert_data)
    path.write_text(content)
    next(chexpert_data.rglob("patient00004/**/*.jpg")).unlink()
    with pytest.raises(ValueError, match="1 of 5 images of the tables are missing"):
        open_with(chexpert_data)
    assert len(chexpert.load_chexpert(chexpert_data, allow_missing=True).names) == 4


def test_views_and_patient_sex_of_chestxray14_are_read(tmp_path):
    data = tmp_path / "data"
    write_dataset(data, images=20, size=32, seed=1)
    path = data / nih.ENTRIES[0]
    views = [row.split(",")[6] for row in path.read_text().splitlines()[1:]]
    path.write_text(path.read_text().replace("Patient Gender", "Patient Sex"))
    assert len(open_with(data).names) == len(views)
    for view in nih.VIEWS:
        assert len(open_with(data, "--view", view).names) == views.count(view) > 0
    assert open_with(data).about.drawn
    assert open_with(data).about.title.startswith("generated images")
    (data / nih.DRAWN).unlink()
    assert open_with(data).about == nih.DESCRIPTION


def test_only_the_published_tables_are_official(tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_dataset(data, images=40, size=32, seed=1)
    index = nih.load_index(data)
    assert not index.official
    counts = [int(index.test.sum()), int((~index.test).sum())]
    monkeypatch.setattr(nih, "OFFICIAL_IMAGES", len(index.names))
    monkeypatch.setattr(nih, "OFFICIAL_TEST_IMAGES", counts[0])
    monkeypatch.setattr(nih, "OFFICIAL_BOXES", sum(map(len, index.boxes.values())))
    assert nih.load_index(data).official
    lists = data / nih.TRAIN_VAL_LIST, data / nih.TEST_LIST  # images with boxes are moved to the training list
    train, test = (path.read_bytes() for path in lists)
    lists[0].write_bytes(test)
    lists[1].write_bytes(train)
    monkeypatch.setattr(nih, "OFFICIAL_TEST_IMAGES", counts[1])
    assert not nih.load_index(data).official


def test_checkpoint_contains_its_classes(images):
    names = names_of(images)
    write_csv(images / "labels.csv", ["image", "split", "cat", "dog", "bird"], *([n, "test", 1, 0, ""] for n in names))
    write_csv(images / "boxes.csv", ["image", "label", "x", "y", "w", "h"], ["0.png", "cat", 1, 1, 2, 2],
              ["0.png", "dog", 2, 2, 3, 3])  # fmt: skip
    index = with_classes(open_with(images), ["bird", "cat"], "run: R")
    assert index.classes == ("bird", "cat")
    np.testing.assert_array_equal(index.labels, np.array([[math.nan, 1]] * len(names), np.float32))
    assert index.boxes == {"0.png": [(1, 1, 1, 2, 2)]}
    with pytest.raises(ValueError, match="run: R: its classes fish are not in the data set, which has cat, dog, bird"):
        with_classes(open_with(images), ["fish", "cat"], "run: R")


# constant images


def test_constant_images_are_reported(images, capsys):
    names = names_of(images)
    parts = ["train"] * 6 + ["test"] * 2
    write_csv(images / "labels.csv", ["image", "split", "cat"],
              *([name, part, k % 2] for k, (name, part) in enumerate(zip(names, parts, strict=True))))  # fmt: skip
    for number, status in ((6, 0), (2, 1)):
        path = next(images.rglob(f"{number}.*"))
        Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(path)
        assert check_cxr.main(["--data-dir", str(images)]) == status
    assert "2 images are constant, 1 of them outside the test part" in capsys.readouterr().out
    assert train_cxr.main(["--data-dir", str(images), "--out", str(images / "run"), *SMALL, "--batch-size", "2"]) == 2
    assert "1 images for training or validation are constant" in capsys.readouterr().err


def test_check_warns_of_data_that_cannot_be_learned(images, capsys):
    names = names_of(images)
    write_csv(images / "labels.csv", ["image", "split", "cat", "dog", "bird"],
              *([name, "test" if k > 5 else "train", k % 2, 1, ""] for k, name in enumerate(names)))  # fmt: skip
    assert check_cxr.main(["--data-dir", str(images)]) == 0
    printed = capsys.readouterr().out
    for part in ("train", "test"):
        assert f"\nwarning   the part {part} has no image with bird\n" in printed
        assert f"\nwarning   the part {part} has no image without dog, bird\n" in printed
    assert "\nwarning   the part test has few images with cat (1), dog (2): their AUC is unreliable\n" in printed
    assert "\nwarning   the part train has few images without cat (3): they are hard to learn\n" in printed
    assert re.search(r"\ncat +3\* +1\* +0 +0\n", printed)
    assert "\n* fewer than 10 images of the part have the class, or fewer than 10 do not have it\n" in printed
    write_csv(images / "labels.csv", ["image", "split", "cat"], *([name, "train", 1] for name in names))
    assert check_cxr.main(["--data-dir", str(images)]) == 0
    assert "\nwarning   there is no image in the part test\n" in capsys.readouterr().out
    write_csv(images / "labels.csv", ["image", "split", "cat"], *([name, "test", 1] for name in names))
    assert check_cxr.main(["--data-dir", str(images)]) == 1
    assert capsys.readouterr().out.endswith("wrong: there is no image to train on\n")


def test_check_decodes_all_images_of_a_small_set(tmp_path, capsys, monkeypatch):
    """Among 300 images, a training does not decode the constant image before it starts; the check finds it."""
    names = [f"{k}.png" for k in range(300)]
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / name)
    write_csv(tmp_path / "labels.csv", ["image", "split", "cat"],
              *([name, ("train", "val", "test")[k % 3], k % 2] for k, name in enumerate(names)))  # fmt: skip
    given = ["--data-dir", str(tmp_path)]
    assert check_cxr.main(given) == 0
    assert re.search(r"^decoded   all\n[\s\S]*\nok\n$", capsys.readouterr().out, re.M)
    drawn = np.random.default_rng(0).choice(300, check.SAMPLE, replace=False)
    row = next(k for k in range(0, 300, 3) if k not in drawn)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / names[row])
    assert check_cxr.main(given) == 1
    assert capsys.readouterr().out.endswith("wrong: 1 images outside the test part are constant\n")
    # for a larger set, the last line says how many images were decoded
    monkeypatch.setattr(check, "CHECKED", check.SAMPLE)
    assert check_cxr.main(given) == 0
    printed = capsys.readouterr().out
    assert "\ndecoded   256 of 300, drawn at random\n" in printed
    assert printed.endswith("\nok: 256 of 300 images decoded; --decode decodes all\n")
    assert check_cxr.main([*given, "--decode"]) == 1


# padding


def test_padding_changes_neither_loss_nor_pooling(tmp_path):
    """The values of padded cells change no loss, and padded cells get no gradient."""
    config = OLDER | settings.config_of(settings.parse(["--data-dir", "x", "--out", "y", *SMALL]))
    state = training.Training(
        config | {"fit": "pad", "classes": ["a", "b"]}, Processes(0, 1, torch.device("cpu"), None), False
    )
    frame = torch.tensor([[0, 16, 64, 32]])
    logits = torch.randn(1, 2, 8, 8, requires_grad=True)
    mask = state.mask_of(frame, logits)
    assert mask[0].sum() == 4 * 8
    labels = torch.tensor([[1.0, float("nan")]])
    loss, _ = training.terms_of(state.criterion, logits, labels, mask)
    loss.backward()
    assert (logits.grad[0, 0][~mask[0]] == 0).all()
    assert logits.grad[0, 0].abs().sum() > 0
    assert (logits.grad[0, 1] == 0).all()  # an unknown label
    other = torch.where(mask, logits.detach(), 9.0)
    assert torch.equal(training.terms_of(state.criterion, other, labels, mask)[0], loss.detach())
    state.config["fit"] = "squeeze"
    assert state.mask_of(frame, logits) is None


def test_frame_moves_with_the_crop(tmp_path):
    Image.fromarray(np.full((16, 64), 200, np.uint8)).save(tmp_path / "x.png")
    data = items.LabelledImages([tmp_path / "x.png"], np.zeros((1, 1), np.float32), 64, 56, 0, ["x"],
                                sizes=np.array([[64, 16]]), fit="pad")  # fmt: skip
    for epoch in range(5):
        image, _, frame, _ = data[epoch, 0]
        x, y, w, h = frame.tolist()
        assert (x, w, h) == (0, 56, 16)
        assert (image[y : y + h, x : x + w] == 200).all()
        assert (image == 200).sum() == w * h
    with pytest.raises(ValueError, match="sizes: needed if images are padded"):
        items.LabelledImages([tmp_path / "x.png"], np.zeros((1, 1), np.float32), 64, fit="pad")


# the whole pipeline


def draw_photos(data, count, seed=0):
    """Photos with red and green squares, of several sizes. Some have two boxes of a class, some unknown labels."""
    rng = np.random.default_rng(seed)
    data.mkdir()
    rows, boxes = [["image", "patient", "red", "green"]], [["image", "label", "x", "y", "w", "h"]]
    for i in range(count):
        width, height = [(60, 40), (40, 60), (64, 64), (90, 30)][i % 4]
        photo = rng.integers(60, 100, (height, width, 3)).astype(np.uint8)
        labels = rng.random(2) < 0.5
        for c in np.flatnonzero(labels):
            for _ in range(1 + (i % 5 == 0)):
                w, h = rng.integers(10, 18, 2)
                x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
                photo[y : y + h, x : x + w] = 60
                photo[y : y + h, x : x + w, c] = 230
                boxes.append([f"{i}.png", ("red", "green")[c], x, y, w, h])
        place = data / f"day {i % 3}" / f"{i}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(photo).save(place)
        shown = [int(labels[0]), "" if i % 10 == 9 and not labels[1] else int(labels[1])]
        rows.append([f"{i}.png", f"p{i // 2}", *shown])
    write_csv(data / "labels.csv", *rows)
    write_csv(data / "boxes.csv", *boxes)


@pytest.mark.examples
@pytest.mark.parametrize("fit", ["pad", "squeeze"])
def test_whole_pipeline_runs_on_a_folder(tmp_path, capsys, fit):
    data, run = tmp_path / "photos", tmp_path / "run"
    draw_photos(data, 48)
    assert check_cxr.main(["--data-dir", str(data)]) == 0
    assert train_cxr.main(["--data-dir", str(data), "--out", str(run), *SMALL, "--fit", fit]) == 0
    model, config = load_run(run, "cpu")
    assert (config["classes"], config["fit"], config["channels"]) == (["red", "green"], fit, 3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 8, 8)
    history = next(csv.DictReader((run / "history.csv").open()))
    assert {"val_auc_red", "val_auc_green"} <= set(history)
    base = ["--run", str(run), "--data-dir", str(data), "--draws", "5", "--device", "cpu"]
    results = []
    for more in ([], ["--cache", str(tmp_path / "cache")]):
        assert localize_cxr.main([*base, *more]) == 0
        results.append(json.loads((run / "localization" / "metrics.json").read_text()))
    assert results[0] == results[1]
    report = (run / "localization" / "report.html").read_text()
    assert "<title>photos: classification and localization" in report
    assert "images of the test part" in report
    assert "Several boxes of one class in an image count once" in report
    assert results[0]["baselines"]["whole image"]["0.1"]["mean"] <= 1
    index = open_with(data)
    sizes = dict(zip(index.names, index.sizes.tolist(), strict=True))
    for row in csv.DictReader((run / "localization" / "boxes.csv").open()):
        true, found = ([float(row[f"{kind}_{s}"] or "nan") for s in "xywh"] for kind in ("true", "found"))
        place = [b[1:] for b in index.boxes[row["image"]] if index.classes[b[0]] == row["class"]]
        assert any(np.allclose(true, b, atol=1e-3) for b in place)
        width, height = sizes[row["image"]]
        if not math.isnan(found[0]):
            assert min(found[:2]) >= -1e-3
            assert found[0] + found[2] <= width + 1e-3
            assert found[1] + found[3] <= height + 1e-3
    assert provenance.trained_patients(run, provenance.trained_names(run), index) == {
        str(p) for p in index.patients[~index.test]
    }
    assert "of the pairs of an image and a class with boxes" in report
    for words in ("patients with it", "patients without it", "over draws of patients", "boxes of other patients"):
        assert words in report
    # without patients, the intervals are over images
    with (data / "labels.csv").open(newline="") as file:
        rows = [{key: cell for key, cell in row.items() if key != "patient"} for row in csv.DictReader(file)]
    whole_table = (data / "labels.csv").read_bytes()
    write_csv(data / "labels.csv", list(rows[0]), *(row.values() for row in rows))
    capsys.readouterr()
    assert check_cxr.main(["--data-dir", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "leaks     unknown: there is no column patient" in printed and "patients," not in printed
    assert localize_cxr.main(base) == 0
    report = (run / "localization" / "report.html").read_text()
    assert "images with it" in report and "over draws of images" in report and "patients" not in report
    (data / "labels.csv").write_bytes(whole_table)
    # another --fit than in training, and a split that differs from that of the training
    other = "squeeze" if fit == "pad" else "pad"
    assert localize_cxr.main([*base, "--fit", other]) == 2
    assert f"was trained with {fit}, got {other}" in capsys.readouterr().err
    swapped = (data / "split.csv").read_text().replace("train", "x").replace("test", "train").replace("x", "test")
    (data / "split.csv").write_text(swapped)
    assert localize_cxr.main(base) == 2
    assert "images of the test part" in capsys.readouterr().err


# identical images


def test_identical_files_are_found_by_their_content(tmp_path):
    contents = [b"a" * 9000, b"b", b"a" * 9000, b"", b"", b"c", b"b", b"a" * 9000, b"a" * 4999 + b"x" + b"a" * 4000]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    # the last one differs only in the middle; empty and missing files are equal to nothing
    assert identical_files([*paths, tmp_path / "missing", tmp_path / "missing"]) == [[0, 2, 7], [1, 6]]


def test_check_names_copies_in_two_parts_and_with_other_labels(images, capsys):
    names = names_of(images)
    rows = [[name, "train" if k < 5 else "test", k % 2] for k, name in enumerate(names)]
    write_csv(images / "labels.csv", ["image", "split", "cat"], *rows)
    assert check_cxr.main(["--data-dir", str(images)]) == 0
    assert "identical" not in capsys.readouterr().out
    for number, copy in ((0, "copy_0.png"), (1, "copy_1.jpg")):
        (original,) = images.rglob(names[number])
        (images / copy).write_bytes(original.read_bytes())
    rows += [["copy_0.png", "test", 0], ["copy_1.jpg", "train", 0]]  # a copy in another part; a copy with another label
    write_csv(images / "labels.csv", ["image", "split", "cat"], *rows)
    assert check_cxr.main(["--data-dir", str(images)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " = copy" in line]
    first, second = (f"{names[k]} = copy_{k}" for k in (0, 1))
    assert lines[0].startswith("identical 2 groups of images with the same content: ")
    assert lines[1] == f"          1 groups in two parts: the test is not independent: {first}.png"
    assert lines[2] == f"          1 groups with different labels: {second}.jpg"


def test_split_that_was_drawn_before_the_table_had_patients(images, capsys):
    names = names_of(images)
    write_csv(images / "labels.csv", ["image", "cat"], *([name, k % 2] for k, name in enumerate(names)))
    assert check_cxr.main(["--data-dir", str(images)]) == 0
    write_csv(images / "labels.csv", ["image", "patient", "cat"], *([name, "p", k % 2] for k, name in enumerate(names)))
    capsys.readouterr()
    assert check_cxr.main(["--data-dir", str(images)]) == 2
    error = capsys.readouterr().err
    assert (
        "1 patients are in more than one part of the split (p); correct the column split, or split.csv. Delete" in error
    )


def test_check_names_opposite_classes(images, capsys):
    rows = [[name, ("ok", "defect")[k % 2]] for k, name in enumerate(names_of(images))]
    write_csv(images / "labels.csv", ["image", "labels"], *rows)
    assert check_cxr.main(["--data-dir", str(images)]) == 0
    assert "note      every bag or image has exactly one of defect and ok: " in capsys.readouterr().out
