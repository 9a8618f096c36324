r"""The losses as functions.

Arguments of every call:

* ``logits``: instance logits, float32, float64, float16 or bfloat16, in one of these layouts. The loss is the
  same in every layout:

  ========= ============================================================ =======================================
  layout    logits                                                       bags
  ========= ============================================================ =======================================
  map       (N, C, H, W), (N, C, D, H, W); any strides, read in place    every position is an instance, or those
                                                                         of ``mask`` (N, H, W)
  padded    (N, C, L); of a model that gives (N, L, C):                  ``mask`` (N, L) bool, True = real
            ``x.transpose(1, 2)``
  packed    (T, C)                                                       ``offsets`` (N + 1,) int32 or int64
  nested    jagged nested tensor (N, ragged, C)                          its own offsets
  one class (N, L) with or without mask, or (T,) with offsets            as above, C = 1
  ========= ============================================================ =======================================

* ``targets``: bag labels (N, C), or (N,) for one class; bool, integer or floating; 0, 1, or NaN = unknown.
* ``features``: (N, L, D) or (T, D). Only :class:`~sgl_ops.pooling.AttentionPooling` uses them.
* ``process_group``: a ``torch.distributed.ProcessGroup`` whose ranks each have a part of the batch. Every denominator
  then counts the bags and instances of all ranks, and every rank returns the loss of the whole batch.
  ``DistributedDataParallel`` averages the gradients of the ranks. The result is the gradient of one process that has
  the whole batch. All ranks must call the loss equally often. A rank without bags passes one bag with unknown labels.
  Without a group, each rank computes the loss of its own bags, and the denominators count these bags only.
* ``check``: whether the *values* of targets, offsets and class weights are checked: on the CPU only (None), always
  (True; on CUDA this waits for the device), or never (False). Types and shapes are always checked. Values are never
  checked while ``torch.compile`` traces, nor those of a tensor that ``torch.func.vmap`` batches.

A (bag, class) pair with an unknown label contributes nothing, and an empty bag contributes nothing, for any value of
their logits. For finite logits of a magnitude up to 1e15 every loss and its gradient are finite. A NaN or infinite
logit of any other pair makes the loss NaN. It also makes the gradient of this pair NaN.

Errors: ``TypeError`` for a wrong type or dtype, ``ValueError`` for a wrong shape, device or value. Both name the
argument and the value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import _fused, reference
from ._bags import working_dtype
from ._checks import (
    check_call,
    check_check,
    check_class_vector,
    check_constant,
    check_features,
    check_impl,
    check_values,
    check_weights,
    instance_shape,
    looks_at_untraced,
    looks_at_values,
    unnest,
)
from ._ranks import Group, check_group
from ._tracing import is_traced, is_transformed
from .pooling import MeanPooling, make_pooling
from .settings import SettingsChanges, SGLSettings, Unpack, settings_of, takes_settings

__all__ = [
    "SGLTerms",
    "SelfGuidance",
    "bag_loss",
    "bil_loss",
    "mmm_loss",
    "self_guidance",
    "sgl_loss",
    "sgl_terms",
]


class SGLTerms(NamedTuple):
    """Scalars: ``total`` = bag + lam instance + mask_weight mask, and these three terms without their weights.

    Only ``total`` has a gradient. ``bag``, ``instance`` and ``mask`` are detached, for logging: ``backward`` of one of
    them is an error, and in a sum with another loss they give no gradient. To train with other weights, set ``lam`` and
    ``mask_weight``. To train with the bag loss alone, set both to 0, or use :class:`sgl_ops.BagLoss`.
    """

    total: Tensor
    bag: Tensor
    instance: Tensor
    mask: Tensor


class SelfGuidance(NamedTuple):
    """The targets and weights of the instance loss.

    Attributes:
        targets: M of Eq. 6, in the layout of the logits: 0, 1, or theta in between.
        part: int8, in the layout of the logits: 0 negative, 1 ambiguous, 2 positive, -1 not counted (M = 0 there).
        alpha: confidence of Eq. 8, max p - median p with the lower median: (N, C), or (N,) if the logits have no
            class axis. 1 for a negative (bag, class) pair, NaN for a pair with an unknown label or without instances.
        weight: w = 2^(alpha - 1) of Eq. 7, in the shape of ``alpha``.
    """

    targets: Tensor
    part: Tensor
    alpha: Tensor
    weight: Tensor


@takes_settings
def sgl_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    pooling: str | nn.Module = "max",
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    process_group: Group = None,
    settings: SGLSettings | None = None,
    **changes: Unpack[SettingsChanges],
) -> Tensor:
    """The Self-Guiding Loss, a scalar. :class:`sgl_ops.SGLLoss` describes the equations and every argument.

    >>> import torch
    >>> from sgl_ops.functional import sgl_loss
    >>> logits = torch.tensor([[[-2.0, 0.0, 3.0]], [[-1.0, -3.0, -2.0]]])
    >>> sgl_loss(logits, torch.tensor([[1], [0]]))
    tensor(0.8324)
    """
    total, _ = sgl_total_and_terms(
        logits, targets, mask, offsets, features, settings_of(settings, changes), pooling, class_weight, pos_weight,
        process_group, with_parts=False,
    )  # fmt: skip
    return total


@takes_settings
def sgl_terms(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    pooling: str | nn.Module = "max",
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    process_group: Group = None,
    settings: SGLSettings | None = None,
    **changes: Unpack[SettingsChanges],
) -> SGLTerms:
    """:func:`sgl_loss` and its three terms for logging. ``total`` has the gradient."""
    total, parts = sgl_total_and_terms(
        logits, targets, mask, offsets, features, settings_of(settings, changes), pooling, class_weight, pos_weight,
        process_group, with_parts=True,
    )  # fmt: skip
    assert parts is not None
    bag, instance, penalty = parts.unbind()
    return SGLTerms(total, bag, instance, penalty)


def sgl_total_and_terms(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    features: Tensor | None,
    settings: SGLSettings,
    pooling: str | nn.Module,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    group: Group,
    with_parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """(total, (bag, instance, mask) detached); the latter may be None unless ``with_parts``."""
    if group is not None:
        check_group(group)
    logits, offsets, features, traced = _validated(logits, targets, mask, offsets, features, settings.check)
    if settings.has_tensor_weights:
        settings.check_tensors()
    fused = settings.guide is None and _use_fused(settings.impl, logits)
    if class_weight is not None or pos_weight is not None:
        classes = 1 if logits.dim() == (2 if offsets is None else 1) else logits.shape[1]
        look = looks_at_values(logits, settings.check)
        class_weight = _class_vector("class_weight", class_weight, classes, logits, look)
        pos_weight = _class_vector("pos_weight", pos_weight, classes, logits, look)
    module = make_pooling(pooling)
    if not fused:
        terms = reference.sgl_terms(
            logits, targets, mask, offsets, features, settings=settings, pooling=module, class_weight=class_weight,
            pos_weight=pos_weight, process_group=group,
        )  # fmt: skip
        return settings.total(*terms), torch.stack([term.detach() for term in terms])
    code, parameter = _fused.code_of(module)
    operation = (code, parameter, _fused.CONSTANTS["self_guiding_loss"])
    if code == _fused.EXTERNAL:
        # the sum of two gradients is rounded once, to the dtype of the argument
        logits = logits.to(working_dtype(logits.dtype))
    call = _fused.Call(logits, targets, mask, offsets, class_weight, pos_weight)
    bag_sum = bag = None
    if code == _fused.EXTERNAL:
        instances = reference.read(logits, targets, mask, offsets)
        bag_sum = reference.bag_sum(instances, module, mask, offsets, features, class_weight, pos_weight)
        if group is None:
            bag, bag_sum = reference.mean_over_pairs(instances, bag_sum), None
    total, parts = _fused.fused_terms(call, bag_sum, settings, operation, group, with_parts, traced)
    if bag is not None:
        total = total + bag
        if parts is not None:
            parts = torch.cat((bag.detach().reshape(1), parts[1:]))
    return total, parts


@takes_settings
def self_guidance(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    settings: SGLSettings | None = None,
    **changes: Unpack[SettingsChanges],
) -> SelfGuidance:
    """The ternary targets (Eq. 5, 6) and weights (Eq. 7, 8) of the instance loss, for inspection and plots.

    >>> import torch
    >>> from sgl_ops.functional import self_guidance
    >>> guidance = self_guidance(torch.tensor([[-3.0, 0.0, -1.0, 2.0]]), torch.tensor([1]))
    >>> guidance.part
    tensor([[0, 1, 0, 2]], dtype=torch.int8)
    >>> guidance.targets
    tensor([[0.0000, 0.5431, 0.0000, 1.0000]])
    >>> guidance.alpha, guidance.weight
    (tensor([0.6119]), tensor([0.7641]))
    """
    settings = settings_of(settings, changes)
    nested = logits if isinstance(logits, Tensor) and logits.is_nested else None
    logits, offsets, *_ = _validated(logits, targets, mask, offsets, None, settings.check)
    instances = reference.read(logits.detach(), targets, mask, offsets)
    bags = instances.bags
    guidance = reference.guide(instances, settings)
    in_layout = [bags.layout(guidance.targets), bags.layout(guidance.part)]
    if nested is not None:
        in_layout = [torch.nested.nested_tensor_from_jagged(values, offsets) for values in in_layout]
    per_bag = [
        bags.bag_logits(torch.where(instances.labels.takes_part, v, torch.nan))
        for v in (guidance.alpha, guidance.weight)
        if v is not None
    ]
    return SelfGuidance(*in_layout, *per_bag)


def bag_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    pooling: str | nn.Module = "max",
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    check: bool | None = None,
    impl: str = "auto",
    process_group: Group = None,
) -> Tensor:
    """The bag loss alone (Eq. 3, 4), a scalar: see :class:`sgl_ops.BagLoss`.

    >>> import torch
    >>> from sgl_ops.functional import bag_loss
    >>> bag_loss(torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 0]))
    tensor(0.1809)
    """
    check_check(check)
    logits, offsets, features, traced = _validated(logits, targets, mask, offsets, features, check)
    check_group(process_group)
    if class_weight is not None or pos_weight is not None:
        classes, look = 1 if targets.dim() == 1 else targets.shape[1], looks_at_values(logits, check)
        class_weight = _class_vector("class_weight", class_weight, classes, logits, look)
        pos_weight = _class_vector("pos_weight", pos_weight, classes, logits, look)
    module = make_pooling(pooling)
    call = _fused.Call(logits, targets, mask, offsets, class_weight, pos_weight)
    fused = _fused_loss("bag_loss", call, module, impl, process_group, traced)
    if fused is not None:
        return fused
    return reference.bag_loss(
        logits, targets, mask, offsets, features, pooling=module, class_weight=class_weight, pos_weight=pos_weight,
        process_group=process_group,
    )  # fmt: skip


def bil_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    pooling: str | nn.Module = "mean",
    check: bool | None = None,
    impl: str = "auto",
    process_group: Group = None,
) -> Tensor:
    """The bag-instance loss of Zhou et al. 2017, a scalar: see :class:`sgl_ops.BILLoss`.

    >>> import torch
    >>> from sgl_ops.functional import bil_loss
    >>> bil_loss(torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 0]))
    tensor(0.4683)
    """
    check_check(check)
    logits, offsets, features, traced = _validated(logits, targets, mask, offsets, features, check)
    check_group(process_group)
    module = make_pooling(pooling)
    call = _fused.Call(logits, targets, mask, offsets, None, None)
    fused = _fused_loss("bag_instance_loss", call, module, impl, process_group, traced)
    if fused is not None:
        return fused
    return reference.bil_loss(logits, targets, mask, offsets, features, pooling=module, process_group=process_group)


def mmm_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    check: bool | None = None,
    impl: str = "auto",
    process_group: Group = None,
) -> Tensor:
    """The min-mean-max loss of Morfi & Stowell 2018, a scalar: see :class:`sgl_ops.MMMLoss`. ``features`` is not used.

    >>> import torch
    >>> from sgl_ops.functional import mmm_loss
    >>> mmm_loss(torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 0]))
    tensor(0.2314)
    """
    check_check(check)
    logits, offsets, features, traced = _validated(logits, targets, mask, offsets, features, check)
    check_group(process_group)
    call = _fused.Call(logits, targets, mask, offsets, None, None)
    fused = _fused_loss("min_mean_max_loss", call, _MEAN, impl, process_group, traced)
    if fused is not None:
        return fused
    return reference.mmm_loss(logits, targets, mask, offsets, process_group=process_group)


_MEAN = MeanPooling()
# the compared losses have one term, which is averaged over bags and classes
_ONE_TERM = SGLSettings(lam=0.0, normalize="bag")


def _fused_loss(
    loss: str, call: _fused.Call, pooling: nn.Module, impl: str, group: Group, traced: bool
) -> Tensor | None:
    """A compared loss by the fused operator; None if the reference has to compute it."""
    check_impl(impl)
    if not _use_fused(impl, call.logits):
        return None
    code, parameter = _fused.code_of(pooling)
    if code == _fused.EXTERNAL:
        if impl == "fused":
            raise ValueError(f"impl: 'fused' is not available: the operators do not have {pooling}")
        return None
    operation = (code, parameter, _fused.CONSTANTS[loss])
    return _fused.fused_terms(call, None, _ONE_TERM, operation, group, False, traced)[0]


def _validated(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    features: Tensor | None,
    check: bool | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """(logits, offsets, features) without nested tensors, checked, and whether a tracer records the call."""
    logits, offsets, features = unnest(logits, mask, offsets, features)
    check_call(logits, targets, mask, offsets)
    if features is not None:
        check_features(features, instance_shape(logits, offsets))
    traced = is_traced(logits)
    if not traced and looks_at_untraced(logits, check):
        # the operator looks in a microsecond; what it finds wrong is put into words here
        on_cpu = logits.is_cpu and "cpu" in _fused.DEVICES
        try:
            if not on_cpu or _fused.count_violations(targets, offsets, logits.shape[0]):
                check_values(targets, offsets, logits.shape[0])
        except RuntimeError:
            if not is_transformed():
                raise
            # batched by torch.func.vmap: no number of it can be looked at
    return logits, offsets, features, traced


def _use_fused(impl: str, logits: Tensor) -> bool:
    if impl == "reference":
        return False
    # is_cpu first: the name of a device takes three times as long to read
    if (logits.is_cpu and "cpu" in _fused.DEVICES) or logits.device.type in _fused.DEVICES:
        if not is_transformed():
            return True
        if impl == "fused":
            raise ValueError(
                "impl: 'fused' does not work under torch.func (grad, vmap, jvp, ...) and forward-mode differentiation; "
                "'auto' takes the reference there"
            )
        return False
    if impl == "fused":
        raise ValueError(f"impl: 'fused' is not available: {_fused.unavailable(logits.device)}")
    return False


def _class_vector(name: str, value: Tensor | None, classes: int, logits: Tensor, look: bool) -> Tensor | None:
    if value is None:
        return None
    check_class_vector(name, value, classes, logits)
    check_constant(name, value)
    if look and not is_transformed():
        check_weights(name, value, zero=name == "class_weight")
    return value.detach().to(working_dtype(logits.dtype)).contiguous()
