"""Fine-tuning of the last blocks of the network behind a trained head of frozen_cxr.py, on cached maps."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from common.learning_rate import set_cosine_rate
from features.finetuning import load_blocks
from features.transform import Transform
from torch import Tensor, nn

from images.frozen import Films, Head, load_maps, make_criterion
from images.frozen_methods import Method

#: The blocks that can be trained: the last ones. ``extract`` writes the input of the first one.
BLOCKS = ("blocks.5.3", "blocks.6.0")


class Tuning:
    """What a fine-tuning needs: the maps before the trained blocks, the blocks, and the features that stay frozen.

    Args:
        films: the films. Their first features are the output of the last block.
        folder: the folder of the features, with ``before.npy``.
        transform: the principal components that the head was trained on.
        backbone, weights: the network of the extraction.
        count: number of the last blocks to train; 0: only the head is trained.

    Attributes:
        blocks: the blocks with their pretrained weights.
        inputs: (n, B, h, w) float32, the input of the blocks.
        others: (n, D - width, h, w) float32, the features that do not come from the blocks.

    Raises:
        ValueError: ``before.npy`` is missing, or the weights are not those of the extraction.
    """

    def __init__(self, films: Films, folder: Path, transform: Transform, backbone: str, weights: str, count: int):
        before = load_maps(folder, "before.npy", films.mirrored)
        self.transform = transform
        self.inside = films.inside.ravel()
        blocks = list(load_blocks(backbone, weights, BLOCKS))
        frozen = nn.Sequential(*blocks[: len(blocks) - count]).eval()
        self.blocks = nn.Sequential(*blocks[len(blocks) - count :]).eval()
        with torch.no_grad():
            self.inputs = torch.cat([frozen(as_float(before[i : i + 64])) for i in range(0, len(before), 64)])
            output = self.blocks(self.inputs[:1])
        stored = as_float(films.features[:1, : output.shape[1]])
        # the stored features have half precision
        if output.shape != stored.shape or (output - stored).abs().mean() > 0.02 * stored.abs().mean():
            raise ValueError(f"weights: expected those of the extraction of {folder}")
        self.others = as_float(films.features[:, output.shape[1] :])

    def cells(self, blocks: nn.Module, numbers: Tensor) -> Tensor:
        """The used cells (n, L, components) of the films ``numbers`` with the features of ``blocks``."""
        maps = torch.cat([blocks(self.inputs[numbers]), self.others[numbers]], 1)
        return self.transform(maps.flatten(2)[:, :, self.inside].transpose(1, 2))


def as_float(features: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(features, np.float32))


def tune(
    tuning: Tuning,
    head: Head,
    pooling: nn.Module,
    films: Films,
    numbers: np.ndarray,
    method: Method,
    started: int | None,
    seed: int,
    epochs: int,
    lr: float,
    batch_size: int = 32,
) -> nn.Module:
    """Trains head, pooling and a copy of the blocks on the images ``numbers``. Returns the copy.

    The statistics of batch norm are constant. The learning rate of AdamW falls from ``lr`` to 0. lam is that of the
    method from the first step on, or 0 if it did not rise in the training of the head.

    Args:
        started: the epoch in which lam began to rise, as images.frozen.train_head returns it.
    """
    blocks = copy.deepcopy(tuning.blocks).requires_grad_(True).eval()
    criterion = make_criterion(method, pooling)
    if method.loss == "sgl" and started is None and not method.at_once:
        criterion.lam = 0.0
    parameters = [*blocks.parameters(), *head.parameters(), *pooling.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=method.weight_decay)
    steps = epochs * math.ceil(len(numbers) / batch_size)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    chosen = torch.as_tensor(numbers)
    step = 0
    head.train()
    for _ in range(epochs):
        for batch in chosen[torch.randperm(len(chosen), generator=generator)].split(batch_size):
            set_cosine_rate(optimizer, lr, step, steps)
            logits, hidden = head(tuning.cells(blocks, batch))
            loss = criterion(logits.transpose(1, 2), films.labels[batch], features=hidden)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    head.eval()
    return blocks.requires_grad_(False)


@torch.no_grad()
def with_tuned(cells: Tensor, tuning: Tuning, blocks: nn.Module, numbers: np.ndarray) -> Tensor:
    """``cells``, with those of the images ``numbers`` computed by ``blocks``."""
    cells = cells.clone()
    for batch in torch.as_tensor(numbers).split(64):
        cells[batch] = tuning.cells(blocks, batch)
    return cells
