"""Charts: curves as characters. Braille has two columns and four rows of dots in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esper_otel.leyline.terminal import BLOCKS
from esper_otel.report.curves import Points
from esper_otel.report.layouts import Numbers, Times

_BLANK = 0x2800
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""What each dot of a braille character adds to it (Unicode 15, block U+2800)."""

ASCII = str.maketrans(
    {
        **{chr(code): " " if code == _BLANK else "*" for code in range(_BLANK, _BLANK + 0x100)},
        **dict(zip(BLOCKS, "._-=+*#@", strict=True)),
        **dict(zip("→▲▸×…←↑↓", ">^>x.<^v", strict=True)),
    }
)
"""For terminals without these characters."""


def without_braille(encoding: str | None) -> bool:
    """Whether an encoding lacks what charts are drawn with."""
    try:
        "⣿▁→".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


_ENOUGH = 4096
"""Values that means are made of, at most about twice that."""


class StepRange(NamedTuple):
    """The steps that a chart shows: from the first to the last, both included."""

    first: int
    last: int

    def column_of(self, step: int, columns: int) -> int:
        """In which of so many columns a step lies."""
        return (step - self.first) * (columns - 1) // max(self.last - self.first, 1)


class Drawn(NamedTuple):
    """A curve as lines of braille, and the values at its lower and its upper edge."""

    lines: list[str]
    low: float
    high: float


def within(points: Points, span: StepRange) -> Points:
    """The points whose steps lie in ``span``."""
    start, end = np.searchsorted(points.steps, [span.first, span.last + 1])
    return Points(points.steps[start:end], points.values[start:end])


def braille(
    points: Points, span: StepRange, columns: int, rows: int, *, log: bool
) -> Drawn | None:
    """Draw a curve; each column of dots from the least to the greatest value in it.

    On a logarithmic scale what is not above 0 is left out. None where nothing is left.
    """
    steps, values = within(points, span)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(values > 0, np.log10(values), np.nan)
    finite = np.isfinite(values)
    if not finite.any():
        return None
    low, high = float(values[finite].min()), float(values[finite].max())
    dots = 2 * columns
    place = (steps - span.first) * (dots - 1) // max(span.last - span.first, 1)
    lows, highs = _extremes(place[finite], values[finite], dots)
    gaps = np.zeros(dots, np.bool_)
    gaps[place[~finite]] = True
    _bridge(lows, highs, gaps & np.isnan(lows))
    height = 4 * rows
    scale = (height - 1) / (high - low) if high > low else 0.0
    base = low if high > low else low - (height // 2)
    scale = scale or 1.0
    with np.errstate(invalid="ignore"):
        start, end = np.round((lows - base) * scale), np.round((highs - base) * scale)
        _join(start, end)
        level = np.arange(height - 1, -1, -1)[:, None]
        grid = (level >= start) & (level <= end)
    codes = (grid.reshape(rows, 4, columns, 2) * _DOTS[None, :, None, :]).sum(axis=(1, 3))
    lines = ["".join(map(chr, row)) for row in (codes + _BLANK).tolist()]
    return Drawn(lines, 10**low if log else low, 10**high if log else high)


def _extremes(place: Times, values: Numbers, dots: int) -> tuple[Numbers, Numbers]:
    """The least and the greatest value in each column of dots, NaN where there is none."""
    lows, highs = np.full(dots, np.nan), np.full(dots, np.nan)
    starts = np.flatnonzero(np.append(True, place[1:] != place[:-1]))
    lows[place[starts]] = np.minimum.reduceat(values, starts)
    highs[place[starts]] = np.maximum.reduceat(values, starts)
    return lows, highs


def _bridge(lows: Numbers, highs: Numbers, gaps: np.ndarray) -> None:
    """Give columns between two points a line between these, but for those in a gap."""
    known = np.flatnonzero(~np.isnan(lows))
    empty = np.flatnonzero(np.isnan(lows))
    right = np.searchsorted(known, empty)
    inside = (right > 0) & (right < len(known))
    empty, right = empty[inside], right[inside]
    if len(empty):
        crossed = np.cumsum(gaps)
        empty = empty[crossed[known[right]] == crossed[known[right - 1]]]
        middle = (lows[known] + highs[known]) / 2
        lows[empty] = highs[empty] = np.interp(empty, known, middle)


def _join(start: Numbers, end: Numbers) -> None:
    """Have each column of dots, filled from ``start`` to ``end``, reach its neighbours."""
    with np.errstate(invalid="ignore"):
        rises, falls = start[1:] - end[:-1] > 1, start[:-1] - end[1:] > 1
    middle = (end[:-1] + start[1:]) // 2
    fallen = (start[:-1] + end[1:]) // 2
    end[:-1][rises], start[1:][rises] = middle[rises], middle[rises] + 1
    start[:-1][falls], end[1:][falls] = fallen[falls] + 1, fallen[falls]


def means(points: Points, span: StepRange, columns: int) -> list[float | None]:
    """Means of equal parts of the steps, of an even choice of the values where there are many;
    None where there is none."""
    steps, values = within(points, span)
    every = len(steps) // _ENOUGH + 1
    steps, values = steps[::every], values[::every]
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    place = (steps - span.first) * columns // (span.last - span.first + 1)
    counts = np.bincount(place, minlength=columns)
    sums = np.bincount(place, values, columns)
    return [
        float(total / count) if count else None
        for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def filled(values: Sequence[float | None]) -> list[float | None]:
    """Gaps between two values take that on their left: few steps are no dotted line."""
    found: list[float | None] = []
    last = max((place for place, value in enumerate(values) if value is not None), default=-1)
    for place, value in enumerate(values):
        found.append(found[-1] if value is None and found and place < last else value)
    return found
