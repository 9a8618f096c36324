"""Bags of features on disk: the extraction writes them, the training reads them bag by bag.

A folder has one of two forms:

- One file per bag: ``BAG.h5`` with ``features`` (L, D) and ``coords`` (L, 2), as CLAM and TRIDENT write them, or
  ``BAG.pt`` with a tensor (L, D) or a dict that holds one under ``features`` (and ``coords``).
- One file for all: ``features.bin`` (L_1 + L_2 + ..., D) and ``coords.bin``, with ``bags.csv`` (one row per bag: name,
  number of instances, height and width of the map or 0, height and width of the image, time) and ``store.json``.

``coords`` are x, y in pixels of the image, of the centre of an instance (CLAM: of its top left corner).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from common.files import naming, new_file, read_json, write_json, write_text

from features.extraction_settings import changed_settings

if TYPE_CHECKING:
    import h5py

BAGS = ("bag", "instances", "rows", "columns", "height", "width")
#: A further column: when the bag was written, in seconds since 1970. Tables of older versions do not have it.
WRITTEN = "written"
COORDS = np.dtype(np.float32)
#: The files with one bag.
SUFFIXES = (".h5", ".pt")


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
            _refuse_changed(folder, known.get("settings", {}), settings)
        self.settings = settings
        self.features = known.get("features", 0)
        rows = _read_rows(folder / "bags.csv") if known else []
        self.names = {row["bag"] for row in rows}
        self.times = {row["bag"]: float(row[WRITTEN]) for row in rows if row.get(WRITTEN)}
        self.timed = not rows or WRITTEN in rows[0]
        self.instances = sum(int(row["instances"]) for row in rows)
        for name, bytes_each in (("features.bin", self.features * 2), ("coords.bin", 2 * COORDS.itemsize)):
            with naming(folder / name), (folder / name).open("ab") as file:
                file.truncate(self.instances * bytes_each)
        if not rows:
            _write_line(folder / "bags.csv", (*BAGS, WRITTEN), "w")

    def written(self, name: str) -> float:
        """When the features of a bag were written, in seconds since 1970. Infinite in a folder of an older version."""
        return self.times.get(name, math.inf)

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
        now = [f"{time.time():.3f}"] if self.timed else []
        row = (name, len(features), *(bag.grid or (0, 0)), *(bag.size or (0, 0)), *now)
        _write_line(self.folder / "bags.csv", row, "a")
        self.names.add(name)


class FileWriter:
    """Writes one ``BAG.h5`` per bag in the layout of CLAM. Existing files are not changed.

    Raises:
        ValueError: the folder holds files that were made with other ``settings``, or by another program.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        paths = sorted(folder.glob("*.h5"))
        for path in paths[:1]:
            with _open_h5(path) as file:
                known = _settings_of(file)
            if not known:
                raise ValueError(f"{path} has no settings of extract_features.py; choose another --out")
            _refuse_changed(folder, known, settings)
        self.names = {path.stem for path in paths}

    def written(self, name: str) -> float:
        """When the features of a bag were written, in seconds since 1970."""
        return (self.folder / f"{name}.h5").stat().st_mtime

    def add(self, name: str, bag: Bag) -> None:
        h5py = _import_h5py()

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


def _folder_of_files(folder: Path) -> Path:
    """The folder with one file per bag: ``folder``, or the subfolder of CLAM. See FeatureBags."""
    for one in (folder, folder / "h5_files", folder / "pt_files"):
        if any(path.suffix in SUFFIXES for path in one.glob("*")):
            return one
    return folder


