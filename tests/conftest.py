"""Which sgl_ops is tested, and what every test shares."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the checkout on the path, where sgl_ops has no extension: what is installed is to be tested
elsewhere = [folder for folder in sys.path if Path(folder or os.curdir).resolve() != ROOT]
everywhere, sys.path[:] = list(sys.path), elsewhere
if importlib.util.find_spec("sgl_ops") is None:
    sys.path[:] = everywhere
sys.path.append(str(ROOT / "examples"))

import torch  # noqa: E402

from sgl_ops import _fused  # noqa: E402

NO_KERNEL = _fused.unavailable(torch.device("cpu"))
needs_kernel = pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)


def pytest_report_header() -> str:
    import sgl_ops

    return f"sgl_ops: {Path(sgl_ops.__file__).parent}, fused on the CPU: {NO_KERNEL or torch.ops.sgl_ops.cpu_level()}"


@pytest.fixture(params=["reference", pytest.param("fused", marks=needs_kernel)])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data, of the environment variable SGL_OPS_DATA."""
    folder = os.environ.get("SGL_OPS_DATA")
    if folder is None:
        pytest.skip("SGL_OPS_DATA is not set: the folder that holds MNIST/raw")
    return Path(folder)
