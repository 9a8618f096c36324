"""The alternative kernels of csrc/cuda/exchange.cuh, emulated, give the gradient of the default kernels."""

from __future__ import annotations

import subprocess

import pytest
import torch
from build_emulated import build_traffic
from conftest import ROOT, needs_kernel

from sgl_ops import SGLLoss

MAX, SOFTMAX = 1, 4
UNWEIGHTED = (None, None)


@pytest.fixture
def kernels(emulated):
    yield emulated
    emulated.set_schedule(0)
    emulated.set_multiprocessors(3)


def settings(pooling: int = MAX, per_bag: bool = False) -> tuple[object, ...]:
    delta_l, lam, mask_weight = 0.3, 1.5, 0.5
    return delta_l, lam, mask_weight, pooling, 1.0, per_bag, True, True


def ops_for(logits):
    return torch.ops.sgl_ops if logits.is_cuda else torch.ops.sgl_ops_emulated


def default_kernels(logits, targets, mask, weights, options, grad_output):
    ops = ops_for(logits)
    total, parts, saved = ops.sgl_forward(logits, targets, mask, None, *weights, *options, 0)
    delta_l, _, _, pooling, parameter, _, rescale, _ = options
    grad = ops.sgl_backward(
        grad_output, logits, mask, None, weights[1], saved, delta_l, pooling, parameter, rescale
    )  # fmt: skip
    return total, parts, grad


def exchange_kernels(logits, targets, mask, weights, options, grad_output):
    ops = ops_for(logits)
    total, parts, grad = ops.sgl_exchange(logits, targets, mask, *weights, *options)
    ops.sgl_scale(grad_output, grad)
    return total, parts, grad


# All, some or no rows stay in shared memory, which has room for 8192 numbers per block.
SHAPES = [(40, 3, 9), (7, 2, 700), (20, 2, 2500), (2, 1, 9001)]


