"""Batches split over several processes: loss and gradient equal those of one process with the whole batch."""

from __future__ import annotations

import copy
import itertools
import math
import os

import pytest
import torch
import torch.distributed as dist
from batches import external_pooling
from conftest import needs_kernel
from ranks import start_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, _fused
from sgl_ops.functional import sgl_loss

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

CLASSES, LENGTH = 3, 6
SPLIT = [4, 1, 2]  # bags of each rank: unequal numbers; bag 4 has no known label. test_rank_paths.py has two ranks.

LOSSES = {
    f"{impl}, {name}": (SGLLoss, {"impl": impl, **options})
    for impl in ("reference", *(["fused"] if "cpu" in _fused.DEVICES else []))
    for name, options in {
        "max": {},
        "softmax, lam": {"pooling": "softmax", "lam": 20.0, "mask_weight": 0.5},
        "per bag": {"normalize": "bag", "mask_weight": 0.5},
        "weights": {"class_weight": [1.0, 0.5, 2.0], "pos_weight": [2.0, 1.0, 3.0]},
        "external pooling": {"pooling": external_pooling()},
        "topk": {"pooling": "topk"},
    }.items()
} | {
    f"{impl}, {name}": (kind, {"impl": impl, **options})
    for impl in ("reference", *(["fused"] if "cpu" in _fused.DEVICES else []))
    for name, kind, options in (
        ("bag", BagLoss, {"pos_weight": [2.0, 1.0, 3.0]}),
        ("bil", BILLoss, {}),
        ("mmm", MMMLoss, {}),
    )
}
CASES = list(itertools.product(LOSSES, ("padded", "packed")))
MAX = [case for case in CASES if case[0].endswith(", max") and case[1] == "padded"]  # of each implementation


def batch(layout):
    """Seven bags; padded (7, C, L) with a mask, or packed (T, C): (logits, targets, mask, lengths)."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, CLASSES, LENGTH, generator=generator, dtype=torch.float64)
    targets = (torch.rand(7, CLASSES, generator=generator) < 0.5).double()
    targets[1, 2] = math.nan
    targets[4] = math.nan
    lengths = torch.tensor([6, 1, 4, 3, 6, 2, 5])
    mask = torch.arange(LENGTH) < lengths[:, None]
    if layout == "packed":
        logits = logits.transpose(1, 2)[mask]
    return logits, targets, mask, lengths


def arguments_of_bags(layout, first, last):
    """Arguments of the loss for the bags in range(first, last): logits, targets, keywords."""
    logits, targets, mask, lengths = batch(layout)
    if layout == "padded":
        return logits[first:last], targets[first:last], {"mask": mask[first:last]}
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    rows = slice(int(offsets[first]), int(offsets[last]))
    return logits[rows], targets[first:last], {"offsets": offsets[first : last + 1] - offsets[first]}


def loss_of(name, group):
    kind, options = LOSSES[name]
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in options.items() if isinstance(v, list)}
    return kind(**(options | tensors), process_group=group).double()


def step(name, layout, first, last, group, poison=None, loss=None):
    logits, targets, keywords = arguments_of_bags(layout, first, last)
    logits = logits.clone()
    if poison is not None and len(logits):
        logits[0, 0] = poison
    logits.requires_grad_()
    value = (loss_of(name, group) if loss is None else loss)(logits, targets, **keywords)
    value.backward()
    return value.detach(), logits.grad


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(12).reshape(3, 4) / 7 - 0.6)
            self.linear.bias.zero_()

    def forward(self, x):
        return self.linear(x).transpose(1, 2)


def network_input():
    return torch.randn(7, LENGTH, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients_of(model, first, last, group):
    _, targets, mask, _ = batch("padded")
    loss = SGLLoss(lam=3.0, mask_weight=0.1, process_group=group)
    loss(model(network_input()[first:last]), targets[first:last], mask=mask[first:last]).backward()
    return [p.grad for p in model.parameters()]


def rank(number, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=world)
    try:
        group = dist.group.WORLD
        first = sum(SPLIT[:number])
        last = first + SPLIT[number]
        results = {case: step(*case, first, last, group) for case in CASES}
        # a group that contains rank 0 only
        first_rank_only = dist.new_group([0])
        for case in MAX:
            poison = math.nan if number == world - 1 else None
            results["poisoned", case] = step(*case, first, last, group, poison=poison)
            results["terms", case] = list(loss_of(case[0], group).terms(*arguments_of_bags("padded", first, last)[:2]))
            results["alone", case] = step(*case, 0, 7, first_rank_only) if number == 0 else None
            torch.compiler.reset()
            compiled = torch.compile(loss_of(case[0], group), backend="aot_eager", fullgraph=True)
            results["compiled", case] = step(*case, first, last, group, loss=compiled)
            results["copied", case] = step(*case, first, last, group, loss=copy.deepcopy(loss_of(case[0], group)))
        results["ddp"] = gradients_of(DistributedDataParallel(Network()), first, last, group)
        torch.save(results, f"{folder}/rank{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of every rank."""
    world = len(SPLIT)
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(rank, world, os.fspath(folder), count=world)
    return [torch.load(folder / f"rank{k}.pt", weights_only=True) for k in range(world)]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_ranks_equal_one_process(ranks, name, layout):
    loss, gradient = step(name, layout, 0, 7, None)
    assert gradient.abs().sum() > 0
    for found, _ in (of_rank[name, layout] for of_rank in ranks):
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    together = torch.cat([of_rank[name, layout][1] for of_rank in ranks]) / len(ranks)
    torch.testing.assert_close(together, gradient, rtol=1e-12, atol=1e-15)
    # The loss of the first rank's bags alone differs: the check above fails if the group is ignored.
    alone = step(name, layout, 0, SPLIT[0], None)[0]
    assert abs(alone - loss) > 1e-6


