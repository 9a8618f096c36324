"""The initial weights and bias of the head of a network."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from images.models import PatchClassifier

#: The largest standard deviation of the initial logits. With a larger one, the initial probabilities are near 0 and 1.
LARGEST_DEVIATION = 1.0
#: Side of the images that it is measured on, in pixels.
SIDE = 128


@torch.no_grad()
def set_initial_head(network: PatchClassifier, prior: float) -> None:
    """Sets the head so that the initial probability of a patch is about ``prior``.

    The logit of ``prior`` is added to the bias. If the logits without the bias have a standard deviation above
    ``LARGEST_DEVIATION``, the weights are divided by it: the features of some pretrained networks are large. It is
    measured on smooth random images. Their logits have about the standard deviation of those of photos and films.
    """
    deviation = deviation_of_logits(network)
    if deviation > LARGEST_DEVIATION:
        network.head.weight.mul_(LARGEST_DEVIATION / deviation)
    network.head.bias.add_(math.log(prior / (1 - prior)))


@torch.no_grad()
def deviation_of_logits(network: PatchClassifier) -> float:
    """The standard deviation of the logits without the bias, on smooth random images that are always the same."""
    coarse = torch.randn(8, 3, SIDE // 16, SIDE // 16, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    training = network.training
    network.eval()
    logits = network(images) - network.head.bias.view(-1, 1, 1)
    network.train(training)
    return float(logits.std())
