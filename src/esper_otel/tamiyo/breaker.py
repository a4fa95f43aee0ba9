"""A circuit breaker, so that a sidecar which does not answer is not waited for again and again.

Pure: it is told the time and never asks for it.
"""

from __future__ import annotations

from enum import Enum

FAILURES_TO_OPEN = 3
FIRST_COOL_DOWN_NS = 100_000_000
LONGEST_COOL_DOWN_NS = 30_000_000_000


class State(Enum):
    """CLOSED: ask. OPEN: do not. HALF_OPEN: one probe is on its way."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Opens after three failures in a row; cools down 100 ms, doubling to 30 s.

    All times are nanoseconds of one monotonic clock. When the cool-down has passed
    :meth:`may_probe` turns true and the caller reports the probe's outcome with
    :meth:`succeeded` or :meth:`failed`. A probe that succeeds closes the breaker on
    trial: the next failure opens it at once with the longer cool-down, the next success
    forgets the past.
    """

    __slots__ = ("_failures", "_next_ns", "cool_down_ns", "opened", "retry_at_ns", "state")

    def __init__(self) -> None:
        self.state = State.CLOSED
        self.retry_at_ns = 0
        self.opened = 0
        """How often it has opened."""
        self.cool_down_ns = 0
        """The cool-down that began last."""
        self._failures = 0
        self._next_ns = FIRST_COOL_DOWN_NS

    def may_probe(self, now_ns: int) -> bool:
        """Whether it is open and its cool-down has passed."""
        return self.state is State.OPEN and now_ns >= self.retry_at_ns

    def probing(self) -> None:
        """A probe has been sent."""
        self.state = State.HALF_OPEN

    def succeeded(self) -> None:
        """An answer came in time."""
        if self.state is State.HALF_OPEN:
            self.state = State.CLOSED
            self._failures = FAILURES_TO_OPEN - 1
            return
        self._failures = 0
        self._next_ns = FIRST_COOL_DOWN_NS

    def failed(self, now_ns: int) -> None:
        """No answer, a late one or a malformed one."""
        self._failures += 1
        if self._failures < FAILURES_TO_OPEN:
            return
        self.state = State.OPEN
        self.opened += 1
        self.cool_down_ns = self._next_ns
        self.retry_at_ns = now_ns + self.cool_down_ns
        self._next_ns = min(2 * self._next_ns, LONGEST_COOL_DOWN_NS)
