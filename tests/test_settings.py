"""Settings that change between steps, and learned weights of the loss terms."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
from dataclasses import fields, replace
from typing import get_type_hints

import pytest
import torch
import torch.distributed as dist
from batches import external_pooling, settled
from ranks import start_ranks
from torch import nn

from sgl_ops import BagLoss, SGLLoss, SGLSettings, _fused, diagnose, functional
from sgl_ops.pooling import GeneralizedMeanPooling, LSEPooling, TopKPooling
from sgl_ops.settings import SettingsChanges

NAMES = [field.name for field in fields(SGLSettings)]
#: Twenty steps. Every setting that may change between steps has another value in each.
STEPS = [
    {"lam": 0.1 * i + 0.05, "mask_weight": 0.05 * i + 0.1, "delta_l": 0.02 * i + 0.011, "r": 1.0 + 0.7 * i}
    for i in range(20)
]


def batch(device: torch.device, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(6, 2, 9, generator=generator, dtype=torch.float64)
    y = (torch.rand(6, 2, generator=generator) < 0.5).double()
    y[1, 1] = torch.nan
    return settled(x).to(device, dtype), y.to(device)


def gradients(loss, x, y, *others):
    """The value, and its gradients with respect to x and ``others``."""
    x = x.clone().requires_grad_()
    value = loss(x, y)
    return value.detach(), *torch.autograd.grad(value, (x, *others))


# ---------------------------------------------------------------------------------------------------------------------
# SGLSettings


def test_names_and_defaults_of_settings_come_from_sgl_settings():
    """The modules and functions have the fields of SGLSettings as their settings, with the same defaults."""
    for function in (SGLLoss, functional.sgl_loss, functional.sgl_terms, functional.self_guidance):
        parameters = inspect.signature(function).parameters
        for field in fields(SGLSettings):
            assert parameters[field.name].default == field.default
    criterion = SGLLoss()
    assert [getattr(criterion, name) for name in NAMES] == [getattr(SGLSettings(), name) for name in NAMES]
    assert all(f"{name}=" in repr(criterion) for name in NAMES)
    assert criterion.settings.__dataclass_params__.frozen


def test_losses_that_share_a_settings_object_keep_their_poolings(device):
    """The settings object keeps what the operators take, for each pooling and parameter of its own."""
    x, y = batch(device)
    settings = SGLSettings(lam=2.0)
    poolings = ["max", "softmax", TopKPooling(2), TopKPooling(5), "max"]
    shared = [functional.sgl_loss(x, y, pooling=pooling, settings=settings) for pooling in poolings]
    separate = [functional.sgl_loss(x, y, pooling=pooling, lam=2.0) for pooling in poolings]
    assert all(map(torch.equal, shared, separate))
    assert len({value.item() for value in shared}) == 4


def test_settings_object_equals_separate_settings(device):
    x, y = batch(device)
    settings = SGLSettings(lam=3.0, delta_l=0.2, mask_weight=0.5, normalize="bag")
    expected = functional.sgl_loss(x, y, lam=3.0, delta_l=0.2, mask_weight=0.5, normalize="bag")
    assert torch.equal(SGLLoss(settings=settings)(x, y), expected)
    assert torch.equal(functional.sgl_loss(x, y, settings=settings), expected)
    assert torch.equal(functional.sgl_loss(x, y, settings=replace(settings, lam=1.0), lam=3.0), expected)
    criterion = SGLLoss()
    criterion.settings = settings
    assert torch.equal(criterion(x, y), expected)
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(again(x, y), expected)
    with pytest.raises(TypeError, match="settings: expected an SGLSettings, got dict"):
        SGLLoss(settings={"lam": 3.0})
    with pytest.raises(TypeError, match="lamda"):
        SGLLoss(lamda=3.0)


# ---------------------------------------------------------------------------------------------------------------------
# Settings that change under torch.compile


def value_of(pooling, r):
    """Name and value of the parameter of a pooling in the step with ``r``."""
    return ("k", min(round(r), 9)) if isinstance(pooling, TopKPooling) else ("r", r)


def compiled_steps(impl: str, pooling: nn.Module, functional_call: bool):
    """(compiled function of x, y and the settings of a step, counter of its graphs)."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import, and the tier "quick" does without

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    criterion = SGLLoss(pooling=pooling, impl=impl)

    @torch.compile(fullgraph=True, backend=counter)
    def call(x, y, lam, mask_weight, delta_l):
        if functional_call:
            return functional.sgl_loss(
                x, y, pooling=pooling, impl=impl, lam=lam, mask_weight=mask_weight, delta_l=delta_l
            )
        return criterion(x, y)

    def step(x, y, r=None, k=None, **values):
        setattr(pooling, *(value_of(pooling, r) if k is None else ("k", k)))
        if functional_call:
            return call(x, y, **values)
        # the compiled function gets the settings from the module; it ignores these zeros
        for name, value in values.items():
            setattr(criterion, name, value)
        return call(x, y, 0.0, 0.0, 0.0)

    return step, counter


