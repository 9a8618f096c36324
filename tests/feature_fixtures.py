"""Fixtures of the tests of pretrained features: generated bags of features, generated images, and timm."""

from __future__ import annotations

import numpy as np
import pytest
from csv_files import write


@pytest.fixture(scope="session")
def bag_folder(tmp_path_factory):
    """40 bags of 9 to 16 instances of 6 features; positive bags hold instances with feature 0 raised by 4."""
    from features import store

    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    writer = store.StoreWriter(folder / "features", {})
    rows, instances = [], []
    for i in range(40):
        n = int(generator.integers(9, 17))
        x = generator.normal(size=(n, 6)).astype(np.float32)
        positive = np.zeros(n, int)
        if i % 2:
            positive[: max(1, n // 4)] = 1
            x[:, 0] += 4 * positive
        writer.add(f"b{i:02d}", store.Bag(x, generator.uniform(0, 99, (n, 2)), None, None))
        rows.append(
            [f"b{i:02d}", i % 2, "" if i % 5 == 0 else (i // 2) % 2, ("train", "val", "test")[i // 2 % 3], f"p{i // 2}"]
        )
        instances += [[f"b{i:02d}", p, 0] for p in positive]
    write(folder / "labels.csv", ["bag", "lesion", "other", "split", "patient"], rows)
    write(folder / "instances.csv", ["bag", "lesion", "other"], instances)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three images of random pixels, 48 x 64, 80 and 96, and ``points.csv`` with points in the first two."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        array = np.random.default_rng(i).integers(0, 256, (48, 64 + 16 * i, 3), np.uint8)
        Image.fromarray(array).save(folder / f"im{i}.png")
    write(
        folder / "points.csv",
        ["image", "x", "y"],
        [[f"im{i}.png", 10 * j, 5 * j] for i in range(2) for j in range(i + 1, 4)],
    )
    return folder


@pytest.fixture(scope="session")
def timm():
    """The module timm. Without it, the test is skipped."""
    from features import backbones

    try:
        return backbones.import_timm()
    except ValueError as error:
        pytest.skip(str(error))
