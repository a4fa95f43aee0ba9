"""Monotonic marks, and the Unix times they stand for."""

from __future__ import annotations

from time import perf_counter_ns, time_ns


class Clock:
    """Maps ``perf_counter_ns`` marks to Unix nanoseconds by one anchor taken at its making.

    One anchor and not one per mark: durations between two times are then monotonic
    durations, whatever is done to the wall clock meanwhile. ``offset`` added to a mark is
    its Unix time.
    """

    __slots__ = ("_last_end", "offset")

    def __init__(self) -> None:
        self.offset = time_ns() - perf_counter_ns()
        self._last_end = 0

    def step_end(self, mark: int) -> int:
        """Unix time of a step's end: later than every one before it.

        Two steps with one time would be one point to a backend.
        """
        end = mark + self.offset
        if end <= self._last_end:
            end = self._last_end + 1
        self._last_end = end
        return end
