"""frozen_cxr.py: heads on the features of a frozen network, from the extraction to the table."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json

import frozen_cxr as example
import numpy as np
import pytest
import torch
from common import metrics
from common.choices import LOSSES, POOLINGS
from features.backbones import import_timm
from features.finetuning import load_blocks
from images import linear_probe
from images.frozen import (
    CLASSES,
    FIRST,
    FOLDS,
    Head,
    Predicted,
    evaluate,
    grad_cam,
    predict,
    read_films,
    reduce_features,
    train_head,
)
from images.frozen_means import mean_of_heads, mean_with_mirrored, on_cells_of
from images.frozen_methods import METHODS
from images.frozen_tables import interval_over_patients, usual_pairs
from images.frozen_tuning import BLOCKS, Tuning, tune, with_tuned
from images.nih import load_index
from images.synthetic_set import write_dataset

from sgl_ops.pooling import make_pooling

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A generated data set with its tables, and features that show each label at one position."""
    folder = tmp_path_factory.mktemp("films")
    write_dataset(folder / "data", images=240, size=64, seed=2)
    index = load_index(folder / "data", allow_missing=True)
    generator = np.random.default_rng(0)
    features = generator.normal(size=(len(index.names), 40, 10, 10))
    for i, labels in enumerate(index.labels):
        for kind in np.flatnonzero(labels):
            features[i, kind, 2:6, 5:9] += 8
    (folder / "features").mkdir()
    np.save(folder / "features" / "features.npy", features.astype(np.float16))
    (folder / "features" / "names.txt").write_text("\n".join(index.names) + "\n")
    kinds = [CLASSES[kind] for kind in np.flatnonzero(index.labels.sum(0) > 3)]
    with (folder / "det10.csv").open("w") as file:
        file.write("image_index,split,class,xmin,ymin,xmax,ymax\n")
        for name, labels in zip(index.names, index.labels, strict=True):
            file.write(f"{name},x,,,,,\n{name},x,Fracture,1,1,9,9\n")
            for kind in np.flatnonzero(labels):  # cells 5 to 8 and 2 to 5; the first cell is half a cell inside
                file.write(f"{name},x,{CLASSES[kind]},560,250,970,660\n")
    assert kinds
    with (folder / "rsna.csv").open("w") as file:
        file.write("image_index,x,y,width,height,lung_opacity\n")
        for name, labels in zip(index.names, index.labels, strict=True):
            box = "560,250,410,410" if labels[CLASSES.index("Pneumonia")] else ",,,"
            file.write(f"{name},{box},{int(box != ',,,')}\n")
    return folder


def imported_timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return import_timm()


def run(data, out, *options):
    given = ["train", "--data-dir", data / "data", "--det10", data / "det10.csv", "--features", data / "features"]
    return example.main([str(o) for o in (*given, "--out", out, "--components", 30, *options)])


