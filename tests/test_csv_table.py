"""examples/common/csv_table.py: a table of runs keeps the values of the results."""

from __future__ import annotations

import pytest
from common import csv_table

CONTENT = {
    "row": "17/max/bag", "commit": "1234567", "version": "1e5", "nothing": None, "text": "", "quoted": '"a"',
    "settings": {"lr": 3e-3, "epochs": 10, "weighted": True, "normalize": "bag", "none": "null"},
    "result": {"0.5": {"accuracy": {"0.1": 0.25}}, "boxes": 3},
    "interval": [0.1, 0.25], "machine": "one thread, 2 cores\nüber",
}  # fmt: skip


def test_rows_round_trip(tmp_path):
    path = tmp_path / "runs.csv"
    other = {"row": "x", "extra": {"seed": 1}}
    csv_table.write_rows([csv_table.flattened(CONTENT), csv_table.flattened(other)], path)
    assert [csv_table.nested(row) for row in csv_table.read_rows(path)] == [CONTENT, other]
    assert path.read_text(encoding="utf-8").startswith("row,commit,version,")
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_has_no_rows_and_broken_file_is_an_error(tmp_path):
    path = tmp_path / "runs.csv"
    assert csv_table.read_rows(path) == []
    for content in (b"a,b\n1\n", b"a\n1,2\n", b"a\n\xff\xfe\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"runs\.csv: "):
            csv_table.read_rows(path)
    with pytest.raises(OSError, match="nowhere"):
        csv_table.write_rows([], tmp_path / "nowhere" / "runs.csv")
