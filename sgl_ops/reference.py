"""The losses in plain PyTorch, for every device and dtype. The tests compare the fused operator with them.

Equation numbers are those of Seibold et al., "Self-Guided Multiple Instance Learning for Weakly Supervised Disease
Classification and Localization in Chest Radiographs", ACCV 2020.

*Your own targets.* ``SGLLoss(guide=f)`` takes targets, parts and weights from ``f``, a function of :class:`Instances`
that returns a :class:`Guidance`. This module computes the loss, in every layout and with a process group. The function
of this example has soft thresholds. It takes the 10 % and 90 % quantiles of a bag in place of its minimum and maximum:

>>> import torch
>>> from sgl_ops import SGLLoss
>>> from sgl_ops.reference import Guidance, Instances
>>> def soft_guide(instances: Instances) -> Guidance:
...     bags, labels, p = instances.bags, instances.labels, torch.sigmoid(instances.x)
...     expand = bags.expand_to_instances
...     low, high = bags.quantile(p, 0.1), bags.quantile(p, 0.9)
...     span = torch.where(high > low, high - low, 1.0)
...     theta = ((p - expand(low)) / expand(span)).clamp(0, 1)
...     theta = torch.where(expand(labels.positive), theta, 0.0)
...     negative = torch.sigmoid((0.3 - theta) / 0.05)
...     positive = torch.sigmoid((theta - 0.7) / 0.05)
...     ambiguous = 1 - negative - positive
...     confidence = torch.where(labels.positive, bags.max(p) - bags.median(p), 1.0)
...     return Guidance(positive + ambiguous * theta, negative, ambiguous, positive, 2 ** (confidence - 1))
>>> criterion = SGLLoss(guide=soft_guide)
>>> logits = torch.tensor([[-2.0, 0.0, 3.0, 1.0], [-1.0, -3.0, -2.0, 0.0]], requires_grad=True)
>>> loss = criterion(logits, torch.tensor([1, 0]))
>>> loss.backward()
>>> bool((logits.grad[1] > 0).all())     # the loss lowers every instance of the negative bag
True

Other public functions: :func:`read`, :func:`guide`, :func:`rescaled`, :func:`bce`, :func:`sgl_terms`,
:func:`bag_loss`, :func:`bil_loss`, :func:`mmm_loss`. They do not check their arguments;
:mod:`sgl_ops.functional` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._bags import Bags, bags_of, working_dtype
from ._checks import check_features
from ._ranks import Group, all_reduce_batch
from .pooling import MaxPooling, MeanPooling, MinPooling, by_pytorch
from .settings import SGLSettings

__all__ = [
    "Bags",
    "Guidance",
    "Instances",
    "Labels",
    "Terms",
    "bag_loss",
    "bce",
    "bil_loss",
    "guide",
    "mmm_loss",
    "read",
    "rescaled",
    "sgl_terms",
]

NEGATIVE, AMBIGUOUS, POSITIVE, NO_PART = 0, 1, 2, -1


class Labels(NamedTuple):
    """The labels of the (bag, class) pairs: all (N, C)."""

    takes_part: Tensor  # bool: the label is known and the bag is not empty
    positive: Tensor  # bool, among those
    y: Tensor  # 0 or 1 as a number, 0 for pairs that do not take part
    participants: Tensor  # (), the number of pairs that take part


class Guidance(NamedTuple):
    """The targets of the instances and their parts: the result of :func:`guide` and of ``f`` in ``SGLLoss(guide=f)``.

    No gradient flows through these tensors. Every tensor has the dtype of ``x``.

    Attributes:
        targets: M in [0, 1], in the shape of ``x``.
        negative, ambiguous, positive: the membership of each instance in the three parts, numbers >= 0 in the shape of
            ``x``. Each part of the loss is a mean over its instances, weighted by the membership.
        weight: w of Eq. 7, (N, C).
        alpha: confidence of Eq. 8, (N, C). ``self_guidance`` returns it, and the loss does not use it. None: it is
            computed from w = 2^(alpha - 1).
    """

    targets: Tensor
    negative: Tensor
    ambiguous: Tensor
    positive: Tensor
    weight: Tensor
    alpha: Tensor | None = None

    @property
    def part(self) -> Tensor:
        """int8, in the shape of ``x``: the part with the largest membership (0, 1, 2), -1 where all are 0."""
        memberships = torch.stack(self[1:4])
        return torch.where(memberships.amax(0) > 0, memberships.argmax(0), NO_PART).to(torch.int8)


class Instances(NamedTuple):
    """The logits of a call, in float32 or float64: the argument of ``f`` in ``SGLLoss(guide=f)``.

    Attributes:
        bags: reductions of a tensor in the shape of ``x`` to (N, C): ``sum``, ``mean``, ``max``, ``min``, ``median``,
            ``quantile(x, q)``, ``count(condition)``. ``expand_to_instances`` makes an (N, C) tensor broadcast against
            ``x``, ``per_class`` a (C,) tensor.
        labels: ``positive``, ``takes_part`` (bool) and ``y``, each (N, C).
        group: the process group, or None.
        x: logits in float32 or float64: (N, C, L), or (T, C) for packed bags.
    """

    bags: Bags
    labels: Labels
    group: Group
    x: Tensor  # 0 without gradient in pairs that do not take part; NaN in a pair with a NaN or infinite logit


def read(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    process_group: Group = None,
) -> Instances:
    """The instances of a call whose arguments are valid."""
    bags = bags_of(logits, mask, offsets)
    labels = _labels(bags, targets, working_dtype(logits.dtype))
    # pairs that do not take part are replaced before any arithmetic: 0 * NaN is NaN
    x = torch.where(bags.expand_to_instances(labels.takes_part), bags.instances(logits), 0.0)
    return Instances(bags, labels, process_group, bags.propagate_nonfinite(x))


def _labels(bags: Bags, targets: Tensor, dtype: torch.dtype) -> Labels:
    targets = targets.unsqueeze(1) if targets.dim() == 1 else targets
    takes_part = (targets == targets) & (bags.size > 0)
    positive = takes_part & (targets != 0)
    return Labels(takes_part, positive, positive.to(dtype), takes_part.sum())


def bce(x: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy from logits, (1 - t) softplus(x) + pos_weight t softplus(-x): exact, no epsilon."""
    # softplus(x) = -logsigmoid(-x); F.softplus becomes x above a threshold, which float64 can see
    positive = -target * F.logsigmoid(x)
    if pos_weight is not None:
        positive = pos_weight * positive
    return positive - (1 - target) * F.logsigmoid(-x)


