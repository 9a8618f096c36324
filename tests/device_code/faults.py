"""Faults for the kernels. A test puts each one into a copy of the kernels and checks that the cases find it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from build_device_code import ROOT


@dataclass(frozen=True)
class Fault:
    """Replaces ``right`` in csrc/``file`` by ``wrong``. A case with ``cases`` in its name must then fail."""

    file: str
    right: str
    wrong: str
    cases: str

    def copy(self, folder: Path) -> Path:
        """A copy of csrc in ``folder`` with the fault."""
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        path = folder / "csrc" / self.file
        text = path.read_text()
        assert text.count(self.right) >= 1, f"{self.file} does not contain {self.right!r}"
        path.write_text(text.replace(self.right, self.wrong, 1))
        return folder


#: Found by the quick tier.
QUICK = {
    "no block barrier before partial results are read": Fault(
        "cuda/group.cuh", "    __syncthreads();\n    std::memcpy(&value, ", "    std::memcpy(&value, ", "map 4x3x4096"),
    "one vector too many at the end of a row": Fault(
        "cuda/rows.cuh", "? n / Pack<In>::kSize :", "? (n + Pack<In>::kSize - 1) / Pack<In>::kSize :", "odd rows"),
}  # fmt: skip

#: Found by the whole tier, which also finds those of QUICK.
OTHER = {
    "a shuffle without the upper half of the warp": Fault(
        "cuda/group.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu", "map 32x14x256"),
    "one pack of the gradient too many at the end of a row": Fault(
        "cuda/backward.cuh", "n >= kSize ? n - kSize + 1 : 0", "n >= kSize ? n - kSize + 2 : 0", "odd rows"),
    "a pack of the gradient that begins too late": Fault(
        "cuda/backward.cuh", "first * t.first_step - skew", "first * t.first_step", "odd rows"),
    "no warp barrier": Fault("cuda/group.cuh", "      __syncwarp();\n", "      ;\n", "map 32x14x256"),
    "no alignment check": Fault("cuda/rows.cuh", " && lies_on_16_bytes(x);", ";", "storage offset"),
    "one exchange buffer instead of two": Fault("cuda/group.cuh", "    turn_ ^= 1;\n", "", "2x3x700 topk"),
    "a reciprocal without its numerator": Fault(
        "vector_math.h", "const F smaller = o.u * larger;", "const F smaller = o.u;", "map 32x14x256"),
    "ties of other threads are lost": Fault("cuda/forward.cuh", "? more + others : more", "? more : more", "ties"),
    "the last block omits a block": Fault(
        "cuda/forward.cuh", "add_rows(0, of_block, r, gridDim.x", "add_rows(0, of_block, r + 1, gridDim.x",
        "map 32x14x256"),
}  # fmt: skip
