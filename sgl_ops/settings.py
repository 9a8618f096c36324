"""The settings of the Self-Guiding Loss: one frozen object that the module holds and the functions take."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from ._checks import Function, check_check, check_constant, check_impl, check_number, looks_at_values, unknown_argument
from ._tracing import is_transformed

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack  # torch requires it

__all__ = ["SGLSettings"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SGLSettings:
    """The settings of :class:`sgl_ops.SGLLoss`, without the pooling, the class weights and the process group.

    The object is constant. ``criterion.lam = 2.0`` gives the module a new object. Each field below is an argument of
    :class:`~sgl_ops.SGLLoss`, :func:`~sgl_ops.functional.sgl_loss` and :func:`~sgl_ops.functional.sgl_terms`. ``==``
    tells only whether two objects are the same one, because a setting may be a tensor: compare the fields.

    Attributes:
        delta_l: lower threshold of Eq. 6, a number in [0, 0.5]. The upper threshold is 1 - delta_l. The paper's value
            is 0.3. The loss has no derivative by delta_l.
        lam: weight of the instance loss in Eq. 9, finite, >= 0. The paper: 1 with max pooling (MNIST-Bags,
            CIFAR10-Bags), 20 with softmax pooling (ChestX-ray14). A number, or a tensor with one element: a tensor that
            requires a gradient gets it. An ``nn.Parameter`` becomes a parameter of the module.
        mask_weight: weight of the penalty on the mask (Sec. 3.3), finite, >= 0; a number or a tensor, as ``lam``.
        normalize: what each part of the instance loss is divided by. ``"batch"``: the number of its instances in the
            batch. ``"bag"``: the number in the bag and class; the loss is then averaged over bags and classes.
        rescale: False takes theta = p instead of Eq. 5 (the paper's ablation "No Rescale").
        weighted: False takes w = 1 in Eq. 7 (the ablation without weighting).
        guide: a function that returns targets, parts and weights in place of Eq. 5 to 8: see :mod:`sgl_ops.reference`.
            The reference then computes the loss, and ``delta_l``, ``rescale`` and ``weighted`` are not used.
        check: whether the values of targets, offsets, ``class_weight``, ``pos_weight`` and tensor weights are checked.
            None: on the CPU only. True: always; on a GPU the call then waits for the device. False: never.
        impl: ``"auto"`` (the fused operator where there is a kernel, else the reference), ``"fused"`` or
            ``"reference"``. The operator has no second derivative. It does not work under ``torch.func`` and in forward
            mode: there ``"auto"`` takes the reference.

    Raises:
        TypeError: a setting is of a wrong kind.
        ValueError: a setting is out of range.

    >>> from sgl_ops import SGLLoss, SGLSettings
    >>> settings = SGLSettings(lam=20.0, mask_weight=0.1)
    >>> SGLLoss(settings=settings, pooling="softmax").lam
    20.0
    """

    delta_l: float = 0.3
    lam: float | Tensor = 1.0
    mask_weight: float | Tensor = 0.0
    normalize: str = "batch"
    rescale: bool = True
    weighted: bool = True
    guide: Callable[[Any], Any] | None = None
    check: bool | None = None
    impl: str = "auto"

    #: Whether ``lam`` or ``mask_weight`` is a tensor. An attribute, because a property makes each step longer.
    has_tensor_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.delta_l, Tensor):
            check_constant("delta_l", self.delta_l)
        if type(self.delta_l) is not float:
            object.__setattr__(self, "delta_l", _number("delta_l", self.delta_l))
        if not 0.0 <= self.delta_l <= 0.5:
            raise ValueError(f"delta_l: expected 0 <= delta_l <= 0.5, got {self.delta_l}")
        if type(self.lam) is not float:
            object.__setattr__(self, "lam", _weight("lam", self.lam, self.check))
        if type(self.mask_weight) is not float:
            object.__setattr__(self, "mask_weight", _weight("mask_weight", self.mask_weight, self.check))
        if isinstance(self.lam, Tensor) or isinstance(self.mask_weight, Tensor):
            object.__setattr__(self, "has_tensor_weights", True)
        if not isinstance(self.lam, Tensor) and not 0.0 <= self.lam < math.inf:
            raise ValueError(f"lam: expected finite and >= 0, got {self.lam}")
        if not isinstance(self.mask_weight, Tensor) and not 0.0 <= self.mask_weight < math.inf:
            raise ValueError(f"mask_weight: expected finite and >= 0, got {self.mask_weight}")
        if self.normalize not in ("batch", "bag"):
            raise ValueError(f"normalize: expected 'batch' or 'bag', got {self.normalize!r}")
        for name in ("rescale", "weighted"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        check_check(self.check)
        check_impl(self.impl)
        if self.guide is not None:
            if not callable(self.guide):
                raise TypeError(f"guide: expected a function, got {type(self.guide).__name__}")
            if self.impl == "fused":
                raise ValueError("guide: runs by the reference; impl has to be 'auto' or 'reference', got 'fused'")

    @cached_property
    def operands(self) -> dict[Any, Any]:
        """What the fused operators take, by operation; sgl_ops/_fused.py fills it."""
        return {}

    @property
    def per_bag(self) -> bool:
        """Whether ``normalize`` is "bag". The operators call this setting ``per_bag``."""
        return self.normalize == "bag"

    def check_tensors(self) -> None:
        """Checks the values of tensor weights, which may have changed since the object was made."""
        for name in ("lam", "mask_weight"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                _check_value(name, value, self.check)

    def __getstate__(self) -> dict[str, Any]:
        """The fields for copies and pickles. ``operands`` belongs to this process."""
        return {name: value for name, value in vars(self).items() if name != "operands"}

    def total(self, bag: Tensor, instance: Tensor, mask: Tensor) -> Tensor:
        """Eq. 9 with the penalty on the mask, in the dtype of the terms."""
        lam, mask_weight = self.lam, self.mask_weight
        # a tensor of another dtype would change the dtype of the loss
        lam = lam.reshape(()).to(bag.dtype) if isinstance(lam, Tensor) else lam
        mask_weight = mask_weight.reshape(()).to(bag.dtype) if isinstance(mask_weight, Tensor) else mask_weight
        return bag + lam * instance + mask_weight * mask


class SettingsChanges(TypedDict, total=False):
    """The fields of :class:`SGLSettings`, for type checkers: the keywords of the loss and the functions."""

    delta_l: float
    lam: float | Tensor
    mask_weight: float | Tensor
    normalize: str
    rescale: bool
    weighted: bool
    guide: Callable[[Any], Any] | None
    check: bool | None
    impl: str


#: The names of the settings, in the order of the definition.
NAMES: tuple[str, ...] = tuple(field.name for field in fields(SGLSettings))

_DEFAULT = SGLSettings()


def settings_of(settings: SGLSettings | None, changes: Mapping[str, Any]) -> SGLSettings:
    """``settings`` (None: the defaults) with ``changes``."""
    for name in changes:
        if name not in NAMES:
            raise unknown_argument(name, NAMES)
    if settings is None:
        return SGLSettings(**changes) if changes else _DEFAULT
    if not isinstance(settings, SGLSettings):
        raise TypeError(f"settings: expected an SGLSettings, got {type(settings).__name__}")
    return replace(settings, **changes) if changes else settings


def takes_settings(function: Function) -> Function:
    """Show the settings in the signature of ``function``, which takes them as ``**changes``."""
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    shown = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(SGLSettings)
    ]
    documented: Any = function
    documented.__signature__ = signature.replace(parameters=[*kept, *shown])
    return function


def _number(name: str, value: object) -> float:
    check_number(name, value)
    return float(value)  # type: ignore[arg-type]


def _weight(name: str, value: object, check: bool | None) -> float | Tensor:
    """``lam`` or ``mask_weight``: a number, or a tensor with one element."""
    if not isinstance(value, Tensor):
        return _number(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected a real number, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
    _check_value(name, value, check)
    return value


def _check_value(name: str, value: Tensor, check: bool | None) -> None:
    """Checks the value of ``lam`` or ``mask_weight``, a tensor with one element, where values are checked."""
    if not looks_at_values(value, check):
        return
    try:
        number = value.item()
    except RuntimeError:
        if not is_transformed():
            raise
        return  # batched by torch.func.vmap: no number of it can be looked at
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{name}: expected finite and >= 0, got {number}")
