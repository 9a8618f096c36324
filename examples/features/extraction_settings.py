"""Comparison of the settings of two extractions of features."""

from __future__ import annotations

#: The setting with the centre of the first cell in pixels.
CENTRE = "centre"


def changed_settings(known: dict, given: dict) -> list[str]:
    """The names of the settings that differ.

    The centre of a cell is measured. It depends on the number of threads and on the processor, so it may differ by 0.01
    pixels.
    """

    def equal(name: str) -> bool:
        if name in known and name in given and name == CENTRE:
            return abs(known[name] - given[name]) <= 0.01
        return known.get(name) == given.get(name)

    return [name for name in known | given if not equal(name)]
