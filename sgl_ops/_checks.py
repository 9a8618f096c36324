"""Validation of arguments: ``TypeError`` for a wrong type, ``ValueError`` for a wrong shape or value."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._tracing import is_traced, is_transformed

Function = TypeVar("Function", bound=Callable[..., Any])

LOGIT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TARGET_DTYPES = frozenset(
    (
        *LOGIT_DTYPES, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
        torch.uint32, torch.uint64,
    )
)  # fmt: skip


def unnest(
    logits: Tensor, mask: Tensor | None, offsets: Tensor | None, features: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logits, offsets, features) with a jagged nested tensor converted to packed rows and their offsets."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    if not logits.is_nested:
        check_dense("logits", logits)
    if features is not None:
        _check_features(features, logits)
    if not logits.is_nested:
        return logits, offsets, features
    if logits.layout != torch.jagged:
        raise TypeError(f"logits: nested tensors need layout=torch.jagged, got {logits.layout}")
    if mask is not None or offsets is not None:
        raise ValueError("logits: a nested tensor brings its own offsets; mask and offsets have to be None")
    nested: Any = logits  # what torch.jagged adds to Tensor is not typed
    if nested._ragged_idx != 1:
        raise ValueError(f"logits: the ragged dimension of a nested tensor has to be 1, got {nested._ragged_idx}")
    if nested.lengths() is not None:
        raise ValueError("logits: nested tensors with holes (made by narrow) are not supported; call .contiguous()")
    offsets = nested.offsets()
    if features is not None and features.is_nested:
        features = _same_bags(features, offsets)
    return nested.values(), offsets, features


def _check_features(features: object, logits: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"features: expected a torch.Tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"features: expected a floating dtype, got {features.dtype}")
    if not features.is_nested:
        check_dense("features", features)
    elif not logits.is_nested:
        raise ValueError("features: a nested tensor of features needs nested logits")


def _same_bags(features: Any, offsets: Tensor) -> Tensor:
    """The rows of nested ``features``, whose bags have to be those of the logits."""
    if features.layout != torch.jagged or features._ragged_idx != 1 or features.lengths() is not None:
        raise ValueError("features: expected a jagged nested tensor (N, ragged, D) without holes, as the logits are")
    theirs = features.offsets()
    if theirs is not offsets:
        if theirs.shape != offsets.shape:
            raise ValueError(f"features: expected {len(offsets) - 1} bags as the logits have, got {len(theirs) - 1}")
        if looks_at_values(offsets, None) and not torch.equal(theirs, offsets):
            at = int((theirs != offsets).nonzero()[0]) - 1
            wanted, got = int(offsets.diff()[at]), int(theirs.diff()[at])
            raise ValueError(f"features: expected {wanted} instances in bag {at} as the logits have, got {got}")
    return features.values()  # type: ignore[no-any-return]


def check_instances(logits: Tensor, mask: Tensor | None, offsets: Tensor | None) -> tuple[int, int]:
    """(bags, classes) of a call of a pooling. Checks types, shapes and devices, not the values."""
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits: expected float32, float64, float16 or bfloat16, got {logits.dtype}")
    shape, dims = logits.shape, logits.dim()
    if offsets is not None:
        if mask is not None:
            raise ValueError("mask: packed bags (offsets given) have no padding; pass mask or offsets, not both")
        _check_side("offsets", offsets, logits)
        if offsets.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"offsets: expected int32 or int64, got {offsets.dtype}")
        if offsets.dim() != 1 or offsets.shape[0] < 2:
            raise ValueError(f"offsets: expected shape (N + 1,) with N >= 1, got {tuple(offsets.shape)}")
        if dims not in (1, 2):
            raise ValueError(f"logits: with offsets expected shape (T, C) or (T,), got {tuple(shape)}")
        bags, classes = offsets.shape[0] - 1, 1 if dims == 1 else shape[1]
    else:
        if dims < 2:
            raise ValueError(
                "logits: expected (N, C, L), (N, C, H, W), (N, C, D, H, W) or (N, L), or (T, C) or (T,) with offsets; "
                f"got {tuple(shape)} without offsets"
            )
        bags, classes = shape[0], 1 if dims == 2 else shape[1]
        if mask is not None:
            _check_side("mask", mask, logits)
            expected = shape if dims == 2 else shape[:1] + shape[2:]
            if mask.shape != expected:
                raise _wrong_mask(mask, logits, expected)
            if mask.dtype != torch.bool:
                raise TypeError(f"mask: expected torch.bool (True = real instance), got {mask.dtype}")
    if bags == 0 or classes == 0:
        advice = "leave out a step without bags"
        raise ValueError(f"logits: expected at least one bag and one class, got shape {tuple(shape)}; {advice}")
    return bags, classes


def check_call(logits: Tensor, targets: Tensor, mask: Tensor | None, offsets: Tensor | None) -> None:
    """Checks types, shapes and devices of a call of a loss, not the values."""
    bags, classes = check_instances(logits, mask, offsets)
    _check_side("targets", targets, logits)
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets: expected bool, integer or floating, got {targets.dtype}")
    tshape = targets.shape
    if tshape != (bags, classes) and not (classes == 1 and tshape == (bags,)):
        raise _wrong_targets(targets, logits, offsets, bags, classes)


def _classes_first(logits: Tensor) -> str:
    """The hint for logits whose classes are the last dimension."""
    moved = "logits.transpose(1, 2)" if logits.dim() == 3 else "logits.movedim(-1, 1)"
    return f"; if the classes are the last dimension of the logits, pass {moved}"


def _wrong_mask(mask: Tensor, logits: Tensor, expected: torch.Size) -> ValueError:
    hint, shape, got = "", logits.shape, mask.shape
    if got == (*expected[:1], 1, *expected[1:]):
        hint = "; pass mask.squeeze(1)"
    elif got == shape:
        hint = "; all classes share one mask: pass mask[:, 0] if all of mask[:, c] are equal"
    elif got == expected[1:]:
        hint = f"; for the same mask in every bag pass mask.expand({', '.join(map(str, expected))})"
    elif got == shape[:-1]:
        hint = _classes_first(logits)
    return ValueError(
        f"mask: expected shape {tuple(expected)} with logits of shape {tuple(shape)}, got {tuple(got)}{hint}"
    )


def _wrong_targets(targets: Tensor, logits: Tensor, offsets: Tensor | None, bags: int, classes: int) -> ValueError:
    shape, got, hint = logits.shape, targets.shape, ""
    dense = offsets is None
    if dense and logits.dim() == 2:
        hint = "; logits with two dimensions and without offsets are (N, L), one class"
        if got == shape:
            hint += ". The loss needs a logit for each instance, not one for each bag"
        elif got[1:] == shape[1:]:
            hint += "; packed logits (T, C) need offsets"
    elif dense and (got == (bags, shape[-1]) or (shape[-1] == 1 and got == (bags,))):
        hint = _classes_first(logits)
    elif dense and got == shape:
        hint = "; the loss takes labels of bags, not of instances: pass targets.flatten(2).amax(2)"
    elif offsets is not None and got[:1] == (bags + 1,):
        hint = "; if offsets are the sizes of the bags, pass torch.nn.functional.pad(offsets.cumsum(0), (1, 0))"
    elif got in ((bags,), (bags, 1)):
        indices = "targets" if targets.dim() == 1 else "targets.squeeze(1)"
        hint = f"; if these are class indices, pass torch.nn.functional.one_hot({indices}.long(), {classes})"
        if dense and logits.dim() == 3:
            hint = f"; maps (N, H, W) of one class need logits.unsqueeze(1){hint}"
    allowed = f"({bags}, {classes})" + (f" or ({bags},)" if classes == 1 else "")
    return ValueError(
        f"targets: expected shape {allowed}, (bags, classes), with logits of shape {tuple(shape)}, "
        f"got {tuple(got)}{hint}"
    )


def instance_shape(logits: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """The shape of the features of all instances without D: (N, L), or (T,) with ``offsets``."""
    # not Size.numel(): it converts a symbolic size to a number
    return (
        logits.shape[:1]
        if offsets is not None
        else (logits.shape[0], math.prod(logits.shape[1 if logits.dim() == 2 else 2 :]))
    )


def check_features(features: Tensor | None, instances: tuple[int, ...], width: int | None = None) -> None:
    """Checks the shape of ``features``.

    Args:
        features: (N, L, D) or (T, D); None: an error.
        instances: (N, L) or (T,).
        width: D, or None if every D is accepted.
    """
    if features is not None and features.shape == (*instances, *(features.shape[-1:] if width is None else (width,))):
        return
    expected = f"({', '.join(map(str, instances))}, {'D' if width is None else width})"
    if features is None:
        raise ValueError(
            f"features: attention pooling needs features of the instances; pass features= of shape {expected}, got None"
        )
    hint, got = "", features.shape
    if len(instances) == 2 and features.dim() > 2 and got[:1] == instances[:1] and got[2:].numel() == instances[1]:
        flat = "features" if features.dim() == 3 else "features.flatten(2)"
        hint = f"; if the features are the second dimension, pass {flat}.transpose(1, 2)"
    raise ValueError(f"features: expected shape {expected}, got {tuple(got)}{hint}")


_ALWAYS_A_MEAN = "the loss is always a mean; leave this argument out. A batch of one bag gives the loss of this bag"
#: What to use in place of an argument of BCEWithLogitsLoss or CrossEntropyLoss that not every loss here takes.
_INSTEAD = {
    "weight": "SGLLoss and BagLoss take class_weight=, one number for each class",
    "class_weight": "SGLLoss and BagLoss take it",
    "pos_weight": "SGLLoss and BagLoss take it",
    "reduction": _ALWAYS_A_MEAN,
    "reduce": _ALWAYS_A_MEAN,
    "size_average": _ALWAYS_A_MEAN,
    "ignore_index": "mark an unknown label with NaN in the targets",
    "label_smoothing": "the targets are 0, 1 or NaN; leave this argument out",
}


def unknown_argument(name: str, known: Iterable[str]) -> TypeError:
    """The error for an argument that a loss does not take. ``known``: the arguments that it takes."""
    import difflib  # slow to import

    close = difflib.get_close_matches(name, known, 1)
    hint = _INSTEAD.get(name) or (f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}")
    return TypeError(f"{name}: not an argument here; {hint}")


def explains_arguments(function: Function) -> Function:
    """``function``, a constructor, with :func:`unknown_argument` for a keyword that it does not take."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in known:
                raise unknown_argument(name, known)
        return function(*args, **keywords)

    # functools.wraps keeps the signature, which mypy does not see
    return checked  # type: ignore[return-value]


