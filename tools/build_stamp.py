"""Decides by the content of the sources whether an object file is up to date.

Times are not reliable. If a source is saved while the compiler runs, it is older than the object file, which was made
from the previous text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path


def fingerprint(sources: Iterable[str], command: str = "") -> str:
    """SHA-256 of the names and contents of ``sources`` and of the command that compiles them."""
    digest = hashlib.sha256(command.encode())
    for source in sorted(set(sources)):
        content = Path(source).read_bytes()
        digest.update(f"\0{source}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def build_if_changed(target: str, sources: list[str], build: Callable[[], None], command: str = "") -> bool:
    """Runs ``build``, which makes ``target``, unless it was made from these contents by this command.

    Returns:
        whether ``build`` ran.
    """
    stamp = Path(f"{target}.sha256")
    wanted = fingerprint(sources, command)  # before the build: a source may change during it
    if Path(target).exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    stamp.unlink(missing_ok=True)
    build()
    stamp.write_text(wanted, encoding="utf-8")
    return True
