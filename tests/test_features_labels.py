"""examples/features/labels.py and runs.py: labels, boxes and instance labels; folds and splits."""

from __future__ import annotations

import feature_packages  # noqa: F401
import numpy as np
import pytest
from csv_files import write
from features import extraction, labels
from features.plan import plan, untested, untrained


def read_text(tmp_path, text, bags=("x", "y", "z.1"), **options):
    """The labels of a labels.csv with this text."""
    (tmp_path / "labels.csv").write_text(text)
    return labels.read_labels(
        tmp_path / "labels.csv", **{"classes": None, "group": "patient", "bags": list(bags)} | options
    )


BAGS = [f"b{i:02d}" for i in range(40)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bag,a\nx,1\nx,0\n", "line 3: x is already in .*line 2"),
        ("image,a\nx.png,1\nsub/x.png,0\n", "line 3: x is already in .*line 2"),
        ("slide,a\nx,1\n", r"expected a column image or bag or file or filename, found the columns \['slide', 'a'\]"),
        (
            "bag,a\nx,red\n",
            "line 2: a: expected 1, 0, or nothing, .* got 'red'; a column .*; --classes names the columns",
        ),
        ("bag,a,split\nx,1,holdout\n", "line 2: expected a split train, val, test, got 'holdout'"),
        ("bag,a\nq.png,1\nx,1\n", r"1 of the 2 bags of .* have no features \(q\.png\); bags with features: x, y, z\.1"),
        ("bag,image,a\nx,y.png,1\n", r"line 2: expected equal values in .*, got image 'y\.png' and bag 'x'"),
        ("bag,labels,a\nx,a,1\ny,a,0\n", "line 3: the column labels is 'a', but the column a is '0'"),
        ("bag,labels,a\nx,a,1\ny,,\n", "line 3: the column labels is '', but the column a is ''"),
        ("bag,labels\nx,\n", "the column labels is empty in all rows"),
    ],
)
def test_errors_of_labels(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path, text)


def test_errors_of_options_that_name_columns(tmp_path):
    for text, among in (("bag,a\nx,1\n", "columns of classes"), ("bag,labels\nx,a\n", "names in the column labels")):
        with pytest.raises(ValueError, match=f"expected {among} among a, got b"):
            read_text(tmp_path, text, classes=["b"])
    with pytest.raises(ValueError, match=r"expected the column who \(--patient\) in .*, found bag, a"):
        read_text(tmp_path, "bag,a\nx,1\n", group="who")


@pytest.mark.parametrize("key", ["bag", "image", "bag,image", "file", "filename"])
@pytest.mark.parametrize("name", ["{}", "{}.png", "deep/er/{}.jpeg", "deep\\{}.h5"])
def test_bag_is_named_by_its_file_with_or_without_suffix(tmp_path, key, name):
    rows = [",".join([name.format(bag)] * (key.count(",") + 1)) for bag in ("y", "z.1", "x")]
    found = read_text(tmp_path, f"{key},a\n{rows[0]},1\n{rows[1]},0\n{rows[2]},-1\n")
    assert found.names == ["y", "z.1", "x"]
    np.testing.assert_array_equal(found.values, [[1], [0], [np.nan]])


