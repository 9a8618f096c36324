"""Hypothesis strategies for the cases of compare.cpp. A case is passed as a line of text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
MAP, CHANNELS_LAST, WINDOW, PACKED = range(4)
# Codes of csrc/pooling.h and csrc/batch.h, parsed from the source: these tests need no compiled extension.
_POOLING = re.compile(r'kCode = (\d+);\s+static constexpr const char\* kName = "(\w+)"')
POOLINGS = {name: int(code) for code, name in _POOLING.findall((ROOT / "csrc" / "pooling.h").read_text())}
PARAMETERS = {"lse": [10.0], "topk": [8.0, 1.0, 3.0, 0.3], "generalized_mean": [1.0, 4.0, 0.3]}
SELF_GUIDING, BAG, BAG_INSTANCE, MIN_MEAN_MAX = range(4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A case. compare.cpp reads the fields in this order. Short lists of labels, weights and mask are repeated."""

    schedule: int
    resident: int  # number of blocks that run concurrently
    multiprocessors: int
    plan: list[int]  # fields of Plan (launch.h); empty: the result of plan_of()
    dtype: int  # float, double, float16, bfloat16
    layout: int
    classes: int
    sizes: list[int]  # of the bags; equal unless the layout is PACKED
    window_rows: int  # rows of the window for the layout WINDOW; they are not adjacent in memory
    wide_offsets: bool
    mask: list[bool]  # empty: none
    labels: list[int]  # 0 unknown, 1 negative, 2 positive
    class_weight: list[float]  # empty: none
    pos_weight: list[float]
    seed: int  # of the logits, which are standard normal numbers times scale plus shift
    scale: float
    shift: float
    round_every: int  # every n-th logit is rounded to an integer (0: none)
    special: list[float]  # values that replace logits at random positions
    delta_l: float
    lam: float
    mask_weight: float
    pooling: int
    pooling_parameter: float
    per_bag: bool
    rescale: bool
    weighted: bool
    loss: int
    grad_output: float

    def line(self) -> str:
        """The case as an input line of compare.cpp."""
        return " ".join(word for field in dataclasses.fields(self) for word in words(getattr(self, field.name)))


def words(value: object) -> Iterator[str]:
    if isinstance(value, list):
        yield str(len(value))
        for element in value:
            yield from words(element)
    else:
        yield repr(value + 0)  # + 0 converts bool to int


def plans(small: bool) -> st.SearchStrategy[list[int]]:
    """Plans that Plan allows. The result must not depend on the plan. Unusual plans test the code for large inputs."""
    blocks = st.integers(1, 3 if small else 9)
    # forward_bits, part_bits, backward_bits, piece_bits, first_part_bits, threads
    undivided = (st.just(0), st.just(0))
    groups = st.tuples(
        st.just(5), st.sampled_from([0, 2, 3]), st.sampled_from([2, 3, 5]), *undivided, st.sampled_from([32, 64, 128])
    )
    for bits in (6, 7):
        threads = st.just(1 << bits)
        groups |= st.tuples(st.just(bits), st.sampled_from([0, 1, 2, 3]), st.just(bits), *undivided, threads)
        divided = (st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2, 3]))
        groups |= st.tuples(st.just(bits), st.just(0), st.just(bits), *divided, threads)
    return st.builds(lambda *members: [*members[0], *members[1:]], groups, blocks, blocks, st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn, small: bool = False) -> Case:
    """``small`` uses few threads, because ThreadSanitizer is slow with many."""
    plan = draw(plans(True) if small else st.just([]) | plans(False))
    dtype = draw(st.integers(0, 3))
    layout = draw(st.integers(MAP, PACKED))
    classes = draw(st.integers(1, 3 if small else 5))
    max_bags = 4 if small else 30
    positions = st.integers(0, 40 if small else 80)
    if not small:  # a sum of two numbers, so that hypothesis can shrink the size of a large bag step by step
        positions = st.builds(lambda few, many: few + 97 * many, positions, st.just(0) | st.integers(4, 30))
    window_rows = 1
    if layout == PACKED:
        sizes = draw(st.lists(positions, min_size=1, max_size=min(max_bags, 9)))
    else:
        if layout == WINDOW:
            window_rows = draw(st.integers(1, 9))
        unit = draw(st.sampled_from([window_rows, 8 * window_rows]))  # 8: rows that are aligned to 16 bytes
        size = draw(positions) // unit * unit
        sizes = [size] * draw(st.integers(1, max_bags if size <= 80 else 4))
    mask = [] if layout == PACKED else draw(st.just([]) | st.lists(st.booleans(), min_size=1, max_size=9))
    loss = draw(st.sampled_from([SELF_GUIDING, SELF_GUIDING, BAG, BAG_INSTANCE, MIN_MEAN_MAX]))
    allowed = ["mean"] if loss == MIN_MEAN_MAX else [n for n in POOLINGS if n != "none" or loss == SELF_GUIDING]
    pooling = draw(st.sampled_from(allowed))
    delta_l = draw(st.sampled_from([0.3, 0.5, 0.123]))
    # mean_logits: a sum of large logits of both signs has no correct digits, so the results cannot be compared
    large = [] if pooling == "mean_logits" else [6e4, -6e4, 88.0, -88.0]
    special = st.sampled_from([0.0, -0.0, *large, math.nan, math.inf, -math.inf])
    weights = st.floats(0.125, 8)
    return Case(
        schedule=draw(st.integers(0, 5)),
        resident=draw(st.integers(1, 4)),
        multiprocessors=draw(st.integers(1, 4)),
        plan=plan,
        dtype=dtype,
        layout=layout,
        classes=classes,
        sizes=sizes,
        window_rows=window_rows,
        wide_offsets=draw(st.booleans()),
        mask=mask,
        labels=draw(st.lists(st.integers(0, 2), min_size=1, max_size=13)),
        class_weight=draw(st.just([]) | st.lists(st.just(0.0) | weights, min_size=1, max_size=3)),
        pos_weight=draw(st.just([]) | st.lists(weights, min_size=1, max_size=3)),
        seed=draw(st.integers(0, 999)),
        scale=draw(st.sampled_from([2.0, 0.1, 0.0])),
        shift=draw(st.just(0.0) | st.floats(-100, 100)),
        # For integer logits, theta may be exactly the threshold 1 / 2, where the loss is discontinuous.
        round_every=0 if delta_l == 0.5 else draw(st.sampled_from([0, 1, 50])),
        special=draw(st.just([]) | st.lists(special, max_size=3)),
        delta_l=delta_l,
        lam=draw(st.sampled_from([1.5, 0.0])),
        mask_weight=draw(st.sampled_from([0.0, 0.7])),
        pooling=POOLINGS[pooling],
        pooling_parameter=draw(st.sampled_from(PARAMETERS.get(pooling, [1.0]))),
        per_bag=draw(st.booleans()) or loss in (BAG_INSTANCE, MIN_MEAN_MAX),
        rescale=draw(st.booleans()),
        weighted=draw(st.booleans()),
        loss=loss,
        grad_output=draw(st.sampled_from([1.0, -3.0])),
    )
