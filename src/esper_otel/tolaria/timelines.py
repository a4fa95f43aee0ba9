"""Steps that have ended, and their timelines: complete once the decision about them has acted.

The decision about a step is taken while the next one is under way, and whether an update was
made with it is known only after that update. Until then a step's timeline stays open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import nan

from esper_otel.leyline.decisions import NOT_ASKED, Action, Decision
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame, StepTimeline
from esper_otel.tolaria.asking import Taken

MOST_OPEN = 4
"""Timelines that may be open; the oldest then goes without its decision."""

Seeds = Sequence[tuple[str, list[float]]]
"""Seed ids and their rows."""

Newest = tuple[int, int, list[float], Seeds]
"""The newest step whose values have all arrived: step, Unix time, row, seeds."""


class EndedStep:
    """What the stages of a step's end hand on to each other, and what its spans are made of.

    Marks (``ended``, ``since``, ``start``, those of ``phases``) are nanoseconds of one
    monotonic clock. One object and not two, as one is made at every step.
    """

    __slots__ = (
        "acted",
        "apply_ns",
        "asked",
        "decision",
        "ended",
        "events",
        "first_update",
        "growing",
        "has_step_before",
        "latency_ms",
        "newest",
        "phases",
        "row",
        "scales",
        "since",
        "start",
        "step",
        "taken",
        "update",
        "waits",
        "wanted",
    )

    def __init__(
        self,
        step: int,
        ended: int,
        last_end: int,
        start: int,
        phases: list[tuple[str, int, int]],
        row: list[float],
    ) -> None:
        self.step = step
        self.ended = ended
        self.since = last_end
        """When the step before ended, 0 for the first: then it is when this one began."""
        self.has_step_before = last_end > 0
        self.start = start
        self.phases = phases
        self.row = row
        self.latency_ms = nan
        self.growing: GardenFrame | None = None
        self.newest: Newest | None = None
        self.taken: tuple[Taken, ...] = ()
        """Decisions that were taken at this step's end."""
        self.events: Sequence[Event] = ()
        self.apply_ns = 0
        self.update: Decision | None = None
        """What was decided about this step's own update, before it was made."""
        self.decision: Decision | None = None
        self.waits = False
        """Whether the decision about it is still to come."""
        self.asked = step
        """The step that was asked about at its end: an older one, where values are late."""
        self.first_update = step
        """The step whose update is the first that the decision could change."""
        self.scales = False
        """Whether the decision changed the factor on learning rates."""
        self.acted = False
        """Whether the decision changed anything in the run."""
        self.wanted = False
        """Whether it becomes spans whatever is decided."""


class Timelines:
    """The open timelines of a run, in the order of their steps.

    ``put`` takes each that becomes spans; ``offset`` makes Unix times of marks.
    """

    def __init__(self, put: Callable[[StepTimeline], None], offset: int) -> None:
        self._put = put
        self._offset = offset
        self._open: deque[EndedStep] = deque()

    def open(self, ended: EndedStep) -> None:
        """A step has ended."""
        self._open.append(ended)
        if len(self._open) > MOST_OPEN:
            self._close(self._open.popleft())

    def decided(self, taken: Taken, first_update: int) -> EndedStep | None:
        """A decision has come; returns the step that waits for it, None when none does.

        ``first_update`` is the first step whose update is made under it. Steps before that
        one wait no more: decisions come in order.
        """
        about = taken.decision.step
        for ended in self._open:
            if ended.waits and ended.asked == about:
                break
        else:
            return None
        for before in self._open:
            before.waits = before.waits and before.asked > about
        if taken.decision.reason == NOT_ASKED:
            return None
        ended.decision = taken.decision
        ended.first_update = first_update
        ended.phases.append(("tamiyo.decide", taken.sent, taken.taken))
        return ended

    def updated(self, step: int, made: bool, *, skipped: bool = False) -> None:
        """``step`` is over; ``made``: an update was made with the factor in force.

        Where its update was ``skipped``, what a decision did to the factor shows in the next.
        """
        waiting = self._open
        while waiting and not waiting[0].waits and waiting[0].first_update <= step:
            if waiting[0].scales and skipped:
                return
            ended = waiting.popleft()
            if ended.scales and made:
                ended.acted = True
            self._close(ended)

    def finish(self) -> None:
        """The run is over."""
        while self._open:
            self._close(self._open.popleft())

    def _close(self, ended: EndedStep) -> None:
        decision = ended.decision
        if not ended.wanted and ended.update is None:
            if decision is None:
                return
            if decision.action is Action.CONTINUE and not decision.findings:
                return
        offset = self._offset
        self._put(
            StepTimeline(
                step=ended.step,
                start_unix_nano=(ended.start or ended.since) + offset,
                end_unix_nano=ended.ended + offset,
                phases=[
                    (name, began + offset, end + offset) for name, began, end in ended.phases
                ],
                row=ended.row,
                decision=decision,
                applied=ended.acted,
                events=ended.events,
                update=ended.update,
            )
        )
