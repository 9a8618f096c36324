"""What holds for every loss: finite from finite logits, honest about NaN, repeatable, and good with autograd."""

from __future__ import annotations

import math

import pytest
import torch
from batches import packed, random_batch, run
from conftest import needs_kernel

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss

NAN = math.nan
POOLINGS = ["max", "mean", "mean_logits", "softmax", "linear_softmax", "lse", "noisy_or", "generalized_mean"]
LIMIT = {torch.float32: 1e4, torch.float64: 1e4, torch.bfloat16: 1e4, torch.float16: 6e4}


def losses():
    yield "sgl reference", lambda p: SGLLoss(pooling=p, mask_weight=0.5, impl="reference")
    yield "sgl by bag", lambda p: SGLLoss(pooling=p, mask_weight=0.5, normalize="bag", impl="reference")
    yield "bag", lambda p: BagLoss(pooling=p)
    yield "bil", lambda p: BILLoss(pooling=p)
    yield "mmm", lambda p: MMMLoss()
    yield "sgl fused", lambda p: SGLLoss(pooling=p, mask_weight=0.5, impl="fused")
    yield "fused by bag", lambda p: SGLLoss(pooling=p, mask_weight=0.5, normalize="bag", impl="fused")


every_loss = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=needs_kernel if "fused" in name else ()) for name, make in losses()]
)


def value_and_gradient(loss, logits, targets, **call):
    x = logits.clone().requires_grad_()
    value = loss(x, targets, **call)
    value.backward()
    return value.detach(), x.grad


@every_loss
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", list(LIMIT))
def test_finite_from_finite_logits(make, pooling, dtype):
    limit = LIMIT[dtype]
    loss = make(pooling)
    bags = torch.stack(
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
    ).to(dtype)
    for labels in (torch.ones(10), torch.zeros(10), torch.full((10,), NAN), torch.arange(10) % 2):
        value, gradient = value_and_gradient(loss, bags, labels)
        assert value.isfinite()
        assert gradient.isfinite().all()
        if labels.isnan().all():
            assert value == 0
            assert (gradient == 0).all()
        for i in range(10):  # and alone, one bag or one instance
            for part in (bags[i : i + 1], bags[i : i + 1, :1]):
                value, gradient = value_and_gradient(loss, part, labels[i : i + 1])
                assert value.isfinite()
                assert gradient.isfinite().all()


@every_loss
def test_wrong_and_certain_learns_at_full_slope(make):
    """Confident mistakes keep their gradient: no epsilon, no clamp."""
    value, gradient = value_and_gradient(make("max"), torch.full((1, 1), -1e4), torch.tensor([1]))
    if "MMM" not in type(make("max")).__name__:
        assert value >= 1e4
        assert gradient.sum() <= -1
    value, gradient = value_and_gradient(make("max"), torch.full((1, 1), 1e4), torch.tensor([0]))
    assert value >= 3e3
    assert gradient.sum() >= 0.5


@every_loss
def test_empty_bags_and_empty_batches_of_instances(make):
    offsets = torch.tensor([0, 0, 3, 3])
    value, gradient = value_and_gradient(make("mean"), torch.randn(3, 2), torch.ones(3, 2), offsets=offsets)
    assert value.isfinite()
    assert gradient.isfinite().all()
    nothing = torch.zeros(0, 2)
    value, gradient = value_and_gradient(make("mean"), nothing, torch.ones(1, 2), offsets=torch.tensor([0, 0]))
    assert value == 0
    assert gradient.shape == (0, 2)
    value, gradient = value_and_gradient(make("mean"), torch.zeros(2, 3, 0), torch.ones(2, 3))
    assert value == 0


