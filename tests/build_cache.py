"""A cache of what tests compile, shared by the processes of pytest-xdist and by later runs.

An entry is a folder ``build/tests/NAME-HASH``. The hash covers the contents of every source, the flags, the compiler,
torch and Python, so a changed file never finds an old result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from filelock import FileLock  # a dependency of torch

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SGL_OPS_TEST_CACHE", ROOT / "build" / "tests"))
KEPT_DAYS = 7


def compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def sources_below(*folders: Path) -> list[Path]:
    """Every source file in the folders."""
    endings = {".h", ".cpp", ".cu", ".cuh", ".py"}
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in endings)


def cached_build(name: str, sources: Iterable[Path], settings: Iterable[object], make: Callable[[Path], None]) -> Path:
    """The folder that ``make(folder)`` fills: an earlier one, if sources and settings are the same.

    Args:
        name: start of the folder's name.
        sources: files whose contents the result depends on.
        settings: other inputs of the build, such as flags and versions. Their ``repr`` is hashed.
        make: fills an empty folder. If it raises, nothing is kept.
    """
    digest = hashlib.sha256(repr([sys.version, torch.__version__, *map(repr, settings)]).encode())
    for source in sources:
        digest.update(str(source.name).encode() + b"\0" + source.read_bytes() + b"\0")
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            remove_old_entries()
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    os.utime(folder)
    return folder


def remove_old_entries() -> None:
    for entry in CACHE.iterdir():
        if time.time() - entry.stat().st_mtime > KEPT_DAYS * 86400:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
