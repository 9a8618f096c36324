"""Errors and warnings about changed class vectors, the environment, outdated objects and setuptools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, needs_kernel

from sgl_ops import BagLoss, SGLLoss
from sgl_ops.functional import sgl_terms

sys.path.append(str(ROOT / "tools"))
from build_stamp import build_if_changed

X, Y = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 0], [0, 1], [1, 1]])


def replaced(criterion, name):
    setattr(criterion, name, torch.tensor([torch.inf, 1.0]))
    return criterion


def loaded(criterion, name):
    criterion.load_state_dict({n: torch.tensor([torch.nan, 1.0]) for n in criterion.state_dict()})
    return criterion


def halved(criterion, name):
    return criterion.half()  # 1e5 becomes inf


@pytest.mark.parametrize("change", [replaced, loaded, halved])
@pytest.mark.parametrize("name", ["class_weight", "pos_weight"])
@pytest.mark.parametrize("make", [SGLLoss, BagLoss])
def test_changed_class_vectors_are_checked(make, name, change):
    for check in (None, True):
        criterion = change(make(**{name: torch.tensor([1e5, 1.0])}, check=check), name)
        with pytest.raises(ValueError, match=f"{name}: expected finite values .*, got (inf|nan)"):
            criterion(X, Y)
    change(make(**{name: torch.tensor([1e5, 1.0])}, check=False), name)(X, Y)


@pytest.mark.parametrize("make", [SGLLoss, BagLoss])
def test_class_vectors_may_be_on_the_meta_device(make):
    with torch.device("meta"):
        criterion = make(class_weight=[1.0, 2.0], pos_weight=[1.0, 3.0])
    assert criterion.pos_weight.is_meta
    criterion = criterion.to_empty(device="cpu")
    criterion.load_state_dict({"class_weight": torch.tensor([1.0, 2.0]), "pos_weight": torch.tensor([1.0, 3.0])})
    expected = make(class_weight=[1.0, 2.0], pos_weight=[1.0, 3.0])
    assert torch.equal(criterion(X, Y), expected(X, Y))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_implementations_agree_at_most_ties_with_a_threshold(dtype):
    """theta equals delta_l = 1/2 up to rounding. The exponentials of both may differ in the last bit."""
    differ = 0
    for high in (torch.rand(200, generator=torch.Generator().manual_seed(0)) * 6 + 0.1).tolist():
        x = torch.tensor([[-high, 0.0, high, -high]], dtype=dtype)
        fused, reference = (sgl_terms(x, Y[:1, 0], delta_l=0.5, impl=i).instance for i in ("fused", "reference"))
        differ += not torch.isclose(fused, reference, rtol=1e-3)
    assert differ <= 0.15 * 200


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )


@needs_kernel
def test_unknown_cpu_level_warns(tmp_path):
    done = python("import sgl_ops", tmp_path, SGL_OPS_CPU="sse")
    assert done.returncode == 0
    assert "SGL_OPS_CPU: expected baseline, avx2, avx512, got 'sse'; the kernels for" in done.stderr
    assert "SGL_OPS_CPU" not in python("import sgl_ops", tmp_path, SGL_OPS_CPU="baseline").stderr


def test_source_tree_without_the_extension_warns(tmp_path):
    shutil.copytree(ROOT / "sgl_ops", tmp_path / "sgl_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    # an editable installation uses the extension of its source tree
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]; import sgl_ops"
    done = python(code, tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("RuntimeWarning") == 1
    assert "has no compiled extension" in done.stderr
    assert "Run 'pip install .'" in done.stderr


def test_source_saved_during_compilation_is_compiled_again(tmp_path):
    source, header, target = (str(tmp_path / name) for name in ("a.cpp", "a.h", "a.o"))

    def write(path, text):
        with open(path, "w") as file:
            file.write(text)

    def build(text_saved_meanwhile=None):
        with open(source) as file:
            text = file.read()
        if text_saved_meanwhile:
            write(source, text_saved_meanwhile)
        write(target, text)
        os.utime(target, (2e9, 2e9))  # newer than all other files

    write(source, "one"), write(header, "h")
    assert build_if_changed(target, [source, header], lambda: build("two"))
    assert build_if_changed(target, [source, header], build)
    with open(target) as file:
        assert file.read() == "two"
    assert not build_if_changed(target, [source, header], build)
    os.utime(source, (3e9, 3e9))  # saved again without changes
    assert not build_if_changed(target, [source, header], build)
    write(header, "i")
    assert build_if_changed(target, [source, header], build)
    assert build_if_changed(target, [source, header], build, command="-O3")


def test_old_setuptools_is_an_error(tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    code = "import sys; sys.path.insert(0, '.'); import build_backend"
    done = python(code, tmp_path, PYTHONPATH=str(ROOT / "tools"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs setuptools >= 77, found 65.5.0" in done.stderr
    assert 'requires = ["setuptools>=77"]' in (ROOT / "pyproject.toml").read_text()
