"""Noted steps: of a step that nobody decides about the training thread only notes events.

Rows, statistics and spans are made of the notes by the thread that streams, many steps at a
time: code that runs once per step has left the processor's caches by the next one. A decision
request needs the row at once, so this is for runs without any. Whatever is not in every step
(a closure, a phase, an evaluation, a checkpoint) has the notes taken up at once
(:meth:`NotedSteps.take_up_all`), and that step is recorded as those of other runs are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from time import perf_counter_ns
from typing import Any, Protocol

from esper_otel.leyline.frames import Value
from esper_otel.tolaria.fetches import UNNAMED, Size, Source
from esper_otel.tolaria.losses import Evaluation
from esper_otel.tolaria.ordinary_steps import (
    BACKWARD,
    BACKWARD_ENDS,
    BATCH,
    CLIPPED,
    MEASURED,
    OPTIMIZER,
    OPTIMIZER_ENDS,
    REPORTED,
)
from esper_otel.tolaria.rates import Rates, host_rates
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.updates import Optimizer

MOST_WAITING = 1024
"""Steps that may wait for the thread that streams. Beyond it the training thread helps."""

MANY_WAITING = MOST_WAITING // 2
"""Steps by which it is woken before its time: a ring that nobody empties is full soon."""

MOST_NOTES = 4096
"""Notes of one step that are kept."""


class Bell(Protocol):
    """By what the thread that streams is woken."""

    is_awaited: bool
    """Whether it sleeps until it is."""

    def ring(self) -> None:
        """Wake it."""


class Follower(Protocol):
    """Whoever makes steps of notes, on a thread of its own."""

    def follow(self, notes: Any) -> Bell | None:
        """Call :meth:`NotedSteps.catch_up` from here on; None: there is no such thread."""


class StepEnds(Protocol):
    """As much of :class:`~esper_otel.tolaria.recorder.Recorder` as is needed here."""

    step: int
    optimizer: Optimizer | None
    rates_within: Rates | None

    def end_settled(self, ended: int = 0) -> None:
        """The step under way is over, and was not noted."""

    def record_ordinary(
        self, notes: Sequence[Any], started: int, number: int, ended: int, rates: Rates
    ) -> bool:
        """Whether step ``number`` was an ordinary one, which is recorded then."""

    def begin_noted(self, mark: int, number: int) -> None:
        """Step ``number`` began at ``mark``, after one that was noted."""

    def end_noted(self, number: int, ended: int, rates: Rates) -> None:
        """It ended; ``rates`` are those of its optimizer."""

    def notes_failed(self) -> None:
        """Notes could not be taken up; called while the exception is handled."""


class NotedSteps:
    """The notes of one loop, by the methods of :class:`StepUnderWay`, whose place it takes.

    Notes hold no tensor, and no number that a device still has to deliver.
    """

    __slots__ = (
        "_ends",
        "_is_on",
        "_lock",
        "_notes",
        "_started",
        "_step",
        "_stop",
        "bell",
        "is_settled",
        "norm",
        "optimizing",
        "waiting",
    )

    def __init__(self, ends: StepEnds, step: StepUnderWay, stop: Callable[[], None]) -> None:
        self.bell: Bell | None = None
        """What wakes whoever takes them up; None: nobody does."""
        self._is_on = False
        self.waiting: deque[tuple[list[Any], int, int, int, Rates]] = deque()
        """Steps that are over, and not taken up yet."""
        self.is_settled = False
        """Whether what was noted of the step under way has been taken up."""
        self.norm: Value | None = None
        self.optimizing = False
        self._ends = ends
        self._step = step
        self._stop = stop
        # One that a thread may take twice: a signal's handler may close the run in the midst.
        self._lock = RLock()
        self._notes: list[Any] = []
        self._started = 0

    def begin_noting(self) -> None:
        """Note what comes; what was before was told to the step under way."""
        step = self._step
        self._is_on, self.is_settled, self._started = True, False, 0
        self.norm, self.optimizing = step.norm, step.optimizing

    def end_noting(self, *, forget: bool = False) -> None:
        """Note nothing more: all is taken up, or forgotten, as in a forked child."""
        if not forget:
            self.take_up_all()
        self._is_on = False
        self.waiting.clear()
        self._notes = []

    def unnoted(self) -> StepUnderWay:
        """Note nothing more; what is noted has been taken up."""
        self._stop()
        return self._step

    # What the loop does.

    def batch_came(self, asked_for: int, size: Size, source: Source = UNNAMED) -> None:
        """As :meth:`StepUnderWay.batch_came`."""
        notes = self._notes
        notes += (BATCH, asked_for, size, source, perf_counter_ns())
        if len(notes) > MOST_NOTES:
            self.take_up_all()

    def backward_begins(self) -> None:
        """As :meth:`StepUnderWay.backward_begins`."""
        notes = self._notes
        notes += (BACKWARD, perf_counter_ns())
        if len(notes) > MOST_NOTES:
            self.take_up_all()

    def backward_ends(self, loss: Value | None, evaluation: Evaluation | None = None) -> None:
        """As :meth:`StepUnderWay.backward_ends`."""
        now = perf_counter_ns()
        if type(loss) is not float and loss is not None:
            self.unnoted().backward_ends(loss, evaluation, now)
        else:
            self._notes += (BACKWARD_ENDS, loss, evaluation, now)

    def loop_reported(self, loss: Value | None, values: Mapping[str, Value]) -> None:
        """As :meth:`StepUnderWay.loop_reported`."""
        for value in values.values():
            if type(value) is not float:
                self.unnoted().loop_reported(loss, values)
                return
        if type(loss) is not float and loss is not None:
            self.unnoted().loop_reported(loss, values)
            return
        norm = values.get("gradient_norm")
        if norm is not None:
            self.norm = norm
        notes = self._notes
        notes += (REPORTED, loss, values)
        if len(notes) > MOST_NOTES:
            self.take_up_all()

    def clipped(self, norm: Value) -> None:
        """As :meth:`StepUnderWay.clipped`."""
        if type(norm) is not float:
            self.unnoted().clipped(norm)
        else:
            self.norm = norm
            self._notes += (CLIPPED, norm)

    def measured(self, norm: Value | None, began: int = 0) -> int:
        """As :meth:`StepUnderWay.measured`."""
        now = perf_counter_ns()
        if norm is not None:
            if type(norm) is not float:
                return self.unnoted().measured(norm, began, now)
            self.norm = norm
        self._notes += (MEASURED, norm, began, now)
        return now

    def optimizer_begins(
        self, hook_began: int, norm: Value | None, optimizer: Optimizer | None = None
    ) -> None:
        """As the recorder's."""
        now = perf_counter_ns()
        if norm is not None:
            if type(norm) is not float:
                self.unnoted().optimizer_approaches(hook_began, norm, True, now)
                return
            self.norm = norm
        self.optimizing = True
        self._notes += (OPTIMIZER, hook_began, norm, True, now)

    def optimizer_ends(self, optimizer: Optimizer | None = None) -> int:
        """As the recorder's."""
        now = perf_counter_ns()
        self.optimizing = False
        self._notes += (OPTIMIZER_ENDS, now)
        return now

    def end_step(self, ended: int = 0) -> None:
        """As the recorder's."""
        ends = self._ends
        optimizer, rates = ends.optimizer, ends.rates_within
        try:
            if rates is None:
                rates = host_rates(optimizer.param_groups) if optimizer is not None else ()
        except Exception:
            rates = None  # no groups as torch has them: told of where other steps are recorded
        if rates is None or self.is_settled:
            self.take_up_all()
            ends.end_settled(ended)
            if not self._is_on:
                return
            self.is_settled, self._started = False, 0
        else:
            waiting = self.waiting
            ends.step = number = ends.step + 1
            noted = self._notes, self._started, number, ended or perf_counter_ns(), rates
            # First, so that an exception in between (of a signal) has no note taken up twice.
            self._notes = []
            waiting.append(noted)
            bell, count = self.bell, len(waiting)
            if bell is not None and (bell.is_awaited or count == MANY_WAITING):
                bell.ring()
            if count > MOST_WAITING:
                self.catch_up(2)
            # Settled it may be by now: a handler of a signal has asked in between.
            self._started, self.is_settled = perf_counter_ns(), False
        self.norm = None
        self.optimizing = False

    # What becomes of it.

    def catch_up(self, most: int = 0) -> None:
        """On any thread: take up steps that are over, ``most`` of them; 0: those that wait."""
        if not self._is_on:
            return
        waiting, lock, record = self.waiting, self._lock, self._ends.record_ordinary
        for _ in range(most or len(waiting)):
            with lock:  # for one step, as the training thread may wait for it
                if not waiting:
                    return
                noted = waiting.popleft()
                if not record(*noted):
                    self._record(*noted)

    def take_up_all(self) -> None:
        """On the training thread: take up everything, also of the step under way."""
        with self._lock:
            while self.waiting:
                noted = self.waiting.popleft()
                if not self._ends.record_ordinary(*noted):
                    self._record(*noted)
            if not self.is_settled:
                self.is_settled = True
                if self._started:
                    self._ends.begin_noted(self._started, self._ends.step + 1)
            notes, self._notes = self._notes, []
            self._replay(notes)

    def _record(
        self, notes: list[Any], started: int, number: int, ended: int, rates: Rates
    ) -> None:
        """Record a step that is no ordinary one, event by event."""
        ends = self._ends
        if started:
            ends.begin_noted(started, number)
        self._replay(notes)
        ends.end_noted(number, ended, rates)

    def _replay(self, notes: Sequence[Any]) -> None:
        """Tell the step of ``notes``, each a kind and what it was called with."""
        step, at, end = self._step, 0, len(notes)
        try:
            while at < end:
                call, following = _CALLS[notes[at]]
                following += at
                call(step, *notes[at + 1 : following])
                at = following
        except Exception:
            self._ends.notes_failed()


_CALLS: Sequence[tuple[Callable[..., Any], int]] = (
    (StepUnderWay.batch_came, 5),
    (StepUnderWay.backward_begins, 2),
    (StepUnderWay.backward_ends, 4),
    (StepUnderWay.loop_reported, 3),
    (StepUnderWay.clipped, 2),
    (StepUnderWay.measured, 4),
    (StepUnderWay.optimizer_approaches, 5),
    (StepUnderWay.optimizer_ends, 2),
)
"""What each kind of note calls, in their order, and how long the note is."""
