"""Earlier values of a metric, and for how long it has been above or below them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

END = 0.2
"""Share of what a metric was before that lies beyond either end of it."""

BEYOND = 0.02
"""Share of an end by which a value has to be beyond it, to count."""


class EarlierSpan(NamedTuple):
    """Observations that :class:`Earlier` spans, the fewest newest ones that it leaves out, and
    after how many it is taken anew."""

    span: int
    lag: int
    block: int


def earlier_span(window: int) -> EarlierSpan:
    """For a table whose baselines span ``window``."""
    block = max(2, window // 8)
    return EarlierSpan(12 * block, 7 * block // 4, block)


class Earlier:
    """What a metric was before its newest observations, and how many of these in a row are
    beyond either end of that.

    ``upper`` and ``lower`` are the ends of ``span`` values, None until all of them are in.
    ``above`` and ``below`` count values in a row.

    Of values that are one like another so many in a row are beyond an end with the probability
    that one is, to the power of how many: a test of runs, which knows no distribution and no
    size (Wald and Wolfowitz, On a test whether two samples are from the same population,
    Annals of Mathematical Statistics 11, 1940).
    """

    __slots__ = (
        "_arrived",
        "_block",
        "_most",
        "_newest",
        "_span",
        "above",
        "below",
        "lower",
        "upper",
    )

    def __init__(self, span: int, lag: int, block: int) -> None:
        self._span = span
        self._block = block
        self._most = lag + block
        self._arrived: deque[float] = deque(maxlen=span)
        self._newest: deque[float] = deque()
        self.upper: float | None = None
        self.lower: float | None = None
        self.above = self.below = 0

    def add(self, value: float) -> None:
        """Take in a finite observation."""
        upper, lower = self.upper, self.lower
        if upper is not None and lower is not None:
            if value > upper:
                self.above += 1
            elif self.above:
                self.above = 0
            if value < lower:
                self.below += 1
            elif self.below:
                self.below = 0
        newest = self._newest
        newest.append(value)
        if len(newest) == self._most:
            self._fold()

    def clear(self) -> None:
        """Begin anew."""
        self._arrived.clear()
        self._newest.clear()
        self.upper = self.lower = None
        self.above = self.below = 0

    @property
    def missing(self) -> int:
        """Observations that are to come until both ends are known."""
        if self.upper is not None:
            return 0
        blocks = -(-(self._span - len(self._arrived)) // self._block)
        return self._most - len(self._newest) + (max(blocks, 1) - 1) * self._block

    def add_row(self, values: Iterable[float]) -> None:
        """As :meth:`add` of one after the other."""
        for value in values:
            self.add(value)

    def _fold(self) -> None:
        """Let the oldest of what is left out be no longer among the newest."""
        arrived, newest, block = self._arrived, self._newest, self._block
        for _ in range(block):
            arrived.append(newest.popleft())
        if len(arrived) == self._span:
            ordered = sorted(arrived)
            place = round(END * (self._span - 1))
            upper, lower = ordered[-1 - place], ordered[place]
            self.upper = upper + BEYOND * abs(upper)
            self.lower = lower - BEYOND * abs(lower)
