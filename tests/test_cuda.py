"""Tests that need a GPU: streams, graphs, synchronization, launches, memory, sizes.

The other files test values, guarantees, layouts and the dispatcher's checks on every device.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from batches import Batch, packed, padded, random_batch, run, settled
from conftest import NO_CUDA_KERNEL, NO_KERNEL
from hypothesis import given, settings
from hypothesis import strategies as st
from test_values import UNITS, working_eps
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss
from sgl_ops._fused import CODES

if NO_CUDA_KERNEL:
    pytest.skip(NO_CUDA_KERNEL, allow_module_level=True)

GPU = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ["max", "mean", "mean_logits", "softmax", "linear_softmax", "lse", "noisy_or"]
SLOW = 10**9  # GPU cycles: about half a second


def test_every_pooling_of_the_operator_is_tested():
    assert len(NAMES) == len(CODES)


def problem(shape=(6, 5, 777), dtype=torch.float32, seed=0):
    """(logits, targets) on the GPU, about half of the labels positive."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * 3).to(dtype)
    return logits.to(GPU), torch.randint(0, 2, shape[:2], generator=g).float().to(GPU)


def layouts(logits, targets):
    """Dense (N, C, L) bags in each layout: (name, logits, targets, call, function from gradient to (N, C, L))."""
    n, classes, length = logits.shape
    yield "dense", logits, targets, {}, lambda grad: grad
    rows = logits.transpose(1, 2).reshape(-1, classes)
    offsets = torch.arange(0, n * length + 1, length, device=logits.device)
    yield "packed", rows, targets, {"offsets": offsets}, lambda grad: grad.view(n, length, classes).transpose(1, 2)
    wide = torch.full((n, classes, 2 * length + 1), torch.nan, dtype=logits.dtype, device=logits.device)
    wide[..., 1::2] = logits
    mask = torch.zeros(n, 2 * length + 1, dtype=torch.bool, device=logits.device)
    mask[:, 1::2] = True
    yield "masked", wide, targets, {"mask": mask}, lambda grad: grad[..., 1::2]


def value_and_gradient(loss, logits, targets, **call):
    x = logits.detach().clone().requires_grad_()
    value = loss(x, targets, **call)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def same_bits(got, expected):
    return all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def exact(logits, targets, **options):
    """Value and gradient of dense bags, from the reference in float64 on the CPU."""
    return value_and_gradient(SGLLoss(impl="reference", **options), logits.cpu().double(), targets.cpu())


