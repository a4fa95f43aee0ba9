"""Jobs: the trainings of one process, separated by their optimizers.

A process may hold several trainings, one after the other or in turn (a sweep, k-fold, the cells
of a notebook). Each is a run of its own. To which of them an optimizer belongs is decided when
it steps for the first time; the first of these that is true holds:

================================================ ===============================================
an optimizer that                                belongs to
================================================ ===============================================
steps by the very ``backward`` by which the      that one: Muon beside AdamW, optimizers of
training under way has stepped                   single parameters
shares a parameter with a known training         that one: made anew for the same model
steps while a framework's training is under way  that one
steps by a ``backward`` that gave gradients to   that one: a generator, whose loss goes through
parameters of the training under way as well     its critic
steps after a training that is over              another training
does none of these                               not known yet
================================================ ===============================================

A training is over when all of its optimizers are gone, and when a framework or the script has
said so. What is not known yet is held back: if the training of before steps again soon, all of
it is one loop that takes turns (an actor, its critic, their temperature). Otherwise, after
:data:`~esper_otel.integrations.primary.PATIENCE` steps, it is another training, and what was
held back is sent and asked about: no step is lost by that, but decisions about those steps are
not applied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from esper_otel.goodbye import DONE, Ending
from esper_otel.integrations.primary import Primary, gradient_at, parameters_of, place_in
from esper_otel.run import Run
from esper_otel.tolaria.identities import IdentityMap, IdentitySet, KnownTensors
from esper_otel.tolaria.ports import NO_TIME, HeldRun, PhaseTimes

if TYPE_CHECKING:
    from esper_otel.stream.totals import RunTotals

MOST_OPEN = 64
"""Trainings that are open at a time; one more closes that which has rested longest."""

MOST_HELD = 256
"""Steps that are held back at most while it is not known what they belong to."""


class Job:
    """One training of the process: its run, and the optimizers that belong to it."""

    def __init__(self, run: Run, held: HeldRun | None = None) -> None:
        self.run = run
        self.held = held or HeldRun()
        """Its steps while it is not known to be a training."""
        self.recorder = run._loop.recorder
        self.primary = Primary(run.settings.primary_optimizer)
        self.is_announced = False
        """Whether a framework has begun it and not ended it: then all that steps is its own."""
        self.is_ended = False
        """Whether a framework or the script has said that it is over."""
        self.is_closed = False
        self.steps_in_backward = False
        self.by_backward = False
        """Whether its steps follow calls of ``backward``."""
        self.last = 0
        """Steps of all optimizers of the process when one of its own stepped last; 0: never."""
        self.turns: list[weakref.ref[Any]] = []
        """Optimizers in the order of their steps, while it is not known to be a training."""
        self._optimizers = IdentitySet()
        self._parameters = KnownTensors()
        self._sample = place_in()
        """A parameter, the first: what goes through a model at all has it in its graph."""
        self._gradient: tuple[int, int] | None = None
        self._sets_steps: weakref.ref[Any] | None = None
        self._parameter = KnownTensors()

    @property
    def is_over(self) -> bool:
        """Whether nothing of it can step any more, as far as is known."""
        return self.last > 0 and (self.is_ended or not self._optimizers)

    @property
    def patience(self) -> int:
        """Steps of others in a row after which those are no turn of its own loop."""
        return min(self.primary.patience, MOST_HELD)

    @property
    def optimizers(self) -> list[Any]:
        """Those that are its own, in no order."""
        return list(self._optimizers)

    def sets_step(self, optimizer: Any, *, fresh: bool) -> bool:
        """``optimizer`` is about to step; returns whether that is a step of the run.

        One that steps by the same ``backward`` as another before it (not ``fresh``) is no turn
        of its own, and the run's only if it was chosen before.
        """
        primary, preferred = self.primary, self.run._loop.preferred
        if fresh or not self.by_backward or primary.may_be(optimizer) or primary.is_named:
            return primary.begins(optimizer, preferred)
        return preferred is optimizer and primary.begins(optimizer, preferred)

    def join(self, optimizer: Any) -> None:
        """``optimizer`` belongs to it."""
        self._optimizers.add(optimizer)
        self._parameters.note(parameters_of(optimizer))
        if self._sample is None or self._sample.optimizer() is None:
            self._sample = place_in(optimizer)

    def note_parameters(self) -> None:
        """Know those of its optimizers as they are now: groups are added, tensors moved."""
        self._parameters.note(parameters_of(*self._optimizers))

    def shares_parameters(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` has one that is, or was, trained by one of its own."""
        self.note_parameters()
        own = parameters_of(*self._optimizers)
        return self._parameters.has_any(parameters_of(optimizer), own)

    def note_gradient(self) -> None:
        """``backward`` is about to be called."""
        self._gradient = self._gradient_now()

    @property
    def got_gradients(self) -> bool:
        """Whether that call gave a gradient to its first parameter."""
        now = self._gradient_now()
        return now is not None and now != self._gradient

    def _gradient_now(self) -> tuple[int, int] | None:
        if self._sample is not None and self._sample.optimizer() is None:
            self._sample = place_in(*self._optimizers)
        return gradient_at(self._sample)

    def steps_by(self, optimizer: Any, phase: str = "") -> None:
        """``optimizer`` sets the steps of the run from now on.

        Where another one did before, or ``phase`` is given, a phase of that name begins. What
        decisions hold of parameters that are trained no more is forgotten.
        """
        before = self._sets_steps
        last = None if before is None else before()
        if last is optimizer and not phase:
            return
        parameters = parameters_of(optimizer)
        own = [] if last is None else parameters_of(last)[:1]
        known, self._parameter = self._parameter, KnownTensors()
        self._sets_steps = weakref.ref(optimizer)
        self._parameter.note(parameters[:1])
        if before is None:
            return
        if not known.has_any(parameters, own):
            self.run._responses.rate.reset()
        self.recorder.phase_begins(phase or type(optimizer).__name__)


