"""Sparklines: numbers as one line of text, a block for each."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

BLOCKS = "▁▂▃▄▅▆▇█"
BROKEN = "×"
"""Where a value was no finite number."""

_MIDDLE = BLOCKS[3]


def sparkline(values: Sequence[float | None], least: float | None = None) -> str:
    """A block for each value, the least (or ``least``) the lowest; a blank for None.

    Values that are all the same are blocks of middle height.
    """
    known = [value for value in values if value is not None and isfinite(value)]
    most = max(known, default=0.0)
    least = min(known, default=0.0) if least is None else min(least, most)
    return "".join(_block(value, least, most) for value in values)


def _block(value: float | None, least: float, most: float) -> str:
    if value is None:
        return " "
    if not isfinite(value):
        return BROKEN
    if most == least:
        return _MIDDLE
    # Halves first: the difference of two finite numbers may be infinite.
    share = (value / 2 - least / 2) / (most / 2 - least / 2)
    return BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)]
