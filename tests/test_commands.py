"""Behaviour that all commands of the examples share: --help without torch, option groups, last line, full disks."""

from __future__ import annotations

import argparse
import ast
import errno
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from common import files, options, progress
from conftest import ROOT
from images import options as training_options

COMMANDS = sorted(path for path in (ROOT / "examples").glob("*.py"))
#: Modules that take a second or more to import.
SLOW = ("torch", "torchvision", "matplotlib", "scipy", "sklearn", "timm", "pandas")


@pytest.fixture(scope="module")
def help_of_commands() -> dict[str, tuple[int, str, list[str]]]:
    """For each command: exit status and text of --help, and the modules of SLOW that it imported."""
    code = """
import runpy, sys
command, *slow = sys.argv[1:]
sys.argv = [command, "--help"]
try:
    runpy.run_path(command, run_name="__main__")
finally:
    print(*(name for name in slow if name in sys.modules), file=sys.stderr)
"""
    given = {}
    for path in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), *SLOW],
            capture_output=True, text=True, env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(path.parent)},
        )  # fmt: skip
        given[path.name] = done.returncode, done.stdout, done.stderr.split()
    return given


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_imports_no_slow_module(help_of_commands, path):
    status, text, slow = help_of_commands[path.name]
    assert status == 0
    assert text.startswith("usage: ")
    assert slow == []


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_options_have_groups_and_help_texts(help_of_commands, path):
    _, text, _ = help_of_commands[path.name]
    parts = re.split(r"^(\S.*):\n", text, flags=re.M)
    loose = dict(zip(parts[1::2], parts[2::2], strict=True)).get("options", "")
    listed = re.findall(r"^  (--[\w-]+)", text, flags=re.M)
    if len(listed) > 4:
        assert re.findall(r"^  (-[\w-]+)", loose, flags=re.M) == ["-h"], loose
    # every option has a help text
    for option in re.findall(r"^  (--[\w-]+.*(?:\n {8,}.*)*)", text, flags=re.M):
        assert re.search(r"\s{2,}\S", option), option


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_last_line_names_the_next_step(path):
    """Every command calls next_step, or prints to stderr if its output is a table for a file."""
    sources = [path.read_text()]
    for node in ast.walk(ast.parse(sources[0])):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("bags", "images"):
            module = ROOT / "examples" / f"{node.module.replace('.', '/')}.py"
            sources += [module.read_text()] if module.exists() else []
    assert any("next_step(" in source or '"\\nnext: ' in source for source in sources)


