"""Loop events: forwards the events of a loop to the current step, or to the notes of it.

Which of the two depends on whether anybody decides about steps: an event is then a method of
whoever keeps it, without a detour.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from esper_otel.leyline.frames import Value, step_row
from esper_otel.tolaria.noted_steps import NotedSteps
from esper_otel.tolaria.ordinary_steps import OrdinarySteps
from esper_otel.tolaria.ports import NO_TIME, PhaseTimes
from esper_otel.tolaria.rates import Rates
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.timelines import EndedStep
from esper_otel.tolaria.updates import Optimizer

log = logging.getLogger("esper_otel")
P = ParamSpec("P")
T = TypeVar("T")


class LoopEvents:
    """The events of one loop, as attributes to call: those of :class:`StepUnderWay`."""

    batch_came: Callable[..., None]
    backward_begins: Callable[[], None]
    backward_ends: Callable[..., None]
    loop_reported: Callable[[Value | None, Mapping[str, Value]], None]
    clipped: Callable[[Value], None]
    measured: Callable[..., int]
    optimizer_begins: Callable[..., None]
    """The run's optimizer is about to step; (mark since which, gradient norm, optimizer)."""
    optimizer_ends: Callable[..., int]
    """It has stepped; returns the mark of now, for ``end_step``."""
    end_step: Callable[..., None]
    """The step is done; (mark of its end, 0: now)."""
    _ordinary: OrdinarySteps
    _alone: Sequence[Callable[[EndedStep], None]]
    """The stages of a step's end where nobody decides and no seed grows: code that is not
    called need not come from memory."""

    def __init__(self, step: StepUnderWay) -> None:
        self._under_way = step
        self._noted: NotedSteps | None = None
        """Notes of the step under way, None while events are told to it directly."""
        self._off = False
        self._last_end = 0
        self._hook_ms = self._apply_ms = 0.0
        self._latest = step_row()
        self._rates: Rates = ()
        self.rates_within: Rates | None = None
        """What the optimizer had when it stepped within ``backward``, None of one that did not:
        a schedule may have stepped there as well."""
        self._faults: set[str] = set()
        self._tell_directly()
        self.batches_ended = self._settled(step.batches_ended)
        self.skipped = self._settled(step.skipped)
        self.may_be_skipped = self._settled(step.may_be_skipped)
        self.phase = self._settled(step.phase)
        self.copied_to_device = self._settled(step.copied_to_device)
        self.update_skipped = self._settled(step.update_skipped)
        self.losses_prescaled = self._settled(step.losses_prescaled)
        self.phase_begins = self._settled(step.phase_begins)
        self.leftover = self._settled(step.leftover)

    @property
    def under_way(self) -> StepUnderWay:
        """The step under way, all that was noted of it included."""
        if self._noted is not None:
            self._noted.take_up_all()
        return self._under_way

    def catch_up(self) -> None:
        """Have taken up what was noted of steps that are over."""
        if self._noted is not None:
            self._noted.catch_up()

    @property
    def norm(self) -> Value | None:
        """The gradient norm of the step under way, None where nobody has told it yet."""
        noted = self._noted
        return self.under_way.norm if noted is None or noted.is_settled else noted.norm

    @property
    def wants_norm(self) -> bool:
        """Whether it is to be told yet, and will be recorded."""
        return self.norm is None and not self._off

    @property
    def optimizing(self) -> bool:
        """Whether the run's optimizer is within its step."""
        noted = self._noted
        settled = noted is None or noted.is_settled
        return self.under_way.optimizing if settled else noted.optimizing  # type: ignore[union-attr]

    def take_over(self, other: LoopEvents, turns: PhaseTimes = NO_TIME) -> None:
        """What was done since the last step of ``other`` is of this training, as ``turns`` are:
        those of steps since its own last one."""
        own, others = self.under_way, other.under_way
        if turns != NO_TIME:
            hooks_ms = self._hook_ms + other._hook_ms
            turns = turns._replace(hook=turns.hook + round(hooks_ms * 1e6))
        own.take(others, self._last_end, turns)
        self._hook_ms = self._apply_ms = 0.0

    # What was noted of steps, taken up.

    def record_ordinary(
        self, notes: Sequence[Any], started: int, number: int, ended: int, rates: Rates
    ) -> bool:
        """Whether step ``number`` was an ordinary one, which is recorded then."""
        what = notes, started, number, ended, rates
        try:
            row = self._ordinary.record(*what, self._last_end)
        except Exception:
            row = self._latest
            self.notes_failed()
        if row is None:
            return False
        self._last_end, self._latest = ended, row
        return True

    def _rates_of(self, optimizer: Optimizer | None) -> Rates:
        """Those of ``optimizer``, which sets the steps, in the step that ends."""
        if self.rates_within is not None:
            return self.rates_within
        return optimizer.param_groups if optimizer is not None else ()

    def begin_noted(self, mark: int, number: int) -> None:
        """Step ``number`` began at ``mark``, after one that was noted."""
        self._hook_ms, self._apply_ms = (mark - self._last_end) / 1e6, 0.0
        self._under_way.start_next(mark, number - 1)

    def end_noted(self, number: int, ended: int, rates: Rates) -> None:
        """It ended; ``rates`` are those of its optimizer."""
        step = self._under_way
        ending = EndedStep(number, ended, self._last_end, step.span_start, step.phases)
        self._rates, self._last_end = rates, ended
        self._go_through(self._alone, ending)

    def notes_failed(self) -> None:
        """Notes could not be taken up; called while the exception is handled."""
        self._report_fault("notes")

    def end_settled(self, ended: int = 0) -> None:
        """As ``end_step``, of a step that was not noted."""
        raise NotImplementedError

    def _optimizer_begins(
        self, hook_began: int, norm: Value | None, optimizer: Optimizer | None = None
    ) -> None:
        raise NotImplementedError

    def _optimizer_ends(self, optimizer: Optimizer | None = None) -> int:
        raise NotImplementedError

    def _note(self, noted: NotedSteps) -> None:
        """Events are noted from here on."""
        self._noted = noted
        noted.begin_noting()
        self.batch_came = noted.batch_came
        self.backward_begins, self.backward_ends = noted.backward_begins, noted.backward_ends
        self.loop_reported, self.clipped = noted.loop_reported, noted.clipped
        self.measured, self.end_step = noted.measured, noted.end_step
        self.optimizer_begins, self.optimizer_ends = (
            noted.optimizer_begins,
            noted.optimizer_ends,
        )

    def _tell_directly(self, *, forget: bool = False) -> None:
        """Events are not noted any more; what was is taken up, or forgotten."""
        noted, self._noted = self._noted, None
        if noted is not None:
            noted.end_noting(forget=forget)
        step = self._under_way
        self.batch_came = step.batch_came
        self.backward_begins, self.backward_ends = step.backward_begins, step.backward_ends
        self.loop_reported, self.clipped = step.loop_reported, step.clipped
        self.measured, self.end_step = step.measured, self.end_settled
        self.optimizer_begins, self.optimizer_ends = (
            self._optimizer_begins,
            self._optimizer_ends,
        )

    def _go_through(
        self, stages: Sequence[Callable[[EndedStep], None]], ending: EndedStep
    ) -> None:
        for stage in stages:
            try:
                stage(ending)
            except Exception:
                self._report_fault(stage.__name__)

    def _settled(self, call: Callable[P, T]) -> Callable[P, T]:
        """``call`` of the step under way, when all that was noted of it is taken up."""

        def settled(*args: P.args, **kwargs: P.kwargs) -> T:
            if self._noted is not None:
                self._noted.take_up_all()
            return call(*args, **kwargs)

        return settled

    def _report_fault(self, where: str) -> None:
        if where not in self._faults:
            self._faults.add(where)
            log.exception("esper-otel: %r of a step failed; the run continues", where)
