"""Files: checkpoints and JSON, written atomically, and read without executing anything."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file name to an OSError of a block that writes ``path``. The error of a full disk has no file name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from None
        raise OSError(error.errno, error.strerror, str(path)) from None


def load_state(path: Path, **options: Any) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Nothing in it is executed.

    Raises:
        ValueError: it does not exist, is truncated, or is not a checkpoint.
    """
    import torch

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch.load raises many types
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(state).__name__}")
    return state


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint. Atomic: after a crash or power loss the file is either the old or the new version.

    Raises:
        OSError: the file cannot be written; no partial file is left.
    """
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # Written to memory first: with a file, torch reports a full disk or Ctrl-C as an unexpected position.
    content = io.BytesIO()
    torch.save(state, content)
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes indented JSON with each list of numbers on one line."""
    temporary = path.with_suffix(".tmp")
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[-+.e\d,\s]*\]", lambda found: " ".join(found[0].split()), text)
    with naming(path):
        temporary.write_text(text + "\n")
        os.replace(temporary, path)
