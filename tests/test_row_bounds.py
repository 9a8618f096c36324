"""The CPU kernels do not read beyond a row: a page without read access follows the last instance."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import needs_kernel

from sgl_ops._fused import CPU_LEVELS

pytestmark = [
    needs_kernel,
    pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect of Linux"),
]

PROGRAM = """
import ctypes, mmap, sys
import torch
from sgl_ops import BagLoss, SGLLoss

level, where = sys.argv[1:]
if torch.ops.sgl_ops.cpu_level() != level:
    sys.exit(77)
torch.set_num_threads(1)
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
page = mmap.PAGESIZE


def between_forbidden_pages(size):
    # memory of at least `size` bytes between two pages; reading these pages terminates the process
    inside = -(-size // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (start, start + page + inside):
        assert libc.mprotect(forbidden, page, 0) == 0
    return torch.frombuffer(memory, dtype=torch.uint8, offset=page, count=inside), memory


room, memory = between_forbidden_pages(8 * 40_000)


def at_an_end(values, end):
    # a copy of `values` next to the forbidden page at this end
    size = values.numel() * values.element_size()
    spare = len(room) - size
    place = room[spare:] if end == "last" else room[:size]
    assert place.data_ptr() % values.element_size() == 0
    place = place.view(values.dtype).view(values.shape)
    return place.copy_(values)


if where == "beyond":
    # reads one instance too many, as a wrong kernel would
    tensor = room.view(torch.float32)
    beyond = torch.frombuffer((ctypes.c_float * 1).from_address(tensor.data_ptr() + len(room)), dtype=torch.float32)
    print(float(beyond[0]))
    sys.exit(0)

lengths = [*range(1, 140), *range(1000, 1060, 7), *range(16_380, 16_420, 9), 32_767, 32_769, 33_001]
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for n in lengths if dtype == torch.float32 else lengths[::3]:
        values = (4 * torch.sin(1.7 * torch.arange(n))).to(dtype).reshape(1, 1, n)
        for label in (0.0, 1.0):
            losses = [SGLLoss(pooling=name, mask_weight=0.5, impl="fused") for name in ("max", "softmax", "noisy_or")]
            losses.append(BagLoss("mean_logits", impl="fused"))  # it only sums the logits
            for loss in losses:
                targets = torch.full((1, 1), label)
                results = []
                for end in ("first", "last", None):
                    logits = values.clone() if end is None else at_an_end(values, end)
                    logits.requires_grad_()
                    value = loss(logits, targets)
                    value.backward()
                    results.append((value.detach(), logits.grad))
                    logits.requires_grad_(False)
                for value, gradient in results[:2]:
                    assert torch.equal(value, results[2][0])
                    assert torch.equal(gradient, results[2][1])
        mask = torch.arange(n) % 3 != 1
        for end in ("first", "last"):
            SGLLoss(impl="fused")(values, targets, mask=at_an_end(mask.reshape(1, n), end))
print("clean")
"""


def run(level, where, folder):
    environment = os.environ | {"SGL_OPS_CPU": level}
    command = [sys.executable, "-c", PROGRAM, level, where]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_no_level_reads_beyond_a_row(level, tmp_path):
    done = run(level, "rows", tmp_path)
    if done.returncode == 77:
        pytest.skip(f"this CPU has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "clean\n"


def test_reading_beyond_a_row_terminates_the_process(tmp_path):
    assert run("baseline", "beyond", tmp_path).returncode == -signal.SIGSEGV
