"""examples/bccd_demo.py on generated images."""

from __future__ import annotations

import json

import bccd_demo
import feature_packages  # noqa: F401
import numpy as np
import pytest
from csv_files import write
from features import recommended


@pytest.mark.examples
def test_demonstration_on_blood_smears_runs(timm, tmp_path, monkeypatch, capsys):
    """bccd_demo.py from photos to the figure, with a network without weights and one epoch."""
    from PIL import Image

    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for k in range(6):
        array = np.random.default_rng(k).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(array).save(data / "images" / f"p{k}.png")
    boxes = [[f"p{k}.png", ("train", "test")[k // 4], ("RBC", "Platelets")[k % 2], 5, 6, 25, 36] for k in range(6)]
    write(data / "boxes.csv", ["image", "split", "class", "xmin", "ymin", "xmax", "ymax"], boxes)
    monkeypatch.setitem(recommended.SEARCH, "epochs", 1)
    monkeypatch.setitem(recommended.SEARCH, "trial_epochs", 1)
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--weights", "none"]
    assert bccd_demo.main(options) == 0
    assert (tmp_path / "out" / "bccd.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "out" / "sgl" / "metrics.json").read_text())["Platelets"]
    assert result["images"] == 1  # p5
