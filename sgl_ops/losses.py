"""The losses as modules. They hold the settings; :mod:`sgl_ops.functional` computes the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from . import functional
from ._checks import check_check, check_impl, class_vector, explains_arguments
from ._ranks import Group, SharesGroup, check_group
from .functional import SGLTerms
from .pooling import pooling_of_loss
from .settings import NAMES, SettingsChanges, SGLSettings, Unpack, settings_of, takes_settings

__all__ = ["BILLoss", "BagLoss", "MMMLoss", "SGLLoss"]


class SGLLoss(SharesGroup, nn.Module):
    r"""The Self-Guiding Loss (Seibold et al., ACCV 2020). It learns from bag labels which instances are positive.

    For a bag of instances with logits :math:`x_j`, probabilities :math:`p_j = \sigma(x_j)` and a label y per class:

    .. math::
        \theta_j &= \frac{p_j - \min p}{\max p - \min p} & \text{(Eq. 5)} \\
        M_j &= 0 \text{ if } \theta_j < \delta_l,
            \quad 1 \text{ if } \theta_j > 1 - \delta_l, \quad \theta_j \text{ else} & \text{(Eq. 6)} \\
        \alpha &= \max(\max p - \mathrm{median}\, p,\; 1 - y), \quad w = 2^{\alpha - 1} & \text{(Eq. 8, in Eq. 7)} \\
        L_{inst} &= \sum_{k \in \{neg, amb, pos\}} \frac{1}{n_k} \sum_{j \in k} w\, BCE(p_j, M_j) & \text{(Eq. 7)} \\
        L &= BCE(P, y) + \lambda L_{inst} + \mu L_{mask} & \text{(Eq. 9)}

    with M = 0 and w = 1 in a negative bag, and P the pooled probability. BCE(P, y) is averaged over the pairs of a bag
    and a class with a known label. :math:`L_{mask}` is the mean of :math:`\sqrt{\frac1n \sum_j p_j^2\,[M_j > 0]}` over
    the same pairs (Sec. 3.3). :math:`[M_j > 0]` is 1 if :math:`M_j > 0`, otherwise 0; n is the number of instances of
    the bag. The median of an even number of instances is the lower one: of two instances with p = 0.1 and 0.9 it is
    0.1, so that alpha is 0.8 and not 0.4. A positive bag whose instances are all equal has no instance loss. An empty
    part contributes 0.

    *Interpretation of the paper.* The text of the paper does not define these points. The package defines them as
    follows. M, theta, alpha and w are constants, without a gradient. The instances of a part are counted over the whole
    batch. The penalty on the mask is on p [M > 0], as M itself has no gradient. The median is the lower one. Equal
    instances have no ranking.

    Args:
        pooling: a name in :data:`sgl_ops.pooling.POOLINGS`, or a module that takes
            (logits, \*, mask, offsets, features) and gives bag logits.
        class_weight: (C,), >= 0, constant: multiplies every term of a class. The denominators do not change.
        pos_weight: (C,), > 0, constant: multiplies the positive half of every BCE, as in ``BCEWithLogitsLoss``.
        process_group: the ``torch.distributed.ProcessGroup`` that shares the batch (``torch.distributed.group.WORLD``
            for all processes; it is None before ``init_process_group``). With ``DistributedDataParallel``, loss and
            gradient are those of one process that has the whole batch.
        settings: an :class:`~sgl_ops.SGLSettings`; None: the defaults.
        changes: fields of :class:`~sgl_ops.SGLSettings` that replace those of ``settings``: ``delta_l``, ``lam``,
            ``mask_weight``, ``normalize`` and so on. Each is also an attribute of the module, which may be changed
            between steps: ``criterion.lam = 2.0``.

    Shapes, layouts and errors of a call: :mod:`sgl_ops.functional`. The loss is a float32 (or float64) scalar.

    >>> import torch
    >>> from sgl_ops import SGLLoss
    >>> criterion = SGLLoss(lam=1.0)
    >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> labels = torch.tensor([[1, 0, 0], [0, 1, float("nan")]])     # the third label of the last bag is unknown
    >>> loss = criterion(logits, labels)
    >>> loss.backward()
    >>> logits.grad[1, 2].abs().sum()
    tensor(0.)
    >>> terms = criterion.terms(logits, labels)
    >>> bool(torch.isclose(terms.total, terms.bag + terms.instance))
    True
    """

    class_weight: Tensor | None
    pos_weight: Tensor | None
    _settings: SGLSettings

    @explains_arguments
    @takes_settings
    def __init__(
        self,
        pooling: str | nn.Module = "max",
        *,
        class_weight: Tensor | Sequence[float] | None = None,
        pos_weight: Tensor | Sequence[float] | None = None,
        process_group: Group = None,
        settings: SGLSettings | None = None,
        **changes: Unpack[SettingsChanges],
    ):
        super().__init__()
        self._hold(settings_of(settings, changes))
        self.pooling = pooling_of_loss(pooling)
        self.register_buffer("class_weight", class_vector("class_weight", class_weight, zero=True))
        self.register_buffer("pos_weight", class_vector("pos_weight", pos_weight, zero=False))
        check_group(process_group)
        self.process_group = process_group

    @property
    def settings(self) -> SGLSettings:
        """The settings of the next call. Assign a new object to change them."""
        learned: dict[str, Any] = self._parameters
        return replace(self._settings, **learned) if learned else self._settings

    def _hold(self, settings: SGLSettings) -> None:
        """Sets the settings. Learned ones are parameters; in ``_settings``, the default stands for them."""
        learned = {name: value for name, value in vars(settings).items() if isinstance(value, nn.Parameter)}
        self._settings = replace(settings, **{name: getattr(SGLSettings, name) for name in learned})
        for name in NAMES:
            self._parameters.pop(name, None)
        self._parameters.update(learned)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "settings":
            if not isinstance(value, SGLSettings):
                raise TypeError(f"settings: expected an SGLSettings, got {type(value).__name__}")
            self._hold(value)
        elif name in NAMES:
            kept = {other: learned for other, learned in self._parameters.items() if other != name}
            self._hold(replace(self._settings, **{name: value}))
            self._parameters.update(kept)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # called for names that are no attribute of the object or its class: settings, parameters, buffers, modules
        held = self.__dict__
        if name in NAMES and name not in held["_parameters"]:
            return getattr(held["_settings"], name)
        return super().__getattr__(name)

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar."""
        return self._total_and_terms(logits, targets, mask, offsets, features, with_parts=False)[0]

    def terms(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> SGLTerms:
        """The loss (``total``, with gradient) and its three terms, unweighted and detached, for logging."""
        total, parts = self._total_and_terms(logits, targets, mask, offsets, features, with_parts=True)
        assert parts is not None
        return SGLTerms(total, *parts.unbind())

    def _total_and_terms(
        self,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        offsets: Tensor | None,
        features: Tensor | None,
        with_parts: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # direct access: attribute access of nn.Module is slower, which is measurable on small bags
        pooling, buffers = self._modules["pooling"], self._buffers
        assert pooling is not None
        return functional.sgl_total_and_terms(
            logits, targets, mask, offsets, features, self.settings, pooling, buffers["class_weight"],
            buffers["pos_weight"], self.process_group, with_parts,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in NAMES)


class BagLoss(SharesGroup, nn.Module):
    r"""The bag loss alone: mean over bags and classes with a known label of :math:`BCE(P, y)` (Eq. 3, 4).

    Args:
        pooling: a name in :data:`sgl_ops.pooling.POOLINGS` or a pooling module.
        class_weight: (C,), >= 0: multiplies every term of a class. The denominators do not change.
        pos_weight: (C,), > 0: multiplies the positive half of the BCE.
        check: whether the values of targets and offsets are checked; None: on the CPU only.
        impl: ``"auto"``, ``"fused"`` (the operator) or ``"reference"`` (PyTorch alone), as in :class:`SGLLoss`.
        process_group: the ranks that share the batch, as in :class:`SGLLoss`.

    Shapes, layouts and errors of a call: :mod:`sgl_ops.functional`.

    >>> import torch
    >>> from sgl_ops import BagLoss
    >>> BagLoss("max")(torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 0]))
    tensor(0.1809)
    """

    class_weight: Tensor | None
    pos_weight: Tensor | None

    @explains_arguments
    def __init__(
        self,
        pooling: str | nn.Module = "max",
        *,
        class_weight: Tensor | Sequence[float] | None = None,
        pos_weight: Tensor | Sequence[float] | None = None,
        check: bool | None = None,
        impl: str = "auto",
        process_group: Group = None,
    ):
        super().__init__()
        check_group(process_group)
        check_check(check)
        check_impl(impl)
        self.process_group = process_group
        self.pooling = pooling_of_loss(pooling)
        self.register_buffer("class_weight", class_vector("class_weight", class_weight, zero=True))
        self.register_buffer("pos_weight", class_vector("pos_weight", pos_weight, zero=False))
        self.check = check
        self.impl = impl

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar."""
        # direct access: attribute access of nn.Module is slower, which is measurable on small bags
        pooling, buffers = self._modules["pooling"], self._buffers
        assert pooling is not None
        return functional.bag_loss(
            logits, targets, mask=mask, offsets=offsets, features=features, pooling=pooling,
            class_weight=buffers["class_weight"], pos_weight=buffers["pos_weight"], check=self.check,
            impl=self.impl, process_group=self.process_group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"check={self.check!r}, impl={self.impl!r}"


class BILLoss(SharesGroup, nn.Module):
    r"""The bag-instance loss of Zhou et al. 2017.

    The targets of the instances are their own rounded probabilities (0 in a negative bag):
    :math:`s_j = [p_j > 0.5]\, y`. The instance loss is :math:`r = \mathrm{mean}_j BCE(p_j, s_j)`, the bag loss is
    :math:`b = BCE(P, y)`. A positive (bag, class) pair gives :math:`b + (\mathrm{stop\_gradient}(b) - r)^2`, a
    negative one :math:`r`. The loss is the mean over the pairs.

    Args:
        pooling: a name in :data:`sgl_ops.pooling.POOLINGS` or a pooling module (the authors of SGL: ``"mean_logits"``).
        check: whether the values of targets and offsets are checked; None: on the CPU only.
        impl: ``"auto"``, ``"fused"`` (the operator) or ``"reference"`` (PyTorch alone), as in :class:`SGLLoss`.
        process_group: the ranks that share the batch, as in :class:`SGLLoss`.

    Shapes, layouts and errors of a call: :mod:`sgl_ops.functional`.

    >>> import torch
    >>> from sgl_ops import BILLoss
    >>> BILLoss()(torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 0]))
    tensor(0.4683)
    """

    @explains_arguments
    def __init__(
        self,
        pooling: str | nn.Module = "mean",
        *,
        check: bool | None = None,
        impl: str = "auto",
        process_group: Group = None,
    ):
        super().__init__()
        check_group(process_group)
        check_check(check)
        check_impl(impl)
        self.process_group = process_group
        self.pooling = pooling_of_loss(pooling)
        self.check = check
        self.impl = impl

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar."""
        return functional.bil_loss(
            logits, targets, mask=mask, offsets=offsets, features=features, pooling=self.pooling, check=self.check,
            impl=self.impl, process_group=self.process_group,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"check={self.check!r}, impl={self.impl!r}"


class MMMLoss(SharesGroup, nn.Module):
    r"""The min-mean-max loss of Morfi & Stowell 2018, averaged over bags and classes with a known label:

    :math:`(BCE(\max p, y) + BCE(\min p, 0) + BCE(\mathrm{mean}\, p, y / 2)) / 3`.

    Args:
        check: whether the values of targets and offsets are checked; None: on the CPU only.
        impl: ``"auto"``, ``"fused"`` (the operator) or ``"reference"`` (PyTorch alone), as in :class:`SGLLoss`.
        process_group: the ranks that share the batch, as in :class:`SGLLoss`.

    Shapes, layouts and errors of a call: :mod:`sgl_ops.functional`; ``features`` is accepted and not used.

    >>> import torch
    >>> from sgl_ops import MMMLoss
    >>> MMMLoss()(torch.tensor([[-2.0, 0.0, 3.0], [-1.0, -3.0, -2.0]]), torch.tensor([1, 0]))
    tensor(0.2314)
    """

    @explains_arguments
    def __init__(self, *, check: bool | None = None, impl: str = "auto", process_group: Group = None):
        super().__init__()
        check_group(process_group)
        check_check(check)
        check_impl(impl)
        self.process_group = process_group
        self.check = check
        self.impl = impl

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar."""
        return functional.mmm_loss(
            logits,
            targets,
            mask=mask,
            offsets=offsets,
            check=self.check,
            impl=self.impl,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"check={self.check!r}, impl={self.impl!r}"