@needs_kernel
@pytest.mark.parametrize("schedule", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_bitwise_equal_to_the_default_kernels(kernels, shape, schedule):
    kernels.set_schedule(schedule)
    logits, targets = torch.randn(shape), (torch.rand(shape[:2]) < 0.5).float()
    targets[0, 0] = float("nan")
    weights = torch.rand(shape[1]), torch.rand(shape[1]) + 0.5
    maps = logits.unflatten(2, (-1, 1)).contiguous(memory_format=torch.channels_last)
    for x in (logits, maps):
        for options in (settings(), settings(SOFTMAX, per_bag=True)):
            one = torch.tensor(1.0)
            expected, got = (f(x, targets, None, weights, options, one) for f in (default_kernels, exchange_kernels))
            torch.testing.assert_close(got[:2], expected[:2], rtol=1e-6, atol=0)  # sums over another number of blocks
            assert torch.equal(got[2], expected[2])
            assert got[2].stride() == x.stride()


@needs_kernel
def test_masked_instances_give_the_gradient_of_the_default_kernels(kernels):
    logits, targets, mask = torch.randn(6, 2, 50), torch.tensor([0.0, 1.0]).expand(6, 2), torch.rand(6, 50) < 0.5
    logits = torch.where(mask[:, None], logits, float("nan"))
    arguments = logits, targets, mask, UNWEIGHTED, settings(), torch.tensor(1.0)
    expected, got = (f(*arguments) for f in (default_kernels, exchange_kernels))
    assert torch.equal(got[2], expected[2])


@needs_kernel
@pytest.mark.parametrize("grad_output", [-3.0, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("length", [64, 61])
def test_sgl_scale_multiplies_the_gradient_in_place(kernels, grad_output, length):
    logits, targets = torch.randn(9, 3, length), (torch.rand(9, 3) < 0.5).float()
    targets[4, 1] = float("nan")
    arguments = logits, targets, None, UNWEIGHTED, settings(SOFTMAX)
    unscaled = exchange_kernels(*arguments, torch.tensor(1.0))[2]
    got = exchange_kernels(*arguments, torch.tensor(grad_output))[2]
    expected = torch.where(unscaled == 0, unscaled, unscaled * grad_output)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got[4, 1].eq(0).all()


@needs_kernel
def test_the_order_of_blocks_changes_no_bit(kernels):
    logits, targets = torch.randn(30, 2, 700), (torch.rand(30, 2) < 0.5).float()
    results = []
    for schedule in (0, 1, 5):
        kernels.set_schedule(schedule)
        results.append(exchange_kernels(logits, targets, None, UNWEIGHTED, settings(), torch.tensor(2.0)))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@needs_kernel
def test_float64_raises_an_error(emulated):
    logits = torch.zeros(2, 1, 3).double()
    with pytest.raises(RuntimeError, match="expected float32"):
        exchange_kernels(logits, torch.ones(2, 1), None, UNWEIGHTED, settings(), torch.tensor(1.0))


@needs_kernel
def test_loss_module_of_the_benchmark_gives_the_loss_and_gradient(kernels, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from exchange import ExchangedLoss

    logits, targets = torch.randn(9, 3, 40, requires_grad=True), (torch.rand(9, 3) < 0.5).float()
    options = {
        "delta_l": 0.2,
        "lam": 2.0,
        "pooling": "lse",
        "normalize": "bag",
        "mask_weight": 0.5,
        "pos_weight": [2, 1, 3],
    }
    results = []
    for loss in (SGLLoss(**options), ExchangedLoss(SGLLoss(**options), torch.ops.sgl_ops_emulated)):
        logits.grad = None
        total = loss(logits, targets)
        (2 * total).backward()
        results.append((total.detach(), logits.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: torch.cuda.is_available() is False")
@pytest.mark.skipif(not hasattr(torch.ops.sgl_ops, "sgl_exchange"), reason="built without SGL_OPS_EXCHANGE=1")
@pytest.mark.parametrize("shape", [*SHAPES, (64, 14, 4096)])
def test_gpu_gives_the_gradient_of_the_default_kernels(shape):
    logits, targets = torch.randn(shape, device="cuda"), (torch.rand(shape[:2], device="cuda") < 0.5).float()
    for grad_output in (1.0, -3.0):
        arguments = logits, targets, None, UNWEIGHTED, settings(SOFTMAX), torch.tensor(grad_output, device="cuda")
        expected, got, again = (f(*arguments) for f in (default_kernels, exchange_kernels, exchange_kernels))
        torch.testing.assert_close(got[:2], expected[:2], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-6 * expected[2].abs().max().item())
        assert all(map(torch.equal, got, again))


@pytest.fixture(scope="module")
def traffic():
    program = build_traffic()

    def run(*arguments: int) -> dict[str, list[float]]:
        """For each kernel: loads of logits, loads and stores of the gradient, relative to the size of the logits."""
        output = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
        lines = map(str.split, output.splitlines())
        return {name: list(map(float, numbers)) for name, *numbers in lines}

    return run


@pytest.mark.parametrize(("bags", "positions", "positives"), [(12, 256, 0), (12, 256, 6), (10, 2500, 0), (10, 2500, 5)])
def test_memory_traffic_of_rows_in_shared_memory(traffic, bags, positions, positives):
    multiprocessors = 3
    loads = traffic(bags, 1, positions, positives, multiprocessors)
    assert loads["exchange"] == [1, 0, 1]
    assert loads["scale_by_1"] == [0, 0, 0]
    assert loads["scale"] == [0, 1, 1]
    # the forward kernel reads the rows of positive pairs several times; the later reads hit the cache
    assert loads["forward"] == [1, 0, 0] if positives == 0 else loads["forward"][0] > 4
    assert loads["backward"] == [1, 0, 1]


def test_memory_traffic_of_rows_that_exceed_shared_memory(traffic):
    # 12 blocks keep 3 rows of 2500 each; the other 64 of 100 rows are loaded twice
    assert traffic(100, 1, 2500, 0, 3)["exchange"] == [1.64, 0, 1]
