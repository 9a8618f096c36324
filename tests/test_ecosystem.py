"""A training step inside what others built around torch: DDP, FSDP, Lightning, torch.func.

torch.compile, export, autocast and functional_call are in test_compile.py; copies, pickles and state_dict in
test_losses.py.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from instances import import_torchvision
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sgl_ops import SGLLoss
from sgl_ops.pooling import AutoPooling

WORLD = 2
KINDS = ("ddp", "fsdp")


class Step(nn.Module):
    """From images and labels to the loss. The pooling is learned, so that the criterion has parameters, too."""

    def __init__(self, impl: str = "auto"):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.criterion = SGLLoss(pooling=AutoPooling(2), class_weight=[1.0, 2.0], mask_weight=0.1, impl=impl)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.net(images), labels)


def step_and_batches(impl: str = "auto") -> tuple[Step, list[tuple[Tensor, Tensor]]]:
    """The same in every process, and a batch for each."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    return Step(impl), [(torch.randn(3, 1, 9, 9, generator=generator), labels) for _ in range(WORLD)]


def work(rank: int, folder: str) -> None:
    """One process: a step on its own batch under DDP, another under FSDP, and the gradients that it ends up with."""
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


def test_gradients_of_two_processes_are_averaged(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORLD)
    step, batches = step_and_batches()
    torch.stack([step(*batch) for batch in batches]).mean().backward()
    expected = {name: p.grad for name, p in step.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for rank in range(WORLD):
        gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind in KINDS:
            torch.testing.assert_close(gradients[kind], expected, rtol=1e-5, atol=1e-7)


def test_lightning(tmp_path):
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


def test_gradient_through_functional_call(device):
    """torch.func.grad of a step with a network's parameters; it needs the reference."""
    step, batches = step_and_batches("reference")
    step.to(device)
    images, labels = (x.to(device) for x in batches[0])
    step(images, labels).backward()
    parameters = {name: p.detach() for name, p in step.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(step, p, (images, labels)))(parameters)
    for name, parameter in step.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(gradients[name], parameter.grad)
