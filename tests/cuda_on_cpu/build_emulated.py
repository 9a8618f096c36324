"""Compiles csrc/cuda for the CPU: as operators for this Python, and as a program under a sanitizer."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATE = ["-DSGL_EMULATE", "-DSGL_WITH_EXCHANGE"]
UNOPTIMIZED = ["-O0", "-g1", *EMULATE]


def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("there is no g++ to compile the CUDA kernels for the CPU with")
    return path


def compile_one(source: Path, flags: list[str], target: Path) -> Path:
    command = [compiler(), "-std=c++17", *flags, f"-I{HERE}", "-x", "c++", "-c", source, "-o", target]
    subprocess.run(list(map(str, command)), check=True)
    return target


def link(objects: list[Path], target: Path, flags: list[str]) -> Path:
    subprocess.run(list(map(str, [compiler(), *objects, "-o", target, *flags])), check=True)
    return target


def build_module(folder: Path) -> Path:
    """The operators sgl_ops_emulated and the Python module that steers them."""
    import pybind11
    import torch

    torch_folder = Path(torch.__file__).parent
    includes = (torch_folder / "include", pybind11.get_include(), sysconfig.get_path("include"))
    target = folder / f"sgl_ops_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / "csrc/cuda/launch.cu", ROOT / "csrc/cuda/ops.cpp", HERE / "module.cpp"]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", *EMULATE, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    library = torch_folder / "lib"
    flags += [f"-I{include}" for include in includes]
    objects = [compile_one(source, flags, folder / f"{source.name}.o") for source in sources]
    link(objects, target, ["-shared", f"-L{library}", "-ltorch_cpu", f"-Wl,-rpath,{library}"])
    sys.path.insert(0, str(folder))
    return target


@functools.cache
def objects_beside_kernels(sanitizer: tuple[str, ...]) -> list[Path]:
    """The rest of the program of compare.cpp, which is the same for changed kernels."""
    folder = Path(tempfile.mkdtemp(prefix="compare"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # what the kernels are compared with needs no sanitizer, and vectors that -O1 is enough for
    cpu = ["-O1", "-fopenmp-simd"]
    return [
        compile_one(HERE / "case_on_cpu.cpp", cpu, folder / "case_on_cpu.o"),
        compile_one(HERE / "compare.cpp", [*UNOPTIMIZED, *sanitizer], folder / "compare.o"),
    ]


def build_comparison(folder: Path, sanitizer: list[str], root: Path = ROOT) -> Path:
    """The program of compare.cpp with the kernels of ``root``, a checkout or a changed copy of one."""
    flags = [*UNOPTIMIZED, *sanitizer]
    kernels = compile_one(root / "csrc/cuda/launch.cu", flags, folder / "launch.o")
    return link([*objects_beside_kernels(tuple(sanitizer)), kernels], folder / "compare", sanitizer)


def build_traffic(folder: Path) -> Path:
    """The program of traffic.cpp, and the kernels with calls of what it counts with, but without any sanitizer."""
    counted = ["-O1", *EMULATE, "-fsanitize=thread", "-U__SANITIZE_THREAD__"]
    kernels = compile_one(ROOT / "csrc/cuda/launch.cu", counted, folder / "launch.o")
    rest = compile_one(HERE / "traffic.cpp", ["-O1", *EMULATE], folder / "traffic.o")
    return link([kernels, rest], folder / "traffic", [])
