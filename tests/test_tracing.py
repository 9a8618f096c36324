"""The losses under FakeTensorMode, make_fx, aot_function, torch.jit.trace and torch.export; unsupported tensors."""

from __future__ import annotations

import io

import pytest
import torch
from batches import settled
from functorch.compile import aot_function, nop
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, _fused, functional
from sgl_ops.pooling import POOLINGS, AttentionPooling

# Coverage slows tracing, which is Python code, by half. Other tests cover the same lines.
pytestmark = [pytest.mark.no_cover, pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

IMPLS = ["reference", *(["fused"] if "cpu" in _fused.DEVICES else [])]
LOSSES = {
    **{f"sgl {impl}": SGLLoss(impl=impl, mask_weight=0.5) for impl in IMPLS},
    "bag": BagLoss(),
    "bil": BILLoss(),
    "mmm": MMMLoss(),
}
#: With every pooling: their formulas differ in the reference. The operators get a code and a parameter, as for "topk".
ALL = LOSSES | {
    f"{name} {impl}": SGLLoss(impl=impl, pooling=name)
    for name in POOLINGS
    for impl in (IMPLS if name == "topk" else ["reference"])
}


def batch(*shape: int):
    """(logits of this shape, targets)."""
    return settled(2 * torch.randn(shape).flatten(2)).reshape(shape), torch.randint(0, 2, shape[:2]).float()


def packed_batch():
    return torch.randn(13, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 4, 9, 13])


def value_and_grad(loss, x, y, **call):
    x = x.detach().requires_grad_()
    value = loss(x, y, **call)
    return value, torch.autograd.grad(value, x)[0]


class Step(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, x, y, offsets=None):
        return self.loss(x, y, offsets=offsets)


@pytest.mark.parametrize("name", LOSSES)
def test_fake_tensors_get_the_right_shapes(name):
    x, y = batch(3, 2, 4, 5)
    rows, labels, offsets = packed_batch()
    with FakeTensorMode() as mode:
        value, grad = value_and_grad(LOSSES[name], mode.from_tensor(x), mode.from_tensor(y))
        assert (value.shape, grad.shape) == ((), x.shape)
        rows, labels, offsets = (mode.from_tensor(t) for t in (rows, labels, offsets))
        value, grad = value_and_grad(LOSSES[name], rows, labels, offsets=offsets)
        assert (value.shape, grad.shape) == ((), rows.shape)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("name", LOSSES)
def test_make_fx_graph_gives_the_same_result(name, mode):
    x, y = batch(3, 2, 4, 5)
    graph = make_fx(lambda x, y: value_and_grad(LOSSES[name], x, y), tracing_mode=mode)(x, y)
    assert "check_values" not in graph.code
    x, y = batch(3, 2, 4, 5)
    torch.testing.assert_close(graph(x, y), value_and_grad(LOSSES[name], x, y))


@pytest.mark.parametrize("name", ALL)
def test_make_fx_graph_with_symbolic_sizes_gives_the_same_result(name):
    loss = ALL[name]
    x, y = batch(3, 2, 4, 5)
    graph = make_fx(lambda x, y: value_and_grad(loss, x, y), tracing_mode="symbolic")(x, y)
    x, y = batch(5, 2, 6, 7)
    torch.testing.assert_close(graph(x, y), value_and_grad(loss, x, y))


