"""Bags of features on disk: the extraction writes them, the training reads them bag by bag.

A folder has one of two forms:

- One file per bag: ``BAG.h5`` with ``features`` (L, D) and ``coords`` (L, 2), as CLAM and TRIDENT write them, or
  ``BAG.pt`` with a tensor (L, D) or a dict that holds one under ``features`` (and ``coords``).
- One file for all: ``features.bin`` (L_1 + L_2 + ..., D) and ``coords.bin``, with ``bags.csv`` (one row per bag: name,
  number of instances, height and width of the map or 0, height and width of the image) and ``store.json``.

``coords`` are x, y in pixels of the image, of the centre of an instance (CLAM: of its top left corner).
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common.files import naming, new_file, read_json, write_json, write_text

BAGS = ("bag", "instances", "rows", "columns", "height", "width")
COORDS = np.dtype(np.float32)


class Bag(NamedTuple):
    """A bag: its features (L, D), and the positions of its instances.

    Attributes:
        features: (L, D), float16 or float32.
        coords: (L, 2), x and y in pixels; None if the file has none.
        grid: (rows, columns) if the instances are the cells of a map, row by row; otherwise None.
        size: (height, width) of the image in pixels; None if unknown.
    """

    features: np.ndarray
    coords: np.ndarray | None
    grid: tuple[int, int] | None
    size: tuple[int, int] | None


class StoreWriter:
    """Appends bags to a folder with one file for all. An existing folder is continued after its last complete bag.

    Raises:
        ValueError: the folder was made with other ``settings``.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "store.json"
        known = {}
        if path.exists():
            known = read_json(path)
            changed = [k for k in settings if known.get("settings", {}).get(k) != settings[k]]
            if changed:
                raise ValueError(
                    f"{folder}: made with other settings ({', '.join(changed)}); choose another --out, or delete it"
                )
        self.settings = settings
        self.features = known.get("features", 0)
        rows = _read_rows(folder / "bags.csv") if known else []
        self.names = {row["bag"] for row in rows}
        self.instances = sum(int(row["instances"]) for row in rows)
        for name, bytes_each in (("features.bin", self.features * 2), ("coords.bin", 2 * COORDS.itemsize)):
            with naming(folder / name), (folder / name).open("ab") as file:
                file.truncate(self.instances * bytes_each)
        if not rows:
            _write_line(folder / "bags.csv", BAGS, "w")

    def add(self, name: str, bag: Bag) -> None:
        """Writes a bag as float16. A bag counts as written when its line in ``bags.csv`` is written."""
        features = np.ascontiguousarray(bag.features, np.float16)
        if not self.features:
            self.features = features.shape[1]
            content = {"features": self.features, "dtype": "float16", "settings": self.settings}
            write_json(content, self.folder / "store.json")
        if features.shape[1] != self.features:
            raise ValueError(f"{name}: expected {self.features} features, got {features.shape[1]}")
        coords = np.zeros((len(features), 2), COORDS) if bag.coords is None else bag.coords.astype(COORDS)
        for file_name, array in (("features.bin", features), ("coords.bin", coords)):
            with naming(self.folder / file_name), (self.folder / file_name).open("ab") as file:
                file.write(array.data)  # tofile() would hide that the last block does not fit on the disk
                file.flush()
                os.fsync(file.fileno())
        row = (name, len(features), *(bag.grid or (0, 0)), *(bag.size or (0, 0)))
        _write_line(self.folder / "bags.csv", row, "a")
        self.names.add(name)


