"""common/workers.py: parallel runs, their results and errors; no worker outlives the script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import workers


def square(x, plus):
    if x < 0:
        raise ValueError("below 0")
    return x * x + plus


def test_every_run_is_computed_once():
    assert sorted(workers.compute_in_workers(square, [3, 1, 2], 2, 10)) == [(1, 11), (2, 14), (3, 19)]


def test_error_of_a_run_is_raised():
    with pytest.raises(ValueError, match="below 0"):
        list(workers.compute_in_workers(square, [-1], 1, 0))


SCRIPT = """
import os, sys, time
from pathlib import Path
from common import workers

def wait(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    list(workers.compute_in_workers(wait, [Path(sys.argv[1])] * 2, 2))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_script(tmp_path, sent):
    script, folder = tmp_path / "script.py", tmp_path / "began"
    script.write_text(SCRIPT)
    folder.mkdir()
    path = os.pathsep.join([str(Path(workers.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
        # a shell starts background jobs with Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    process.send_signal(sent)
    assert process.wait(60) != 0
    alive = [int(file.name) for file in folder.iterdir()]
    while alive := [pid for pid in alive if running(pid)]:
        assert time.monotonic() < until
        time.sleep(0.1)


def running(pid):
    """Whether the process exists and is not a zombie."""
    status = Path(f"/proc/{pid}/stat")
    if status.parent.parent.joinpath("self").exists():
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
