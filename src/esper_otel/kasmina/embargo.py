"""Embargo: how long a slot lies fallow by the clock, which may stand still."""

from __future__ import annotations

from collections.abc import Callable


class Countdown:
    """Seconds that have to pass between steps, those of a pause not counted.

    ``clock`` gives monotonic seconds. What is left is kept, and no mark of an end: after
    a restart the clock is another one.
    """

    __slots__ = ("_clock", "_mark", "left")

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.left = max(seconds, 0.0)
        """Seconds still to pass, as of the newest :meth:`tick`."""
        self._clock = clock
        self._mark = clock()

    def tick(self, frozen: bool) -> None:
        """Take note of the time since the last call, unless it was a pause."""
        now = self._clock()
        if not frozen:
            self.left = max(self.left - (now - self._mark), 0.0)
        self._mark = now

    @property
    def over(self) -> bool:
        """Whether all of it has passed."""
        return self.left == 0.0
