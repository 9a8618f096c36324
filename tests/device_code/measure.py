"""Counts the instructions of forward and backward on interpreted machine code. Prints them per element as JSON.

    measure.py '{"architecture": "90", "multiprocessors": 132, "shape": [32, 14, 256], "packed": false,
                 "dtype": "float32", "positives": 0.05, "settings": {}, "profile": null}'

"launches" has the counts of each launch, which are not per element.

A shape is (N, C, L); packed bags have L instances each. The counts of "other" memory include the gradient, which
backward allocates itself. ``profile`` is a path for the issue counts of every instruction.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import interpreter
import torch

from sgl_ops import SGLLoss


def per_element(n: int) -> dict[str, Any]:
    """The counts since the last reset per element. "issued" counts 32 lanes for each instruction of a warp."""
    counts = interpreter.counts()
    memory = counts["memory"]
    stored = [memory[tag, "store"] for tag in ("other", "grad")]
    return {
        "blocks": counts["blocks"],
        "elements": n,
        "launches": interpreter.launches(),
        "active": counts["lane"] / n,
        "issued": counts["warp"] * 32 / n,
        "by_class": {name: count * 32 / n for name, count in counts["by_class"].items()},
        "branches": counts["branches"] * 32 / n,
        "loads": {key: value / n for key, value in memory["logits", "load"].items()},
        "stores": {key: sum(count[key] for count in stored) / n for key in stored[0]},
        "shared_waves": counts["shared_waves"] / n,
    }


def main() -> None:
    case = json.loads(sys.argv[1])
    interpreter.load(case["architecture"], "sass", case["multiprocessors"])
    interpreter.set_options(races=False)
    interpreter.replace_fused_kernels()
    torch.manual_seed(0)
    bags, classes, length = case["shape"]
    shape = (bags * length, classes) if case["packed"] else (bags, classes, length)
    x = torch.randn(shape).to(getattr(torch, case["dtype"])).requires_grad_()
    offsets = torch.arange(0, bags * length + 1, length) if case["packed"] else None
    positive = torch.zeros(bags * classes)
    positive[torch.randperm(bags * classes)[: round(case["positives"] * bags * classes)]] = 1
    interpreter.mark(x, "logits")
    result: dict[str, Any] = {}
    interpreter.reset_counts()
    criterion = SGLLoss(impl="fused", check=False, **case["settings"])
    loss = criterion(x, positive.view(bags, classes), offsets=offsets)
    result["forward"] = per_element(x.numel())
    interpreter.reset_counts()
    loss.backward()
    result["backward"] = per_element(x.numel())
    if case["profile"]:
        interpreter.write_profile(case["profile"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
