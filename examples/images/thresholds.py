"""Thresholds of a command line: a probability, a fraction of the map's maximum, or chosen with validation labels."""

from __future__ import annotations

import argparse

#: The option value for a threshold that is chosen with the labels of the validation images.
VALIDATION = "validation"
#: The two ways to place the cells of a map on the image.
RASTERS = ("network", "even")


class Relative(float):
    """A threshold as a fraction of the map's maximum, 0 <= share < 1. Written ``0.5max``."""

    def __repr__(self) -> str:
        return f"{float(self):g}max"

    __str__ = __repr__


#: The relative threshold that every evaluation reports in separate rows.
HALF = Relative(0.5)


def shown(value: float) -> str:
    """A threshold as text. A probability below 1 that three digits would round to 1 is shown as ``1 - 3.4e-05``."""
    if isinstance(value, Relative):
        return str(value)
    text = f"{value:.3g}"
    return f"1 - {1 - value:.2g}" if value < 1 and float(text) == 1 else text


def probability(text: str, labels: bool = True) -> float | str:
    """For argparse: a probability below 1, or ``validation`` if there are ``labels``."""
    if labels and text == VALIDATION:
        return text
    return share(text, f"a probability below 1{f', or {VALIDATION}' if labels else ''}")


def map_threshold(text: str, labels: bool = True) -> float | str:
    """For argparse: a probability below 1, a fraction of the map's maximum such as ``0.5max``, or ``validation``.

    ``labels``: whether ``validation`` is possible.
    """
    if labels and text == VALIDATION:
        return text
    choices = ["a probability below 1", f"a fraction of the maximum such as {HALF}", *([VALIDATION] if labels else [])]
    expected = f"{', '.join(choices[:-1])}{',' if labels else ''} or {choices[-1]}"
    if text.endswith("max"):
        return Relative(share(text, expected, "max"))
    return share(text, expected)


def threshold_text(text: str) -> str:
    """For argparse: a threshold of :func:`map_threshold` without labels, as text, which a JSON file can hold."""
    return str(map_threshold(text, labels=False))


def share(text: str, expected: str, suffix: str = "") -> float:
    """For argparse: the number of at least 0 and below 1 in ``text``, which ends with ``suffix``."""
    try:
        value = float(text.removesuffix(suffix))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
