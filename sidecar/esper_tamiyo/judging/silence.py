"""When a rank that sends nothing has been silent for too long.

When it began is said in the times of frames alone, so that a replay finds the same silences:
whether a frame that came at last ended one or the clock did, which the server hands in, it
is the same instant. How long it has been silent the server tells by its own clock, from when
a frame came: the trainer's may be wrong. What a recording cannot know is that a frame was
only late.
"""

from __future__ import annotations

FLOOR_NS = 10_000_000_000
"""No silence is shorter than ten seconds: a run of 1 ms steps may well stop to evaluate."""

FIRST_NS = 600_000_000_000
"""Ten minutes for a rank of which only one step is known: how long its steps are is not."""

UNKNOWN_AFTER_STEPS = 30
"""Step times after which nobody can say any more how a rank is doing."""

_WEIGHT = 0.2

_MOST = 10.0
"""Times its pace that one step may count for: half an hour of evaluation says little of how
long the next steps take."""


class Pace:
    """How fast a rank goes: the weighted mean of its steps' durations, in nanoseconds.

    A pause that was no trouble, an evaluation or a checkpoint, makes it slower for a
    while, and so a little more patient. ``last_ns`` is when the newest step ended, and
    ``heard_ns`` when that was heard, by the clock that silence is measured with.
    """

    __slots__ = ("heard_ns", "last_ns", "step_ns")

    def __init__(self) -> None:
        self.heard_ns = 0
        self.last_ns = 0
        self.step_ns = 0.0

    def heard(self, time_ns: int, steps: int, at_ns: int) -> None:
        """A frame that ended at ``time_ns``, ``steps`` after the one before it."""
        if self.last_ns and time_ns > self.last_ns:
            each = (time_ns - self.last_ns) / steps
            known = self.step_ns
            if known:
                each = known + _WEIGHT * (min(each, _MOST * known) - known)
            self.step_ns = each
        self.last_ns = time_ns
        self.heard_ns = at_ns

    def patience_ns(self, steps: float) -> int:
        """How long ``steps`` step times are, the floor at least."""
        return max(FLOOR_NS, int(steps * self.step_ns)) if self.step_ns else FIRST_NS

    def silent_since(self, silent_ns: int, steps: float) -> int | None:
        """When patience ended with a silence that has lasted ``silent_ns``; None before."""
        patience = self.patience_ns(steps)
        return self.last_ns + patience if self.last_ns and silent_ns > patience else None
