"""The pooling modules: values, layouts, extreme logits, learned parameters."""

from __future__ import annotations

import math
import re

import numpy as np
import oracle
import pytest
import torch
from batches import Batch, bags_of, external_pooling, packed, padded, random_batch
from conftest import ROOT, needs_kernel
from torch import nn

from sgl_ops import BagLoss, SGLLoss, _fused
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

NAMES = list(POOLINGS)


def with_impl(impl, pooling):
    """``pooling`` as a function that uses the implementation ``impl``."""
    if impl == "reference":
        return pooling.reference
    assert _fused.code_of(pooling)[0] != _fused.EXTERNAL
    return pooling


@pytest.mark.parametrize("name", NAMES)
def test_bag_logits_equal_the_oracle(name, impl, device):
    batch = random_batch([1, 4, 9], classes=2, scale=4.0)
    logits, call = packed(batch, device)
    z = with_impl(impl, make_pooling(name))(logits, **call)
    for i, bag in enumerate(batch.logits):
        for c, xs in enumerate(bag.tolist()):
            p = oracle.pooled(name, [oracle.mpf(x) for x in xs])
            assert float(z[i, c]) == pytest.approx(float(oracle.log(p) - oracle.log(1 - p)), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_agree_and_empty_bags_give_nan(name, impl, device):
    batch = random_batch([3, 0, 7], classes=2)
    flat, offsets = packed(batch, device)
    dense, mask = padded(batch, device)
    flat.requires_grad_()
    dense.requires_grad_()
    pooling = with_impl(impl, make_pooling(name))
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
def test_extreme_logits_give_finite_bag_logits(name, impl, device, dtype):
    limit = 6e4 if dtype == torch.float16 else 1e4
    rows = [[limit] * 3, [-limit] * 3, [limit, -limit, 0.0], [-90.0, -100.0, -95.0], [40.0, 50.0, 45.0], [0.0] * 3]
    x = torch.tensor(rows).to(device, dtype).requires_grad_()
    z = with_impl(impl, make_pooling(name))(x)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.isfinite().all()
    z.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad >= 0).all() or name in ("softmax", "linear_softmax")
    assert (x.grad.float().abs().sum(1) > 0).all()


def test_make_pooling_returns_the_module_of_each_name():
    assert set(NAMES) == set(POOLINGS)
    for name in NAMES:
        assert isinstance(make_pooling(name), POOLINGS[name])
    with pytest.raises(ValueError, match=r"pooling.*'median'"):
        make_pooling("median")