class FileWriter:
    """Writes one ``BAG.h5`` per bag in the layout of CLAM. Existing files are not changed."""

    def __init__(self, folder: Path, settings: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self.names = {path.stem for path in folder.glob("*.h5")}

    def add(self, name: str, bag: Bag) -> None:
        import h5py

        # in memory first: the errors of HDF5 on a full disk do not name the file
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            file["features"] = bag.features.astype(np.float16)
            if bag.coords is not None:
                file["coords"] = bag.coords
            for key, value in (("grid", bag.grid), ("size", bag.size)):
                if value is not None:
                    file.attrs[key] = value
            file.attrs["settings"] = json.dumps(self.settings)
        with new_file(self.folder / f"{name}.h5", "wb") as file:
            file.write(content.getbuffer())
        self.names.add(name)


class FeatureBags:
    """The bags of a folder in either form. Each access to a bag reads it from disk.

    Attributes:
        names: sorted names of the bags.
        features: the number of features D.
        settings: settings of the extraction; empty if unknown.

    Raises:
        ValueError: the folder contains no bags, or a broken file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.settings: dict = {}
        self._rows: dict[str, dict] = {}
        if (self.folder / "store.json").exists():
            content = read_json(self.folder / "store.json")
            self.features, self.settings = content["features"], content["settings"]
            start = 0
            for row in _read_rows(self.folder / "bags.csv"):
                numbers = {key: int(row[key]) for key in BAGS[1:]}
                self._rows[row["bag"]] = numbers | {"start": start}
                start += numbers["instances"]
            found = (self.folder / "features.bin").stat().st_size
            if found < start * self.features * 2:
                raise ValueError(f"{self.folder}: features.bin has {found} bytes, expected {start * self.features * 2}")
            self.names = sorted(self._rows)
        else:
            paths = sorted(p for p in self.folder.glob("*") if p.suffix in (".h5", ".pt"))
            self._paths = {path.stem: path for path in paths}
            self.names = sorted(self._paths)
        if not self.names:
            found = "none" if self.folder.is_dir() else "no such folder"
            raise ValueError(f"{self.folder}: expected bags.csv or files BAG.h5 or BAG.pt, found {found}")
        if not self._rows:
            self.features = self[self.names[0]].features.shape[1]

    def __len__(self) -> int:
        return len(self.names)

    def instances(self, name: str) -> int:
        """The number of instances of a bag."""
        if self._rows:
            return self._rows[name]["instances"]
        if self._paths[name].suffix == ".h5":
            import h5py

            with h5py.File(self._paths[name]) as file:
                return file["features"].shape[-2]
        return len(self[name].features)

    def coords(self, name: str) -> np.ndarray | None:
        """x, y in pixels of the instances of a bag, (L, 2)."""
        return self._read_store(name, with_features=False).coords if self._rows else self[name].coords

    def shape(self, name: str) -> Bag:
        """``grid`` and ``size`` of a bag, without reading its features."""
        return self._read_store(name, with_features=False) if self._rows else self[name]

    def __getitem__(self, name: str) -> Bag:
        if self._rows:
            return self._read_store(name)
        if name not in self._paths:
            raise ValueError(f"{self.folder}: there is no bag {name!r}")
        path = self._paths[name]
        bag = _read_h5(path) if path.suffix == ".h5" else _read_pt(path)
        if bag.features.ndim != 2 or bag.features.shape[1] != getattr(self, "features", bag.features.shape[1]):
            raise ValueError(
                f"{path}: expected features (L, {getattr(self, 'features', 'D')}), got {bag.features.shape}"
            )
        if bag.coords is not None and bag.coords.shape != (len(bag.features), 2):
            raise ValueError(f"{path}: expected coords ({len(bag.features)}, 2), got {bag.coords.shape}")
        return bag

    def _read_store(self, name: str, with_features: bool = True) -> Bag:
        if name not in self._rows:
            raise ValueError(f"{self.folder}: there is no bag {name!r}")
        row = self._rows[name]
        n, d = row["instances"], self.features
        # Read, not memory-mapped: the pages of a mapped file would count as memory of this process.
        features = np.zeros((0, d), np.float16)
        if with_features:
            features = np.fromfile(self.folder / "features.bin", np.float16, n * d, offset=row["start"] * d * 2)
        coords = np.fromfile(self.folder / "coords.bin", COORDS, n * 2, offset=row["start"] * 2 * COORDS.itemsize)
        grid, size = (row["rows"], row["columns"]), (row["height"], row["width"])
        return Bag(features.reshape(-1, d), coords.reshape(n, 2), grid if grid[0] else None, size if size[0] else None)


def _read_h5(path: Path) -> Bag:
    import h5py

    try:
        with h5py.File(path) as file:
            if "features" not in file:
                raise ValueError(f"{path}: expected a data set 'features', found {', '.join(file) or 'none'}")
            features = file["features"][()]
            coords = file["coords"][()] if "coords" in file else None
            grid, size = (tuple(int(v) for v in file.attrs[k]) if k in file.attrs else None for k in ("grid", "size"))
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({error})") from None
    # TRIDENT: (1, L, D)
    return Bag(features.reshape(-1, features.shape[-1]), None if coords is None else coords.reshape(-1, 2), grid, size)


def _read_pt(path: Path) -> Bag:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading another kind of file raises many types
        raise ValueError(f"{path}: not a readable file of tensors ({type(error).__name__})") from None
    content = content if isinstance(content, dict) else {"features": content}
    if not isinstance(content.get("features"), torch.Tensor):
        raise ValueError(f"{path}: expected a tensor, or a dict with a tensor 'features'")
    features, coords = content["features"], content.get("coords")
    return Bag(
        features.reshape(-1, features.shape[-1]).numpy(),
        None if coords is None else coords.reshape(-1, 2).numpy(),
        None,
        None,
    )


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of ``bags.csv``. An incomplete last line is removed from the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(text, path)
    return list(csv.DictReader(text.splitlines()))


def _write_line(path: Path, row: tuple, mode: str) -> None:
    with naming(path), path.open(mode, newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
        file.flush()
        os.fsync(file.fileno())