def test_tables_of_own_images_are_read_as_by_the_image_commands(tmp_path):
    """Labels, boxes and split of one folder, read for images and for bags."""
    from images.folder import load_folder
    from PIL import Image

    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    names = [f"p{k}.png" for k in range(10)]
    for k, name in enumerate(names):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 30), np.uint8)).save(
            photos / ("sub" if k % 2 else "") / name
        )
    shown = ["red|green", "", "red", "green", "", "red", "", "", "green", " red "]
    boxes = [["p0.png", "red", 1, 2, 3, 4], ["p0.png", "red", 5, 6, 7, 8], ["p3.png", "green", 0, 0, 30, 20]]
    write(photos / "boxes.csv", ["image", "label", "x", "y", "w", "h"], boxes)
    for form in ("list", "columns"):
        if form == "list":
            header, rows = ["image", "patient", "labels"], [[n, f"q{k // 2}", shown[k]] for k, n in enumerate(names)]
        else:
            cells = [(int("red" in text), "NaN" if k == 4 else "") for k, text in enumerate(shown)]
            header, rows = (
                ["image", "patient", "red", "green"],
                [[n, f"q{k // 2}", *cells[k]] for k, n in enumerate(names)],
            )
        write(photos / "labels.csv", header, rows)
        index = load_folder(photos)
        bags = sorted(extraction.find_images(photos))
        found = labels.read_labels(photos / "labels.csv", None, "patient", bags)
        assert found.names == [name.removesuffix(".png") for name in index.names]
        assert tuple(found.classes) == index.classes
        np.testing.assert_array_equal(found.values, index.labels)
        assert found.groups.tolist() == index.patients.tolist()
        assert (found.split == "test").tolist() == index.test.tolist()  # split.csv, which load_folder has drawn
        assert (found.split == "val").tolist() == index.val.tolist()
        assert labels.read_labels(photos / "labels.csv", None, "patient", bags, with_split=False).split is None
        places = labels.read_boxes(photos / "boxes.csv", found.classes, found.names)
        for name, placed in index.boxes.items():
            for c, *place in placed:
                assert place in places[index.classes[c]][name.removesuffix(".png")].tolist()
        assert sum(len(p) for by_bag in places.values() for p in by_bag.values()) == len(boxes)


@pytest.mark.parametrize("key", ["bag", "image", "file", "filename"])
@pytest.mark.parametrize("label", ["class", "label", "class,label"])
@pytest.mark.parametrize("sides", ["x,y,w,h", "xmin,ymin,xmax,ymax"])
def test_boxes_in_every_form(tmp_path, key, label, sides):
    twice = label.count(",") + 1
    place = "1,2,3,4" if sides.startswith("x,") else "1,2,4,6"
    rows = [("x.png", "a", place), ("q", "a", place), ("x", "other", "1,1,1,1"), ("y.jpg", "a", place)]
    lines = [f"{key},{label},{sides}", *(",".join([name, *[c] * twice, p]) for name, c, p in rows)]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    found = labels.read_boxes(tmp_path / "boxes.csv", ["a", "b"], ["x", "y"])
    assert {c: {name: p.tolist() for name, p in by_bag.items()} for c, by_bag in found.items()} == {
        "a": {"x": [[1, 2, 3, 4]], "y": [[1, 2, 3, 4]]},
        "b": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bag,x,y,w,h\nx,1,1,1,1\n", "expected a column label or class, found the columns"),
        ("bag,class,x,y\nx,a,1,1\n", "expected the columns x, y, w, h or xmin, ymin, xmax, ymax, got bag, class, x, y"),
        ("bag,class,x,y,w,h,xmin,ymin,xmax,ymax\nx,a,1,1,1,1,1,1,2,2\n", "or xmin, ymin, xmax, ymax, got both"),
        (
            "bag,class,label,x,y,w,h\nx,a,b,1,1,1,1\n",
            "line 2: expected equal values in .*, got label 'b' and class 'a'",
        ),
        ("bag,class,x,y,w,h\nx,a,1,1,,1\n", "line 2: expected numbers x, y, w, h, got "),
        ("bag,class,xmin,ymin,xmax,ymax\nx,a,5,1,2,3\n", "line 2: expected x, y of at least 0 and w, h above 0"),
        ("bag,class,x,y,w,h\nx,b,1,1,1,1\n", r"expected boxes of a in bags such as x; .* has boxes of b in these bags"),
        ("bag,class,x,y,w,h\ny,a,1,1,1,1\n", r"expected boxes of a in bags such as x; .* has no box in these bags"),
    ],
)
def test_errors_of_boxes(tmp_path, text, message):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        labels.read_boxes(tmp_path / "boxes.csv", ["a"], ["x"])


def test_box_outside_the_image_is_an_error(tmp_path):
    def read(place):
        (tmp_path / "boxes.csv").write_text(f"image,label,x,y,w,h\nx.png,a,1,1,5,5\nx.png,a,{place}\n")
        return labels.read_boxes(tmp_path / "boxes.csv", ["a"], ["x"], {"x": (48, 64), "y": None}.get)

    assert len(read("60,40,5,9")["a"]["x"]) == 2  # one pixel too far, for example by rounding
    for place in ("60,40,5.5,8", "60,40,4,9.5", "70,0,4,4"):
        with pytest.raises(ValueError, match=rf"the box {place.replace(',', ', ')} exceeds x, which has 64x48 pixels"):
            read(place)


