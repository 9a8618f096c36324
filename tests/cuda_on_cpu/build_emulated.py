"""Compiles csrc/cuda for the CPU: as operators for Python, and as a program with a sanitizer."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_cache import cached_build, compiler_version, sources_below

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATE = ["-DSGL_EMULATE"]
UNOPTIMIZED = ["-O0", "-g1", *EMULATE]


def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("g++ is not installed; it compiles the CUDA kernels for the CPU")
    return path


def compile_one(source: Path, flags: list[str], target: Path) -> Path:
    command = [compiler(), "-std=c++17", *flags, f"-I{HERE}", "-x", "c++", "-c", source, "-o", target]
    subprocess.run(list(map(str, command)), check=True)
    return target


def link(objects: list[Path], target: Path, flags: list[str]) -> Path:
    subprocess.run(list(map(str, [compiler(), *objects, "-o", target, *flags])), check=True)
    return target


def emulator_sources(root: Path = ROOT) -> list[Path]:
    """All source files of the emulated kernels."""
    return sources_below(root / "csrc", HERE)


def build_module() -> Path:
    """Builds the operators sgl_ops_emulated with the Python module that controls them, or gets them from the cache.

    Returns the path of the module, and makes it importable.
    """
    import pybind11
    import torch

    torch_folder = Path(torch.__file__).parent
    library = torch_folder / "lib"
    includes = (torch_folder / "include", pybind11.get_include(), sysconfig.get_path("include"))
    flags = ["-Og", "-fPIC", "-fvisibility=hidden", *EMULATE, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{include}" for include in includes]
    name = f"sgl_ops_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"

    def make(folder: Path) -> None:
        sources = [ROOT / "csrc/cuda/launch.cu", ROOT / "csrc/cuda/ops.cpp", HERE / "module.cpp"]
        with ThreadPoolExecutor(2) as pool:  # other workers of pytest-xdist may wait for the result
            objects = list(pool.map(lambda source: compile_one(source, flags, folder / f"{source.name}.o"), sources))
        link(objects, folder / name, ["-shared", f"-L{library}", "-ltorch_cpu", f"-Wl,-rpath,{library}"])

    folder = cached_build("module", emulator_sources(), [flags, compiler_version(compiler())], make)
    sys.path.insert(0, str(folder))
    return folder / name


def object_file(source: Path, flags: list[str]) -> Path:
    """Compiles a source that does not depend on the kernels, or gets the object file from the cache."""

    def make(folder: Path) -> None:
        compile_one(source, flags, folder / "object.o")

    settings = [flags, compiler_version(compiler())]
    return cached_build(source.stem, emulator_sources(), settings, make) / "object.o"


@functools.cache
def objects_without_kernels(sanitizer: tuple[str, ...]) -> list[Path]:
    """The object files of the program of compare.cpp that do not depend on the kernels."""
    # The CPU kernels are the expected result. They need no sanitizer, and -O1 makes them fast enough.
    on_cpu = object_file(HERE / "case_on_cpu.cpp", ["-O1", "-fopenmp-simd"])
    return [on_cpu, object_file(HERE / "compare.cpp", [*UNOPTIMIZED, *sanitizer])]


def build_comparison(sanitizer: list[str], root: Path = ROOT) -> Path:
    """Builds the program of compare.cpp, or gets it from the cache.

    Args:
        sanitizer: compiler flags.
        root: the folder of the kernels: the checkout, or a changed copy of it.
    """
    flags = [*UNOPTIMIZED, *sanitizer]

    def make(folder: Path) -> None:
        with ThreadPoolExecutor(2) as pool:
            kernels = pool.submit(compile_one, root / "csrc/cuda/launch.cu", flags, folder / "launch.o")
            objects = objects_without_kernels(tuple(sanitizer))
        link([*objects, kernels.result()], folder / "compare", sanitizer)

    return cached_build("compare", emulator_sources(root), [flags, compiler_version(compiler())], make) / "compare"
