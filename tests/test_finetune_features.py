"""examples/finetune_features.py, and predictions of fine-tuned runs."""

from __future__ import annotations

import json
import shutil

import compare_features
import extract_features
import feature_packages  # noqa: F401
import finetune_features
import numpy as np
import predict_features
import pytest
import torch
import train_features
from csv_files import read, write
from features import finetuning, runs, store
from features.opened_run import open_run


@pytest.fixture(scope="module")
def trained(timm, tmp_path_factory):
    """Features of six images before and after the last block of a stage, and a run of train_features.py on them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("trained")
    (folder / "photos").mkdir()
    for k in range(6):
        array = np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(array).save(folder / "photos" / f"p{k}.png")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", zero_init_last=False)  # otherwise new blocks are the identity
    torch.save(network.state_dict(), folder / "weights.pt")
    rows = [[f"p{k}", k % 2, ("train", "test")[k // 4]] for k in range(6)]
    labels = write(folder / "labels.csv", ["bag", "red", "split"], rows)
    boxes = write(folder / "boxes.csv", ["image", "label", "x", "y", "w", "h"], [["p5", "red", 5, 6, 25, 36]])
    common = ["--images", str(folder / "photos"), "--backbone", "timm/resnet18", "--weights", f"{folder}/weights.pt"]
    for out, stages in (("before", ["layer1.0"]), ("start", ["maxpool"]), ("features", ["layer1", "maxpool"])):
        assert extract_features.main([*common, "--stages", *stages, "--out", str(folder / out)]) == 0
    command = ["--features", str(folder / "features"), "--labels", str(labels), "--boxes", str(boxes), "--overlays=1"]
    command += ["--epochs=2", "--repeats=2", "--out", str(folder / "run")]
    assert train_features.main(command) == 0
    return folder


def finetune(folder, out, *options):
    command = ["--run", str(folder / "run"), "--before", str(folder / "before"), "--weights", f"{folder}/weights.pt"]
    return finetune_features.main([*command, "--out", str(out), "--overlays=1", "--epochs=1", *options])


BLOCK = ("--blocks", "layer1.1")


def test_a_fine_tuned_run_keeps_the_threshold_and_continues_one_without_a_margin(trained, tmp_path):
    """The base run is first one of a version without --margin and --threshold, then it is resumed by this version."""
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder)
    path = folder / "run" / "settings.json"
    settings = json.loads(path.read_text())
    older = {name: value for name, value in settings.items() if name not in ("margin", "threshold")}
    path.write_text(json.dumps(older))
    assert finetune(folder, tmp_path / "tuned", *BLOCK, "--lr=0") == 0
    assert open_run(tmp_path / "tuned").truth.threshold == 0.5
    path.write_text(json.dumps(settings | {"threshold": "0.2max"}))
    assert finetune(folder, tmp_path / "tuned", *BLOCK, "--lr=0", "--resume") == 0
    assert repr(open_run(tmp_path / "tuned").truth.threshold) == "0.2max"


def test_blocks_without_training_give_the_predictions_of_the_stored_features(trained, tmp_path):
    assert finetune(trained, tmp_path, *BLOCK, "--lr=0", "--batch-size=2") == 0
    for name in ("repeat0_fold0.npz", "repeat1_fold0.npz"):
        own, frozen = (runs.load_predictions(folder / "parts" / name) for folder in (tmp_path, trained / "run"))
        assert own.names.tolist() == frozen.names.tolist() == ["p4", "p5"]
        found, wanted = (np.log(p.instances / (1 - p.instances)) for p in (own, frozen))
        # half precision of the stored features
        np.testing.assert_allclose(found, wanted, atol=0.01)
        assert wanted.std() > 0.1


def test_fine_tuning_trains_blocks_and_head_but_not_the_statistics_of_batch_norm(trained, tmp_path):
    assert finetune(trained, tmp_path, *BLOCK, "--repeats=1") == 0
    start = torch.load(trained / "weights.pt", weights_only=True)
    own = torch.load(tmp_path / "parts" / "repeat0_fold0.pt", weights_only=True)["model"]
    head = torch.load(trained / "run" / "parts" / "repeat0_fold0.pt", weights_only=True)["model"]
    for name in ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.running_mean", "bn2.running_var"):
        equal = torch.equal(own[f"head.blocks.0.{name}"], start[f"layer1.1.{name}"])
        assert equal == ("running" in name), name
    assert not torch.equal(own["head.head.first.weight"], head["head.first.weight"])


def test_frozen_blocks_are_computed_and_not_trained(trained, tmp_path):
    assert finetune(trained, tmp_path / "one", *BLOCK, "--repeats=1") == 0
    options = ["--before", str(trained / "start"), "--blocks", "layer1.0", "layer1.1", "--freeze=1", "--repeats=1"]
    assert finetune(trained, tmp_path / "two", *options) == 0
    parts = [tmp_path / name / "parts" / "repeat0_fold0.pt" for name in ("one", "two")]
    one, two = (torch.load(path, weights_only=True)["model"] for path in parts)
    assert list(one) == list(two)
    for name, value in one.items():
        # the stored features have half precision
        torch.testing.assert_close(two[name], value, rtol=0.02, atol=0.002)


def test_head_alone_is_trained_further_if_all_blocks_are_frozen(trained, tmp_path):
    """Without a step, the predictions are those of the stored features. With steps, only the head changes."""
    still, moved = tmp_path / "still", tmp_path / "moved"
    assert finetune(trained, still, *BLOCK, "--freeze=1", "--lr=0") == 0
    assert finetune(trained, moved, *BLOCK, "--freeze=1", "--repeats=1") == 0
    known, own, other = (
        runs.load_predictions(out / "parts" / "repeat0_fold0.npz") for out in (trained / "run", still, moved)
    )
    np.testing.assert_allclose(own.instances, known.instances, atol=0.003)
    assert not np.array_equal(own.instances, other.instances)
    model = torch.load(moved / "parts" / "repeat0_fold0.pt", weights_only=True)["model"]
    assert not [key for key in model if "blocks" in key] and "head.head.first.weight" in model
    with pytest.raises(SystemExit):
        finetune(trained, tmp_path / "more", *BLOCK, "--freeze=2")


def test_fine_tuning_continues_and_writes_the_tables_of_train_features(trained, tmp_path, capsys):
    assert finetune(trained, tmp_path / "whole", *BLOCK) == 0
    out = tmp_path / "resumed"
    assert finetune(trained, out, *BLOCK, "--repeats=1") == 0
    assert finetune(trained, out, *BLOCK, "--resume") == 0
    assert "next: open" in capsys.readouterr().out
    for name in ("runs.csv", "bags.csv", "instances.csv", "metrics.json"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    columns = (out / "runs.csv").read_text().splitlines()
    assert columns[0] == (trained / "run" / "runs.csv").read_text().splitlines()[0] and len(columns) == 3
    assert finetune(trained, out, *BLOCK) == 2
    assert "pass --resume" in capsys.readouterr().err
    # compared with the run that it continues; it is not fine-tuned again
    assert compare_features.main(["--runs", str(out), str(trained / "run"), "--draws", "9"]) == 0
    assert "red    pointing " in capsys.readouterr().out
    assert finetune(trained, tmp_path / "again", *BLOCK, "--run", str(out)) == 2
    assert f"got {out} of finetune_features.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "layer1.0"], "expected that the blocks turn the features"),
        (["--blocks", "layer3.1"], "expected that the blocks turn the features"),
        (["--blocks", "layer9"], "stage: expected one of"),
        ([*BLOCK, "--run", "absent"], "run: expected a folder of train_features.py"),
    ],
)
def test_errors_of_fine_tuning(trained, tmp_path, capsys, options, message):
    assert finetune(trained, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_fine_tuning_continues_a_run_from_another_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    command = ["--features=features", "--labels=labels.csv", "--boxes=boxes.csv", "--overlays=1", "--epochs=1"]
    assert train_features.main([*command, "--out", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", "run") == 0


def test_fine_tuning_on_other_labels_than_those_of_the_run_is_an_error(trained, tmp_path, capsys):
    labels = shutil.copy(trained / "labels.csv", tmp_path / "labels.csv")
    command = ["--features", str(trained / "features"), "--labels", str(labels), "--overlays=1", "--epochs=1"]
    assert train_features.main([*command, "--out", str(tmp_path / "run")]) == 0
    labels.write_text(labels.read_text().replace("p5,1,test", "p5,1,train"))
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(tmp_path / "run")) == 2
    assert "run: made with another split" in capsys.readouterr().err


def test_fine_tuning_reads_one_file_per_bag(trained, tmp_path):
    common = ["--images", str(trained / "photos"), "--backbone=timm/resnet18", "--weights", f"{trained}/weights.pt"]
    given = [*common, "--stages", "layer1", "maxpool", "--format=h5", "--out", str(tmp_path / "features")]
    assert extract_features.main(given) == 0
    command = ["--features", str(tmp_path / "features"), "--labels", str(trained / "labels.csv"), "--overlays=1"]
    command += ["--boxes", str(trained / "boxes.csv"), "--epochs=2", "--repeats=2", "--out", str(tmp_path / "run")]
    assert train_features.main(command) == 0
    assert (tmp_path / "run" / "runs.csv").read_text() == (trained / "run" / "runs.csv").read_text()
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(tmp_path / "run")) == 0


@pytest.fixture(scope="module")
def tuned(trained, tmp_path_factory):
    """Fine-tuned runs: of one block, and of two blocks of which the first stays frozen."""
    folder = tmp_path_factory.mktemp("tuned")
    assert finetune(trained, folder / "one", *BLOCK) == 0
    options = ["--before", str(trained / "start"), "--blocks", "layer1.0", "layer1.1", "--freeze=1"]
    assert finetune(trained, folder / "two", *options) == 0
    for name in ("one", "two"):
        (folder / name / "failed.json").write_text("{}")  # noise teaches nothing
    return folder


def predict(trained, run, features, before, out, *options):
    command = ["--run", str(run), "--features", str(features), "--out", str(out), *options]
    return predict_features.main([*command, *(["--before", str(before)] if before else [])])


@pytest.mark.parametrize(("name", "before"), [("one", "before"), ("two", "start")])
def test_a_fine_tuned_run_predicts_its_test_bags_again(trained, tuned, tmp_path, name, before):
    run = tuned / name
    assert predict(trained, run, trained / "features", trained / before, tmp_path / "found") == 0
    parts = [runs.load_predictions(run / "parts" / f"repeat{k}_fold0.npz") for k in range(2)]
    found = {row["bag"]: float(row["red"]) for row in read(tmp_path / "found" / "bags.csv")}
    assert len(found) == 6
    np.testing.assert_allclose([found["p4"], found["p5"]], np.mean([p.bags[:, 0] for p in parts], 0), atol=1e-5)
    assert abs(parts[0].bags - parts[1].bags).max() > 1e-4
    cells = [float(row["red"]) for row in read(tmp_path / "found" / "instances.csv") if row["bag"] in ("p4", "p5")]
    wanted = np.mean([p.instances[:, 0] for p in parts], 0)
    np.testing.assert_allclose(cells, wanted, rtol=5.1e-4, atol=1e-5)  # the table has four digits


def test_a_fine_tuned_training_is_left_out_if_the_one_before_had_failed(trained, tmp_path, capsys):
    base = tmp_path / "run"
    shutil.copytree(trained / "run", base)
    reason = "bag loss 0.90, the median is 0.40"
    # missing labels are counted again: these are not missing here
    before = {"all classes": [reason], "red": ["trained without positive labels"]}
    (base / "failed.json").write_text(json.dumps({"repeat1_fold0": before}))
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(base)) == 0
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert failed == {"repeat1_fold0": {"all classes": [f"before fine-tuning: {reason}"]}}
    text = f"in 1 of 2 trainings: seed 1 (before fine-tuning: {reason}). Do not use"
    printed = capsys.readouterr().out
    assert text in printed and "To change this: train the run of --run again with other options" in printed
    assert predict(trained, tmp_path / "out", trained / "features", trained / "before", tmp_path / "found") == 0
    assert "one training of" in capsys.readouterr().out


def test_a_fine_tuned_run_does_not_need_the_run_that_it_continued(trained, tmp_path):
    """The settings of the first run are kept, although that folder then holds another run."""
    base = tmp_path / "run"
    shutil.copytree(trained / "run", base)
    (base / "failed.json").write_text("{}")
    options = [*BLOCK, "--run", str(base), "--repeats=9"]
    assert finetune(trained, tmp_path / "out", *options) == 0
    given = [trained, tmp_path / "out", trained / "features", trained / "before"]
    assert predict(*given, tmp_path / "one") == 0
    content = json.loads((base / "settings.json").read_text())
    changed = content | {"class_names": ["blue"], "pooling": "mean"}
    (base / "settings.json").write_text(json.dumps(changed))
    assert finetune(trained, tmp_path / "out", *options, "--resume") == 2
    shutil.rmtree(base)
    assert predict(*given, tmp_path / "two") == 0
    for name in ("bags.csv", "boxes.csv", "instances.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_fine_tuning_after_principal_components(trained, tmp_path):
    command = ["--features", str(trained / "features"), "--labels", str(trained / "labels.csv"), "--overlays=1"]
    command += ["--epochs=2", "--components=4", "--out", str(tmp_path / "run")]
    assert train_features.main(command) == 0
    assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(tmp_path / "run"), "--lr=0") == 0
    parts = [runs.load_predictions(tmp_path / name / "parts" / "repeat0_fold0.npz") for name in ("run", "out")]
    np.testing.assert_allclose(parts[0].instances, parts[1].instances, atol=0.01)


def copied(folder, out, change):
    """A copy of a folder of features with the features (L, D) changed: ``change(number, features)``."""
    bags = store.FeatureBags(folder)
    writer = store.StoreWriter(out, bags.settings)
    for number, name in enumerate(bags.names):
        bag = bags[name]
        writer.add(name, bag._replace(features=change(number, bag.features.copy())))
    return out


def test_features_of_other_images_are_errors(trained, tuned, tmp_path, capsys):
    """Each bag is compared, in fine-tuning and in prediction. Features that are not finite are errors, too."""

    def infinite(number, x):
        x[5, 5] = np.inf if number == 3 else x[5, 5]
        return x

    turned = copied(trained / "before", tmp_path / "turned", lambda number, x: x[::-1] if number == 3 else x)
    broken = copied(trained / "before", tmp_path / "broken", infinite)
    for before in (turned, broken):
        assert predict(trained, tuned / "one", trained / "features", before, tmp_path / "found") == 2
        assert "p3 differs: other blocks, other weights, or another image" in capsys.readouterr().err
        assert finetune(trained, tmp_path / "out", *BLOCK, "--before", str(before)) == 2
        assert "p3 differs: other blocks, other weights, or another image" in capsys.readouterr().err
    assert not (tmp_path / "found").exists() and not (tmp_path / "out").exists()

    # not finite in a stage beside the blocks
    def last(number, x):
        x[5, -1] = np.nan if number == 3 else x[5, -1]
        return x

    other = copied(trained / "features", tmp_path / "nan", last)
    assert predict(trained, tuned / "one", other, trained / "before", tmp_path / "found") == 2
    assert "p3: expected finite features" in capsys.readouterr().err


def test_features_that_cannot_be_fine_tuned_are_errors(trained, tmp_path, capsys):
    def message(features, before, *options):
        command = ["--features", str(features), "--labels", str(trained / "labels.csv"), "--overlays=0", "--epochs=1"]
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        assert train_features.main([*command, "--out", str(out)]) == 0
        assert finetune(trained, tmp_path / "out", *BLOCK, "--run", str(out), "--before", str(before), *options) == 2
        return capsys.readouterr().err

    bags = store.FeatureBags(trained / "features")
    (tmp_path / "clam").mkdir()
    for name in bags.names:
        torch.save(torch.from_numpy(bags[name].features), tmp_path / "clam" / f"{name}.pt")
    wanted = f"expected features of extract_features.py, got {tmp_path / 'clam'}"
    assert wanted in message(tmp_path / "clam", trained / "before")
    for name, settings, words in (
        ("symmetric", {"symmetric": True}, "expected features without --symmetric"),
        ("stride", {"output_stride": 8}, "expected the same --output-stride, got 8 in"),
        ("network", {"backbone": "timm/resnet34"}, "expected the same --backbone, got timm/resnet34 in"),
    ):
        writer = store.StoreWriter(tmp_path / name, bags.settings | settings)
        for bag in bags.names:
            writer.add(bag, bags[bag])
        assert words in message(tmp_path / name, trained / "before")
    with pytest.raises(ValueError, match="expected a convolutional network, got timm/test_vit"):
        finetuning.load_blocks("timm/test_vit", "none", ["blocks.1"], None)
    # one file per bag: a file is missing, or was made with other settings
    before = store.FeatureBags(trained / "before")
    for name, extra in (("fewer", []), ("mixed", ["p5"])):
        files = store.FileWriter(tmp_path / name, before.settings)
        for bag in [*before.names[:-1], *extra]:
            files.settings = before.settings | ({"scales": [2.0]} if bag == "p5" else {})
            files.add(bag, before[bag])
    assert "has no bag p5" in message(trained / "features", tmp_path / "fewer")
    assert "p5.h5: made with other settings" in message(trained / "features", tmp_path / "mixed")


def test_a_fine_tuned_run_predicts_images_of_other_sizes(trained, tuned, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "new").mkdir()
    for k, size in enumerate(((64, 48), (96, 80), (40, 100))):
        array = np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(array).save(tmp_path / "new" / f"n{k}.png")
    Image.open(trained / "photos" / "p5.png").save(tmp_path / "new" / "p5.png")
    common = ["--images", str(tmp_path / "new"), "--weights", f"{trained}/weights.pt"]
    assert extract_features.main([*common, "--like", str(tuned / "one"), "--out", str(tmp_path / "features")]) == 0
    printed = capsys.readouterr().out.splitlines()
    needed = ["--like", trained / "before", *common, "--out", "new_before"]
    assert printed[-3] == f"also needed: python extract_features.py {' '.join(map(str, needed))}"
    assert "--before new_before" in printed[-1]
    assert f"--run {tuned / 'one'} " in printed[-1]
    assert extract_features.main([*common, "--like", f"{trained}/before", "--out", str(tmp_path / "new_before")]) == 0
    given = [trained, tuned / "one", tmp_path / "features", tmp_path / "new_before", tmp_path / "found"]
    assert predict(*given, "--images", str(tmp_path / "new")) == 0
    found = {row["bag"]: float(row["red"]) for row in read(tmp_path / "found" / "bags.csv")}
    assert sorted(found) == ["n0", "n1", "n2", "p5"] and len(set(found.values())) == 4
    own = [runs.load_predictions(tuned / "one" / "parts" / f"repeat{k}_fold0.npz").bags[1, 0] for k in range(2)]
    assert found["p5"] == pytest.approx(np.mean(own), abs=1e-4)


def test_wrong_features_before_the_blocks_are_errors(trained, tuned, tmp_path, capsys):
    def message(run, before):
        assert predict(trained, run, trained / "features", before, tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    run = tuned / "one"
    assert f"which needs --before; extract_features.py --like {trained / 'before'} extracts" in message(run, None)
    assert "got {} of train_features.py".format(trained / "run") in message(trained / "run", trained / "before")
    assert f"before: {trained / 'start'} has stages ['maxpool'], and the features in" in message(run, trained / "start")
    settings = store.FeatureBags(trained / "before").settings
    first = store.FeatureBags(trained / "before")["p0"]
    small = store.Bag(np.zeros((6, 64)), None, (2, 3), (48, 64))
    for name, bag, words in (
        ("one", first, "has no bag p1"),
        ("small", small, "maps of one size"),
        ("size", first._replace(size=(47, 64)), "images of (47, 64) and (48, 64) pixels"),
    ):
        store.StoreWriter(tmp_path / name, settings).add("p0", bag)
        assert words in message(run, tmp_path / name)
    copy = tmp_path / "old"
    shutil.copytree(run, copy)
    content = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps({k: v for k, v in content.items() if k != "base"}))
    assert "was made by an older version; fine-tune again" in message(copy, trained / "before")
    (copy / "settings.json").write_text(json.dumps(content))
    (copy / "blocks.pt").unlink()
    assert f"is not finished ({copy / 'blocks.pt'} is missing)" in message(copy, trained / "before")


def test_fine_tuning_needs_images_of_one_size(tmp_path):
    writer = store.StoreWriter(tmp_path, {})
    for name, grid in (("a", (2, 3)), ("b", (3, 2))):
        writer.add(name, store.Bag(np.zeros((6, 4)), None, grid, None))
    bags = store.FeatureBags(tmp_path)
    with pytest.raises(ValueError, match="expected maps of one size"):
        finetuning.MapReader(bags, bags, ["a", "b"], 4, torch.nn.Identity())
