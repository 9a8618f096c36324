"""Values and gradients of every loss against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from batches import Batch, near_threshold, packed, padded, random_batch, run
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss
from sgl_ops.pooling import POOLINGS as NAMED

POOLINGS = list(NAMED)
# tolerance of the loss and its gradient, in units of the arithmetic's epsilon (2e-16 for float64)
UNITS = 64


def working_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_equal(value, gradient, expected_value, expected_gradient, dtype, units=UNITS):
    eps = units * working_eps(dtype)
    assert abs(float(value) - float(expected_value)) <= eps * (abs(float(expected_value)) + 1e-30)
    limits = torch.finfo(dtype)
    for got, want in zip(gradient, expected_gradient, strict=True):
        want = torch.tensor([[float(v) for v in row] for row in want], dtype=torch.float64).reshape(got.shape)
        rounding = (limits.eps * want.abs() + limits.smallest_normal * limits.eps) / 2
        # p - M cancels: the tolerance is relative to the largest gradient of the (bag, class) pair
        size = want.abs().amax(1, keepdim=True) if want.shape[1] else want
        assert ((got - want).abs() <= rounding + eps * size).all(), (got - want, want)


def check_sgl(batch: Batch, impl: str, device, dtype=torch.float64, make=packed, **options):
    batch = batch.to(dtype)
    logits, labels = batch.as_lists
    expected, gradient = oracle.sgl(logits, labels, **options)
    vectors = {k: torch.tensor(options[k]) for k in ("class_weight", "pos_weight") if options.get(k)}
    criterion = SGLLoss(impl=impl, **(options | vectors)).to(device)
    value, got = run(criterion, batch, device, make, dtype)
    assert_equal(value, got, expected[0], gradient, dtype)
    layout_logits, call = make(batch, device, dtype)
    terms = criterion.terms(layout_logits, batch.labels.to(device), **call)
    for name, got_term, want_term in zip(terms._fields, terms, expected, strict=True):
        assert float(got_term) == pytest.approx(float(want_term), rel=UNITS * working_eps(dtype), abs=1e-30), name


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sgl_equals_the_oracle_for_every_pooling_and_dtype(impl, device, pooling, dtype):
    batch = random_batch([7, 1, 18, 4], classes=2, unknown=0.2, seed=3)
    assert not near_threshold(batch.to(dtype), 0.3)
    assert {str(y) for y in batch.labels.flatten().tolist()} == {"0.0", "1.0", "nan"}
    check_sgl(batch, impl, device, dtype, pooling=pooling, mask_weight=0.5, lam=2.0)


@pytest.mark.parametrize("normalize", ["batch", "bag"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("vectors", [{}, {"class_weight": [0.5, 0.0, 3.0], "pos_weight": [2.0, 0.25, 7.0]}])
def test_sgl_equals_the_oracle_for_every_option(impl, device, normalize, rescale, weighted, vectors):
    batch = random_batch([5, 12, 3], classes=3, seed=5)
    assert not near_threshold(batch, 0.2, rescale)
    check_sgl(
        batch, impl, device, normalize=normalize, rescale=rescale, weighted=weighted, delta_l=0.2, lam=3.0,
        mask_weight=2.0, **vectors,
    )  # fmt: skip


@pytest.mark.parametrize("make", [packed, padded])
@pytest.mark.parametrize("seed", range(4))
def test_sgl_equals_the_oracle_for_bags_of_unequal_size_and_empty_bags(impl, device, make, seed):
    check_sgl(random_batch([0, 3, 1, 0, 33, 2], unknown=0.3, seed=seed), impl, device, make=make, pooling="mean")


@pytest.mark.parametrize("size", [2, 3, 4, 15, 16, 17, 255, 256, 257, 300])
def test_sgl_equals_the_oracle_for_sizes_next_to_the_width_of_the_kernel(impl, device, size):
    batch = random_batch([size], classes=1, positives=1.0, seed=size)
    if not near_threshold(batch, 0.3):
        check_sgl(batch, impl, device, torch.float32 if size % 2 else torch.float64)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_saturated_logits_lose_no_precision(impl, device, pooling, shift):
    """If p or 1 - p is 1e-22, the loss still has the precision of float32."""
    batch = random_batch([6, 9], classes=2, shift=shift, seed=2)
    with oracle.mp.workdps(300 if pooling == "noisy_or" else 60):  # 1 - P is e^-450
        check_sgl(batch, impl, device, torch.float32, pooling=pooling, mask_weight=0.5)


@pytest.mark.parametrize("delta_l", [0.0, 0.5])
def test_sgl_equals_the_oracle_for_extreme_thresholds(impl, device, delta_l):
    batch = random_batch([9, 8], classes=2, positives=1.0, seed=4)
    check_sgl(batch, impl, device, delta_l=delta_l)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    classes=st.integers(1, 3),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    shift=st.sampled_from([-10.0, 0.0, 10.0]),
    delta_l=st.sampled_from([0.1, 0.3, 0.45]),
    pooling=st.sampled_from(POOLINGS),
    normalize=st.sampled_from(["batch", "bag"]),
    mask_weight=st.sampled_from([0.0, 1.0]),
    rounded=st.booleans(),
    make=st.sampled_from([packed, padded]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_sgl_equals_the_oracle_for_random_settings(
    impl, device, sizes, classes, seed, scale, shift, delta_l, pooling, normalize, mask_weight, rounded, make, dtype
):
    batch = random_batch(sizes, classes, scale=scale, shift=shift, unknown=0.2, seed=seed)
    if rounded:  # ties
        batch = Batch([bag.round() for bag in batch.logits], batch.labels)
    assume(not near_threshold(batch.to(dtype), delta_l))
    with oracle.mp.workdps(300 if pooling == "noisy_or" else 60):  # 1 - P is e^-500
        check_sgl(
            batch, impl, device, dtype, make, pooling=pooling, normalize=normalize, mask_weight=mask_weight,
            delta_l=delta_l,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_bag_bil_and_mmm_losses_equal_the_oracle(impl, device, dtype, seed):
    batch = random_batch([5, 0, 1, 12], classes=2, unknown=0.2, seed=seed).to(dtype)
    logits, labels = batch.as_lists
    for pooling in POOLINGS:
        expected = oracle.bag_loss(logits, labels, pooling=pooling)
        assert_equal(*run(BagLoss(pooling=pooling, impl=impl), batch, device, dtype=dtype), *expected, dtype)
        expected = oracle.bil(logits, labels, pooling=pooling)
        assert_equal(*run(BILLoss(pooling=pooling, impl=impl), batch, device, dtype=dtype), *expected, dtype)
    assert_equal(*run(MMMLoss(impl=impl), batch, device, dtype=dtype), *oracle.mmm(logits, labels), dtype)


#: at the ends of the ranges where exp and log1p are computed differently, where e^-|z| is subnormal, and where it is 0
BAG_LOGITS = [0.0, 5e-324, 1e-300, 1e-17, 0.17, 0.34657, 0.34658, 0.88137, 0.88138, 1.0, 5.5, 30.0, 37.0, 100.0, 707.0]
BAG_LOGITS += [709.0, 744.0, 746.0, 751.0, 1e4, 1e300]


@pytest.mark.parametrize("pooling", ["max", "mean_logits"])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_bag_loss_is_exact_to_two_units_in_the_last_place_for_every_bag_logit(impl, device, pooling, label):
    logits = [sign * z for z in BAG_LOGITS for sign in (1.0, -1.0)]
    with oracle.mp.workdps(700):
        towards = [oracle.mpf(z if label == 0.0 else -z) for z in logits]
        losses = [float(oracle.mp.log1p(oracle.mp.exp(t)) if t < 1000 else t) for t in towards]
        slopes = [float(1 / (1 + oracle.mp.exp(-t))) * (1 if label == 0.0 else -1) for t in towards]
    criterion = BagLoss(pooling=pooling, impl=impl)
    units = 2 * torch.finfo(torch.float64).eps
    together = torch.tensor(logits, dtype=torch.float64, device=device).reshape(-1, 1, 1).requires_grad_()
    criterion(together, torch.full((len(logits), 1), label, device=device)).backward()
    for z, loss, slope, gradient in zip(logits, losses, slopes, together.grad.flatten().tolist(), strict=True):
        alone = torch.full((1, 1, 1), z, dtype=torch.float64, device=device, requires_grad=True)
        value = criterion(alone, torch.full((1, 1), label, device=device))
        value.backward()
        assert value.item() == pytest.approx(loss, rel=units, abs=5e-324), z
        assert alone.grad.item() == pytest.approx(slope, rel=units, abs=5e-324), z
        assert gradient == pytest.approx(slope / len(logits), rel=2 * units, abs=5e-324), z


def test_tied_extremes_share_the_gradient(impl, device):
    logits = torch.tensor([[2.0, 2.0, -1.0, -1.0]], dtype=torch.float64)
    for loss, name, options in ((SGLLoss(lam=0.0, impl=impl), "sgl", {"lam": 0.0}), (MMMLoss(impl=impl), "mmm", {})):
        x = logits.to(device, copy=True).requires_grad_()
        loss(x, torch.tensor([1], device=device)).backward()
        result = getattr(oracle, name)([logits.tolist()], [[1]], **options)
        assert x.grad[0].tolist() == pytest.approx([float(g) for g in result[1][0][0]], rel=1e-12)


def test_negative_bags_give_plain_bce(impl, device):
    """The loss of negative bags is the BCE of the instances plus the BCE of the maxima, both against 0."""
    logits = torch.randn(4, 3, 10, dtype=torch.float64)
    loss = SGLLoss(impl=impl)(logits.to(device), torch.zeros(4, 3, device=device)).cpu()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(logits, torch.zeros_like(logits)) + bce(logits.amax(2), torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)


def test_terms_equal_a_calculation_by_hand(impl, device):
    """p = 0.1, 0.2, 0.9, positive: theta = 0, 1/8, 1, so M = 0, 0, 1; alpha = 0.9 - 0.2, w = 2^-0.3."""
    p = torch.tensor([[0.1, 0.2, 0.9]], dtype=torch.float64)
    terms = SGLLoss(mask_weight=1.0, impl=impl).terms(torch.logit(p).to(device), torch.tensor([1], device=device))
    w = 2 ** (-0.3)
    negative, positive = -w * (torch.log(torch.tensor(0.9)) + torch.log(torch.tensor(0.8))) / 2, -w * torch.log(p[0, 2])
    assert float(terms.instance) == pytest.approx(float(negative + positive), rel=1e-6)
    assert float(terms.bag) == pytest.approx(float(-torch.log(p[0, 2])), rel=1e-12)
    assert float(terms.mask) == pytest.approx((0.9**2 / 3) ** 0.5, rel=1e-12)
