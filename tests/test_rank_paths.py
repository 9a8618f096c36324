"""Ranks of a process group on different code paths call the same collectives, so that no rank waits forever."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from batches import settled
from ranks import start_ranks
from test_guide import soft_guide

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, _fused
from sgl_ops.pooling import AutoPooling

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

IMPLS = ["reference", *(["fused"] if "cpu" in _fused.DEVICES else [])]
SPLIT = (slice(0, 4), slice(4, 7))


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    # numbers that every dtype represents exactly
    x = (2 * torch.randn(7, 2, 8, generator=generator)).to(torch.bfloat16)
    y = (torch.rand(7, 2, generator=generator) < 0.5).double()
    y[5, 0] = torch.nan
    return settled(x.double()).to(torch.bfloat16).to(dtype), y


def loss_of(group, kind=SGLLoss, **options):
    if kind is SGLLoss:
        options = {"lam": 2.0, "mask_weight": 0.5, **options}
    return kind(process_group=group, **options)


def backward(loss, x, y):
    x.requires_grad_()
    value = loss(x, y)
    value.backward()
    return value, x.grad


def hooked(loss, x, y):
    loss.pooling.register_forward_hook(lambda *_: None)
    return backward(loss, x, y)


def without_gradient(loss, x, y):
    return loss(x, y), None


def under_no_grad(loss, x, y):
    with torch.no_grad():
        return loss(x.requires_grad_(), y), None


def by_terms(loss, x, y):
    x.requires_grad_()
    terms = loss.terms(x, y)
    terms.total.backward()
    return terms.total, x.grad


def compiled(loss, x, y):
    torch._dynamo.reset()
    return backward(torch.compile(loss, fullgraph=True, backend="aot_eager"), x, y)


def by_torch_func(loss, x, y):
    grad, value = torch.func.grad_and_value(loss)(x, y)
    return value, grad


def in_forward_mode(loss, x, y):
    primal, _ = torch.func.jvp(lambda x: loss(x, y), (x,), (torch.ones_like(x),))
    return primal, None


def without_extension(loss, x, y):
    devices, _fused.DEVICES = _fused.DEVICES, frozenset()
    try:
        return backward(loss, x, y)
    finally:
        _fused.DEVICES = devices


def learned(loss, x, y):
    loss.lam = torch.tensor(2.0, requires_grad=True)
    return backward(loss, x, y)


#: The path of one rank, while the other one uses ``backward`` with the defaults: (function, options, dtype).
FACTS = {
    **{f"impl {impl}": (backward, {"impl": impl}, torch.float64) for impl in IMPLS},
    "float32": (backward, {}, torch.float32),
    "bfloat16": (backward, {}, torch.bfloat16),
    "float32 by the reference": (backward, {"impl": "reference"}, torch.float32),
    "no extension": (without_extension, {}, torch.float64),
    "a hook on the pooling": (hooked, {}, torch.float64),
    "no gradient": (without_gradient, {}, torch.float64),
    "no_grad": (under_no_grad, {}, torch.float64),
    "terms": (by_terms, {}, torch.float64),
    "compiled": (compiled, {}, torch.float64),
    "compiled by the reference": (compiled, {"impl": "reference"}, torch.float64),
    "torch.func": (by_torch_func, {}, torch.float64),
    "forward mode": (in_forward_mode, {}, torch.float64),
    "a learned weight": (learned, {}, torch.float64),
    "check": (backward, {"check": True}, torch.float64),
}
#: Settings that differ between ranks. This is a user error: the values may differ, but no rank may wait forever.
SETTINGS = {
    "normalize": {"normalize": "bag"},
    "pooling": {"pooling": "softmax"},
    "a pooling outside the operator": {"pooling": AutoPooling(2)},
    "no weighting": {"weighted": False},
    "no penalty": {"mask_weight": 0.0},
}
#: The compared losses, in another dtype on each rank.
COMPARED = {"bag": BagLoss, "bil": BILLoss, "mmm": MMMLoss}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=150)
    )
    group, results = dist.group.WORLD, {}
    for name, (function, options, dtype) in FACTS.items():
        for odd in (0, 1):
            torch.save(name, f"{folder}/last{rank}.pt")  # the last path of each rank, to debug a deadlock
            function, options, dtype = FACTS[name] if rank == odd else (backward, {}, torch.float64)
            x, y = batch(dtype)
            value, grad = function(loss_of(group, **options), x[SPLIT[rank]], y[SPLIT[rank]])
            results[name, odd] = value.detach().double(), None if grad is None else grad.double()
    for name, options in SETTINGS.items():
        x, y = batch()
        loss = loss_of(group, **(options if rank == 1 else {})).double()
        results[name] = backward(loss, x[SPLIT[rank]], y[SPLIT[rank]])[0].detach()
    for name, kind in COMPARED.items():
        x, y = batch(torch.float32 if rank else torch.float64)
        value, grad = backward(loss_of(group, kind), x[SPLIT[rank]], y[SPLIT[rank]])
        results[name] = value.detach().double(), grad.double()
    x, y = batch()
    results["guide"] = backward(loss_of(group, guide=soft_guide), x[SPLIT[rank]], y[SPLIT[rank]])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, os.fspath(folder), count=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def check(found, kind):
    """Checks that value and gradient of each rank equal those of one process."""
    x, y = batch()
    value, grad = backward(loss_of(None, kind), x, y)
    for rank, (of_rank, grad_of_rank) in enumerate(found):
        torch.testing.assert_close(of_rank, value.detach(), rtol=1e-6, atol=0)
        if grad_of_rank is not None:
            tolerance = 1e-2 if grad_of_rank.abs().max() == grad_of_rank.bfloat16().double().abs().max() else 1e-5
            torch.testing.assert_close(grad_of_rank / 2, grad[SPLIT[rank]], rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("odd", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("name", FACTS)
def test_ranks_on_different_paths_give_the_result_of_one_process(ranks, name, odd):
    check([of_rank[name, odd] for of_rank in ranks], SGLLoss)


def test_custom_guide_counts_over_all_ranks(ranks):
    x, y = batch()
    value, grad = backward(loss_of(None, guide=soft_guide), x, y)
    for rank, of_rank in enumerate(ranks):
        found, part = of_rank["guide"]
        torch.testing.assert_close(
            (found.detach(), part / 2), (value.detach(), grad[SPLIT[rank]]), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", COMPARED)
def test_other_losses_in_two_dtypes_give_the_result_of_one_process(ranks, name):
    check([of_rank[name] for of_rank in ranks], COMPARED[name])


def test_vmap_with_a_process_group_raises_value_error(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, y = batch()
        for kind in (SGLLoss, *COMPARED.values()):
            loss = loss_of(dist.group.WORLD, kind)
            with pytest.raises(ValueError, match=r"process_group: not supported under torch\.func\.vmap"):
                torch.func.vmap(loss, in_dims=(0, None))(torch.stack((x, x + 1)), y)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", SETTINGS)
def test_different_settings_do_not_block_a_rank(ranks, name):
    values = [float(of_rank[name]) for of_rank in ranks]
    assert all(value > 0 for value in values)
    assert all(value < 100 for value in values)
