"""What the documentation shows is true: the examples in docstrings and in the README."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re

import pytest
import torch
from conftest import ROOT

import sgl_ops

MODULES = ["sgl_ops", "sgl_ops.functional", "sgl_ops.losses", "sgl_ops.pooling"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", sgl_ops.functional.__all__ + sgl_ops.pooling.__all__ + sgl_ops.__all__)
def test_everything_public_is_documented(name):
    thing = next(getattr(m, name) for m in (sgl_ops, sgl_ops.functional, sgl_ops.pooling) if hasattr(m, name))
    assert inspect.getdoc(thing)


def test_use_in_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    model = torch.nn.Conv2d(1, 14, 3, stride=2)
    names = {"model": model, "images": torch.randn(4, 1, 17, 17), "labels": torch.randint(0, 2, (4, 14))}
    exec(code, names)
    assert names["bag_logits"].shape == (4, 14)
    assert model.weight.grad.abs().sum() > 0
