"""Observations: the stored past of one value: medians, extremes, last ones, slopes.

Each is told one finite observation after the other; the medians, and what is cheap to tell
of many at once, also a row of them, with what one after the other gives.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from math import inf

_MARGIN = 1.0 + 1e-9
"""For rounding: what is this near to the bound is worked out."""


class RollingMedian:
    """Median of the last ``window`` observations, None until ``warmup`` of them are in."""

    __slots__ = ("_arrived", "_ordered", "_warmup", "_window", "value")

    def __init__(self, window: int, warmup: int) -> None:
        self._window = window
        self._warmup = warmup
        self._arrived: deque[float] = deque()
        self._ordered: list[float] = []
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take in a finite observation; the oldest leaves when the window is full."""
        ordered, arrived = self._ordered, self._arrived
        if len(ordered) == self._window:
            oldest = arrived.popleft()
            arrived.append(value)
            if value == oldest:  # what stands still, as a learning rate, has the same median
                return
            del ordered[bisect_left(ordered, oldest)]
        else:
            arrived.append(value)
        insort(ordered, value)
        count = len(ordered)
        if count < self._warmup:
            return
        middle = count >> 1
        if count & 1:
            self.value = ordered[middle]
        else:
            low, high = ordered[middle - 1], ordered[middle]
            self.value = low + (high - low) / 2

    def add_row(self, values: Sequence[float]) -> None:
        """Take in a row of observations."""
        arrived, ordered = self._arrived, self._ordered
        if len(ordered) == self._window and (
            ordered[0] == ordered[-1] and values.count(ordered[0]) == len(values)
        ):  # it stands still
            return
        arrived.extend(values)
        for _ in range(len(arrived) - self._window):
            arrived.popleft()
        ordered = self._ordered = sorted(arrived)
        count = len(ordered)
        if count >= self._warmup:
            self.value = _middle(ordered)

    def add_row_and_tell(self, values: Sequence[float]) -> tuple[float, float] | None:
        """As :meth:`add_row`; the lowest and the highest median on the way, or None."""
        arrived, ordered, window = self._arrived, self._ordered, self._window
        warmup, medians = self._warmup, []
        count = len(ordered)
        for value in values:
            arrived.append(value)
            insort(ordered, value)
            if count < window:
                count += 1
            else:
                del ordered[bisect_left(ordered, arrived.popleft())]
            if count >= warmup:
                medians.append(_middle(ordered))
        if not medians:
            return None
        self.value = medians[-1]
        return min(medians), max(medians)

    def range_on_the_way(self, values: Sequence[float]) -> tuple[float, float] | None:
        """The least and the most that a median can be while ``values`` come, by the order of
        all; None where nothing bounds it.

        Whichever of them a window holds, so many are below its middle, and so many above.
        """
        count = len(self._ordered)
        if count < self._window:
            return None
        every = sorted((*self._arrived, *values))
        return every[(count - 1) >> 1], every[(count >> 1) + len(values)]

    def range_in(self, steps: int) -> tuple[float, float] | None:
        """The least and the most that the median can be until ``steps`` more are in, whatever
        they are; None where that cannot be said.

        Each takes one value's place, and so moves the order by one place at most.
        """
        ordered = self._ordered
        count = len(ordered)
        first = ((count - 1) >> 1) - steps
        if count < self._window or first < 0:
            return None
        low, high = ordered[first], ordered[(count >> 1) + steps]
        return (low, high) if high - low < inf else None

    def clear(self) -> None:
        """Begin anew."""
        self._arrived.clear()
        self._ordered.clear()
        self.value = None


def _middle(ordered: Sequence[float]) -> float:
    middle = len(ordered) >> 1
    if len(ordered) & 1:
        return ordered[middle]
    low, high = ordered[middle - 1], ordered[middle]
    return low + (high - low) / 2


class FrozenMedian:
    """Median of the first ``window`` observations after ``warmup``, then kept; None until
    all of them are in."""

    __slots__ = ("_missing", "_rolling", "_skip", "_spans", "value")

    def __init__(self, window: int, warmup: int) -> None:
        self._spans = (window, warmup)
        self._rolling = RollingMedian(window, window)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._missing, self._skip = self._spans
        self._rolling.clear()
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take in a finite observation, if it is still one of the first."""
        if self._skip:
            self._skip -= 1
        elif self._missing:
            self._missing -= 1
            self._rolling.add(value)
            self.value = self._rolling.value

    def range_in(self, steps: int) -> tuple[float, float] | None:
        """As of a rolling median; None until the median is kept."""
        value = self.value
        return None if value is None else (value, value)


class Extreme:
    """The lowest, or highest, that a rolling median has ever been; None during warm-up."""

    __slots__ = ("_better", "_rolling", "value")

    def __init__(self, rolling: RollingMedian, better: Callable[[float, float], float]) -> None:
        self._rolling = rolling
        self._better = better
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Look at the rolling median after it took in ``value``."""
        median = self._rolling.value
        if median is not None:
            self.value = median if self.value is None else self._better(self.value, median)

    def may_move(self, medians: tuple[float, float] | None) -> bool:
        """Whether one of the medians in that range may be a new one."""
        value = self.value
        if value is None or medians is None:
            return True
        return self._better(self._better(value, medians[0]), medians[1]) != value

    def reach(self, low: float, high: float) -> None:
        """Look at all medians from ``low`` to ``high``."""
        best = self._better(low, high)
        self.value = best if self.value is None else self._better(self.value, best)

    def range_in(self, steps: int) -> tuple[float, float] | None:
        """As of a rolling median, which it follows on one side."""
        value, medians = self.value, self._rolling.range_in(steps)
        if value is None or medians is None:
            return None
        reached = [self._better(value, median) for median in medians]
        return min(value, *reached), max(value, *reached)

    def clear(self) -> None:
        """Begin anew."""
        self.value = None