class Jobs:
    """The trainings of a process that is watched from outside; ``run`` is the first one's.

    All but the lowest of those that take turns are not known to be trainings yet: they lie
    on a stack, each above that which stepped before it.
    """

    def __init__(self, run: Run) -> None:
        self.first = run
        self.totals: list[tuple[str, RunTotals]] = []
        """Name and sums of each run but the first one, in the order in which they began."""
        self.lost = 0
        """Values of closed ones that never came back from a device."""
        self.follow: Callable[[Job], None] | None = None
        """Told which training the loop works on, whenever that changes."""
        self._turns = [Job(run)]
        self._open = [self._turns[0]]
        self._of: IdentityMap[Job] = IdentityMap()
        self._newest: weakref.ref[Any] | None = None
        self._count = 0  # steps of all optimizers
        self._begun = 1

    @property
    def current(self) -> Job:
        """That which has stepped last."""
        return self._turns[-1]

    def note_gradients(self) -> None:
        """``backward`` is about to be called."""
        for job in self._turns:
            job.note_gradient()

    def of(self, optimizer: Any, *, fresh: bool, has_closure: bool = False) -> Job:
        """That for which ``optimizer`` is about to step; it is the current one from here on.

        ``fresh``: ``backward`` was called since any optimizer stepped last. ``has_closure``: it
        will be called within the step.
        """
        job = self.current
        if self._newest is None or self._newest() is not optimizer or job.is_closed:
            known = self._known(optimizer)
            job = known or self._join(optimizer, self._belongs(optimizer, fresh, has_closure))
            if job is not self.current:
                self._go_to(job)
            self._newest = weakref.ref(optimizer)
        is_turn = fresh or has_closure or not job.by_backward
        self._count += is_turn  # what steps by one backward is one turn
        job.last, job.is_ended = self._count, False
        job.by_backward = job.by_backward or fresh or has_closure
        if is_turn and len(self._turns) > 1:
            job.turns.append(self._newest)
            self._settle()
        return job

    def named(self, optimizer: Any) -> Run:
        """The script says that ``optimizer`` sets the steps of a run; returns that."""
        job = self._known(optimizer) or self._join(optimizer, self._announced_by(optimizer))
        job.run._loop.prefer(optimizer)
        return job.run

    def announced(self, optimizers: Sequence[Any], phase: str) -> Run:
        """A framework's training begins, whose steps the first of ``optimizers`` sets.

        Over a model that was trained before it is a phase of that training, called ``phase``.
        """
        if not optimizers:
            return self.current.run
        first = optimizers[0]
        job = self._known(first) or self._join(first, self._announced_by(first))
        for optimizer in optimizers:
            self._join(optimizer, job)
        if job is not self.current:
            self._go_to(job)
        if job.last:
            job.steps_by(first, phase)
        job.is_announced, job.is_ended = True, False
        job.run._loop.prefer(first)
        return job.run

    def ended(self, run: Run, end: Ending) -> None:
        """A framework or the script says that the training of ``run`` is over."""
        for job in [self.current] if run is self.first else self._open:
            if job.run is run or run is self.first:
                job.is_announced, job.is_ended = False, True
                job.run._goodbye.say(end)

    def is_seed_optimizer(self, optimizer: Any) -> bool:
        """Whether ``optimizer`` trains a seed of any of them."""
        return any(job.run._is_seed_optimizer(optimizer) for job in self._open)

    def close(self, end: Ending = None) -> Ending:
        """The process ends, what is held back was trainings; returns how the first ended."""
        if not self._is_off:
            self._confirm_all()
        for job in list(self._open):
            if job.run is not self.first:
                self._close(job, end if job is self.current else end and DONE)
        return end if self.current.run is self.first else end and DONE

    @property
    def _is_off(self) -> bool:
        """Whether the run has ended, or is that of the process this one was forked from."""
        return self.first._report is not None

    # To whom an optimizer belongs.

    def _known(self, optimizer: Any) -> Job | None:
        job = self._of.get(optimizer)
        return None if job is None or job.is_closed else job

    def _join(self, optimizer: Any, job: Job) -> Job:
        self._of[optimizer] = job
        job.join(optimizer)
        return job

    def _belongs(self, optimizer: Any, fresh: bool, has_closure: bool) -> Job:
        current = self.current
        if not current.last or self.first.settings.primary_optimizer or self._is_off:
            return current
        if not fresh and not has_closure and current.by_backward:
            return current
        related = self._related(optimizer)
        if related is not None:
            return related
        if current.is_announced:
            return current
        for job in reversed(self._turns):
            if fresh and job.got_gradients:
                return job
        return self._begin(certain=current.is_over)

    def _announced_by(self, optimizer: Any) -> Job:
        """As :meth:`_belongs`, where it is known that a training is meant by it."""
        current = self.current
        if not current.last or self._is_off:
            return current
        return self._related(optimizer) or self._begin(certain=True)

    def _related(self, optimizer: Any) -> Job | None:
        """The training that has a parameter of ``optimizer``; the newest of several."""
        held = [job for job in self._turns if job not in self._open]
        for job in reversed([*self._open, *held]):
            if not job.is_closed and job.shares_parameters(optimizer):
                return job
        return None

    # Trainings that begin, take turns and end.

    def _begin(self, *, certain: bool) -> Job:
        if certain:
            self._confirm_all()
        number = self._begun + len(self._turns)
        held = HeldRun()
        run = Run(
            self.first.settings.changed(run_id=f"{self.first.run_id}-{number}"),
            outlives_script=True,
            beside=self.first,
            held=held,
        )
        run._jobs = self
        job = Job(run, held)
        if certain:
            self._confirm(job)
        return job

    def _go_to(self, job: Job) -> None:
        """``job`` steps now, and what the loop has done since the last step is its own."""
        before, self._newest = self.current, None
        turns = NO_TIME
        if job in self._turns:
            place = self._turns.index(job) + 1
            others = self._turns[place:]
            del self._turns[place:]
            for other in others:
                turns = PhaseTimes(*map(sum, zip(turns, other.held.phase_times(), strict=True)))
                self._merge(other, job)
        elif job in self._open:
            self._confirm_all()
            self._turns = [job]
        else:
            self._turns.append(job)
        job.recorder.take_over(before.recorder, turns)  # before that is closed, if it is over
        self._close_finished()
        if self.follow is not None:
            self.follow(job)

    def _merge(self, other: Job, job: Job) -> None:
        """``other`` was no training of its own, but a part of ``job``'s loop."""
        for optimizer in other.optimizers:
            self._join(optimizer, job)
        for turn in other.turns:
            optimizer = turn()
            if optimizer is not None:
                job.primary.begins(optimizer, job.run._loop.preferred)
        other.is_closed = True
        other.recorder.switch_off()
        other.run._loop.close()

    def _settle(self) -> None:
        """Where the lowest has rested for too long, those above it are trainings."""
        while len(self._turns) > 1:
            below = self._turns[0]
            if self._count - below.last <= below.patience and not below.is_over:
                return
            self._confirm(self._turns[1])
            del self._turns[0]
            self._close_finished()

    def _confirm_all(self) -> None:
        while len(self._turns) > 1:
            self._confirm(self._turns[1])
            del self._turns[0]

    def _confirm(self, job: Job) -> None:
        """``job`` is a training: from here on it is sent and asked about."""
        self._turns[0].run._goodbye.say(DONE)  # it takes that one's place
        self._begun += 1
        job.turns.clear()
        if job.run.enabled and not self._is_off:
            job.run._begin()
        self._open.append(job)
        if job.run.totals is not None:
            from esper_otel.stream.totals import shortened

            self.totals = shortened([*self.totals, (job.run.run_id, job.run.totals)])
        if len(self._open) > MOST_OPEN:
            resting = [each for each in self._open if each not in (job, *self._turns)]
            self._close(min(resting, key=lambda each: each.last))

    def _close_finished(self) -> None:
        for job in list(self._open):
            if job.is_over and not job.is_ended and job not in self._turns:
                self._close(job)

    def _close(self, job: Job, end: Ending = DONE) -> None:
        job.is_closed = True
        self._open.remove(job)
        if job.run is self.first:
            job.run._finish(end)  # it still sends for the others
        else:
            self.lost += job.run._loop.scalars.lost
            job.run._end(end=end)
