"""The public loss modules and functions: settings, errors, state, terms."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_kernel

import sgl_ops
from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, SGLTerms, _fused, functional
from sgl_ops.pooling import AutoPooling, MaxPooling

EVERY = [SGLLoss, BagLoss, BILLoss, MMMLoss]
# On the CPU: errors do not depend on the device.
X, Y = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 0], [0, 1], [1, 1]])
FLAT = X.transpose(1, 2).reshape(15, 2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("delta_l", -0.1), ("delta_l", 0.6), ("delta_l", math.nan), ("lam", -1.0), ("lam", math.inf),
        ("mask_weight", -1.0), ("mask_weight", math.nan), ("normalize", "instance"), ("pooling", "mode"),
        ("impl", "fast"),
    ],
)  # fmt: skip
def test_invalid_settings_raise_value_error(setting, value):
    with pytest.raises(ValueError, match=f"{setting}.*{value}"):
        SGLLoss(**{setting: value})(X, Y)
    with pytest.raises(ValueError, match=f"{setting}.*{value}"):
        functional.sgl_loss(X, Y, **{setting: value})


@pytest.mark.parametrize("setting", ["delta_l", "lam", "mask_weight"])
def test_settings_that_are_no_numbers_raise_type_error(setting):
    for call in (lambda **s: SGLLoss(**s), lambda **s: functional.sgl_loss(X, Y, **s)):
        with pytest.raises(TypeError, match=f"{setting}: expected a number, got '1'"):
            call(**{setting: "1"})


CALLS = {
    "integer logits": (TypeError, "logits.*int64", lambda f: f(X.long(), Y)),
    "no tensor": (TypeError, "logits.*list", lambda f: f([[1.0]], Y)),
    "a list of targets": (TypeError, "targets.*list", lambda f: f(X, [[1, 0]])),
    "complex targets": (TypeError, "targets.*complex", lambda f: f(X, Y.to(torch.complex64))),
    "narrow targets": (TypeError, "targets.*float8", lambda f: f(X, Y.to(torch.float8_e5m2))),
    "one bag too few": (ValueError, r"targets.*\(2, 2\)", lambda f: f(X, Y[:2])),
    "classes missing": (ValueError, r"targets.*\(3,\)", lambda f: f(X, Y[:, 0])),
    "no bag": (ValueError, "logits.*0", lambda f: f(X[:0], Y[:0])),
    "no class": (ValueError, "logits.*0", lambda f: f(X[:, :0], Y[:, :0])),
    "a scalar": (ValueError, "logits", lambda f: f(X[0, 0, 0], Y)),
    "one dimension without offsets": (ValueError, "logits.*offsets", lambda f: f(X[:, 0, 0], Y[:, 0])),
    "minus one": (ValueError, "targets.*-1.*NaN", lambda f: f(X, Y * 2 - 1)),
    "a soft label": (ValueError, "targets.*0.5", lambda f: f(X, Y * 0.5)),
    "infinite target": (ValueError, "targets.*inf", lambda f: f(X, Y * math.inf)),
    "mask of floats": (TypeError, "mask.*float32", lambda f: f(X, Y, mask=torch.ones(3, 5))),
    "mask of another shape": (ValueError, r"mask.*\(3, 4\)", lambda f: f(X, Y, mask=torch.ones(3, 4).bool())),
    "mask with classes": (ValueError, r"mask.*\(3, 2, 5\)", lambda f: f(X, Y, mask=torch.ones(3, 2, 5).bool())),
    "mask and offsets": (
        ValueError, "mask.*offsets|offsets.*mask",
        lambda f: f(FLAT, Y, mask=torch.ones(15).bool(), offsets=torch.tensor([0, 5, 9, 15])),
    ),
    "float offsets": (TypeError, "offsets.*float32", lambda f: f(FLAT, Y, offsets=torch.tensor([0.0, 5, 9, 15]))),
    "offsets of another length": (ValueError, "targets|offsets", lambda f: f(FLAT, Y, offsets=torch.tensor([0, 15]))),
    "offsets start late": (ValueError, "offsets.*1", lambda f: f(FLAT, Y, offsets=torch.tensor([1, 5, 9, 15]))),
    "offsets fall": (ValueError, "offsets", lambda f: f(FLAT, Y, offsets=torch.tensor([0, 9, 5, 15]))),
    "offsets end early": (ValueError, "offsets.*15", lambda f: f(FLAT, Y, offsets=torch.tensor([0, 5, 9, 14]))),
    "offsets end late": (ValueError, "offsets.*15", lambda f: f(FLAT, Y, offsets=torch.tensor([0, 5, 9, 16]))),
    "offsets for maps": (ValueError, "logits", lambda f: f(X, Y, offsets=torch.tensor([0, 5, 9, 15]))),
    "another device": (ValueError, "targets.*meta", lambda f: f(X, Y.to("meta"))),
}  # fmt: skip


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("call", CALLS)
def test_invalid_arguments_raise_an_error(make, call):
    kind, message, run = CALLS[call]
    with pytest.raises(kind, match=message):
        run(make())


@pytest.mark.parametrize("call", [name for name, (_, message, _) in CALLS.items() if "offsets" not in message])
def test_invalid_arguments_of_self_guidance_raise_an_error(call):
    kind, message, run = CALLS[call]
    with pytest.raises(kind, match=message):
        run(functional.self_guidance)


@pytest.mark.parametrize("make", EVERY)
def test_values_are_checked_by_default_on_the_cpu_only(make, device):
    x, y, flat = X.to(device), Y.to(device), FLAT.to(device)
    for check in (None, False, True):
        looks = check or (check is None and device.type == "cpu")
        if looks:
            with pytest.raises(ValueError, match="targets"):
                make(check=check)(x, y * 2)
        else:
            torch.testing.assert_close(make(check=check)(x, y * 2), make(check=check)(x, y))
    with pytest.raises(ValueError, match="offsets"):
        make(check=True)(flat, y, offsets=torch.tensor([0, 9, 5, 15], device=device))
    # wrong offsets cause no invalid memory access
    for offsets in ([5, 3, 900, 2**40], [-7, -3, 4, 15]):
        if make is SGLLoss and not _fused.unavailable(device):
            make(check=False)(flat, y, offsets=torch.tensor(offsets, device=device))


def test_invalid_class_vectors_raise_an_error():
    for name in ("class_weight", "pos_weight"):
        for value, kind in (
            (torch.ones(3), ValueError),
            (torch.ones(2, 1), ValueError),
            (torch.tensor([1.0, -1.0]), ValueError),
            (torch.tensor([1.0, math.nan]), ValueError),
        ):
            with pytest.raises(kind, match=name):
                SGLLoss(**{name: value})(X, Y)
        with pytest.raises(TypeError, match=name):
            functional.sgl_loss(X, Y, **{name: [1.0, 1.0]})
        for value in ("ab", ["a", "b"], torch.ones(2, dtype=torch.complex64)):
            with pytest.raises(TypeError, match=name):
                SGLLoss(**{name: value})
        # the functions check the values of each call
        for call in (functional.sgl_loss, functional.sgl_terms, functional.bag_loss):
            for value in ([1.0, -1.0], [math.nan, 1.0]):
                with pytest.raises(ValueError, match=f"{name}.*{value[1] if value[0] == 1 else value[0]}"):
                    call(X, Y, **{name: torch.tensor(value)})
                call(X, Y, check=False, **{name: torch.tensor(value)})
            with pytest.raises(TypeError, match=name):
                call(X, Y, **{name: torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="pos_weight"):
        SGLLoss(pos_weight=torch.tensor([0.0, 1.0]))(X, Y)
    assert SGLLoss(class_weight=torch.tensor([0.0, 0.0]))(X, Y) == 0


def test_copy_pickle_and_state_dict_keep_the_loss(impl, device):
    x, y = X.to(device), Y.to(device)
    criterion = SGLLoss(class_weight=torch.tensor([1.0, 2.0]), pooling=AutoPooling(2), impl=impl).to(device)
    assert criterion.double().class_weight.dtype == torch.float64
    criterion.float()
    expected = criterion(x, y)
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.testing.assert_close(again(x, y), expected)
    other = SGLLoss(class_weight=torch.tensor([5.0, 5.0]), pooling=AutoPooling(2, a=3.0), impl=impl)
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other.to(device)(x, y), expected)
    text = repr(SGLLoss(delta_l=0.25, lam=20.0, pooling="softmax"))
    for part in ("delta_l=0.25", "lam=20.0", "Softmax"):
        assert part in text
    assert isinstance(SGLLoss().pooling, MaxPooling)


def test_terms_add_up_and_only_the_total_has_a_gradient(impl, device):
    x, y = X.to(device, copy=True).requires_grad_(), Y.to(device)
    criterion = SGLLoss(lam=20.0, mask_weight=0.5, impl=impl)
    terms = criterion.terms(x, y)
    assert isinstance(terms, SGLTerms)
    torch.testing.assert_close(terms.total, terms.bag + 20 * terms.instance + 0.5 * terms.mask)
    assert torch.equal(terms.total, criterion(x, y))
    assert terms.total.requires_grad
    assert not (terms.bag.requires_grad or terms.instance.requires_grad or terms.mask.requires_grad)
    terms.total.backward()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(functional.sgl_terms(x, y, lam=20.0, mask_weight=0.5, impl=impl).total, terms.total)


def test_changed_settings_apply_to_the_next_call(impl, device):
    x, y = X.to(device), Y.to(device)
    criterion = SGLLoss(impl=impl)
    for lam in (0.0, 1.0, 20.0):
        criterion.lam = lam
        torch.testing.assert_close(criterion(x, y), SGLLoss(lam=lam, impl=impl)(x, y))
    with pytest.raises(ValueError, match="lam"):
        criterion.lam = -1.0
    torch.testing.assert_close(criterion(x, y), SGLLoss(lam=20.0, impl=impl)(x, y))


def test_settings_are_keyword_only():
    for make in EVERY:
        with pytest.raises(TypeError):
            make(0.3)


def test_unavailable_implementation_raises_value_error(device):
    x, y = X.to(device), Y.to(device)
    torch.testing.assert_close(SGLLoss(impl="auto")(x, y), SGLLoss(impl="reference")(x, y))
    reason = "only for" if _fused.DEVICES else "not built"
    with pytest.raises(ValueError, match=f"'fused' is not available.*{reason}"):
        SGLLoss(impl="fused")(X.to("meta"), Y.to("meta"))


def test_impl_auto_uses_the_kernel_of_the_device(fused_device):
    x, y = X.to(fused_device, copy=True).requires_grad_(), Y.to(fused_device)
    assert "FusedSGL" in type(SGLLoss()(x, y).grad_fn).__name__
    assert "FusedSGL" not in type(SGLLoss(impl="reference")(x, y).grad_fn).__name__


def test_custom_pooling_gives_the_loss_of_the_same_formula(impl, device):
    class Middle(torch.nn.Module):
        def forward(self, logits, *, mask=None, offsets=None, features=None):
            return logits.flatten(2).mean(2)

    x, y = X.to(device), Y.to(device)
    torch.testing.assert_close(SGLLoss(pooling=Middle(), impl=impl)(x, y), SGLLoss(pooling="mean_logits")(x, y))


def test_pooling_with_a_wrong_output_shape_raises_value_error(impl, device):
    class Each(torch.nn.Module):
        def forward(self, logits, *, mask=None, offsets=None, features=None):
            return logits

    with pytest.raises(ValueError, match=r"pooling.*\(3, 2\), got \(3, 2, 5\)"):
        SGLLoss(pooling=Each(), impl=impl)(X.to(device), Y.to(device))


def test_hooks_of_a_pooling_are_called(impl, device):
    x, y = X.to(device).requires_grad_(), Y.to(device)
    loss = SGLLoss(impl=impl)
    plain = loss(x, y)
    calls = []
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(loss.pooling, f"register_{name}")(lambda *_, name=name: calls.append(name))
        total = loss(x, y)
        total.backward()
        torch.testing.assert_close(total, plain)
        assert calls == [name]
        handle.remove()
        calls.clear()


def test_training_with_bag_labels_finds_the_positive_instances(device):
    """A linear network learns from bag labels which instances are bright."""
    torch.manual_seed(0)
    x = torch.randn(64, 20, 4)
    bright = torch.rand(64, 20) < 0.1
    bright[32:] = False
    bright[:32, 0] = True
    x[..., 0] += 6.0 * bright
    x, bright = x.to(device), bright.to(device)
    model = torch.nn.Linear(4, 1).to(device)
    criterion = SGLLoss()
    for _ in range(200):
        loss = criterion(model(x).squeeze(2), bright.any(1))
        with torch.no_grad():  # gradient descent; torch.optim takes a second to import
            for parameter, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True
            ):
                parameter -= 0.5 * gradient
    found = model(x).squeeze(2) > 0
    assert (found & bright).sum() / (found | bright).sum() > 0.9


@pytest.mark.parametrize("pooling", ["max", "mean", "softmax"])
def test_mean_over_batches_is_the_loss_of_all_bags_if_counts_are_those_of_bags(pooling):
    """Gradient accumulation. With counts over the batch, every batch has its own denominators."""
    x, labels = torch.randn(8, 3, 30, dtype=torch.float64), torch.randint(0, 2, (8, 3)).double()
    for normalize, equal in (("bag", True), ("batch", False)):
        criterion = SGLLoss(normalize=normalize, mask_weight=0.5, pooling=pooling)
        halves = (criterion(x[:4], labels[:4]) + criterion(x[4:], labels[4:])) / 2
        assert torch.isclose(halves, criterion(x, labels), rtol=1e-9, atol=0).item() == equal


@needs_kernel
def test_step_calls_few_python_functions():
    """Most of a step on small bags is the time of Python calls. More of them slow every user with small bags down."""
    x = torch.randn(64, 1, 50, requires_grad=True)
    y = (torch.rand(64, 1) < 0.5).float()
    criterion = SGLLoss(impl="fused")
    criterion(x, y).backward()  # the first step also fills what later steps use again
    package, calls = str(Path(sgl_ops.__file__).parent), []

    def count(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        criterion(x, y).backward()
    finally:
        sys.setprofile(None)
    assert 0 < len(calls) <= 25, calls
