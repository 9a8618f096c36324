"""Files that the commands read and write: their encoding, and what an interrupted write leaves."""

from __future__ import annotations

import ast
import math

import pytest
from common.files import new_file, read_json, rounded, without_nan, write_json
from conftest import ROOT

FOLDERS = ("sgl_ops", "examples", "benchmarks", "tools")


def calls_without_encoding(source):
    """Line numbers of the calls that open a text file in the encoding of the machine."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name not in ("open", "read_text", "write_text") or owner in ("Image", "webbrowser", "tarfile", "os"):
            continue
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = name == "open" and any("b" in text for text in texts if len(text) < 4)
        ours = isinstance(node.func, ast.Name) and name == "write_text"  # of common/files.py
        if not (binary or ours or "encoding" in [keyword.arg for keyword in node.keywords]):
            yield node.lineno


def test_calls_without_encoding_are_found():
    source = "path.open()\nopen(path)\npath.open('w')\npath.read_text()\npath.write_text(text)"
    assert list(calls_without_encoding(source)) == [1, 2, 3, 4, 5]
    source = "path.open('rb')\nopen(path, 'wb')\npath.read_text(encoding='utf-8')\nImage.open(path)"
    assert list(calls_without_encoding(source)) == []


def test_all_text_files_have_a_stated_encoding():
    """Otherwise names such as Größe.png are written or read differently on Windows."""
    paths = [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
    found = {str(path.relative_to(ROOT)): list(calls_without_encoding(path.read_text("utf-8"))) for path in paths}
    assert len(found) > 50
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_an_error_during_a_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json({"größe": [1, 2]}, path)
    with pytest.raises(RuntimeError), new_file(path) as file:
        file.write("half")
        raise RuntimeError
    assert read_json(path) == {"größe": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_of_a_write_names_the_file(tmp_path):
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(OSError, match="missing") as caught:
        write_json({}, path)
    assert caught.value.filename == str(path)


def test_nan_and_infinity_become_none_at_any_depth():
    content = {"a": [math.nan, 1.5, {"b": (math.inf, -math.inf, 2)}], "c": "nan", "d": None, "e": True}
    assert without_nan(content) == {"a": [None, 1.5, {"b": [None, None, 2]}], "c": "nan", "d": None, "e": True}


def test_numbers_are_rounded_at_any_depth():
    content = {"a": [0.12345, {"b": 2.00049}], "c": 7, "d": "0.12345"}
    assert rounded(content, 3) == {"a": [0.123, {"b": 2.0}], "c": 7, "d": "0.12345"}
