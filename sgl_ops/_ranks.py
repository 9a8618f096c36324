"""Batches that several processes share: sums over the ranks of a process group."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    Group: TypeAlias = ProcessGroup | None
else:
    Group: TypeAlias = Any  # torch may be built without

_is_batched = getattr(getattr(torch._C, "_functorch", None), "is_batchedtensor", lambda tensor: False)


def check_group(group: Group) -> None:
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"process_group: expected None or a torch.distributed.ProcessGroup that this process is a member of "
            f"(torch.distributed.group.WORLD is the default one), got {type(group).__name__}"
        )


class SharesGroup:
    """An object with a process group. Its copies share the group, which cannot be copied."""

    process_group: Group

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def size_of(group: Group) -> int:
    return 1 if group is None else group.size()


def all_reduce_sum(count: Tensor, group: Group) -> Tensor:
    """The sum of a constant over the ranks."""
    if group is None:
        return count
    if _is_batched(count):
        raise ValueError("process_group: not supported under torch.func.vmap, where each rank has many losses")
    count = count.clone()
    dist.all_reduce(count, group=group)
    return count


def all_reduce_batch(counts: Tensor, numbers: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The sums of a batch over the ranks: struct Batch in csrc/batch.h.

    Every loss calls this function exactly once, on every path. So the ranks of a group run the same two collectives in
    the same order, with the same shapes and dtypes, also where one rank takes the operator and another the reference.

    Args:
        counts: (4,) int64: pairs that take part, and instances in each part.
        numbers: (6,), sums: instance loss of each part, instance loss by pairs, bag loss, penalty on the mask. The
            gradient is world_size times that of the own share. With ``guide=`` (9,): the sums of memberships, too.
    """
    if group is None:
        return counts, numbers
    counts = all_reduce_sum(counts, group)
    shares = F.pad(numbers.to(torch.float64), (0, 9 - numbers.shape[0]))
    if torch.compiler.is_compiling():
        shares = shares + 0.0 * counts.sum()  # a compiler must not change the order of the two
    return counts, all_reduce_with_grad(shares, group)[: numbers.shape[0]].to(numbers.dtype)


def all_reduce_with_grad(share: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of each one's ``share``; the gradient is world_size times that of the own share.

    DistributedDataParallel divides the sum of all gradients by world_size.
    """
    if group is None:
        return share
    own = share.detach()
    # if the own share is NaN, so are the difference and the sum
    return all_reduce_sum(own, group) + size_of(group) * (share - own)
