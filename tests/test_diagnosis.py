"""diagnose: each finding for bags that have the problem, and no finding for healthy bags."""

from __future__ import annotations

import math

import pytest
import torch
from batches import Batch, packed, padded
from conftest import DEVICES

from sgl_ops import SGLLoss, diagnose
from sgl_ops.pooling import AttentionPooling

BAGS, LENGTH, SPOT = 40, 60, 6
LABELS = torch.tensor([0.0, 1.0]).repeat(BAGS // 2)


def healthy():
    """(N, L): negative instances near logit -5, and six positive ones in every positive bag near 3."""
    logits = torch.randn(BAGS, LENGTH) * 0.7 - 5
    logits[LABELS == 1, :SPOT] += 8
    return logits


def found(logits, labels=LABELS, **call):
    return [finding.name for finding in diagnose(logits, labels, **call).findings]


def flat():
    return healthy() * 0.01 - 2


def flat_and_learned():
    """All instances of a bag are equal; those of positive bags are larger."""
    return torch.where(LABELS == 1, -0.5, -2.0).unsqueeze(1) + torch.randn(BAGS, LENGTH) * 0.01


def flooded():
    logits = healthy()
    logits[LABELS == 1, :50] = 3 + torch.randn(BAGS // 2, 50) * 0.2
    return logits


def flooded_in_a_narrow_range():
    """All p are between 0.90 and 0.94. theta covers 0 to 1, but every p is above delta_h."""
    logits = healthy()
    logits[LABELS == 1] = torch.logit(torch.empty(BAGS // 2, LENGTH).uniform_(0.90, 0.94))
    return logits


def single():
    logits = healthy()
    logits[LABELS == 1, 1:SPOT] -= 8
    return logits


def noise():
    return torch.randn(BAGS, LENGTH)


def probabilities():
    return torch.sigmoid(healthy())


def saturated():
    return healthy() * 10


CASES = {
    "flat": (flat, ["flat maps"]),
    "flat and learnt": (flat_and_learned, ["flat maps"]),
    "flooded": (flooded, ["flooded maps"]),
    "flooded in a narrow range": (flooded_in_a_narrow_range, ["flooded maps"]),
    "single": (single, ["one instance takes all"]),
    "noise": (noise, ["nothing learnt"]),
    "constant": (lambda: torch.zeros(BAGS, LENGTH), ["nothing learnt", "flat maps"]),
    "probabilities": (probabilities, ["probabilities"]),
    "saturated": (saturated, ["saturated logits"]),
}


@pytest.mark.parametrize("seed", range(10))
def test_healthy_bags_have_no_finding(seed):
    torch.manual_seed(seed)
    diagnosis = diagnose(healthy(), LABELS)
    assert diagnosis.healthy and diagnosis.findings == ()
    assert str(diagnosis).endswith("No problem found.")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_each_finding_is_found_on_its_bags(case, seed):
    torch.manual_seed(seed)
    make, verdicts = CASES[case]
    logits = make()
    diagnosis = diagnose(logits, LABELS)
    assert [finding.name for finding in diagnosis.findings] == verdicts
    text = str(diagnosis)
    for finding in diagnosis.findings:
        assert finding.classes == (0,)
        assert finding.name in text
        assert finding.measured in " ".join(text.split()) and finding.change in " ".join(text.split())
        assert finding.measured.endswith(".") and finding.change.endswith(".")


def test_measures_equal_their_definitions():
    torch.manual_seed(3)
    logits = torch.randn(BAGS, LENGTH) * 2
    m = diagnose(logits, LABELS, delta_l=0.2).measures
    p = torch.sigmoid(logits[LABELS == 1].double())
    low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
    theta = (p - low) / (high - low)
    assert (m.positives.item(), m.negatives.item()) == (20.0, 20.0)
    assert m.range.item() == pytest.approx((high - low).median().item(), rel=1e-5)
    assert m.above.item() == pytest.approx(((theta > 0.8) | (p > 0.8)).double().mean(1).median().item())
    assert m.selected.item() == (theta >= 0.2).sum(1).median().item()
    assert m.unit.item() == pytest.approx(((logits >= 0) & (logits <= 1)).double().mean().item())
    assert m.saturated.item() == 0.0 and m.nonfinite.item() == 0.0
    assert m.flat.item() == m.flooded.item() == m.single.item() == 0.0


def test_probabilities_of_exactly_0_are_found():
    """A sigmoid in float16 is 0 below a logit of about -17. Logits that are all 0 are those of a zero layer."""
    logits = torch.full((BAGS, LENGTH), -20.0)
    logits[LABELS == 1, :4] += 24
    assert "probabilities" in [finding.name for finding in diagnose(torch.sigmoid(logits.half()), LABELS).findings]
    assert "probabilities" not in [finding.name for finding in diagnose(torch.zeros(BAGS, LENGTH), LABELS).findings]


def test_the_settings_of_the_loss_decide_the_targets():
    torch.manual_seed(4)
    logits = torch.randn(BAGS, LENGTH) * 2
    positive = torch.sigmoid(logits[LABELS == 1])
    criterion = SGLLoss(rescale=False, delta_l=0.1)
    measures = diagnose(logits, LABELS, settings=criterion.settings).measures
    assert measures.selected.item() == (positive >= 0.1).sum(1).median().item()
    changed = diagnose(logits, LABELS, settings=criterion.settings, delta_l=0.4).measures
    assert changed.selected.item() == (positive >= 0.4).sum(1).median().item() != measures.selected.item()
    with pytest.raises(TypeError, match="lamda: not an argument here; did you mean lam"):
        diagnose(logits, LABELS, lamda=1.0)


def test_names_may_be_numbers_but_not_a_text():
    assert diagnose(torch.zeros(BAGS, LENGTH), LABELS, names=range(7, 8)).names == ("7",)
    with pytest.raises(TypeError, match="names: expected one name for each class, got the text 'a'"):
        diagnose(torch.zeros(BAGS, LENGTH), LABELS, names="a")


def test_finding_needs_most_of_the_positive_bags():
    """Nine of twenty bags with one instance give no finding. Eleven give one."""
    for count, verdicts in ((9, []), (11, ["one instance takes all"])):
        logits = healthy()
        bags = (LABELS == 1).nonzero().flatten()[:count]
        logits[bags, 1:SPOT] -= 8
        assert found(logits) == verdicts


def test_small_bags_may_have_one_positive_instance():
    assert found(single()[:, :7]) == []
    assert found(single()[:, :8]) == ["one instance takes all"]


@pytest.mark.parametrize(
    ("labels", "verdict"),
    [(torch.zeros(BAGS), "no positive bags"), (torch.ones(BAGS), "no negative bags")],
)
def test_equal_labels_are_a_finding(labels, verdict):
    assert verdict in found(healthy(), labels)
    assert "nothing learnt" not in found(healthy(), labels)


def test_unknown_labels_only_are_a_finding():
    diagnosis = diagnose(healthy(), torch.full((BAGS,), math.nan))
    assert [f.name for f in diagnosis.findings] == ["no positive bags"]
    assert diagnosis.measures.auc.isnan().all()
    assert " - " in str(diagnosis)


def test_two_bags_are_too_few_bags():
    names = found(healthy()[:2], LABELS[:2])
    assert names == ["too few bags"]


def test_unknown_labels_are_ignored():
    logits, labels = healthy(), LABELS.clone()
    logits[:6], labels[:6] = 50.0, math.nan
    diagnosis = diagnose(logits, labels)
    assert diagnosis.healthy
    assert diagnosis.measures.positives.item() == 17.0
    logits[0] = math.nan
    assert diagnose(logits, labels).healthy


def test_nonfinite_logits_come_first_and_change_no_other_measure():
    logits = healthy()
    logits[1, 3], logits[2, 0], logits[3, 9] = math.nan, math.inf, -math.inf
    diagnosis = diagnose(logits, LABELS)
    assert [f.name for f in diagnosis.findings] == ["non-finite logits"]
    assert diagnosis.measures.nonfinite.item() == 3.0
    assert diagnosis.measures.range.item() == pytest.approx(0.95, abs=0.05)


def test_findings_name_their_classes():
    logits = torch.stack([healthy(), flooded(), healthy(), flooded(), single()], 1)
    labels = LABELS.unsqueeze(1).expand(-1, 5)
    diagnosis = diagnose(logits, labels, names=["a", "b", "c", "d", "e"])
    assert [(f.name, f.classes) for f in diagnosis.findings] == [
        ("flooded maps", (1, 3)),
        ("one instance takes all", (4,)),
    ]
    assert "flooded maps (b, d)" in str(diagnosis)
    many = diagnose(flooded().unsqueeze(1).expand(-1, 9, -1), LABELS.unsqueeze(1).expand(-1, 9))
    assert "flooded maps (0, 1, 2, 3, 4 and 4 more)" in str(many)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("make", [flooded, single, flat, healthy])
def test_every_layout_gives_the_same_diagnosis(make, device):
    """The bags have unequal sizes, some are empty, and the padding is NaN."""
    sizes = [LENGTH - i % 9 for i in range(BAGS)]
    bags = [bag[:size].double().unsqueeze(0) for bag, size in zip(make(), sizes, strict=True)]
    bags[5] = bags[5][:, :0]
    batch = Batch(bags, LABELS.unsqueeze(1).double())
    results = []
    for layout in (padded, packed):
        logits, call = layout(batch, device)
        results.append(diagnose(logits, batch.labels.to(device), **call))
    rows = logits.tensor_split(call["offsets"][1:-1].cpu())
    nested = torch.nested.nested_tensor(list(rows), layout=torch.jagged)
    results.append(diagnose(nested, batch.labels.to(device)))
    results.append(diagnose(logits[:, 0], batch.labels[:, 0].to(device), **call))
    for other in results[1:]:
        assert [f.name for f in other.findings] == [f.name for f in results[0].findings]
        torch.testing.assert_close(other.measures, results[0].measures, equal_nan=True)
    assert results[0].measures.positives.item() == 19.0


def test_image_maps_and_half_precision_are_supported():
    logits = healthy().reshape(BAGS, 1, 6, 10)
    assert diagnose(logits.half(), LABELS).healthy
    mask = torch.ones(BAGS, 6, 10, dtype=torch.bool)
    assert diagnose(logits, LABELS.bool(), mask=mask).healthy


def test_auc_uses_the_given_pooling():
    logits = healthy()
    logits[LABELS == 0, 0] = 9.0  # one large instance in every negative bag
    assert found(logits, pooling="max") == ["nothing learnt"]
    assert "nothing learnt" not in found(logits, pooling="mean")
    pool = AttentionPooling(4)
    assert diagnose(healthy(), LABELS, pooling=pool, features=torch.randn(BAGS, LENGTH, 4)).measures.auc.item() > 0.9


def test_large_bags_with_max_pooling_get_the_advice_of_top_k():
    def advice(length, pooling):
        (finding,) = diagnose(torch.randn(BAGS, length), LABELS, pooling=pooling).findings
        return finding.change

    torch.manual_seed(1)
    assert "TopKPooling" in advice(600, "max")
    assert "TopKPooling" not in advice(600, "mean")
    assert "TopKPooling" not in advice(60, "max")


def test_no_gradient_and_no_change_of_the_arguments():
    logits = healthy().requires_grad_()
    before = logits.detach().clone()
    diagnose(logits, LABELS)
    assert torch.equal(logits, before) and logits.grad is None


def test_invalid_calls_raise_an_error():
    with pytest.raises(ValueError, match="names: expected 1, one a class, got 2"):
        diagnose(healthy(), LABELS, names=["a", "b"])
    with pytest.raises(ValueError, match="targets: expected 0, 1 or NaN"):
        diagnose(healthy(), LABELS * 2)
    with pytest.raises(ValueError, match="offsets: expected to end"):
        diagnose(torch.zeros(5), torch.zeros(1), offsets=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="delta_l"):
        diagnose(healthy(), LABELS, delta_l=0.7)
