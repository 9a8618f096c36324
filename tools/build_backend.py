"""PEP 517 backend: setuptools, building against the torch of the environment that the package is installed into.

A build environment of pip's own does not see that torch, and naming torch in [build-system] would download gigabytes
beside it. Thanks to the stable ABI the version matters little, so torch is asked for only where there is none.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from glob import glob
from importlib.metadata import distributions
from typing import Any

import setuptools

#: As [build-system] in pyproject.toml says, which pip ignores under --no-build-isolation.
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
    """What the build still needs. Where a torch is found outside of the build environment, it is put in reach."""
    if os.environ.get("SGL_OPS_BUILD") == "0" or any(map(has_torch, sys.path)):
        return []
    target = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # `python -m build` builds in an environment of its own; the active one is known by this variable alone
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
