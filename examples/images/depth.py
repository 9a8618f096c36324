"""The bits of grey values."""

from __future__ import annotations


def bits_used(brightest: int) -> int:
    """8, 10, 12, 14 or 16: the smallest number of bits that holds ``brightest``."""
    return max(8, brightest.bit_length() + brightest.bit_length() % 2)