@pytest.mark.examples
def test_runs_are_summarized_in_the_table(data, tmp_path, capsys):
    methods = ["softmax bag", "softmax sgl 3 mask 1"]
    assert run(data, tmp_path / "runs", "--seeds", 0, 1, "--methods", *methods) == 0
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    assert len(runs) == 4
    by_method = {run["method"]: run for run in runs if run["seed"] == 0}
    assert by_method["softmax sgl 3 mask 1"]["auc"] > 0.7
    assert by_method["softmax bag"]["lam_started_in_epoch"] == [None]
    films = read_films(data / "data", None, data / "det10.csv", data / "features")
    half = by_method["softmax sgl 3 mask 1"]["boxes"]["det10"]["half"]
    assert len(half["hits"]) == sum(bool(films.test[image]) for image, _ in films.boxes["det10"])
    assert half["pointing"] > 0.5  # 0.1 by chance
    before = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")}
    assert run(data, tmp_path / "runs", "--seeds", 0, 1, "--methods", *methods) == 0  # no run is repeated
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")}
    assert example.main(["table", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "films.csv")]) == 0
    with (tmp_path / "films.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {*methods, "centre box"}
    (row,) = [r for r in rows if (r["method"], r["boxes"], r["rule"]) == ("softmax sgl 3 mask 1", "det10", "half")]
    shares = [np.mean(run["boxes"]["det10"]["half"]["hits"], 0)[0] for run in runs if run["method"] == row["method"]]
    assert float(row["iou_0.1"]) == pytest.approx(np.mean(shares), abs=1e-4)
    assert sorted(row["iou_0.1_of_seeds"].split()) == sorted(f"{share:.2f}" for share in shares)
    low, high = (float(x) for x in row["iou_0.1_interval"].split(" to "))
    assert low <= float(row["iou_0.1"]) + 0.005 and float(row["iou_0.1"]) <= high + 0.005


def test_other_settings_than_those_of_existing_runs_are_errors(data, tmp_path, capsys):
    runs, method = tmp_path / "runs", ("--methods", "softmax sgl 20 at once", "--seeds", 0)
    assert run(data, runs, *method) == 0
    for options, name in ((["--validate"], "validate"), (["--components", 3], "components")):
        assert run(data, runs, *method, *options) == 2
        assert f"was made with another --{name}; choose another --out" in capsys.readouterr().err
    # a run of an older version has no components and no heads, and true or false as validate
    (path,) = runs.glob("*.json")
    known = json.loads(path.read_text())
    older = {key: value for key, value in known.items() if key not in ("components", "tuned", "heads")}
    path.write_text(json.dumps(older | {"validate": False}))
    assert run(data, runs, *method) == 0
    assert run(data, runs, *method, "--heads", 2) == 2
    assert "another --heads" in capsys.readouterr().err
    path.write_text(json.dumps(older | {"validate": True}))
    assert run(data, runs, *method) == 2
    assert "another --validate" in capsys.readouterr().err
    path.write_text(json.dumps(older | {"validate": False}))
    # other sets of boxes
    other = known | {"seed": 1, "boxes": {"nih": known["boxes"]["det10"]}}
    (runs / "softmax sgl 20 at once-seed1.json").write_text(json.dumps(other))
    assert run(data, runs, *method[:2], "--seeds", 1) == 2
    assert "another --det10" in capsys.readouterr().err
    table = ["table", "--runs", str(runs), "--out", str(tmp_path / "films.csv")]
    assert example.main(table) == 2
    assert "expected equal sets of boxes" in capsys.readouterr().err
    for path in runs.glob("*.json"):
        path.write_text(json.dumps(known | {"boxes": {}}))
    assert example.main(table) == 2
    assert "have no boxes; --validate needs --det10 or --rsna" in capsys.readouterr().err


def test_boxes_of_rsna_belong_to_the_map_of_pneumonia(data, tmp_path, capsys):
    films = read_films(data / "data", None, None, data / "features", data / "rsna.csv")
    assert set(films.boxes) == {"nih", "rsna"}
    pneumonia = CLASSES.index("Pneumonia")
    assert {image for image, _ in films.boxes["rsna"]} == set(np.flatnonzero(films.labels[:, pneumonia]).tolist())
    assert {kind for _, kind in films.boxes["rsna"]} == {pneumonia}
    assert next(iter(films.boxes["rsna"].values())).tolist() == [[560, 250, 410, 410]]
    method = ("--methods", "softmax bag", "--seeds", 0)
    assert run(data, tmp_path / "runs", *method, "--rsna", data / "rsna.csv") == 0
    (path,) = (tmp_path / "runs").glob("*.json")
    assert set(json.loads(path.read_text())["boxes"]) == {"nih", "det10", "rsna"}
    assert run(data, tmp_path / "runs", *method) == 2
    assert "made with another --rsna" in capsys.readouterr().err
    # a table without boxes on the test list changes nothing
    (tmp_path / "none.csv").write_text("image_index,x,y,width,height\nunknown.png,1,1,2,2\n")
    for _ in range(2):
        assert run(data, tmp_path / "more", *method, "--rsna", tmp_path / "none.csv") == 0
    (tmp_path / "official.csv").write_text("patientId,x,y,width,height,Target\n")
    assert run(data, tmp_path / "other", *method, "--rsna", tmp_path / "official.csv") == 2
    assert "official.csv: expected the columns image_index, x, y, width, height, found no image_index" in (
        capsys.readouterr().err
    )


def test_the_probe_finds_labels_that_the_features_show(data, tmp_path):
    given = ["probe", "--data-dir", str(data / "data"), "--features", str(data / "features"), "--partitions", "3"]
    for regions in (1, 2):
        out = tmp_path / f"{regions}.csv"
        assert example.main([*given, "--regions", str(regions), "--c", "0.01", "0.1", "--out", str(out)]) == 0
        with out.open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["regions"], row["c"], row["partition"]) for row in rows] == [
            (str(regions**2), c, "3") for c in ("0.01", "0.1")
        ]
        assert max(float(row["auc"]) for row in rows) > 0.8


def test_the_probe_does_not_see_the_patients_that_it_predicts():
    """The features name the patient, whose films all have the same label, drawn at random."""
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 4)
    labels = generator.integers(0, 2, (60, 1))[patients].astype(np.float32)
    x = np.eye(60, dtype=np.float32)[patients]
    for partition in range(3):
        scores = linear_probe.out_of_fold(x, labels, patients, 1.0, partition)
        assert not np.isnan(scores).any()
        assert 0.2 < metrics.auc(scores[:, 0], labels[:, 0]) < 0.6


def test_validation_excludes_the_test_list(data):
    films = read_films(data / "data", None, None, data / "features")
    evaluated = []
    for train, held in films.splits(range(FOLDS)):
        assert not films.test[train].any() and not films.test[held].any()
        assert not set(films.patients[train]) & set(films.patients[held])
        assert sorted([*train, *held]) == np.flatnonzero(~films.test).tolist()
        evaluated += held.tolist()
    assert sorted(evaluated) == np.flatnonzero(~films.test).tolist()  # each film is in one fold
    ((train, test),) = films.splits()
    assert films.test[test].all() and not set(films.patients[train]) & set(films.patients[test])
    assert sorted([*train, *test]) == list(range(len(films.test)))