def rescaled(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """theta = (p - min p) / (max p - min p) of Eq. 5 from logits, with p = sigmoid(x).

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)) keeps its relative accuracy where the sigmoid
    saturates: theta = [sigmoid(x) / sigmoid(high)] [-expm1(low - x)] / [-expm1(low - high)], which is exactly 0 at
    ``low`` and exactly 1 at ``high``.

    The operations and their order are those of the operator (theta_of in csrc), so that both round alike except where
    their exponentials differ.
    """
    shift = torch.where(high < -40.0, high, 0.0)  # a tiny p is scaled, so that it does not underflow

    def scaled_sigmoid(x: Tensor) -> Tensor:
        return torch.exp(x.clamp(max=0.0) - shift) * (1 / (1 + torch.exp(-x.abs())))

    span = torch.expm1(low - high)
    lift = torch.where(span > -1e-15, 2.0**64, 1.0).to(x.dtype)  # else the reciprocal might be infinite
    rise = (torch.expm1(low - x) * lift) * (1 / (span * lift))
    theta = (scaled_sigmoid(x) * (1 / scaled_sigmoid(high))) * rise
    return torch.where(x == high, 1.0, theta.clamp(max=1.0))


def guide(instances: Instances, settings: SGLSettings) -> Guidance:
    """Ternary targets (Eq. 5, 6) and weights (Eq. 7, 8) of every (bag, class) pair, or those of the user."""
    if settings.guide is not None:
        return _guidance_of_user(instances, settings.guide)
    bags, labels, x = instances.bags, instances.labels, instances.x.detach()
    low, high = bags.min(x), bags.max(x)
    expand = bags.expand_to_instances
    theta = rescaled(x, expand(low), expand(high)) if settings.rescale else torch.sigmoid(x)
    delta_l = settings.delta_l
    part = torch.where(theta < delta_l, NEGATIVE, torch.where(theta > 1.0 - delta_l, POSITIVE, AMBIGUOUS))
    part = torch.where(expand(labels.positive), part, NEGATIVE)
    takes_part = labels.takes_part
    if settings.rescale:  # equal instances have no ranking
        takes_part = takes_part & ~(labels.positive & (low == high))
    part = bags.fill(torch.where(expand(takes_part), part, NO_PART), NO_PART)
    targets = torch.where(part == POSITIVE, 1.0, torch.where(part == AMBIGUOUS, theta, 0.0)).to(x.dtype)
    alpha = torch.where(labels.positive, torch.sigmoid(high) - torch.sigmoid(bags.median(x)), 1.0)
    weight = torch.exp2(alpha - 1) if settings.weighted else torch.ones_like(alpha)
    negative, ambiguous, positive = ((part == k).to(x.dtype) for k in (NEGATIVE, AMBIGUOUS, POSITIVE))
    return Guidance(targets, negative, ambiguous, positive, weight, alpha)


def _guidance_of_user(instances: Instances, function: Callable[[Instances], Guidance]) -> Guidance:
    """The result of ``guide=function`` as constants, with 0 for pairs that do not take part."""
    x, bags, labels = instances.x.detach(), instances.bags, instances.labels
    given = function(instances._replace(x=x))
    if not isinstance(given, Guidance):
        raise TypeError(f"guide: expected an sgl_ops.reference.Guidance, got {type(given).__name__}")
    inside = bags.expand_to_instances(labels.takes_part)
    checked = []
    for name, value in zip(given._fields[:5], given[:5], strict=True):
        expected = labels.y.shape if name == "weight" else x.shape
        if not isinstance(value, Tensor) or value.shape != expected:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"guide: expected {name} of shape {tuple(expected)}, got {got}")
        value = value.detach().to(x.dtype)
        if name == "weight":
            checked.append(torch.where(labels.takes_part, value, 0.0))
        else:
            checked.append(bags.fill(torch.where(inside, value, 0.0), 0.0))
    alpha = torch.log2(checked[4]) + 1 if given.alpha is None else given.alpha.detach()
    targets, negative, ambiguous, positive, weight = checked
    return Guidance(targets, negative, ambiguous, positive, weight, alpha)


