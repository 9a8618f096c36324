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


def test_what_the_readme_offers_instead_of_other_losses():
    """Each row's code gives a loss with a gradient, and the number of what it replaces where it says so."""
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"### Coming from another loss\n\n(.*?)\n\n", text, re.S)
    names = {
        "F": torch.nn.functional,
        **vars(sgl_ops),
        **vars(sgl_ops.pooling),
        "logits": torch.randn(4, 3, 5, 6, requires_grad=True),
        "labels": torch.randint(0, 2, (4, 3)).float(),
        "patch_logits": torch.randn(30, 2, requires_grad=True),
        "slide_labels": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "features": torch.randn(30, 512),
        "offsets": torch.tensor([0, 12, 30]),
        "x": torch.randn(4, 9, 1, 1, requires_grad=True),
        "y": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    }
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    assert len(rows) == 6
    same = 0
    for have, take, changes in rows:
        value = eval(take.split("`")[1], names)
        value.backward()
        assert value.isfinite()
        if "the same number" in changes:
            torch.testing.assert_close(value, eval(have.split("`")[1], names))
            same += 1
    assert same == 3
    assert all(names[name].grad.abs().sum() > 0 for name in ("logits", "patch_logits", "x"))
