"""The installed distribution, and the modules that its import loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest
from conftest import LONG, NO_KERNEL, ROOT

import sgl_ops

try:
    installed = distribution("sgl-ops")
except PackageNotFoundError:
    pytest.skip("sgl-ops is not installed", allow_module_level=True)


def test_version_is_that_of_the_distribution():
    (written,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert sgl_ops.__version__ == version("sgl-ops") == written
    assert f"## {written}" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_extension_loads():
    """Without this test, a broken build would only skip all tests of the fused operator."""
    wheel = installed.read_text("WHEEL")
    pure = "Root-Is-Purelib: true" in wheel
    if not pure:
        assert not NO_KERNEL


def test_requirements_are_torch_and_numpy_only():
    needed = [r for r in installed.requires if "extra ==" not in r]
    assert sorted(re.split(r"[<>= ]", r)[0] for r in needed) == ["numpy", "torch"]


def test_distribution_contains_the_package_only():
    files = [str(f) for f in installed.files or []]
    assert not any(part in f for f in files for part in ("tests", "examples", "benchmarks", "csrc", "tools"))


def test_import_loads_few_modules():
    """Beyond torch, the import loads its own modules and modules of the standard library only."""
    code = "import sys, torch; before = set(sys.modules); import sgl_ops; print(*sorted(set(sys.modules) - before))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    tops = {name.split(".")[0] for name in names.split()}
    assert "sgl_ops" in tops
    assert tops - sys.stdlib_module_names == {"sgl_ops"}
    assert len(names.split()) < 20


def test_description_has_absolute_links_only():
    """An index page shows the README without the files of the repository."""
    text = installed.metadata.get_payload() or installed.metadata["Description"]
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text)
    assert [link for picture, link in links if picture]
    assert all(link.startswith("https://") for _, link in links)


def test_readme_starts_with_the_two_commands_of_a_fresh_machine():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks[0].split("\n")[:2] == ['pip install ".[examples]"', "python examples/train_mnist_bags.py"]
    assert blocks[1].split("\n")[:2] == ['pip install ".[test]"', "python -m pytest"]


def test_versions_of_the_style_tools_agree():
    pinned = [
        set(re.findall(r"\b(ruff|mypy|clang-format)==([\d.]+)", (ROOT / name).read_text()))
        for name in (".pre-commit-config.yaml", "tools/requirements-dev.txt")
    ]
    assert pinned[0] == pinned[1]
    assert len(pinned[0]) == 3


def test_ci_runs_every_tier_that_the_readme_command_leaves_out():
    options = (ROOT / "pyproject.toml").read_text()
    left_out = set(re.search(r"-m 'not \((.*?)\)'", options)[1].split(" or "))
    assert left_out == LONG
    run = (ROOT / ".ci" / "run").read_text()
    assert left_out <= set(
        re.findall(
            r"\b(?:sanitizer|integration|examples|device_code|release)\b",
            " ".join(line for line in run.splitlines() if "pytest" in line or "TIERS=" in line),
        )
    )


@pytest.mark.parametrize("variable", ["SGL_OPS_BUILD", "SGL_OPS_CUDA"])
def test_required_build_that_fails_is_an_error(variable, tmp_path):
    """The compiler does not exist, and neither does the GPU architecture."""
    pytest.importorskip("setuptools")
    environment = {"SGL_OPS_BUILD": "auto", "SGL_OPS_CUDA": "0"}
    environment |= {"CC": "absent", "CXX": "absent", "TORCH_CUDA_ARCH_LIST": "absent"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path, "--build-lib", tmp_path]
    for value, failed in (("auto", False), ("1", True)):
        env = os.environ | environment | {variable: value}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode != 0) == failed, done.stderr
        assert ("Installing the pure-Python package" in " ".join(done.stderr.split())) != failed
