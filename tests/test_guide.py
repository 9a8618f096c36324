"""SGLLoss(guide=f): targets, parts and weights from a custom function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batches import packed, padded, random_batch, run

from sgl_ops import SGLLoss, functional, reference
from sgl_ops.reference import Guidance, Instances


def paper_guide(instances: Instances) -> Guidance:
    """Eq. 5 to 8, written only with the documented object."""
    x, bags, labels = instances.x, instances.bags, instances.labels
    expand = bags.expand_to_instances
    p, low, high = torch.sigmoid(x), bags.min(x), bags.max(x)
    theta = reference.rescaled(x, expand(low), expand(high))
    ranked = expand(labels.takes_part & ~(labels.positive & (low == high)))
    is_positive = expand(labels.positive)
    negative = (ranked & (~is_positive | (theta < 0.3))).to(x.dtype)
    positive = (ranked & is_positive & (theta > 0.7)).to(x.dtype)
    ambiguous = ranked.to(x.dtype) - negative - positive
    targets = torch.where(positive > 0, 1.0, torch.where(ambiguous > 0, theta, 0.0))
    alpha = torch.where(labels.positive, bags.max(p) - bags.median(p), 1.0)
    return Guidance(targets, negative, ambiguous, positive, 2 ** (alpha - 1))


def soft_guide(instances: Instances) -> Guidance:
    """Memberships between 0 and 1, and quantiles instead of minimum and maximum."""
    bags, labels, p = instances.bags, instances.labels, torch.sigmoid(instances.x)
    expand = bags.expand_to_instances
    low, high = bags.quantile(p, 0.1), bags.quantile(p, 0.9)
    theta = ((p - expand(low)) / expand(torch.where(high > low, high - low, 1.0))).clamp(0, 1)
    theta = torch.where(expand(labels.positive), theta, 0.0)
    negative, positive = torch.sigmoid((0.3 - theta) / 0.05), torch.sigmoid((theta - 0.7) / 0.05)
    return Guidance(theta, negative, 1 - negative - positive, positive, torch.full_like(low, 0.75))


BATCH = random_batch([6, 1, 13, 0, 4], classes=2, positives=0.6, unknown=0.2)


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("normalize", ["batch", "bag"])
def test_guide_with_the_equations_of_the_paper_gives_the_default_loss(device, make, normalize):
    options = {"mask_weight": 0.5, "normalize": normalize, "class_weight": torch.tensor([1.0, 2.0]).double()}
    expected = run(SGLLoss(impl="reference", **options).to(device), BATCH, device, make)
    found = run(SGLLoss(guide=paper_guide, **options).to(device), BATCH, device, make)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", ["batch", "bag"])
def test_memberships_are_weights_of_the_mean_of_each_part(device, normalize):
    """Compared with explicit sums."""
    x = torch.randn(3, 1, 7, dtype=torch.float64).to(device).requires_grad_()
    y = torch.tensor([[1.0], [0.0], [1.0]], device=device)
    terms = functional.sgl_terms(x, y, guide=soft_guide, normalize=normalize, lam=1.0)
    g = soft_guide(reference.read(x.detach(), y, None, None))
    loss = 0.75 * F.binary_cross_entropy_with_logits(x, g.targets, reduction="none")
    dims = (0, 1, 2) if normalize == "batch" else 2
    parts = [(m * loss).sum(dims) / m.sum(dims) for m in (g.negative, g.ambiguous, g.positive)]
    expected = torch.stack(parts).sum(0).mean()
    torch.testing.assert_close(terms.instance, expected.detach())
    (grad,) = torch.autograd.grad(terms.total - functional.bag_loss(x, y), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("make", [padded, packed])
def test_guide_is_ignored_for_excluded_pairs_and_padding(device, make):
    """The guide returns NaN for unknown labels, empty bags and padding."""

    def careless(instances: Instances) -> Guidance:
        outside = ~instances.bags.expand_to_instances(instances.labels.takes_part)
        given = soft_guide(instances)
        broken = [torch.where(outside.expand_as(t), torch.nan, t) for t in given[:4]]
        return Guidance(*broken, weight=torch.where(instances.labels.takes_part, given.weight, torch.nan))

    expected = run(SGLLoss(guide=soft_guide, mask_weight=0.5), BATCH, device, make)
    torch.testing.assert_close(run(SGLLoss(guide=careless, mask_weight=0.5), BATCH, device, make), expected)
    assert expected[0].isfinite()


def test_no_gradient_flows_through_the_guide(device):
    x, y = torch.randn(2, 1, 5).to(device).requires_grad_(), torch.tensor([[1.0], [0.0]], device=device)
    value = torch.ones((), device=device, requires_grad=True)
    loss = SGLLoss(guide=lambda i: Guidance(*(value * t for t in soft_guide(i)[:5])))
    loss(x, y).backward()
    assert x.grad.abs().sum() > 0
    assert value.grad is None


def test_self_guidance_returns_the_targets_of_the_guide(device):
    x, y = torch.randn(3, 2, 9).to(device), torch.randint(0, 2, (3, 2)).to(device)
    expected = functional.self_guidance(x, y, impl="reference")
    found = functional.self_guidance(x, y, guide=paper_guide)
    torch.testing.assert_close(list(found), list(expected))


def test_invalid_guides_raise_an_error(device):
    x, y = torch.randn(2, 1, 5).to(device), torch.tensor([[1.0], [0.0]], device=device)
    with pytest.raises(TypeError, match="guide: expected a function, got str"):
        SGLLoss(guide="soft")
    with pytest.raises(ValueError, match=r"guide: runs by the reference; impl"):
        SGLLoss(guide=soft_guide, impl="fused")
    with pytest.raises(TypeError, match=r"guide: expected an sgl_ops\.reference\.Guidance, got Tensor"):
        SGLLoss(guide=lambda i: i.x)(x, y)
    for name, shape in (("targets", r"\(2, 1, 5\)"), ("weight", r"\(2, 1\)")):
        wrong = lambda i, name=name: soft_guide(i)._replace(**{name: torch.zeros(3)})  # noqa: E731
        with pytest.raises(ValueError, match=rf"guide: expected {name} of shape {shape}, got \(3,\)"):
            SGLLoss(guide=wrong)(x, y)
