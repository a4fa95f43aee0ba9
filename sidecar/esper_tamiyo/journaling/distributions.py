"""Histograms that cost the answering thread a fraction of a microsecond per value."""

from __future__ import annotations

from bisect import bisect_left
from math import inf

from esper_tamiyo.journaling.notes import Distribution

ANSWER_MS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Bounds for answers, around the trainer's deadline of 5 ms."""

LAG_MS = (1.0, 5.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 10e3, 30e3, 60e3)
"""Bounds for the way from a point's own time to its evaluation."""


class Histogram:
    """Counts of values up to each bound, and one more for what is above all of them."""

    __slots__ = ("_bounds", "_counts", "_highest", "_lowest", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lowest = inf
        self._highest = -inf

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        if value < self._lowest:
            self._lowest = value
        if value > self._highest:
            self._highest = value

    def as_it_stands(self) -> Distribution:
        """A copy to send away; counts are those since the beginning."""
        return Distribution(
            list(self._bounds), list(self._counts), self._total, self._lowest, self._highest
        )

    def at_most(self, share: float) -> float | None:
        """The bound that ``share`` of the values do not exceed, None without values.

        Infinite when they exceed the highest bound.
        """
        count = sum(self._counts)
        if not count:
            return None
        below = 0
        for bound, here in zip(self._bounds, self._counts, strict=False):
            below += here
            if below >= share * count:
                return bound
        return inf
