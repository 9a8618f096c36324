"""The structure of examples/: packages without import circles, short files, names that agree with the library."""

from __future__ import annotations

import ast

from common.choices import POOLINGS
from conftest import ROOT

from sgl_ops import pooling

FILES = [path for path in (ROOT / "examples").rglob("*.py") if "results" not in path.parts]


def test_no_file_is_over_400_lines():
    assert {path.name: n for path in FILES if (n := len(path.read_text().splitlines())) > 400} == {}


def module_of(path):
    return ".".join(path.relative_to(ROOT / "examples").with_suffix("").parts)


def test_no_import_circle():
    """Imports inside functions count. Imports for type checkers do not."""
    modules = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    imports = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        ignored = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        found = set()
        for node in ast.walk(tree):
            if id(node) in ignored:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        imports[name] = found & set(modules)
    while free := {name for name, found in imports.items() if not found & set(imports)}:
        imports = {name: found for name, found in imports.items() if name not in free}
    assert imports == {}


def test_names_of_options_are_those_of_the_library():
    assert tuple(pooling.POOLINGS) == POOLINGS