@pytest.mark.parametrize("r", [0.01, 1.0, 10.0, 200.0])
def test_lse_equals_its_formula_for_every_r(r, impl, device):
    x = torch.tensor([[-3.0, 0.5, 2.0]], dtype=torch.float64, device=device)
    p = torch.sigmoid(x)
    expected = torch.logit(torch.log(torch.exp(r * p).mean(1)) / r)
    torch.testing.assert_close(LSEPooling(r)(x), expected, rtol=1e-9, atol=0)
    bag = SGLLoss(pooling=LSEPooling(r), impl=impl).terms(x, torch.tensor([1], device=device)).bag
    torch.testing.assert_close(bag, torch.nn.functional.softplus(-expected[0]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("r", [1.0, 10.0, 30.0, 1e3, 1e6, 1e8])
def test_lse_in_float32_equals_float64(r, device):
    """Also if P is close to 1, where 1 - P must be computed without subtraction."""
    x = (torch.randn(400, 1, 1) * 6 + torch.randn(400, 1, 7) * 2).to(device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    z, expected = LSEPooling(r)(x), LSEPooling(r)(exact)
    tolerance = 2e-6 if r < 1e7 else 4e-6  # for small P, the quotient is computed from logarithms
    torch.testing.assert_close(z.double(), expected, rtol=tolerance, atol=tolerance)
    z.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=2e-6 * max(1.0, r))


@pytest.mark.parametrize("r", [1.0, 30.0, 1e3])
def test_lse_of_confident_instances_equals_its_formula(r, device):
    for xs in ([4.0, 5.0, 3.0], [9.0, 8.0, 2.0], [1.0, 12.0, 12.0]):
        z = float(LSEPooling(r)(torch.tensor([xs], device=device)))
        q = [1 / (1 + oracle.exp(oracle.mpf(x))) for x in xs]
        one_minus = -oracle.log(sum(oracle.exp(-r * v) for v in q) / len(q)) / r
        assert z == pytest.approx(float(oracle.log(1 - one_minus) - oracle.log(one_minus)), rel=1e-6)


def topk_by_sorting(xs, k):
    """Bag logit of the k largest of ``xs`` and its gradient, with 60 digits. Ties share the last place equally."""
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
def test_topk_equals_sorting_for_ties_and_small_bags(impl, device, k, xs):
    x = torch.tensor([xs], dtype=torch.float64, device=device, requires_grad=True)
    z = with_impl(impl, TopKPooling(k))(x)
    z.backward()
    expected, slopes = topk_by_sorting(xs, k)
    assert z.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert x.grad[0].tolist() == pytest.approx(slopes, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize(
    ("fraction", "size", "k"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (1e-12, 6, 1), (0.999, 3, 3), (0.3, 1, 1)],
)
def test_topk_of_a_fraction_equals_topk_of_its_k(impl, device, fraction, size, k):
    batch = random_batch([size, 2, 0], classes=2)
    for make in (packed, padded):
        logits, call = make(batch, device)
        z = with_impl(impl, TopKPooling(fraction))(logits, **call)
        torch.testing.assert_close(z[0], TopKPooling(k).reference(logits, **call)[0])
        assert z[2].isnan().all()


def test_topk_of_one_is_max_and_of_all_is_mean(device):
    x = torch.randn(4, 3, 20, dtype=torch.float64).to(device)
    torch.testing.assert_close(TopKPooling(1)(x), MaxPooling()(x))
    torch.testing.assert_close(TopKPooling(20)(x), MeanPooling()(x))
    torch.testing.assert_close(TopKPooling(500)(x), MeanPooling()(x))


def test_topk_gradients_equal_numerical_gradients(device):
    x = torch.randn(2, 1, 7, dtype=torch.float64).to(device).requires_grad_()
    for k in (1, 5, 0.3):
        assert torch.autograd.gradcheck(TopKPooling(k).reference, (x,))
        assert torch.autograd.gradgradcheck(TopKPooling(k).reference, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1e8, 1e15])
def test_topk_of_large_logits_is_exact(impl, device, limit, dtype):
    rows = [[limit, limit / 2, 0.0], [-limit, -limit / 2, -limit], [limit, -limit, 0.0], [-limit, -limit, 1.0]]
    x = torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)
    z = with_impl(impl, TopKPooling(2))(x)
    assert z.isfinite().all()
    z.sum().backward()
    assert x.grad.isfinite().all()
    # the two largest of each row: q = e^-limit/2 and 0; p = e^-limit/2 and 0; p = 1 and 1/2; p = 0.73 and 0
    p = torch.sigmoid(torch.ones(1)).item() / 2
    expected = [limit / 2 + math.log(2), -limit / 2 - math.log(2), math.log(3), math.log(p / (1 - p))]
    assert z.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (-3, ValueError), (0.0, ValueError), (1.0, ValueError), (2.5, ValueError),
                     (math.nan, ValueError), (True, ValueError), ("3", TypeError), (None, TypeError)]
)  # fmt: skip
def test_topk_rejects_invalid_k(k, error):
    pooling = TopKPooling(3)
    for change in (TopKPooling, lambda k: setattr(pooling, "k", k)):
        with pytest.raises(error, match="k: expected"):
            change(k)
    assert pooling.k == 3