def test_boxes_on_negative_bags_are_counted():
    table = labels.Labels(["x", "y", "z"], ["a"], np.array([[0.0], [1], [np.nan]], np.float32), None, np.array([]))
    boxes = {"a": {"x": np.zeros((2, 4)), "y": np.zeros((1, 4)), "z": np.zeros((1, 4))}}
    assert labels.boxes_on_negatives(table, boxes) == ["2 boxes of a are in 1 bags whose label of a is 0 (x)"]
    assert labels.boxes_on_negatives(table, {"a": {"y": np.zeros((1, 4))}}) == []


def test_labels_of_instances_in_both_forms(tmp_path):
    path = tmp_path / "instances.csv"
    for text in ("bag,a,b\nx,1,0\nx,,1\nq,1,1\n", "image,a,b\nx.png,1,0\nx.png,-1,1\nq.png,1,1\n"):
        path.write_text(text)
        found = labels.read_instance_labels(path, ["a", "b"], ["x", "y"])
        assert list(found) == ["x"]
        np.testing.assert_array_equal(found["x"], [[1, 0], [np.nan, 1]])
    path.write_text("bag,class\nx,a\nx,NaN\nx,b\n")
    np.testing.assert_array_equal(labels.read_instance_labels(path, ["a"], ["x"])["x"], [[1], [np.nan], [0]])
    for column in ("class", "label"):
        path.write_text(f"bag,{column},x\nx,a,3\nx,other,4\n")
        assert labels.read_instance_labels(path, ["a"], ["x"])["x"].tolist() == [[1], [0]]
    with pytest.raises(ValueError, match="has one of the classes b"):
        labels.read_instance_labels(path, ["b"], ["x"])
    with pytest.raises(ValueError, match="names one of the bags"):
        labels.read_instance_labels(path, ["a"], ["y"])


def test_missing_patients_are_not_one_patient(tmp_path):
    (tmp_path / "labels.csv").write_text("bag,a,patient\nw,1,p\nx,0,NaN\ny,1,\nz,0,nan\n")
    found = labels.read_labels(tmp_path / "labels.csv", None, "patient", ["w", "x", "y", "z"])
    assert found.groups.tolist() == ["p", "x", "y", "z"]


def test_unknown_labels_and_named_classes(bag_folder):
    found = labels.read_labels(bag_folder / "labels.csv", None, "patient", BAGS)
    assert found.classes == ["lesion", "other"]
    assert np.isnan(found.values[::5, 1]).all() and not np.isnan(found.values[:, 0]).any()
    assert labels.read_labels(bag_folder / "labels.csv", ["other"], "patient", BAGS).classes == ["other"]


def test_folds_keep_patients_together_and_test_each_bag_once(bag_folder):
    table = labels.read_labels(bag_folder / "labels.csv", None, "patient", BAGS)
    tested = []
    for one in plan(table, 5, 2, "test"):
        assert not set(table.groups[one.train]) & set(table.groups[one.test])
        tested += one.test.tolist()
    assert sorted(tested) == sorted([*range(40), *range(40)])


def test_more_folds_than_bags_of_a_kind(bag_folder):
    table = labels.read_labels(bag_folder / "labels.csv", ["lesion"], "patient", BAGS)
    table = table._replace(groups=np.array(table.names))
    with pytest.raises(ValueError, match=r"--folds: expected at most 20 .* lesion has 20 negative, 20 positive bags"):
        list(plan(table, 21, 1, "test"))
    few = table._replace(values=np.array([[float(i < 3)] for i in range(40)], np.float32), classes=["rare"])
    planned = list(plan(few, 5, 2, "test"))
    assert untested(few, planned) == ["4 of 10 folds test no positive bag of rare: they have no AUC"]
    assert untested(table, list(plan(table, 2, 1, "test"))) == []
    assert untrained(few, planned) == []
    alone = table._replace(values=(np.arange(40) > 0).astype(np.float32)[:, None], classes=["common"])
    planned = list(plan(alone, 2, 1, "test"))
    (name,) = [run.name for run in planned if alone.values[run.train].all()]
    assert untrained(alone, planned) == [
        f"1 of 2 trainings have no negative bag of common ({name}): predict_features.py does not use their "
        "probabilities of this class"
    ]
    assert untrained(table, list(plan(table, 2, 1, "test"))) == []