@every_loss
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("pooling", ["max", "mean", "generalized_mean"])
@pytest.mark.parametrize("size", [1, 6, 300])
def test_a_bad_logit_is_never_hidden(make, bad, label, pooling, size):
    logits = torch.randn(3, 2, size)
    logits[1, 0, size // 2] = bad
    targets = torch.tensor([[1, 0], [label, 1], [0, 1]])
    loss = make(pooling)
    for lam in (1.0, 0.0):
        if isinstance(loss, SGLLoss):
            loss.lam = lam
        value, gradient = value_and_gradient(loss, logits, targets)
        assert value.isnan()
        assert gradient[1, 0].isnan().all()
        gradient[1, 0] = 0
        assert gradient.isfinite().all()


def test_a_bad_bag_still_counts(impl):
    """The gradients of the others are those of a batch in which it is negative (y = 0) or ambiguous (y = 1)."""
    batch = random_batch([5, 8], classes=1, positives=0.0)
    loss = SGLLoss(impl=impl)
    _, expected = run(loss, batch)
    batch.logits[1][0, 2] = NAN
    _, got = run(loss, batch)
    torch.testing.assert_close(got[0], expected[0])


def test_the_input_is_not_written_to(impl):
    batch = random_batch([5, 8, 1], classes=2)
    logits, call = packed(batch)
    kept = [x.clone() for x in (logits, batch.labels, call["offsets"])]
    value_and_gradient(SGLLoss(impl=impl), logits.requires_grad_(), batch.labels, **call)
    for one, two in zip((logits, batch.labels, call["offsets"]), kept, strict=True):
        assert torch.equal(one, two)


def test_backward_twice_and_any_grad_output(impl):
    logits = torch.randn(4, 3, 33, requires_grad=True)
    loss = SGLLoss(impl=impl, pooling="softmax", mask_weight=0.1)(logits, torch.randint(0, 2, (4, 3)))
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(once, twice)
    for factor in (-3.0, 0.0, 1e-3):
        (scaled,) = torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(scaled, factor * once, rtol=1e-6, atol=1e-9)
    (loss * 2 + loss).backward()
    torch.testing.assert_close(logits.grad, 3 * once)


def test_half_gradients_are_scaled_before_they_are_rounded(impl):
    """The gradients of a big batch underflow in float16; scaled by a grad scaler's 65536 they do not."""
    logits = (torch.randn(8, 4, 4096) - 4).half().requires_grad_()
    targets = torch.zeros(8, 4)
    loss = SGLLoss(impl=impl, lam=1.0)(logits, targets)
    assert loss.dtype == torch.float32
    (loss * 65536.0).backward()
    exact = logits.detach().double().requires_grad_()
    (SGLLoss(impl="reference")(exact, targets) * 65536.0).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-10, atol=1e-7)


def test_second_derivative_is_refused_by_the_fused_path_only():
    logits = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1], [0]])
    (gradient,) = torch.autograd.grad(SGLLoss(impl="reference")(logits, targets), logits, create_graph=True)
    assert gradient.sum().requires_grad
    torch.autograd.grad(gradient.sum(), logits)


@needs_kernel
def test_second_derivative_of_the_fused_path_is_an_error():
    logits = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=True)
    loss = SGLLoss(impl="fused")(logits, torch.tensor([[1], [0]]))
    (expected,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(gradient, expected)
    # a gradient penalty, which must not be left out in silence
    with pytest.raises(RuntimeError, match=r"second derivative.*impl='reference'"):
        (loss + gradient.square().sum()).backward()


def test_bitwise_repeatable_in_deterministic_mode(impl):
    logits, targets = torch.randn(6, 5, 777), torch.randint(0, 2, (6, 5))
    torch.use_deterministic_algorithms(True)
    try:
        for pooling in POOLINGS:
            loss = SGLLoss(impl=impl, pooling=pooling)
            first = value_and_gradient(loss, logits, targets)
            second = value_and_gradient(loss, logits, targets)
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 2, 40000), (500, 7, 30)])
def test_the_number_of_threads_changes_nothing(shape):
    logits, targets = torch.randn(shape), torch.randint(0, 2, shape[:2])
    loss = SGLLoss(impl="fused", pooling="softmax", mask_weight=0.5)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            results.append(value_and_gradient(loss, logits, targets))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_gradcheck(impl):
    """Numeric against analytic where M and w are constant anyway: bag loss and negative bags; terms of one sign."""
    logits = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    for pooling in POOLINGS:
        loss = SGLLoss(impl=impl, pooling=pooling)
        targets = torch.tensor([[1, 0], [0, 1], [1, 1]])
        loss.lam = 0.0
        assert torch.autograd.gradcheck(lambda x, loss=loss, y=targets: loss(x, y), logits)
        loss.lam = 2.0
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, torch.zeros(3, 2)), logits)


def test_no_gradient_wanted(impl):
    logits, targets = torch.randn(3, 2, 9), torch.randint(0, 2, (3, 2))
    loss = SGLLoss(impl=impl)
    wanted = loss(logits.clone().requires_grad_(), targets)
    assert wanted.requires_grad
    assert not loss(logits, targets).requires_grad
    with torch.no_grad():
        assert not loss(logits.clone().requires_grad_(), targets).requires_grad
    with torch.inference_mode():
        assert torch.equal(loss(logits, targets), wanted)
