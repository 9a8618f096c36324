"""examples/reproduce_figures.py: its runs, table of runs, means and figures."""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest
import reproduce_figures as figures
import torch
from bags import figure_tables, plots, run_table
from bags.instances import load_instances
from common import workers

TINY = [
    "--figure", "5a", "--data", "digits", "--sizes", "6", "--bags", "8", "12", "--epochs", "1", "--workers", "1",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def threads_kept():
    """Restores the number of threads, which a run in this process changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_this_process(threads_kept, monkeypatch):
    """Computes the runs without workers, which import torch. test_runs_are_computed_once_and_averaged has them."""

    def compute_here(compute, runs, workers, *given):
        return ((run, compute(run, *given)) for run in runs)

    monkeypatch.setattr(workers, "compute_in_workers", compute_here)


def test_settings_are_those_of_the_paper():
    args = figures.parse_arguments(["--figure", "4"])
    assert (args.sizes, args.bags[0], args.bags[-1], args.seeds, args.epochs) == ([10, 50, 100], 50, 500, 10, 300)
    assert args.methods == ["sgl", "max", "mean", "mmm", "bil", "topk"]
    assert figures.parse_arguments(["--figure", "5a"]).methods == ["max", "sgl_plain", "sgl_rescaled", "sgl"]
    options = {}
    for method in figures.METHODS:
        config = figures.config_of(figures.Run(method, 50, 100, 3), args)
        assert (config["bag_size"], config["bags"], config["lr"], config["epochs"]) == (50, 100, 1e-4, 300)
        options[method] = [config[name] for name in ("loss", "pooling", "rescale", "weighted")]
    assert options == {
        "sgl": ["sgl", "max", True, True],
        "max": ["bag", "max", True, True],
        "mean": ["bag", "mean_logits", True, True],
        "mmm": ["mmm", "max", True, True],
        "bil": ["bil", "mean_logits", True, True],
        "sgl_plain": ["sgl", "max", False, False],
        "sgl_rescaled": ["sgl", "max", True, False],
        "topk": ["bag", "topk", True, True],
        "falling_k": ["bag", "topk", True, True],
        "sgl_falling_k": ["sgl", "topk", True, True],
        "mmm_authors": ["mmm_authors", "max", True, True],
        "bil_authors": ["bil_authors", "mean_logits", True, True],
    }


def test_start_falls_from_half_of_the_bag_to_one_instance():
    args = figures.parse_arguments(["--figure", "start"])
    assert args.methods == ["max", "sgl", "topk", "falling_k", "sgl_falling_k"]
    starts = {}
    for method in args.methods:
        config = figures.config_of(figures.Run(method, 100, 50, 0), args)
        starts[method] = tuple(config[name] for name in ("k", "k_start", "k_epochs"))
    assert starts == dict.fromkeys(("max", "sgl", "topk"), (8, 0.0, 0.0)) | dict.fromkeys(
        ("falling_k", "sgl_falling_k"), (1, 0.5, 150.0)
    )


def test_queue_computes_seed_0_and_cheap_runs_first():
    runs = figures.queue()
    assert len(set(runs)) == len(runs)
    wanted = {
        figures.Run(method, size, bags, seed)
        for figure, sizes in (("4", (10, 50, 100)), ("5a", (50,)))
        for method in figures.FIGURES[figure]
        for size in sizes
        for bags in (50, 100, 150, 200, 300, 400, 500)
        for seed in range(3)
    }
    assert wanted <= set(runs)
    assert {run.seed for run in runs if (run.size, run.bags, run.method) == (10, 50, "bil")} == set(range(10))
    assert [run.name for run in runs[:4]] == [
        "size50_bags100_mmm_authors_seed0", "size50_bags100_bil_authors_seed0", "size10_bags50_sgl_seed0",
        "size10_bags50_max_seed0",
    ]  # fmt: skip
    position = {run: number for number, run in enumerate(runs)}
    last_of_first = max(position[run] for run in wanted if run.method in ("sgl", "max") and run.seed == 0)
    assert all(position[run] > last_of_first for run in wanted if run.method in ("mean", "sgl_plain") or run.seed)
    last_of_second = max(position[run] for run in wanted if run.seed == 0)
    assert all(position[run] > last_of_second for run in wanted if run.seed)


@pytest.mark.examples
def test_runs_are_computed_once_and_averaged(tmp_path, capfd):
    arguments = [*TINY, "--seeds", "2", "--methods", "max", "sgl", "--out", str(tmp_path)]
    assert figures.main(arguments) == 0
    assert "8 runs, 8 of them to compute" in capfd.readouterr().out
    runs = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("size*.json")}
    assert len(runs) == 8
    assert not list(tmp_path.glob("*.pt"))
    with (tmp_path / "figure5a.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["bags"], row["method"]) == ("12", "sgl")]
    values = [runs[f"size6_bags12_sgl_seed{seed}"]["result"]["last"]["auc"] for seed in (0, 1)]
    assert float(row["auc"]) == pytest.approx(sum(values) / 2, abs=1e-4)
    assert float(row["auc_worst"]) == pytest.approx(min(values), abs=1e-4)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / f"figure5a.{kind}").read_bytes().startswith(start)
    points = (tmp_path / "figure5a.md").read_text().split("\n\n")[0]
    assert points.count("\n") == 1 + 4

    (tmp_path / "size6_bags8_max_seed1.json").unlink()
    assert figures.main(arguments) == 0
    assert "8 runs, 1 of them to compute" in capfd.readouterr().out
    again = json.loads((tmp_path / "size6_bags8_max_seed1.json").read_text())
    assert again["result"] == runs["size6_bags8_max_seed1"]["result"]

    (tmp_path / "size6_bags8_max_seed1.json").unlink()
    assert figures.main([*arguments, "--epochs", "2"]) == 2  # the files have other settings
    assert not (tmp_path / "size6_bags8_max_seed1.json").exists()
    assert "{'epochs': '1'}, not {'epochs': '2'}" in capfd.readouterr().err


@pytest.mark.examples
@pytest.mark.usefixtures("in_this_process")
def test_table_replaces_the_files(tmp_path, capfd):
    arguments = [*TINY, "--seeds", "2", "--methods", "max", "sgl", "--bags", "8"]
    runs, results = tmp_path / "runs", tmp_path / "results"
    assert figures.main([*arguments, "--out", str(runs)]) == 0
    drawn = (runs / "figure5a.csv").read_text()
    capfd.readouterr()
    command = [*arguments, "--out", str(results), "--collect", str(runs), "--draw-only"]
    assert figures.main(command) == 0
    assert not list(results.glob("size*.json"))
    assert (results / "figure5a.csv").read_text() == drawn
    table = (results / "runs.csv").read_text()
    assert table.count("\n") == 1 + 4
    with (results / "runs.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if (row["method"], row["seed"]) == ("sgl", "1")]
    content = json.loads((runs / "size6_bags8_sgl_seed1.json").read_text())
    assert float(row["auc"]) == pytest.approx(content["result"]["last"]["auc"], abs=1e-6)
    assert (row["bag_size"], row["lam"], row["rescale"]) == ("6.0", "1.0", "true")
    assert all(row[name] == str(content[name]) for name in ("commit", "machine", "seconds", "cpu_seconds", "command"))
    assert run_table.run_of_row(row)["training_loss"] == content["training_loss"]

    # the same runs add no rows; runs in the table are not computed again; other settings give other rows
    assert figures.main(command) == 0
    assert (results / "runs.csv").read_text() == table
    capfd.readouterr()
    assert figures.main([*arguments, "--out", str(results)]) == 0
    assert "4 runs, 0 of them to compute" in capfd.readouterr().out
    assert figures.main([*arguments, "--out", str(results), "--epochs", "2"]) == 0
    assert "4 runs, 4 of them to compute" in capfd.readouterr().out


def test_a_row_without_k_is_a_run_without_a_start():
    older = {"method": "topk", "seed": "0", "loss": "bag", "pooling": "topk", "k": "", "auc": "0.5"}
    now = older | {"k": "8", "k_start": "0.0", "k_epochs": "0.0"}
    assert run_table.settings_of(older) == run_table.settings_of(now)
    start = now | {"k_start": "0.5", "k_epochs": "150.0"}
    assert len(run_table.merged([older], [now, start])) == 2


@pytest.mark.examples
@pytest.mark.usefixtures("in_this_process")
def test_points_without_a_run_are_named(tmp_path):
    arguments = [*TINY, "--seeds", "1", "--methods", "max", "sgl"]
    assert figures.main([*arguments, "--bags", "8", "--out", str(tmp_path / "runs")]) == 0
    table = ["--draw-only", "--table", str(tmp_path / "table.csv"), "--collect", str(tmp_path / "runs")]
    assert figures.main([*arguments, *table, "--bags", "8", "12", "16", "--out", str(tmp_path / "new")]) == 0
    lines = (tmp_path / "new" / "figure5a.md").read_text().splitlines()
    assert lines[-5:] == [
        "", "## Not computed (training bags)", "", "- bags of 6, max pooling: 12, 16",
        "- bags of 6, + weighting (SGL): 12, 16",
    ]  # fmt: skip


def made(**auc_and_iou_of_runs):
    """Runs "METHOD_SEED" of 50 bags of 10 with a given AUC and IoU, and a training loss of 0.25 with seed 0."""
    found = {}
    for name, (auc, iou) in auc_and_iou_of_runs.items():
        method, seed = name.rsplit("_", 1)
        last = {"auc": auc, "iou": iou, "iou_pooled": iou + 0.1}
        found[figures.Run(method, 10, 50, int(seed))] = {"result": {"last": last}} | (
            {"training_loss": 0.25} if seed == "0" else {}
        )
    return found


def test_failed_runs_and_differences_are_listed(tmp_path):
    found = made(sgl_0=(0.9, 0.5), sgl_1=(0.69, 0.1), sgl_2=(0.8, 0.4), max_0=(0.7, 0.3), max_1=(0.5, 0.1))
    args = figures.parse_arguments(["--figure", "4", "--sizes", "10", "--bags", "50", "--out", str(tmp_path)])
    figure_tables.write_tables(found, args)
    sections = (tmp_path / "figure4.md").read_text().split("\n\n")
    titles = [text for text in sections if text.startswith("#")]
    assert titles == ["## Failed runs", "## SGL minus the other losses", "## Not computed (training bags)"]
    assert "below 0.7.\nThe losses were not run at the same points.\nThe training loss of some" in sections[2]
    assert sections[3].splitlines()[2:] == ["| SGL | 1 | 3 |", "| max pooling | 1 | 2 |"]
    assert sections[4].splitlines()[2:] == [
        "| SGL | 10 | 50 | 1 | 0.690 | 0.100 |  |", "| max pooling | 10 | 50 | 1 | 0.500 | 0.100 |  |",
    ]  # fmt: skip
    # seed 2 of SGL has no counterpart
    assert sections[7].splitlines()[2:] == [
        "| 10 | 50 | max pooling | 2 | +0.195, 2 / 0 / 0 | +0.100, 1 / 1 / 0 | +0.100, 1 / 1 / 0 |"
    ]
    figure_tables.write_tables(made(sgl_0=(0.6, 0.0)), args)
    text = (tmp_path / "figure4.md").read_text()
    assert "| SGL | 10 | 50 | 0 | 0.600 | 0.000 | 0.250 |" in text and "not recorded" not in text
    figure_tables.write_tables(made(sgl_0=(0.6, 0.0), sgl_1=(0.9, 0.5)), args)
    assert "not recorded" not in (tmp_path / "figure4.md").read_text()  # only of a run that did not fail
    figure_tables.write_tables(made(max_0=(0.9, 0.5)), args)
    assert "## Failed" not in (text := (tmp_path / "figure4.md").read_text()) and "minus" not in text


@pytest.mark.examples
@pytest.mark.usefixtures("in_this_process")
def test_table_keeps_the_data_of_figure_5b(tmp_path, monkeypatch):
    monkeypatch.setitem(figures.DEFAULTS_OF["5b"], "bags", [8])
    monkeypatch.setitem(figures.DEFAULTS_OF["5b"], "sizes", [6])
    monkeypatch.setitem(figures.DEFAULTS_OF["5b"], "epochs", 1)
    drawn = []
    monkeypatch.setattr(plots, "draw_bags", lambda panels, *rest, **more: drawn.append(panels))
    arguments = ["--figure", "5b", "--data", "digits", "--device", "cpu"]
    assert figures.main([*arguments, "--workers", "1", "--out", str(tmp_path / "runs")]) == 0
    results = ["--out", str(tmp_path / "results"), "--draw-only"]
    assert figures.main([*arguments, *results, "--collect", str(tmp_path / "runs")]) == 0
    # the data lie beside the table, also if the figure is drawn into another folder
    other = ["--out", str(tmp_path / "other"), "--draw-only", "--table", str(tmp_path / "results" / "runs.csv")]
    assert figures.main([*arguments, *other]) == 0
    for panels in (drawn[2], drawn[-1]):
        for before, after in zip(drawn[0], panels, strict=True):
            assert before[1].tolist() == after[1].tolist() and before[3] == after[3]


def test_file_that_is_no_table_is_an_error(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    assert figures.main([*TINY, "--out", str(tmp_path), "--draw-only"]) == 2
    assert "has no column method, seed, auc" in capsys.readouterr().err


@pytest.mark.usefixtures("threads_kept")
def test_interrupted_run_continues(tmp_path, monkeypatch):
    arguments = figures.parse_arguments([*TINY, "--epochs", "3", "--out", str(tmp_path)])
    run = figures.Run("sgl", 6, 8, 0)
    whole = json.loads(figures.compute(run, arguments).read_text())
    (tmp_path / f"{run.name}.json").unlink()
    from bags import training

    epochs = []

    def interrupted(*given, train_epoch=training.train_epoch):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return train_epoch(*given)

    monkeypatch.setattr(figures, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            figures.compute(run, arguments)
    assert list(tmp_path.glob("*.pt"))
    (checkpoint,) = tmp_path.glob("*.pt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["seconds"] > 0
    torch.save(state | {"seconds": 1000.0}, checkpoint)
    epochs.clear()

    def counted(*given, train_epoch=training.train_epoch):
        epochs.append(1)
        return train_epoch(*given)

    monkeypatch.setattr(training, "train_epoch", counted)
    content = json.loads(figures.compute(run, arguments).read_text())
    assert content["result"] == whole["result"]
    assert content["training_loss"] == whole["training_loss"] > 0
    assert 1000 <= content["seconds"] < 1100  # including the time before the interruption
    assert len(epochs) == 1


@pytest.mark.examples
@pytest.mark.usefixtures("in_this_process")
def test_figure_5b_shows_the_data_of_the_runs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw_bags", lambda panels, *rest, **more: drawn.extend(panels))
    arguments = ["--figure", "5b", "--data", "digits", "--sizes", "6", "--bags", "8", "--epochs", "1", "--workers", "1"]
    assert figures.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "size6_bags8_sgl_seed0.json").read_text())["shown"]
    assert [any(bag["positive"]) for bag in kept] == [True, True, True, False]
    assert len(drawn) == 2 * 2 * len(kept)  # two methods, PNG and SVG
    for bag, (pictures, probability, positive, title) in zip(kept, drawn[1::2], strict=False):
        assert pictures.shape == (6, 32, 32)
        assert probability.tolist() == bag["probability"]
        assert positive.tolist() == [bool(p) for p in bag["positive"]]
        assert title.startswith(f"SGL, test bag {bag['number']}: ")
        # each picture belongs to its probability: pictures of the target class are those marked as positive
        classes = load_instances("digits", "").test_classes[bag["index"]]
        assert ((classes == 9) == positive).all()


@pytest.mark.examples
@pytest.mark.usefixtures("in_this_process")
def test_figure_6_varies_the_number_of_positives(tmp_path):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    arguments = [
        "--figure", "6", "--data", "digits", "--sizes", "4", "--bags", "4", "--positives", "1", "3", "--seeds", "1",
        "--epochs", "1", "--workers", "1", "--device", "cpu", "--methods", "sgl", "--out", str(tmp_path),
        "--options", "--stem", "imagenet", "--test-bags", "6", "--val-bags", "4",
    ]  # fmt: skip
    assert figures.main(arguments) == 0
    for positives in (1, 3):
        content = json.loads((tmp_path / f"size4_positives{positives}_bags4_sgl_seed0.json").read_text())
        config = content["config"]
        assert [config[n] for n in ("positives", "target", "stem", "test_bags")] == [positives, 5, "imagenet", 6]
        assert {sum(bag["positive"]) for bag in content["shown"]} == {0, positives}
        assert content["command"].startswith("python train_cifar10_bags.py --data digits --data-dir DIR")
    with (tmp_path / "figure6.csv").open() as file:
        assert [row["positives"] for row in csv.DictReader(file)] == ["1", "3"]
    # without the options of the training, the settings of the runs differ from those of the figure
    assert figures.main([*arguments[: arguments.index("--options")], "--draw-only"]) == 2


@pytest.mark.parametrize("figure", figures.FIGURES)
def test_quick_computes_a_part_of_the_figure(figure):
    quick, full = (figures.parse_arguments(["--figure", figure, *more]) for more in (["--quick"], []))
    assert quick.methods == full.methods
    assert quick.epochs * max(quick.bags) * max(quick.sizes) <= 60 * 150 * 50
    assert quick.out != full.out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--figure", "6", "--positives", "0"],
        ["--figure", "6", "--positives", "0", "5"],
        ["--figure", "4", "--positives", "2"],
        ["--figure", "6", "--bags", "100", "200"],
        ["--figure", "4", "--options", "--loss", "mmm"],
        ["--figure", "4", "--options", "--data=x.npz"],
    ],
)
def test_options_that_contradict_the_figure_are_errors(wrong):
    with pytest.raises(SystemExit):
        figures.parse_arguments(wrong)


def test_missing_runs_and_missing_data_are_errors(tmp_path, capsys):
    assert figures.main([*TINY, "--out", str(tmp_path), "--draw-only"]) == 2
    assert "no run of figure 5a" in capsys.readouterr().err
    assert figures.main([*TINY, "--out", str(tmp_path), "--data", "nothing.npz"]) == 2
    assert "nothing.npz" in capsys.readouterr().err


def test_stored_command_has_no_data_folder():
    assert figures.without_paths(["--data", "/home/me/x.npz", "--data-dir", "/home/me", "--bags", "5"]) == [
        "--data", "x.npz", "--data-dir", "DIR", "--bags", "5",
    ]  # fmt: skip
