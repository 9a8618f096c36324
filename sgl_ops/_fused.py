"""The fused operator: where it is available, and its place in autograd."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._bags import working_dtype
from ._ranks import Group, all_reduce_batch, size_of
from ._tracing import is_compiled, is_scripted
from .settings import SGLSettings

if TYPE_CHECKING:
    from torch._ops import OpOverload


def _table(text: str) -> dict[str, list[int]]:
    """The constants of the operators: each line has a name and its numbers."""
    return {name: [int(number) for number in numbers] for name, *numbers in map(str.split, text.splitlines())}


#: The poolings of the operators (csrc/pooling.h): codes by name, and by code whether the pooling has a parameter.
CODE_OF_NAME: dict[str, int] = {}
HAS_PARAMETER: dict[int, bool] = {}
#: Widths of the tensors that the operators return, and codes of the losses (csrc/batch.h).
CONSTANTS: dict[str, int] = {}

try:
    importlib.import_module("sgl_ops._C")  # importing it registers the operators

    try:
        for _name, (_code, _flag) in _table(torch.ops.sgl_ops.poolings()).items():
            CODE_OF_NAME[_name] = _code
            HAS_PARAMETER[_code] = bool(_flag)
        CONSTANTS = {_name: _numbers[0] for _name, _numbers in _table(torch.ops.sgl_ops.constants()).items()}
    except AttributeError:
        raise ImportError("it was compiled from older sources: build it again") from None
    # a ROCm build of torch also calls its devices "cuda"
    HAS_CUDA = torch.ops.sgl_ops.has_cuda() and torch.version.cuda is not None
    DEVICES: frozenset[str] = frozenset({"cpu", "cuda"} if HAS_CUDA else {"cpu"})
    REASON = ""
except ImportError as error:
    DEVICES = frozenset()
    REASON = str(error)
    # pip has already reported a pure-Python installation
    if (Path(__file__).parents[1] / "setup.py").exists() or not isinstance(error, ModuleNotFoundError):
        warnings.warn(
            f"sgl_ops in {Path(__file__).parent} has no compiled extension ({REASON}). Every loss uses the reference, "
            "at least 5 times slower on a CPU. Run 'pip install .' in the source tree, and import sgl_ops from another "
            "folder.",
            RuntimeWarning,
            stacklevel=2,
        )

#: Values of the environment variable SGL_OPS_CPU (csrc/cpu/kernels.cpp), the slowest first.
CPU_LEVELS = ("baseline", "avx2", "avx512")
_wanted = os.environ.get("SGL_OPS_CPU")
if _wanted and DEVICES and _wanted != (_used := torch.ops.sgl_ops.cpu_level()):
    warnings.warn(
        f"SGL_OPS_CPU: expected {', '.join(CPU_LEVELS)}, got {_wanted!r}; the kernels for {_used} are used"
        if _wanted not in CPU_LEVELS
        else f"SGL_OPS_CPU={_wanted}: this machine has no {_wanted}; the kernels for {_used} are used",
        RuntimeWarning,
        stacklevel=2,
    )

#: The code of a pooling that the operators do not have: its bag loss is computed by PyTorch.
EXTERNAL = CODE_OF_NAME.get("none", 0)
#: Codes of the pooling modules. sgl_ops/pooling.py adds each module whose name the operators know.
CODES: dict[type[nn.Module], int] = {}


class Operation(NamedTuple):
    """The arguments of the operators that are not settings, by their names."""

    pooling: int
    pooling_param: float
    loss: int


def has_code(pooling: nn.Module) -> bool:
    """Whether the operators have this pooling. A subclass or a hook may compute something else."""
    return type(pooling) in CODES and not (
        pooling._forward_hooks or pooling._forward_pre_hooks or pooling._backward_hooks or pooling._backward_pre_hooks
    )


def code_of(pooling: nn.Module) -> tuple[int, float]:
    """(code, parameter) of a pooling for the operators; (EXTERNAL, 1) if they do not have it."""
    if not has_code(pooling):
        return EXTERNAL, 1.0
    code = CODES[type(pooling)]
    if not HAS_PARAMETER[code]:
        return code, 1.0
    parameter: float | None = pooling.operator_parameter  # type: ignore[assignment]
    if parameter is None:
        return EXTERNAL, 1.0
    if code == CODE_OF_NAME["generalized_mean"] and parameter == 1.0:
        return CODE_OF_NAME["mean"], 1.0  # the same P in a third of the time
    return code, parameter


def unavailable(device: torch.device) -> str:
    """The reason why there is no fused kernel for ``device``; empty if there is one."""
    if device.type in DEVICES:
        return ""
    if REASON:
        return f"the extension sgl_ops._C was not built or does not load ({REASON})"
    return f"there is no fused kernel for {device.type}, only for {', '.join(sorted(DEVICES))}"


if DEVICES:
    _forward = torch.ops.sgl_ops.sgl_forward.default
    _forward_sums = torch.ops.sgl_ops.sgl_forward_sums.default
    _finalize = torch.ops.sgl_ops.sgl_finalize.default
    _pool_forward = torch.ops.sgl_ops.pool_forward.default
    _pool_backward = torch.ops.sgl_ops.pool_backward.default
    _backward = torch.ops.sgl_ops.sgl_backward.default
    count_violations = torch.ops.sgl_ops.check_values.default

    @torch.library.register_fake("sgl_ops::sgl_forward")
    def _forward_fake(logits, targets, mask, offsets, *settings):  # type: ignore[no-untyped-def]
        bag_logits, saved = _pool_forward_fake(logits, mask, offsets)
        return bag_logits.new_empty(()), bag_logits.new_empty((3,)), saved

    @torch.library.register_fake("sgl_ops::pool_forward")
    def _pool_forward_fake(logits, mask, offsets, *settings):  # type: ignore[no-untyped-def]
        dtype = working_dtype(logits.dtype)
        if offsets is None:
            bags, classes = logits.shape[0], 1 if logits.dim() == 2 else logits.shape[1]
        else:
            bags, classes = offsets.shape[0] - 1, 1 if logits.dim() == 1 else logits.shape[1]
        saved = logits.new_empty((bags * classes + 1, CONSTANTS["saved_columns"]), dtype=dtype)
        return logits.new_empty((bags, classes), dtype=dtype), saved

    @torch.library.register_fake("sgl_ops::pool_backward")
    def _pool_backward_fake(grad_output, logits, *rest):  # type: ignore[no-untyped-def]
        return torch.empty_like(logits)

    @torch.library.register_fake("sgl_ops::sgl_forward_sums")
    def _forward_sums_fake(logits, *rest):  # type: ignore[no-untyped-def]
        return *_forward_fake(logits, *rest), logits.new_empty((CONSTANTS["batch_numbers"],), dtype=torch.float64)

    @torch.library.register_fake("sgl_ops::sgl_finalize")
    def _finalize_fake(sums, saved, *settings):  # type: ignore[no-untyped-def]
        return saved.new_empty(()), saved.new_empty((3,))

    @torch.library.register_fake("sgl_ops::sgl_backward")
    def _backward_fake(grad_output, logits, *rest):  # type: ignore[no-untyped-def]
        return torch.empty_like(logits)

    @torch.library.register_fake("sgl_ops::check_values")
    def _check_fake(targets, offsets, total):  # type: ignore[no-untyped-def]
        return 0  # a fake tensor has no values: no error is found

    def _names_after(operator: OpOverload, argument: str) -> list[str]:
        names = [a.name for a in operator._schema.arguments]
        return names[names.index(argument) + 1 :]

    # The operators take the settings by these names: a setting is named in SGLSettings and in csrc/schema.h.
    _OF_FORWARD = _names_after(_forward, "pos_weight")
    _OF_BACKWARD = _names_after(_backward, "saved")
    _NUMBERS = [a.name for a in _forward._schema.arguments if isinstance(a.type, torch.FloatType)]

    def _define_with_numbers(operator: OpOverload, run: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
        """Define ``<operator>_numbers``, which takes the numbers among the settings as a tensor.

        torch.compile makes a new graph for each value of a float argument, but not for each value of a tensor.

        Args:
            operator: the operator.
            run: calls the operator. It is a function, so that tests can replace the operator.
            fake: its fake kernel.
        """
        arguments, results = str(operator._schema).split("(", 1)[1].split(") -> ", 1)
        kept = [argument for argument in arguments.split(", ") if not argument.startswith("float ")]
        name = f"{operator._schema.name}_numbers"
        torch.library.define(name, f"(Tensor numbers, {', '.join(kept)}) -> {results}", tags=_TAGS)
        order = [a.name if isinstance(a.type, torch.FloatType) else None for a in operator._schema.arguments]

        @torch.library.impl(name, "CompositeExplicitAutograd")
        def kernel(numbers, *others):  # type: ignore[no-untyped-def]
            values, rest = dict(zip(_NUMBERS, numbers.tolist(), strict=True)), iter(others)
            return run(*(next(rest) if name is None else values[name] for name in order))

        torch.library.register_fake(name, lambda numbers, *others: fake(*others))
        namespace, short = name.split("::")
        return getattr(getattr(torch.ops, namespace), short).default  # type: ignore[no-any-return]

    # a captured CUDA graph would repeat the numbers of the step in which it was captured
    _TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
    _forward_numbers = _define_with_numbers(_forward, lambda *a: _forward(*a), _forward_fake)
    _forward_sums_numbers = _define_with_numbers(_forward_sums, lambda *a: _forward_sums(*a), _forward_sums_fake)
    _backward_numbers = _define_with_numbers(_backward, lambda *a: _backward(*a), _backward_fake)


class Call(NamedTuple):
    """The tensor arguments of the operators, after the checks."""

    logits: Tensor
    targets: Tensor
    mask: Tensor | None
    offsets: Tensor | None
    class_weight: Tensor | None
    pos_weight: Tensor | None


class Operands(NamedTuple):
    """The values of the other arguments of the operators, in the order of their schemas."""

    forward: tuple[Any, ...]
    backward: tuple[Any, ...]


def _operands(settings: SGLSettings, operation: tuple[int, float, int], traced: bool) -> Operands:
    """The operands of an :class:`Operation`. The settings cache them, which makes steps on small bags shorter."""
    if traced or operation not in settings.operands:
        named = Operation(*operation)

        def of(names: list[str]) -> tuple[Any, ...]:
            return tuple(getattr(named if name in Operation._fields else settings, name) for name in names)

        operands = Operands(of(_OF_FORWARD), of(_OF_BACKWARD))
        if traced:
            return operands
        if len(settings.operands) >= 16:  # the parameter of the pooling changes from step to step
            settings.operands.clear()
        settings.operands[operation] = operands
    return settings.operands[operation]  # type: ignore[no-any-return]


def _over_ranks(
    saved: Tensor, sums: Tensor, bag_sum: Tensor | None, group: Group, lam: float, mask_weight: float, per_bag: bool
) -> Any:
    """(total, (bag, instance, mask)) of the batch that the ranks share; sets the denominators in ``saved``.

    ``bag_sum``: this rank's sum of the bag loss of a pooling that is not in the operator.
    """
    integers = CONSTANTS["batch_integers"]  # counts are added as integers
    counts, numbers = sums.view(torch.int64)[:integers], sums[integers:]
    if bag_sum is not None:
        numbers = numbers + F.pad(bag_sum.to(numbers.dtype).reshape(1), (4, 1))
    counts, numbers = all_reduce_batch(counts, numbers, group)
    sums = torch.cat((counts.view(torch.float64), numbers))
    return _finalize(sums, saved, lam, mask_weight, per_bag, float(size_of(group)))


def _run_forward(call: Call, bag_sum: Tensor | None, settings: SGLSettings, operands: Operands, group: Group) -> Any:
    """(total, (bag, instance, mask), the saved tensor for backward)."""
    if group is None:
        return _forward(*call, *operands.forward)
    *_, saved, sums = _forward_sums(*call, *operands.forward)
    return *_over_ranks(saved, sums, bag_sum, group, settings.lam, settings.mask_weight, settings.per_bag), saved  # type: ignore[arg-type]


def _linked(run: Callable[..., Tensor], arguments: tuple[Any, ...], logits: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient ``run(*arguments)``. With create_graph=True, its derivative raises an error."""
    if not torch.is_grad_enabled():
        return run(*arguments)
    with torch.no_grad():
        grad = run(*arguments)
    return _Once.apply(grad, logits, grad_output)  # type: ignore[no-untyped-call, no-any-return]


