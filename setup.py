"""Builds the extension sgl_ops._C; everything else about the package is in pyproject.toml.

SGL_OPS_BUILD=auto  compile; after a failure, print a warning and install the pure-Python package (the default)
SGL_OPS_BUILD=1     compile; a failure is an error
SGL_OPS_BUILD=0     do not compile

SGL_OPS_CUDA=auto   compile the CUDA kernels if there is a CUDA toolkit and a CUDA build of torch; after a failure,
                    print a warning and build without them (the default)
SGL_OPS_CUDA=1      compile the CUDA kernels; a failure or a missing toolkit is an error
SGL_OPS_CUDA=0      do not compile the CUDA kernels

CUDA_HOME and TORCH_CUDA_ARCH_LIST name the toolkit and the GPU architectures, as in the extensions of torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from build_stamp import build_if_changed
from cuda_toolkit import architectures, compile_command, find_toolkit, link_flags


def choice(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name}: expected auto, 1 or 0, got {value!r}")
    return value


BUILD, CUDA = choice("SGL_OPS_BUILD"), choice("SGL_OPS_CUDA")

# Free-threaded Pythons have no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")

# Without -ffast-math: loading a library that is linked with it sets flush-to-zero for the whole process.
COMPILE_FLAGS = [
    "-O3",
    "-std=c++17",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # gcc's default, not clang's
    "-Wno-psabi",  # the warning is about vector arguments, and all functions with vector arguments are inlined
    f"-ffile-prefix-map={Path.cwd()}=.",
]


def torch_folder() -> Path:
    """The folder of the installed torch. It is found without the import of torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed where the package is built")
    return Path(spec.origin).parent


class BuildExtension(build_ext):
    """build_ext that compiles changed files only, in parallel. Without a compiler it leaves out the extension."""

    def run(self) -> None:
        if BUILD == "0":
            self.leave_out()
            return
        try:
            super().run()
        except Exception as error:  # no compiler, no torch, a compiler that is too old, ...
            if "1" in (BUILD, CUDA):
                raise
            print(
                f"sgl-ops: the extension could not be built ({type(error).__name__}: {error}). Installing the "
                "pure-Python package: the same results, slower. SGL_OPS_BUILD=1 turns this into an error.",
                file=sys.stderr,
            )
            self.leave_out()

    def leave_out(self) -> None:
        """Makes the distribution a pure-Python one. Removes the extension that an earlier build left."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []

    def add_cuda(self, extension: Extension, torch: Path) -> None:
        """Compiles the CUDA kernels and adds them to ``extension``, according to SGL_OPS_CUDA."""
        if CUDA == "0" or (CUDA == "auto" and not (torch / "lib" / "libtorch_cuda.so").exists()):
            return
        toolkit = find_toolkit()
        if toolkit is None:
            if CUDA == "1":
                raise RuntimeError("SGL_OPS_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME to its folder")
            return
        source, target = "csrc/cuda/launch.cu", Path(self.build_temp, "csrc", "cuda", "launch.cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder, flags = link_flags(toolkit)
            host_flags = ["-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}=."]
            command = compile_command(toolkit, source, str(target), host_flags)
            self.run_unless_done(command, target, [source, *glob("csrc/cuda/*.cuh"), *extension.depends])
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            if CUDA == "1":
                raise
            print(f"sgl-ops: building without CUDA kernels, because they did not compile: {error}", file=sys.stderr)
            return
        extension.sources += ["csrc/cuda/ops.cpp"]
        extension.define_macros += [("SGL_WITH_CUDA", None)]
        names = " ".join(architectures(toolkit / "bin" / "nvcc"))
        extension.define_macros += [("SGL_CUDA_ARCHITECTURES", f'"{names}"')]
        extension.extra_objects += [str(target)]
        extension.library_dirs += [str(folder)]
        extension.extra_link_args += flags

    def run_unless_done(self, command: list[str], target: Path, sources: list[str]) -> None:
        """Runs ``command``, unless it has already made ``target`` from the same contents of ``sources``."""
        if self.force:
            target.unlink(missing_ok=True)
        build_if_changed(str(target), sources, lambda: subprocess.run(command, check=True) and None, "\n".join(command))

    def build_extensions(self) -> None:
        torch = torch_folder()
        for extension in self.extensions:
            if str(torch / "include") in extension.include_dirs:
                continue  # bdist_wheel calls this method twice for the same extensions
            self.add_cuda(extension, torch)
            extension.include_dirs.append(str(torch / "include"))
            extension.library_dirs.append(str(torch / "lib"))
            extension.extra_compile_args.append(f"-ffile-prefix-map={torch}=torch")
        # object files of an earlier build may have other settings, such as CUDA kernels or another torch
        settings = Path(self.build_temp, "settings")
        wanted = repr([(e.sources, e.define_macros, e.include_dirs, e.extra_compile_args) for e in self.extensions])
        rebuild = self.force or not settings.exists() or settings.read_text(encoding="utf-8") != wanted
        self.force = True  # build_ext compares times; build_if_changed compares contents instead
        settings.unlink(missing_ok=True)
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], output_dir: str, depends: list[str], **options: Any) -> list[str]:
            def compile_one(source: str) -> list[str]:
                (target,) = self.compiler.object_filenames([source], output_dir=output_dir)
                if rebuild:
                    Path(target).unlink(missing_ok=True)
                build_if_changed(
                    target, [source, *depends], lambda: compile_some([source], output_dir=output_dir, **options)
                )
                return [target]

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [target for targets in pool.map(compile_one, sources) for target in targets]

        self.compiler.compile = compile_all
        super().build_extensions()
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(wanted, encoding="utf-8")


class BuildWheel(bdist_wheel):
    """bdist_wheel that contains the present modules only. Its tag says whether it has the extension."""

    def run(self) -> None:
        # else modules of an earlier build that were renamed or removed would be in the wheel
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


# the page on the package index has no files of the repository
PICTURES = "https://raw.githubusercontent.com/sgl-ops/sgl-ops/main/"

setup(
    long_description=re.sub(
        r"(!\[[^]]*\]\()(?!https:)", rf"\g<1>{PICTURES}", Path("README.md").read_text(encoding="utf-8")
    ),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "sgl_ops._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            depends=[*glob("csrc/**/*.h", recursive=True), "setup.py"],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),  # the oldest torch that loads it: 2.10
                *([("Py_LIMITED_API", "0x030A0000")] if LIMITED_API else []),
            ],
            extra_compile_args=COMPILE_FLAGS,
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=LIMITED_API,
        )
    ],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": BuildWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