def bag_sum(
    instances: Instances,
    pooling: nn.Module,
    mask: Tensor | None,
    offsets: Tensor | None,
    features: Tensor | None,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
) -> Tensor:
    """Sum of BCE(P, y) (Eq. 3) over the (bag, class) pairs that take part."""
    z = pooled(instances, pooling, mask, offsets, features)
    return sum_over_pairs(instances, bce(z, instances.labels.y, pos_weight), class_weight)


def pooled(
    instances: Instances, pooling: nn.Module, mask: Tensor | None, offsets: Tensor | None, features: Tensor | None
) -> Tensor:
    """Bag logits (N, C) of the pairs that take part, 0 without gradient for the others."""
    bags, labels = instances.bags, instances.labels
    if features is not None:
        check_features(features, bags.instance_shape)
        wanted = labels.takes_part.any(1, keepdim=True)
        wanted = bags.expand_to_instances(wanted)
        wanted = wanted.transpose(1, 2) if wanted.dim() == 3 else wanted
        features = torch.where(wanted, features, 0.0)
    z = by_pytorch(pooling)(bags.layout(instances.x), mask=mask, offsets=offsets, features=features)
    if z.numel() != labels.y.numel():
        raise ValueError(f"pooling: expected bag logits of shape {tuple(labels.y.shape)}, got {tuple(z.shape)}")
    return torch.where(labels.takes_part, z.reshape(labels.y.shape), 0.0)