class _FusedSGL(torch.autograd.Function):
    """Total, or total and (bag, instance, mask) as constants. The settings are numbers.

    The backward computes the gradient from the logits and the statistics of each bag and class. That is cheaper than a
    tensor of the logits' size, which forward would write and backward would read, scale and write again.

    Few arguments and outputs: on small bags autograd's per-argument overhead dominates.
    """

    @staticmethod
    def forward(ctx, logits, bag_sum, constants):  # type: ignore[no-untyped-def]
        call, settings, operands, group, with_parts = constants
        total, parts, saved = _run_forward(call, bag_sum, settings, operands, group)
        ctx.save_for_backward(logits, call.mask, call.offsets, call.pos_weight, saved)
        ctx.operands = operands.backward
        if not with_parts:
            return total
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)  # else torch fills a gradient of parts with zeros, a launch on a GPU
        return total, parts

    @staticmethod
    def backward(ctx, grad_total, _grad_parts=None):  # type: ignore[no-untyped-def]
        if grad_total is None:
            return None, None, None
        kept = ctx.saved_tensors
        arguments = (grad_total, *kept, *ctx.operands)
        of_bag_sum = grad_total * kept[-1][-1, _SHARE_OF_PAIR] if ctx.needs_input_grad[1] else None
        return _linked(_backward, arguments, kept[0], grad_total), of_bag_sum, None


