"""Runs the operators of sgl_ops on interpreted device code. Scripts that import this module need DeviceCode.run."""

from __future__ import annotations

import ctypes
import json
import os
from typing import Any

import torch

import sgl_ops  # noqa: F401  (registers the operators)
from sgl_ops import _fused

PATHS = json.loads(os.environ["SGL_DEVICE_CODE"])
torch.set_num_threads(1)
torch.ops.load_library(PATHS["library"])
#: The dtypes of logits that have kernels.
DTYPES = {torch.float32, torch.bfloat16} | (set() if PATHS["two_types"] else {torch.float16, torch.float64})
_library = ctypes.CDLL(PATHS["library"])
_library.device_code_load.restype = _library.device_code_class.restype = ctypes.c_char_p
_library.device_code_range.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]

#: The pipe of an instruction.
CLASSES = [_library.device_code_class(k).decode() for k in range(15)]
#: Tensors whose memory accesses are counted separately, see :func:`mark`.
TAGS = ["other", "logits", "grad", "targets", "mask", "offsets", "saved", "tag7", "tag8", "tag9"]


def load(architecture: str, kind: str = "sass", multiprocessors: int = 3) -> None:
    """Loads the device code for the next launches: PTX ("ptx") or machine code ("sass").

    ``multiprocessors``: the number that csrc/cuda/launch.cu plans for. It has no effect after the first launch.
    """
    code = PATHS["code"][architecture]
    _library.device_code_multiprocessors(multiprocessors)
    name = f"{architecture} {kind}"
    error = _library.device_code_load(name.encode(), code["ptx"].encode(), code[kind].encode(), kind == "sass")
    if error:
        raise RuntimeError(error.decode())


def set_options(policy: int = 0, resident: int = 1, seed: int = 1, races: bool = True, ulp: int = 0) -> None:
    """Sets the options of the next launches.

    ``policy``: order of diverged lanes (0 lowest first, 1 highest first, 2 random). ``resident``: blocks that run
    interleaved. ``races``: check shared memory for races. ``ulp``: largest error of approximate instructions.
    """
    _library.device_code_options(policy, resident, seed, races, ulp)


def replace_fused_kernels() -> None:
    """Makes ``impl="fused"`` on the CPU run the interpreted kernels."""
    for name in ("sgl_forward", "sgl_forward_sums", "sgl_finalize", "sgl_backward", "pool_forward", "pool_backward"):
        setattr(_fused, f"_{name.removeprefix('sgl_')}", getattr(torch.ops.sgl_ops_emulated, name).default)


def mark(tensor: torch.Tensor, tag: str) -> None:
    """Counts accesses to the memory of ``tensor`` under ``tag``."""
    storage = tensor.untyped_storage()
    _library.device_code_range(storage.data_ptr(), storage.nbytes(), TAGS.index(tag))


def reset_counts() -> None:
    _library.device_code_reset_counts()


def write_profile(path: str) -> None:
    """Writes a line for each instruction: kernel, address, issue count, class, text."""
    _library.device_code_profile(path.encode())


def launches() -> list[dict[str, Any]]:
    """The launches since :func:`reset_counts`, at most 64.

    Each has its blocks, its warps, the instructions of all warps, also by pipe, and those of the longest warp.
    """
    width = 4 + len(CLASSES)
    raw = (ctypes.c_uint64 * (64 * width))()
    found = []
    for k in range(_library.device_code_launches(raw, 64)):
        numbers = list(raw[k * width : (k + 1) * width])
        found.append(dict(zip(("blocks", "warps", "instructions", "longest"), numbers, strict=False)))
        found[-1]["by_class"] = dict(zip(CLASSES, numbers[4:], strict=True))
    return found


def counts() -> dict[str, Any]:
    """The counts since :func:`reset_counts`.

    "warp" and "lane": instructions issued by warps, and those times their active lanes; "by_class" and
    "lanes_by_class": the same by pipe. "memory": requests, bytes, sectors of 32 bytes and the least number of sectors,
    by (tag, "load" or "store").
    """
    raw = (ctypes.c_uint64 * 400)()
    _library.device_code_counts(raw)
    numbers = iter(raw)
    names = ["warp", "lane", "blocks", "threads", "branches", "divergent", "shared", "shared_waves", "shared_ideal"]
    result: dict[str, Any] = {name: next(numbers) for name in names}
    result["by_class"] = {name: next(numbers) for name in CLASSES}
    result["lanes_by_class"] = {name: next(numbers) for name in CLASSES}
    result["memory"] = {
        (tag, way): {name: next(numbers) for name in ("requests", "bytes", "sectors", "ideal")}
        for tag in TAGS
        for way in ("load", "store")
    }
    return result
