"""How well the scores of bags separate the bag labels, per class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranking(NamedTuple):
    """Counts per class, each (C,) float64: sums over several sets of bags are counts, too."""

    ordered: Tensor  # pairs (positive bag, negative bag) whose positive has the higher score; a tie counts 1/2
    pairs: Tensor
    positives: Tensor  # bags whose label is 1
    negatives: Tensor  # bags whose label is 0

    @property
    def auc(self) -> Tensor:
        """(C,): the area under the ROC curve, NaN where there is no pair."""
        return self.ordered / self.pairs

    @property
    def chance_deviation(self) -> Tensor:
        """(C,): standard deviation of the AUC of scores that do not depend on the labels; NaN where there is no pair.

        The variance of the Mann-Whitney statistic: (n1 + n0 + 1) / (12 n1 n0).
        """
        spread = (self.positives + self.negatives + 1) / (12 * self.positives * self.negatives)
        return torch.where(self.pairs > 0, spread.sqrt(), torch.nan)


def rank_bags(scores: Tensor, targets: Tensor) -> Ranking:
    """Counts of scores (N, C) and targets (N, C); a NaN target or a score that is not finite leaves its pair out."""
    scores, targets = scores.detach().cpu().double(), targets.detach().cpu().double()
    known = torch.isfinite(scores) & ~torch.isnan(targets)
    ordered = []
    for score, label, kept in zip(scores.unbind(1), targets.unbind(1), known.unbind(1), strict=True):
        negative = score[kept & (label == 0)].sort().values
        positive = score[kept & (label == 1)].contiguous()
        below = torch.searchsorted(negative, positive)
        not_above = torch.searchsorted(negative, positive, right=True)
        ordered.append((below + not_above).sum() / 2)
    positives = (known & (targets == 1)).sum(0).double()
    negatives = (known & (targets == 0)).sum(0).double()
    return Ranking(torch.stack(ordered).double(), positives * negatives, positives, negatives)
