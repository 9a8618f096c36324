"""examples/features/store.py: feature files of other programs."""

from __future__ import annotations

import shutil
import sys

import feature_packages  # noqa: F401
import numpy as np
import pytest
import torch
from csv_files import write
from feature_runs import command
from features import store
from features.extraction_settings import changed_settings


def test_files_of_clam_and_trident_are_read(tmp_path):
    import h5py

    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    with h5py.File(tmp_path / "clam.h5", "w") as file:
        file["features"], file["coords"] = x, np.arange(8).reshape(4, 2)
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file["features"], file["coords"] = x[None], np.arange(8).reshape(1, 4, 2)
    torch.save(torch.from_numpy(x), tmp_path / "plain.pt")
    torch.save({"features": torch.from_numpy(x)}, tmp_path / "named.pt")
    bags = store.FeatureBags(tmp_path)
    assert bags.names == ["clam", "named", "plain", "trident"]
    for name in bags.names:
        assert bags.instances(name) == 4
        assert np.array_equal(bags[name].features, x)
        assert (bags.coords(name) is None) == (name in ("plain", "named"))
    assert bags.coords("trident").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    (tmp_path / "broken.h5").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken.h5: not a readable HDF5 file"):
        store.FeatureBags(tmp_path)["broken"]


def test_settings_of_the_extraction_are_read_from_both_forms(tmp_path):
    """The centre of the first cell decides the place of a box."""
    settings = {"backbone": "timm/resnet18", "stride": 16, "centre": 10.0}
    for kind in (store.StoreWriter, store.FileWriter):
        writer = kind(tmp_path / kind.__name__, settings)
        writer.add("a", store.Bag(np.zeros((6, 4)), None, (2, 3), (32, 48)))
        bags = store.FeatureBags(tmp_path / kind.__name__)
        assert bags.settings == settings
        assert (bags.shape("a").grid, bags.shape("a").size) == ((2, 3), (32, 48))
    writer = store.FileWriter(tmp_path / "other", settings | {"stride": 8, "centre": 4.0})
    writer.add("b", store.Bag(np.zeros((6, 4)), None, (2, 3), (32, 48)))
    shutil.copy(tmp_path / "other" / "b.h5", tmp_path / "FileWriter")
    bags = store.FeatureBags(tmp_path / "FileWriter")
    with pytest.raises(ValueError, match=r"b\.h5: made with other settings than .*a\.h5 \(centre, stride\)"):
        bags.instances("b")


def h5(path, **arrays):
    import h5py

    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array


FEATURES = torch.arange(12, dtype=torch.float32).reshape(4, 3)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("b.h5", lambda path: path.write_bytes(b"no"), "not a readable HDF5 file"),
        ("b.h5", lambda path: h5(path, feats=FEATURES), "expected a data set 'features', found feats"),
        ("b.h5", lambda path: h5(path, features=FEATURES[0]), r"expected features \(L, D\), got \(3,\)"),
        ("b.h5", lambda path: h5(path, features=torch.zeros(2, 4, 3)), r"expected features \(L, D\), got \(2, 4, 3\)"),
        ("b.h5", lambda path: h5(path, features=FEATURES[:, :2]), r"expected features \(L, 3\), got \(4, 2\)"),
        (
            "b.h5",
            lambda path: h5(path, features=FEATURES, coords=torch.zeros(4, 3)),
            r"expected coords \(4, 2\), got \(4, 3\)",
        ),
        ("b.pt", lambda path: torch.save(torch.tensor(1.0), path), r"expected features \(L, D\), got \(\)"),
        ("b.pt", lambda path: torch.save({"feats": FEATURES}, path), "expected a tensor, or a dict with a tensor"),
        (
            "b.pt",
            lambda path: torch.save({"features": FEATURES, "coords": "none"}, path),
            r"expected coords \(4, 2\), got str",
        ),
    ],
)
def test_broken_file_among_others_is_named(tmp_path, name, make, message):
    h5(tmp_path / "a.h5", features=FEATURES)
    make(tmp_path / name)
    bags = store.FeatureBags(tmp_path)
    assert bags.instances("a") == 4
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        bags["b"]
    if "coords" not in message:
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            bags.instances("b")


@pytest.mark.parametrize(
    "content",
    [
        FEATURES.bfloat16(),
        FEATURES.half(),
        FEATURES.int(),
        FEATURES.clone().requires_grad_(),
        {"features": FEATURES, "coords": [[0, 1], [2, 3], [4, 5], [6, 7]]},
    ],
)
def test_tensors_of_every_kind_are_read(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    bags = store.FeatureBags(tmp_path)
    assert np.array_equal(bags["a"].features, FEATURES)
    assert bags.instances("a") == 4
    if isinstance(content, dict):
        assert bags.coords("a").tolist() == content["coords"]


def test_subfolders_of_clam_are_found(tmp_path):
    for folder in ("pt_files", "h5_files"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=r"expected features \(bags\.csv, or files BAG\.h5 or BAG\.pt\), found none"):
        store.FeatureBags(tmp_path)
    torch.save(FEATURES, tmp_path / "pt_files" / "s1.pt")
    assert store.FeatureBags(tmp_path)["s1"].coords is None
    h5(tmp_path / "h5_files" / "s1.h5", features=FEATURES.numpy(), coords=np.zeros((4, 2)))
    bags = store.FeatureBags(tmp_path)  # h5_files have the coordinates, too
    assert bags.names == ["s1"] and bags["s1"].coords.shape == (4, 2)
    assert bags.folder == tmp_path / "h5_files"
    # bags in the folder itself come first
    torch.save(FEATURES, tmp_path / "s2.pt")
    assert store.FeatureBags(tmp_path).names == ["s2"]


def test_bag_in_two_files_is_an_error(tmp_path):
    h5(tmp_path / "a.h5", features=FEATURES)
    torch.save(FEATURES, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds a\.h5 and a\.pt; expected one file per bag"):
        store.FeatureBags(tmp_path)


def test_bag_without_instances_is_named_before_the_training(tmp_path, capsys):
    (tmp_path / "features").mkdir()
    for k in range(6):
        h5(tmp_path / "features" / f"b{k}.h5", features=FEATURES[: 0 if k in (2, 5) else 4])
    write(tmp_path / "labels.csv", ["bag", "a"], [[f"b{k}", k % 2] for k in range(6)])
    assert command(tmp_path, tmp_path / "out", "--folds=2", "--epochs=1") == 2
    assert "features: 2 bags have no instances (b2, b5)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_measured_centre_may_differ_by_rounding(tmp_path):
    settings = {"backbone": "timm/resnet18", "stride": 16, "centre": 10.40012}
    store.StoreWriter(tmp_path, settings).add("a", store.Bag(np.zeros((6, 4)), None, (2, 3), (32, 48)))
    other = {**settings, "centre": 10.40017}  # another number of threads
    assert changed_settings(settings, other) == []
    assert store.StoreWriter(tmp_path, other).names == {"a"}
    assert changed_settings(settings, {**settings, "centre": 10.5, "stride": 8}) == ["stride", "centre"]
    assert changed_settings(settings, {"backbone": "timm/resnet18", "stride": 16}) == ["centre"]
    with pytest.raises(ValueError, match=r"made with other settings \(centre\)"):
        store.StoreWriter(tmp_path, {**settings, "centre": 10.5})


def test_h5_files_need_h5py(tmp_path, monkeypatch):
    h5(tmp_path / "a.h5", features=FEATURES.numpy())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="h5 need h5py, which is not installed"):
        store.FeatureBags(tmp_path)
