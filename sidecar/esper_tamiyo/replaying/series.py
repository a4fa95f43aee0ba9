"""Series: many values in few characters, as a test of a table writes them.

Words separated by blanks, each one or more values of a metric, step by step:

======== =====================================================================
``4``    the value
``4x20`` the value twenty times
``1+2x3`` ``1 3 5``: three values that rise by 2; ``1-2x3`` falls
``_``    no value; ``_x5`` none five times
``nan``  a value that was measured and is not finite, also ``inf``, ``-inf``
======== =====================================================================

The notation is promtool's but for one thing: ``xN`` is always N values, where promtool's
``4x20`` is twenty-one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Value = float | None
"""None is no value."""

MAX_VALUES = 100_000
"""In one series; a test is something that a person reads."""

_FINITE = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_WORD = re.compile(
    rf"(?:(_)|({_FINITE}|[+-]?inf|nan)(?:([+-])({_FINITE}))?)(?:x(\d{{1,9}}))?",
    re.IGNORECASE | re.ASCII,
)


class SeriesError(ValueError):
    """A word that is none of the notation's."""


def series(text: str) -> list[Value]:
    """The values that ``text`` stands for; raises :class:`SeriesError`."""
    values: list[Value] = []
    for word in text.split():
        match = _WORD.fullmatch(word)
        if match is None:
            raise SeriesError(
                f"expected values like 4, 4x20, 1+0.5x10, _ or nan; got {word[:60]!r}"
            )
        gap, start, sign, slope, times = match.groups()
        if slope and not times:
            raise SeriesError(
                f"{word!r} does not say how often: expected {word}x10 or the like"
            )
        count = int(times or 1)
        if not 0 < count <= MAX_VALUES - len(values):
            raise SeriesError(f"{word!r} makes {count:,} values; expected 1 to {MAX_VALUES:,}")
        if gap:
            values += [None] * count
        else:
            rise = float(slope or 0) * (-1 if sign == "-" else 1)
            values += _ramp(float(start), rise, count)
    return values


def _ramp(start: float, rise: float, count: int) -> Iterator[float]:
    return (start + place * rise for place in range(count))
