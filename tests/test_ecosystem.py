"""Training steps with DDP, FSDP, Lightning, nested tensors, torch.func and forward-mode differentiation.

torch.compile, export, autocast and functional_call are in test_compile.py; copies, pickles and state_dict in
test_losses.py.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from batches import packed, random_batch, run
from common.import_torchvision import import_torchvision
from ranks import start_ranks
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, _fused, functional
from sgl_ops.pooling import POOLINGS as NAMED
from sgl_ops.pooling import AutoPooling, make_pooling

WORLD = 2
KINDS = ("ddp", "fsdp")


class Step(nn.Module):
    """A module from images and labels to the loss. Its pooling is learned, so that the criterion has parameters."""

    def __init__(self, impl: str = "auto"):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.criterion = SGLLoss(pooling=AutoPooling(2), class_weight=[1.0, 2.0], mask_weight=0.1, impl=impl)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.net(images), labels)


def step_and_batches(impl: str = "auto") -> tuple[Step, list[tuple[Tensor, Tensor]]]:
    """A step with equal weights in every process, and one batch per process."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    return Step(impl), [(torch.randn(3, 1, 9, 9, generator=generator), labels) for _ in range(WORLD)]


def work(rank: int, folder: str) -> None:
    """One process: saves the gradients of a step on its batch with DDP and of one with FSDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    gradients = {}
    for kind in KINDS:
        step, batches = step_and_batches()
        wrapped = nn.parallel.DistributedDataParallel(step) if kind == "ddp" else fully_shard(step, mesh=mesh)
        wrapped(*batches[rank]).backward()
        gradients[kind] = {
            name: p.grad if kind == "ddp" else p.grad.full_tensor() for name, p in step.named_parameters()
        }
    torch.save(gradients, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.integration
def test_gradients_of_two_processes_are_averaged(tmp_path):
    start_ranks(work, str(tmp_path), count=WORLD)
    step, batches = step_and_batches()
    torch.stack([step(*batch) for batch in batches]).mean().backward()
    expected = {name: p.grad for name, p in step.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for rank in range(WORLD):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind in KINDS:
            torch.testing.assert_close(gradients[kind], expected, rtol=1e-5, atol=1e-7)


def test_training_with_lightning_updates_the_model(tmp_path):
    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # Lightning's metrics import it, too
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.step = step_and_batches()[0]

        def training_step(self, batch, _):
            return self.step(*batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    step, batches = step_and_batches()
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.5)
    for batch in batches:
        optimizer.zero_grad()
        step(*batch).backward()
        optimizer.step()
    torch.testing.assert_close(dict(module.step.named_parameters()), dict(step.named_parameters()))
    trainer.save_checkpoint(tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint", weights_only=True)["state_dict"]
    torch.testing.assert_close(state["step.criterion.class_weight"], torch.tensor([1.0, 2.0]))


def test_nested_tensors_give_the_loss_of_packed_bags(impl, device):
    batch = random_batch([3, 7, 2], classes=2, positives=0.6)
    rows = [bag.T.contiguous() for bag in batch.logits]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, device=device, requires_grad=True)
    value, gradient = run(SGLLoss(impl=impl), batch, device, packed)
    loss = SGLLoss(impl=impl)(nested, batch.labels.to(device))
    loss.backward()
    # the operator copies both layouts into the same rows; the order of the reference's sums depends on the layout
    tolerance = {"rtol": 0.0, "atol": 0.0} if impl == "fused" else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss.detach().cpu(), value, **tolerance)
    for got, want in zip(nested.grad.unbind(), gradient, strict=True):
        torch.testing.assert_close(got.T.contiguous().cpu(), want.contiguous(), **tolerance)


def test_gradient_through_functional_call(device):
    """torch.func.grad of a step with respect to the parameters of a network."""
    step, batches = step_and_batches()
    step.to(device)
    images, labels = (x.to(device) for x in batches[0])
    step(images, labels).backward()
    parameters = {name: p.detach() for name, p in step.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(step, p, (images, labels)))(parameters)
    for name, parameter in step.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(gradients[name], parameter.grad)


LAYOUTS = ("map", "masked", "packed")
POOLINGS = list(NAMED)
MEMBERS = 3


def ensemble(layout: str, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of several networks for one batch, separate labels for each, and the arguments that define the bags."""
    labels = torch.randint(0, 2, (MEMBERS, 3, 2)).double()
    labels[0, 0, 0] = torch.nan
    labels = labels.to(device)
    if layout == "packed":
        logits = torch.randn(MEMBERS, 11, 2, dtype=torch.float64)
        return logits.to(device), labels, {"offsets": torch.tensor([0, 5, 5, 11], device=device)}
    logits = torch.randn(MEMBERS, 3, 2, 7, dtype=torch.float64)
    call = {"mask": (torch.rand(3, 7) < 0.7).to(device)} if layout == "masked" else {}
    return logits.to(device), labels, call


