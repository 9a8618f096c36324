"""Compiles csrc/cuda for the CPU: as operators for this Python, and as a program under a sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def compiler() -> str:
    path = shutil.which("g++")
    if path is None:
        pytest.skip("there is no g++ to compile the CUDA kernels for the CPU with")
    return path


def compile_all(sources: list[Path], flags: list[str], target: Path, link: list[str], root: Path = ROOT) -> None:
    """``target`` of the sources, which lie under ``root``, a checkout or a changed copy of one."""
    here = root / "tests" / "cuda_on_cpu"
    objects = []
    for source in sources:
        objects.append(target.parent / f"{target.name}.{source.name}.o")
        command = [compiler(), "-std=c++17", *flags, f"-I{here}", "-x", "c++", "-c", source, "-o", objects[-1]]
        subprocess.run(list(map(str, command)), check=True)
    subprocess.run([compiler(), *map(str, [*objects, "-o", target, *link])], check=True)


def build_module(folder: Path) -> Path:
    """The operators sgl_ops_emulated and the Python module that steers them."""
    import pybind11
    import torch

    torch_folder = Path(torch.__file__).parent
    includes = (torch_folder / "include", pybind11.get_include(), sysconfig.get_path("include"))
    target = folder / f"sgl_ops_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / "csrc/cuda/launch.cu", ROOT / "csrc/cuda/ops.cpp", HERE / "module.cpp"]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-DSGL_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    library = torch_folder / "lib"
    link = ["-shared", f"-L{library}", "-ltorch_cpu", f"-Wl,-rpath,{library}"]
    compile_all(sources, [*flags, *(f"-I{include}" for include in includes)], target, link)
    sys.path.insert(0, str(folder))
    return target


def build_comparison(folder: Path, sanitizer: list[str], root: Path = ROOT) -> Path:
    """The program of compare.cpp."""
    target = folder / "compare"
    cpu = folder / "case_on_cpu"
    here = root / "tests" / "cuda_on_cpu"
    # what the kernels are compared with needs no sanitizer, and vectors that -O1 is enough for
    subprocess.run(
        [compiler(), "-std=c++17", "-O1", "-fopenmp-simd", "-c", str(here / "case_on_cpu.cpp"), "-o", f"{cpu}.o"],
        check=True,
    )
    sources = [root / "csrc/cuda/launch.cu", here / "compare.cpp"]
    compile_all(sources, ["-O0", "-g1", "-DSGL_EMULATE", *sanitizer], target, [*sanitizer, f"{cpu}.o"], root)
    return target
