"""Starts the processes of a process group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch


def start_ranks(function: Callable[..., None], *arguments: object, count: int) -> None:
    """Run ``function(rank, *arguments)`` in ``count`` processes and wait for them; an error of one is raised.

    They are forks of one process that has imported torch and torch._dynamo. The import takes several seconds, and each
    new Python would repeat it.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    if forks:
        multiprocessing.set_forkserver_preload(["torch._dynamo"])
    method = "forkserver" if forks else "spawn"
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method=method)