@pytest.mark.parametrize("name", LOSSES)
def test_aot_function_gives_the_same_result(name):
    x, y = batch(3, 2, 4, 5)
    traced = aot_function(lambda x, y: LOSSES[name](x, y), fw_compiler=nop, bw_compiler=nop)
    torch.testing.assert_close(value_and_grad(traced, x, y), value_and_grad(LOSSES[name], x, y))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_jit_trace_gives_the_same_result(name, requires_grad):
    x, y = batch(3, 2, 4, 5)
    traced = torch.jit.trace(Step(LOSSES[name]), (x.requires_grad_(requires_grad), y))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x, y = batch(3, 2, 4, 5)
    expected = value_and_grad(LOSSES[name], x, y)
    for program in (traced, torch.jit.load(file)):
        torch.testing.assert_close(value_and_grad(program, x, y), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_exported_program_with_dynamic_sizes_gives_the_same_loss(name):
    """The default mode is not strict. It traces as make_fx does, which is tested with every pooling."""
    dynamic = torch.export.Dim.DYNAMIC
    step = Step(LOSSES[name])
    x, y = batch(3, 2, 4, 5)
    shapes = {"x": {0: dynamic, 2: dynamic, 3: dynamic}, "y": {0: dynamic}, "offsets": None}
    program = torch.export.export(step, (x, y, None), dynamic_shapes=shapes).module()
    x, y = batch(5, 2, 6, 7)
    torch.testing.assert_close(program(x, y, None), step(x, y))


@pytest.mark.parametrize("name", LOSSES)
def test_exported_program_takes_padded_and_packed_bags(name):
    dynamic = torch.export.Dim.DYNAMIC
    step = Step(LOSSES[name])
    x, y = batch(3, 2, 9)
    shapes = {"x": {0: dynamic, 2: dynamic}, "y": {0: dynamic}, "offsets": None}
    program = torch.export.export(step, (x, y, None), dynamic_shapes=shapes).module()
    x, y = batch(4, 2, 17)
    torch.testing.assert_close(program(x, y, None), step(x, y))
    rows, labels, offsets = packed_batch()
    shapes = {"x": {0: dynamic}, "y": {0: dynamic}, "offsets": {0: dynamic}}
    program = torch.export.export(step, (rows, labels, offsets), dynamic_shapes=shapes).module()
    rows, labels, offsets = torch.randn(8, 2), torch.ones(2, 2), torch.tensor([0, 3, 8])
    torch.testing.assert_close(program(rows, labels, offsets), step(rows, labels, offsets))


@pytest.mark.parametrize("name", ["sgl reference", *(["sgl fused"] if "fused" in IMPLS else [])])
def test_strict_export_gives_the_same_loss(name):
    x, y = batch(3, 2, 4, 5)
    program = torch.export.export(Step(LOSSES[name]), (x, y), strict=True).module()
    x, y = batch(3, 2, 4, 5)
    torch.testing.assert_close(program(x, y), LOSSES[name](x, y))


@pytest.mark.skipif("fused" not in IMPLS, reason="the extension is not there")
@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 5, 12])])
def test_opcheck_of_check_values(offsets):
    torch.library.opcheck(torch.ops.sgl_ops.check_values.default, (torch.tensor([[1.0], [0.0]]), offsets, 12))


@pytest.mark.skipif("fused" not in IMPLS, reason="the extension is not there")
def test_opcheck_of_the_operators_that_take_numbers_as_a_tensor():
    x, y = batch(3, 2, 4, 5)
    numbers = torch.tensor([0.3, 1.0, 1.0, 1.0], dtype=torch.float64)
    others = (x, y, None, None, None, None)
    loss = _fused.CONSTANTS["self_guiding_loss"]
    settings = {"pooling": 4, "per_bag": False, "rescale": True, "weighted": True, "loss": loss}
    forward = [settings[name] for name in _fused._OF_FORWARD if name not in _fused._NUMBERS]
    for logits in (x, x.requires_grad_()):
        torch.library.opcheck(_fused._forward_numbers, (numbers, logits, *others[1:], *forward))
    _, _, saved = _fused._forward_numbers(numbers, *others, *forward)
    backward = [settings[name] for name in _fused._OF_BACKWARD if name not in _fused._NUMBERS]
    one = torch.ones(())
    torch.library.opcheck(_fused._backward_numbers, (numbers, one, x.detach(), None, None, None, saved, *backward))


# ---------------------------------------------------------------------------------------------------------------------
# Unsupported tensors


REFUSED = {"coo": lambda t: t.to_sparse(), "csr": lambda t: t.flatten(1).to_sparse_csr()}
if torch.backends.mkldnn.is_available():
    REFUSED["mkldnn"] = lambda t: t.float().to_mkldnn()


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", LOSSES)
def test_unsupported_memory_layouts_raise_an_error(name, kind):
    (x, y), loss, refuse = batch(3, 2, 9), LOSSES[name], REFUSED[kind]
    mask = torch.ones(3, 9, dtype=torch.bool)
    message = r"{}: expected a dense tensor, got layout torch\.(sparse_|_mkldnn)"
    with pytest.raises(TypeError, match=message.format("logits")):
        loss(refuse(x), y)
    with pytest.raises(TypeError, match=message.format("targets")):
        loss(x, refuse(y))
    if kind == "coo":
        with pytest.raises(TypeError, match=message.format("mask")):
            loss(x, y, mask=refuse(mask))
    with pytest.raises(TypeError, match=message.format("features")):
        BagLoss(AttentionPooling(4))(x, y, features=refuse(torch.randn(3, 9, 4)))
    with pytest.raises(TypeError, match=message.format("pos_weight")):
        functional.sgl_loss(x, y, pos_weight=torch.ones(2).to_sparse())


@pytest.mark.parametrize("name", LOSSES)
def test_distributed_tensors_raise_an_error(name, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import distribute_tensor

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        x, y = batch(3, 2, 9)
        with pytest.raises(TypeError, match=r"logits: expected the tensor of this process, got a DTensor.*to_local"):
            LOSSES[name](distribute_tensor(x, mesh), distribute_tensor(y, mesh))
        with pytest.raises(TypeError, match="targets: expected the tensor of this process"):
            LOSSES[name](x, distribute_tensor(y, mesh))
    finally:
        torch.distributed.destroy_process_group()
