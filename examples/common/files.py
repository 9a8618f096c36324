"""Files: checkpoints, text and JSON. Written atomically, in UTF-8; read without executing anything."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


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


@contextlib.contextmanager
def new_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that becomes ``path`` at the end of the block. Text is UTF-8, and line ends are written as they are.

    After a crash, a power loss or an error in the block, ``path`` is the old file, or missing as before.

    Raises:
        OSError: the file cannot be written; the message names ``path``, and no partial file is left.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with naming(path):
            with temporary.open(mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint by ``new_file``, and creates its folder."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    # Written to memory first: with a file, torch reports a full disk or Ctrl-C as an unexpected position.
    content = io.BytesIO()
    torch.save(state, content)
    with new_file(path, "wb") as file:
        file.write(content.getbuffer())


def write_text(text: str, path: Path) -> None:
    """Writes a text file by ``new_file``."""
    with new_file(path) as file:
        file.write(text)


def without_nan(content: Any) -> Any:
    """``content`` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def rounded(content: Any, digits: int) -> Any:
    """``content`` with all numbers rounded to ``digits`` decimals."""
    if isinstance(content, dict):
        return {key: rounded(value, digits) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value, digits) for value in content]
    return round(content, digits) if isinstance(content, float) else content


def write_json(content: Any, path: Path) -> None:
    """Writes indented JSON by ``new_file``, with each list of numbers on one line."""
    text = json.dumps(content, indent=1)
    write_text(re.sub(r"\[[-+.e\d,\s]*\]", lambda found: " ".join(found[0].split()), text) + "\n", path)


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8. Raises ValueError, with the name of the file, if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
