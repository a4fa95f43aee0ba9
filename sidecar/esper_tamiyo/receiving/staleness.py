"""The lateness check: streamed steps too old for a decision, without trusting a trainer's
clock.

A Collector bounds how long a request waits for Tamiyo. It has no hold on what lies in the
sockets of a Tamiyo that hung, nor on what a trainer kept while nobody took it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

MAX_LATER_NS = 10_000_000_000
"""A step that comes so much later than its producer's quickest is old."""

REMEMBERED_NS = 60_000_000_000
"""How long at least the quickest counts, and at most twice as long while steps come."""

MAX_PRODUCERS = 4096


class StalenessFilter:
    """Holds each producer's steps against the quickest of its own.

    The delay from a step's time to its coming has the difference of two clocks in it; the
    difference of two delays has not. A clock that is set back makes its producer's steps
    look old for as long as the quickest is remembered, and no longer.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._paces: OrderedDict[Hashable, _Pace] = OrderedDict()
        self._newest: tuple[Hashable, _Pace | None] = None, None
        """The producer that was asked about last: a request has many steps of one."""

    def is_old(self, producer: Hashable, time_unix_nano: int) -> bool:
        """Whether a step of that time, which came just now, is of no use any more.

        Never the first of a producer, and never one that does not say its time (0).
        """
        if not time_unix_nano:
            return False
        now = self._clock()
        delay = now - time_unix_nano
        newest, pace = self._newest
        if pace is None or producer is not newest:
            pace = self._paces.get(producer)
            if pace is None:
                pace = self._paces[producer] = _Pace(now, delay)
                if len(self._paces) > MAX_PRODUCERS:
                    self._paces.popitem(last=False)
            self._paces.move_to_end(producer)
            self._newest = producer, pace
        return delay - pace.quickest(now, delay) > MAX_LATER_NS


class _Pace:
    """The shortest delay of one producer, of this stretch of time and of the one before.

    A stretch ends when a step comes, not when its time is over: what was known before a
    hang still counts for what comes right after it, however long that was.
    """

    __slots__ = ("_before", "_least", "_since")

    def __init__(self, now: int, delay: int) -> None:
        self._since = now
        self._least = self._before = delay

    def quickest(self, now: int, delay: int) -> int:
        """The shortest, with ``delay`` among them."""
        if now - self._since > REMEMBERED_NS:
            self._since, self._before, self._least = now, self._least, delay
        least = self._least
        if delay < least:
            self._least = least = delay
        return least if least < self._before else self._before