def spread(values, groups, count, seed):
    """The fractions (count, 2, C) of the positive and of the negative bags of each class in each of the folds."""
    table = labels.Labels(
        [f"b{i}" for i in range(len(values))], [f"c{c}" for c in range(values.shape[1])], values, None, groups
    )
    found = []
    for one in plan(table, count, seed + 1, "test"):
        if one.repeat == seed:
            assert sorted([*one.train, *one.test]) == list(range(len(values)))
            assert not set(groups[one.train]) & set(groups[one.test])
            found.append([(values[one.test] == kind).sum(0) / (values == kind).sum(0) for kind in (1, 0)])
    return np.array(found)


@pytest.mark.parametrize("seed", range(3))
def test_each_class_is_spread_evenly_over_the_folds(seed):
    """Three classes, of which one has 8 positive bags, and another one 8 negative bags; 20 % of the labels unknown."""
    generator = np.random.default_rng(seed)
    values = np.zeros((200, 3), np.float32)
    for c, positive in enumerate((100, 8, 192)):
        values[generator.permutation(200)[:positive], c] = 1
    alone = np.arange(200).astype(str)
    parts = spread(values, alone, 4, seed)
    assert parts.min() == parts.max() == 0.25  # as even as possible
    values[generator.random(values.shape) < 0.2] = np.nan
    patients = (np.arange(200) // 3).astype(str)  # three bags each
    parts = spread(values, patients, 4, seed)
    kinds = [(values == kind).sum(0) for kind in (1, 0)]
    for kind in (0, 1):
        for c in range(3):
            assert abs(parts[:, kind, c] - 0.25).max() <= max(3 / kinds[kind][c], 0.05)  # one patient, or 5 %


def test_folds_differ_by_the_seed_and_not_otherwise():
    values = np.random.default_rng(0).integers(0, 2, (60, 2)).astype(np.float32)
    table = labels.Labels([f"b{i}" for i in range(60)], ["a", "b"], values, None, np.arange(60).astype(str))
    first, again = (list(plan(table, 3, 2, "test")) for _ in range(2))
    assert all((a.test == b.test).all() for a, b in zip(first, again, strict=True))
    assert any(
        (a.test != b.test).any() for a, b in zip(first[:3], first[3:], strict=True) if len(a.test) == len(b.test)
    )
    with pytest.raises(ValueError, match=r"--folds: expected at most 60, the number of patients \(or bags\), got 61"):
        list(plan(table, 61, 1, "test"))


def test_given_split_is_used(bag_folder):
    table = labels.read_labels(bag_folder / "labels.csv", None, "patient", BAGS)
    ((_, _, train, test),) = plan(table, None, 1, "test")
    assert set(table.split[train]) == {"train", "val"} and set(table.split[test]) == {"test"}
    ((_, _, train, test),) = plan(table, None, 1, "val")
    assert set(table.split[train]) == {"train"} and set(table.split[test]) == {"val"}


def test_errors_of_the_split(tmp_path):
    table = read_text(tmp_path, "bag,a\nx,1\ny,0\n")
    with pytest.raises(ValueError, match=r"expected --folds, or a column split in labels\.csv .* or a split\.csv"):
        list(plan(table, None, 1, "test"))
    table = read_text(tmp_path, "bag,patient,split,a\nx,p,train,1\ny,p,test,0\n")
    with pytest.raises(ValueError, match=r"1 patients are in more than one part of the split \(p\)"):
        list(plan(table, None, 1, "test"))
    (tmp_path / "split.csv").write_text("image,split\nx.png,train\n")
    with pytest.raises(ValueError, match=r"1 images of labels\.csv have no split there \(y\)"):
        read_text(tmp_path, "bag,a\nx,1\ny,0\n")
