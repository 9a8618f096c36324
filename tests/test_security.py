"""The library and the examples execute nothing that they read. The library opens no connection."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import sgl_ops

SHIPPED = sorted(path for folder in ("sgl_ops", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
RUN_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
NETWORK_MODULES = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp"}


def imported(node: ast.AST) -> set[str]:
    """The top-level names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {(node.module or "").split(".")[0]}
    return set()


def dangers(source: str) -> list[str]:
    """Calls in a source that could execute contents of files."""
    found = []
    for node in ast.walk(ast.parse(source)):
        found += [f"{node.lineno}: import {name}" for name in imported(node) & UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in RUN_CODE:
            found.append(f"{node.lineno}: {called}")
        if called.endswith("torch.load") and given.get("weights_only") != "True":
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if called.split(".")[-1] == "load" and given.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: {called} of pickles")
        if called in ("os.system", "os.popen") or given.get("shell", "False") != "False":
            found.append(f"{node.lineno}: a shell")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "x = [torch.load(p, weights_only=False)]",
        "eval(text)",
        "import a, pickle",
        "from pickle import loads",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_dangerous_calls_are_detected(source):
    assert dangers(source)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_tests_load_with_weights_only(path):
    assert [danger for danger in dangers(path.read_text()) if "torch.load" in danger] == []


def test_library_imports_no_network_module():
    for path in (ROOT / "sgl_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not imported(node) & NETWORK_MODULES, f"{path.name}: {ast.unparse(node)}"


def test_import_training_and_report_open_no_connection(tmp_path):
    """Runs import, a training step and the report. Any use of a socket ends the process."""
    code = """
import os, sys, torch

def refuse(event, arguments):
    if event.startswith("socket."):
        print(event, arguments, file=sys.stderr, flush=True)
        os._exit(3)

sys.addaudithook(refuse)
if len(sys.argv) > 1:
    import socket
    socket.socket()
import sgl_ops.__main__
x = torch.randn(4, 3, 8, 8, requires_grad=True)
sgl_ops.SGLLoss()(x, torch.ones(4, 3)).backward()
sgl_ops.__main__.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(sgl_ops.__file__).parents[1])}

    def status(*arguments: str) -> int:
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment).returncode

    assert status() == 0
    assert status("with a socket") == 3