class _FusedTerms(torch.autograd.Function):
    """The three terms (bag, instance, mask), unweighted, each with its gradient.

    ``numbers`` is a CPU float64 tensor of the numbers among the settings, with 1 for ``lam`` and ``mask_weight``.
    ``others`` are the other settings of forward and of backward.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        logits,
        bag_sum,
        targets,
        mask,
        offsets,
        class_weight,
        pos_weight,
        numbers,
        others,
        of_backward,
        loss,
        per_bag,
        group,
    ):
        arguments = (numbers, logits, targets, mask, offsets, class_weight, pos_weight, *others)
        if group is None:
            _, parts, saved = _forward_numbers(*arguments)
        else:
            *_, saved, sums = _forward_sums_numbers(*arguments)
            _, parts = _over_ranks(saved, sums, bag_sum, group, 1.0, 1.0, per_bag)
        ctx.save_for_backward(logits, mask, offsets, pos_weight, saved, numbers)
        ctx.of_backward, ctx.loss = of_backward, loss
        return parts

    @staticmethod
    def backward(ctx, grad_parts):  # type: ignore[no-untyped-def]
        kept = ctx.saved_tensors
        of_bag_sum = grad_parts[0] * kept[4][-1, _SHARE_OF_PAIR] if ctx.needs_input_grad[1] else None
        return _gradient_of_terms(grad_parts, kept, ctx.of_backward, ctx.loss), of_bag_sum, *(None,) * 12


def _gradient_of_terms(grad_parts: Tensor, kept: tuple[Tensor, ...], of_backward: tuple[Any, ...], loss: int) -> Tensor:
    """The gradient with respect to the logits, from the gradient with respect to (bag, instance, mask).

    Each of the three multiplies its columns of ``saved``.

    ``kept``: logits, mask, offsets, pos_weight, saved, numbers. ``of_backward``: the other settings of the backward.
    """
    logits, mask, offsets, pos_weight, saved, numbers = kept
    bag, instance, penalty = grad_parts.detach().unbind()
    one = torch.ones_like(bag)
    factors = {1: one, "instance": instance, "mask": penalty, "bag": bag}
    saved = saved * torch.stack([factors[key] for key in _factors(loss)])
    arguments = (numbers, one, logits, mask, offsets, pos_weight, saved, *of_backward)
    return _linked(_backward_numbers, arguments, logits, grad_parts)


if DEVICES:

    def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        numbers, logits, _, mask, offsets, _, pos_weight, *others = inputs
        ctx.save_for_backward(logits, mask, offsets, pos_weight, output[2], numbers)
        given = dict(zip([name for name in _OF_FORWARD if name not in _NUMBERS], others, strict=True))
        ctx.of_backward = tuple(given[name] for name in _OF_BACKWARD if name not in _NUMBERS)
        ctx.loss = given["loss"]
        ctx.inputs = len(inputs)

    def _differentiate(ctx: Any, _total: Tensor, grad_parts: Tensor, _saved: Tensor) -> tuple[Tensor | None, ...]:
        """Only the terms have a derivative. Callers that need it use no other output."""
        grad = _gradient_of_terms(grad_parts, ctx.saved_tensors, ctx.of_backward, ctx.loss)
        return None, grad, *(None,) * (ctx.inputs - 2)

    torch.library.register_autograd("sgl_ops::sgl_forward_numbers", _differentiate, setup_context=_keep)


def _factors(loss: int) -> tuple[str | int, ...]:
    """The term whose gradient multiplies each column of ``saved`` (enum Column in csrc/batch.h)."""
    first = CONSTANTS["first_weight_column"]
    # BagLoss, BIL and MMM have one term, the bag term
    parts = ["instance" if loss == CONSTANTS["self_guiding_loss"] else "bag"] * 3
    columns: list[str | int] = [*[1] * first, *parts, "mask", "bag"]
    return (*columns, *[1] * (CONSTANTS["saved_columns"] - len(columns)))


#: The column of the last row of ``saved`` with the factor of the mean over pairs: kDenominatorPair in csrc/batch.h.
_SHARE_OF_PAIR = 3


class _Once(torch.autograd.Function):
    """The gradient, connected to its inputs, so that a second derivative is an error.

    once_differentiable of torch does not connect the gradient if grad_output needs no gradient, which is usual for a
    loss. A gradient penalty would then be a constant, without an error.
    """

    @staticmethod
    def forward(ctx, grad, _logits, _grad_total):  # type: ignore[no-untyped-def]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _grad):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "the fused operators have no second derivative; impl='reference' of a loss, and the "
            "method reference of a pooling, have one"
        )


def fused_terms(
    call: Call,
    bag_sum: Tensor | None,
    settings: SGLSettings,
    operation: tuple[int, float, int],
    group: Group,
    with_parts: bool,
    traced: bool,
) -> tuple[Tensor, Tensor | None]:
    """(total, (bag, instance, mask) detached) by the fused operator; the terms are None unless ``with_parts``.

    Args:
        call: the tensors.
        bag_sum: with ``group``: the sum over the pairs of this rank of the bag loss, of a pooling that is not in the
            operator.
        operation: the values of an :class:`Operation`: code and parameter of the pooling by :func:`code_of`, the loss.
        traced: whether a tracer records the call (:func:`sgl_ops._tracing.is_traced`).
    """
    operands = _operands(settings, operation, traced)
    if settings.has_tensor_weights or (traced and (is_scripted() or is_compiled())):
        parts = _terms_by_numbers(call, bag_sum, settings, Operation(*operation), operands, group)
        return settings.total(*parts.unbind()), parts.detach()
    logits = call.logits
    if (logits.requires_grad or (bag_sum is not None and bag_sum.requires_grad)) and torch.is_grad_enabled():
        result = _FusedSGL.apply(logits, bag_sum, (call, settings, operands, group, with_parts))  # type: ignore[no-untyped-call]
        return result if with_parts else (result, None)
    total, parts, _ = _run_forward(call, bag_sum, settings, operands, group)
    return total, parts


def _terms_by_numbers(
    call: Call, bag_sum: Tensor | None, settings: SGLSettings, operation: Operation, operands: Operands, group: Group
) -> Tensor:
    """(bag, instance, mask), each with its gradient; one graph of torch.compile serves all values of the settings."""
    constant = {"lam": 1.0, "mask_weight": 1.0, "pooling_param": operation.pooling_param}
    values = [constant[name] if name in constant else getattr(settings, name) for name in _NUMBERS]
    # torch.compile turns a sum of a tensor and a number into a tensor operation
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    numbers = torch.stack([zero + value for value in values])
    others, of_backward = (
        tuple(v for name, v in zip(names, values, strict=True) if name not in _NUMBERS)
        for names, values in ((_OF_FORWARD, operands.forward), (_OF_BACKWARD, operands.backward))
    )
    if is_scripted() and group is None:
        # torch.jit.trace records the operator with its gradient, but not an autograd.Function with its gradient
        return _forward_numbers(numbers, *call, *others)[1]  # type: ignore[no-any-return]
    arguments = (numbers, others, of_backward, operation.loss, settings.per_bag, group)
    return _FusedTerms.apply(call.logits, bag_sum, *call[1:], *arguments)  # type: ignore[no-untyped-call, no-any-return]


class _FusedPooling(torch.autograd.Function):
    """Bag logits (N, C), their gradient from the logits and the statistics of each bag and class."""

    @staticmethod
    def forward(ctx, logits, mask, offsets, code, parameter):  # type: ignore[no-untyped-def]
        bag_logits, saved = _pool_forward(logits, mask, offsets, code, parameter)
        ctx.save_for_backward(logits, mask, offsets, saved)
        ctx.pooling = code, parameter
        return bag_logits

    @staticmethod
    def backward(ctx, grad_bag_logits):  # type: ignore[no-untyped-def]
        arguments = (grad_bag_logits.contiguous(), *ctx.saved_tensors, *ctx.pooling)
        return _linked(_pool_backward, arguments, ctx.saved_tensors[0], grad_bag_logits), None, None, None, None


def pooled(logits: Tensor, mask: Tensor | None, offsets: Tensor | None, code: int, parameter: float) -> Tensor:
    """Bag logits (N, C) by the operator; NaN for an empty bag."""
    if logits.requires_grad and torch.is_grad_enabled():
        return _FusedPooling.apply(logits, mask, offsets, code, parameter)  # type: ignore[no-untyped-call, no-any-return]
    return _pool_forward(logits, mask, offsets, code, parameter)[0]  # type: ignore[no-any-return]