@pytest.mark.parametrize("case", MAX, ids=str)
def test_terms_of_ranks_equal_terms_of_one_process(ranks, case):
    expected = loss_of(case[0], None).terms(*arguments_of_bags("padded", 0, 7)[:2])
    for of_rank in ranks:
        torch.testing.assert_close(of_rank["terms", case], [t.detach() for t in expected], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", MAX, ids=str)
def test_nan_on_one_rank_makes_every_loss_nan_and_no_other_gradient(ranks, case):
    _, broken = ranks[-1]["poisoned", case]
    assert all(bool(of_rank["poisoned", case][0].isnan()) for of_rank in ranks)
    assert broken[0, 0].isnan().any()
    assert broken[0, 1:].isfinite().all()
    assert all(of_rank["poisoned", case][1].isfinite().all() for of_rank in ranks[:-1])


@pytest.mark.parametrize("case", MAX, ids=str)
@pytest.mark.parametrize("how", ["compiled", "copied"])
def test_compiled_or_copied_loss_gives_the_same_result(ranks, case, how):
    for of_rank in ranks:
        torch.testing.assert_close(of_rank[how, case], of_rank[case], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", MAX, ids=str)
def test_group_of_one_rank_equals_one_process(ranks, case):
    loss, gradient = step(*case, 0, 7, None)
    torch.testing.assert_close(ranks[0]["alone", case], (loss, gradient), rtol=1e-12, atol=1e-15)


def test_distributed_data_parallel_gets_the_gradient_of_one_process(ranks):
    expected = gradients_of(Network(), 0, 7, None)
    for of_rank in ranks:
        torch.testing.assert_close(of_rank["ddp"], expected, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# The operators on every device, in one process


@needs_kernel
@pytest.mark.parametrize("kernels", ["cpu", "emulated", pytest.param("cuda", id="cuda")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_bag", [False, True])
def test_sums_of_two_parts_finalize_to_the_loss_of_the_batch(request, kernels, dtype, per_bag):
    if kernels == "emulated":
        request.getfixturevalue("emulated")
    elif kernels == "cuda" and not (torch.cuda.is_available() and "cuda" in _fused.DEVICES):
        pytest.skip("there is no GPU, or no kernel for it")
    ops = torch.ops.sgl_ops_emulated if kernels == "emulated" else torch.ops.sgl_ops
    device = "cuda" if kernels == "cuda" else "cpu"
    logits = torch.randn(40, CLASSES, 90, dtype=dtype).to(device)
    targets = (torch.rand(40, CLASSES) < 0.4).float().to(device)
    settings = (0.3, 2.0, 0.5, 4, 1.0, per_bag, True, True, 0)

    def sums_of(part):
        return ops.sgl_forward_sums(logits[part], targets[part], None, None, None, None, *settings)

    total, parts, saved = ops.sgl_forward(logits, targets, None, None, None, None, *settings)
    *_, saved_a, a = sums_of(slice(0, 15))
    *_, saved_b, b = sums_of(slice(15, 40))
    counts = a.view(torch.int64)[:4] + b.view(torch.int64)[:4]
    known = (targets == targets).sum()
    assert counts[0] == known
    assert counts[1:].sum() == known * 90
    sums = torch.cat((counts.view(torch.float64), a[4:] + b[4:]))
    tolerance = {"rtol": 1e-6 if dtype == torch.float32 else 1e-12, "atol": 0}
    for saved_part, first in ((saved_a, 0), (saved_b, 15)):
        pairs = saved_part.shape[0] - 1
        assert torch.equal(saved_part[:-1], saved[first * CLASSES :][:pairs])
        found = ops.sgl_finalize(sums, saved_part, 2.0, 0.5, per_bag, 3.0)
        torch.testing.assert_close(found, (total, parts), **tolerance)
        torch.testing.assert_close(saved_part[-1], 3 * saved[-1], **tolerance)
        assert torch.equal(saved_part[:-1], saved[first * CLASSES :][:pairs])  # the rows of the pairs are unchanged


@needs_kernel
def test_sgl_finalize_rejects_wrong_sums():
    sums, saved = torch.zeros(10, dtype=torch.float64), torch.zeros(3, _fused.CONSTANTS["saved_columns"])
    torch.library.opcheck(torch.ops.sgl_ops.sgl_finalize.default, (sums, saved, 1.0, 0.0, False, 2.0))
    for wrong in ((sums.float(), saved), (sums[:9], saved), (sums, saved[:, :5]), (sums, saved.half())):
        with pytest.raises(RuntimeError, match="not what sgl_forward_sums gave"):
            torch.ops.sgl_ops.sgl_finalize(*wrong, 1.0, 0.0, False, 2.0)


@pytest.mark.parametrize("kind", [SGLLoss, BagLoss, BILLoss, MMMLoss])
def test_invalid_process_group_raises_type_error(kind):
    with pytest.raises(TypeError, match="process_group: expected None or"):
        kind(process_group="world")
    with pytest.raises(TypeError, match="process_group"):
        sgl_loss(torch.zeros(1, 2), torch.ones(1), process_group=2)