def test_a_cross_validation_joins_the_predictions_of_its_folds(data, tmp_path):
    """Each film is predicted by the head of its own fold, as the runs of single folds show."""
    given = ("--seeds", 0, "--methods", "softmax bag", "--components", 12)
    for name, folds in (("all", (0, 1, 2, 3)), ("first", ()), ("last", (3,))):
        assert run(data, tmp_path / name, *given, "--validate", *folds) == 0
    joined, first, last = (
        json.loads((tmp_path / name / "softmax bag-seed0.json").read_text()) for name in ("all", "first", "last")
    )
    assert joined["validate"] == [0, 1, 2, 3] and first["validate"] == [0] and last["validate"] == [3]
    films = read_films(data / "data", None, data / "det10.csv", data / "features")
    held = [set(numbers.tolist()) for _, numbers in films.splits(range(FOLDS))]
    keys = sorted(key for key in films.boxes["det10"] if not films.test[key[0]])
    hits = joined["boxes"]["det10"]["half"]["hits"]
    assert len(hits) == len(keys)
    for single, fold in ((first, 0), (last, 3)):
        assert single["boxes"]["det10"]["half"]["hits"] == [
            hit for hit, (image, _) in zip(hits, keys, strict=True) if image in held[fold]
        ]


def test_several_heads_are_evaluated_by_their_mean(data, tmp_path):
    given = ("--seeds", 1, "--methods", "softmax bag", "--components", 12)
    assert run(data, tmp_path / "two", *given, "--heads", 2) == 0
    result = json.loads((tmp_path / "two" / "softmax bag-seed1.json").read_text())
    assert result["heads"] == 2 and len(result["lam_started_in_epoch"]) == 2
    films = read_films(data / "data", None, data / "det10.csv", data / "features")
    cells, _ = reduce_features(films, 12)
    ((trained, test),) = films.splits()
    heads = [train_head(cells, films, trained, METHODS["softmax bag"], seed)[:2] for seed in (2, 3)]
    first, second = (predict(*head, cells, films, test) for head in heads)
    mean = first._replace(scores=(first.scores + second.scores) / 2, maps=(first.maps + second.maps) / 2)
    expected = evaluate(films, [mean])
    assert result["auc"] == pytest.approx(expected["auc"])
    assert result["boxes"]["det10"]["half"]["hits"] == expected["boxes"]["det10"]["half"]["hits"]


def other_features(data, folder, first, count, cells):
    """A folder with ``count`` other features of the films of ``data``, on ``cells`` x ``cells`` cells."""
    folder.mkdir()
    maps = np.load(data / "features" / "features.npy")[:, -count:]
    maps = np.repeat(np.repeat(maps, 2, 2), 2, 3)[:, :, :cells, :cells]
    np.save(folder / "features.npy", maps)
    np.save(folder / "mirrored_features.npy", maps[..., ::-1] + np.float16(0.1))
    (folder / "names.txt").write_text((data / "features" / "names.txt").read_text())
    settings = {"backbone": f"with {count} features", "stages": ["last"], "image_size": [448], "first": first}
    (folder / "settings.json").write_text(json.dumps(settings))
    return settings


@pytest.mark.parametrize("options", [(), ("--mirror", "--margin", 0.1)])
def test_the_predictions_on_the_features_of_several_folders_are_averaged(data, tmp_path, options):
    folders = [tmp_path / name for name in "abc"]
    cases = ((FIRST, 30, 10), (0.25, 20, 14), (0.5, 25, 12))
    settings = [other_features(data, folder, *case) for folder, case in zip(folders, cases, strict=True)]
    given = ("--seeds", 1, "--methods", "softmax sgl 3", "--components", 12, *options)
    assert run(data, tmp_path / "runs", *given, "--features", *folders) == 0
    result = json.loads((tmp_path / "runs" / "softmax sgl 3-seed1.json").read_text())
    assert result["features"] == settings
    mirrored, margin = bool(options), options[-1] if options else 0.0
    shown, predicted, starts = None, [], []
    for folder in folders:
        films = read_films(data / "data", None, data / "det10.csv", folder, mirrored=mirrored, margin=margin)
        shown = shown or films
        cells, _ = reduce_features(films, 12)
        ((trained, test),) = films.splits()
        head, pooling, started = train_head(cells, films, trained, METHODS["softmax sgl 3"], 1)
        of_both = predict(head, pooling, cells, films, test)
        mean = mean_with_mirrored(films, of_both) if mirrored else of_both
        predicted.append(mean._replace(maps=on_cells_of(mean.maps, films, shown)))
        starts.append(started)
    assert result["lam_started_in_epoch"] == starts
    expected = evaluate(shown, [mean_of_heads(predicted)])
    assert result["auc"] == pytest.approx(expected["auc"])
    assert result["boxes"]["det10"] == expected["boxes"]["det10"]