def check_dense(name: str, value: Tensor) -> None:
    """Checks that the memory of the tensor can be read: not sparse, not in the mkldnn layout, not distributed."""
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}; pass {name}.to_dense()")
    if type(value) is not Tensor and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            raise TypeError(
                f"{name}: expected the tensor of this process, got a DTensor; pass {name}.to_local() of a tensor that "
                "is sharded by bags, with process_group= for the loss of the whole batch"
            )


def _check_side(name: str, value: Tensor, logits: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    check_dense(name, value)
    if value.device != logits.device:
        raise ValueError(f"{name}: expected on the logits' device {logits.device}, got {value.device}")


def looks_at_values(tensor: Tensor, check: bool | None) -> bool:
    """Whether values on the device of ``tensor`` are checked. On a GPU that waits for the device."""
    return not is_traced(tensor) and looks_at_untraced(tensor, check)


def looks_at_untraced(tensor: Tensor, check: bool | None) -> bool:
    """:func:`looks_at_values` of a tensor that no tracer follows."""
    return not tensor.is_meta and (tensor.is_cpu if check is None else check)


def check_values(targets: Tensor | None, offsets: Tensor | None, rows: int) -> None:
    """Checks that targets are 0, 1 or NaN, and that offsets start at 0, never fall and end at the number of rows."""
    if targets is not None:
        wrong = (targets != 0) & (targets != 1) & (targets == targets)
        if bool(wrong.any()):
            value = targets[wrong][0].item()
            hint = ": mark an unknown label with NaN" if value == -1 else ""
            if targets.dim() == 1 and value > 1 and value % 1 == 0:  # inf % 1 is NaN
                hint = "; class indices need logits of C classes: pass torch.nn.functional.one_hot(targets.long(), C)"
            raise ValueError(f"targets: expected 0, 1 or NaN (unknown), got {value}{hint}")
    if offsets is not None:
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0:
            raise ValueError(f"offsets: expected to start at 0, got {first}")
        steps = offsets.diff()
        if bool((steps < 0).any()):
            at = int((steps < 0).nonzero()[0])
            raise ValueError(
                f"offsets: expected never to fall, got {int(offsets[at])} before {int(offsets[at + 1])} at index {at}"
            )
        if last != rows:
            raise ValueError(f"offsets: expected to end at the number of rows {rows}, got {last}")


def check_offsets(offsets: Tensor | None, logits: Tensor) -> None:
    """As :func:`check_values` for the offsets of a pooling, on the CPU. A tracer or a transform has no values."""
    if offsets is not None and logits.is_cpu and not is_traced(logits) and not is_transformed():
        check_values(None, offsets, logits.shape[0])


def check_constant(name: str, value: Tensor) -> None:
    """Checks that a constant does not require a gradient, because the loss gives it none."""
    dual: Any = forward_ad.unpack_dual  # not typed by torch
    if value.requires_grad or (is_transformed() and dual(value).tangent is not None):
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires a gradient, which the loss does not give; "
            f"pass {name}.detach()"
        )


