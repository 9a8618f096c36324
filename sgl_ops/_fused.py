"""The fused operator: where it is available, and its place in autograd."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._bags import working_dtype
from ._ranks import Group, size_of, summed
from .pooling import (
    LinearSoftmaxPooling,
    LSEPooling,
    MaxPooling,
    MeanLogitsPooling,
    MeanPooling,
    NoisyOrPooling,
    SoftmaxPooling,
)

try:
    importlib.import_module("sgl_ops._C")  # importing it registers the operators

    # torch for ROCm says "cuda", too
    HAS_CUDA = torch.ops.sgl_ops.has_cuda() and torch.version.cuda is not None
    DEVICES: frozenset[str] = frozenset({"cpu", "cuda"} if HAS_CUDA else {"cpu"})
    REASON = ""
except ImportError as error:
    DEVICES = frozenset()
    REASON = str(error)

#: Poolings that ride along in the operator, as csrc/sgl_math.h numbers them; 0 leaves the bag loss to others.
EXTERNAL = 0
CODES: dict[type[nn.Module], int] = {
    MaxPooling: 1,
    MeanPooling: 2,
    MeanLogitsPooling: 3,
    SoftmaxPooling: 4,
    LinearSoftmaxPooling: 5,
    LSEPooling: 6,
    NoisyOrPooling: 7,
}

#: Numbers that the operator keeps of each bag-class for its backward: kColumns in csrc/batch.h.
SAVED_COLUMNS = 11


def code_of(pooling: nn.Module) -> tuple[int, float]:
    """(code, parameter) of a pooling. By exact type: a subclass may have changed what it computes, as may a hook."""
    code = CODES.get(type(pooling), EXTERNAL)
    if code != EXTERNAL and (
        pooling._forward_hooks or pooling._forward_pre_hooks or pooling._backward_hooks or pooling._backward_pre_hooks
    ):
        code = EXTERNAL
    return code, (pooling.r if code == 6 else 1.0)  # type: ignore[return-value]


def unavailable(device: torch.device) -> str:
    """Why there is no fused kernel for ``device``; empty where there is one."""
    if device.type in DEVICES:
        return ""
    if REASON:
        return f"the extension sgl_ops._C was not built or does not load ({REASON})"
    return f"there is no fused kernel for {device.type}, only for {', '.join(sorted(DEVICES))}"


_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which every operation has to be torch's own.

    An autograd.Function of the form that torch.func takes would make a step on small bags two fifths longer, and
    forward mode would take the operator's result for a constant, in silence.
    """
    try:
        return _transforms_are_active() or forward_ad._current_level >= 0
    except AttributeError:  # a name of torch's own, which a later one may lack
        return False


if DEVICES:
    _forward = torch.ops.sgl_ops.sgl_forward.default
    _forward_sums = torch.ops.sgl_ops.sgl_forward_sums.default
    _conclude = torch.ops.sgl_ops.sgl_conclude.default
    _backward = torch.ops.sgl_ops.sgl_backward.default
    count_violations = torch.ops.sgl_ops.check_values.default

    @torch.library.register_fake("sgl_ops::sgl_forward")
    def _forward_fake(logits, targets, mask, offsets, *settings):  # type: ignore[no-untyped-def]
        dtype = working_dtype(logits.dtype)
        if offsets is None:
            bags, classes = logits.shape[0], 1 if logits.dim() == 2 else logits.shape[1]
        else:
            bags, classes = offsets.shape[0] - 1, 1 if logits.dim() == 1 else logits.shape[1]
        new = logits.new_empty
        return new((), dtype=dtype), new((3,), dtype=dtype), new((bags * classes + 1, SAVED_COLUMNS), dtype=dtype)

    @torch.library.register_fake("sgl_ops::sgl_forward_sums")
    def _forward_sums_fake(logits, *rest):  # type: ignore[no-untyped-def]
        return *_forward_fake(logits, *rest), logits.new_empty((10,), dtype=torch.float64)

    @torch.library.register_fake("sgl_ops::sgl_conclude")
    def _conclude_fake(sums, saved, *settings):  # type: ignore[no-untyped-def]
        return saved.new_empty(()), saved.new_empty((3,))

    @torch.library.register_fake("sgl_ops::sgl_backward")
    def _backward_fake(grad_output, logits, *rest):  # type: ignore[no-untyped-def]
        return torch.empty_like(logits)


