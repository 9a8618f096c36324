"""Reads files of network weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Keys under which a checkpoint of another program may hold the state dict.
WRAPPERS = ("model", "state_dict")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of safetensors or PyTorch, also one under a key of WRAPPERS.

    Raises:
        ValueError: there is no such file, it cannot be read, or it holds something else.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    is_safe = path.suffix == ".safetensors"
    if is_safe:
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError:
            raise ValueError("weights: safetensors is not installed: pip install safetensors") from None
    try:
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading another kind of file raises many types
        raise ValueError(f"weights: {path} is not a readable file of weights ({type(error).__name__})") from None
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"weights: {path}: expected a state dict, got a {type(state).__name__}")
    other = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise ValueError(f"weights: {path}: expected tensors, got {type(state[other]).__name__} at {other}")
    return state
