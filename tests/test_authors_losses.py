"""examples/bags/authors_losses.py: the control computes the published code, in which shapes broadcast."""

from __future__ import annotations

import pytest
import torch
from bags import authors_losses

import sgl_ops


def packed(x):
    """Logits (N, L) as (N L,), and their offsets."""
    return x.flatten(), torch.arange(0, x.numel() + 1, x.shape[1])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return 2 * torch.randn(6, 9, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1, 1, 1], dtype=torch.float64)


def bce(p, target):
    return -(target * torch.log(p + 1e-8) + (1 - target) * torch.log(1 - p + 1e-8))


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def test_mmm_broadcasts_the_mean_term(batch):
    x, y = batch
    x.requires_grad_()
    p = torch.sigmoid(x).view(6, 9, 1, 1)
    largest, least, mean = p.amax(1).squeeze(), p.amin(1).squeeze(), p.mean(1)
    terms = bce(largest, y).mean() + bce(least, 0.0).mean() + bce(mean, y / 2).mean()
    assert bce(mean, y / 2).shape == (6, 1, 6)
    logits, offsets = packed(x)
    loss = authors_losses.AuthorsMMM()(logits, y, offsets=offsets)
    torch.testing.assert_close(loss, terms / 3)
    torch.testing.assert_close(gradient(loss, x), gradient(terms / 3, x))
    assert not torch.isclose(loss, sgl_ops.MMMLoss()(x, y))


def test_bil_broadcasts_the_pseudo_labels(batch):
    x, y = batch
    x.requires_grad_()
    p = torch.sigmoid(x).view(6, 9, 1, 1)
    bag = bce(torch.sigmoid(x.mean(1)), y)
    pseudo_labels = (p > 0.5) * y
    assert pseudo_labels.shape == (6, 9, 1, 6)
    instance = bce(p, pseudo_labels).flatten(1).mean(1)
    expected = ((bag + (bag.detach() - instance) ** 2) * y + (1 - y) * instance).mean()
    logits, offsets = packed(x)
    loss = authors_losses.AuthorsBIL()(logits, y, offsets=offsets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, x), gradient(expected, x))
    assert not torch.isclose(loss, sgl_ops.BILLoss("mean_logits")(x, y))


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_equal_labels_give_the_losses_of_the_formulas(batch, label):
    x, _ = batch
    y = torch.full((6,), label, dtype=torch.float64)
    logits, offsets = packed(x)
    authors = authors_losses.AuthorsBIL()(logits, y, offsets=offsets)
    torch.testing.assert_close(authors, sgl_ops.BILLoss("mean_logits")(x, y), rtol=1e-5, atol=1e-7)
    authors = authors_losses.AuthorsMMM()(logits, y, offsets=offsets)
    torch.testing.assert_close(authors, sgl_ops.MMMLoss()(x, y), rtol=1e-5, atol=1e-7)
