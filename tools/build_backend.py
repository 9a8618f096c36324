"""PEP 517 backend: setuptools, with the torch of the environment into which the package is installed.

pip builds in an isolated environment, which does not contain that torch. If [build-system] named torch, pip would
download gigabytes. The stable ABI makes the version of torch unimportant. So the backend requires torch only if the
target environment has none.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from glob import glob
from importlib.metadata import distributions
from typing import Any

import setuptools

#: The same number as in [build-system] of pyproject.toml, which pip ignores with --no-build-isolation.
OLDEST_SETUPTOOLS = 77
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"sgl-ops: building needs setuptools >= {OLDEST_SETUPTOOLS}, found {setuptools.__version__}: "
        f"run pip install 'setuptools>={OLDEST_SETUPTOOLS}', or leave out --no-build-isolation"
    )

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist  # noqa: E402, F401  (hooks of the backend)

OLDEST = (2, 10)


def has_torch(folder: str) -> bool:
    """Whether a torch that is new enough is installed in ``folder``."""
    for distribution in distributions(name="torch", path=[folder]):
        major, minor = distribution.version.split(".")[:2]
        return (int(major), int(minor)) >= OLDEST
    return False


def missing() -> list[str]:
    """The requirements that the build environment lacks. Adds the folder of an installed torch to ``sys.path``."""
    if os.environ.get("SGL_OPS_BUILD") == "0" or any(map(has_torch, sys.path)):
        return []
    target = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # `python -m build` uses an isolated environment; only this variable names the active one
    active = glob(os.path.join(os.environ.get("VIRTUAL_ENV", os.devnull), "lib", "python*", "site-packages"))
    for folder in [*target, *active]:
        if has_torch(folder):
            sys.path.append(folder)  # last, so that the build environment's own packages are preferred
            return []
    return ["torch>=" + ".".join(map(str, OLDEST))]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return missing()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return missing()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    missing()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    missing()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
