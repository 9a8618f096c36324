"""ChestX-ray14: tables, folder layouts, images, cache and the synthetic data set. Errors name the file and the line."""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import check_cxr
import make_synthetic_cxr
import numpy as np
import pytest
import torch
from common import options
from images import batches, cache, dataset, items, nih, pixels, synthetic, synthetic_set
from images.check import checked_index
from images.nih import CLASSES
from images.options import add_data_options

Image = pytest.importorskip("PIL.Image")

SIZE = 48


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small synthetic data set."""
    folder = tmp_path_factory.mktemp("cxr")
    synthetic_set.write_dataset(folder / "data", images=40, size=SIZE, seed=0)
    return folder / "data"


@pytest.fixture
def copy(drawn, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(drawn, tmp_path / "copy")


def flatten(folder, suffix=".png"):
    """Moves the images of the twelve folders into the root folder."""
    for path in sorted(folder.glob("images_*/images/*.png")):
        path.rename(folder / (path.stem + suffix))


# the tables


def test_classes_are_those_of_the_paper():
    assert len(CLASSES) == 14
    assert list(CLASSES) == sorted(CLASSES)
    assert "Infiltration" in CLASSES


def test_real_tables_are_read(data_dir):
    folder = data_dir / "chestxray14"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    index = nih.load_index(folder, allow_missing=True)
    assert len(index.names) == 44
    assert len(index.names) + len(index.missing) == 112_120
    boxes = [box for found in index.boxes.values() for box in found]
    counts = np.bincount([box[0] for box in boxes], minlength=14)
    assert dict(zip(CLASSES, counts.tolist(), strict=True)) == dict.fromkeys(CLASSES, 0) | {
        "Atelectasis": 180, "Cardiomegaly": 146, "Effusion": 153, "Infiltration": 123, "Mass": 85, "Nodule": 79,
        "Pneumonia": 120, "Pneumothorax": 98,
    }  # fmt: skip
    assert len(index.boxes) == 880
    (atelectasis,) = index.boxes["00013118_008.png"]
    assert atelectasis == (0, 225.084745762712, 547.019216763771, 86.7796610169491, 79.1864406779661)
    row = index.names.index("00000001_000.png")
    assert index.labels[row].tolist() == [float(name == "Cardiomegaly") for name in CLASSES]
    assert (index.patients[row], index.sizes[row].tolist(), index.test[row]) == (1, [1024, 1024], False)
    modes = {Image.open(path).mode for path in index.paths}
    assert modes == {"L", "RGBA"}
    for path in index.paths[:3] + [p for p in index.paths if Image.open(p).mode == "RGBA"][:1]:
        image = np.array(Image.open(path))
        grey = image if image.ndim == 2 else image[..., 0]
        assert np.array_equal(pixels.load_image(path, 1024), grey)
        assert np.abs(pixels.load_image(path, 64) - grey.reshape(64, 16, 64, 16).mean((1, 3))).mean() < 3
    with pytest.raises(ValueError, match="112076 of 112120 images of the tables are missing"):
        dataset.refuse_missing(folder, index.missing, 112_120)


def test_index_holds_the_generated_labels_and_boxes(drawn):
    plans = {plan.name: plan for plan in synthetic_set.plan_images(40, 0)}
    index = nih.load_index(drawn)
    assert set(index.names) == set(plans)
    assert 0 < index.test.sum() < len(index.names)
    for row, name in enumerate(index.names):
        plan = plans[name]
        assert [CLASSES[c] for c in np.flatnonzero(index.labels[row])] == plan.findings
        assert (index.patients[row], index.test[row]) == (plan.patient, plan.test)
        assert index.paths[row].name == name
        boxed = {CLASSES[box[0]] for box in index.boxes.get(name, ())}
        assert boxed == (set(plan.findings) & set(nih.BOXED) if plan.test else set())
    assert index.labels.dtype == np.float32
    assert not index.missing


def test_older_table_gives_the_same_index(drawn, copy):
    path = copy / "Data_Entry_2017_v2020.csv"
    header, *rows = path.read_text().splitlines()
    rows = [row.split(",") for row in rows]
    old = [header + ",", *(",".join([*r[:4], f"{int(r[4]):03}Y", *r[5:], ""]) for r in rows)]
    path.unlink()
    (copy / "Data_Entry_2017.csv").write_text("\r\n".join(old) + "\r\n")
    one, other = nih.load_index(drawn), nih.load_index(copy)
    assert one.names == other.names
    assert np.array_equal(one.labels, other.labels)
    assert np.array_equal(one.sizes, other.sizes)


def change(path, line, function):
    """Replaces a line, counted from 1, by ``function(line)``."""
    lines = path.read_text().split("\n")
    lines[line - 1] = function(lines[line - 1])
    path.write_text("\n".join(lines))


ENTRY, BOX = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"


@pytest.mark.parametrize(
    ("file", "line", "function", "message"),
    [
        (ENTRY, 1, lambda x: x.replace("Finding Labels", "Labels"), "line 1: expected the columns"),
        (ENTRY, 1, lambda x: x.replace("Follow-up #,Patient ID", "Patient ID,Follow-up #"), "line 1: expected the col"),
        (ENTRY, 1, lambda x: x + ",", "line 2: expected 11 cells and a comma, got 11"),
        (ENTRY, 3, lambda x: x.rsplit(",", 3)[0], "line 3: expected 11 cells, got 8"),
        (ENTRY, 3, lambda x: x + ",", "line 3: expected 11 cells, got 12"),
        (ENTRY, 3, lambda x: x.rsplit(",", 1)[0] + ",", "line 3: pixel spacing: expected numbers > 0, got ''"),
        (ENTRY, 4, lambda x: x.replace(x.split(",")[1], "Infiltrate"), "line 4: .*got 'Infiltrate'"),
        (ENTRY, 4, lambda x: x.replace(x.split(",")[1], "Mass|No Finding"), r"line 4: .*'Mass\|No Finding'"),
        (ENTRY, 4, lambda x: x.replace(x.split(",")[1], "Mass|Mass"), r"line 4: .*'Mass\|Mass'"),
        (ENTRY, 4, lambda x: x.replace(x.split(",")[1], ""), "line 4: .*got ''"),
        (ENTRY, 5, lambda x: x.replace(".png", ""), "line 5: expected a name like 00000001_000.png"),
        (ENTRY, 5, lambda x: "00000009" + x[8:], "line 5: expected patient 9 for image 00000009_"),
        (ENTRY, 2, lambda x: "\n".join([x, x]), "line 3: 00000001_000.png is already in line 2"),
        (ENTRY, 2, lambda x: x.replace(",21,", ",M,"), "line 2: expected an age such as 58 or 058Y, got 'M'"),
        (ENTRY, 2, lambda x: '"' + x, "Data_Entry_2017_v2020.csv, line"),
        (BOX, 1, lambda x: x.replace("w,h]", "h,w]"), "line 1: expected the columns"),
        (BOX, 2, lambda x: x.replace("Atelectasis", "Atelectase"), "line 2: expected one of .*'Atelectase'"),
        (BOX, 2, lambda x: x.rsplit(",", 1)[0], "line 2: expected an image, a class and four numbers"),
        (BOX, 2, lambda x: x.rsplit(",", 1)[0] + ",-3", "line 2: w and h: expected numbers > 0, got '-3'"),
        (BOX, 2, lambda x: x.rsplit(",", 1)[0] + ",nan", "line 2: w and h: expected numbers > 0, got 'nan'"),
        (BOX, 2, lambda x: x.rsplit(",", 1)[0] + ",2000", "line 2: the box .* exceeds the image of 1024x1024"),
        (BOX, 2, lambda x: "99999999" + x[8:], "1 images are not in Data_Entry_2017_v2020.csv"),
        ("test_list.txt", 2, lambda x: x[:-3], "line 2: expected a name like 00000001_000.png"),
        ("test_list.txt", 2, lambda x: "99999999_000.png", "line 2: 99999999_000.png is not in Data_Entry"),
        ("test_list.txt", 2, lambda x: "00000001_000.png", "line 2: 00000001_000.png is already listed in"),
    ],
)  # fmt: skip
def test_error_names_the_line(copy, file, line, function, message):
    change(copy / file, line, function)
    with pytest.raises(ValueError, match=message) as error:
        nih.load_index(copy)
    assert file in str(error.value)
    assert check_cxr.main(["--data-dir", str(copy)]) == 2


@pytest.mark.parametrize("file", [ENTRY, BOX, "test_list.txt", "train_val_list.txt"])
def test_truncated_table_is_an_error(copy, file):
    whole = (copy / file).read_bytes()
    cuts = set(np.random.default_rng(0).integers(0, len(whole) - 1, 40)) | {0, 1, len(whole) // 2}
    # A box list may end after any line. An entry table may lose the text after its last comma.
    harmless = {len(whole[: k + 1]) for k in range(len(whole)) if file == BOX and whole[k : k + 1] == b"\n"}
    if file == ENTRY:
        harmless = set(range(whole.rindex(b",") + 2, len(whole)))
    for cut in sorted(cuts - harmless):
        (copy / file).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=file.split("_")[0]):
            nih.load_index(copy)


def test_unofficial_splits_and_box_lists_are_an_error(copy, monkeypatch):
    entries, test, boxes = nih.read_tables(copy)
    count = sum(map(len, boxes.values()))
    monkeypatch.setattr(nih, "OFFICIAL_IMAGES", len(test))
    monkeypatch.setattr(nih, "OFFICIAL_TEST_IMAGES", test.sum())
    monkeypatch.setattr(nih, "OFFICIAL_BOXES", count)
    assert nih.read_tables(copy)[0].names == entries.names
    monkeypatch.setattr(nih, "OFFICIAL_BOXES", count + 1)
    with pytest.raises(ValueError, match=f"{BOX}: expected {count + 1} boxes, got {count}; it may be truncated"):
        nih.read_tables(copy)
    monkeypatch.setattr(nih, "OFFICIAL_TEST_IMAGES", test.sum() + 1)
    with pytest.raises(ValueError, match=r"test_list\.txt: expected the official"):
        nih.read_tables(copy)


def test_missing_tables_and_folders_are_an_error(copy, tmp_path):
    for file in (BOX, "test_list.txt"):
        content = (copy / file).read_text()
        (copy / file).unlink()
        with pytest.raises(ValueError, match=f"{file}: there is no such file"):
            nih.load_index(copy)
        (copy / file).write_text(content)
    (copy / ENTRY).unlink()
    with pytest.raises(ValueError, match=r"expected Data_Entry_2017_v2020\.csv or Data_Entry_2017\.csv"):
        nih.load_index(copy)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        nih.load_index(tmp_path / "nowhere")


def test_patient_in_both_lists_is_an_error(copy):
    index = nih.load_index(copy)
    several = next(p for p in index.patients[~index.test] if (index.patients == p).sum() > 1)
    moved = index.names[int(np.flatnonzero(index.patients == several)[0])]
    path = copy / "train_val_list.txt"
    path.write_text(path.read_text().replace(moved + "\n", ""))
    with (copy / "test_list.txt").open("a") as file:
        file.write("\n" + moved)
    with pytest.raises(ValueError, match=f"1 patients are in train_val_list.txt and in test_list.txt .{several}"):
        nih.load_index(copy)


# the images


def test_all_folder_layouts_and_resized_jpegs_give_the_same_index(drawn, tmp_path):
    expected = nih.load_index(drawn)
    flat = shutil.copytree(drawn, tmp_path / "flat")
    flatten(flat)
    one = shutil.copytree(flat, tmp_path / "one")
    (one / "images").mkdir()
    small = tmp_path / "small"
    small.mkdir()
    for path in sorted(one.glob("*.png")):
        Image.open(path).convert("L").resize((32, 32)).save(small / f"{path.stem}.JPG", format="JPEG")
        path.rename(one / "images" / path.name)
    for folder, tables in ((flat, None), (one, None), (small, drawn)):
        index = nih.load_index(folder, tables=tables)
        assert index.names == expected.names
        assert np.array_equal(index.labels, expected.labels)
        assert index.boxes == expected.boxes  # the size of the images does not matter
        assert check_cxr.main(["--data-dir", str(folder), "--tables", str(tables or folder), "--decode"]) == 0
    assert pixels.load_image(index.paths[0], 32).shape == (32, 32)
    shutil.copy(flat / expected.names[0], flat / "images_001")
    with pytest.raises(ValueError, match="exists twice"):
        nih.load_index(flat)


def test_missing_images_are_an_error_or_left_out(copy, capsys):
    gone = [copy / "images_001" / "images" / "00000001_000.png", *(copy / "images_007" / "images").iterdir()]
    for path in gone:
        path.unlink()
    with pytest.raises(ValueError, match=rf"{len(gone)} of \d+ images .* missing \(00000001_000.png, "):
        nih.load_index(copy)
    index = nih.load_index(copy, allow_missing=True)
    assert set(index.missing) == {path.name for path in gone}
    assert all(path.stem == name[:-4] for path, name in zip(index.paths, index.names, strict=True))
    plans = {plan.name: plan for plan in synthetic_set.plan_images(40, 0)}
    for row, name in enumerate(index.names):
        assert [CLASSES[c] for c in np.flatnonzero(index.labels[row])] == plans[name].findings
    assert check_cxr.main(["--data-dir", str(copy), "--list-missing"]) == 1
    shown = capsys.readouterr().out
    assert f"missing   {len(gone)}: 00000001_000.png" in shown
    assert all(f"\n{path.name}\n" in shown for path in gone)
    assert check_cxr.main(["--data-dir", str(copy), "--allow-missing"]) == 0
    shutil.rmtree(copy / "images_001")
    with pytest.raises(ValueError, match="none of the"):
        nih.load_index(shutil.copytree(copy, copy / "none", ignore=lambda *_: [f"images_{k:03}" for k in range(13)]))


def data_options(folder, *more):
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    return parser.parse_args(["--data-dir", str(folder), *more])


def grey(side=40):
    return np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "I;16"])
def test_every_image_mode_gives_the_same_grey(tmp_path, mode):
    image = Image.fromarray(grey().astype(np.uint16) * 256 + 7 if mode == "I;16" else grey())
    if mode == "P":  # a palette in reverse order
        image = Image.fromarray(255 - grey())
        image.putpalette([255 - k // 3 for k in range(768)])
    elif mode == "LA":
        image.putalpha(Image.fromarray(grey().T.copy()))
    elif mode != "I;16":
        image = image.convert(mode)
    image.save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == mode
    assert np.array_equal(pixels.load_image(tmp_path / "x.png", 40), grey())
    assert pixels.load_image(tmp_path / "x.png", 20).shape == (20, 20)


def test_one_bit_images_are_black_and_white(tmp_path):
    Image.fromarray(grey() > 100).save(tmp_path / "x.png")
    assert np.array_equal(pixels.load_image(tmp_path / "x.png", 40), 255 * (grey() > 100))


def test_check_reports_the_formats_of_files(copy, capsys):
    paths = nih.load_index(copy).paths
    for path in paths:
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path)
    (copy / "images_001" / "images" / "99999999_000.png").write_bytes(paths[0].read_bytes())
    assert check_cxr.main(["--data-dir", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "I;16 PNG, 12 bits used" in shown
    assert "not in the table: 99999999_000\n" in shown
    Image.open(paths[3]).convert("L").save(copy / "x.jpg")
    paths[3].write_bytes((copy / "x.jpg").read_bytes())
    (copy / "x.jpg").unlink()
    paths[4].write_bytes(b"")
    assert check_cxr.main(["--data-dir", str(copy), "--decode"]) == 1
    shown = capsys.readouterr().out
    assert "; rename it to *.jpg\n" in shown
    assert f"{paths[4]}: the file is empty\n" in shown


def test_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(options.path_of("~/x")) == "/somewhere/x"
    assert str(options.path_of("x")) == "x"


def break_image(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a page":
        path.write_text("<html>not found</html>")
    elif how == "flipped":  # the start and the end are intact: only decoding finds it
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(255 - b for b in content[middle : middle + 40]) + content[middle + 40 :]
        )
    else:
        Image.open(path).resize((40, 30)).save(path)


@pytest.mark.parametrize("how", ["truncated", "empty", "a page", "flipped", "oblong"])
def test_error_names_the_broken_image(copy, tmp_path, how, capsys):
    path = nih.load_index(copy).paths[7]
    break_image(path, how)
    with pytest.raises(ValueError, match=path.name):
        pixels.load_image(path, 40)
    assert check_cxr.main(["--data-dir", str(copy), "--decode"]) == 1
    assert "1 images cannot be read" in (shown := capsys.readouterr().out)
    assert str(path) in shown
    with pytest.raises(ValueError, match=path.name):
        cache.open_cache(tmp_path / "cache", nih.load_index(copy).paths, 16, workers=1)
    if how in ("truncated", "empty", "a page"):  # found without decoding
        with pytest.raises(ValueError, match=path.name):
            checked_index(data_options(copy))


def test_input_of_the_network_is_normalized():
    x = pixels.to_input(np.array([[[0, 255]]], dtype=np.uint8))
    assert x.shape == (1, 3, 1, 2)
    assert x.dtype == torch.float32
    expected = [[(v - m) / s for v in (0, 1)] for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(x[0, :, 0], torch.tensor(expected))


# splits, cache, data set


def test_validation_split_is_by_patient(drawn):
    index = nih.load_index(drawn)
    patients = batches.validation_patients(index, 0.25, 3)
    everyone = np.unique(index.patients[~index.test])
    assert len(patients) == round(len(everyone) / 4)
    assert set(patients) <= set(everyone)
    assert np.array_equal(patients, batches.validation_patients(index, 0.25, 3))
    assert not np.array_equal(patients, batches.validation_patients(index, 0.25, 4))


def test_interrupted_cache_continues(drawn, tmp_path, monkeypatch):
    paths = nih.load_index(drawn).paths * 4
    expected = np.stack([pixels.load_image(path, 16) for path in paths])
    seen = []

    def killed(path, size, *how, load_image=pixels.load_image):
        seen.append(path)
        if len(seen) == 100:
            raise KeyboardInterrupt
        return load_image(path, size, *how)

    monkeypatch.setattr(cache, "load_image", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.open_cache(tmp_path, paths, 16, workers=1)
    (part,) = tmp_path.glob("*.part")
    assert part.stat().st_size == 64 * 16**2
    assert not list(tmp_path.glob("*.u8"))
    with part.open("ab") as file:  # half an image
        file.write(b"\1" * 100)
    seen[:] = [None] * 1000
    assert np.array_equal(cache.open_cache(tmp_path, paths, 16, workers=2), expected)
    assert len(seen) == 1000 + len(paths) - 64
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(cache, "load_image", None)  # nothing is decoded again
    cached = cache.open_cache(tmp_path, paths, 16)
    assert np.array_equal(cached, expected)
    with pytest.raises(TypeError):
        cache.open_cache(tmp_path, paths[:-1], 16)  # another selection of images needs another cache file


def test_replaced_image_is_decoded_again(drawn, tmp_path):
    data = shutil.copytree(drawn, tmp_path / "data")
    path = next(path for path in nih.load_index(data).paths if path.suffix == ".png")
    Image.fromarray(np.full((32, 32), 200, np.uint8)).save(path, compress_level=0)  # the file size is constant
    known, folder = path.stat(), tmp_path / "cache"
    assert (cache.open_cache(folder, [path], 32, workers=1) == 200).all()
    Image.fromarray(np.full((32, 32), 100, np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == known.st_size
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns + 10**9))  # a second later
    assert (cache.open_cache(folder, [path], 32, workers=1) == 100).all()
    cache.open_cache(folder, [path], 32, workers=1)
    assert len(list(folder.glob("*.u8"))) == 2


def test_only_one_of_two_threads_builds_the_cache(drawn, tmp_path, monkeypatch):
    paths = nih.load_index(drawn).paths
    seen = []

    def slowly(path, size, *how, load_image=pixels.load_image):
        seen.append(path)
        time.sleep(0.005)
        return load_image(path, size, *how)

    monkeypatch.setattr(cache, "load_image", slowly)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: cache.open_cache(tmp_path, paths, 16, workers=1), range(2))
    assert np.array_equal(one, other)
    assert sorted(seen) == sorted(paths)


def test_cache_that_exceeds_the_disk_is_an_error(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ValueError, match=r"the cache needs 0\.0 GB more"):
        cache.open_cache(tmp_path, nih.load_index(drawn).paths, 16)


def test_crops_depend_on_seed_epoch_and_image_only(drawn, tmp_path):
    index = nih.load_index(drawn)
    cached = cache.open_cache(tmp_path, index.paths, 32, workers=1)
    from_files = items.LabelledImages(index.paths, index.labels, 32, 28, 5, index.names)
    from_cache = items.LabelledImages(cached, index.labels, 32, 28, 5, index.names)
    sent = pickle.dumps(from_cache)
    assert len(sent) < cached.nbytes // 2 + index.labels.nbytes
    corners = set()
    for epoch in range(3):
        for number in (0, 5):
            image, labels, frame, back = from_files[epoch, number]
            other, same_labels, _, _ = pickle.loads(sent)[epoch, number]
            assert torch.equal(image, other)
            assert torch.equal(labels, same_labels)
            assert labels.tolist() == index.labels[number].tolist()
            assert back == number
            assert frame.tolist() == [0, 0, 28, 28]
            places = [(y, x) for y in range(5) for x in range(5)
                      if np.array_equal(image.numpy(), cached[number, y : y + 28, x : x + 28])]  # fmt: skip
            assert len(places) == 1
            corners |= set(places)
    assert len(corners) > 2
    later = items.LabelledImages(cached[3:], index.labels[3:], 32, 28, 5, index.names[3:])  # without the first three
    assert torch.equal(later[1, 2][0], from_cache[1, 5][0])
    with pytest.raises(ValueError, match="names: expected one for each"):
        items.LabelledImages(cached, index.labels, 32, 28, 5)
    whole = items.LabelledImages(cached, index.labels, 32)[0, 3][0]
    assert np.array_equal(whole.numpy(), cached[3])


# generated images


@pytest.mark.parametrize("name", CLASSES)
def test_finding_changes_mainly_the_pixels_of_its_box(name):
    """Compares an image with and without the finding: the largest differences lie in the box."""
    for patient in (3, 4):
        without, none = synthetic.draw_image(128, 0, patient, 0, [], False)
        image, boxes = synthetic.draw_image(128, 0, patient, 0, [name], False)
        assert none == {}
        x, y, w, h = (round(v / 8) for v in boxes[name])
        assert 0 <= x <= x + w <= 128
        assert 0 <= y <= y + h <= 128
        change = np.abs(image.astype(float) - without)
        inside = np.zeros((128, 128), bool)
        inside[y : y + h, x : x + w] = True
        assert change[inside].mean() > 4 * change[~inside].mean()
        assert (change > 0.5 * change.max())[~inside].sum() < 0.2 * (change > 0.5 * change.max()).sum()


def test_boxes_contain_the_pixels_of_their_finding():
    where = np.zeros((6, 8), bool)
    where[2:4, 5] = where[3, 3] = True
    assert synthetic.box_of(where, 2.0) == (6, 4, 6, 4)
    # a small copy has the boxes of the large one, up to the size of a pixel
    for name in nih.BOXED:
        large, small = (synthetic.draw_image(size, 0, 7, 0, [name], True)[1][name] for size in (256, 64))
        assert np.abs(np.array(large) - small).max() <= 2 * 16


def test_plan_has_the_expected_patients_and_label_shares():
    plans = synthetic_set.plan_images(4000, 1)
    assert 4000 <= len(plans) < 4008
    assert plans == synthetic_set.plan_images(4007, 1)[: len(plans)]
    test = np.array([plan.test for plan in plans])
    assert 0.15 < test.mean() < 0.25
    assert not {p.patient for p in plans if p.test} & {p.patient for p in plans if not p.test}
    labels = np.array([[name in plan.findings for name in CLASSES] for plan in plans])
    shares = labels[~test].mean(0)
    assert shares.min() < 0.04 < 0.12 < shares.max() < 0.25
    assert (labels[test].sum(1) == 0).mean() < (labels[~test].sum(1) == 0).mean() < 0.5
    both = labels[:, CLASSES.index("Edema")] & labels[:, CLASSES.index("Cardiomegaly")]
    assert both.mean() > 2 * np.prod([labels[:, CLASSES.index(n)].mean() for n in ("Edema", "Cardiomegaly")])
    several = [a.findings == b.findings for a, b in itertools.pairwise(plans) if a.patient == b.patient]
    assert np.mean(several) > 0.2


def test_selected_findings_are_drawn_more_often():
    few = synthetic_set.plan_images(1000, 1, ("Mass", "Effusion"), 3.0)
    counts = {name: np.mean([name in plan.findings for plan in few]) for name in CLASSES}
    assert {name for name, share in counts.items() if share} == {"Mass", "Effusion"}
    usual = synthetic_set.plan_images(1000, 1)
    for name in ("Mass", "Effusion"):
        assert 2 < counts[name] / np.mean([name in plan.findings for plan in usual]) < 4


def test_synthetic_set_needs_an_empty_folder(drawn, tmp_path, capsys):
    assert make_synthetic_cxr.main(["--out", str(drawn)]) == 2
    assert "expected an empty folder" in capsys.readouterr().err
    options = ["--images", "3", "--size", "32", "--layout", "flat", "--seed", "4"]
    for name in ("a", "b"):
        assert make_synthetic_cxr.main(["--out", str(tmp_path / name), *options]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert not (tmp_path / "a" / "test_list.txt").read_text().endswith("\n")