def test_features_of_other_networks_and_images_are_refused(data, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    other_features(data, a, FIRST, 30, 10)
    other_features(data, b, 0.25, 20, 14)
    given = ("--seeds", 1, "--methods", "softmax bag", "--components", 12, "--features")
    assert run(data, tmp_path / "runs", *given, a, b) == 0
    (path,) = (tmp_path / "runs").glob("*.json")
    before = path.stat().st_mtime_ns
    assert run(data, tmp_path / "runs", *given, a, b) == 0 and path.stat().st_mtime_ns == before
    for folders in ([a], [b], [b, a], [a, a]):
        capsys.readouterr()
        assert run(data, tmp_path / "runs", *given, *folders) == 2
        assert "made with another --features" in capsys.readouterr().err
    (b / "names.txt").write_text("\n".join(reversed((b / "names.txt").read_text().split())))
    assert run(data, tmp_path / "none", *given, a, b) == 2
    assert "do not hold the features of the same images in the same order" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(data, tmp_path / "none", *given, a, b, "--tune", 1, "--weights", b)
    assert "--tune: expected one folder of --features, got 2" in capsys.readouterr().err


def test_mirrored_images_are_trained_on_and_evaluated(data, tmp_path, capsys):
    features = tmp_path / "features"
    features.mkdir()
    for path in (data / "features").iterdir():
        (features / path.name).write_bytes(path.read_bytes())
    given = ("--features", features, "--seeds", 1, "--methods", "softmax bag", "--components", 12)
    mirror = (*given, "--mirror", "--margin", 0.1)
    assert run(data, tmp_path / "runs", *mirror) == 2
    assert "holds no mirrored_features.npy" in capsys.readouterr().err
    maps = np.load(features / "features.npy")
    np.save(features / "mirrored_features.npy", maps[..., ::-1] + np.float16(0.1))
    assert run(data, tmp_path / "runs", *mirror) == 0
    result = json.loads((tmp_path / "runs" / "softmax bag-seed1.json").read_text())
    assert result["mirror"] is True and result["margin"] == 0.1
    films = read_films(data / "data", None, data / "det10.csv", features, mirrored=True, margin=0.1)
    n = len(maps)
    assert len(films.labels) == 2 * n and torch.equal(films.labels[:n], films.labels[n:])
    cells, _ = reduce_features(films, 12)
    assert cells.shape == (2 * n, 64, 12)  # 8 x 8 of 10 x 10 cells
    ((trained, test),) = films.splits()
    head, pooling, _ = train_head(cells, films, trained, METHODS["softmax bag"], 1)
    expected = evaluate(films, [mean_with_mirrored(films, predict(head, pooling, cells, films, test))])
    assert result["auc"] == pytest.approx(expected["auc"])
    assert result["boxes"]["det10"]["half"] == expected["boxes"]["det10"]["half"]
    assert len(expected["boxes"]["det10"]["half"]["hits"]) == sum(
        bool(films.test[image]) for image, _ in films.boxes["det10"]
    )
    for options, name in ((given[2:], "mirror"), ((*mirror[2:-1], 0.2), "margin")):
        assert run(data, tmp_path / "runs", *given[:2], *options) == 2
        assert f"made with another --{name}" in capsys.readouterr().err
    assert run(data, tmp_path / "none", *given, "--margin", 0.4999) == 2
    assert "no cell is farther than 0.4999" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(data, tmp_path / "none", *given, "--margin", 0.5)
    assert "--margin: expected 0 to less than 0.5" in capsys.readouterr().err


def compare(folder, *options):
    given = ["compare", "--runs", folder / "runs", "--out", folder / "differences.csv", *options]
    code = example.main([str(o) for o in given])
    with (folder / "differences.csv").open() as file:
        return code, list(csv.DictReader(file))


def changed(folder, name, out, **values):
    """Writes a run of ``folder`` with other values to ``out``."""
    run = json.loads((folder / f"{name}.json").read_text()) | values
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(run))
    return run


@pytest.fixture(scope="module")
def two_methods(data, tmp_path_factory):
    """A folder "runs" with two seeds of the bag loss and of SGL, and "other" with another bag loss."""
    folder = tmp_path_factory.mktemp("two")
    names = ("softmax bag", "softmax sgl 20 at once")
    assert run(data, folder / "runs", "--seeds", 0, 1, "--methods", *names) == 0
    assert run(data, folder / "other", "--seeds", 1, "--methods", names[0], "--components", 12) == 0
    return folder, *names