def parse_of(path: Path):
    module = importlib.import_module(path.stem)
    return next(getattr(module, name) for name in ("parse", "parse_arguments", "main") if hasattr(module, name))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_abbreviated_options_are_errors(help_of_commands, path, capsys):
    _, text, _ = help_of_commands[path.name]
    listed = re.findall(r"^  (--[\w-]+)", text, flags=re.M)
    for option in listed:
        beginning = option[:-1]
        if beginning in listed:
            continue
        with pytest.raises(SystemExit):
            parse_of(path)([beginning, "1"])
        assert "error: " in capsys.readouterr().err
    made = options.make_parser("")
    made.add_argument("--epochs", type=int)
    with pytest.raises(SystemExit):
        made.parse_args(["--epoch", "1"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


def test_better_settings_of_the_help_are_options(help_of_commands):
    _, text, _ = help_of_commands["train_cxr.py"]
    assert training_options.BETTER in text
    parser = argparse.ArgumentParser()
    training_options.add_options(parser)
    better, default = parser.parse_args(training_options.BETTER.split()), parser.parse_args([])
    changed = {name for name, value in vars(better).items() if value != getattr(default, name)}
    assert changed == {"pooling", "lam", "lam_delay", "lam_warmup", "normalize", "mask_weight", "prior"}
    assert (default.lam, default.delta_l, default.epochs, default.backbone) == (20, 0.3, 20, "resnet50")  # the paper's


def test_next_command_has_the_same_data_options(tmp_path):
    given = ["--data-dir", str(tmp_path / "a b"), "--dataset", "folder", "--allow-missing"]
    parser = argparse.ArgumentParser()
    training_options.add_data_options(parser)
    words = shlex.split(training_options.given_data_options(parser.parse_args(given)))
    assert sorted(words) == sorted(given)
    assert parser.parse_args(words) == parser.parse_args(given)


def test_check_ends_with_ok_or_the_errors(tmp_path, capsys):
    data = tmp_path / "data"
    assert (
        importlib.import_module("make_synthetic_cxr").main(["--out", str(data), "--images", "30", "--size", "32"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"next: python check_cxr.py --data-dir {data}"
    check = importlib.import_module("check_cxr").main
    assert check(["--data-dir", str(data)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"next: python train_cxr.py --data-dir {data} --out RUN", "ok"]
    first = sorted(data.rglob("*.png"))[0]
    first.unlink()
    assert check(["--data-dir", str(data)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrong: 1 images are missing (--allow-missing")
    assert check(["--data-dir", str(data), "--allow-missing"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok"
    # the tables are in another folder
    for table in [*data.glob("*.csv"), *data.glob("*.txt")]:
        table.rename(tmp_path / table.name)
    assert check(["--data-dir", str(data)]) == 2
    assert "give the folder of the tables with --tables" in capsys.readouterr().err
    assert check(["--data-dir", str(data), "--tables", str(tmp_path), "--allow-missing"]) == 0


def test_progress_in_a_file_is_a_few_lines(tmp_path, monkeypatch):
    def written(name, every):
        monkeypatch.setattr(progress, "EVERY", every)
        with (tmp_path / name).open("w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", file)
            assert list(progress.Progress(range(3), desc="SGL", unit="batch")) == [0, 1, 2]
            with progress.Progress(total=3, desc="all", disable=True) as bar:
                bar.update(3)
        return (tmp_path / name).read_text()

    line = r"SGL: batch {} of 3, 00:00 elapsed, \S+ left\n"
    assert re.fullmatch("".join(line.format(k) for k in range(4)), written("each", 0.0))
    assert written("short", 30.0) == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.Progress(range(3), desc="SGL")) == [0, 1, 2]
    assert "\rSGL: 100%|" in terminal.getvalue()


def test_every_progress_bar_writes_lines_into_a_file():
    """Only two modules use tqdm: that of Progress, and the training of bags, which prints one line per epoch."""
    files_of = (ROOT / "examples").rglob("*.py")
    found = {path.relative_to(ROOT / "examples").as_posix() for path in files_of if "tqdm" in path.read_text()}
    assert found == {"common/progress.py", "bags/training.py"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_error_of_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "table.csv"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as plain:
        path.write_text("x")
    assert plain.value.filename is None
    with pytest.raises(OSError, match="No space left on device") as named, files.naming(path):
        path.write_text("x")
    assert named.value.filename == str(path)
    assert named.value.errno == errno.ENOSPC
    # an error with a file name keeps it, and an error without a number keeps its text
    with pytest.raises(FileNotFoundError, match="elsewhere"), files.naming(path):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(OSError, match=r"table\.csv: encoder error"), files.naming(path):
        raise OSError("encoder error")


def test_every_write_of_the_examples_is_in_a_naming_block():
    """Every open for writing, write_text, write_bytes and savefig is in a ``naming`` block."""
    unnamed = []
    for path in sorted((ROOT / "examples").rglob("*.py")):
        tree = ast.parse(path.read_text())
        named = [
            range(node.lineno, (node.end_lineno or node.lineno) + 1)
            for node in ast.walk(tree)
            if (isinstance(node, ast.With) and any("naming(" in ast.unparse(item) for item in node.items))
            # or in a try block whose error names the file
            or (
                isinstance(node, ast.Try)
                and any(
                    h.type and "OSError" in ast.unparse(h.type) and "{path}" in ast.unparse(h) for h in node.handlers
                )
            )
        ]
        # pictures of a page are written to memory
        memory = {
            ast.unparse(node.targets[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "io.BytesIO()"
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, arguments = node.func.attr, [ast.unparse(argument) for argument in node.args]
            writes = name in ("write_text", "write_bytes", "savefig") or (
                name == "open" and any(re.fullmatch(r"'[wax]b?'", argument) for argument in arguments)
            )
            if writes and not memory & set(arguments[:1]) and not any(node.lineno in lines for lines in named):
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    # lock files have no contents
    assert [place for place in unnamed if "cache.py" not in place and "run_folder.py" not in place] == []


def test_exit_status_of_a_command(capsys):
    def fails(error: BaseException) -> None:
        raise error

    assert options.exit_status(lambda: None) == 0 and capsys.readouterr() == ("", "")
    assert options.exit_status(lambda: fails(ValueError("size: expected 1, got 0"))) == 2
    assert capsys.readouterr() == ("", "error: size: expected 1, got 0\n")
    assert options.exit_status(lambda: fails(FileNotFoundError(2, "No such file", "x.csv"))) == 2
    assert capsys.readouterr() == ("", "error: [Errno 2] No such file: 'x.csv'\n")
    assert options.exit_status(lambda: fails(KeyboardInterrupt()), "stopped; run it again") == 130
    assert capsys.readouterr() == ("", "\nstopped; run it again\n")
    with pytest.raises(ZeroDivisionError):
        options.exit_status(lambda: fails(ZeroDivisionError()))