@pytest.mark.parametrize("make", [LSEPooling, GeneralizedMeanPooling, TopKPooling, lambda a: AutoPooling(3, a)])
@pytest.mark.parametrize("kind", [nn.Parameter, lambda value: value.requires_grad_()])
def test_numbers_of_a_pooling_that_require_a_gradient_are_refused(make, kind):
    """The pooling would not train them."""
    number = kind(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"[rka]: expected a constant, got a tensor that requires a gradient"):
        make(number)
    if isinstance(make, type):
        pooling = make()
        before = repr(pooling)
        with pytest.raises(ValueError, match=r"[rk]: expected a constant"):
            setattr(pooling, "k" if make is TopKPooling else "r", number)
        assert repr(pooling) == before and list(pooling.parameters()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_every_dtype_reach_attention_pooling(dtype):
    """The network runs under autocast, and the loss outside of it."""
    torch.manual_seed(0)
    pooling = AttentionPooling(5, 4)
    features, logits = torch.randn(2, 7, 5).to(dtype), torch.randn(2, 3, 7)
    expected = pooling(logits, features=features.float())
    torch.testing.assert_close(pooling(logits, features=features), expected, rtol=1e-6, atol=1e-6)


def test_features_that_are_integers_are_refused():
    with pytest.raises(TypeError, match=r"features: expected a floating dtype, got torch\.int64"):
        AttentionPooling(5)(torch.randn(2, 3, 7), features=torch.ones(2, 7, 5, dtype=torch.int64))


@pytest.mark.parametrize("arguments", [(0,), (5.5,), (True,), (5, 0)])
def test_widths_of_attention_pooling_are_checked(arguments):
    with pytest.raises((TypeError, ValueError), match="_features: expected"):
        AttentionPooling(*arguments)


def test_features_of_a_wrong_shape_are_an_error_of_every_pooling(impl, device):
    """Also if the pooling does not use them."""
    logits, features = torch.randn(2, 3, 7, device=device), torch.randn(2, 6, 5, device=device)
    calls = [
        lambda: with_impl(impl, MaxPooling())(logits, features=features),
        lambda: BagLoss("max", impl=impl)(logits, torch.ones(2, 3, device=device), features=features),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"features: expected shape \(2, 7, D\), got \(2, 6, 5\)"):
            call()


def test_an_assigned_k_equals_that_of_the_constructor(impl, device):
    x = torch.randn(2, 3, 9).to(device)
    pooling = TopKPooling(8)
    for k in (np.int64(2), torch.tensor(4), np.float32(0.25), 0.5, 1):
        pooling.k = k
        assert (
            type(pooling.k) is (float if isinstance(k, (float, np.floating)) else int)
            and repr(pooling) == f"TopKPooling(k={k})"
        )
        torch.testing.assert_close(with_impl(impl, pooling)(x), with_impl(impl, TopKPooling(k))(x), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_invalid_r_raises_value_error(value):
    for make in (LSEPooling, GeneralizedMeanPooling):
        pooling = make(2.0)
        for change in (make, lambda r, pooling=pooling: setattr(pooling, "r", r)):
            with pytest.raises(ValueError, match="r: expected finite and > 0"):
                change(value)
        assert pooling.r == 2.0
        with pytest.raises(ValueError, match="r: expected no assignment"):
            GeneralizedMeanPooling(num_classes=2).r = 3.0
        with pytest.raises(TypeError, match="r: expected a number, got '1'"):
            make("1")


def test_learned_poolings_equal_their_formula_and_get_a_gradient(device):
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
def test_attention_pooling_of_equal_features_is_the_mean(gated, impl, device):
    torch.manual_seed(1)
    pooling = AttentionPooling(6, 4, gated=gated).double().to(device)
    batch = random_batch([3, 5], classes=2, positives=1.0)
    logits, call = packed(batch, device)
    features = torch.randn(8, 6, dtype=torch.float64).to(device).requires_grad_()
    z = pooling(logits, features=features, **call)
    # the weights are a softmax within the bag, so equal features give the mean
    same = torch.ones_like(features)
    expected = torch.stack([torch.logit(torch.sigmoid(bag).mean(1)) for bag in batch.logits]).to(device)
    torch.testing.assert_close(pooling(logits, features=same, **call), expected)
    dense, mask = padded(batch, device)
    padded_features = torch.full((2, dense.shape[2], 6), math.nan, dtype=torch.float64, device=device)
    padded_features[mask["mask"]] = features.detach()
    torch.testing.assert_close(pooling(dense, features=padded_features, **mask), z)
    loss = SGLLoss(pooling=pooling, impl=impl)(logits, batch.labels.to(device), features=features, **call)
    loss.backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pooling.parameters())
    with pytest.raises(ValueError, match="features"):
        pooling(logits, **call)
    with pytest.raises(TypeError, match=r"features.*list"):
        pooling(logits, features=[1.0], **call)


def test_attention_of_nested_features_equals_packed_features(impl, device):
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


# ---------------------------------------------------------------------------------------------------------------------
# The operators of the poolings


POOLINGS_WITH_PARAMETERS = [
    *(make_pooling(name) for name in NAMES),
    *(TopKPooling(k) for k in (1, 3, 1000, 0.1)),
    *(GeneralizedMeanPooling(r) for r in (0.3, 4.0, 20.0)),
    LSEPooling(1.0),
]


@needs_kernel
def test_operators_python_and_documentation_list_the_same_poolings():
    """The table of docs/choosing-settings.md, the names in Python and the structs of csrc/pooling.h agree."""
    operators = [name for name in _fused.CODE_OF_NAME if name != "none"]
    assert sorted(operators) == sorted(POOLINGS)
    for kind in POOLINGS.values():
        assert kind in _fused.CODES
    page = (ROOT / "docs" / "choosing-settings.md").read_text()
    section = page[page.index("## Which pooling") :]
    table = section[section.index("| pooling |") :].split("\n\n")[0]
    documented = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(name for name in documented if name.islower()) == sorted(POOLINGS)


@needs_kernel
@pytest.mark.parametrize("code", [-1, 99])
def test_operators_reject_unknown_codes(emulated, code):
    x, y, z = torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 1)
    saved = torch.zeros(3, _fused.CONSTANTS["saved_columns"])
    settings = (0.3, 1.0, 0.0, code, 1.0, False, True, True, 0)
    for ops in (torch.ops.sgl_ops, torch.ops.sgl_ops_emulated):
        for call in (
            lambda ops=ops: ops.sgl_forward(x, y, None, None, None, None, *settings),
            lambda ops=ops: ops.sgl_forward_sums(x, y, None, None, None, None, *settings),
            lambda ops=ops: ops.sgl_backward(y[0], x, None, None, None, saved, 0.3, code, 1.0, True),
            lambda ops=ops: ops.pool_forward(x, None, None, code, 1.0),
            lambda ops=ops: ops.pool_backward(z, x, None, None, saved, code, 1.0),
        ):
            with pytest.raises(RuntimeError, match=rf"pooling: expected the code of a pooling, got {code}"):
                call()
        with pytest.raises(RuntimeError, match="loss: expected the code of a loss, got 7"):
            ops.sgl_forward(x, y, None, None, None, None, *settings[:3], 1, *settings[4:-1], 7)