def test_differences_between_methods_are_those_of_their_runs(two_methods):
    folder, bag, sgl = two_methods

    def of(name, seed, key, rule="half"):
        found = json.loads((folder / f"runs/{name}-seed{seed}.json").read_text())
        return found["auc"] if key == "auc" else found["boxes"]["det10"][rule][key]

    code, rows = compare(folder)
    assert code == 0 and {(row["method"], row["minus"]) for row in rows} == {(sgl, bag), (sgl, "centre box")}
    for rule in ("half", "absolute"):
        own, centre = (
            next(r for r in rows if (r["minus"], r["boxes"], r["rule"]) == (minus, "det10", rule))
            for minus in (bag, "centre box")
        )
        for key, values in (("auc", "auc"), ("pointing", "pointing")):
            change = [of(sgl, s, values, rule) - of(bag, s, values, rule) for s in (0, 1)]
            assert float(own[key]) == pytest.approx(np.mean(change), abs=1e-4)
            assert own[f"{key}_seeds"] == metrics.signs(np.array(change))
            assert centre[key] == ""
        hits = np.array([of(sgl, s, "hits", rule) for s in (0, 1)], float)
        patients = np.array(of(sgl, 0, "patients"))
        for row, others in ((own, [of(bag, s, "hits", rule) for s in (0, 1)]), (centre, of(sgl, 0, "centre"))):
            change = (hits - np.array(others, float))[:, :, 0]
            assert float(row["iou_0.1"]) == pytest.approx(change.mean(), abs=1e-4)
            assert row["iou_0.1_seeds"] == metrics.signs(change.mean(1))
            low, high = interval_over_patients(change.mean(0), patients)
            assert row["iou_0.1_interval"] == f"{low:.3f} to {high:.3f}"
    assert len(set(patients.tolist())) < len(patients)  # the interval is not that over boxes


def test_another_folder_is_subtracted_method_by_method(two_methods, tmp_path, capsys):
    folder, bag, _ = two_methods
    code, rows = compare(folder, "--minus", folder / "other")
    (row,) = (r for r in rows if (r["rule"], r["boxes"]) == ("half", "det10"))
    assert code == 0 and (row["method"], row["minus"], row["seeds"]) == (bag, bag, "1")  # one seed in common
    first, second = (
        np.mean(json.loads((folder / f"{name}/{bag}-seed1.json").read_text())["boxes"]["det10"]["half"]["hits"], 0)[0]
        for name in ("runs", "other")
    )
    assert float(row["iou_0.1"]) == pytest.approx(first - second, abs=1e-4)
    boxes = changed(folder / "other", f"{bag}-seed1", tmp_path / "seed" / "a.json", seed=7)["boxes"]
    changed(folder / "other", f"{bag}-seed1", tmp_path / "set" / "a.json", boxes={"rsna": boxes["det10"]})
    other = {rule: found | {"patients": found["patients"][::-1]} for rule, found in boxes["det10"].items()}
    changed(folder / "other", f"{bag}-seed1", tmp_path / "patients" / "a.json", boxes=boxes | {"det10": other})
    changed(folder / "other", f"{bag}-seed1", tmp_path / "method" / "a.json", method="mmm")
    for name, message in (
        ("seed", "have no seed in common"),
        ("set", "have no set of boxes in common"),
        ("patients", "have different boxes of det10"),
        ("method", "have no method in common; name the methods with --pair"),
    ):
        assert compare(folder, "--minus", tmp_path / name)[0] == 2
        assert message in capsys.readouterr().err
    for pair, message in (((bag, "mmm"), "has no runs of 'mmm'"), (("centre box", bag), "has no runs of 'centre box'")):
        assert compare(folder, "--pair", *pair)[0] == 2
        assert message in capsys.readouterr().err
    assert compare(folder, "--pair", bag, "centre box")[0] == 0


def test_maps_are_cut_at_other_fractions_of_their_maximum(data):
    films = read_films(data / "data", None, data / "det10.csv", data / "features")
    numbers = np.flatnonzero(films.test)
    maps = np.full((len(numbers), len(CLASSES), 10, 10), 0.18)
    maps[:, :, 2:6, 5:9] = 0.3  # the true boxes; a cut at half of this maximum has the whole image
    scores = np.random.default_rng(0).random((len(numbers), len(CLASSES)))
    result = evaluate(films, [Predicted(numbers, scores, maps)], [0.5, 0.9])
    rules = result["boxes"]["det10"]
    assert list(rules) == ["half", "absolute", "rescaled", "0.5", "0.9"]
    assert rules["0.5"] == rules["half"]
    assert {tuple(hit) for hit in rules["half"]["hits"]} == {(True, False, False)}
    assert {tuple(hit) for hit in rules["0.9"]["hits"]} == {(True, True, True)}


