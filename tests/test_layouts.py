"""The layout of the bags in memory changes neither the value nor the gradient of a loss."""

from __future__ import annotations

import pytest
import torch
from batches import external_pooling, packed, padded, random_batch, run
from conftest import uses_cuda_kernels

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss
from sgl_ops.functional import self_guidance

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def value_and_gradient(loss, logits, targets, **call):
    x = logits.detach().requires_grad_()
    value = loss(x, targets, **call)
    value.backward()
    return value.detach(), x.grad


def compare(impl, got, expected):
    # The fused operator copies every layout into the same rows, so its results are bitwise equal. The order of the
    # reference's sums depends on the layout.
    if impl == "fused":
        assert torch.equal(got, expected)
    else:
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=32 * eps, atol=32 * eps * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", ["max", "softmax", "lse", "topk", "generalized_mean", "external"])
def test_padded_and_packed_bags_give_the_same_loss(impl, device, dtype, pooling):
    if pooling == "external":
        if impl == "fused":
            pytest.skip("an external pooling sums in the order of the layout")
        pooling = external_pooling()
    batch = random_batch([3, 17, 0, 1, 40], classes=3, unknown=0.2).to(dtype)
    loss = SGLLoss(impl=impl, pooling=pooling, mask_weight=0.3)
    value, gradient = run(loss, batch, device, packed, dtype)
    value2, gradient2 = run(loss, batch, device, padded, dtype)
    if impl == "fused" and uses_cuda_kernels(device):  # padding moves an instance to another thread
        impl = "reference"
    compare(impl, value2, value)
    for one, two in zip(gradient, gradient2, strict=True):
        assert one.shape == two.shape
        if one.numel():
            compare(impl, two.to(dtype), one.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_the_loss(impl, device, dtype):
    logits = torch.randn(3, 4, 6, 8).to(device, dtype)
    targets = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]], device=device)
    loss = SGLLoss(impl=impl, mask_weight=0.3, pooling="mean")
    value, gradient = value_and_gradient(loss, logits, targets)
    big = torch.randn(3, 9, 8, 20).to(device, dtype)
    sliced = big[:, 1::2, 1:7, ::2][:, :, :, 1:9]
    sliced.copy_(logits)
    variants = {
        "channels_last": logits.to(memory_format=torch.channels_last),
        "flat": logits.flatten(2),
        "transposed": logits.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": sliced,
        "5-d": logits.reshape(3, 4, 2, 3, 8),
        "columns first": logits.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, variant in variants.items():
        before = variant.clone()
        value2, gradient2 = value_and_gradient(loss, variant, targets)
        assert gradient2.shape == variant.shape, name
        compare(impl, value2, value)
        compare(impl, gradient2.reshape(gradient.shape), gradient)
        assert torch.equal(variant, before), name


def test_expanded_logits_give_the_loss_of_repeated_logits(impl, device):
    row = torch.randn(1, 3, 10).to(device)
    loss = SGLLoss(impl=impl)
    targets = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    expected = value_and_gradient(loss, row.repeat(2, 1, 1), targets)
    for got, want in zip(value_and_gradient(loss, row.expand(2, 3, 10), targets), expected, strict=True):
        compare(impl, got, want)


def test_masked_map_gives_the_loss_of_masked_rows(impl, device):
    logits, mask = torch.randn(2, 3, 5, 7).to(device), (torch.rand(2, 5, 7) < 0.5).to(device)
    targets = torch.tensor([[1, 0, 1], [1, 1, 0]], device=device)
    loss = SGLLoss(impl=impl)
    value, gradient = value_and_gradient(loss, logits, targets, mask=mask)
    value2, gradient2 = value_and_gradient(loss, logits.flatten(2), targets, mask=mask.flatten(1))
    compare(impl, value2, value)
    compare(impl, gradient2.reshape(gradient.shape), gradient)
    assert (gradient[~mask.unsqueeze(1).expand_as(gradient)] == 0).all()
    transposed = mask.transpose(1, 2).contiguous().transpose(1, 2)
    compare(impl, value_and_gradient(loss, logits, targets, mask=transposed)[1], gradient)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_shapes_with_and_without_a_class_dimension_give_the_same_loss(impl, device, index):
    logits = torch.randn(3, 8).to(device)
    targets = torch.tensor([1, 0, 1], device=device)
    loss = SGLLoss(impl=impl)
    value, gradient = value_and_gradient(loss, logits.unsqueeze(1), targets.unsqueeze(1))
    offsets = torch.arange(0, 25, 8, dtype=index, device=device)
    for x, y, call in (
        (logits, targets, {}),
        (logits, targets.unsqueeze(1), {}),
        (logits, targets, {"mask": torch.ones(3, 8, dtype=torch.bool, device=device)}),
        (logits.flatten(), targets, {"offsets": offsets}),
        (logits.flatten().unsqueeze(1), targets, {"offsets": offsets}),
    ):
        value2, gradient2 = value_and_gradient(loss, x, y, **call)
        compare(impl, value2, value)
        compare(impl, gradient2.reshape(3, 1, 8), gradient)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float64])