def sum_over_pairs(instances: Instances, loss: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Sum of ``loss`` (N, C), weighted by class, over the (bag, class) pairs that take part."""
    weighted = loss if class_weight is None else class_weight * loss
    return torch.where(instances.labels.takes_part, weighted, 0.0).sum()


def mean_over_pairs(instances: Instances, total: Tensor) -> Tensor:
    """The mean from the sum ``total`` of this rank: over the (bag, class) pairs of all ranks."""
    counts = F.pad(instances.labels.participants.reshape(1), (0, 3))
    counts, numbers = all_reduce_batch(counts, F.pad(total.reshape(1), (4, 1)), instances.group)
    return numbers[4] / counts[0].clamp(min=1)


class InstanceSums(NamedTuple):
    """The sums of the instance loss, each in the order negative, ambiguous, positive."""

    counts: Tensor  # (3,) int64: instances of each part; 0 with ``guide=``
    losses: Tensor  # (3,): sum of the loss over the instances of each part
    per_bag: Tensor  # (): sum over the pairs and the parts of the mean loss in the part
    memberships: Tensor  # (3,): sum of the memberships with ``guide=``, else 0


def instance_sums(
    instances: Instances,
    guidance: Guidance,
    soft: bool,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
) -> InstanceSums:
    """Weighted BCE against the targets, w BCE(p, M) (Eq. 7). ``soft``: the memberships may be other than 0 and 1."""
    bags, x = instances.bags, instances.x
    loss = bce(x, guidance.targets, None if pos_weight is None else bags.per_class(pos_weight))
    numbers, losses, per_bag = [], [], x.new_zeros(())
    for membership in (guidance.negative, guidance.ambiguous, guidance.positive):
        loss_sum = guidance.weight * bags.sum(membership * loss)
        number = bags.sum(membership) if soft else bags.count(membership > 0)
        numbers.append(number.sum())
        losses.append(sum_over_pairs(instances, loss_sum, class_weight))
        per_bag = per_bag + sum_over_pairs(instances, loss_sum / _or_one(number), class_weight)
    total = torch.stack(numbers)
    none = torch.zeros_like(total, dtype=torch.int64 if soft else x.dtype)
    counts, memberships = (none, total) if soft else (total, none)
    return InstanceSums(counts, torch.stack(losses), per_bag, memberships)


def _or_one(number: Tensor) -> Tensor:
    """A denominator: the sum of an empty part is 0."""
    return torch.where(number > 0, number, 1)


def mask_sum(instances: Instances, guidance: Guidance, class_weight: Tensor | None) -> Tensor:
    """Sum over the pairs of sqrt(1/n sum_j p_j^2 [M_j > 0]), for L_mask (Sec. 3.3).

    [M_j > 0] is 1 if M_j > 0, otherwise 0; n is the number of instances of the bag.
    In log space: where p^2 underflows, the root of 0 would have an infinite gradient.
    """
    bags = instances.bags
    kept = (guidance.targets > 0) | torch.isnan(instances.x)  # a NaN makes the term NaN
    log_n = torch.log(bags.size.clamp(min=1).to(instances.x.dtype))
    log_root = (bags.logsumexp(2 * F.logsigmoid(instances.x), kept) - log_n) / 2
    root = torch.where(bags.count(kept) > 0, torch.exp(log_root), 0.0)
    return sum_over_pairs(instances, root, class_weight)


class Terms(NamedTuple):
    """The three terms of Eq. 9, each with its gradient."""

    bag: Tensor
    instance: Tensor
    mask: Tensor


def sgl_terms(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    *,
    settings: SGLSettings,
    pooling: nn.Module,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    process_group: Group = None,
) -> Terms:
    """The terms of the Self-Guiding Loss (Eq. 9). ``settings.total(*terms)`` is the loss.

    Args:
        settings: ``check`` and ``impl`` are not used.
        pooling: a module; :func:`sgl_ops.pooling.make_pooling` gives it for a name.
    """
    instances = read(logits, targets, mask, offsets, process_group)
    guidance = guide(instances, settings)
    sums = instance_sums(instances, guidance, settings.guide is not None, class_weight, pos_weight)
    bag = bag_sum(instances, pooling, mask, offsets, features, class_weight, pos_weight)
    penalty = mask_sum(instances, guidance, class_weight)
    counts = torch.cat((instances.labels.participants.reshape(1), sums.counts))
    numbers = torch.cat((sums.losses, torch.stack((sums.per_bag, bag, penalty)), sums.memberships))
    counts, numbers = all_reduce_batch(counts, numbers, process_group)
    pairs, in_parts = counts[0].clamp(min=1), _or_one(counts[1:] + numbers[6:].detach())
    instance = numbers[3] / pairs if settings.per_bag else (numbers[:3] / in_parts).sum()
    return Terms(numbers[4] / pairs, instance, numbers[5] / pairs)


def bil_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    *,
    pooling: nn.Module,
    process_group: Group = None,
) -> Tensor:
    """Bag-instance loss (Zhou et al. 2017): instances against their own rounded probabilities."""
    instances = read(logits, targets, mask, offsets, process_group)
    bags, labels, x = instances.bags, instances.labels, instances.x
    pseudo = ((x.detach() > 0) & bags.expand_to_instances(labels.positive)).to(x.dtype)
    instance = bags.mean(bce(x, pseudo))
    bag = bce(pooled(instances, pooling, mask, offsets, features), labels.y)
    positive = bag + (bag.detach() - instance) ** 2
    return mean_over_pairs(instances, sum_over_pairs(instances, torch.where(labels.positive, positive, instance)))


def bag_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    *,
    pooling: nn.Module,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    process_group: Group = None,
) -> Tensor:
    """L_bag of all ranks, with its gradient."""
    instances = read(logits, targets, mask, offsets, process_group)
    total = bag_sum(instances, pooling, mask, offsets, features, class_weight, pos_weight)
    return mean_over_pairs(instances, total)


def mmm_loss(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    process_group: Group = None,
) -> Tensor:
    """Min-mean-max loss (Morfi & Stowell 2018)."""
    instances = read(logits, targets, mask, offsets, process_group)
    y = instances.labels.y
    loss = torch.zeros_like(y)
    for pooling, target in ((MaxPooling(), y), (MinPooling(), torch.zeros_like(y)), (MeanPooling(), y / 2)):
        loss = loss + bce(pooled(instances, pooling, mask, offsets, None), target) / 3
    return mean_over_pairs(instances, sum_over_pairs(instances, loss))
