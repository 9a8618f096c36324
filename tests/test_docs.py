"""The code in docstrings, in the README and in docs/ runs and gives the results that the page states."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import re

import pytest
import torch
from conftest import ROOT

import sgl_ops
import sgl_ops.localization

DOCS = ROOT / "docs"
MODULES = [
    "sgl_ops",
    "sgl_ops.diagnosis",
    "sgl_ops.functional",
    "sgl_ops.localization",
    *(f"sgl_ops.localization._{part}" for part in ("accuracy", "boxes", "maps", "overlay", "references")),
    "sgl_ops.losses",
    "sgl_ops.pooling",
    "sgl_ops.reference",
    "sgl_ops.schedule",
    "sgl_ops.settings",
]
PUBLIC = [sgl_ops, sgl_ops.functional, sgl_ops.pooling, sgl_ops.localization]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in module.__all__])
def test_every_public_name_has_a_docstring(module, name):
    thing = getattr(module, name)
    assert inspect.getdoc(thing) or not callable(thing)  # constants have comments instead


def test_code_of_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    model = torch.nn.Conv2d(1, 14, 3, stride=2)
    names = {"model": model, "images": torch.randn(4, 1, 17, 17), "labels": torch.randint(0, 2, (4, 14))}
    exec(code, names)
    assert names["bag_logits"].shape == (4, 14)
    assert names["heat_map"].shape == (4, 14, 8, 8)
    assert model.weight.grad.abs().sum() > 0


def test_replacements_of_other_losses_give_the_same_number():
    """The code of each row gives a loss with a gradient. If the row says so, its value equals that of the old loss."""
    text = (DOCS / "coming-from-another-loss.md").read_text()
    (table,) = re.findall(r"(\| you have .*?)\n\n", text, re.S)
    names = {
        "F": torch.nn.functional,
        **vars(sgl_ops),
        **vars(sgl_ops.pooling),
        "logits": torch.randn(4, 3, 5, 6, requires_grad=True),
        "labels": torch.randint(0, 2, (4, 3)).float(),
        "patch_logits": torch.randn(30, 2, requires_grad=True),
        "slide_labels": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "features": torch.randn(30, 512),
        "offsets": torch.tensor([0, 12, 30]),
        "x": torch.randn(4, 9, 1, 1, requires_grad=True),
        "y": torch.tensor([1.0, 0.0, 1.0, 0.0]),
    }
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    assert len(rows) == 4
    same = 0
    for have, take, changes in rows:
        value = eval(take.split("`")[1], names)
        value.backward()
        assert value.isfinite()
        if "the same number" in changes:
            torch.testing.assert_close(value, eval(have.split("`")[1], names))
            same += 1
    assert same == 3
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
        names["loss"].backward()
    assert all(names[name].grad.abs().sum() > 0 for name in ("logits", "patch_logits", "x"))


def test_code_of_own_loop_runs():
    """Runs the code blocks of docs/own-loop.md in order."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "own-loop.md").read_text(), re.S)
    model = torch.nn.Conv2d(1, 3, 3)
    images, labels = torch.randn(4, 1, 8, 8), torch.randint(0, 2, (4, 3)).float()
    logged = {}
    names = {
        "model": model,
        "loader": [(images, labels)],
        "epochs": 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "log": logged.update,
    }
    before = model.weight.detach().clone()
    lams = []
    for block in blocks:
        if "torch.cat(bags)" in block:
            names |= {"model": torch.nn.Linear(7, 3), "bags": [torch.randn(n, 7) for n in (5, 9, 1, 4)]}
        elif "self_guidance" in block:
            names["logits"] = torch.randn(4, 3, 6, 6)
        elif "for images" not in block:
            names["logits"] = names["model"](images)  # the previous block has freed its graph
        exec(block, names)
        lams.append(names["criterion"].lam)
        if "prior_bias" in block:
            names["model_with_prior"] = copy.deepcopy(model)
    assert not torch.equal(model.weight, before)
    assert set(logged) == {"bag", "instance", "mask"}
    assert 0.0 in lams and 0.5 in lams
    # lam stays 0: four bags cannot tell whether the network has learnt
    assert (names["falling"].done, names["pooling"].k, lams[-1]) == (True, 1, 0.0)
    assert names["schedule"].class_auc.shape == (3,)  # of the last block, after the fall of k
    assert torch.equal(names["model_with_prior"].bias, sgl_ops.prior_bias(labels, share=0.05))
    assert names["guidance"].targets.shape == (4, 3, 6, 6)
    assert names["offsets"].tolist() == [0, 5, 14, 15, 19]


