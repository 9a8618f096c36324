"""Diagnosis of a training from the logits of a batch or an epoch: the problems, and what to change."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._bags import Bags, bags_of
from ._checks import check_call, check_values, unnest
from ._ranking import Ranking, rank_bags
from .functional import self_guidance
from .pooling import make_pooling
from .settings import SettingsChanges, SGLSettings, Unpack, settings_of, takes_settings

__all__ = ["BagMeasures", "Diagnosis", "Finding", "diagnose"]

#: A map is flat if max p - min p of the bag is below this.
FLAT_RANGE = 0.05
#: A map is flooded if more than this share of the bag has theta above delta_h, or more than this share has p above it.
FLOODED_SHARE = 0.5
#: One instance takes all if it alone has a target above 0, in a bag of at least so many instances.
SINGLE_BAG_SIZE = 8
#: A logit is saturated beyond this magnitude: p and 1 - p differ from 0 and 1 by less than 3.1e-7.
SATURATED_LOGIT = 15.0
#: A class is at chance if its bag AUC is below 1/2 + so many standard deviations of the AUC of random scores.
CHANCE_DEVIATIONS = 2.0
#: A verdict on the maps of a class holds for more than this share of its positive bags.
BAGS_SHARE = 0.5


class Finding(NamedTuple):
    """One problem.

    Attributes:
        name: ``"non-finite logits"``, ``"no positive bags"``, ``"no negative bags"``, ``"too few bags"``,
            ``"probabilities"``, ``"nothing learnt"``, ``"flat maps"``, ``"flooded maps"``,
            ``"one instance takes all"`` or ``"saturated logits"``.
        classes: indices of the classes that have it.
        measured: what was measured, as a sentence.
        change: what to change, as sentences.
    """

    name: str
    classes: tuple[int, ...]
    measured: str
    change: str


class BagMeasures(NamedTuple):
    """The measured values: one number per class, (C,) float64 on the CPU, NaN if it cannot be measured.

    Attributes:
        positives, negatives: bags whose label is 1, 0.
        auc: AUC of the bag logits.
        chance_deviation: standard deviation of the AUC of random scores, for this many bags.
        range: max p - min p of a positive bag, median over the positive bags.
        above: the larger of two shares of a positive bag's instances: those with theta above delta_h, and those with p
            above delta_h. Median over the positive bags.
        selected: instances of a positive bag whose target M is above 0, median over the positive bags.
        flat, flooded, single: share of the positive bags whose map is flat, flooded, or has one instance with M > 0.
        saturated: share of the instances of all bags with a known label whose logit is beyond 15 in magnitude.
        unit: share of these instances whose logit is in [0, 1], as a probability is; 0 if all logits are 0.
        nonfinite: bags that hold a NaN or infinite logit.
    """

    positives: Tensor
    negatives: Tensor
    auc: Tensor
    chance_deviation: Tensor
    range: Tensor
    above: Tensor
    selected: Tensor
    flat: Tensor
    flooded: Tensor
    single: Tensor
    saturated: Tensor
    unit: Tensor
    nonfinite: Tensor


class Diagnosis(NamedTuple):
    """The result of :func:`diagnose`. ``print`` shows a table of the measures, and each problem with what to change.

    Attributes:
        findings: the problems, in the order in which to fix them.
        measures: the measured values per class.
        names: names of the classes.
    """

    findings: tuple[Finding, ...]
    measures: BagMeasures
    names: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        """Whether no problem was found."""
        return not self.findings

    def __str__(self) -> str:
        columns = {
            "positive bags": (self.measures.positives, "{:.0f}"),
            "negative bags": (self.measures.negatives, "{:.0f}"),
            "bag AUC": (self.measures.auc, "{:.3f}"),
            "range of p": (self.measures.range, "{:.3f}"),
            "above delta_h": (self.measures.above, "{:.1%}"),
            "selected": (self.measures.selected, "{:.0f}"),
        }
        width = max(5, *(len(name) for name in self.names))
        lines = [" ".join(["class".ljust(width), *columns])]
        for c, name in enumerate(self.names):
            cells = []
            for title, (values, shape) in columns.items():
                value = float(values[c])
                cells.append(("-" if value != value else shape.format(value)).rjust(len(title)))
            lines.append(" ".join([name.ljust(width), *cells]))
        if self.healthy:
            return "\n".join([*lines, "", "No problem found."])
        for finding in self.findings:
            named = [self.names[c] for c in finding.classes]
            shown = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
            lines += ["", f"{finding.name} ({shown})"]
            for text in (finding.measured, f"Change: {finding.change}"):
                lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")
        return "\n".join(lines)


@takes_settings
def diagnose(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    features: Tensor | None = None,
    pooling: str | nn.Module = "max",
    names: Sequence[str] | None = None,
    settings: SGLSettings | None = None,
    **changes: Unpack[SettingsChanges],
) -> Diagnosis:
    r"""Finds problems of a training in a batch, or in the concatenated batches of an epoch, and says what to change.

    Use some hundred bags, of training or validation: findings from few bags are uncertain. The conditions are tested
    for each class, over the bags with a known label. theta and M are those of Eq. 5 and 6, and
    :math:`\delta_h = 1 - \delta_l`:

    ========================== ====================================================================================
    finding                    condition
    ========================== ====================================================================================
    ``non-finite logits``      a bag holds a NaN or infinite logit
    ``no positive bags``       no label is 1
    ``no negative bags``       no label is 0
    ``too few bags``           so few that an AUC of 1 may be chance (1/2 + 2 standard deviations of the AUC of random
                               scores is 1 or more)
    ``probabilities``          every logit is in [0, 1], and not all are 0
    ``nothing learnt``         bag AUC below 1/2 + 2 standard deviations of the AUC of random scores
    ``flat maps``              in most positive bags, max p - min p < 0.05 and the map is not flooded
    ``flooded maps``           in most positive bags, over half of the instances have theta above delta_h, or over half
                               have p above delta_h
    ``one instance takes all`` most positive bags have M > 0 in one instance alone (bags of 8 instances or more)
    ``saturated logits``       over half of the instances have a logit beyond 15 in magnitude
    ========================== ====================================================================================

    Args:
        logits: instance logits, in any layout of :mod:`sgl_ops.functional`.
        targets: bag labels, (N, C), or (N,) for one class: 0, 1, or NaN = unknown.
        mask, offsets, features: as in :mod:`sgl_ops.functional`.
        pooling: the pooling of the loss, a name or a module.
        names: C names of the classes. None: their numbers.
        settings: those of the loss, for its targets: ``criterion.settings``. None: the defaults.
        changes: fields of :class:`~sgl_ops.SGLSettings` that replace those of ``settings``: ``delta_l`` and so on.

    Errors: as in :mod:`sgl_ops.functional`; ``ValueError`` for a wrong number of names.

    >>> import torch
    >>> import sgl_ops
    >>> labels = torch.tensor([0, 1]).repeat(20)
    >>> logits = torch.randn(40, 12, 12) - 6                        # 12 x 12 instances, one class
    >>> logits[labels == 1, 3:6, 3:6] += 9                          # a spot in every positive bag
    >>> sgl_ops.diagnose(logits.unsqueeze(1), labels).healthy
    True
    >>> print(sgl_ops.diagnose(torch.full((40, 1, 12, 12), -2.0), labels, names=["spot"]))
    class positive bags negative bags bag AUC range of p above delta_h selected
    spot             20            20   0.500      0.000          0.0%        0
    <BLANKLINE>
    nothing learnt (spot)
      The bag AUC is 0.500; random scores of as many bags reach 0.685.
      Change: keep lam at 0 until the bag loss has learnt (LamSchedule), start from pretrained features,
        set the bias of the last layer by prior_bias, and check the labels and the learning rate.
    <BLANKLINE>
    flat maps (spot)
      In 100% of the positive bags, max p - min p is below 0.05: the targets would rank noise.
      Change: train longer with the bag loss alone (lam = 0), lower weight decay, or raise the learning
        rate; a network whose patches see the whole image gives the same logit everywhere, so use one
        with a smaller receptive field.
    """
    settings = settings_of(settings, changes)
    logits, offsets, features = unnest(logits, mask, offsets, features)
    check_call(logits, targets, mask, offsets)
    # a diagnosis is not a training step: it may wait for the GPU
    logits = logits.detach()
    targets = targets.detach()
    check_values(targets, offsets, logits.shape[0])
    bags = bags_of(logits, mask, offsets)
    labels = targets.unsqueeze(1) if targets.dim() == 1 else targets
    module = make_pooling(pooling)
    classes = labels.shape[1]
    if names is None:
        names = [str(c) for c in range(classes)]
    if isinstance(names, str):
        raise TypeError(f"names: expected one name for each class, got the text {names!r}")
    names = [str(name) for name in names]
    if len(names) != classes:
        raise ValueError(f"names: expected {classes}, one a class, got {len(names)}")
    with torch.no_grad():
        z = module(logits, mask=mask, offsets=offsets, features=features)
        part = self_guidance(logits, targets, mask=mask, offsets=offsets, settings=settings).part
    ranking = rank_bags(z.unsqueeze(1) if z.dim() == 1 else z, labels)
    measures = _measure(bags, logits, part, labels, ranking, settings.delta_l)
    largest = int(bags.size.max())
    return Diagnosis(tuple(_findings(measures, settings.delta_l, module, largest)), measures, tuple(names))


def _measure(bags: Bags, logits: Tensor, part: Tensor, labels: Tensor, ranking: Ranking, delta_l: float) -> BagMeasures:
    x = bags.instances(logits)
    p = torch.sigmoid(x)
    size = bags.size.clamp(min=1)
    broken = bags.count(~torch.isfinite(x)) > 0
    known = ~torch.isnan(labels.float()) & (bags.size > 0)
    positive = known & ~broken & (labels == 1)
    inner = bags.instances(part.float())
    spread = bags.max(torch.nan_to_num(p)) - bags.min(torch.nan_to_num(p))
    # M = 1 (theta above delta_h), or p itself: a bag between 0.90 and 0.99 is flooded although theta spreads it
    above = torch.maximum(bags.count(inner == 2), bags.count(p > 1 - delta_l)) / size
    selected = bags.count(inner > 0)
    flooded = above > FLOODED_SHARE
    flat = (spread < FLAT_RANGE) & ~flooded
    large = positive & (bags.size >= SINGLE_BAG_SIZE)
    single = (selected == 1) & ~flat & ~flooded
    saturated = bags.count(x.abs() > SATURATED_LOGIT)
    unit = bags.count((x >= 0) & (x <= 1))
    zero = torch.where(known & ~broken, bags.count(x != 0), 0).sum(0) == 0
    instances = torch.where(known & ~broken, bags.size, 0).sum(0)

    def over(which: Tensor, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        kept = [values[:, c][which[:, c]].double().cpu() for c in range(values.shape[1])]
        return torch.stack([reduce(v) if len(v) else torch.tensor(torch.nan, dtype=torch.float64) for v in kept])

    return BagMeasures(
        positives=(known & (labels == 1)).sum(0).double().cpu(),
        negatives=(known & (labels == 0)).sum(0).double().cpu(),
        auc=ranking.auc,
        chance_deviation=ranking.chance_deviation,
        range=over(positive, spread, torch.median),
        above=over(positive, above, torch.median),
        selected=over(positive, selected, torch.median),
        flat=over(positive, flat, torch.mean),
        flooded=over(positive, flooded, torch.mean),
        single=over(large, single, torch.mean),
        saturated=(torch.where(known & ~broken, saturated, 0).sum(0) / instances).double().cpu(),
        unit=torch.where(zero, 0, torch.where(known & ~broken, unit, 0).sum(0) / instances).double().cpu(),
        nonfinite=(known & broken).sum(0).double().cpu(),
    )


def _findings(m: BagMeasures, delta_l: float, pooling: nn.Module, largest: int) -> list[Finding]:
    delta_h = 1 - delta_l
    found = []

    def add(name: str, condition: Tensor, measured: Callable[[Tensor], str], change: str) -> None:
        if bool(condition.any()):
            found.append(Finding(name, tuple(condition.nonzero().flatten().tolist()), measured(condition), change))

    def largest_of(values: Tensor) -> Callable[[Tensor], float]:
        return lambda condition: float(values[condition].max())

    add(
        "non-finite logits",
        m.nonfinite > 0,
        lambda c: (
            f"{int(m.nonfinite[c].max())} bags hold a NaN or infinite logit; the loss of a batch with them is NaN."
        ),
        "look for a division by 0 or an overflow in the network, lower the learning rate, and clip the gradients.",
    )
    add(
        "no positive bags",
        m.positives == 0,
        lambda c: "No bag has the label 1: there is nothing to find.",
        "pass more bags (an epoch instead of a batch); sample rare classes more often, or leave the class out.",
    )
    add(
        "no negative bags",
        (m.negatives == 0) & (m.positives > 0),
        lambda c: "No bag has the label 0: the network may call every instance positive.",
        "add negative bags; without them no loss can tell what is not the class.",
    )
    bound = 0.5 + CHANCE_DEVIATIONS * m.chance_deviation
    few = bound >= 1
    add(
        "too few bags",
        few,
        lambda c: "The bags are too few to tell whether anything is learnt.",
        "pass more bags, for example a whole epoch, or the validation set.",
    )
    add(
        "probabilities",
        m.unit == 1,
        lambda c: "Every logit is in [0, 1], so that these numbers are probably probabilities.",
        "pass the output of the last layer without a sigmoid or softmax after it; the loss applies the sigmoid itself.",
    )
    advice = (
        "keep lam at 0 until the bag loss has learnt (LamSchedule), start from pretrained features, set the bias of "
        "the last layer by prior_bias, and check the labels and the learning rate"
    )
    if largest >= 500 and type(pooling).__name__ in ("MaxPooling", "NoisyOrPooling"):
        advice += (
            f"; the bags have up to {largest} instances, where max and noisy-or pooling often fail to start: "
            "use TopKPooling"
        )
    chance = ~few & (m.auc < bound)
    add(
        "nothing learnt",
        chance,
        lambda c: (
            f"The bag AUC is {largest_of(m.auc)(c):.3f}; random scores of as many bags reach "
            f"{largest_of(bound)(c):.3f}."
        ),
        advice + ".",
    )
    add(
        "flat maps",
        m.flat > BAGS_SHARE,
        lambda c: (
            f"In {largest_of(m.flat)(c):.0%} of the positive bags, max p - min p is below {FLAT_RANGE}: the targets "
            "would rank noise."
        ),
        "train longer with the bag loss alone (lam = 0), lower weight decay, or raise the learning rate; a network "
        "whose patches see the whole image gives the same logit everywhere, so use one with a smaller receptive field.",
    )
    add(
        "flooded maps",
        m.flooded > BAGS_SHARE,
        lambda c: (
            f"In {largest_of(m.flooded)(c):.0%} of the positive bags, more than half of the instances are above "
            f"delta_h = {delta_h:.2g}."
        ),
        "right only where most instances of a positive bag are positive. Else use max or top-k pooling instead of a "
        "mean, set mask_weight (begin with 1), lower lam, begin lam later (LamSchedule), or use a network with a "
        "smaller receptive field.",
    )
    add(
        "one instance takes all",
        m.single > BAGS_SHARE,
        lambda c: (
            f"In {largest_of(m.single)(c):.0%} of the positive bags, one instance alone has a target above 0, whatever "
            "the size of the bag."
        ),
        "right only where a positive bag has one positive instance. Else raise lam, use top-k pooling instead of max "
        "(in large bags with TopKSchedule), or lower delta_l.",
    )
    add(
        "saturated logits",
        m.saturated > 0.5,
        lambda c: (
            f"{largest_of(m.saturated)(c):.0%} of the instances have a logit beyond {SATURATED_LOGIT:.0f} in "
            "magnitude: their gradients are near 0."
        ),
        "lower the learning rate, raise weight decay, normalize the features, or check that no sigmoid or scale comes "
        "after the last layer.",
    )
    return found