def by_backward(loss, logits: Tensor, labels: Tensor, **call: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient, value) by backward, in the order of torch.func.grad_and_value."""
    x = logits.clone().requires_grad_()
    value = loss(x, labels, **call)
    value.backward()
    assert x.grad.abs().sum() > 0
    return x.grad, value.detach()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_torch_func_gives_the_gradient_of_backward(device, layout, pooling):
    loss = SGLLoss(pooling=pooling, mask_weight=0.1, class_weight=[1.0, 2.0])
    logits, labels, call = ensemble(layout, device)
    x, y = logits[0], labels[0]
    grad, value = by_backward(loss, x, y, **call)
    torch.testing.assert_close(torch.func.grad(loss)(x, y, **call), grad)
    torch.testing.assert_close(torch.func.grad_and_value(loss)(x, y, **call), (grad, value))
    torch.testing.assert_close(torch.func.jacrev(lambda x: loss(x, y, **call))(x), grad)
    primal, pull = torch.func.vjp(lambda x: loss(x, y, **call), x)
    torch.testing.assert_close((pull(torch.ones_like(primal))[0], primal), (grad, value))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "loss", [SGLLoss(mask_weight=0.1), BagLoss(), BILLoss(), MMMLoss()], ids=lambda x: type(x).__name__
)
def test_vmap_gives_the_gradients_of_an_ensemble(device, layout, loss):
    logits, labels, call = ensemble(layout, device)
    expected = [by_backward(loss, x, y, **call) for x, y in zip(logits, labels, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*expected, strict=True)]

    def member(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.grad_and_value(loss)(x, y, **call)

    torch.testing.assert_close(list(torch.func.vmap(member)(logits, labels)), expected)
    torch.testing.assert_close(torch.func.vmap(lambda x, y: loss(x, y, **call))(logits, labels), expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_mode_equals_reverse_mode(device, layout):
    loss = SGLLoss(pooling="softmax", mask_weight=0.1)
    logits, labels, call = ensemble(layout, device)
    x, y, tangent = logits[0], labels[0], logits[1]
    grad, value = by_backward(loss, x, y, **call)
    expected = (value, (grad * tangent).sum())
    torch.testing.assert_close(torch.func.jvp(lambda x: loss(x, y, **call), (x,), (tangent,)), expected)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: loss(x, y, **call))(x), grad)
    for primal in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(primal, tangent), y, **call))
        torch.testing.assert_close((dual.primal.detach(), dual.tangent.detach()), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_equal_those_of_the_reference(device, layout):
    """Compared with a second backward of the reference."""
    logits, labels, call = ensemble(layout, device)
    x, y = logits[0].requires_grad_(), labels[0]
    (grad,) = torch.autograd.grad(SGLLoss(pooling="softmax", impl="reference")(x, y, **call), x, create_graph=True)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in grad.flatten()]
    expected = torch.stack(rows).reshape(x.shape + x.shape)
    assert expected.abs().sum() > 0
    loss, x = SGLLoss(pooling="softmax"), x.detach()
    torch.testing.assert_close(torch.func.hessian(lambda x: loss(x, y, **call))(x), expected)
    torch.testing.assert_close(torch.func.jacrev(lambda x: torch.func.grad(loss)(x, y, **call))(x), expected)


def test_torch_func_gives_the_hessian_of_a_pooling(device):
    x = torch.randn(2, 3, 5, dtype=torch.float64).to(device)
    pooling = make_pooling("softmax")
    expected = torch.autograd.functional.hessian(lambda x: pooling.reference(x).sum(), x)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.func.hessian(lambda x: pooling(x).sum())(x), expected)


def test_auto_uses_the_reference_only_inside_transforms(fused_device, monkeypatch):
    calls, fused_terms = [], _fused.fused_terms
    monkeypatch.setattr(_fused, "fused_terms", lambda *arguments: calls.append(1) or fused_terms(*arguments))
    x, y, call = ensemble("packed", fused_device)
    loss = SGLLoss()
    torch.func.grad(loss)(x[0], y[0], **call)
    with forward_ad.dual_level():
        loss(x[0], y[0], **call)
    assert not calls
    loss(x[0], y[0], **call)
    assert len(calls) == 1


def test_fused_inside_transforms_raises_an_error(fused_device):
    logits, labels, call = ensemble("masked", fused_device)
    loss = SGLLoss(impl="fused")
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(ValueError, match=r"^impl: 'fused' does not work under torch\.func.*'auto' takes the ref"):
            transform(lambda x: loss(x, labels[0], **call))(logits if transform is torch.func.vmap else logits[0])
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        loss(forward_ad.make_dual(logits[0], logits[1]), labels[0], **call)
    loss(logits[0], labels[0], **call)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_checked_where_they_are_available(device, layout):
    logits, labels, call = ensemble(layout, device)
    labels[1, 2, 0] = 2
    loss = SGLLoss(check=True)
    with pytest.raises(ValueError, match=r"targets.*got 2\.0"):
        torch.func.grad(loss)(logits[1], labels[1], **call)
    with pytest.raises(ValueError, match=r"targets.*got 2\.0"):
        torch.func.vmap(lambda x: loss(x, labels[1], **call))(logits)
    assert torch.func.vmap(lambda x, y: loss(x, y, **call))(logits, labels).isfinite().all()


def test_an_error_of_the_check_itself_is_not_hidden(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(functional, "check_values", broken)
    monkeypatch.setattr(_fused, "DEVICES", frozenset())
    logits, labels, call = ensemble("map", device)
    with pytest.raises(RuntimeError, match="out of order"):
        SGLLoss(check=True)(logits[0], labels[0], **call)