def assert_exact(got, expected, dtype, units=UNITS):
    """Compare whole tensors (…, L) with the tolerance of test_values.py."""
    eps, limits = units * working_eps(dtype), torch.finfo(dtype)
    value, gradient = (t.double().cpu() for t in got)
    assert abs(value - expected[0]) <= eps * abs(expected[0])
    want = expected[1]
    rounding = (limits.eps * want.abs() + limits.smallest_normal * limits.eps) / 2
    assert ((gradient - want).abs() <= rounding + eps * want.abs().amax(-1, keepdim=True)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Sizes and alignments


@pytest.mark.parametrize("options", [{}, {"pooling": "softmax", "mask_weight": 0.5}], ids=["max", "softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1000, 4096, 4097, 8193, 100_000, 1_000_000])
def test_every_bag_size_gives_the_reference(size, dtype, options):
    logits = settled((torch.randn(2, 2, size) * 3).to(dtype))
    targets = torch.tensor([[1, 0], [0, 1]])
    expected = exact(logits, targets, **options)
    loss = SGLLoss(impl="fused", **options)
    for name, x, y, call, dense in layouts(logits.to(GPU), targets.to(GPU)):
        value, gradient = value_and_gradient(loss, x, y, **call)
        assert_exact((value, dense(gradient)), expected, dtype)
        if name == "masked":
            assert (gradient[..., ::2] == 0).all()


@pytest.mark.parametrize("normalize", ["batch", "bag"])
@pytest.mark.parametrize("shape", [(5, 1, 77), (3, 1000, 77), (300, 1000, 3), (1, 1000, 1), (200_000, 1, 2)])
def test_every_number_of_bags_and_classes_gives_the_reference(shape, normalize):
    logits, targets = settled(torch.randn(shape) * 3), torch.randint(0, 2, shape[:2])
    options = {"normalize": normalize, "mask_weight": 0.5}
    got = value_and_gradient(SGLLoss(impl="fused", **options), logits.to(GPU), targets.to(GPU))
    # In a few of so many small pairs (bag, class), p - M cancels at every instance.
    assert_exact(got, exact(logits, targets, **options), torch.float32, units=8 * UNITS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [64, 67, 1024, 5001])
def test_rows_at_any_alignment_give_the_reference(dtype, length):
    """The kernels read several instances at once if the address is aligned."""
    loss = SGLLoss(impl="fused")
    logits = settled((torch.randn(2, 3, length) * 3).to(dtype))
    targets = torch.tensor([[1, 0, 1], [0, 1, 1]])
    expected = exact(logits, targets)
    for shift in range(1, 9):
        x = torch.full((2 * 3 * length + shift,), torch.nan, dtype=dtype, device=GPU)[shift:].view(2, 3, length)
        x.copy_(logits)
        x.requires_grad_()
        value = loss(x, targets.to(GPU))
        (gradient,) = torch.autograd.grad(value, x)
        assert_exact((value.detach(), gradient), expected, dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    shift=st.sampled_from([-50.0, -10.0, 0.0, 10.0, 50.0]),
    pooling=st.sampled_from(NAMES),
    normalize=st.sampled_from(["batch", "bag"]),
    mask_weight=st.sampled_from([0.0, 1.0]),
    make=st.sampled_from([packed, padded]),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)
def test_cpu_and_gpu_agree(sizes, classes, seed, scale, shift, pooling, normalize, mask_weight, make, dtype):
    batch = random_batch(sizes, classes, scale=scale, shift=shift, unknown=0.2, seed=seed).to(dtype)
    batch = Batch([settled(bag) if bag.shape[1] else bag for bag in batch.logits], batch.labels)
    loss = SGLLoss(impl="fused", pooling=pooling, normalize=normalize, mask_weight=mask_weight)
    value, gradient = run(loss, batch, torch.device("cpu"), make, dtype)
    value2, gradient2 = run(loss, batch, GPU, make, dtype)
    assert value.isfinite()
    # both results have the tolerance of test_values.py, and both are rounded once
    eps, limits = 2 * UNITS * working_eps(dtype), torch.finfo(dtype)
    assert abs(value2 - value) <= eps * abs(value)
    for one, two in zip(gradient, gradient2, strict=True):
        if one.numel():
            rounding = limits.eps * one.abs() + limits.smallest_normal * limits.eps
            assert ((two - one).abs() <= rounding + eps * one.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_more_than_2_to_31_elements_equal_ten_smaller_calls(layout):
    """With normalize="bag", the gradient depends on the other bags only by the number of participants."""
    if torch.cuda.mem_get_info(GPU)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    bags, classes, length = 70_000, 4, 8192
    assert bags * classes * length > 2**31
    loss = SGLLoss(impl="fused", normalize="bag")
    shape = (bags, classes, length) if layout == "dense" else (bags * length, classes)
    x = torch.empty(shape, dtype=torch.bfloat16, device=GPU).normal_(std=3.0).requires_grad_()
    targets = torch.randint(0, 2, (bags, classes), device=GPU)
    offsets = torch.arange(0, bags * length + 1, length, device=GPU)
    value = loss(x, targets, offsets=offsets if layout == "packed" else None)
    # grad_output is the number of participants, so that the gradients do not depend on it
    (gradient,) = torch.autograd.grad(value, x, torch.tensor(float(bags * classes), device=GPU))
    few = bags // 10
    values = []
    for first in range(0, bags, few):
        step = 1 if layout == "dense" else length
        part = slice(first * step, (first + few) * step)
        some = x.detach()[part].requires_grad_()
        call = {} if layout == "dense" else {"offsets": offsets[: few + 1]}
        values.append(loss(some, targets[first : first + few], **call))
        (expected,) = torch.autograd.grad(values[-1], some, torch.tensor(float(few * classes), device=GPU))
        torch.testing.assert_close(gradient[part], expected, rtol=2**-7, atol=1e-7)
    torch.testing.assert_close(value.detach(), torch.stack(values).mean().detach(), rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Streams and graphs


def test_kernels_on_a_side_stream_wait_for_its_work():
    """The kernels wait for the earlier work of their stream. The host does not wait."""
    loss = SGLLoss(impl="fused")
    logits, targets = problem()
    expected = value_and_gradient(loss, logits, targets)
    late = torch.zeros_like(logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLOW)
        late.copy_(logits)
        value = loss(late.requires_grad_(), targets)
        value.backward()
    assert not side.query(), "the host has waited"
    side.synchronize()
    assert same_bits((value.detach(), late.grad), expected)


def test_concurrent_streams_change_no_bit():
    """More launches than the ring has counters. A block learns from its counter whether it is the last one."""
    loss = SGLLoss(impl="fused", pooling="softmax")
    problems = [problem((16, 14, 64), seed=1), problem((3, 5, 6000), torch.bfloat16, seed=2)]
    expected = [value_and_gradient(loss, *p) for p in problems]
    wrong = [torch.zeros((), dtype=torch.int64, device=GPU) for _ in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(5000):
        for stream, (logits, targets), (value, gradient), bad in zip(streams, problems, expected, wrong, strict=True):
            with torch.cuda.stream(stream):
                value2, gradient2 = value_and_gradient(loss, logits, targets)
                bad += (value2 != value) + (gradient2 != gradient).sum()
    torch.cuda.synchronize()
    assert [int(bad) for bad in wrong] == [0, 0]


def captured(step, stream):
    """(graph, the tensors that ``step`` returned; every replay overwrites them)."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # the first call allocates resources that cannot be allocated during capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    return graph, results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "packed", "masked"])
def test_graph_replay_with_changed_inputs_gives_their_loss(layout, dtype):
    loss = SGLLoss(impl="fused", mask_weight=0.5)
    makers = [next(p for p in layouts(*problem(dtype=dtype, seed=seed)) if p[0] == layout) for seed in range(4)]
    _, logits, targets, call, _ = makers[0]
    logits, targets = logits.clone().requires_grad_(), targets.clone()
    call = {name: t.clone() for name, t in call.items()}

    def step():
        value = loss(logits, targets, **call)
        return value.detach(), *torch.autograd.grad(value, logits)

    side = torch.cuda.Stream()
    graph, results = captured(step, side)
    for number, (_, new_logits, new_targets, new_call, _) in enumerate(makers):
        if layout == "packed":  # other bags in the same rows
            new_call["offsets"][1:-1] += 100 * number
        expected = value_and_gradient(loss, new_logits, new_targets, **new_call)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            logits.copy_(new_logits)
            targets.copy_(new_targets)
            for name, t in call.items():
                t.copy_(new_call[name])
            graph.replay()
        side.synchronize()
        assert same_bits(results, expected)


def test_concurrent_graphs_change_no_bit():
    loss = SGLLoss(impl="fused")
    problems = [problem((16, 14, 64), seed=1), problem((3, 5, 6000), seed=2)]
    expected = [value_and_gradient(loss, *p) for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    graphs = [
        captured(functools.partial(value_and_gradient, loss, *p), stream)
        for p, stream in zip(problems, streams, strict=True)
    ]
    wrong = [torch.zeros((), dtype=torch.int64, device=GPU) for _ in problems]
    torch.cuda.synchronize()
    for _ in range(1000):
        for stream, (graph, results), (value, gradient), bad in zip(streams, graphs, expected, wrong, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                bad += (results[0] != value) + (results[1] != gradient).sum()
    torch.cuda.synchronize()
    assert [int(bad) for bad in wrong] == [0, 0]


def test_compiled_cuda_graphs_give_the_eager_loss():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = SGLLoss(impl="fused")

    def step(x, y):
        return loss(x * 1.5, y)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for seed in range(6):  # warm-up, recording, replays
        logits, targets = problem(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        got = value_and_gradient(compiled, logits, targets)
        for one, two in zip(got, value_and_gradient(step, logits, targets), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Guarantees


@pytest.mark.parametrize("layout", ["dense", "packed", "masked"])
@pytest.mark.parametrize(
    "make",
    [lambda: SGLLoss(impl="fused"), lambda: SGLLoss(impl="reference"), BagLoss, BILLoss, MMMLoss],
    ids=["fused", "reference", "bag", "bil", "mmm"],
)
def test_no_host_synchronization(make, layout):
    _, logits, targets, call, _ = next(p for p in layouts(*problem()) if p[0] == layout)
    loss = make()
    value_and_gradient(loss, logits, targets, **call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(loss, logits, targets, **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["dense", "packed", "masked"])
@pytest.mark.parametrize("shape", [(64, 20, 100), (3, 2, 70_001)])
def test_twenty_runs_in_deterministic_mode_are_bitwise_equal(shape, layout):
    _, logits, targets, call, _ = next(p for p in layouts(*problem(shape)) if p[0] == layout)
    loss = SGLLoss(impl="fused", pooling="softmax", mask_weight=0.5)
    torch.use_deterministic_algorithms(True)
    try:
        first = value_and_gradient(loss, logits, targets, **call)
        for _ in range(19):
            assert same_bits(value_and_gradient(loss, logits, targets, **call), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradient_scaler_recovers_from_a_scale_that_overflows():
    model = torch.nn.Conv2d(1, 2, 3).to(GPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, backoff_factor=2.0**-8)
    loss = SGLLoss(impl="fused")
    images, targets = torch.randn(4, 1, 10, 10).to(GPU), torch.randint(0, 2, (4, 2)).to(GPU)
    before = copy.deepcopy(model.state_dict())
    steps_taken = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            logits = model(images)
            value = loss(logits, targets)
        assert logits.dtype == torch.float16
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        steps_taken.append(not torch.equal(model.weight, before["weight"]))
    assert not steps_taken[0]  # in float16, a gradient times 2^40 is infinite
    assert steps_taken[-1]
    assert all(p.isfinite().all() for p in model.parameters())


def gpu_work(step):
    """Names of the kernels, memsets and copies that ``step`` starts."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "packed", "masked"])
def test_forward_and_backward_are_one_launch_each(layout, dtype):
    """grad_output is given, because torch needs another launch to create it."""
    _, logits, targets, call, _ = next(p for p in layouts(*problem((32, 14, 256), dtype)) if p[0] == layout)
    logits.requires_grad_()
    loss = SGLLoss(impl="fused")
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=GPU)

    def step():
        logits.grad = None
        loss(logits, targets, **call).backward(one)

    step()
    if not gpu_work(lambda: one + 1):
        pytest.skip("the profiler records no events of this GPU")
    work = gpu_work(step)
    assert 1 <= len(work) <= 2, work


def test_peak_memory_is_one_gradient():
    logits, targets = problem((256, 14, 4096))
    logits.requires_grad_()
    loss = SGLLoss(impl="fused")
    for _ in range(2):
        logits.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(GPU)
        before = torch.cuda.memory_allocated(GPU)
        loss(logits, targets).backward()
        extra = torch.cuda.max_memory_allocated(GPU) - before
    assert extra <= 1.01 * logits.numel() * logits.element_size()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_loss_on_the_second_gpu_while_the_first_is_current():
    loss = SGLLoss(impl="fused")
    logits, targets = problem()
    expected = value_and_gradient(loss, logits, targets)
    with torch.cuda.device(0):
        got = value_and_gradient(loss, logits.to("cuda:1"), targets.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda", 1) for t in got)
    for one, two in zip(got, expected, strict=True):  # two GPU models may distribute the work differently
        torch.testing.assert_close(one.to(GPU), two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_tensors_on_another_device_raise_value_error(impl):
    logits, targets = problem((3, 2, 5))
    loss = SGLLoss(impl=impl)
    with pytest.raises(ValueError, match=r"targets.*cuda:0.*cpu"):
        loss(logits, targets.cpu())
    with pytest.raises(ValueError, match=r"mask.*cuda:0.*cpu"):
        loss(logits, targets, mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"offsets.*cuda:0.*cpu"):
        loss(logits.view(-1), targets.view(-1), offsets=torch.arange(0, 31, 5))
    with pytest.raises(ValueError, match=r"class_weight.*cuda:0.*cpu"):
        SGLLoss(impl=impl, class_weight=[1.0, 2.0])(logits, targets)


GARBAGE = [
    [5, 3, 900, 2**40], [-7, -3, 4, 15], [2**62, -(2**62), 2**62, 0], [40, 30, 20, 10], [0, 0, 0, 0],
    [50, 50, 50, 50], [-1, -1, -1, -1], [0, 100, 100, 49], [10, 20, 30, 40],
]  # fmt: skip


@pytest.mark.parametrize("offsets", GARBAGE, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_wrong_offsets_read_no_memory_outside_the_logits(offsets, index):
    limits = torch.iinfo(index)
    offsets = torch.tensor([min(max(v, limits.min), limits.max) for v in offsets], dtype=index, device=GPU)
    around = torch.full((150, 2), torch.nan, device=GPU)
    around[50:100] = torch.randn(50, 2).to(GPU)
    targets = torch.tensor([[1, 0], [0, 1], [1, 1]], device=GPU)
    x = around[50:100].requires_grad_()
    loss = SGLLoss(impl="fused", pooling="softmax", check=False)
    value = loss(x, targets, offsets=offsets)
    torch.autograd.grad(value, x)
    assert value.isfinite()  # the rows before and after are NaN
    right = torch.tensor([0, 10, 30, 50], device=GPU)
    value, gradient = value_and_gradient(loss, x, targets, offsets=right)
    expected = value_and_gradient(SGLLoss(impl="reference", pooling="softmax"), x, targets, offsets=right)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradient, expected[1])