def test_dtype_of_targets_does_not_change_the_loss(impl, device, dtype):
    logits = torch.randn(3, 2, 5).to(device)
    targets = torch.tensor([[1, 0], [0, 1], [1, 1]], device=device)
    loss = SGLLoss(impl=impl)
    assert torch.equal(loss(logits, targets.to(dtype)), loss(logits, targets.float()))
    across = targets.to(dtype).T.contiguous().T
    assert torch.equal(loss(logits, across), loss(logits, targets.float()))


def test_order_of_instances_does_not_change_the_loss(impl, device):
    logits = torch.randn(3, 2, 70, dtype=torch.float64).to(device)
    targets = torch.tensor([[1, 0], [0, 1], [1, 1]], device=device)
    loss = SGLLoss(impl=impl, pooling="softmax", mask_weight=0.5)
    value, gradient = value_and_gradient(loss, logits, targets)
    order = torch.randperm(70).to(device)
    value2, gradient2 = value_and_gradient(loss, logits[..., order], targets)
    torch.testing.assert_close(value2, value, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient2, gradient[..., order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("make_loss", [SGLLoss, BagLoss, BILLoss, MMMLoss])
def test_ignored_instances_may_have_any_value(make_loss, device, garbage):
    batch = random_batch([4, 9, 0], classes=2, positives=0.6)
    expected, _ = run(make_loss(), batch, device, packed)
    logits, call = padded(batch, device, padding=garbage)
    labels = batch.labels.to(device)
    value, got = value_and_gradient(make_loss(), logits, labels, **call)
    torch.testing.assert_close(value.cpu(), expected)
    assert (got[~call["mask"].unsqueeze(1).expand_as(got)] == 0).all()
    unknown = labels.clone()
    unknown[1] = float("nan")
    logits[1] = garbage
    value, got = value_and_gradient(make_loss(), logits, unknown, **call)
    assert value.isfinite()
    assert (got[1] == 0).all()
    assert got[0][:, call["mask"][0]].isfinite().all()


def test_self_guidance_has_the_layout_of_the_logits(device):
    batch = random_batch([3, 6, 0], classes=2, positives=1.0)
    labels = batch.labels.to(device)
    flat, call = packed(batch, device)
    from_packed = self_guidance(flat, labels, **call)
    logits, call = padded(batch, device)
    from_padded = self_guidance(logits, labels, **call)
    for name in ("targets", "part"):
        dense = getattr(from_padded, name)
        assert dense.shape == logits.shape
        assert torch.equal(torch.cat([dense[i][:, call["mask"][i]].T for i in range(3)]), getattr(from_packed, name))
        assert (dense.movedim(1, 2)[~call["mask"]] == (0 if name == "targets" else -1)).all()
    torch.testing.assert_close(from_padded.alpha, from_packed.alpha, equal_nan=True)
    torch.testing.assert_close(from_padded.weight, from_packed.weight, equal_nan=True)
    assert from_padded.alpha[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [7, 8, 37])
def test_adjacent_classes_give_the_gradient_of_single_rows(fused_device, dtype, classes):
    """The kernel gathers several rows in one pass if the classes of an instance are adjacent in memory.

    The bags are longer and shorter than such a pass, and some chunks end within a bag. Some labels are unknown, and one
    pair holds a NaN.
    """
    lengths = torch.tensor([3, 0, 40, 1500, 16, 1, 7000])
    total, bags = int(lengths.sum()), len(lengths)
    rows = (torch.randn(total, classes) * 3).to(fused_device, dtype)
    rows[4, classes - 2] = torch.nan
    targets = (torch.rand(bags, classes) < 0.5).float()
    targets[torch.rand(bags, classes) < 0.2] = torch.nan
    targets[2, classes - 2] = 1.0
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(fused_device)
    loss = SGLLoss(impl="fused", mask_weight=0.3, pooling="softmax", normalize="bag")

    def gradient(logits, **call):
        return value_and_gradient(loss, logits, targets.to(fused_device), **call)[1]

    together = gradient(rows, offsets=offsets)
    assert together[3:43, classes - 2].isnan().all()
    # a stride of 2 between classes: no longer adjacent
    apart = torch.stack([rows, torch.full_like(rows, 7.0)], 2).flatten(1)[:, ::2]
    torch.testing.assert_close(together, gradient(apart, offsets=offsets), rtol=0, atol=0, equal_nan=True)
    # padded: the same instances, with excluded instances in between
    mask = torch.zeros(bags, 7100, dtype=torch.bool)
    for bag, length in enumerate(lengths):
        mask[bag, torch.randperm(7100)[:length]] = True
    wide = torch.full((bags, 7100, classes), 9.0).to(fused_device, dtype)
    mask = mask.to(fused_device)
    wide[mask] = rows
    masked = gradient(wide.transpose(1, 2), mask=mask).transpose(1, 2)
    assert (masked[~mask] == 0).all()
    if uses_cuda_kernels(fused_device):  # padding moves an instance to another thread
        return
    torch.testing.assert_close(masked[mask], together, rtol=0, atol=0, equal_nan=True)
