"""The losses as specified, computed instance by instance with 60 decimal digits. It shares no code with sgl_ops.

``logits[i][c]`` is the list of the logits of bag i for class c. ``labels[i][c]`` is 0, 1, or None for unknown.
Gradients have the shape of ``logits``. 60 digits suffice for logits up to about |x| = 60.
"""

from __future__ import annotations

from functools import lru_cache

import mpmath
from mpmath import diff, log, mp, mpf, sqrt

mp.dps = 60
TOP_K = 8  # k of the pooling "topk"


# Numerical derivatives evaluate the same exponentials again and again, and every implementation is compared with the
# same values. The precision is a part of the key, because mp.workdps and diff change it.


@lru_cache(1 << 16)
def exp_with(precision, x):
    return mpmath.exp(x)


def exp(x):
    return exp_with(mp.prec, x)


@lru_cache(1 << 16)
def sigmoid_with(precision, x):
    return 1 / (1 + mpmath.exp(-x))


def sigmoid(x):
    return sigmoid_with(mp.prec, x)


def bce(p, target, pos_weight=1):
    """-(1 - t) log(1 - p) - pos_weight t log p."""
    return -(1 - target) * log(1 - p) - pos_weight * target * log(p)


def pooled(name, xs):
    """P of a bag."""
    p = [sigmoid(x) for x in xs]
    n = len(p)
    if name == "max":
        return max(p)
    if name == "min":
        return min(p)
    if name == "mean":
        return sum(p) / n
    if name == "mean_logits":
        return sigmoid(sum(xs) / n)
    if name == "softmax":
        return sum(v * exp(v) for v in p) / sum(exp(v) for v in p)
    if name == "linear_softmax":
        return sum(v * v for v in p) / sum(p)
    if name == "topk":
        largest = sorted(p, reverse=True)[:TOP_K]
        return sum(largest) / len(largest)
    if name == "lse":
        return log(sum(exp(10 * v) for v in p) / n) / 10
    if name == "noisy_or":
        none = mpf(1)
        for v in p:
            none *= 1 - v
        return 1 - none
    if name == "generalized_mean":
        return sum(p) / n  # r = 1
    raise KeyError(name)


def pooled_loss(name, xs, target, pos_weight=1):
    """BCE(P, target) and its gradient. Ties at the extremes share the gradient equally."""
    return pooled_loss_with(mp.prec, name, tuple(xs), target, pos_weight)


@lru_cache(1 << 14)
def pooled_loss_with(precision, name, xs, target, pos_weight):
    loss = bce(pooled(name, xs), target, pos_weight)
    if name in ("max", "min"):
        extreme = max(xs) if name == "max" else min(xs)
        slope = diff(lambda t: bce(sigmoid(t), target, pos_weight), extreme, h=mpf(10) ** -25)
        ties = sum(x == extreme for x in xs)
        return loss, [slope / ties if x == extreme else mpf(0) for x in xs]
    if name == "topk":
        # instances tied at the last place share the remaining places equally
        k = min(TOP_K, len(xs))
        last = sorted(xs, reverse=True)[k - 1]
        left = mpf(k - sum(x > last for x in xs)) / sum(x == last for x in xs)
        slope = diff(lambda v: bce(v, target, pos_weight), pooled(name, xs), h=mpf(10) ** -40)
        weights = [1 if x > last else left if x == last else 0 for x in xs]
        return loss, [slope * w * sigmoid(x) * sigmoid(-x) / k for x, w in zip(xs, weights, strict=True)]
    slopes = [
        diff(lambda t, j=j: bce(pooled(name, [*xs[:j], t, *xs[j + 1 :]]), target, pos_weight), xs[j], h=mpf(10) ** -25)
        for j in range(len(xs))
    ]
    return loss, slopes


