r"""Pooling: from the logits of a bag's instances to the logit of the bag (Eq. 3).

Every module here takes instance logits in any layout and returns **bag logits**
:math:`z = \log P - \log(1 - P)`, where :math:`P` pools the instance probabilities
:math:`p_j = \sigma(x_j)`; :math:`q_j = 1 - p_j`. Bag logits go into ``BCEWithLogitsLoss``;
``torch.sigmoid`` makes them bag probabilities. They are computed in log space. So they and their gradients are correct
and finite for logits of a magnitude up to 1e15, also if :math:`P` itself would round to 0 or 1.

================================ ==================== ===================================================
module                           name                 P
================================ ==================== ===================================================
:class:`MaxPooling`              ``max``              max p
:class:`MeanPooling`             ``mean``             mean p
:class:`MeanLogitsPooling`       ``mean_logits``      sigmoid(mean x)
:class:`SoftmaxPooling`          ``softmax``          sum p e^p / sum e^p
:class:`LinearSoftmaxPooling`    ``linear_softmax``   sum p^2 / sum p
:class:`TopKPooling`             ``topk``             mean of the k largest p, k = 8 or a fraction of the bag
:class:`LSEPooling`              ``lse``              (1/r) log mean e^(r p), r = 10
:class:`NoisyOrPooling`          ``noisy_or``         1 - prod (1 - p)
:class:`GeneralizedMeanPooling`  ``generalized_mean`` (mean p^r)^(1/r), r = 1, fixed or learned per class
:class:`AutoPooling`             \                    sum p e^(a p) / sum e^(a p), a learned per class
:class:`AttentionPooling`        \                    sum a_j p_j, a from instance features
================================ ==================== ===================================================

Arguments of every ``forward`` (logits, \*, mask, offsets, features):

* ``logits``: (N, C, L), (N, C, H, W), (N, C, D, H, W), or (N, L) for one class; with ``offsets`` (T, C) or (T,); or a
  jagged nested tensor (N, ragged, C). float32, float64, float16 or bfloat16.
* ``mask``: bool, (N, L) or (N, H, W), …; True = real instance. Not together with ``offsets``.
* ``offsets``: int32 or int64, (N + 1,); bag i is rows ``offsets[i]`` to ``offsets[i + 1]``. On the CPU,
  offsets that fall, do not start at 0, or do not end at T are a ValueError.
* ``features``: (N, L, D) or (T, D), for :class:`AttentionPooling` alone (a map is flattened, L = H W).

Returns (N, C), or (N,) where the logits have no class axis; float32, or float64 for float64 logits. An empty bag gives
NaN and gradient 0. A bag with a NaN or infinite logit gives NaN, and its gradient is NaN.

>>> import torch
>>> from sgl_ops.pooling import MaxPooling, SoftmaxPooling
>>> logits = torch.tensor([[[-2.0, 0.0, 3.0]]])                 # one bag, one class, three instances
>>> MaxPooling()(logits)
tensor([[3.]])
>>> torch.sigmoid(SoftmaxPooling()(logits))
tensor([[0.6387]])
>>> MaxPooling()(torch.tensor([1.0, 5.0, -1.0]), offsets=torch.tensor([0, 2, 3]))   # two bags of one class, packed
tensor([ 5., -1.])
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _fused
from ._bags import Bags, bags_of
from ._checks import (
    check_constant,
    check_count,
    check_features,
    check_instances,
    check_number,
    check_offsets,
    instance_shape,
    unnest,
)
from ._tracing import is_compiled, is_scripted, is_transformed

__all__ = [
    "POOLINGS",
    "AttentionPooling",
    "AutoPooling",
    "GeneralizedMeanPooling",
    "LSEPooling",
    "LinearSoftmaxPooling",
    "MaxPooling",
    "MeanLogitsPooling",
    "MeanPooling",
    "MinPooling",
    "NoisyOrPooling",
    "Pooling",
    "SoftmaxPooling",
    "TopKPooling",
    "make_pooling",
]


class Pooling(nn.Module):
    """Base of the pooling modules: handles layouts, empty bags and non-finite logits. A subclass defines ``pool``."""

    def forward(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Bag logits of instance logits: see the module's documentation for shapes.

        The C++ operators compute them where they can. Their second derivative is an error; :meth:`reference` has one.
        """
        logits, offsets, features = unnest(logits, mask, offsets, features)
        check_instances(logits, mask, offsets)
        if features is not None:
            check_features(features, instance_shape(logits, offsets))
        code, parameter = _fused.code_of(self)
        if code == _fused.EXTERNAL or logits.device.type not in _fused.DEVICES or is_transformed():
            return self.reference(logits, mask=mask, offsets=offsets, features=features)
        if is_scripted() or (_fused.HAS_PARAMETER[code] and is_compiled()):
            # torch.jit.trace does not record the gradient; each value of a float argument would compile a new graph
            return self.reference(logits, mask=mask, offsets=offsets, features=features)
        check_offsets(offsets, logits)
        z = _fused.pooled(logits, mask, offsets, code, parameter)
        return z.squeeze(1) if logits.dim() == (2 if offsets is None else 1) else z

    def reference(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The same result as a call, in plain PyTorch: for every device and every derivative."""
        logits, offsets, features = unnest(logits, mask, offsets, features)
        check_instances(logits, mask, offsets)
        if features is not None:
            check_features(features, instance_shape(logits, offsets))
        check_offsets(offsets, logits)
        bags = bags_of(logits, mask, offsets)
        z = self.pool(bags, bags.propagate_nonfinite(bags.instances(logits)), features)
        return bags.bag_logits(torch.where(bags.size > 0, z, torch.nan))

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter, such as r of LSEPooling, without a call of the setter
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        """Bag logits (N, C) of instances ``x``; anything finite for an empty bag."""
        raise NotImplementedError

    @property
    def operator_parameter(self) -> float | None:
        """The parameter for the C++ operators; 1 without a parameter; None if they do not have this pooling."""
        return 1.0


class MaxPooling(Pooling):
    """P = max p, so z = max x. Tied maxima share the gradient equally."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        return bags.tied_max(x)


class MinPooling(Pooling):
    """P = min p, so z = min x (a part of :class:`~sgl_ops.MMMLoss`). Tied minima share the gradient equally."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        return -bags.tied_max(-x)


class MeanPooling(Pooling):
    """P = mean p."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        return _weighted(bags, x, torch.zeros_like(x))


class MeanLogitsPooling(Pooling):
    """P = sigmoid(mean x), so z = mean x: what the authors' code calls mean pooling."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        return bags.mean(x)


class SoftmaxPooling(Pooling):
    """P = sum p e^p / sum e^p: the paper's pooling for chest X-rays. It is near the mean: the weights are 1 to e."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        return _weighted(bags, x, _sigmoid(x))


class LinearSoftmaxPooling(Pooling):
    """P = sum p^2 / sum p."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        return _weighted(bags, x, F.logsigmoid(x))


class TopKPooling(Pooling):
    """P = mean of the k largest p: the maximum at k = 1, the mean from k = bag size on.

    Instances are ranked by their logits. Those tied at the k-th place share its gradient equally: if m places are left
    for t tied instances, each has weight m / t. A bag with fewer than k instances takes all of them.

    Args:
        k: an int >= 1, or a float in (0, 1): that fraction of the bag, ceil(k n) of n instances. (The fraction is first
            rounded down to a multiple of 2^-30, so that 0.07 of 100 instances are 7.)

    >>> import torch
    >>> from sgl_ops.pooling import TopKPooling
    >>> logits = torch.tensor([[0.0, 3.0, -1.0, 1.0]])
    >>> torch.sigmoid(TopKPooling(2)(logits)), torch.sigmoid(logits).topk(2).values.mean(1)
    (tensor([0.8418]), tensor([0.8418]))
    >>> TopKPooling(0.5)(logits) == TopKPooling(2)(logits)
    tensor([True])
    """

    def __init__(self, k: int | float = 8):
        super().__init__()
        self.k = k

    @property
    def k(self) -> int | float:
        """The argument. It may be changed between steps."""
        return int(self._places) if self._places >= 1 else self._places

    @k.setter
    def k(self, k: int | float) -> None:
        # a float, because torch.compile makes a new graph for each value of an int
        self._places = float(check_places("k", k))

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        k = self.places(bags.size)
        least = bags.expand_to_instances(bags.kth_largest(x, k))
        tied = x == least
        left = (k - bags.count(x > least)).to(x.dtype)  # places that the tied instances share
        log_share = torch.log(left / bags.count(tied).clamp(min=1))
        log_weight = torch.where(tied, bags.expand_to_instances(log_share), 0.0)
        return _weighted(bags, x, log_weight, keep=~(x < least))  # a NaN is kept

    def places(self, size: Tensor) -> Tensor:
        """The number of averaged instances in bags of ``size`` instances: int64, 0 for an empty bag."""
        whole = 2**30
        if is_compiled():
            # a tensor, because torch.compile makes a new graph for each value of an int
            part = (torch.zeros((), dtype=torch.float64, device="cpu") + self._places * whole).long().to(size.device)
            number = part // whole if self._places >= 1 else (part * size + whole - 1) // whole
            return torch.minimum(size, number.clamp(min=1))
        if self._places >= 1:
            return size.clamp(max=int(self._places))
        share = int(self._places * whole)  # integers: the same count on every device
        return torch.minimum(size, ((share * size + whole - 1) // whole).clamp(min=1))

    @property
    def operator_parameter(self) -> float:
        return self._places

    def extra_repr(self) -> str:
        return f"k={self.k}"


class LSEPooling(Pooling):
    """P = (1/r) log mean e^(r p): between the mean (r near 0) and the maximum (large r).

    Args:
        r: sharpness, > 0.
    """

    def __init__(self, r: float = 10.0):
        super().__init__()
        self.r = r

    @property
    def r(self) -> float:
        """The argument. It may be changed between steps."""
        return self._r

    @r.setter
    def r(self, r: float) -> None:
        self._r = _positive("r", r)

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        # P from mean(e^(rp) - 1) keeps its relative accuracy near 0, Q = 1 - P from mean(1 - e^(-rq)) near 1.
        r = x.new_zeros(()) + self.r  # a tensor: torch.compile makes a new graph for each logarithm of a number
        log_r = torch.log(r)
        p, q = _sigmoid(x), _sigmoid(-x)
        log_n = torch.log(bags.size.clamp(min=1).to(x.dtype))
        rise = r * p + _log1mexp(r * p, log_r + F.logsigmoid(x))  # log(e^(rp) - 1)
        log_p = _log_softplus(bags.logsumexp(rise) - log_n) - log_r
        fall = bags.logsumexp(_log1mexp(r * q, log_r + F.logsigmoid(-x))) - log_n  # log mean(1 - e^(-rq))
        near_one = (log_p.detach() > -math.log(2.0)) & (bags.size > 0)
        # where 1 - e^fall cancels, its logarithm -rQ is that of mean e^(-rq), which does not
        steep = fall.detach() > -math.log(2.0)
        log_q_steep = torch.log(torch.where(near_one & steep, (log_n - bags.logsumexp(-r * q)) / r, 1.0))
        log_q_flat = _log_neg_log1p_neg_exp(torch.where(near_one & ~steep, fall, -1.0)) - log_r
        log_q = torch.where(steep, log_q_steep, log_q_flat)
        log_p = torch.where(near_one, -1.0, log_p)
        return torch.where(near_one, torch.log1p(-torch.exp(log_q)) - log_q, log_p - torch.log1p(-torch.exp(log_p)))

    @property
    def operator_parameter(self) -> float:
        return self.r

    def extra_repr(self) -> str:
        return f"r={self.r}"


class NoisyOrPooling(Pooling):
    """P = 1 - prod (1 - p): at least one instance is positive, all independent."""

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        # -log(1 - P) = t = sum softplus(x), so z = log(e^t - 1)
        t = bags.sum(-F.logsigmoid(-x))
        log_t = bags.logsumexp(_log_softplus(x))
        # t underflows before log t does
        return t + _log1mexp(torch.where(bags.size > 0, t, 1.0), torch.where(bags.size > 0, log_t, 0.0))


class GeneralizedMeanPooling(Pooling):
    """P = (mean p^r)^(1/r): the mean for r = 1, near the maximum for large r.

    Args:
        r: exponent, > 0. With ``num_classes``: its initial value.
        num_classes: C. r is then learned, one value per class. The parameter is ``log_r`` (C,), so that r stays
            positive.
    """

    def __init__(self, r: float = 1.0, *, num_classes: int | None = None):
        super().__init__()
        self._r = _positive("r", r)
        self.log_r = (
            None
            if num_classes is None
            else nn.Parameter(torch.full((check_count("num_classes", num_classes, 1),), math.log(self._r)))
        )

    @property
    def r(self) -> float | Tensor:
        """The exponent: a number, which may be changed between steps, or (C,) if it is learned."""
        return torch.exp(self.log_r) if self.log_r is not None else self._r

    @r.setter
    def r(self, r: float) -> None:
        if self.log_r is not None:
            raise ValueError("r: expected no assignment, because r is learned; change log_r")
        self._r = _positive("r", r)

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        if self.log_r is None:
            r = x.new_zeros(x.shape[1]) + self._r
            log_r = torch.log(r)
        else:
            _match_classes("log_r", self.log_r, x)
            log_r = self.log_r.to(x.dtype)
            r = torch.exp(log_r)
        log_p = F.logsigmoid(x)
        log_n = torch.log(bags.size.clamp(min=1).to(x.dtype))
        # z = -log(e^t - 1) with t = -log P: from mean p^r, or, where that is near 1, from mean(1 - p^r)
        log_mean = bags.logsumexp(bags.per_class(r) * log_p) - log_n
        loss = _log1mexp(-bags.per_class(r) * log_p, bags.per_class(log_r) + _log_softplus(-x))
        log_gap = bags.logsumexp(loss) - log_n
        near_one = log_gap.detach() < -math.log(2.0)
        log_t_one = _log_neg_log1p_neg_exp(torch.where(near_one, log_gap, -1.0)) - log_r
        t_far = -torch.where(near_one | (bags.size == 0), -1.0, log_mean) / r
        log_t = torch.where(near_one, log_t_one, torch.log(t_far))
        t = torch.where(near_one, torch.exp(log_t_one), t_far)
        return -t - _log1mexp(t, log_t)

    @property
    def operator_parameter(self) -> float | None:
        return self._r if self.log_r is None else None  # a learned exponent

    def extra_repr(self) -> str:
        return f"r={self._r}" if self.log_r is None else f"num_classes={self.log_r.shape[0]}"


class AutoPooling(Pooling):
    """P = sum p e^(a p) / sum e^(a p) with a learned number a per class (McFee et al. 2018).

    a = 0 is mean pooling, and a = 1 is softmax pooling.

    Args:
        num_classes: C.
        a: the initial value for every class.
    """

    def __init__(self, num_classes: int, a: float = 1.0):
        super().__init__()
        _check_fixed("a", a)
        if not math.isfinite(a):
            raise ValueError(f"a: expected finite, got {a}")
        self.a = nn.Parameter(torch.full((check_count("num_classes", num_classes, 1),), float(a)))

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        _match_classes("a", self.a, x)
        return _weighted(bags, x, bags.per_class(self.a.to(x.dtype)) * _sigmoid(x))

    def extra_repr(self) -> str:
        return f"num_classes={self.a.shape[0]}"


class AttentionPooling(Pooling):
    r"""P = sum a_j p_j (Ilse et al. 2018). a is the softmax over the bag of w^T tanh(V f_j), and all classes share it.

    Pass the feature vectors f_j as ``features`` to the loss and to the pooling: (N, L, D), or (T, D) with ``offsets``.
    They may have any floating dtype, such as that of an autocast network: they are converted to that of the layers.

    Args:
        in_features: D, length of the feature vector of an instance.
        hidden_features: number of rows of V.
        gated: True takes w^T (tanh(V f_j) \* sigmoid(U f_j)) instead.

    >>> import torch
    >>> from sgl_ops.pooling import AttentionPooling
    >>> pool = AttentionPooling(16)
    >>> pool(torch.zeros(2, 3, 5), features=torch.randn(2, 5, 16)).shape
    torch.Size([2, 3])
    """

    def __init__(self, in_features: int, hidden_features: int = 128, *, gated: bool = False):
        super().__init__()
        in_features = check_count("in_features", in_features, 1)
        hidden_features = check_count("hidden_features", hidden_features, 1)
        self.tanh_layer = nn.Linear(in_features, hidden_features)
        self.gate_layer = nn.Linear(in_features, hidden_features) if gated else None
        self.score_layer = nn.Linear(hidden_features, 1)

    def pool(self, bags: Bags, x: Tensor, features: Tensor | None) -> Tensor:
        check_features(features, bags.instance_shape, self.tanh_layer.in_features)
        assert features is not None
        features = bags.features(features).to(self.tanh_layer.weight.dtype)
        hidden = torch.tanh(self.tanh_layer(features))
        if self.gate_layer is not None:
            hidden = hidden * torch.sigmoid(self.gate_layer(features))
        score = self.score_layer(hidden).to(x.dtype)  # (N, L, 1) or (T, 1)
        # the softmax's denominator is the same in P and in 1 - P: it cancels in the logit
        return _weighted(bags, x, score.transpose(1, 2) if score.dim() == 3 else score)


#: The poolings by name: those without learned parameters.
POOLINGS: dict[str, type[Pooling]] = {
    "max": MaxPooling,
    "mean": MeanPooling,
    "mean_logits": MeanLogitsPooling,
    "softmax": SoftmaxPooling,
    "linear_softmax": LinearSoftmaxPooling,
    "topk": TopKPooling,
    "lse": LSEPooling,
    "noisy_or": NoisyOrPooling,
    "generalized_mean": GeneralizedMeanPooling,
}

_fused.CODES.update({POOLINGS[name]: code for name, code in _fused.CODE_OF_NAME.items() if name in POOLINGS})


def by_pytorch(pooling: nn.Module) -> Callable[..., Tensor]:
    """``pooling`` as a function that does not use the C++ operators."""
    # with a hook, the call takes the reference by itself, and the hook runs
    return pooling.reference if isinstance(pooling, Pooling) and _fused.has_code(pooling) else pooling


def make_pooling(pooling: str | nn.Module) -> nn.Module:
    """The module that ``pooling=`` means: one of :data:`POOLINGS` by its name, or the module itself."""
    if isinstance(pooling, nn.Module):
        return pooling
    if not isinstance(pooling, str):
        raise TypeError(f"pooling: expected a name or a module, got {type(pooling).__name__}")
    if pooling not in POOLINGS:
        learned = [
            kind for kind in (AttentionPooling, AutoPooling) if kind.__name__.lower().startswith(pooling.lower())
        ]
        hint = f"; a pooling with learned parameters is a module: {learned[0].__name__}" if learned else ""
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, or a module, got {pooling!r}{hint}")
    return POOLINGS[pooling]()


def pooling_of_loss(pooling: str | nn.Module) -> nn.Module:
    """:func:`make_pooling` with a check of the arguments that the module takes, for the constructors of the losses."""
    module = make_pooling(pooling)
    try:
        inspect.signature(module.forward).bind(None, mask=None, offsets=None, features=None)
    except TypeError:
        raise TypeError(
            "pooling: expected a module that takes (logits, *, mask, offsets, features) and returns bag logits, got "
            f"{type(module).__name__}; the poolings with a name are {', '.join(POOLINGS)}"
        ) from None
    except ValueError:  # a function without a signature
        pass
    return module


def _weighted(bags: Bags, x: Tensor, log_weight: Tensor, keep: Tensor | None = None) -> Tensor:
    """z of P = sum w p / sum w: log sum w p - log sum w q, as 1 - P = sum w q / sum w; w = 0 outside ``keep``."""
    log_p, log_q = log_weight + F.logsigmoid(x), log_weight + F.logsigmoid(-x)
    return bags.logsumexp(log_p, keep) - bags.logsumexp(log_q, keep)


def _sigmoid(x: Tensor) -> Tensor:
    """p, with a derivative p (1 - p) that does not become 0 where p rounds to 1."""
    return torch.exp(F.logsigmoid(x))


def _log1mexp(t: Tensor, log_t: Tensor) -> Tensor:
    """log(1 - e^-t) for t > 0 whose logarithm is known, also where t underflows."""
    small, large = t.detach() < 1e-2, t.detach() > 1.0
    s = torch.where(small, t, 0.0)  # what is not small may be so large that its powers overflow
    series = log_t - s / 2 + s * s / 24 - s * s * s * s / 2880
    # two forms of one value, as autograd takes e^-t from the rounded expm1(-t): nothing is left of it where t is large
    middle = torch.log(-torch.expm1(-torch.where(small | large, 1.0, t)))
    return torch.where(small, series, torch.where(large, torch.log1p(-torch.exp(-torch.where(large, t, 1.0))), middle))


def _log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + e^x)), which is x - e^x / 2 where e^x is tiny."""
    small = x.detach() < -20.0
    series = x - torch.exp(torch.where(small, x, -1.0)) / 2
    return torch.where(small, series, torch.log(-F.logsigmoid(-torch.where(small, 0.0, x))))


def _log_neg_log1p_neg_exp(x: Tensor) -> Tensor:
    """log(-log(1 - e^x)) for x < 0, which is x + e^x / 2 where e^x is tiny."""
    small = x.detach() < -20.0
    series = x + torch.exp(torch.where(small, x, -1.0)) / 2
    return torch.where(small, series, torch.log(-torch.log1p(-torch.exp(torch.where(small, -1.0, x)))))


def _positive(name: str, value: float) -> float:
    _check_fixed(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected finite and > 0, got {value}")
    return float(value)


def _check_fixed(name: str, value: object) -> None:
    """Checks that ``value`` is a number. A tensor that requires a gradient would not get it."""
    if isinstance(value, Tensor):
        check_constant(name, value)
    check_number(name, value)


def check_places(name: str, k: object) -> int | float:
    """``k`` of :class:`TopKPooling`: an int >= 1, or a float in (0, 1)."""
    _check_fixed(name, k)
    if isinstance(k, numbers.Real) and not isinstance(k, numbers.Integral):
        k = float(k)
        if not 0.0 < k < 1.0:
            raise ValueError(f"{name}: expected an int >= 1 or a fraction of the bag in (0, 1), got {k}")
        return k
    try:
        number = operator.index(k)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int or a float, got {k!r}") from None
    if isinstance(k, bool) or number < 1:
        raise ValueError(f"{name}: expected an int >= 1 or a fraction of the bag in (0, 1), got {k}")
    return number


def _match_classes(name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.shape[0] != x.shape[1]:
        raise ValueError(f"logits: expected {parameter.shape[0]} classes as {name} has, got {x.shape[1]}")
