"""Finds a CUDA toolkit and makes the commands of its compiler. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

#: Every GPU from Turing on. Code for a GPU runs on later GPUs of its generation: that for 8.0 on 8.6 and 8.9, where
#: code for 8.6 issues as many instructions. PTX runs on later generations.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")

#: Flags that change the machine code. The tests interpret code that is made with the same flags.
LANGUAGE_FLAGS = ("-O3", "-std=c++17")


def find_toolkit() -> Path | None:
    """The folder of a toolkit: CUDA_HOME, CUDA_PATH, a usual place, or the folder of the nvcc on the PATH."""
    nvcc = shutil.which("nvcc")
    beside = str(Path(nvcc).resolve().parents[1]) if nvcc else None
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda", beside):
        # the nvcc on the PATH may be a wrapper, far from the headers
        if folder and Path(folder, "bin", "nvcc").exists() and Path(folder, "include", "cuda_runtime.h").exists():
            return Path(folder)
    return None


def architectures(nvcc: Path) -> list[str]:
    """The architectures in TORCH_CUDA_ARCH_LIST, else those of ARCHITECTURES that this nvcc knows."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if wanted:
        return [name for name in wanted.split(";") if name]
    output = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"sm_(\d+)\b", output))
    names = [name for name in ARCHITECTURES if name.replace(".", "") in known]
    return [*names[:-1], *(f"{name}+PTX" for name in names[-1:])]


def architecture_flags(nvcc: Path) -> list[str]:
    """nvcc's arguments for :func:`architectures`."""
    flags = []
    for name in architectures(nvcc):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0 or 9.0+PTX, got {name!r}")
        number = match[1] + match[2]
        code = f"[sm_{number},compute_{number}]" if match[3] else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def compression_flags(nvcc: Path) -> list[str]:
    """Flags of nvcc that compress the machine code, which else would be most of a wheel."""
    helped = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    smallest = ["--compress-mode=size"] if "--compress-mode" in helped else []
    return [*smallest, "-Xfatbin=-compress-all"]


def compile_command(toolkit: Path, source: str, target: str, host_flags: list[str]) -> list[str]:
    """The nvcc command that compiles ``source``. ``host_flags`` are flags of the host compiler."""
    nvcc = toolkit / "bin" / "nvcc"
    return [
        str(nvcc), *LANGUAGE_FLAGS, "--threads", "0", *architecture_flags(nvcc), *compression_flags(nvcc),
        "-Xcompiler", ",".join(host_flags), "-c", source, "-o", target,
    ]  # fmt: skip


def link_flags(toolkit: Path) -> tuple[Path, list[str]]:
    """(folder of libraries, linker flags) of the CUDA runtime.

    The runtime is linked statically, so that the library loads on a system without CUDA. Its symbols are hidden, so
    that the runtime of torch, which may have another version, does not replace it.
    """
    folder = next(toolkit / name for name in ("lib64", "lib") if (toolkit / name / "libcudart_static.a").exists())
    return folder, [
        "-l:libcudart_static.a", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,libcudart_static.a",
    ]  # fmt: skip
