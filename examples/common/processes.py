"""The processes of torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Processes(NamedTuple):
    """This process and the number of processes that torchrun started; one process without torchrun."""

    rank: int
    count: int
    device: torch.device
    group: Any

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Joins the processes of torchrun: gloo on the CPU, nccl with one GPU per process."""
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if len(given) < 5:  # some job schedulers set some of them
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"WORLD_SIZE: expected all variables of torchrun for several processes, got only {given}; use torchrun"
            )
        yield Processes(0, 1, torch.device(device), None)
        return
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        count = dist.get_world_size()
        where = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        yield Processes(dist.get_rank(), count, where, dist.group.WORLD if count > 1 else None)
    finally:
        dist.destroy_process_group()
