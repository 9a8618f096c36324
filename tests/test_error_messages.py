"""The error messages of the losses for frequent mistakes: each names the mistake, and what it suggests works."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss, diagnose, functional
from sgl_ops.pooling import AttentionPooling, make_pooling

LOSSES = (SGLLoss, BagLoss, BILLoss, MMMLoss)
LABELS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
INDICES = torch.tensor([0, 2, 1, 0])


def suggestion(message: str) -> tuple[str, str]:
    """(name, expression) of "pass <expression>" at the end of a message: the argument to replace, and by what."""
    expression = re.search(r"pass (\S.*?)( if |$)", message)[1]
    return re.search(r"(logits|targets|mask|features|offsets)\b", expression)[1], expression


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"logits": torch.randn(4, 50, 3), "targets": LABELS},
            "targets: expected shape (4, 50), (bags, classes), with logits of shape (4, 50, 3), got (4, 3); if the "
            "classes are the last dimension of the logits, pass logits.transpose(1, 2)",
        ),
        ({"logits": torch.randn(4, 7, 7, 3), "targets": LABELS}, "got (4, 3); if the classes are the last dimension"),
        ({"logits": torch.randn(4, 50, 1), "targets": LABELS[:, 0]}, "expected shape (4, 50), (bags, classes)"),
        (
            {"logits": torch.randn(4, 50, 3), "targets": LABELS, "mask": torch.ones(4, 50, dtype=torch.bool)},
            "mask: expected shape (4, 3) with logits of shape (4, 50, 3), got (4, 50); if the classes are the last",
        ),
        (
            {"logits": torch.randn(4, 3, 50), "targets": INDICES},
            "targets: expected shape (4, 3), (bags, classes), with logits of shape (4, 3, 50), got (4,); maps "
            "(N, H, W) of one class need logits.unsqueeze(1); if these are class indices, pass "
            "torch.nn.functional.one_hot(targets.long(), 3)",
        ),
        (
            {"logits": torch.randn(4, 3, 50), "targets": INDICES.unsqueeze(1).int()},
            "of one class need logits.unsqueeze(1); if these are class",
        ),
        (
            {"logits": torch.randn(9, 3), "targets": INDICES, "offsets": torch.tensor([0, 2, 4, 6, 9])},
            "targets: expected shape (4, 3), (bags, classes), with logits of shape (9, 3), got (4,); if these",
        ),
        (
            {"logits": torch.randn(9, 3), "targets": LABELS, "offsets": torch.tensor([2, 2, 2, 3])},
            "got (4, 3); if offsets are the sizes of the bags, pass torch.nn.functional.pad(offsets.cumsum(0), (1, 0))",
        ),
        (
            {"logits": torch.randn(4, 3, 7, 7), "targets": (torch.randn(4, 3, 7, 7) > 2).float()},
            "got (4, 3, 7, 7); the loss takes labels of bags, not of instances",
        ),
        (
            {
                "logits": torch.randn(4, 3, 7, 7),
                "targets": LABELS,
                "mask": torch.ones(4, 1, 7, 7, dtype=torch.bool),
            },
            "mask: expected shape (4, 7, 7) with logits of shape (4, 3, 7, 7), got (4, 1, 7, 7); pass mask.squeeze(1)",
        ),
        (
            {
                "logits": torch.randn(4, 3, 7, 7),
                "targets": LABELS,
                "mask": torch.ones(4, 3, 7, 7, dtype=torch.bool),
            },
            "got (4, 3, 7, 7); all classes share one mask: pass mask[:, 0] if",
        ),
        (
            {"logits": torch.randn(4, 3, 7, 7), "targets": LABELS, "mask": torch.ones(7, 7, dtype=torch.bool)},
            "got (7, 7); for the same mask in every bag pass mask.expand(4, 7, 7)",
        ),
    ],
)
def test_message_of_a_wrong_shape_suggests_what_works(loss, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        loss()(**arguments)
    name, expression = suggestion(str(error.value))
    arguments = {**arguments, name: eval(expression, {"torch": torch}, arguments)}
    assert torch.isfinite(loss()(**arguments))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.randn(4, 50), INDICES * torch.inf, "targets: expected 0, 1 or NaN (unknown), got inf"),
        (
            torch.randn(4, 50),
            INDICES,
            "got 2; class indices need logits of C classes: pass torch.nn.functional.one_hot",
        ),
        (torch.randn(4, 3), LABELS, "The loss needs a logit for each instance, not one for each bag"),
        (torch.randn(9, 3), LABELS, "packed logits (T, C) need offsets"),
        (torch.randn(4, 3, 50), LABELS[:3], "targets: expected shape (4, 3), (bags, classes), with logits of shape"),
    ],
)
def test_message_of_targets_that_do_not_fit(logits, targets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SGLLoss()(logits, targets)


@pytest.mark.parametrize("check", [None, False])
@pytest.mark.parametrize(
    "call", [lambda x, y, check: SGLLoss(check=check)(x, y), lambda x, y, check: MMMLoss(check=check)(x, y),
             lambda x, y, check: diagnose(x, y)],
)  # fmt: skip
def test_missing_targets_are_named(call, check):
    with pytest.raises(TypeError, match=r"targets: expected a torch\.Tensor, got NoneType"):
        call(torch.randn(2, 1, 4), None, check)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("loss", [SGLLoss, BagLoss, BILLoss])
def test_attention_pooling_without_features_says_which_features_to_pass(loss, impl):
    logits, criterion = torch.randn(4, 3, 7, 7), loss(pooling=AttentionPooling(16), impl=impl)
    with pytest.raises(ValueError, match=r"pass features= of shape \(4, 49, 16\), got None"):
        criterion(logits, LABELS)
    with pytest.raises(ValueError, match=r"pass features= of shape \(4, 49, 16\), got None"):
        criterion.pooling(logits)
    with pytest.raises(ValueError, match=r"pass features= of shape \(9, 16\), got None"):
        criterion(torch.randn(9, 3), LABELS, offsets=torch.tensor([0, 2, 4, 6, 9]))
    for shape in ((4, 16, 7, 7), (4, 16, 49)):
        features = torch.randn(shape)
        with pytest.raises(ValueError, match=r"features: expected shape \(4, 49, .*\), got .*; if the fea") as error:
            criterion(logits, LABELS, features=features)
        name, expression = suggestion(str(error.value))
        assert name == "features"
        assert torch.isfinite(criterion(logits, LABELS, features=eval(expression)))
    with pytest.raises(ValueError, match=r"features: expected shape \(4, 49, 16\), got \(4, 49, 8\)$"):
        criterion(logits, LABELS, features=torch.randn(4, 49, 8))


def test_name_of_a_learned_pooling_suggests_the_module():
    for name, module in (("attention", "AttentionPooling"), ("autopool", "AutoPooling")):
        with pytest.raises(ValueError, match=f"got '{name}'; a pooling with learned parameters is a module: {module}"):
            make_pooling(name)
    with pytest.raises(ValueError, match=r"got 'median'$"):
        make_pooling("median")


@pytest.mark.parametrize("loss", [SGLLoss, BagLoss, BILLoss])
def test_pooling_of_torch_is_refused_with_the_names_of_the_poolings(loss):
    with pytest.raises(
        TypeError, match=r"^pooling: .* takes \(logits, \*, mask, .*got AdaptiveMaxPool2d; .* max, mean"
    ):
        loss(pooling=nn.AdaptiveMaxPool2d(1))


@pytest.mark.parametrize("loss", LOSSES)
def test_arguments_of_the_losses_of_torch_are_taken_or_explained(loss):
    """A user replaces BCEWithLogitsLoss or CrossEntropyLoss, and keeps its arguments."""
    names = {*inspect.signature(nn.BCEWithLogitsLoss).parameters, *inspect.signature(nn.CrossEntropyLoss).parameters}
    assert {"weight", "reduction", "reduce", "size_average", "pos_weight"} <= names
    known = inspect.signature(loss).parameters
    for name in sorted(names):
        if name in known:
            continue
        with pytest.raises(TypeError, match=rf"^{name}: not an argument here; (?!did you|expected one)"):
            loss(**{name: "mean"})
    with pytest.raises(TypeError, match=r"^weight: .* SGLLoss and BagLoss take class_weight="):
        loss(weight=torch.ones(3))
    with pytest.raises(TypeError, match=r"^reduction: .* always a mean; leave this argument out"):
        loss(reduction="mean")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("check", ["yes", 1])
def test_check_is_true_false_or_none(loss, check):
    with pytest.raises(TypeError, match="check: expected True, False or None"):
        loss(check=check)
    with pytest.raises(TypeError, match="check: expected True, False or None"):
        functional.bag_loss(torch.zeros(2, 3), torch.tensor([0, 1]), check=check)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss is not MMMLoss])
def test_the_pooling_may_be_positional(loss):
    assert repr(loss("lse")) == repr(loss(pooling="lse"))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_representation_shows_check_and_impl(loss):
    assert "check=False, impl='reference'" in repr(loss(check=False, impl="reference"))


def test_misspelt_argument_suggests_the_name():
    with pytest.raises(TypeError, match=r"^lamda: not an argument here; did you mean lam\?"):
        SGLLoss(lamda=3.0)
    with pytest.raises(TypeError, match=r"^poolings: .* did you mean pooling\?"):
        BagLoss(poolings="max")
    with pytest.raises(TypeError, match=r"^size: .* expected one of .*process_group"):
        MMMLoss(size=3)
    for function in (functional.sgl_loss, functional.sgl_terms, functional.self_guidance):
        with pytest.raises(TypeError, match=r"^reduction: .* always a mean"):
            function(torch.randn(4, 3, 50), LABELS, reduction="mean")


def test_constructors_keep_their_signature():
    for loss in LOSSES:
        assert "impl" in inspect.signature(loss).parameters
        assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(loss).parameters.values())


def test_terms_for_logging_have_no_gradient(impl):
    """Only the total has one: it raises an error to train with a term, and BagLoss is the bag term with a gradient."""
    logits = torch.randn(4, 3, 50, requires_grad=True)
    criterion = SGLLoss(lam=0.0, impl=impl)
    terms = criterion.terms(logits, LABELS)
    for term in terms[1:]:
        assert not term.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            term.backward()
    bag = BagLoss(impl=impl)(logits, LABELS)
    torch.testing.assert_close(bag.detach(), terms.bag)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (bag, terms.total)]
    torch.testing.assert_close(*gradients)