def test_two_rules_are_compared(data, tmp_path, capsys):
    names = ("softmax bag", "softmax sgl 20 at once")
    given = ("--seeds", 0, 1, "--methods", *names)
    assert run(data, tmp_path / "runs", *given, "--fractions", 0.9, 0.3) == 0
    assert run(data, tmp_path / "other", *given) == 0
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}

    def hits(name, rule):
        boxes = [runs[f"{name}-seed{seed}"]["boxes"]["det10"] for seed in (0, 1)]
        return np.array([b[rule]["hits"] for b in boxes], float), np.array([b[rule]["centre"] for b in boxes], float)

    code, rows = compare(tmp_path, "--rules", 0.3, 0.9)
    rows = [row for row in rows if row["boxes"] == "det10"]
    assert code == 0 and {(row["minus"], row["rule"]) for row in rows} == {
        (names[0], "0.3 - 0.9"), ("centre box", "0.3 - 0.9")
    }  # fmt: skip
    for row, others in zip(rows, (hits(names[0], "0.9")[0], hits(names[0], "half")[1]), strict=True):
        change = (hits(names[1], "0.3")[0] - others)[:, :, 1]
        assert float(row["iou_0.3"]) == pytest.approx(change.mean(), abs=1e-4)
    assert hits(names[0], "0.9")[0].mean() != hits(names[0], "0.3")[0].mean()
    capsys.readouterr()
    # without --rules, the rules that both folders have
    code, rows = compare(tmp_path, "--minus", tmp_path / "other")
    assert code == 0 and {row["rule"] for row in rows} == {"half", "absolute", "rescaled"}
    assert compare(tmp_path, "--minus", tmp_path / "other", "--rules", "half", 0.9)[0] == 2
    assert "have no rule '0.9', only half, absolute, rescaled; train with --fractions" in capsys.readouterr().err
    assert run(data, tmp_path / "runs", *given, "--fractions", 0.3, 0.9, 0.9) == 0  # the same fractions
    assert run(data, tmp_path / "runs", *given, "--fractions", 0.9) == 2
    assert "was made with another --fractions; choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(data, tmp_path / "runs", *given, "--fractions", 1)
    assert "--fractions: expected above 0 and below 1, got 1" in capsys.readouterr().err


def test_runs_that_do_not_belong_together_are_errors(two_methods, tmp_path, capsys):
    folder, bag, _ = two_methods
    for name, values, message in (
        ("heads", {"heads": 5}, "another --heads than the other runs"),
        ("validate", {"validate": [0]}, "another --validate than the other runs"),
        ("tuned", {"tuned": {"blocks": 1, "epochs": 1, "lr": 1e-4}}, "another --tune than the other runs"),
        ("method", {"method": "old method"}, "has an unknown method: 'old method'"),
    ):
        changed(folder / "runs", f"{bag}-seed0", tmp_path / name / "a.json")
        changed(folder / "runs", f"{bag}-seed1", tmp_path / name / "b.json", **values)
        table = ["table", "--runs", str(tmp_path / name), "--out", str(tmp_path / "films.csv")]
        assert example.main(table) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "heads" / "b.json").write_text('{"backbone": "a"}')
    assert example.main(["table", "--runs", str(tmp_path / "heads"), "--out", str(tmp_path / "films.csv")]) == 2
    assert "b.json is not a run of frozen_cxr.py train" in capsys.readouterr().err


def test_sgl_is_compared_with_its_own_bag_loss():
    pairs = usual_pairs([*METHODS])
    assert ("mean sgl 3 mask 1", "mean bag") in pairs and ("top 30 % sgl 1", "top 30 % bag") in pairs
    assert len(set(pairs)) == len(pairs) and {METHODS[first].loss for first, _ in pairs} == {"sgl"}
    assert usual_pairs(["mmm", "mean bag"]) == []


def test_table_of_validation_runs_has_no_boxes_of_the_test_list(data, tmp_path):
    assert run(data, tmp_path / "runs", "--seeds", 0, "--methods", "softmax sgl 20 at once", "--validate") == 0
    (path,) = (tmp_path / "runs").glob("*.json")
    result = json.loads(path.read_text())
    assert set(result["boxes"]) == {"det10"} and result["lam_started_in_epoch"] == [None]
    assert example.main(["table", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "films.csv")]) == 0
    with (tmp_path / "films.csv").open() as file:
        assert {row["boxes"] for row in csv.DictReader(file)} == {"det10"}
    assert run(data, tmp_path / "runs", "--methods", "none") == 2


