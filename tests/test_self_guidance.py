"""self_guidance: targets, parts and weights, compared with the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from batches import packed, random_batch

from sgl_ops.functional import self_guidance

PARTS = {"negative": 0, "ambiguous": 1, "positive": 2, "none": -1}


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("delta_l", [0.1, 0.3])
def test_self_guidance_equals_the_oracle(device, rescale, weighted, delta_l):
    batch = random_batch([6, 1, 13], classes=2, positives=0.7)
    logits, call = packed(batch, device)
    got = self_guidance(logits, batch.labels.to(device), delta_l=delta_l, rescale=rescale, weighted=weighted, **call)
    for i, bag in enumerate(batch.logits):
        inside = slice(int(call["offsets"][i]), int(call["offsets"][i + 1]))
        for c, xs in enumerate(bag.tolist()):
            label = int(batch.labels[i, c])
            xs = [oracle.mpf(x) for x in xs]
            targets, parts, alpha, weight = oracle.guidance(xs, label, delta_l, rescale, weighted)
            assert got.targets[inside, c].tolist() == pytest.approx([float(m) for m in targets], rel=1e-12)
            assert got.part[inside, c].tolist() == [PARTS[part] for part in parts]
            assert float(got.alpha[i, c]) == pytest.approx(float(alpha), rel=1e-12)
            assert float(got.weight[i, c]) == pytest.approx(float(weight), rel=1e-12)


def test_results_require_no_gradient(device):
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    got = self_guidance(x, torch.ones(2, 3, device=device))
    assert not any(v.requires_grad for v in got)
    assert got.targets.shape == got.part.shape == x.shape
    assert got.alpha.shape == got.weight.shape == (2, 3)


def test_extreme_targets_are_exact_for_saturated_logits(device):
    for shift in (-300.0, -80.0, 0.0, 30.0, 80.0, 300.0):
        x = torch.tensor([[shift, shift + 1, shift + 2]], device=device)
        m = self_guidance(x, torch.tensor([1], device=device), delta_l=0.0).targets[0]
        assert m[0] == 0
        assert m[2] == 1
        assert 0 < m[1] < 1


def test_pairs_without_guidance_have_no_part(device):
    x = torch.randn(3, 4).to(device)
    x[0] = 0.5  # all equal
    got = self_guidance(x, torch.tensor([1.0, float("nan"), 0.0], device=device))
    assert (got.part[:2] == -1).all()
    assert (got.part[2] == 0).all()
    assert (got.targets == 0).all()
    assert got.alpha[1].isnan()
    assert got.alpha[2] == 1
