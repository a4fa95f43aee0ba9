"""What a rank, or one of its seeds, looked like before: medians and last values.

Pure bookkeeping, filled after each frame was judged, so that no value is ever held
against a baseline it is part of itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping

import msgspec


class RollingMedian:
    """Median of the last ``window`` observations, None until ``warmup`` of them are in."""

    __slots__ = ("_arrived", "_ordered", "_warmup", "_window")

    def __init__(self, window: int, warmup: int) -> None:
        self._window = window
        self._warmup = warmup
        self._arrived: deque[float] = deque()
        self._ordered: list[float] = []

    def push(self, value: float) -> None:
        """Take in a finite observation; the oldest leaves when the window is full."""
        ordered = self._ordered
        if len(ordered) == self._window:
            del ordered[bisect_left(ordered, self._arrived.popleft())]
        self._arrived.append(value)
        insort(ordered, value)

    def median(self) -> float | None:
        """The median, or None during warm-up."""
        ordered = self._ordered
        count = len(ordered)
        if count < self._warmup:
            return None
        middle = count >> 1
        if count & 1:
            return ordered[middle]
        low, high = ordered[middle - 1], ordered[middle]
        return low + (high - low) / 2


class Last:
    """The last observation, how often in a row it came, and how many came in all."""

    __slots__ = ("repeats", "total", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.repeats = 0
        self.total = 0

    def push(self, value: float) -> None:
        """Take in an observation."""
        self.repeats = self.repeats + 1 if value == self.value else 1
        self.total += 1
        self.value = value


class Watched(msgspec.Struct, frozen=True):
    """The metrics of one scope whose past some rule needs."""

    medians: tuple[str, ...]
    lasts: tuple[str, ...]
    window: int
    warmup: int


class History:
    """The past of one rank or seed, by the key of the metric.

    The history of a seed also shows its rank's, so that one rule can speak of both.
    """

    __slots__ = ("_own_lasts", "_own_medians", "lasts", "medians")

    def __init__(self, watched: Watched, of_rank: History | None = None) -> None:
        self._own_medians = [
            (key, RollingMedian(watched.window, watched.warmup)) for key in watched.medians
        ]
        self._own_lasts = [(key, Last()) for key in watched.lasts]
        self.medians: dict[str, RollingMedian] = {
            **(of_rank.medians if of_rank else {}),
            **dict(self._own_medians),
        }
        self.lasts: dict[str, Last] = {
            **(of_rank.lasts if of_rank else {}),
            **dict(self._own_lasts),
        }

    def absorb(self, values: Mapping[str, float]) -> None:
        """Take in the values of a frame; what is absent leaves its history as it was."""
        for key, median in self._own_medians:
            value = values.get(key)
            if value is not None:
                median.push(value)
        for key, last in self._own_lasts:
            value = values.get(key)
            if value is not None:
                last.push(value)
