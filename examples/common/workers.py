"""Computes the runs of an experiment in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

Run = TypeVar("Run")
Result = TypeVar("Result")


def compute_in_workers(
    compute: Callable[..., Result], runs: Iterable[Run], workers: int, *given: Any
) -> Iterator[tuple[Run, Result]]:
    """Yields (run, ``compute(run, *given)``) in the order of completion, with ``workers`` parallel processes.

    An interruption of the caller stops the current runs. The workers end when this process ends for any reason.
    """
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    try:
        futures = {pool.submit(compute, run, *given): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except (KeyboardInterrupt, GeneratorExit):
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends a worker when its parent process has ended, for example by a signal."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
