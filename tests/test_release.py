"""tools/release.py: its checks of wheels and source distributions, and the result in the repository."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

NAME = "sgl_ops-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"


def made_up_wheel(folder, name=NAME, more=(), without=(), text="") -> Path:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sgl_ops").rglob("*.py")}
    files |= {"sgl_ops/py.typed", "sgl_ops/_C.abi3.so", "sgl_ops-0.1.0.dist-info/METADATA", *more}
    path = folder / name
    with zipfile.ZipFile(path, "w") as file:
        for name in files - set(without):
            file.writestr(name, text)
    return path


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ({"more": ["tests/test_losses.py"]}, "tests/test_losses.py"),
        ({"more": ["examples/training.py"]}, "examples/training.py"),
        ({"more": ["sgl_ops/notes.txt"]}, "sgl_ops/notes.txt"),
        ({"without": ["sgl_ops/py.typed"]}, "py.typed"),
        ({"name": NAME.replace("cp310-abi3", "cp313-cp313")}, "tag"),
        ({"name": NAME.replace("manylinux_2_28", "linux")}, "tag"),
        ({"text": "compiled in /home/somebody/sgl-ops"}, "/home/somebody"),
    ],
)
def test_wrong_wheel_is_an_error(tmp_path, how, wrong):
    with pytest.raises(release.Wrong, match=wrong):
        release.check_wheel(made_up_wheel(tmp_path, **how), ["/home/somebody"])


def test_correct_wheel_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "run", lambda command, *_, **__: "")  # skip abi3audit, which needs a real library
    found = release.check_wheel(made_up_wheel(tmp_path), ["/home/somebody"])
    assert found["platforms"] == ["manylinux_2_28_x86_64"]


def made_up_sdist(folder, without=(), size=0) -> Path:
    path = folder / "sgl_ops-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in set(release.run(["git", "ls-files"], cwd=ROOT).splitlines()) - set(without):
            info = tarfile.TarInfo(f"sgl_ops-0.1.0/{name}")
            file.addfile(info, io.BytesIO())
        info = tarfile.TarInfo("sgl_ops-0.1.0/large")
        info.size = size
        file.addfile(info, io.BytesIO(os.urandom(size)))
    return path


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with the files that git tracks")
def test_source_distribution_has_the_tracked_files_and_is_small(tmp_path):
    pictures = [path.relative_to(ROOT).as_posix() for path in (ROOT / "examples" / "results").rglob("*.png")]
    assert pictures
    assert release.check_sdist(made_up_sdist(tmp_path, without=pictures))["bytes"] < release.LARGEST_SDIST
    with pytest.raises(release.Wrong, match=r"csrc/batch\.h"):
        release.check_sdist(made_up_sdist(tmp_path, without=["csrc/batch.h"]))
    with pytest.raises(release.Wrong, match="more than 1000000"):
        release.check_sdist(made_up_sdist(tmp_path, size=1_000_001))


def test_only_existing_python_versions_are_found():
    assert release.interpreter("{}.{}".format(*sys.version_info))
    assert release.interpreter("3.1") is None


def test_committed_result_is_that_of_the_script():
    result = json.loads(release.RESULT.read_text())
    assert release.TABLE.read_text() == release.table(result)
    assert len(result["environments"]) == len(release.MATRIX)
    for row in result["environments"]:
        assert row["status"] == release.PASSED or (row["status"] == release.MISSING and row["note"]), row
    assert {row["entry"].split(":")[0] for row in result["environments"] if row["status"] == release.PASSED} >= {
        torch for torch in release.TORCHES if torch != "newest"
    }
