"""Runs the loss on interpreted device code and compares it with the reference in float64 on the same logits.

    device_cases.py ARCHITECTURE ptx|sass [--quick] [--policy P] [--resident N] [--seed S] [--ulp U]
                    [--multiprocessors M] [--only TEXT] [--first-failure]

It prints a line for each case: the relative error of the loss, and the largest error of the gradient relative to its
largest element. For float16 and bfloat16, the gradient's error is the part that exceeds its rounding to that type. The
exit status is 1 if a case fails. With few multiprocessors, each warp processes several pairs, which tests the barriers
between pairs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import interpreter
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from batches import settled

from sgl_ops import BagLoss, BILLoss, MMMLoss, SGLLoss
from sgl_ops.pooling import GeneralizedMeanPooling, TopKPooling

#: Every pooling of the operators, as an argument of the losses.
POOLINGS = {
    **{name: name for name in ("max", "mean", "mean_logits", "softmax", "linear_softmax", "lse", "noisy_or")},
    "topk": TopKPooling(5),
    "topk of 30%": TopKPooling(0.3),
    "generalized_mean": GeneralizedMeanPooling(3.0),
}
HALF_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Errors of the loss, and of the gradient relative to its largest element, in units of the epsilon of the arithmetic.
LOSS_BOUND, GRADIENT_BOUND = 64, 128


@dataclass
class Case:
    """``logits`` may have any layout; ``factor`` multiplies both bounds; ``large`` leaves the case out of --quick."""

    name: str
    logits: Tensor
    targets: Tensor
    mask: Tensor | None = None
    offsets: Tensor | None = None
    factor: float = 1.0
    large: bool = False
    loss: type[nn.Module] = SGLLoss
    settings: dict[str, Any] = field(default_factory=dict)


def labels(bags: int, classes: int, share: float, unknown: float = 0.0) -> Tensor:
    """Random labels with a share of positive ones, at least one, and a share of unknown ones."""
    y = (torch.rand(bags, classes) < share).float()
    if share > 0:
        y.view(-1)[0] = 1
    y[torch.rand(bags, classes) < unknown] = math.nan
    return y


def cases() -> Iterator[Case]:
    def case(name: str, logits: Tensor, targets: Tensor, **others: Any) -> Case:
        fields = {key: others.pop(key) for key in ("mask", "offsets", "factor", "large", "loss") if key in others}
        return Case(name, logits, targets, **fields, settings=others)

    # ---- maps
    for share in (0.05, 0.5):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = f"map 32x14x256 {str(dtype)[6:]} {share:.0%}"
            yield case(name, torch.randn(32, 14, 16, 16).to(dtype), labels(32, 14, share), mask_weight=0.5)
    yield case("map 8x14x256 float64", torch.randn(8, 14, 256).double(), labels(8, 14, 0.5), mask_weight=0.5)
    x = torch.randn(4, 3, 64, 64)
    yield case("map 4x3x4096 float32 softmax", x, labels(4, 3, 0.5), mask_weight=0.5, pooling="softmax")
    yield case("map 4x3x4096 bfloat16 softmax", x.bfloat16(), labels(4, 3, 0.5), pooling="softmax", lam=20.0)
    x = settled(torch.randn(1, 1, 70000))  # in so many logits, rounding would decide for one
    yield case("map 1x1x70000", x, torch.ones(1, 1), mask_weight=0.5, pooling="noisy_or", factor=4)
    yield case("map 64x100x64", torch.randn(64, 100, 8, 8), labels(64, 100, 0.05, 0.1), large=True)

    # ---- packed bags
    sizes = [1, 2, 31, 32, 33, 1000, 5000, 0, 3]
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    for classes in (1, 4, 5):
        for dtype, index in (
            (torch.float32, torch.int64),
            (torch.float32, torch.int32),
            (torch.bfloat16, torch.int64),
            (torch.float16, torch.int64),
        ):
            name = f"packed {classes} classes {str(dtype)[6:]}, offsets {str(index)[6:]}"
            x, y = torch.randn(int(offsets[-1]), classes).to(dtype), labels(len(sizes), classes, 0.5)
            yield case(name, x, y, offsets=offsets.to(index), mask_weight=0.5, pooling="mean")
        # rows that begin anywhere, and the loops of backward for max pooling
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, y = torch.randn(int(offsets[-1]), classes).to(dtype), labels(len(sizes), classes, 0.5, 0.2)
            yield case(f"packed {classes} classes {str(dtype)[6:]}, max", x, y, offsets=offsets, mask_weight=0.5)
    many = torch.cat((torch.zeros(1), torch.randint(0, 2000, (299,)).sort().values, torch.tensor([2000]))).long()
    yield case("packed, 300 small bags", torch.randn(2000), labels(300, 1, 0.5)[:, 0], offsets=many, pooling="lse")
    x = torch.randn(5000, 6)[:, ::2]
    yield case("packed, rows with a stride", x, labels(1, 3, 1.0), offsets=torch.tensor([0, 5000]))

    # ---- several pairs of few instances in a warp
    for size in (1, 7, 8, 9, 49, 128):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, y = torch.randn(21, 3, size).to(dtype), labels(21, 3, 0.3, 0.2)
            yield case(f"short pairs 21x3x{size} {str(dtype)[6:]}", x, y, mask_weight=0.5)
    for size in (129, 300, 512):
        yield case(f"pairs of parts of a warp 34x3x{size}", torch.randn(34, 3, size), labels(34, 3, 0.1, 0.1))
    for size, bags in ((3, 34), (49, 34), (64, 34), (100, 66), (256, 66)):
        yield case(f"pairs of four lanes {bags}x3x{size}", torch.randn(bags, 3, size), labels(bags, 3, 0.1, 0.1))
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.randn(34, 3, 64).to(dtype)
        yield case(f"pairs of four lanes 34x3x64 {str(dtype)[6:]}", x, labels(34, 3, 0.1), mask_weight=0.5)
    x, y, mask = torch.randn(21, 3, 50), labels(21, 3, 0.3, 0.2), torch.rand(21, 50) < 0.4
    mask[4] = False
    yield case("short pairs with a mask", x, y, mask=mask, mask_weight=0.5)
    yield case("short pairs, none positive", x, torch.zeros(21, 3))
    yield case("short pairs, all positive", x, torch.ones(21, 3), mask_weight=0.5)
    yield case("short pairs, mean", x, y, pooling="mean")
    for loss in (BagLoss, BILLoss):
        yield case(f"short pairs {loss.__name__}", x, y, loss=loss)
    x = x.clone()
    x[0, 0, 3], x[1, 1, 4], x[2, 2, 5] = math.nan, math.inf, -math.inf
    yield case("short pairs, NaN and infinities", x, y)
    x = torch.randn(21, 3, 7, 7).contiguous(memory_format=torch.channels_last)
    yield case("short pairs, channels_last", x, y)
    bounds = torch.cat((torch.zeros(1), torch.randint(0, 1500, (29,)).sort().values, torch.tensor([1500]))).long()
    yield case("short pairs, packed", torch.randn(1500, 2), labels(30, 2, 0.3), offsets=bounds, mask_weight=0.5)

    # ---- padded bags and other layouts
    mask = torch.rand(7, 101) < 0.7
    mask[3:5] = False
    mask[4, 50] = True
    for name, pooling in POOLINGS.items():
        x, y = torch.randn(7, 3, 101), labels(7, 3, 0.5)
        yield case(f"padded 7x3x101 {name}", x, y, mask=mask, pooling=pooling, mask_weight=0.5)
    x = torch.randn(7, 3, 101)
    x[(~mask)[:, None].expand_as(x)] = math.nan
    yield case("padded, NaN in the padding", x, labels(7, 3, 0.5), mask=mask, mask_weight=0.5)
    x, y = torch.randn(3, 2, 2000).bfloat16(), labels(3, 2, 0.5)
    yield case("padded 3x2x2000 bfloat16", x, y, mask=torch.rand(3, 2000) < 0.5)
    x, y, mask = torch.randn(3, 2, 20, 30), labels(3, 2, 0.5), torch.rand(3, 20, 30) < 0.5
    yield case("map with a mask", x, y, mask=mask, pooling="softmax")
    x = torch.randn(4, 5, 12, 12).contiguous(memory_format=torch.channels_last)
    yield case("channels_last 4x5x12x12", x, labels(4, 5, 0.5), pooling="linear_softmax")
    x = torch.randn(2, 3, 40, 40).half().contiguous(memory_format=torch.channels_last)
    yield case("channels_last 2x3x40x40 float16", x, labels(2, 3, 0.5))
    x, y = torch.randn(3, 2, 40, 40), labels(3, 2, 0.5)
    yield case("a window of a map", x[:, :, 3:19, 5:38], y, mask_weight=0.5)
    yield case("a window of a map bfloat16", x.bfloat16()[:, :, 3:19, 5:38], y)
    for offset in (1, 2, 3):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4 * 3 * 256 + offset).to(dtype)[offset:].view(4, 3, 256)
            yield case(f"storage offset {offset} {str(dtype)[6:]}", x, labels(4, 3, 0.5), mask_weight=0.5)
    for size in (1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 255, 257, 511, 512, 513, 1027):
        x, y = torch.randn(5, 3, size), labels(5, 3, 0.5)
        yield case(f"odd rows {size} float32", x, y, pooling="mean")
        yield case(f"odd rows {size} float32 max", x, labels(5, 3, 0.5, 0.2), mask_weight=0.5)
        yield case(f"odd rows {size} bfloat16", x.bfloat16(), y)
    yield case("one class 9x50", torch.randn(9, 50), labels(9, 1, 0.5)[:, 0], pooling="noisy_or")
    yield case("transposed map", torch.randn(3, 2, 40, 30).transpose(2, 3), labels(3, 2, 0.5))
    yield case("expanded classes", torch.randn(3, 1, 50).expand(3, 2, 50), labels(3, 2, 0.5))
    yield case("permuted volume", torch.randn(2, 2, 7, 5, 6).permute(0, 1, 3, 4, 2), labels(2, 2, 0.5))

    # ---- settings
    weights = {"class_weight": [0.5, 2.0, 0.0], "pos_weight": [3.0, 0.25, 1.0]}
    for shape in ((6, 3, 77), (2, 3, 700)):
        x, y = torch.randn(shape), labels(shape[0], 3, 0.5, 0.1)
        for name, pooling in POOLINGS.items():
            for normalize in ("batch", "bag"):
                for rescale in (True, False):
                    settings = {"pooling": pooling, "normalize": normalize, "rescale": rescale, **weights}
                    settings |= {"weighted": rescale == (normalize == "batch"), "mask_weight": 0.5}
                    yield case(f"{shape[0]}x3x{shape[2]} {name} {normalize} rescale={rescale:d}", x, y, **settings)
    yield case("delta 0.5", torch.randn(5, 3, 100), labels(5, 3, 0.5), delta_l=0.5)
    yield case("delta 0", torch.randn(5, 3, 100), labels(5, 3, 0.5), delta_l=0.0)
    for name, pooling in POOLINGS.items():
        x, y = torch.randn(4, 2, 100).double(), labels(4, 2, 0.5).double()
        yield case(f"float64 {name}", x, y, pooling=pooling, mask_weight=0.3, factor=16)

    # ---- other losses
    for shape in ((6, 3, 77), (2, 3, 700)):
        for loss in (BagLoss, BILLoss):
            for name in ("max", "mean", "lse", "topk"):
                x, y, pooling = torch.randn(shape), labels(shape[0], 3, 0.5), POOLINGS[name]
                yield case(f"{loss.__name__} {shape[0]}x3x{shape[2]} {name}", x, y, loss=loss, pooling=pooling)
        x = torch.randint(-9, 10, shape) / 4
        yield case(f"MMMLoss {shape[0]}x3x{shape[2]}", x, labels(shape[0], 3, 0.5), loss=MMMLoss)

    # ---- labels
    yield case("NaN labels", torch.randn(30, 4, 40), labels(30, 4, 0.4, 0.5), mask_weight=0.5)
    yield case("all labels unknown", torch.randn(3, 4, 40), torch.full((3, 4), math.nan))
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float64):
        unknown = 0.2 if dtype.is_floating_point else 0.0
        yield case(f"targets of {str(dtype)[6:]}", torch.randn(6, 2, 40), labels(6, 2, 0.5, unknown).to(dtype))

    # ---- values of the logits
    constant = torch.randn(6, 2, 40)
    constant[:3] = constant[:3, :, :1]
    for name, pooling in POOLINGS.items():
        yield case(f"constant bags {name}", constant, labels(6, 2, 0.6), pooling=pooling, mask_weight=0.5)
    yield case("constant bags, rescale=False", constant, labels(6, 2, 0.6), rescale=False, mask_weight=0.5)
    for scale in (1e4, -1e4, 90.0, -90.0):
        for name, pooling in POOLINGS.items():
            # at 1e4 a float32 logit has three digits after the point, and sums of logits cancel
            x, y = torch.randn(4, 2, 60) + scale, labels(4, 2, 0.5)
            yield case(f"logits near {scale:g} {name}", x, y, pooling=pooling, mask_weight=0.5, factor=8)
    x = torch.randn(4, 2, 600) * 1e4
    for name, pooling in POOLINGS.items():
        yield case(f"logits up to 1e4 of both signs {name}", x, labels(4, 2, 0.5), pooling=pooling, factor=8)
    yield case("logits up to 6e4 of both signs float16", x.half(), labels(4, 2, 0.5))
    x = torch.randn(6, 3, 50)
    x[0, 0, 3], x[1, 1, 4], x[2, 2, 5] = math.nan, math.inf, -math.inf
    yield case("NaN and infinities", x, labels(6, 3, 0.5))
    yield case("NaN and infinities bfloat16", x.bfloat16(), labels(6, 3, 0.5))
    x = torch.randint(-3, 4, (4, 3, 300)).float()
    yield case("ties", x, labels(4, 3, 0.5), delta_l=0.123, mask_weight=0.5)
    x = torch.randn(4, 3, 30)
    x[x.abs() < 0.7] = 0.0
    x[:, :, ::3] *= -1.0
    yield case("zeros of both signs", x, labels(4, 3, 0.5), delta_l=0.123)
    x = torch.randn(4, 3, 600).clamp(min=0)
    x[:, :, ::3] = torch.where(x[:, :, ::3] == 0, -0.0, x[:, :, ::3])
    yield case("zeros of both signs are the smallest", x, labels(4, 3, 0.5), delta_l=0.123)
    # approximate instructions flush subnormal numbers to zero: the loss is exact, theta is not
    yield case("subnormal logits", torch.randn(4, 3, 30) * 1e-39, labels(4, 3, 0.5), delta_l=0.123, factor=1e6)
    yield case("no instances", torch.randn(3, 2, 0), labels(3, 2, 0.5))


def check(case: Case) -> tuple[bool, str]:
    """Returns whether the case agrees with the reference, and a message to print."""
    settings, inputs = case.settings, {"mask": case.mask, "offsets": case.offsets}
    exact = case.logits.detach().double().requires_grad_()
    expected = case.loss(impl="reference", check=False, **settings).double()(exact, case.targets.double(), **inputs)
    (3 * expected).backward()
    fused = case.loss(impl="fused", check=False, **settings)
    if case.logits.dtype == torch.float64:
        fused = fused.double()
    try:
        x = case.logits.detach().requires_grad_()
        loss = fused(x, case.targets, **inputs)
        (3 * loss).backward()
        again = fused(case.logits.detach(), case.targets, **inputs)
    except RuntimeError as error:
        return False, f"ERROR {str(error)[:300]}"

    epsilon = torch.finfo(loss.dtype).eps
    problems = []
    if expected.isnan():
        loss_error = 0.0 if loss.isnan() else math.inf
    else:
        loss_error = abs(loss.item() - expected.item()) / max(abs(expected.item()), 1e-30)
    if not loss_error <= LOSS_BOUND * epsilon * case.factor:
        problems.append(f"loss {loss.item()} instead of {expected.item()}")
    if not torch.equal(loss.detach().nan_to_num(nan=-1.0), again.nan_to_num(nan=-1.0)):
        problems.append("a second run gives other bits")
    assert exact.grad is not None and x.grad is not None
    right, gradient = exact.grad, x.grad.double()
    if not torch.equal(right.isnan(), gradient.isnan()):
        problems.append("NaN at other places")
    finite = right.isfinite() & gradient.isfinite()
    rounding = HALF_ROUNDING.get(case.logits.dtype, 0.0) * 1.01 * right.abs()
    if case.logits.dtype == torch.float16:
        rounding = rounding + 6e-8  # a subnormal number of float16
    excess = torch.where(finite, (gradient - right).abs() - rounding, 0.0).clamp(min=0)
    largest = right[finite].abs().max().item() if finite.any() else 0.0
    gradient_error = excess.max().item() / largest if largest > 0 else 0.0
    beyond = int((excess > GRADIENT_BOUND * epsilon * case.factor * largest).sum())
    if beyond:
        problems.append(f"{beyond} elements of the gradient are wrong")
    return not problems, "  ".join([f"loss {loss_error:8.1e}  gradient {gradient_error:8.1e}", *problems])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture")
    parser.add_argument("kind", choices=["ptx", "sass"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--policy", type=int, default=0)
    parser.add_argument("--resident", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ulp", type=int, default=0)
    parser.add_argument("--multiprocessors", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--first-failure", action="store_true", help="stop there")
    options = parser.parse_args()
    interpreter.load(options.architecture, options.kind, options.multiprocessors)
    interpreter.set_options(options.policy, options.resident, options.seed, True, options.ulp)
    interpreter.replace_fused_kernels()
    torch.manual_seed(0)
    ran, failures = 0, []
    for case in cases():
        if options.only not in case.name or (options.quick and case.large):
            continue
        if case.logits.dtype not in interpreter.DTYPES:
            continue
        ran += 1
        passed, message = check(case)
        print(f"{case.name:56s} {message}{'' if passed else '  FAILED'}", flush=True)
        if not passed:
            failures.append(case.name)
            if options.first_failure:
                break
    counts = interpreter.counts()
    print(f"{ran} cases, {len(failures)} failed; {counts['lane'] / 1e6:.0f} M lane instructions")
    return int(bool(failures) or ran == 0)


if __name__ == "__main__":
    sys.exit(main())
