"""The operator under the dispatcher's checks, torch.compile, export, autocast and a gradient scaler."""

from __future__ import annotations

import pytest
import torch
from batches import external_pooling

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, _fused

# Coverage slows torch.compile, which is Python code, by half. Other tests cover the same lines.
pytestmark = [pytest.mark.no_cover, pytest.mark.integration]

CODES = sorted(_fused.CODE_OF_NAME.values())


def operands(layout: str, device: torch.device, dtype=torch.float32):
    targets = torch.tensor([[1.0, 0.0], [float("nan"), 1.0], [0.0, 1.0]], device=device)
    if layout == "packed":
        return torch.randn(12, 2).to(device, dtype), targets, None, torch.tensor([0, 5, 5, 12], device=device)
    logits = torch.randn(3, 2, 4, 5).to(device, dtype)
    if layout == "channels_last":
        return logits.to(memory_format=torch.channels_last), targets, None, None
    return logits, targets, ((torch.rand(3, 4, 5) < 0.7).to(device) if layout == "masked" else None), None


@pytest.mark.parametrize("layout", ["map", "channels_last", "masked", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_opcheck(fused_device, layout, dtype):
    logits, targets, mask, offsets = operands(layout, fused_device, dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.tensor([1.0, 2.0], dtype=working, device=fused_device)
    forward = (logits, targets, mask, offsets, weight, weight, 0.3, 1.0, 0.5, 4, 1.0, False, True, True, 0)
    torch.library.opcheck(torch.ops.sgl_ops.sgl_forward.default, forward)
    _, _, saved = torch.ops.sgl_ops.sgl_forward(*forward)
    assert saved.shape[1] == _fused.CONSTANTS["saved_columns"]
    backward = (weight[0], logits, mask, offsets, weight, saved, 0.3, 4, 1.0, True)
    torch.library.opcheck(torch.ops.sgl_ops.sgl_backward.default, backward)


@pytest.mark.parametrize("layout", ["map", "channels_last", "masked", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_opcheck_of_poolings(fused_device, layout, dtype):
    logits, _, mask, offsets = operands(layout, fused_device, dtype)
    if offsets is not None:  # no empty bag: opcheck counts NaN as different from NaN
        offsets = torch.tensor([0, 5, 7, 12], device=fused_device)
    pooling = (_fused.CODE_OF_NAME["topk"], 3.0)
    torch.library.opcheck(torch.ops.sgl_ops.pool_forward.default, (logits, mask, offsets, *pooling))
    z, saved = torch.ops.sgl_ops.pool_forward(logits, mask, offsets, *pooling)
    backward = (torch.randn_like(z), logits, mask, offsets, saved, *pooling)
    torch.library.opcheck(torch.ops.sgl_ops.pool_backward.default, backward)


@pytest.mark.parametrize("layout", ["map", "packed"])
@pytest.mark.parametrize("name", ["sgl", "sgl, external pooling", "bag", "bil", "mmm"])
def test_compiles_in_one_graph(impl, device, layout, name):
    torch._dynamo.reset()
    loss = {
        "sgl": SGLLoss(impl=impl, mask_weight=0.5),
        "sgl, external pooling": SGLLoss(impl=impl, pooling=external_pooling()),
        "bag": BagLoss(pooling="topk", impl=impl),
        "bil": BILLoss(impl=impl),
        "mmm": MMMLoss(impl=impl),
    }[name]
    logits, targets, mask, offsets = operands(layout, device)

    def step(x):
        return loss(x * 1.5, targets, mask=mask, offsets=offsets)

    results = []
    # Inductor takes half a minute to compile a reference. One loss is enough for its part of the work.
    backend = "inductor" if (name, layout) == ("sgl", "map") else "aot_eager"
    for run in (step, torch.compile(step, fullgraph=True, backend=backend)):
        x = logits.clone().requires_grad_()
        value = run(x)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_compiles_with_dynamic_shapes(fused_device):
    torch._dynamo.reset()
    loss = SGLLoss(impl="fused")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n, length in ((3, 10), (4, 21), (2, 33)):
        x = torch.randn(n, 2, length).to(fused_device).requires_grad_()
        y = torch.randint(0, 2, (n, 2)).to(fused_device)
        value = compiled(x, y)
        value.backward()
        torch.testing.assert_close(value, loss(x, y))


def test_exported_program_gives_the_same_loss(impl, device):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = SGLLoss(impl=impl, check=False)

        def forward(self, x, y):
            return self.loss(x, y)

    x, y = torch.randn(3, 2, 10).to(device), torch.randint(0, 2, (3, 2)).to(device)
    program = torch.export.export(Step(), (x, y))
    torch.testing.assert_close(program.module()(x, y), Step()(x, y))


def test_step_with_autocast_and_gradient_scaler_updates_the_model(impl, device):
    model = torch.nn.Conv2d(1, 2, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    images, targets = torch.randn(4, 1, 10, 10).to(device), torch.randint(0, 2, (4, 2)).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = model(images)
        loss = SGLLoss(impl=impl)(logits, targets)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    before = model.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.isfinite().all()
    assert not torch.equal(before, model.weight)


def test_gradient_scaler_skips_the_step_of_an_infinite_logit(impl, device):
    weight = torch.ones(1, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    logits = torch.randn(3, 2, 9).to(device)
    logits[0, 1, 4] = float("inf")
    scaler.scale(SGLLoss(impl=impl, lam=0.0)(logits * weight, torch.ones(3, 2, device=device))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1.0
    assert scaler.get_scale() < 1024.0


def test_functional_call_gives_every_parameter_a_gradient(impl, device):
    model = torch.nn.Conv1d(1, 2, 3).to(device)
    x, y = torch.randn(3, 1, 12).to(device), torch.randint(0, 2, (3, 2)).to(device)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    SGLLoss(impl=impl)(torch.func.functional_call(model, parameters, (x,)), y).backward()
    assert all(p.grad is not None for p in parameters.values())
