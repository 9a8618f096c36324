"""Draws docs/_static/diagnosis.png: a map of a positive bag for each finding of sgl_ops.diagnose about maps.

Run from the repository: python tools/draw_diagnosis.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

import sgl_ops

SIDE = 12


def maps() -> dict[str, torch.Tensor]:
    """Logits (40, SIDE, SIDE) by title. Negative and positive bags alternate. The positive bags have a spot."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, SIDE, SIDE, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    distance = ((rows - 4) ** 2 + (columns - 7) ** 2).float().sqrt()
    positive = torch.arange(40).remainder(2).reshape(40, 1, 1)
    return {
        "healthy": noise * 0.6 - 4 + positive * 7 * (distance < 2.6),
        "flat maps": noise * 0.02 - 1 + positive * 0.3,
        "flooded maps": noise * 0.4 - 4 + positive * 7 * (distance < 6.5),
        "one instance takes all": noise * 0.6 - 5 + positive * 9 * (distance < 0.5),
        "nothing learnt": noise * 1.5 - 1,
    }


def main() -> None:
    labels = torch.arange(40).remainder(2)
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), layout="constrained")
    for axis, (title, logits) in zip(axes, maps().items(), strict=True):
        names = [finding.name for finding in sgl_ops.diagnose(logits.unsqueeze(1), labels).findings]
        assert names == ([] if title == "healthy" else [title]), (title, names)
        picture = axis.imshow(torch.sigmoid(logits[1]), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(picture, ax=axes, label="p", shrink=0.8)
    figure.savefig(Path(__file__).resolve().parents[1] / "docs" / "_static" / "diagnosis.png", dpi=100)


if __name__ == "__main__":
    main()
