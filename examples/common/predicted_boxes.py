"""The table of predicted boxes. ``boxes.csv`` of true boxes has the same columns without ``p``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.csv_table import write_csv

COLUMNS = ("image", "label", "x", "y", "w", "h", "p")


def write_boxes(rows: Iterable[Sequence[Any]], path: Path) -> None:
    """Writes one row per predicted box.

    Args:
        rows: image, class, x, y, w, h in pixels of the image (x, y: the upper left corner), and p: the largest
            probability of the map in the box.

    Raises:
        ValueError: ``path`` is a table of true boxes.
    """
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.readline().rstrip("\r\n") != ",".join(COLUMNS):
                raise ValueError(
                    f"{path}: not a table of predicted boxes, which it would overwrite; choose another --out"
                )
    content = ([image, label, *(f"{v:g}" for v in box), f"{p:.4g}"] for image, label, *box, p in rows)
    write_csv(COLUMNS, content, path)