def _of_ranks(  # type: ignore[no-untyped-def]
    logits, targets, mask, offsets, class_weight, pos_weight, settings, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, (bag, instance, mask), what the backward needs), of the batch that the ranks of ``group`` share."""
    if group is None:
        return _forward(logits, targets, mask, offsets, class_weight, pos_weight, *settings)  # type: ignore[no-any-return]
    *_, saved, sums = _forward_sums(logits, targets, mask, offsets, class_weight, pos_weight, *settings)
    # what is counted is added up as integers
    counts, numbers = summed(sums.view(torch.int64)[:4], group), summed(sums[4:], group)
    sums = torch.cat((counts.view(torch.float64), numbers))
    _, lam, mask_weight, _, _, per_bag, _, _ = settings
    total, parts = _conclude(sums, saved, lam, mask_weight, per_bag, float(size_of(group)))
    return total, parts, saved


class _FusedSGL(torch.autograd.Function):
    """Total, or total and (bag, instance, mask).

    The backward computes the gradient anew from the logits and the statistics of each bag-class: cheaper than storing
    a tensor of the logits' size in forward to read, scale and write it again.

    Few arguments and outputs: of small bags most of a step is what torch does with each of them.
    """

    @staticmethod
    def forward(ctx, logits, targets, mask, offsets, class_weight, pos_weight, settings, group, with_parts):  # type: ignore[no-untyped-def]
        total, parts, saved = _of_ranks(logits, targets, mask, offsets, class_weight, pos_weight, settings, group)
        ctx.save_for_backward(logits, mask, offsets, pos_weight, saved)
        ctx.settings = settings
        if not with_parts:
            return total
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)  # else torch fills a gradient of parts with zeros, a launch on a GPU
        return total, parts

    @staticmethod
    def backward(ctx, grad_total, _grad_parts=None):  # type: ignore[no-untyped-def]
        if grad_total is None:
            return (None,) * 9
        logits, mask, offsets, pos_weight, saved = ctx.saved_tensors
        delta_l, _, _, code, parameter, _, rescale, _ = ctx.settings
        arguments = (grad_total, logits, mask, offsets, pos_weight, saved, delta_l, code, parameter, rescale)
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                grad = _backward(*arguments)
            grad = _Once.apply(grad, logits, grad_total)  # type: ignore[no-untyped-call]
        else:
            grad = _backward(*arguments)
        return grad, None, None, None, None, None, None, None, None


class _Once(torch.autograd.Function):
    """The gradient, linked to what it depends on so that its own derivative is an error.

    torch's once_differentiable leaves the gradient unlinked where grad_output needs no gradient, which is the rule for
    a loss: a gradient penalty would be constant, in silence.
    """

    @staticmethod
    def forward(ctx, grad, _logits, _grad_total):  # type: ignore[no-untyped-def]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _grad):  # type: ignore[no-untyped-def]
        raise RuntimeError("the fused Self-Guiding Loss has no second derivative; impl='reference' has one")


def fused_terms(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    settings: tuple[float, float, float, int, float, bool, bool, bool],
    group: Group,
    with_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """(total, (bag, instance, mask)) by the fused operator, the latter None unless asked for.

    ``settings``: delta_l, lam, mask_weight, code and parameter of the pooling, per_bag, rescale, weighted.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        result = _FusedSGL.apply(  # type: ignore[no-untyped-call]
            logits, targets, mask, offsets, class_weight, pos_weight, settings, group, with_parts
        )
        return result if with_parts else (result, None)
    total, parts, _ = _of_ranks(logits, targets, mask, offsets, class_weight, pos_weight, settings, group)
    return total, parts
