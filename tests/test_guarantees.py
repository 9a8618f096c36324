"""The guarantees of every loss: finite for finite logits, NaN for a NaN, deterministic, correct with autograd.

Each test loops over its cases, and its message names the case. This is several times faster than one test per case.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from batches import packed, random_batch, run
from conftest import needs_kernel, skip_without_kernel

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss
from sgl_ops.pooling import POOLINGS as NAMED

NAN = math.nan
POOLINGS = list(NAMED)
LIMIT = {torch.float32: 1e4, torch.float64: 1e4, torch.bfloat16: 1e4, torch.float16: 6e4}


LOSSES = {
    "sgl reference": lambda p: SGLLoss(pooling=p, mask_weight=0.5, impl="reference"),
    "sgl by bag": lambda p: SGLLoss(pooling=p, mask_weight=0.5, normalize="bag", impl="reference"),
    "bag": lambda p: BagLoss(pooling=p, impl="reference"),
    "bil": lambda p: BILLoss(pooling=p, impl="reference"),
    "mmm": lambda p: MMMLoss(impl="reference"),
    "bag fused": lambda p: BagLoss(pooling=p, impl="fused"),
    "bil fused": lambda p: BILLoss(pooling=p, impl="fused"),
    "mmm fused": lambda p: MMMLoss(impl="fused"),
    "sgl fused": lambda p: SGLLoss(pooling=p, mask_weight=0.5, impl="fused"),
    "fused by bag": lambda p: SGLLoss(pooling=p, mask_weight=0.5, normalize="bag", impl="fused"),
}


@pytest.fixture(params=LOSSES)
def make(request, device):
    """A function of the pooling that returns the loss, for every loss."""
    if "fused" in request.param:
        skip_without_kernel(device)
    return LOSSES[request.param]


def value_and_gradient(loss, logits, targets, **call):
    x = logits.clone().requires_grad_()
    value = loss(x, targets, **call)
    value.backward()
    return value.detach(), x.grad


def poolings_of(make):
    """The poolings to test. MMM has a fixed pooling, so that one suffices."""
    return ["mean"] if isinstance(make("mean"), MMMLoss) else POOLINGS


def extreme_bags(limit):
    """Ten bags of 9 instances: constant bags, bags from -limit to limit, and bags of nearly equal logits."""
    return torch.stack(
        [
            torch.full((9,), limit),
            torch.full((9,), -limit),
            torch.linspace(-limit, limit, 9),
            torch.tensor([limit] + [-limit] * 8),
            torch.tensor([-limit] + [limit] * 8),
            torch.zeros(9),
            torch.linspace(-100, -90, 9),
            torch.linspace(90, 100, 9),
            torch.tensor([0.0] * 8 + [1e-7]),
            torch.randn(9) * 3,
        ]
    )


def assert_finite(loss, logits, labels, case):
    value, gradient = value_and_gradient(loss, logits, labels)
    assert value.isfinite(), f"{case}: the loss is {value}"
    assert gradient.isfinite().all(), f"{case}: the gradient is {gradient}"
    return value, gradient


def test_finite_logits_give_a_finite_loss_and_gradient(make, device):
    """For every pooling and dtype: batches with each kind of labels, single bags, and single instances."""
    kinds = {
        "1": torch.ones(10),
        "0": torch.zeros(10),
        "NaN": torch.full((10,), NAN),
        "0, 1": torch.arange(10) % 2,
    }
    for pooling in poolings_of(make):
        loss = make(pooling)
        for dtype, limit in LIMIT.items():
            bags = extreme_bags(limit).to(device, dtype)
            for name, labels in kinds.items():
                case, labels = f"{pooling}, {dtype}, labels {name}", labels.to(device)
                value, gradient = assert_finite(loss, bags, labels, case)
                if name == "NaN":
                    assert value == 0, case
                    assert (gradient == 0).all(), case
        # Some parts of a single bag are empty. One dtype suffices: float16 and bfloat16 are computed in float32.
        bags = extreme_bags(LIMIT[torch.float32]).to(device)
        for i in range(10):
            for label in (0.0, 1.0, NAN):
                labels = torch.full((1,), label, device=device)
                for part in (bags[i : i + 1], bags[i : i + 1, :1]):
                    assert_finite(
                        loss, part, labels, f"{pooling}, bag {i} alone, {part.shape[1]} instances, label {label}"
                    )


def test_logits_up_to_1e15_give_a_finite_loss_and_gradient(make, device):
    for pooling in poolings_of(make):
        loss = make(pooling)
        for limit in (1e8, 1e12, 1e15):
            bags = torch.tensor(
                [[limit] * 5, [-limit] * 5, [limit, limit, -limit, 0.0, 1.0], [-limit, 0.0, 1.0, 2.0, 3.0]]
            )
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for label in (0, 1):
                    labels = torch.full((4,), label, device=device)
                    assert_finite(loss, bags.to(device, dtype), labels, f"{pooling}, {limit}, {dtype}, label {label}")


def test_confident_mistakes_have_the_full_gradient(make, device):
    """No epsilon or clamp reduces the gradient of a confident mistake."""
    certain = torch.full((1, 1), 1e4, device=device)
    value, gradient = value_and_gradient(make("max"), -certain, torch.tensor([1], device=device))
    if "MMM" not in type(make("max")).__name__:
        assert value >= 1e4
        assert gradient.sum() <= -1
    value, gradient = value_and_gradient(make("max"), certain, torch.tensor([0], device=device))
    assert value >= 3e3
    assert gradient.sum() >= 0.5


def test_empty_bags_contribute_nothing(make, device):
    loss, ones = make("mean"), torch.ones(3, 2, device=device)
    offsets = torch.tensor([0, 0, 3, 3], device=device)
    value, gradient = value_and_gradient(loss, torch.randn(3, 2).to(device), ones, offsets=offsets)
    assert value.isfinite()
    assert gradient.isfinite().all()
    nothing = torch.zeros(0, 2, device=device)
    value, gradient = value_and_gradient(loss, nothing, ones[:1], offsets=offsets[:2])
    assert value == 0
    assert gradient.shape == (0, 2)
    value, gradient = value_and_gradient(loss, torch.zeros(3, 2, 0, device=device), ones)
    assert value == 0


def test_infinite_grad_output_leaves_pairs_with_unknown_labels_at_zero(make, device):
    """A loss scale that overflows must not turn the gradient of pairs that contribute nothing into NaN."""
    x = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0))
    x[1, 0, 2] = NAN
    y = torch.tensor([[1, 0], [NAN, 1], [0, NAN]], device=device)
    for pooling in POOLINGS:
        logits = x.to(device).requires_grad_()
        (make(pooling)(logits, y) * math.inf).backward()
        assert (logits.grad[[1, 2], [0, 1]] == 0).all(), pooling


def test_nonfinite_logit_makes_the_loss_and_the_gradient_of_its_pair_nan(make, device):
    """The gradients of all other pairs stay finite."""
    wanted = {"max", "mean", "topk", "generalized_mean"}
    for pooling in [name for name in poolings_of(make) if name in wanted]:
        loss = make(pooling)
        for bad, label, size in itertools.product((NAN, math.inf, -math.inf), (0, 1), (1, 6, 300)):
            logits = torch.randn(3, 2, size).to(device)
            logits[1, 0, size // 2] = bad
            targets = torch.tensor([[1, 0], [label, 1], [0, 1]], device=device)
            for lam in (1.0, 0.0) if isinstance(loss, SGLLoss) else (None,):
                if lam is not None:
                    loss.lam = lam
                case = f"{pooling}, {bad} in a bag of {size}, label {label}, lam {lam}"
                value, gradient = value_and_gradient(loss, logits, targets)
                assert value.isnan(), case
                assert gradient[1, 0].isnan().all(), case
                gradient[1, 0] = 0
                assert gradient.isfinite().all(), case


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("normalize", ["batch", "bag"])
@pytest.mark.parametrize("size", [1, 3, 300])
def test_nan_logit_makes_every_term_nan(impl, device, label, normalize, size):
    logits = torch.randn(2, 1, size).to(device)
    logits[1, 0, size // 2] = NAN
    for mask_weight in (0.0, 0.5):
        loss = SGLLoss(impl=impl, normalize=normalize, mask_weight=mask_weight)
        terms = loss.terms(logits, torch.tensor([[1], [label]], device=device))
        assert all(term.isnan() for term in terms)


def test_bag_with_nan_is_counted_in_the_denominators(impl, device):
    """The gradients of the other bags are those of the batch without the NaN."""
    batch = random_batch([5, 8], classes=1, positives=0.0)
    loss = SGLLoss(impl=impl)
    _, expected = run(loss, batch, device)
    batch.logits[1][0, 2] = NAN
    _, got = run(loss, batch, device)
    torch.testing.assert_close(got[0], expected[0])


def test_the_loss_does_not_modify_its_arguments(impl, device):
    batch = random_batch([5, 8, 1], classes=2)
    logits, call = packed(batch, device)
    labels, offsets = batch.labels.to(device), call["offsets"]
    kept = [x.clone() for x in (logits, labels, offsets)]
    value_and_gradient(SGLLoss(impl=impl), logits.requires_grad_(), labels, offsets=offsets)
    for one, two in zip((logits, labels, offsets), kept, strict=True):
        assert torch.equal(one, two)


def test_backward_is_repeatable_and_linear_in_grad_output(impl, device):
    logits = torch.randn(4, 3, 33).to(device).requires_grad_()
    loss = SGLLoss(impl=impl, pooling="softmax", mask_weight=0.1)(logits, torch.randint(0, 2, (4, 3)).to(device))
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(once, twice)
    for factor in (-3.0, 0.0, 1e-3):
        (scaled,) = torch.autograd.grad(loss, logits, torch.tensor(factor, device=device), retain_graph=True)
        torch.testing.assert_close(scaled, factor * once, rtol=1e-6, atol=1e-9)
    (loss * 2 + loss).backward()
    torch.testing.assert_close(logits.grad, 3 * once)


def test_float16_gradients_are_scaled_before_they_are_rounded(impl, device):
    """The gradients of a large batch underflow in float16. Scaled by 65536, as a GradScaler does, they do not."""
    logits = (torch.randn(8, 4, 4096) - 4).half().to(device).requires_grad_()
    targets = torch.zeros(8, 4, device=device)
    loss = SGLLoss(impl=impl, lam=1.0)(logits, targets)
    assert loss.dtype == torch.float32
    (loss * 65536.0).backward()
    exact = logits.detach().double().requires_grad_()
    (SGLLoss(impl="reference")(exact, targets) * 65536.0).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-10, atol=1e-7)


def test_reference_has_second_derivatives(device):
    logits = torch.randn(2, 1, 5, dtype=torch.float64, device=device, requires_grad=True)
    targets = torch.tensor([[1], [0]], device=device)
    (gradient,) = torch.autograd.grad(SGLLoss(impl="reference")(logits, targets), logits, create_graph=True)
    assert gradient.sum().requires_grad
    torch.autograd.grad(gradient.sum(), logits)


def test_second_derivative_of_the_fused_operator_raises_an_error(fused_device):
    logits = torch.randn(2, 1, 5, dtype=torch.float64, device=fused_device, requires_grad=True)
    loss = SGLLoss(impl="fused")(logits, torch.tensor([[1], [0]], device=fused_device))
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(gradient, expected)
    # a gradient penalty must not be ignored silently
    with pytest.raises(RuntimeError, match=r"second derivative; impl='reference' of a loss, and the method reference"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_bitwise_repeatable_in_deterministic_mode(impl, device, layout):
    """Operations without a deterministic kernel raise an error in this mode, for example torch.median on CUDA."""
    logits, targets = torch.randn(6, 5, 777).to(device), torch.randint(0, 2, (6, 5)).to(device)
    call = {}
    if layout == "packed":
        logits = logits.transpose(1, 2).reshape(-1, 5)
        call["offsets"] = torch.tensor([0, 1, 777, 777, 2000, 2050, 6 * 777], device=device)
    torch.use_deterministic_algorithms(True)
    try:
        for pooling in POOLINGS:
            loss = SGLLoss(impl=impl, pooling=pooling, mask_weight=0.5)
            first = value_and_gradient(loss, logits, targets, **call)
            second = value_and_gradient(loss, logits, targets, **call)
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
@pytest.mark.parametrize("pooling", ["max", "softmax", "linear_softmax"])
@pytest.mark.parametrize("layout", ["long", "longest", "short", "masked", "packed"])
def test_the_number_of_threads_changes_no_bit(layout, pooling):
    """For many short bags and for few long bags: all threads share the work on a long bag."""
    shape = {"long": (3, 2, 40000), "short": (500, 7, 30)}.get(layout, (1, 1, 150_001))
    logits, targets, call = torch.randn(shape), torch.randint(0, 2, shape[:2]), {}
    targets[0, 0] = 1
    if layout == "masked":
        call["mask"] = torch.rand(shape[0], shape[2]) < 0.9
    if layout == "packed":
        logits, targets = torch.randn(150_000, 2), torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
        call["offsets"] = torch.tensor([0, 90, 100, 140_000, 150_000])
    loss = SGLLoss(impl="fused", pooling=pooling, mask_weight=0.5)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            results.append(value_and_gradient(loss, logits, targets, **call))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])
    # and the results equal the reference in float64
    exact = SGLLoss(impl="reference", pooling=pooling, mask_weight=0.5)
    value, gradient = value_and_gradient(exact, logits.double(), targets, **call)
    torch.testing.assert_close(results[0][0].double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1].double(), gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_gradient_equals_the_numerical_gradient(impl, device):
    """M and w must be constant: the bag loss alone (lam = 0), then a batch of negative bags."""
    logits = torch.randn(3, 2, 6, dtype=torch.float64).to(device).requires_grad_()
    targets = torch.tensor([[1, 0], [0, 1], [1, 1]], device=device)
    for pooling in POOLINGS:
        loss = SGLLoss(impl=impl, pooling=pooling)
        loss.lam = 0.0
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, targets), logits)
        loss.lam = 2.0
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, torch.zeros_like(targets)), logits)


def test_loss_without_gradient_has_the_same_value(impl, device):
    logits, targets = torch.randn(3, 2, 9).to(device), torch.randint(0, 2, (3, 2)).to(device)
    loss = SGLLoss(impl=impl)
    wanted = loss(logits.clone().requires_grad_(), targets)
    assert wanted.requires_grad
    assert not loss(logits, targets).requires_grad
    with torch.no_grad():
        assert not loss(logits.clone().requires_grad_(), targets).requires_grad
    with torch.inference_mode():
        assert torch.equal(loss(logits, targets), wanted)