def test_code_of_the_localization_page_runs(capsys):
    """Runs the code blocks of docs/localization.md in order. Each print gives the value of its comment."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "localization.md").read_text(), re.S))
    names = {}
    exec(code, names)
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
    assert capsys.readouterr().out.splitlines() == expected
    assert len(expected) == code.count("print(") > 5
    # the overlay tints the image where p is high
    assert len(names["image"].getcolors()) == 2


def test_code_of_the_recordings_page_runs(tmp_path, monkeypatch, capsys):
    """Runs docs/recordings.md in order: the network finds the chirps, also the heads and their application."""
    import predict_features
    import train_features

    page = (DOCS / "recordings.md").read_text()
    *blocks, last = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["right"].float().mean() > 0.9
    assert names["iou"].mean() > 0.6
    # the recordings that end after their chirp have the same times as before the cut
    assert names["mask"].sum(1).tolist() == [(12000 + 400 * i) // 200 for i in range(64)]
    ends = [start + length for start, length in names["times"].tolist()]
    whole = [i for i in range(1, 64, 2) if ends[i] + 0.5 < 3 + 0.1 * i]
    cut = [names["spans"](names["p"][i][names["mask"][i]]) for i in whole]
    true = [(1000 * (end - length), 1000 * end) for end, (_, length) in zip(ends, names["times"].tolist(), strict=True)]
    met = [any(a < true[i][1] and b > true[i][0] for a, b in spans) for i, spans in zip(whole, cut, strict=True)]
    assert sum(met) > 0.8 * len(whole) > 5
    (train, predict) = (
        re.search(rf"(?m)^python {name}.py ((?:.*\\\n)*.*)", page)[1].replace("\\\n", " ").split()
        for name in ("train_features", "predict_features")
    )
    assert train_features.main(train) in (None, 0)
    assert "warning" not in capsys.readouterr().out
    assert predict_features.main(predict) in (None, 0)
    capsys.readouterr()
    exec(last, names)
    assert re.findall(r"recording_0\d", capsys.readouterr().out) == ["recording_00", "recording_01"]
    assert names["table"]["x"][:3].tolist() == [0, 50, 100]  # milliseconds
    assert len(names["table"]) == 64 * 200
    frames = names["table"].query("bag == 'recording_01'")["chirp"]
    assert any(a < true[1][1] and b > true[1][0] for a, b in names["spans"](torch.tensor(frames.to_numpy())))


def test_links_of_the_readme_are_absolute():
    """A package index shows the README without the repository, so relative links are broken there."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link.startswith("https://")
        page = re.fullmatch(r"https://sgl-ops.readthedocs.io/en/latest/(.+)\.html", link)
        assert page is None or (DOCS / f"{page[1]}.md").exists() or (DOCS / f"{page[1]}.ipynb").exists(), link


def test_no_line_of_prose_is_a_quotation():
    """A line that begins with ">", as in "IoU\\n> 0.5", would be shown as a quotation."""
    pages = [path for folder in ("docs", "examples", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.md")]
    assert len(pages) > 20
    for page in [*ROOT.glob("*.md"), *pages]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        assert not re.findall(r"(?m)^ *>.*", prose), page


def test_code_of_is_it_working_runs(capsys):
    """Runs the code blocks of docs/is-it-working.md in order, and compares its table with the list of findings."""
    page = (DOCS / "is-it-working.md").read_text()
    images, labels = torch.randn(30, 1, 8, 8), torch.arange(30).remainder(2).unsqueeze(1)
    logged = {}
    names = {
        "torch": torch,
        "sgl_ops": sgl_ops,
        "model": torch.nn.Conv2d(1, 1, 3),
        "loader": [(images[:20], labels[:20]), (images[20:], labels[20:])],
        "criterion": sgl_ops.SGLLoss(pooling="softmax"),
        "log": logged.update,
    }
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    assert names["diagnosis"].measures.positives.item() == 15
    assert str(names["diagnosis"]) in capsys.readouterr().out
    assert set(logged) == {"bag AUC", "range of p"}
    columns = re.search(r"\| column .*?\n\n", page, re.S)[0].strip().splitlines()[2:]
    titles, attributes, _ = zip(*(row.strip("|").split("|") for row in columns), strict=True)
    assert str(names["diagnosis"]).splitlines()[0].split() == ["class", *" ".join(titles).replace(",", "").split()]
    for attribute in re.findall(r"`(\w+)`", " ".join(attributes)):
        assert len(getattr(names["diagnosis"].measures, attribute)) == 1
    documented = re.findall(r'``"([a-z A-Z-]+)"``', sgl_ops.diagnosis.Finding.__doc__)
    table = re.search(r"\| finding .*?\n\n", page, re.S)[0]
    assert len(documented) == 10
    for name in documented:
        assert name in table
