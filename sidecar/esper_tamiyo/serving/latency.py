"""Answer latency: times of garbage collection, and priorities of the processes."""

from __future__ import annotations

import gc
import os
from contextlib import suppress

COLLECT_EVERY = 32
"""Judged steps between two collections of young garbage, made when nobody is waiting. Steps of
new runs and seeds leave 250 objects each behind: to look through those of 32 takes a
millisecond, and of 256 took ten. To look through all that is remembered takes longer: that
waits for a second of rest."""


class GarbageSchedule:
    """Collections happen between answers, and skip what lives forever."""

    def __init__(self) -> None:
        self._steps = 0
        self._owes_full = False

    def take_over(self) -> None:
        """Collect once, and from now on only when told to."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def count_step(self) -> None:
        """A step was judged, or the update of one."""
        self._steps += 1

    def collect_young(self) -> None:
        """At the end of a turn, if it is worth it."""
        if self._steps >= COLLECT_EVERY:
            self._steps = 0
            self._owes_full = True
            gc.collect(0)

    def collect_all(self) -> None:
        """While nothing happens, if it is worth it."""
        if self._owes_full:
            self._owes_full = False
            gc.collect()


def never_preempt() -> None:
    """Wake up on a free processor, or behind whoever runs on this one.

    A trainer sends its request and goes on computing. A process that is woken takes the
    processor from the one that woke it, if both are on the same: then the whole evaluation
    lies within the trainer's ``send``, 80 to 200 µs instead of some 10. The policy SCHED_BATCH
    says that this one need not; whoever waits for an answer gives its processor away anyway.
    """
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