class Last:
    """The last observation, how often in a row it came, how many came in all, and how
    many frames have been without one since."""

    __slots__ = ("missed", "repeats", "total", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.repeats = 0
        self.total = 0
        self.missed = 0

    def add(self, value: float) -> None:
        """Take in an observation."""
        self.repeats = self.repeats + 1 if value == self.value else 1
        self.total += 1
        self.missed = 0
        self.value = value

    def add_row(self, values: Sequence[float]) -> None:
        """Take in a row of observations, one at least."""
        newest, count = values[-1], len(values)
        if values.count(newest) == count:
            self.repeats = count + (self.repeats if newest == self.value else 0)
        else:
            self.repeats = next(
                back for back, each in enumerate(reversed(values)) if each != newest
            )
        self.total += count
        self.missed = 0
        self.value = newest


class Slope:
    """Steps until a falling value reaches zero, by least squares over the last ``window``.

    The first ``warmup`` observations are left out: a run takes most of its memory in its
    first steps, and that slope says nothing of the next. The line is fitted to the whole
    window and to its newer half, and the more hopeful of the two counts, so that a single
    fall long over is not taken for a slope.
    """

    __slots__ = ("_skip", "_values", "_window")

    def __init__(self, window: int, warmup: int) -> None:
        self._skip = warmup
        self._window = window
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        """Take in a finite observation."""
        if self._skip:
            self._skip -= 1
        else:
            self._values.append(value)

    def add_row(self, values: Sequence[float]) -> None:
        """Take in a row of observations."""
        skipped = min(self._skip, len(values))
        self._skip -= skipped
        self._values.extend(values[skipped:])

    @property
    def missing(self) -> int:
        """Observations that are still to come before it counts."""
        return self._skip + self._window - len(self._values)

    @property
    def highest(self) -> float | None:
        """The highest of the window; None before it counts."""
        return None if self.missing else max(self._values)

    def floor(self, highest: float, number: float) -> float | None:
        """What values have to be at least so that :meth:`within` is False of each of a row of
        them, whatever they are up to ``highest``; None where nothing is.

        By the same bound on the slope.
        """
        values = self._values
        count = len(values)
        if count < self._window or max(values) > highest or highest <= 0.0:
            return None
        steepest = _MARGIN * number * 1.5 * (count + 1)
        least = steepest * highest / (count * (count + 2) + steepest) * _MARGIN
        return least if least <= min(values) else None

    def within(self, value: float, number: float) -> bool | None:
        """Whether :meth:`left` of ``value`` is ``number`` or less; None as there.

        A line through numbers that lie in a range of R falls by 1.5 n R / (n² - 1) a step at
        most (one half of the n at the top of it, then the other at its bottom). Where even
        that leaves more, which is nearly always, no line is fitted.
        """
        values = self._values
        count = len(values)
        if count < self._window:
            return None
        if value >= values[0]:
            return False
        steepest = 1.5 * (count + 1) * (max(values) - min(value, min(values)))
        if value * (count * (count + 2)) > _MARGIN * number * steepest:
            return False
        left = self.left(value)
        return None if left is None else left <= number

    @property
    def oldest(self) -> float | None:
        """The value that the newest must be below to be falling; None before it counts."""
        return self._values[0] if len(self._values) == self._window else None

    def left(self, value: float) -> float | None:
        """Observations from ``value``, the newest, until zero; infinite when it does not
        fall, None while there are too few to say."""
        oldest = self.oldest
        if oldest is None:
            return None
        if value >= oldest:
            return inf
        values = [*self._values, value]
        newer = values[len(values) // 2 :]
        return max(_until_zero(values), _until_zero(newer))


def _until_zero(values: Sequence[float]) -> float:
    """Ordinary least squares of ``values`` on 0, 1, 2, …, from the last one on."""
    count = len(values)
    middle = (count - 1) / 2
    mean = sum(values) / count
    rise = sum((place - middle) * (value - mean) for place, value in enumerate(values))
    spread = count * (count * count - 1) / 12  # the sum of squares of (place - middle)
    slope = rise / spread
    return max(values[-1], 0.0) / -slope if slope < 0.0 else inf


Reference = RollingMedian | FrozenMedian | Extreme


class References:
    """All that is kept of one metric to compare its values with."""

    __slots__ = ("_extremes", "_frozen", "_rolling")

    def __init__(self, *references: Reference) -> None:
        self._rolling = [each for each in references if isinstance(each, RollingMedian)]
        self._frozen = [each for each in references if isinstance(each, FrozenMedian)]
        self._extremes = [each for each in references if isinstance(each, Extreme)]

    def take_in(self, values: Sequence[float]) -> None:
        """Have each of them take in a row of observations.

        An extreme has to see every median on the way, unless none of them can be one.
        """
        for median in self._rolling:
            on_the_way = median.range_on_the_way(values) if self._extremes else None
            if any(each.may_move(on_the_way) for each in self._extremes):
                medians = median.add_row_and_tell(values)
                if medians is not None:
                    for extreme in self._extremes:
                        extreme.reach(*medians)
            else:
                median.add_row(values)
        for frozen in self._frozen:
            if frozen.value is None:
                for value in values:
                    frozen.add(value)
