"""Builds the device code of csrc/cuda, and a library with the interpreters and the host code.

build_cache.py caches each part by a hash of its sources, its flags and its compilers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(ROOT / "tools"), str(ROOT / "tests")]
from build_cache import cached_build, compiler_version  # noqa: E402
from cuda_toolkit import LANGUAGE_FLAGS, find_toolkit  # noqa: E402

HOST_FLAGS = ["-O2", "-frounding-math", "-Wno-volatile", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall"]


def find_nvdisasm() -> Path | None:
    """The disassembler of the package nvidia-cuda-nvdisasm or of a CUDA toolkit; None if neither is installed."""
    folders = [Path(path).parent for path in glob(f"{sysconfig.get_path('purelib')}/nvidia/*/bin/nvdisasm")]
    folders += [Path(path) / "nvidia" for path in sys.path]
    for folder in folders:
        for path in [folder / "nvdisasm", *folder.glob("*/bin/nvdisasm")]:
            if path.exists():
                return path
    on_path = shutil.which("nvdisasm")
    return Path(on_path) if on_path else None


def missing() -> str:
    """A message about the first missing program that the build needs; empty if none is missing."""
    if find_toolkit() is None:
        return "nvcc was not found: set CUDA_HOME to the folder of the CUDA toolkit"
    if find_nvdisasm() is None:
        return "nvdisasm was not found: pip install nvidia-cuda-nvdisasm"
    if shutil.which("g++") is None:
        return "g++ was not found"
    return ""


def nvcc_version() -> str:
    """The release of nvcc, such as "13.0"; other releases generate other machine code."""
    return compiler_version(nvcc()).partition("release ")[2].partition(",")[0]


@dataclass(frozen=True)
class DeviceCode:
    """Paths of a build. ``code`` maps an architecture, such as "90", to its PTX and its disassembled machine code.

    ``two_types``: only kernels for float32 and bfloat16 were compiled.
    """

    library: str
    guard: str
    code: dict[str, dict[str, str]]
    two_types: bool

    def run(self, script: Path, *arguments: str, guarded: bool = True, **options) -> subprocess.CompletedProcess[str]:
        """Runs a Python script with SGL_DEVICE_CODE set for interpreter.py, and the memory guard preloaded."""
        environment = {**os.environ, "SGL_DEVICE_CODE": json.dumps(asdict(self)), "OMP_NUM_THREADS": "1"}
        if guarded:
            environment["LD_PRELOAD"] = self.guard
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def nvcc() -> str:
    toolkit = find_toolkit()
    assert toolkit is not None
    return str(toolkit / "bin" / "nvcc")


def kernel_sources(root: Path) -> list[Path]:
    """All source files of the CUDA kernels, for device code and host code."""
    return sorted([*(root / "csrc").glob("*.h"), *(root / "csrc" / "cuda").iterdir()])


def compiled(architecture: str, root: Path = ROOT, two_types: bool = False) -> Path:
    """The folder of code.ptx, code.cubin and report.txt for an architecture such as "90".

    report.txt is the output of nvcc: warnings, and the registers, stack frame and spills of each kernel.
    """
    flags = [*LANGUAGE_FLAGS, *(["-DSGL_TWO_TYPES"] if two_types else [])]

    def make(folder: Path) -> None:
        ptx, cubin = folder / "code.ptx", folder / "code.cubin"
        commands = [
            [nvcc(), "-ptx", *flags, f"-arch=compute_{architecture}", root / "csrc/cuda/launch.cu", "-o", ptx],
            [nvcc(), "-cubin", "-Xptxas=-v", f"-arch=sm_{architecture}", ptx, "-o", cubin],
        ]
        with (folder / "report.txt").open("w") as report:
            for command in commands:
                report.write(subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr)

    settings = [flags, architecture, compiler_version(nvcc())]
    return cached_build("device-code", kernel_sources(root), settings, make)


def device_code(architecture: str, root: Path, two_types: bool) -> dict[str, str]:
    """Paths of the PTX and the disassembled machine code for an architecture such as "90"."""
    nvdisasm = find_nvdisasm()
    assert nvdisasm is not None
    folder = compiled(architecture, root, two_types)

    def make(target: Path) -> None:
        with (target / "code.sass").open("w") as file:
            subprocess.run([nvdisasm, folder / "code.cubin"], check=True, stdout=file)

    settings = [compiler_version(str(nvdisasm))]
    disassembled = cached_build("disassembly", [folder / "code.cubin"], settings, make)
    return {"ptx": str(folder / "code.ptx"), "sass": str(disassembled / "code.sass")}


def interpreter_library() -> Path:
    """The path of the library with the interpreters, the runtime, and the host code of launch.cu and ops.cpp."""
    import torch

    torch_folder = Path(torch.__file__).parent
    csrc, toolkit = ROOT / "csrc", Path(nvcc()).parents[1]
    includes = [f"-I{folder}" for folder in (torch_folder / "include", toolkit / "include", csrc)]
    torch_flags = ["-std=c++17", *HOST_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    # only PTX, not optimized: this device code never runs, and its compilation would take most of the time
    launch = [*LANGUAGE_FLAGS, "-gencode=arch=compute_75,code=compute_75", "-Xcicc", "-O0"]
    launch += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    interpreters = [HERE / f"{name}.cpp" for name in ("ptx", "sass", "common")]
    header, runtime = HERE / "common.h", HERE / "runtime.cpp"
    version = compiler_version("g++")

    def compiled(source: Path, flags: Sequence[str], sources: Sequence[Path], compiler: str = "g++") -> Path:
        def make(folder: Path) -> None:
            command = [compiler, *flags, *(includes if compiler == "g++" else []), "-c", source]
            subprocess.run([*command, "-o", folder / "object.o"], check=True)

        settings = [flags, compiler_version(compiler), version]
        return cached_build(f"interpreter-{source.stem}", sources, settings, make) / "object.o"

    jobs = [(source, ["-std=c++20", *HOST_FLAGS], [source, header]) for source in interpreters]
    jobs.append((runtime, torch_flags, [runtime, header, *kernel_sources(ROOT)]))
    # in ops.cpp, SGL_EMULATE changes only the name of the operators and their dispatch key
    jobs.append((csrc / "cuda/ops.cpp", [*torch_flags, "-DSGL_EMULATE"], kernel_sources(ROOT)))
    jobs.append((csrc / "cuda/launch.cu", launch, kernel_sources(ROOT), nvcc()))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    flags = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl", f"-Wl,-rpath,{torch_folder / 'lib'}"]

    def make(folder: Path) -> None:
        subprocess.run(["g++", *objects, *flags, "-o", folder / "library.so"], check=True)

    return cached_build("interpreter", objects, [flags, version], make) / "library.so"


def memory_guard() -> Path:
    source, flags = HERE / "memory_guard.cpp", ["-O2", "-shared", "-fPIC"]

    def make(folder: Path) -> None:
        subprocess.run(["g++", *flags, source, "-ldl", "-o", folder / "guard.so"], check=True)

    return cached_build("memory-guard", [source], [flags, compiler_version("g++")], make) / "guard.so"


def build(architectures: Sequence[str], root: Path = ROOT, two_types: bool = False) -> DeviceCode:
    """Builds the device code of ``root`` for architectures such as "90".

    ``root`` is a checkout, or a copy of its csrc with a fault. The host code is always that of the checkout, so a fault
    changes device code only. ``two_types``: compile kernels for float32 and bfloat16 only, which takes half the time.
    """
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda name: device_code(name, root, two_types), architectures)
        code = dict(zip(architectures, built, strict=True))
    return DeviceCode(str(interpreter_library()), str(memory_guard()), code, two_types)