@needs_kernel
@pytest.mark.parametrize("impl", ["fused", "emulated"], indirect=True)
@pytest.mark.parametrize("pooling", POOLINGS_WITH_PARAMETERS, ids=str)
@pytest.mark.parametrize("layout", [packed, padded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_operators_equal_the_reference(impl, device, pooling, layout, dtype):
    """Bag logits and gradients against the reference in float64, with tied logits, at several scales in one batch."""
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    batches = [
        random_batch([1, 40, 0, 7], classes=3, scale=scale, shift=shift)
        for scale, shift in ((2.0, 0.0), (1.0, -60.0), (1.0, 60.0), (20.0, 0.0))
    ]
    bags = [torch.cat((bag, bag[:, :1].repeat(1, 3)), 1) for batch in batches for bag in batch.logits]
    batch = Batch(bags, torch.cat([batch.labels for batch in batches])).to(dtype)
    x, call = layout(batch, device, dtype)
    weight = torch.randn(len(bags), 3, dtype=torch.float64).to(device)
    results = []
    for compute, logits in ((pooling, x.clone()), (pooling.reference, x.double())):
        logits.requires_grad_()
        z = compute(logits, **call).double()
        (z.nan_to_num(0.0) * weight).sum().backward()
        results.append((z.detach(), bags_of(logits.grad.double(), call)))
    (z, gradients), (expected, expected_gradients) = results
    sharpness = max(1.0, pooling.operator_parameter if isinstance(pooling, GeneralizedMeanPooling) else 1.0)
    torch.testing.assert_close(
        z, expected, rtol=32 * working * sharpness, atol=32 * working * sharpness, equal_nan=True
    )
    limits = torch.finfo(dtype)
    for gradient, want in zip(gradients, expected_gradients, strict=True):
        if want.numel():
            rounding = (limits.eps * want.abs() + limits.smallest_normal * limits.eps) / 2
            assert ((gradient - want).abs() <= rounding + 64 * working * sharpness * want.abs().max()).all()


@needs_kernel
def test_excluded_instances_are_ignored_and_nan_gives_nan(impl, device):
    mask = torch.tensor([[True, True, False], [True, False, True]], device=device)
    for name in NAMES:
        x = torch.tensor([[[1.0, -1.0, math.nan]], [[math.inf, 7.0, 0.0]]], device=device, requires_grad=True)
        z = with_impl(impl, make_pooling(name))(x, mask=mask)
        (z[0] + 0 * z[1]).sum().backward()
        assert z[0].isfinite().all()
        assert z[1].isnan().all()
        assert x.grad[0, 0, 2] == 0
        assert x.grad[1, 0, 1] == 0
        assert x.grad[1, 0, [0, 2]].isnan().all()


@needs_kernel
def test_second_derivative_of_the_operator_raises_an_error(fused_device):
    """torch.func uses the reference, which has one: see test_ecosystem.py."""
    x = torch.randn(2, 1, 5, dtype=torch.float64, device=fused_device, requires_grad=True)
    pooling = make_pooling("softmax")
    (grad,) = torch.autograd.grad(pooling(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(pooling.reference, (x,))


@needs_kernel
def test_poolings_with_hooks_subclasses_and_learned_parameters_are_external(fused_device):
    x = torch.randn(2, 3, 5, device=fused_device)
    assert torch.equal(external_pooling()(x), external_pooling().reference(x))
    pooling, calls = make_pooling("max"), []
    assert _fused.code_of(pooling)[0] != _fused.EXTERNAL
    handle = pooling.register_forward_hook(lambda *_: calls.append(1))
    assert _fused.code_of(pooling)[0] == _fused.EXTERNAL
    SGLLoss(pooling=pooling)(x, torch.ones(2, 3, device=fused_device))
    assert calls
    handle.remove()
    learned = GeneralizedMeanPooling(2.0, num_classes=3)
    assert _fused.code_of(learned)[0] == _fused.EXTERNAL
    with pytest.raises(ValueError, match="impl: 'fused' is not available: the operators do not have General"):
        BagLoss(pooling=learned, impl="fused")(x, torch.ones(2, 3, device=fused_device))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 3, 9], "expected to end at the number of rows 6, got 9"),
        ([0, 3], "expected to end at the number of rows 6, got 3"),
        ([0, 4, 2, 6], "expected never to fall, got 4 before 2 at index 1"),
        ([1, 6], "expected to start at 0, got 1"),
        ([-1, 3, 6], "expected to start at 0, got -1"),
    ],
)
def test_wrong_offsets_are_errors(name, offsets, words, impl):
    """As in the losses, on the CPU. Before, rows were left out without a message."""
    pooling = with_impl(impl, make_pooling(name))
    with pytest.raises(ValueError, match=re.escape(f"offsets: {words}")):
        pooling(torch.randn(6, 2), offsets=torch.tensor(offsets))


def test_wrong_offsets_of_attention_are_errors():
    with pytest.raises(ValueError, match="offsets: expected to end at the number of rows 6, got 9"):
        AttentionPooling(3)(torch.randn(6, 2), offsets=torch.tensor([0, 3, 9]), features=torch.randn(6, 3))
