"""Whether an object file is up to date, judged by the content of its sources.

A time stamp does not tell: a source that is saved while the compiler runs is older than the object made from the text
before.
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
    """Run ``build``, which makes ``target``, unless it has run for these contents and this command; whether it ran."""
    stamp = Path(f"{target}.sha256")
    wanted = fingerprint(sources, command)  # before the build: what is saved meanwhile is another content
    if Path(target).exists() and stamp.exists() and stamp.read_text() == wanted:
        return False
    stamp.unlink(missing_ok=True)
    build()
    stamp.write_text(wanted)
    return True