def test_components_are_computed_from_the_training_list(data):
    films = read_films(data / "data", None, None, data / "features")
    changed = np.array(films.features)
    changed[films.test] = 7.0
    cells, others = (reduce_features(f, 12)[0] for f in (films, films._replace(features=changed)))
    kept = torch.from_numpy(~films.test)
    torch.testing.assert_close(cells[kept] / cells[kept].std(), others[kept] / others[kept].std(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["attention bag", "gated sgl 3 mask 1"])
def test_attention_is_trained_with_the_head(data, name):
    """The attention reads the hidden layer, and its weights change in training."""
    films = read_films(data / "data", None, data / "det10.csv", data / "features")
    cells, _ = reduce_features(films, 12)
    ((numbers, test),) = films.splits()
    method = dataclasses.replace(METHODS[name], weight_decay=0.0)
    _, untrained, _ = train_head(cells, films, numbers, method, 0, epochs=1, batch_size=len(numbers) + 1)
    head, pooling, _ = train_head(cells, films, numbers, method, 0, epochs=1, batch_size=16)
    assert pooling.tanh_layer.in_features == METHODS[name].hidden
    assert (pooling.gate_layer is not None) == name.startswith("gated")
    for before, after in zip(untrained.parameters(), pooling.parameters(), strict=True):
        assert before.numel() == 1 or not torch.equal(before, after)  # the bias of the score has no effect
    result = evaluate(films, [predict(head, pooling, cells, films, test)])
    assert 0 <= result["auc"] <= 1 and set(result["boxes"]) >= {"det10"}


def test_grad_cam_of_a_linear_head_is_its_class_activation_map():
    """The weights of the features are those of the head, so the map is proportional to the logits without bias."""
    torch.manual_seed(0)
    head, cells = Head(6, 0, 3), torch.randn(4, 20, 6)
    maps = grad_cam(head, make_pooling("mean_logits"), cells)
    expected = (cells @ head.last.weight.T).transpose(1, 2).clamp(min=0).detach()
    torch.testing.assert_close(maps, expected / expected.amax(2, keepdim=True))
    assert (maps == 0).any() and (maps.amax(2) == 1).all()


def test_grad_cam_of_a_batch_is_that_of_each_image_and_class():
    torch.manual_seed(0)
    head, cells = Head(6, 8, 3).eval(), torch.randn(4, 20, 6)
    pooling = make_pooling("mean")
    maps = grad_cam(head, pooling, cells)
    for image in range(4):
        for kind in range(3):
            own = cells[image : image + 1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(pooling(head(own)[0].transpose(1, 2))[0, kind], own)
            expected = (cells[image] @ gradient[0].mean(0)).clamp(min=0)
            torch.testing.assert_close(maps[image, kind], expected / expected.max().clamp(min=1e-12))
    assert (grad_cam(head, pooling, torch.zeros(1, 20, 6)) == 0).all()


def test_interval_is_over_patients():
    """Forty values of two patients give the interval of two values."""
    values, patients = np.repeat([0.0, 1.0], 20), np.repeat([1, 2], 20)
    assert interval_over_patients(values, patients) == (0.0, 1.0)
    low, high = interval_over_patients(values, np.arange(40))
    assert 0.3 < low < 0.4 and 0.6 < high < 0.7


def test_extraction_writes_the_features(data, tmp_path):
    timm = imported_timm()
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((data / "data").rglob("*.png"))[:3]:
        (images / path.name).write_bytes(path.read_bytes())
    options = ["--data-dir", str(images), "--weights", str(tmp_path / "weights.pth"), "--image-size", "96"]
    assert example.main(["extract", *options, "--out", str(tmp_path / "out")]) == 0
    features = np.load(tmp_path / "out" / "features.npy")
    assert features.shape == (3, 320 + 112, 3, 3) and features.dtype == np.float16
    assert (tmp_path / "out" / "names.txt").read_text().split() == sorted(p.name for p in images.iterdir())
    before = np.load(tmp_path / "out" / "before.npy")
    assert before.shape == (3, 192, 3, 3)
    blocks = load_blocks("timm/tf_efficientnet_lite0", str(tmp_path / "weights.pth"), BLOCKS)
    with torch.no_grad():
        found = blocks(torch.from_numpy(before.astype(np.float32))).numpy()
    np.testing.assert_allclose(found, features[:, :320], rtol=0.01, atol=0.01 * np.abs(found).mean())
    assert example.main(["extract", *options, "--mirror", "--out", str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "features.npy"), features)
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for path in images.iterdir():
        with Image.open(path) as image:
            ImageOps.mirror(image).save(mirrored / path.name)
    options_of_mirrored = ["--data-dir", str(mirrored), *options[2:], "--out", str(tmp_path / "separate")]
    assert example.main(["extract", *options_of_mirrored]) == 0
    for name in ("features.npy", "before.npy"):
        expected = np.load(tmp_path / "separate" / name)
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"mirrored_{name}"), expected)
    two = ["--stages", "blocks.2", "blocks.1", "--image-size", "96", "144"]
    assert example.main(["extract", *options, *two, "--out", str(tmp_path / "out")]) == 0
    assert np.load(tmp_path / "out" / "features.npy").shape == (3, 2 * (40 + 24), 12, 12)
    assert {path.name for path in (tmp_path / "out").glob("*.npy")} == {"features.npy"}
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert 0 < settings["first"] < 1 and settings["image_size"] == [96, 144]
    assert example.main(["extract", *options, "--image-size", "96", "144", "--out", str(tmp_path / "other")]) == 2
    torch.save({}, tmp_path / "weights.pth")
    assert example.main(["extract", *options, "--out", str(tmp_path / "other")]) == 2


