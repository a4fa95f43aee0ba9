"""Where a value is heading: how many observations are left until it is used up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf


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
