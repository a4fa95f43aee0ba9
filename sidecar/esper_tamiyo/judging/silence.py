"""When a rank that sends nothing has been silent for too long.

Judged by the times of frames alone, so that a replay finds the same silences: whether a
frame that came at last ended one (:class:`~esper_tamiyo.judging.run_state.RunState`)
or the clock did, which the server hands in, the silence began at the same instant. What a
recording cannot know is that a frame was only late.
"""

from __future__ import annotations

FLOOR_NS = 10_000_000_000
"""No silence is shorter than ten seconds: a run of 1 ms steps may well stop to evaluate."""

FIRST_NS = 600_000_000_000
"""Ten minutes for a rank of which only one step is known: how long its steps are is not."""

UNKNOWN_AFTER_STEPS = 30
"""Step times after which nobody can say any more how a rank is doing."""

_WEIGHT = 0.2


class Pace:
    """How fast a rank goes: the weighted mean of its steps' durations, in nanoseconds.

    A pause that was no trouble, an evaluation or a checkpoint, makes it slower for a
    while, and so more patient.
    """

    __slots__ = ("last_ns", "step_ns")

    def __init__(self) -> None:
        self.last_ns = 0
        self.step_ns = 0.0

    def heard(self, time_ns: int, steps: int) -> None:
        """A frame that ended at ``time_ns``, ``steps`` after the one before it."""
        if self.last_ns and time_ns > self.last_ns:
            each = (time_ns - self.last_ns) / steps
            known = self.step_ns
            self.step_ns = known + _WEIGHT * (each - known) if known else each
        self.last_ns = time_ns

    def patience_ns(self, steps: float) -> int:
        """How long ``steps`` step times are, the floor at least."""
        return max(FLOOR_NS, int(steps * self.step_ns)) if self.step_ns else FIRST_NS

    def silent_since(self, now_ns: int, steps: float) -> int | None:
        """The instant at which patience ended; None when it has not."""
        ends = self.last_ns + self.patience_ns(steps)
        return ends if self.last_ns and now_ns > ends else None