@pytest.mark.integration
@pytest.mark.no_cover
@pytest.mark.parametrize("functional_call", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("kind", [LSEPooling, GeneralizedMeanPooling, TopKPooling])
def test_twenty_values_need_two_graphs(impl, device, kind, functional_call):
    # both implementations get the settings in the same way; the reference takes longest to compile
    if impl == "emulated" or (functional_call and (kind is not LSEPooling or impl == "reference")):
        pytest.skip("covered by the other cases")
    step, counter = compiled_steps(impl, kind(), functional_call)
    x, y = batch(device)
    seen = set()
    for values in STEPS:
        settings = {name: value for name, value in values.items() if name != "r"}
        exact = SGLLoss(pooling=kind(value_of(kind(), values["r"])[1]), impl="reference", **settings)
        expected = gradients(exact, x, y)
        found = gradients(lambda x, y, values=values: step(x, y, **values), x, y)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        seen.add(expected[1].abs().sum().item())
    assert counter.frame_count <= 2
    assert len(seen) == len(STEPS)


@pytest.mark.integration
@pytest.mark.no_cover
@pytest.mark.parametrize("steps", [[2, 3, 5, 9, 4, 7, 8, 1, 6, 10, 12, 2], [0.05 * i for i in range(1, 13)]])
def test_twelve_values_of_k_need_two_graphs(impl, device, steps):
    if impl == "emulated":
        pytest.skip("the Python code, which decides the number of graphs, is that of impl fused")
    step, counter = compiled_steps(impl, TopKPooling(steps[0]), False)
    x, y = batch(device)
    for k in steps:
        found = gradients(lambda x, y, k=k: step(x, y, k=k, lam=1.0, mask_weight=0.0, delta_l=0.3), x, y)
        expected = gradients(SGLLoss(pooling=TopKPooling(k), impl="reference"), x, y)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count <= 2


@pytest.mark.integration
@pytest.mark.no_cover
def test_compiled_function_rejects_an_invalid_value(impl, device):
    torch._dynamo.reset()
    x, y = batch(device)
    compiled = torch.compile(lambda lam: functional.sgl_loss(x, y, lam=lam, impl=impl), backend="eager")
    for lam in (1.0, 2.0, 3.0):
        compiled(lam)
    with pytest.raises(Exception, match="lam: expected finite and >= 0"):
        compiled(-1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Learned weights


def expected_gradients(x, y, lam, mask_weight, **options):
    """The value and its gradients with respect to x, lam and mask_weight, from the terms of the reference."""
    x = x.clone().double().requires_grad_()
    terms = functional.sgl_terms(x, y, lam=lam, mask_weight=mask_weight, impl="reference", **options)
    terms.total.backward()
    return terms.total.detach(), x.grad, terms.instance, terms.mask


@pytest.mark.parametrize("options", [{}, {"pooling": external_pooling()}, {"normalize": "bag", "pooling": "softmax"}])
@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.integration)])
def test_gradients_of_learned_weights_equal_the_terms(impl, device, how, options):
    if how == "compiled" and (options or "emulated" in _fused._forward.name()):
        pytest.skip("covered by the other cases")
    x, y = batch(device)
    expected = expected_gradients(x, y, 2.0, 0.5, **options)
    lam, mask_weight = (torch.tensor(v, dtype=torch.float32, device=device, requires_grad=True) for v in (2.0, 0.5))

    def loss(x, y, lam, mask_weight):
        return functional.sgl_loss(x, y, lam=lam, mask_weight=mask_weight, impl=impl, **options)

    if how == "compiled":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = gradients(lambda x, y: loss(x, y, lam, mask_weight), x, y, lam, mask_weight)
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close([g.double() for g in found[2:]], list(expected[2:]), rtol=1e-6, atol=0)
    # one learned weight, and logits without a gradient
    found = torch.autograd.grad(loss(x, y, lam, 0.5), lam)
    torch.testing.assert_close(found[0].double(), expected[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_learned_weight_changes_neither_dtype_nor_gradient(impl, device, dtype):
    x, y = batch(device, dtype)
    plain = gradients(SGLLoss(lam=3.0, mask_weight=0.5, impl=impl), x, y)
    lam = torch.tensor([3.0], dtype=torch.float64, device=device, requires_grad=True)
    value, grad, _ = gradients(SGLLoss(lam=lam, mask_weight=0.5, impl=impl), x, y, lam)
    assert value.dtype == torch.float32
    assert value.shape == ()
    torch.testing.assert_close((value, grad), plain, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)
    # a float16 gradient is scaled before it is rounded
    scaled = (SGLLoss(lam=lam, impl=impl)(x.requires_grad_(), y) * 2.0**14).backward()
    assert scaled is None
    assert x.grad.isfinite().all()


def test_learned_lam_is_a_parameter_of_the_module(impl, device):
    x, y = batch(device)
    criterion = SGLLoss(lam=nn.Parameter(torch.tensor(2.0)), impl=impl).to(device)
    assert [name for name, _ in criterion.named_parameters()] == ["lam"]
    terms = criterion.terms(x, y)
    terms.total.backward()
    with torch.no_grad():
        criterion.lam -= 0.1 * criterion.lam.grad
    torch.testing.assert_close(criterion.lam.item(), 2.0 - 0.1 * terms.instance.item())
    torch.testing.assert_close(criterion(x, y), SGLLoss(lam=criterion.lam.item(), impl=impl)(x, y))
    other = copy.deepcopy(criterion)
    other.load_state_dict({"lam": torch.tensor(5.0)})
    torch.testing.assert_close(other(x, y), SGLLoss(lam=5.0, impl=impl)(x, y))
    other.lam = 1.0
    assert not list(other.parameters())
    torch.testing.assert_close(other(x, y), SGLLoss(impl=impl)(x, y))
    # a learned weight of the mask penalty
    other.mask_weight = nn.Parameter(torch.tensor(0.3, device=device))
    other(x, y).backward()
    torch.testing.assert_close(other.mask_weight.grad.double(), terms.mask)


def test_settings_for_type_checkers_are_those_of_the_loss():
    expected = {field.name: field.type for field in fields(SGLSettings)}
    changes = {name: getattr(kind, "__forward_arg__", kind) for name, kind in SettingsChanges.__annotations__.items()}
    assert changes == expected
    for function in (SGLLoss.__init__, functional.sgl_loss, functional.sgl_terms, functional.self_guidance, diagnose):
        assert get_type_hints(function)  # evaluates the annotations


def test_learned_weight_below_zero_can_be_read_and_repaired(impl, device):
    x, y = batch(device)
    criterion = SGLLoss(lam=nn.Parameter(torch.tensor(0.01)), impl=impl, check=True).to(device)
    with torch.no_grad():
        criterion.lam.sub_(1)
    assert criterion.lam.item() == pytest.approx(-0.99)
    assert criterion.delta_l == 0.3 and "lam=Parameter" in repr(criterion)
    with pytest.raises(ValueError, match=r"lam: expected finite and >= 0, got -0\.99"):
        criterion(x, y)
    criterion.delta_l = 0.2
    with torch.no_grad():
        criterion.lam.clamp_(0)
    assert list(criterion.parameters()) == [criterion.lam] and criterion.delta_l == 0.2
    torch.testing.assert_close(criterion(x, y), SGLLoss(lam=0.0, delta_l=0.2, impl=impl)(x, y))
    criterion.lam = 0.5
    assert not list(criterion.parameters()) and criterion.lam == 0.5


def test_changed_value_of_a_tensor_weight_is_checked_in_the_call(impl, device):
    x, y = batch(device)
    lam = torch.tensor(1.0)
    criterion = SGLLoss(lam=lam, impl=impl, check=True)
    criterion(x, y)
    lam.fill_(-1.0)
    with pytest.raises(ValueError, match="lam: expected finite and >= 0, got -1"):
        criterion(x, y)
    criterion.check = False
    criterion(x, y)


def test_vmap_over_lam_equals_a_loop(device):
    x, y = batch(device)
    lams = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    found = torch.func.vmap(lambda lam: functional.sgl_loss(x, y, lam=lam))(lams)
    torch.testing.assert_close(found, torch.stack([functional.sgl_loss(x, y, lam=lam) for lam in lams]))


def test_assigned_settings_are_taken_whole_or_not_at_all():
    criterion = SGLLoss(impl="fused", lam=2.0)
    settings = SGLSettings(lam=9.0, guide=lambda instances: None)
    criterion.settings = settings
    assert (criterion.lam, criterion.impl, criterion.guide) == (9.0, "auto", settings.guide)
    criterion.settings = SGLSettings(lam=nn.Parameter(torch.tensor(3.0)))
    assert [name for name, _ in criterion.named_parameters()] == ["lam"]
    for wrong in ({"lam": 1}, None):
        with pytest.raises(TypeError, match="settings: expected an SGLSettings"):
            criterion.settings = wrong
    assert criterion.lam.item() == 3.0


@pytest.mark.parametrize("changes", [{"rescale": "no"}, {"weighted": None}, {"check": "x"}, {"lam": [1.0]},
                                     {"lam": torch.ones(2).numpy()}, {"delta_l": torch.ones(2)}])  # fmt: skip
def test_settings_of_a_wrong_type_raise_an_error_that_names_them(changes):
    (name,) = changes
    with pytest.raises(TypeError, match=f"{name}: expected"):
        SGLLoss(**changes)


def test_settings_keep_few_operands_and_do_not_pickle_them(device):
    x, y = batch(device)
    criterion = SGLLoss(pooling=TopKPooling(0.5))
    for step in range(1, 60):
        criterion.pooling.k = step / 60
        criterion(x, y)
    assert len(criterion.settings.operands) <= 16
    assert "operands" not in vars(pickle.loads(pickle.dumps(criterion)).settings)
    assert "operands" not in vars(copy.deepcopy(criterion).settings)


def test_second_derivative_with_a_learned_weight_raises_an_error(fused_device):
    x, y = batch(fused_device)
    lam = torch.tensor(2.0, requires_grad=True)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(SGLLoss(lam=lam, impl="fused")(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["class_weight", "pos_weight"])
def test_class_vectors_that_require_a_gradient_raise_value_error(device, name):
    x, y = batch(device)
    vector = torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)
    message = f"{name}: expected a constant, got a tensor that requires a gradient"
    for make in (SGLLoss, BagLoss):
        with pytest.raises(ValueError, match=message):
            make(**{name: vector})
        criterion = make(**{name: vector.detach()})
        setattr(criterion, name, vector)
        with pytest.raises(ValueError, match=message):
            criterion(x, y)
    for function in (functional.sgl_loss, functional.bag_loss):
        with pytest.raises(ValueError, match=message):
            torch.func.grad(lambda v, function=function: function(x, y, **{name: v}))(vector.detach())
        with pytest.raises(ValueError, match=message):
            torch.func.jvp(lambda v, f=function: f(x, y, **{name: v}), (vector.detach(),), (vector.detach(),))


def test_delta_l_that_requires_a_gradient_raises_value_error(device):
    with pytest.raises(ValueError, match="delta_l: expected a constant"):
        SGLLoss(delta_l=torch.tensor(0.3, requires_grad=True))
    assert SGLLoss(delta_l=torch.tensor(0.25)).delta_l == 0.25


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (torch.tensor([1.0, 2.0]), ValueError, r"lam: expected one element, got shape \(2,\)"),
        (torch.tensor(1j), TypeError, "lam: expected a real number"),
        (torch.tensor(-1.0), ValueError, "lam: expected finite and >= 0, got -1"),
        (torch.tensor(torch.nan), ValueError, "lam: expected finite and >= 0, got nan"),
    ],
)
def test_invalid_tensor_weights_raise_an_error(value, kind, message):
    with pytest.raises(kind, match=message):
        SGLLoss(lam=value)
    if "finite" in message:
        SGLLoss(lam=value, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# Learned weights of two processes


class Learned(nn.Module):
    """A network that contains its criterion, so that DistributedDataParallel averages the gradients of the weights."""

    def __init__(self, impl: str, group):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        weights = {name: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for name, v in WEIGHTS.items()}
        self.criterion = SGLLoss(impl=impl, process_group=group, **weights)

    def forward(self, x, y):
        return self.criterion(self.scale * x, y)


WEIGHTS = {"lam": 2.0, "mask_weight": 0.5}
IMPLS = ["reference", *(["fused"] if "cpu" in _fused.DEVICES else [])]


def learn(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = batch(torch.device("cpu"))
    part = slice(0, 4) if rank == 0 else slice(4, 6)
    results = {}
    for impl in IMPLS:
        for how in ("eager", "compiled"):
            torch._dynamo.reset()
            model = Learned(impl, dist.group.WORLD)
            wrapped = nn.parallel.DistributedDataParallel(model)
            if how == "compiled":
                model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
            wrapped(x[part], y[part]).backward()
            results[impl, how] = {name: p.grad for name, p in model.named_parameters()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.integration
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_learned_weights_of_two_processes_get_the_gradient_of_one(tmp_path):
    start_ranks(learn, os.fspath(tmp_path), count=2)
    model = Learned("reference", None)
    model(*batch(torch.device("cpu"))).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad.abs() > 0.01 for grad in expected.values())
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt", weights_only=True).values():
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
