"""Where a value is heading: how many observations are left until it is used up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

_MARGIN = 1.0 + 1e-9
"""For rounding: what is this near to the bound is worked out."""


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

    def push(self, value: float) -> None:
        """Take in a finite observation."""
        if self._skip:
            self._skip -= 1
        else:
            self._values.append(value)

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