def check_impl(impl: object) -> None:
    if impl not in ("auto", "fused", "reference"):
        raise ValueError(f"impl: expected 'auto', 'fused' or 'reference', got {impl!r}")


def check_check(check: object) -> None:
    if check is not None and not isinstance(check, bool):
        raise TypeError(f"check: expected True, False or None, got {check!r}")


def check_count(name: str, value: Any, least: int) -> int:
    """``value`` as an int. It has to be an integer of any type, but not a bool, and at least ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def check_number(name: str, value: object) -> None:
    try:
        if not hasattr(value, "__float__"):
            raise TypeError
        float(value)
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor with several elements
        raise TypeError(f"{name}: expected a number, got {value!r}") from None


def check_class_vector(name: str, value: Tensor, classes: int, logits: Tensor) -> None:
    """Checks class_weight or pos_weight of a call."""
    _check_side(name, value, logits)
    if value.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
    if value.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), got {tuple(value.shape)}")


def class_vector(name: str, value: object, *, zero: bool) -> Tensor | None:
    """class_weight (``zero=True``: 0 is allowed) or pos_weight given to a constructor, as a float tensor."""
    if value is None:
        return None
    try:
        vector = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected numbers, got {value!r}") from None
    if vector.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {vector.dtype}")
    check_constant(name, vector)
    vector = vector.to(vector.dtype if vector.dtype == torch.float64 else torch.float32)
    if vector.dim() != 1 or vector.shape[0] == 0:
        raise ValueError(f"{name}: expected shape (C,), got {tuple(vector.shape)}")
    if looks_at_values(vector, True):
        check_weights(name, vector, zero=zero)
    return vector


def check_weights(name: str, vector: Tensor, *, zero: bool) -> None:
    """Checks the values of class_weight (``zero=True``: 0 is allowed) or pos_weight."""
    low, high = (extreme.item() for extreme in torch.aminmax(vector))  # both NaN where the vector holds a NaN
    if not ((low >= 0 if zero else low > 0) and high < math.inf):
        wrong = ~torch.isfinite(vector) | ((vector < 0) if zero else (vector <= 0))
        bound = ">= 0" if zero else "> 0"
        raise ValueError(f"{name}: expected finite values {bound}, got {vector[wrong][0].item()}")