def guidance(xs, label, delta_l, rescale=True, weighted=True):
    """(M, part, alpha, w) of a (bag, class) pair. The part is "none" if all instances are equal."""
    p = [sigmoid(x) for x in xs]
    if label == 0:
        return [mpf(0)] * len(xs), ["negative"] * len(xs), mpf(1), mpf(1)
    alpha = max(p) - sorted(p)[(len(p) - 1) // 2]
    weight = mpf(2) ** (alpha - 1) if weighted else mpf(1)
    if rescale and max(xs) == min(xs):
        return [mpf(0)] * len(xs), ["none"] * len(xs), alpha, weight
    targets, parts = [], []
    low, high = min(p), max(p)
    for v in p:
        theta = (v - low) / (high - low) if rescale else v
        if theta < mpf(delta_l):
            targets.append(mpf(0))
            parts.append("negative")
        elif theta > mpf(1.0 - delta_l):
            targets.append(mpf(1))
            parts.append("positive")
        else:
            targets.append(theta)
            parts.append("ambiguous")
    return targets, parts, alpha, weight


def participants(logits, labels):
    return [
        (i, c, [mpf(x) for x in xs], labels[i][c])
        for i, bag in enumerate(logits)
        for c, xs in enumerate(bag)
        if labels[i][c] is not None and len(xs) > 0
    ]


def zeros_like(logits):
    return [[[mpf(0)] * len(xs) for xs in bag] for bag in logits]


def sgl(logits, labels, *, delta_l=0.3, lam=1.0, mask_weight=0.0, pooling="max", normalize="batch", rescale=True,
        weighted=True, class_weight=None, pos_weight=None):  # fmt: skip
    """(total, bag, instance, mask), gradient."""
    gradient = zeros_like(logits)
    pairs = participants(logits, labels)
    n = max(len(pairs), 1)
    guided = [guidance(xs, y, delta_l, rescale, weighted) for _, _, xs, y in pairs]
    bag = instance = mask = mpf(0)
    for (i, c, xs, y), (targets, parts, _, weight) in zip(pairs, guided, strict=True):
        cw = mpf(1 if class_weight is None else class_weight[c])
        pw = mpf(1 if pos_weight is None else pos_weight[c])
        loss, slopes = pooled_loss(pooling, xs, y, pw)
        bag += cw * loss / n
        p = [sigmoid(x) for x in xs]
        inside = [m > 0 for m in targets]
        square = sum((v * keep) ** 2 for v, keep in zip(p, inside, strict=True)) / len(xs)
        root = sqrt(square)
        mask += cw * root / n
        for j, x in enumerate(xs):
            g = cw * slopes[j] / n
            if parts[j] != "none":
                if normalize == "batch":
                    share = mpf(1) / sum(other.count(parts[j]) for _, other, _, _ in guided)
                else:
                    share = mpf(1) / parts.count(parts[j]) / n
                m = targets[j]
                instance += cw * share * weight * bce(p[j], m, pw)
                g += lam * cw * share * weight * ((1 - m) * p[j] - pw * m * sigmoid(-x))
            if inside[j] and mask_weight:
                g += mask_weight * cw / n * p[j] ** 2 * sigmoid(-x) / (len(xs) * root)
            gradient[i][c][j] = g
    return (bag + lam * instance + mask_weight * mask, bag, instance, mask), gradient


def bag_loss(logits, labels, *, pooling="max"):
    gradient = zeros_like(logits)
    pairs = participants(logits, labels)
    total = mpf(0)
    for i, c, xs, y in pairs:
        loss, slopes = pooled_loss(pooling, xs, y)
        total += loss / len(pairs)
        gradient[i][c] = [s / len(pairs) for s in slopes]
    return total, gradient


def bil(logits, labels, *, pooling="mean"):
    gradient = zeros_like(logits)
    pairs = participants(logits, labels)
    total = mpf(0)
    for i, c, xs, y in pairs:
        p = [sigmoid(x) for x in xs]
        pseudo = [1 if v > mpf(1) / 2 and y else 0 for v in p]
        r = sum(bce(v, s) for v, s in zip(p, pseudo, strict=True)) / len(xs)
        slope_r = [(v - s) / len(xs) for v, s in zip(p, pseudo, strict=True)]
        if y:
            b, slope_b = pooled_loss(pooling, xs, y)
            total += (b + (b - r) ** 2) / len(pairs)
            gradient[i][c] = [(sb - 2 * (b - r) * sr) / len(pairs) for sb, sr in zip(slope_b, slope_r, strict=True)]
        else:
            total += r / len(pairs)
            gradient[i][c] = [sr / len(pairs) for sr in slope_r]
    return total, gradient


def mmm(logits, labels):
    gradient = zeros_like(logits)
    pairs = participants(logits, labels)
    total = mpf(0)
    for i, c, xs, y in pairs:
        for pooling, target in (("max", mpf(y)), ("min", mpf(0)), ("mean", mpf(y) / 2)):
            loss, slopes = pooled_loss(pooling, xs, target)
            total += loss / 3 / len(pairs)
            gradient[i][c] = [g + s / 3 / len(pairs) for g, s in zip(gradient[i][c], slopes, strict=True)]
    return total, gradient
