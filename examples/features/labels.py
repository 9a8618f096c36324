"""Reads labels of bags and instances, and boxes, from CSV files. Divides bags into training and test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")


class Labels(NamedTuple):
    """Labels of bags.

    Attributes:
        names: names of the N bags.
        classes: names of the C classes.
        values: (N, C) float32: 0, 1, or NaN = unknown.
        split: (N,) names of ``SPLITS``; None without such a column.
        groups: (N,) patients; without such a column, the names of the bags.
    """

    names: list[str]
    classes: list[str]
    values: np.ndarray
    split: np.ndarray | None
    groups: np.ndarray


def read_labels(path: Path, classes: Sequence[str] | None, group: str) -> Labels:
    """Labels of a csv file: a column ``bag``, one column per class, and if need be ``split`` and ``group``.

    Args:
        classes: the label columns; None: all columns that contain only 0, 1 and empty cells.
        group: the column with the patients.

    Raises:
        ValueError: a file or column is missing, a bag occurs twice, or a label is not 0, 1 or empty.
    """
    table = _read_csv(path, "labels", ["bag"])
    table["bag"] = table["bag"].astype(str)
    if table["bag"].duplicated().any():
        raise ValueError(f"labels: {path} names bag {table['bag'][table['bag'].duplicated()].iloc[0]} twice")
    if classes is None:
        others = [c for c in table if c not in ("bag", "split", group)]
        classes = [c for c in others if pd.to_numeric(table[c], errors="coerce").dropna().isin([0, 1]).all()]
        classes = [c for c in classes if not (pd.to_numeric(table[c], errors="coerce").isna() & table[c].notna()).any()]
    absent = [c for c in classes if c not in table]
    if absent or not classes:
        raise ValueError(f"labels: expected columns of 0 and 1 in {path}, " + (f"no {absent[0]}" if absent else "none"))
    values = table[list(classes)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float32)
    wrong = ~(np.isnan(values) | np.isin(values, (0, 1)))
    if wrong.any():
        raise ValueError(f"labels: expected 0, 1 or an empty cell in {path}, got {values[wrong][0]:g}")
    split = None
    if "split" in table:
        split = table["split"].astype(str).to_numpy()
        unknown = sorted(set(split) - set(SPLITS))
        if unknown:
            raise ValueError(f"labels: expected {', '.join(SPLITS)} in the column split, got {unknown[0]!r}")
    groups = table[group if group in table else "bag"].astype(str).to_numpy()
    return Labels(table["bag"].tolist(), list(classes), values, split, groups)


def read_instance_labels(path: Path, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Labels (L, C) of the instances by bag, in the order of the rows, NaN = unknown.

    Columns: ``bag`` (or ``image``), and either ``class`` with the name of the instance's class or one column per class
    with 0 and 1.
    """
    table = _read_csv(path, "instance labels", [])
    key = _bag_column(table, path)
    if "class" in table:
        values = np.stack([(table["class"].astype(str) == c).to_numpy(np.float32) for c in classes], 1)
    else:
        absent = [c for c in classes if c not in table]
        if absent:
            raise ValueError(f"instance labels: expected the column class, or {absent[0]}, in {path}")
        values = table[list(classes)].to_numpy(np.float32)
    return {name: values[rows] for name, rows in table.groupby(key, sort=False).indices.items()}


def read_boxes(path: Path, classes: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Boxes (n, 4) x, y, w, h by class and bag. Columns: bag (or image), class, and x, y, w, h or xmin … ymax."""
    table = _read_csv(path, "boxes", ["class"])
    key = _bag_column(table, path)
    if "xmin" in table:
        table = table.rename(columns={"xmin": "x", "ymin": "y"})
        table["w"], table["h"] = table["xmax"] - table["x"], table["ymax"] - table["y"]
    absent = [c for c in "xywh" if c not in table]
    if absent:
        raise ValueError(f"boxes: expected the columns x, y, w, h or xmin, ymin, xmax, ymax in {path}, no {absent[0]}")
    return {
        name: {bag: rows[list("xywh")].to_numpy(float) for bag, rows in table[table["class"] == name].groupby(key)}
        for name in classes
    }


def folds(labels: Labels, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``count`` folds as pairs (training, test) of bag indices. Groups stay together; stratified by the first class."""
    from sklearn.model_selection import StratifiedGroupKFold

    if count > len(set(labels.groups)):
        raise ValueError(f"folds: expected at most {len(set(labels.groups))}, the number of groups, got {count}")
    target = np.nan_to_num(labels.values[:, 0], nan=-1).astype(int)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    yield from splitter.split(target, target, labels.groups)


def _read_csv(path: Path, what: str, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"{what}: expected a csv file, got {str(path)!r}")
    try:
        table = pd.read_csv(path, dtype={"bag": str, "image": str, "class": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: {path} is not a readable csv file ({error})") from None
    absent = [c for c in columns if c not in table]
    if absent:
        raise ValueError(f"{what}: expected the column {absent[0]} in {path}, found {', '.join(table)}")
    return table


def _bag_column(table: pd.DataFrame, path: Path) -> str:
    """The column with the bag: ``bag``, or ``image`` without the suffixes of the files."""
    if "bag" not in table and "image" not in table:
        raise ValueError(f"expected the column bag or image in {path}, found {', '.join(table)}")
    key = "bag" if "bag" in table else "image"
    table[key] = table[key].map(lambda name: Path(name).stem)
    return key
