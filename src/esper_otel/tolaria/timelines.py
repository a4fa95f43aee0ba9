"""Steps that have ended, and their timelines: complete once the decision about them has acted.

The decision about a step is taken while the next one is under way, and whether an update was
made with it is known only after that update. Until then a step's timeline stays open. Its
marks are of a monotonic clock; :class:`Clock` makes Unix times of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf, nan
from time import perf_counter_ns, time_ns
from typing import Protocol

from esper_otel.leyline.decisions import NOT_ASKED, Action, Decision, Proposal
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import NO_CUSTOM, GardenFrame, StepTimeline, step_row
from esper_otel.leyline.metrics import WEIGHT
from esper_otel.tolaria.asking import Taken
from esper_otel.tolaria.batch_sizes import TrainingPhase

_EMPTY_ROW = step_row()

MOST_OPEN = 64
"""Timelines that may be open; the oldest then goes without its decision."""

Seeds = Sequence[tuple[str, list[float]]]
"""Seed ids and their rows."""

Newest = tuple[int, int, list[float], Seeds]
"""The newest step whose values have all arrived: step, Unix time, row, seeds."""


class Clock:
    """Maps ``perf_counter_ns`` marks to Unix nanoseconds by one anchor taken at its making.

    One anchor and not one per mark: durations between two times are then monotonic
    durations, whatever is done to the wall clock meanwhile. ``offset`` added to a mark is
    its Unix time.
    """

    __slots__ = ("last_end", "offset")

    def __init__(self) -> None:
        self.offset = time_ns() - perf_counter_ns()
        self.last_end = 0
        """Unix time of the newest step's end; 0 before the first."""

    def step_end(self, mark: int) -> int:
        """Unix time of a step's end: later than every one before it.

        Two steps with one time would be one point to a backend.
        """
        end = mark + self.offset
        if end <= self.last_end:
            end = self.last_end + 1
        self.last_end = end
        return end


class EndedStep:
    """What the stages of a step's end hand on to each other, and what its spans are made of.

    Marks (``ended``, ``since``, ``start``, those of ``phases``) are nanoseconds of one
    monotonic clock. One object and not two, as one is made at every step.
    """

    # What few steps have is left to the class: it costs nothing to make.
    latency_ms = nan
    growing: GardenFrame | None = None
    newest: Newest | None = None
    custom: Mapping[str, float] = NO_CUSTOM
    """Custom values of the step that is the newest."""
    taken: Sequence[Taken] = ()
    """Decisions that were taken at this step's end."""
    events: Sequence[Event] = ()
    apply_ns = 0
    update: Decision | None = None
    """What was decided about this step's own update, before it was made."""
    decision: Decision | None = None
    waits = False
    """Whether the decision about it is still to come."""
    scales = False
    """Whether the decision changed the factor on learning rates."""
    acted = False
    """Whether the decision changed anything in the run."""
    wanted = False
    """Whether it becomes spans whatever is decided."""
    phase = TrainingPhase()

    def __init__(
        self,
        step: int,
        ended: int,
        last_end: int,
        start: int,
        phases: list[tuple[str, int, int]],
    ) -> None:
        self.step = step
        self.ended = ended
        self.since = last_end
        """When the step before ended, 0 for the first: then it is when this one began."""
        self.has_step_before = last_end > 0
        self.start = start
        self.phases = phases
        self.row = _EMPTY_ROW.copy()
        self.asked = self.first_update = step
        """The step that was asked about at its end: an older one, where values are late; and
        that whose update is the first which the decision could change."""

    @property
    def proposal(self) -> Proposal | None:
        """What the garden would like to do, None without one."""
        return None if self.growing is None else self.growing.proposal


class UpdateOutcome(Protocol):
    """What became of the updates of a step."""

    skipped: bool
    """Whether the run's own was left out."""

    @property
    def made(self) -> bool:
        """Whether any was made with the factor in force."""


class Timelines:
    """The open timelines of a run, in the order of their steps.

    ``put`` takes each that becomes spans: every ``every``-th, those that took ``slow_factor``
    times as long as usual, and those in which something happened or a phase began. ``offset``
    makes Unix times of marks.
    """

    def __init__(
        self,
        put: Callable[[StepTimeline], None],
        offset: int,
        *,
        every: int = 0,
        slow_factor: float = inf,
    ) -> None:
        self._put = put
        self._offset = offset
        self._every = every
        self._slow_factor = slow_factor
        self._usual_ms = 0.0
        self._phase = TrainingPhase()
        self.waiting: deque[EndedStep] = deque()
        """Steps that wait for their decision."""

    def end_undecided(self, ended: EndedStep) -> None:
        """A step has ended that nothing is decided about."""
        self.choose(ended)
        self.tell_undecided(ended)

    def tell_undecided(self, ended: EndedStep) -> None:
        """As :meth:`end_undecided`, where it was chosen already."""
        if self.waiting:
            self.open(ended)
        elif ended.wanted or ended.update is not None:
            self._close(ended)

    def open(self, ended: EndedStep) -> None:
        """A step has ended."""
        self.waiting.append(ended)
        if len(self.waiting) > MOST_OPEN:
            self._close(self.waiting.popleft())

    def choose(self, ended: EndedStep) -> None:
        """Decide whether ``ended`` has spans whatever is decided about it."""
        wanted = self.wants(ended.step, ended.latency_ms, ended.phase)
        ended.wanted = wanted or bool(ended.events)

    def wants(self, step: int, latency_ms: float, phase: TrainingPhase) -> bool:
        """Whether ``step`` has spans although nothing happened in it. Once per step."""
        usual_ms = self._usual_ms
        slow = latency_ms > self._slow_factor * usual_ms > 0.0
        if latency_ms == latency_ms:
            self._usual_ms = (
                usual_ms + WEIGHT * (latency_ms - usual_ms) if usual_ms else latency_ms
            )
        every = self._every
        begins, self._phase = phase is not self._phase, phase
        due = every and step % every == 0
        return slow or (begins and phase.number > 0) or bool(due)

    def on_decision(self, taken: Taken, first_update: int) -> EndedStep | None:
        """A decision has come; returns the step that waits for it, None when none does.

        ``first_update`` is the first step whose update is made under it. Steps before that
        one wait no more: decisions come in order.
        """
        about = taken.decision.step
        for ended in self.waiting:
            if ended.waits and ended.asked == about:
                break
        else:
            return None
        for before in self.waiting:
            before.waits = before.waits and before.asked > about
        if taken.decision.reason == NOT_ASKED:
            return None
        ended.decision = taken.decision
        ended.first_update = first_update
        ended.phases.append(("tamiyo.decide", taken.sent, taken.taken))
        return ended

    def on_update(self, step: int, outcome: UpdateOutcome) -> None:
        """``step`` is over, and so are its updates, with that ``outcome``.

        Where its update was skipped, what a decision did to the factor shows in the next.
        """
        waiting = self.waiting
        while waiting and not waiting[0].waits and waiting[0].first_update <= step:
            ended = waiting[0]
            if ended.scales:
                if outcome.skipped:
                    return
                if outcome.made:
                    ended.acted = True
            waiting.popleft()
            self._close(ended)

    def flush(self) -> None:
        """The run is over."""
        while self.waiting:
            self._close(self.waiting.popleft())

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
                applied=ended.acted or _was_done_before(ended),
                events=ended.events,
                update=ended.update,
                phase=ended.phase.name,
            )
        )


def _was_done_before(ended: EndedStep) -> bool:
    """Whether the decision was done to the step's own update, before that was made."""
    update, decision = ended.update, ended.decision
    return update is not None and decision is not None and update.reason == decision.reason
