"""Selects the installed sgl_ops, marks the tiers and defines the fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Idle torch threads sleep, so that the other workers of pytest-xdist get the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A worker, and each process that it starts, has a thread for each core of its share. More threads wait for each other.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ("feature_fixtures",)

# Test the installed package: `python -m pytest` puts the checkout on the path, and sgl_ops there has no extension.
elsewhere = [folder for folder in sys.path if Path(folder or os.curdir).resolve() != ROOT]
everywhere, sys.path[:] = list(sys.path), elsewhere
if importlib.util.find_spec("sgl_ops") is None:
    sys.path[:] = everywhere
sys.path += [str(ROOT / "examples"), str(ROOT / "tests" / "cuda_on_cpu")]

import torch  # noqa: E402
from build_emulated import build_module  # noqa: E402

from sgl_ops import _fused  # noqa: E402

NO_KERNEL = _fused.unavailable(torch.device("cpu"))
needs_kernel = pytest.mark.skipif(bool(NO_KERNEL), reason=NO_KERNEL)
NO_CUDA_KERNEL = (
    _fused.unavailable(torch.device("cuda"))
    if torch.cuda.is_available()
    else "there is no GPU: torch.cuda.is_available() is False"
)
# Without a GPU, no test is generated for it, which avoids thousands of skips. test_cuda.py reports one skip.
DEVICES = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


#: The modules of the tier "quick": kernels, values, losses. Their tests with emulated kernels are the tier "emulated".
#: Their tests of the reference are in "quick" only where there is no compiled kernel: they take most of the time.
QUICK = {
    "test_layouts",
    "test_losses",
    "test_pooling",
    "test_self_guidance",
    "test_settings",
    "test_values",
}
#: Tiers that `python -m pytest` leaves out: pyproject.toml names them in addopts, .ci/run runs them.
LONG = {"sanitizer", "integration", "examples", "device_code", "release"}
#: Tests of about a minute. They come first, so that no worker starts one when the others have ended.
LONGEST = {
    "test_machine_code_agrees_with_the_reference",
    "test_sanitized_kernels_agree_with_the_cpu",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m quick` imports only the modules of that tier: importing the others takes longer than its tests."""
    other = collection_path.suffix == ".py" and collection_path.stem not in QUICK
    return True if other and config.getoption("markexpr") == "quick" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier, the longest tests first. The long tiers are marked in the test files."""
    items.sort(key=lambda item: getattr(item, "originalname", None) not in LONGEST)
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        names = {value for value in parameters if isinstance(value, str)}
        if LONG & {marker.name for marker in item.iter_markers()}:
            continue
        if "emulated" in item.fixturenames or "emulated" in names:
            item.add_marker("emulated")
        elif item.module.__name__ in QUICK and (NO_KERNEL or "reference" not in names):
            item.add_marker("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-device-code", action="store_true", help="every case of tests/test_device_code.py")


def pytest_report_header() -> list[str]:
    import sgl_ops

    return [
        f"sgl_ops: {Path(sgl_ops.__file__).parent}, fused on the CPU: {NO_KERNEL or torch.ops.sgl_ops.cpu_level()}",
        f"fused on CUDA: {NO_CUDA_KERNEL or torch.cuda.get_device_name(0)}",
    ]


@pytest.fixture(params=DEVICES, ids=lambda device: device.type)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test's tensors. Tests draw them on the CPU, so that every device gets the same numbers."""
    return request.param


def skip_without_kernel(device: torch.device) -> None:
    reason = _fused.unavailable(device)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def fused_device(device: torch.device) -> torch.device:
    """A device for which the fused operator has a kernel."""
    skip_without_kernel(device)
    return device


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module that controls torch.ops.sgl_ops_emulated, the CUDA operators whose kernels run on the CPU."""
    build_module()
    return importlib.import_module("sgl_ops_emulated")


@pytest.fixture(params=["reference", "fused", "emulated"])
def impl(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation. "emulated" runs the CUDA kernels on the CPU in place of the CPU kernels."""
    if request.param == "reference":
        return "reference"
    skip_without_kernel(device)
    if request.param == "emulated":
        if device.type != "cpu" or request.module.__name__ == "test_compile":
            pytest.skip("the emulated kernels are for eager tests on the CPU")
        request.getfixturevalue("emulated")
        use_emulated_operators(monkeypatch)
    return "fused"


def use_emulated_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the operators by the emulated ones, whose CUDA kernels run on the CPU."""
    names = ("sgl_forward", "sgl_forward_sums", "sgl_finalize", "sgl_backward", "pool_forward", "pool_backward")
    for name in names:
        operator = getattr(torch.ops.sgl_ops_emulated, name).default
        monkeypatch.setattr(_fused, f"_{name.removeprefix('sgl_')}", operator)


def uses_cuda_kernels(device: torch.device) -> bool:
    """Whether impl="fused" runs the CUDA kernels, on a GPU or emulated."""
    return device.type == "cuda" or "emulated" in _fused._forward.name()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data, named by the environment variable SGL_OPS_DATA."""
    folder = os.environ.get("SGL_OPS_DATA")
    if folder is None:
        pytest.skip("SGL_OPS_DATA is not set: the folder that holds MNIST/raw")
    return Path(folder)
