"""CSV files. In a table of runs, a row holds a run. Nested results become cells, and cells become nested results."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.files import new_file


def flattened(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The cells of ``content`` by column. A value of a nested dictionary has the column ``KEY/KEY/KEY``.

    A string is written unchanged, any other value as JSON. A string that JSON would read as another value is quoted.
    """
    row = {}
    for key, value in content.items():
        if isinstance(value, dict):
            row |= flattened(value, f"{prefix}{key}/")
        else:
            plain = isinstance(value, str) and value != "" and _value_of(value) == value
            row[f"{prefix}{key}"] = value if plain else json.dumps(value)
    return row


def nested(row: dict[str, str]) -> dict[str, Any]:
    """The inverse of ``flattened``. An empty cell is a missing key."""
    content: dict[str, Any] = {}
    for column, text in row.items():
        if text:
            *outer, last = column.split("/")
            inner = content
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = _value_of(text)
    return content


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of ``path``; none if there is no such file.

    Raises:
        ValueError: the file is not a CSV file, or a row has more or fewer cells than the header.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path}: a row is longer or shorter than the header")
    return rows


def write_csv(header: Iterable[str], rows: Iterable[Iterable[Any]], path: Path) -> None:
    """Writes the cells of ``rows`` under ``header`` by ``new_file``."""
    with new_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path, columns: Iterable[str] | None = None) -> None:
    """Writes ``rows`` by ``new_file``. A column that a row lacks is empty.

    Args:
        columns: all columns in their order. Default: the order in which they first occur in the rows.
    """
    rows = list(rows)
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    with new_file(path) as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
