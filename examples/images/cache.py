"""A cache of decoded images: one memory-mapped file."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import disk_usage

import numpy as np
from common.files import naming
from common.progress import Progress

from images.pixels import load_image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def open_cache(
    folder: Path,
    paths: Sequence[Path],
    size: int,
    workers: int | None = None,
    channels: int = 1,
    fit: str = "square",
) -> np.ndarray:
    """The images of ``paths`` as load_image returns them, (n, size, size[, 3]) uint8, memory-mapped.

    The first call decodes them into a file in ``folder``. The file grows image by image, so an interrupted call can
    continue. It gets its final name when it is complete. The name depends on the size, and on the names, lengths and
    modification times of the image files. Another selection, or a replaced image, therefore gets another file; the old
    file stays. If several processes call this at the same time, one builds the file and the others wait.

    Raises:
        ValueError: images cannot be read (the message names them), or the disk has too little space.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (size, size) if channels == 1 else (size, size, channels)
    kind = "" if (channels, fit) == (1, "square") else f":{channels}:{fit}"
    digest = hashlib.sha256(f"{size}{kind}".encode())
    for path in paths:
        status = path.stat()
        digest.update(f"/{path.name}:{status.st_size}:{status.st_mtime_ns}".encode())
    cache_file = folder / f"cxr_{size}_{digest.hexdigest()[:16]}.u8"
    if not cache_file.exists():
        with _locked(cache_file.with_suffix(".lock")):
            if not cache_file.exists():  # another process may have built it
                _build(cache_file, paths, math.prod(shape), workers or os.cpu_count() or 1, (size, channels, fit))
    expected, found = len(paths) * math.prod(shape), cache_file.stat().st_size
    if found != expected:
        raise ValueError(
            f"{cache_file}: expected {expected} bytes, got {found}; remove the file, and run the command again"
        )
    return np.memmap(cache_file, dtype=np.uint8, mode="r", shape=(len(paths), *shape))


def _build(cache_file: Path, paths: Sequence[Path], length: int, workers: int, options: tuple[int, int, str]) -> None:
    """Decodes the images into ``cache_file``. ``length``: bytes per image; ``options``: size, channels and fit."""
    part = cache_file.with_suffix(".part")
    done = part.stat().st_size // length if part.exists() else 0
    needed, free = (len(paths) - done) * length, disk_usage(part.parent).free
    if needed > free:
        raise ValueError(
            f"{part.parent}: the cache needs {needed / 1e9:.1f} GB more, but only {free / 1e9:.1f} GB are free"
        )
    # threads suffice: decoding and resizing release the global interpreter lock
    with (
        naming(part),
        ThreadPoolExecutor(workers) as pool,
        part.open("ab") as file,
        Progress(total=len(paths), initial=done, desc="cache", unit="image") as progress,
    ):
        file.truncate(done * length)  # the last image may be incomplete
        for start in range(done, len(paths), 64 * workers):
            block = list(pool.map(lambda path: _image_or_error(path, *options), paths[start : start + 64 * workers]))
            errors = [image for image in block if isinstance(image, ValueError)]
            if errors:
                advice = "check_cxr.py --decode checks all images"
                advice += "\nafter an image is replaced, the cache is built from the first image on"
                raise ValueError("\n".join([*map(str, errors), advice]))
            file.write(b"".join(image.tobytes() for image in block))
            file.flush()
            progress.update(len(block))
        os.fsync(file.fileno())
    os.replace(part, cache_file)


def _image_or_error(path: Path, size: int, channels: int, fit: str) -> np.ndarray | ValueError:
    try:
        return load_image(path, size, channels, fit)
    except ValueError as error:
        return error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock between processes. A killed process releases it."""
    with path.open("wb") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