@pytest.fixture(scope="module")
def tunable(data, tmp_path_factory):
    """Features of the films of ``data`` by the pretrained blocks, with their input and their weights."""
    timm = imported_timm()
    folder = tmp_path_factory.mktemp("tunable")
    torch.manual_seed(0)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), folder / "weights.pth")
    names = (data / "features" / "names.txt").read_text()
    (folder / "names.txt").write_text(names)
    before = np.random.default_rng(1).normal(size=(len(names.split()), 192, 4, 4)).astype(np.float16)
    np.save(folder / "before.npy", before)
    blocks = load_blocks("timm/tf_efficientnet_lite0", str(folder / "weights.pth"), BLOCKS)
    with torch.no_grad():
        maps = blocks(torch.from_numpy(before.astype(np.float32)))
    others = torch.randn(len(before), 8, 4, 4)
    np.save(folder / "features.npy", torch.cat([maps, others], 1).numpy().astype(np.float16))
    return folder


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tuning_trains_the_head_and_the_chosen_blocks(data, tunable, count):
    films = read_films(data / "data", None, None, tunable)
    cells, transform = reduce_features(films, 20)
    weights = str(tunable / "weights.pth")
    tuning = Tuning(films, tunable, transform, "timm/tf_efficientnet_lite0", weights, count)
    ((numbers, test),) = films.splits()
    method = METHODS["softmax sgl 3 mask 1"]
    head, pooling, started = train_head(cells, films, numbers, method, 0, epochs=1)
    begun = [p.clone() for p in head.parameters()]
    blocks = tune(tuning, head, pooling, films, numbers, method, started, 0, epochs=1, lr=0.0)
    shown = with_tuned(cells, tuning, blocks, test)
    torch.testing.assert_close(shown, cells, rtol=0.02, atol=0.02)  # half precision of the stored features
    assert torch.equal(shown[numbers], cells[numbers])
    tuned = tune(tuning, head, pooling, films, numbers, method, started, 0, epochs=1, lr=1e-3)
    assert all(not torch.equal(a, b) for a, b in zip(begun, head.parameters(), strict=True))
    state, changed = tuning.blocks.state_dict(), tuned.state_dict()
    assert len([name for name in state if name.endswith("conv_pw.weight")]) == count
    for name, value in state.items():
        assert torch.equal(value, changed[name]) == ("running" in name or "num_batches" in name), name
    assert count == 0 or not torch.equal(with_tuned(cells, tuning, tuned, test)[test], shown[test])


def test_tuning_uses_the_mirrored_images_and_the_cells_inside_of_the_margin(data, tunable, tmp_path):
    for name in ("names.txt", "features.npy", "before.npy"):
        (tmp_path / name).write_bytes((tunable / name).read_bytes())
    np.save(tmp_path / "mirrored_features.npy", np.load(tunable / "features.npy"))
    films = read_films(data / "data", None, None, tmp_path, mirrored=True, margin=0.25)
    cells, transform = reduce_features(films, 20)
    given = (films, tmp_path, transform, "timm/tf_efficientnet_lite0", str(tunable / "weights.pth"), 1)
    with pytest.raises(ValueError, match=r"holds no mirrored_before.npy; frozen_cxr.py extract --mirror without --st"):
        Tuning(*given)
    np.save(tmp_path / "mirrored_before.npy", np.load(tunable / "before.npy"))
    tuning = Tuning(*given)
    last = len(films.labels) - 1
    found = tuning.cells(tuning.blocks, torch.tensor([0, last]))
    assert found.shape[1] == films.inside.sum() < 16
    torch.testing.assert_close(found, cells[[0, last]], rtol=0.02, atol=0.02)


@pytest.mark.examples
def test_tuned_runs_have_the_files_of_frozen_ones(data, tunable, tmp_path, capsys):
    weights = ["--weights", tunable / "weights.pth"]
    given = ["train", "--data-dir", data / "data", "--features", tunable, "--components", 20, "--seeds", 0]
    given += ["--methods", "softmax bag", "--out", tmp_path / "runs", "--tune", 1, "--tune-epochs", 1]
    assert example.main([str(o) for o in (*given, *weights)]) == 0
    run = json.loads((tmp_path / "runs" / "softmax bag-seed0.json").read_text())
    assert run["tuned"] == {"blocks": 1, "epochs": 1, "lr": 1e-4} and 0 <= run["auc"] <= 1
    assert example.main(["table", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "films.csv")]) == 0
    with pytest.raises(SystemExit):
        example.main([str(o) for o in given])
    assert "--weights" in capsys.readouterr().err
    given[4] = data / "features"
    given[given.index(tmp_path / "runs")] = tmp_path / "other"
    assert example.main([str(o) for o in (*given, *weights)]) == 2
    assert "before.npy" in capsys.readouterr().err


def test_every_method_has_a_loss_and_a_pooling():
    assert len(METHODS) == 24
    for name, method in METHODS.items():
        assert method.loss in LOSSES and method.pooling in (*POOLINGS, "attention", "gated"), name
        assert (method.lam > 0) == (method.loss == "sgl"), name