class FeatureBags:
    """The bags of a folder in either form. Each access to a bag reads it from disk.

    CLAM writes its features into the subfolders ``h5_files`` and ``pt_files``. If ``folder`` has such subfolders and no
    bags, the bags are those of ``h5_files``, which also have coordinates, or else those of ``pt_files``.

    Attributes:
        names: sorted names of the bags.
        features: the number of features D.
        settings: settings of the extraction; empty if unknown. With one file per bag, those of the first bag.

    Raises:
        ValueError: the folder contains no bags, or two files of a bag, or a broken file.
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
            self.folder = _folder_of_files(self.folder)
            self._paths: dict[str, Path] = {}
            for path in sorted(p for p in self.folder.glob("*") if p.suffix in SUFFIXES):
                if path.stem in self._paths:
                    raise ValueError(
                        f"{self.folder} holds {self._paths[path.stem].name} and {path.name}; expected one file per bag"
                    )
                self._paths[path.stem] = path
            self.names = sorted(self._paths)
        if not self.names:
            found = "none" if self.folder.is_dir() else "no such folder"
            raise ValueError(f"{self.folder}: expected features (bags.csv, or files BAG.h5 or BAG.pt), found {found}")
        self._counts: dict[str, int] = {}
        if not self._rows:
            self.features = self[self.names[0]].features.shape[1]
            first = self._paths[self.names[0]]
            if first.suffix == ".h5":
                with _open_h5(first) as file:
                    self.settings = _settings_of(file)

    def __len__(self) -> int:
        return len(self.names)

    def instances(self, name: str) -> int:
        """The number of instances of a bag.

        Raises:
            ValueError: the file of the bag is broken, or was made with other settings than that of the first bag.
        """
        if self._rows:
            return self._rows[name]["instances"]
        if name not in self._counts:
            path = self._paths[name]
            if path.suffix == ".h5":
                with _open_h5(path) as file:
                    shape = _without_batch(file["features"].shape)
                    settings = _settings_of(file)
                changed = sorted(changed_settings(settings, self.settings))
                if changed:
                    raise ValueError(
                        f"{path}: made with other settings than {self._paths[self.names[0]]} ({', '.join(changed)})"
                    )
            else:
                shape = self[name].features.shape
            self._check_features(path, shape)
            self._counts[name] = shape[0]
        return self._counts[name]

    def _check_features(self, path: Path, shape: tuple[int, ...]) -> None:
        wanted = getattr(self, "features", None)
        if len(shape) != 2 or wanted not in (None, shape[1]):
            shown = "D" if len(shape) != 2 else wanted
            raise ValueError(f"{path}: expected features (L, {shown}), got {shape}")

    def coords(self, name: str) -> np.ndarray | None:
        """x, y in pixels of the instances of a bag, (L, 2)."""
        return self._read_store(name, with_features=False).coords if self._rows else self[name].coords

    def shape(self, name: str) -> Bag:
        """``grid`` and ``size`` of a bag, without reading its features."""
        if self._rows:
            return self._read_store(name, with_features=False)
        path = self._paths[name]
        if path.suffix == ".pt":
            return Bag(np.zeros((0, self.features)), None, None, None)
        with _open_h5(path) as file:
            return Bag(np.zeros((0, self.features)), None, *_view_of(file))

    def places(self, name: str) -> Bag:
        """``coords``, ``grid`` and ``size`` of a bag, without its features."""
        return self.shape(name)._replace(coords=self.coords(name))

    def size(self, name: str) -> tuple[int, int] | None:
        """(height, width) of the image of a bag in pixels; None if unknown."""
        return self.shape(name).size

    def __getitem__(self, name: str) -> Bag:
        if self._rows:
            return self._read_store(name)
        if name not in self._paths:
            raise ValueError(f"{self.folder}: there is no bag {name!r}")
        path = self._paths[name]
        bag = _read_h5(path) if path.suffix == ".h5" else _read_pt(path)
        self._check_features(path, bag.features.shape)
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


def digest(content: object) -> str:
    """A short digest of content that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _refuse_changed(folder: Path, known: dict, settings: dict) -> None:
    """Raises ValueError if a value of ``settings`` differs from that in ``known``."""
    different = changed_settings(known, settings)
    changed = [name for name in settings if name in different]
    if changed:
        raise ValueError(
            f"{folder}: made with other settings ({', '.join(changed)}); choose another --out, or delete it"
        )


def _import_h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError:
        raise ValueError("features: files .h5 need h5py, which is not installed: pip install h5py") from None
    return h5py


@contextlib.contextmanager
def _open_h5(path: Path) -> Iterator[h5py.File]:
    """The file of a bag, open for reading.

    Raises:
        ValueError: it cannot be read, or has no features.
    """
    h5py = _import_h5py()
    try:
        with h5py.File(path) as file:
            if "features" not in file:
                raise ValueError(f"{path}: expected a data set 'features', found {', '.join(file) or 'none'}")
            yield file
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({error})") from None


def _settings_of(file: h5py.File) -> dict:
    """The settings of the extraction; empty if the file has none."""
    return json.loads(file.attrs["settings"]) if "settings" in file.attrs else {}


def _view_of(file: h5py.File) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """``grid`` and ``size`` of a bag."""
    grid, size = (tuple(int(v) for v in file.attrs[k]) if k in file.attrs else None for k in ("grid", "size"))
    return grid, size


def _without_batch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """TRIDENT writes (1, L, D)."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _read_h5(path: Path) -> Bag:
    with _open_h5(path) as file:
        features = file["features"][()]
        coords = file["coords"][()] if "coords" in file else None
        view = _view_of(file)
    if coords is not None:
        coords = coords.reshape(_without_batch(coords.shape))
    return Bag(features.reshape(_without_batch(features.shape)), coords, *view)


def _read_pt(path: Path) -> Bag:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading another kind of file raises many types
        hint = "save NumPy arrays as torch.from_numpy(array)"  # torch.load refuses other objects than tensors
        raise ValueError(f"{path}: not a readable file of tensors ({type(error).__name__}); {hint}") from None
    content = content if isinstance(content, dict) else {"features": content}
    if not isinstance(content.get("features"), torch.Tensor):
        raise ValueError(f"{path}: expected a tensor, or a dict with a tensor 'features'")

    def array(values: Any) -> np.ndarray:
        values = torch.as_tensor(values).detach().float()  # NumPy has no bfloat16
        return values.reshape(_without_batch(values.shape)).numpy()

    features, coords = array(content["features"]), content.get("coords")
    try:
        return Bag(features, None if coords is None else array(coords), None, None)
    except (TypeError, ValueError, RuntimeError):
        wanted = f"expected coords ({len(features)}, 2), got {type(coords).__name__}"
        raise ValueError(f"{path}: {wanted}") from None


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
