"""The pooling modules: every layout, extremes, learned parameters. Their values are in test_values.py and here."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from batches import packed, padded, random_batch

from sgl_ops import SGLLoss
from sgl_ops.pooling import (
    POOLINGS,
    AttentionPooling,
    AutoPooling,
    GeneralizedMeanPooling,
    LSEPooling,
    MaxPooling,
    MeanPooling,
    TopKPooling,
    make_pooling,
)

NAMES = ["max", "mean", "mean_logits", "softmax", "linear_softmax", "topk", "lse", "noisy_or", "generalized_mean"]


@pytest.mark.parametrize("name", NAMES)
def test_values(name, device):
    batch = random_batch([1, 4, 9], classes=2, scale=4.0)
    logits, call = packed(batch, device)
    z = make_pooling(name)(logits, **call)
    for i, bag in enumerate(batch.logits):
        for c, xs in enumerate(bag.tolist()):
            p = oracle.pooled(name, [oracle.mpf(x) for x in xs])
            assert float(z[i, c]) == pytest.approx(float(oracle.log(p) - oracle.log(1 - p)), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_and_empty_bags(name, device):
    batch = random_batch([3, 0, 7], classes=2)
    flat, offsets = packed(batch, device)
    dense, mask = padded(batch, device)
    flat.requires_grad_()
    dense.requires_grad_()
    pooling = make_pooling(name)
    one, two = pooling(flat, **offsets), pooling(dense, **mask)
    assert one.shape == (3, 2)
    assert one[1].isnan().all()
    assert one[[0, 2]].isfinite().all()
    torch.testing.assert_close(one, two, equal_nan=True)
    for z, x in ((one, flat), (two, dense)):
        z.nansum().backward()
        assert x.grad.isfinite().all()
    assert (dense.grad[1] == 0).all()
    single = pooling(flat[:, 0].detach(), **offsets)
    torch.testing.assert_close(single, one[:, 0].detach(), equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_extremes_are_finite(name, device, dtype):
    limit = 6e4 if dtype == torch.float16 else 1e4
    rows = [[limit] * 3, [-limit] * 3, [limit, -limit, 0.0], [-90.0, -100.0, -95.0], [40.0, 50.0, 45.0], [0.0] * 3]
    x = torch.tensor(rows).to(device, dtype).requires_grad_()
    z = make_pooling(name)(x)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.isfinite().all()
    z.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad >= 0).all() or name in ("softmax", "linear_softmax")
    assert (x.grad.float().abs().sum(1) > 0).all()


def test_names_are_the_modules():
    assert set(NAMES) == set(POOLINGS)
    for name in NAMES:
        assert isinstance(make_pooling(name), POOLINGS[name])
    with pytest.raises(ValueError, match=r"pooling.*'median'"):
        make_pooling("median")


@pytest.mark.parametrize("r", [0.01, 1.0, 10.0, 200.0])
def test_lse_by_sharpness(r, impl, device):
    x = torch.tensor([[-3.0, 0.5, 2.0]], dtype=torch.float64, device=device)
    p = torch.sigmoid(x)
    expected = torch.logit(torch.log(torch.exp(r * p).mean(1)) / r)
    torch.testing.assert_close(LSEPooling(r)(x), expected, rtol=1e-9, atol=0)
    bag = SGLLoss(pooling=LSEPooling(r), impl=impl).terms(x, torch.tensor([1], device=device)).bag
    torch.testing.assert_close(bag, torch.nn.functional.softplus(-expected[0]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("r", [1.0, 10.0, 30.0, 1e3, 1e6, 1e8])
def test_lse_in_float32_is_that_of_float64(r, device):
    """Also where P is close to 1, and 1 - P has to be found without subtracting."""
    x = (torch.randn(400, 1, 1) * 6 + torch.randn(400, 1, 7) * 2).to(device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    z, expected = LSEPooling(r)(x), LSEPooling(r)(exact)
    tolerance = 2e-6 if r < 1e7 else 4e-6  # P and r are divided as logarithms, where P is small
    torch.testing.assert_close(z.double(), expected, rtol=tolerance, atol=tolerance)
    z.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=2e-6 * max(1.0, r))


@pytest.mark.parametrize("r", [1.0, 30.0, 1e3])
def test_lse_where_instances_are_certain(r, device):
    for xs in ([4.0, 5.0, 3.0], [9.0, 8.0, 2.0], [1.0, 12.0, 12.0]):
        z = float(LSEPooling(r)(torch.tensor([xs], device=device)))
        q = [1 / (1 + oracle.exp(oracle.mpf(x))) for x in xs]
        one_minus = -oracle.log(sum(oracle.exp(-r * v) for v in q) / len(q)) / r
        assert z == pytest.approx(float(oracle.log(1 - one_minus) - oracle.log(one_minus)), rel=1e-6)


def topk_by_sorting(xs, k):
    """Bag logit of the k largest of a list, and its gradient with ties sharing the last place, in 60 digits."""
    k = min(k, len(xs))
    p = [oracle.sigmoid(oracle.mpf(x)) for x in xs]
    mean = sum(sorted(p, reverse=True)[:k]) / k
    last = sorted(xs, reverse=True)[k - 1]
    above = sum(x > last for x in xs)
    share = oracle.mpf(k - above) / xs.count(last)
    weights = [1 if x > last else share if x == last else 0 for x in xs]
    slopes = [w * v * (1 - v) / k / (mean * (1 - mean)) for w, v in zip(weights, p, strict=True)]
    return float(oracle.log(mean) - oracle.log(1 - mean)), [float(s) for s in slopes]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize(
    "xs",
    [
        [0.5, -1.0, 2.0, 0.25, -3.0, 1.0, 0.75],
        [1.0, 1.0, 1.0, 1.0],  # all tied
        [2.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0],  # ties across the last place
        [0.0, -0.0, 0.0, -2.0],  # zeros of both signs are equal
        [-30.0, -31.0, -30.0, -35.0, -45.0],
        [30.0, 31.0, 30.0, 35.0, 45.0],
        [4.0],
    ],
)
def test_topk_values_ties_and_small_bags(device, k, xs):
    x = torch.tensor([xs], dtype=torch.float64, device=device, requires_grad=True)
    z = TopKPooling(k)(x)
    z.backward()
    expected, slopes = topk_by_sorting(xs, k)
    assert z.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert x.grad[0].tolist() == pytest.approx(slopes, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize(
    ("fraction", "size", "k"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (1e-12, 6, 1), (0.999, 3, 3), (0.3, 1, 1)],
)
def test_topk_by_fraction(device, fraction, size, k):
    batch = random_batch([size, 2, 0], classes=2)
    for make in (packed, padded):
        logits, call = make(batch, device)
        z = TopKPooling(fraction)(logits, **call)
        torch.testing.assert_close(z[0], TopKPooling(k)(logits, **call)[0])
        assert z[2].isnan().all()


def test_topk_between_max_and_mean(device):
    x = torch.randn(4, 3, 20, dtype=torch.float64).to(device)
    torch.testing.assert_close(TopKPooling(1)(x), MaxPooling()(x))
    torch.testing.assert_close(TopKPooling(20)(x), MeanPooling()(x))
    torch.testing.assert_close(TopKPooling(500)(x), MeanPooling()(x))


def test_topk_gradients(device):
    x = torch.randn(2, 3, 12, dtype=torch.float64).to(device).requires_grad_()
    for k in (1, 5, 0.3):
        assert torch.autograd.gradcheck(TopKPooling(k), (x,))
        assert torch.autograd.gradgradcheck(TopKPooling(k), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1e8, 1e15])
def test_topk_of_large_logits(device, limit, dtype):
    rows = [[limit, limit / 2, 0.0], [-limit, -limit / 2, -limit], [limit, -limit, 0.0], [-limit, -limit, 1.0]]
    x = torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)
    z = TopKPooling(2)(x)
    assert z.isfinite().all()
    z.sum().backward()
    assert x.grad.isfinite().all()
    # the largest two: q = e^-limit/2 and 0; p = e^-limit/2 and 0; p = 1 and 1/2; p = 0.73 and 0
    p = torch.sigmoid(torch.ones(1)).item() / 2
    expected = [limit / 2 + math.log(2), -limit / 2 - math.log(2), math.log(3), math.log(p / (1 - p))]
    assert z.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (-3, ValueError), (0.0, ValueError), (1.0, ValueError), (2.5, ValueError),
                     (math.nan, ValueError), (True, ValueError), ("3", TypeError), (None, TypeError)]
)  # fmt: skip
def test_topk_refuses(k, error):
    with pytest.raises(error, match="k: expected"):
        TopKPooling(k)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_parameters(value):
    for make in (LSEPooling, GeneralizedMeanPooling):
        with pytest.raises(ValueError, match="r:"):
            make(value)
        with pytest.raises(TypeError, match="r: expected a number, got '1'"):
            make("1")


def test_learned_poolings_learn(device):
    batch = random_batch([5, 8], classes=3, positives=1.0)
    logits, call = packed(batch, device)
    p = [torch.sigmoid(bag) for bag in batch.logits]
    for pooling, formula in (
        (AutoPooling(3, a=2.0), lambda q: (q * torch.exp(2 * q)).sum(1) / torch.exp(2 * q).sum(1)),
        (GeneralizedMeanPooling(3.0, num_classes=3), lambda q: (q**3).mean(1) ** (1 / 3)),
    ):
        pooling = pooling.double().to(device)
        expected = torch.stack([torch.logit(formula(q)) for q in p]).to(device)
        torch.testing.assert_close(pooling(logits, **call), expected, rtol=1e-6, atol=1e-6)
        criterion = SGLLoss(pooling=pooling)
        assert criterion.pooling is pooling
        assert len(list(criterion.parameters())) == 1
        criterion(logits, batch.labels.to(device), **call).backward()
        (parameter,) = pooling.parameters()
        assert parameter.grad.shape == (3,)
        assert (parameter.grad != 0).all()
        with pytest.raises(ValueError, match="3 classes"):
            pooling(logits[:, :2], **call)


@pytest.mark.parametrize("gated", [False, True])
def test_attention(gated, impl, device):
    torch.manual_seed(1)
    pooling = AttentionPooling(6, 4, gated=gated).double().to(device)
    batch = random_batch([3, 5], classes=2, positives=1.0)
    logits, call = packed(batch, device)
    features = torch.randn(8, 6, dtype=torch.float64).to(device).requires_grad_()
    z = pooling(logits, features=features, **call)
    # the weights are a softmax within the bag: equal features pool to the mean
    same = torch.ones_like(features)
    expected = torch.stack([torch.logit(torch.sigmoid(bag).mean(1)) for bag in batch.logits]).to(device)
    torch.testing.assert_close(pooling(logits, features=same, **call), expected)
    dense, mask = padded(batch, device)
    spread = torch.full((2, dense.shape[2], 6), math.nan, dtype=torch.float64, device=device)
    spread[mask["mask"]] = features.detach()
    torch.testing.assert_close(pooling(dense, features=spread, **mask), z)
    loss = SGLLoss(pooling=pooling, impl=impl)(logits, batch.labels.to(device), features=features, **call)
    loss.backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pooling.parameters())
    with pytest.raises(ValueError, match="features"):
        pooling(logits, **call)
    with pytest.raises(TypeError, match=r"features.*list"):
        pooling(logits, features=[1.0], **call)


def test_attention_of_nested_features(impl, device):
    def nested(values, *offsets):
        return torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets, device=device))

    pooling = AttentionPooling(4).to(device)
    logits, features, labels = torch.randn(5, 3).to(device), torch.randn(5, 4).to(device), torch.ones(2, 3)
    loss = SGLLoss(pooling=pooling, impl=impl)
    expected = loss(logits, labels.to(device), features=features, offsets=torch.tensor([0, 2, 5], device=device))
    given = loss(nested(logits, 0, 2, 5), labels.to(device), features=nested(features, 0, 2, 5))
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(loss(nested(logits, 0, 2, 5), labels.to(device), features=features), expected)
    with pytest.raises(ValueError, match=r"features: expected 2 bags.*got 3"):
        loss(nested(logits, 0, 2, 5), labels.to(device), features=nested(features, 0, 2, 3, 5))
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"features: expected 2 instances in bag 0 .*got 3"):
            loss(nested(logits, 0, 2, 5), labels.to(device), features=nested(features, 0, 3, 5))
    with pytest.raises(ValueError, match=r"features.*nested logits"):
        loss(logits, labels.to(device), features=nested(features, 0, 2, 5), offsets=torch.tensor([0, 2, 5]).to(device))
