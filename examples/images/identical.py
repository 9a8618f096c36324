"""Finds images whose files have the same content."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
#: Bytes at the beginning and at the end of a file that are compared before the whole content.
ENDS = 4096


def identical_files(paths: Sequence[Path]) -> list[list[int]]:
    """Groups of two or more ``paths`` whose files have the same content: their numbers, in ascending order.

    Files of different sizes are not read. Files that cannot be read are in no group.
    """
    groups = [list(range(len(paths)))]
    with ThreadPoolExecutor() as pool:
        for key in (_size, _ends, _digest):
            groups = [part for group in groups for part in _equal(group, pool.map(key, [paths[n] for n in group]))]
    return sorted(groups)


def _equal(items: Sequence[Item], keys: Iterable[Hashable]) -> list[list[Item]]:
    """The groups of two or more ``items`` with equal ``keys``. None is equal to nothing."""
    found = defaultdict(list)
    for item, key in zip(items, keys, strict=True):
        if key is not None:
            found[key].append(item)
    return [group for group in found.values() if len(group) > 1]


def _or_none(key: Callable[[Path], Hashable]) -> Callable[[Path], Hashable]:
    def found(path: Path) -> Hashable:
        try:
            return key(path)
        except OSError:
            return None

    return found


@_or_none
def _size(path: Path) -> Hashable:
    return path.stat().st_size or None  # empty files are broken


@_or_none
def _ends(path: Path) -> Hashable:
    with path.open("rb") as file:
        first = file.read(ENDS)
        file.seek(max(0, path.stat().st_size - ENDS))
        return first, file.read()


@_or_none
def _digest(path: Path) -> Hashable:
    return hashlib.sha256(path.read_bytes()).digest()
