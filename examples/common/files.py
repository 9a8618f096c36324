"""Files: checkpoints and JSON, written atomically, and read without executing anything."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import torch


def load_state(path: Path, **options: Any) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; nothing in it is executed.

    Raises:
        ValueError: it is not there, cut off, or something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # reading something else ends in many ways
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(state).__name__}")
    return state


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Atomic: after a crash or power loss the file is either the old or the new version.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    # in memory first: on a file torch says of a full disk, or of Ctrl-C, that a position is unexpected
    content = io.BytesIO()
    torch.save(state, content)
    try:
        with beside.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_json(content: dict[str, Any], path: Path) -> None:
    """Indented, but for lists of numbers, which are a line each."""
    beside = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[-+.e\d,\s]*\]", lambda found: " ".join(found[0].split()), text)
    beside.write_text(text + "\n")
    os.replace(beside, path)
