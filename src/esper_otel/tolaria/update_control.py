"""Update control: compares each update with the guards, and applies the decision to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isfinite, nan
from time import perf_counter_ns

from esper_otel.leyline.decisions import UNJUDGED, Decision
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import Value
from esper_otel.leyline.guards import NO_GUARDS, NOT_HELD, Held
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.asking import Asking
from esper_otel.tolaria.rates import BaseRate, mean_momentum, mean_rate, put_optimizer
from esper_otel.tolaria.responses import RATE_RELEASE, Responses, half_way
from esper_otel.tolaria.seal import Sealer
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.timelines import Clock, EndedStep, Newest
from esper_otel.tolaria.updates import AS_IT_IS, Optimizer, UpdateOrder, Updates

log = logging.getLogger("esper_otel")

MOST_SKIPS = 16
"""Updates in a row that may be left out although their values are finite: what stays so for
longer is the run's new ordinary state, and a run that makes no update learns nothing."""

HELD_STEPS = 16
"""Unjudged steps in a row after which what is usual is not known any more: then an update
beyond its guards is made as the script has it, but for what an answer has made smaller."""

Measure = Callable[[], Value | None]
"""Gives the gradient norm once a closure has called backward; None: it is not known."""

_STEP = STEP_SLOT["step"]
_LR_SCALE = STEP_SLOT["lr_scale"]
_PHASE = STEP_SLOT["phase"]
_NONFINITE = STEP_SLOT["nonfinite"]
_SKIPPED = STEP_SLOT["update_skipped"]
_RESTORED = STEP_SLOT["restored"]


class UpdateControl:
    """What becomes of the updates of a step; :meth:`start_next` goes on to the next one.

    In ``enforce`` only: in ``advise`` no update is held against anything, or changed.
    """

    def __init__(
        self,
        step: StepUnderWay,
        *,
        asking: Asking,
        responses: Responses,
        sealer: Sealer,
        clock: Clock,
    ) -> None:
        self.updates = Updates()
        self.scale: float | None = None
        """Factor that the run's own update was made with, None when it was not seen."""
        self.momentum_scale = 1.0
        """Factor on the momentum of that update."""
        self.skipped = False
        """Whether that was left out."""
        self.clears_gradients = False
        """Whether gradients that the script keeps are cleared before the next are added."""
        self.decision: Decision | None = None
        """What was decided about the run's own update, None where nothing was."""
        self._step = step
        self._asking = asking
        self._responses = responses
        self._sealer = sealer
        self._clock = clock
        self._factor = 1.0
        self.base_rate = BaseRate()
        self._skips = 0
        self._standing = AS_IT_IS
        """What the last answer made smaller about an update outside its guards: where nobody
        answers, the next one outside is made so as well. A finite one is left out by an answer
        alone."""
        self._skipped_at: int | None = None
        """How many times backward was called when an update was left out last; None: it was
        made."""
        self._asked_phase = self._guarded_phase = 0.0
        """Phase of the training in the newest step that was asked about, and in the newest one
        that was judged. Guards are of the latter, and in another one no setting leaps: what is
        usual begins anew."""
        self._told = False
        self._restored = False
        """Whether weights were put back at the end of this step."""
        self._waits_for_primary = False
        """Whether they were put back since the run's own optimizer last was about to step."""
        self._nonfinite_at = -1
        """The newest step with a value that is not finite, as far as is known."""
        self._restores_for: EndedStep | None = None

    @property
    def skips_nonfinite(self) -> bool:
        """Whether an update that is not finite may be left out where nobody can ask in time."""
        guards = self._asking.guards if self._responses.enforcing else None
        return guards is not None and guards.skips_nonfinite

    def before_update(
        self,
        optimizer: Optimizer,
        number: int,
        *,
        is_primary: bool,
        measure: Measure | None = None,
    ) -> None:
        """``optimizer`` is about to step, in the run's step ``number``.

        That of a ``primary`` optimizer is the run's own update: its values are known, and are
        asked about when they cross a guard. Where a closure is still to compute them,
        ``measure`` gives the gradient norm once it has. What is left out of the run's own
        update is left out of those of the loop's other optimizers that follow it; where weights
        were put back, until the run's own steps again: gradients may be of lost weights yet.
        """
        if not self._responses.enforcing:
            return
        self._responses.restoring.update_begins(optimizer)
        factor = self._factor = self._responses.lr_scale
        updates = self.updates
        if not is_primary:
            skips = self._waits_for_primary or self._skipped_at == self._step.backwards
            updates.prepare(optimizer, factor, UpdateOrder(skip=True) if skips else AS_IT_IS)
            return
        self.decision = None
        self._waits_for_primary = False
        if measure is not None:
            self.scale, self.momentum_scale, self._skipped_at = factor, 1.0, None

            def judge() -> UpdateOrder:
                norm = measure()
                if norm is not None:
                    self._step.norm = norm
                return self._judged(optimizer, number, factor)

            updates.prepare(optimizer, factor, AS_IT_IS, judge)
            return
        updates.prepare(optimizer, factor, self._judged(optimizer, number, factor))

    @property
    def made(self) -> bool:
        """Whether an update was made with the factor in force.

        A factor of 1.0 needs no scaling to be that.
        """
        seen = self.scale is not None and not self.skipped
        return self.updates.scaled or (seen and self._factor == 1.0)

    @property
    def used_scale(self) -> float:
        """The factor in the rate of the run's own update: 1.0 where it has no rate to scale."""
        scale = 1.0 if self.scale is None else self.scale
        return scale if self.updates.scaled or self.skipped else 1.0

    def start_next(self) -> None:
        """The step is over."""
        self.scale, self.momentum_scale = None, 1.0
        self.skipped, self.decision = False, None
        self.updates.scaled = self._restored = False

    # What a step's end has to do with it, in this order.

    def end_update(self, ending: EndedStep) -> None:
        """The updates of a step have been made, or left out: put weights back if so decided."""
        if not self._responses.restoring.ordered:
            return
        timeline, self._restores_for = self._restores_for, None
        self._restored = self._responses.restoring.restore(ending.step)
        if self._restored:
            self._waits_for_primary = self.scale is not None
            if timeline is not None:
                timeline.acted = True

    def put_values(self, row: list[float]) -> float:
        """Tell in ``row`` how the update was made; returns the factor that it was made with."""
        if self.scale is None and not self.skipped:  # nobody looks at updates: not in enforce
            row[_LR_SCALE], row[_SKIPPED], scale = 1.0, 0.0, 1.0
        else:
            row[_LR_SCALE] = scale = self.used_scale
            row[_SKIPPED] = 1.0 if self.skipped else 0.0
        if self._responses.restoring.every:
            row[_RESTORED] = 1.0 if self._restored else 0.0
        return scale

    def sealed(self, newest: Newest | None) -> None:
        """The step whose values have all arrived by now, None if none has."""
        unsound = newest is not None and newest[2][_NONFINITE] > 0.0
        if newest is not None:
            self._asked_phase = newest[2][_PHASE]
            if unsound:
                self._nonfinite_at = newest[0]
        restoring = self._responses.restoring
        self._asking.unsound = unsound or restoring.failed or not restoring.keeps
        restoring.failed = False

    def decided(self, decision: Decision, timeline: EndedStep | None) -> None:
        """A decision about a step has come, of this rank or of all that agree."""
        asking, responses = self._asking, self._responses
        if decision.reason not in UNJUDGED:
            self._guarded_phase = self._asked_phase
        if not (responses.restoring.keeps or decision.parameters):
            return  # nothing of it is about weights
        if responses.asks_to_clear(decision):
            self.clears_gradients = True
            if timeline is not None:
                timeline.acted = True
        usual = responses.usual_momentum(decision)
        if usual is not None:
            responses.momentum_hold.take_back_to(*usual, self._step.training_phase.number)
            if timeline is not None:
                timeline.acted = True
        shared = asking.is_shared
        finite = not asking.any_unsound if shared else decision.step != self._nonfinite_at
        responses.restoring.judged(decision, finite=finite)
        if responses.asks_to_restore(decision) and responses.restoring.order(
            decision, agreed=shared
        ):
            self._restores_for = timeline

    def keep(self, ending: EndedStep) -> None:
        """Everything else of the step's end is done: make a snapshot, if one is due."""
        self._responses.restoring.step_ended(ending.step)

    def take_events(self) -> list[Event]:
        """What happened to the weights since last asked, at Unix times."""
        offset, restoring = self._clock.offset, self._responses.restoring
        if not restoring.events:
            return []
        events, restoring.events = restoring.events, []
        return [event._replace(mark=event.mark + offset) for event in events]

    def _judged(self, optimizer: Optimizer, number: int, factor: float) -> UpdateOrder:
        """What is to be done to the run's own update."""
        order = AS_IT_IS
        try:
            if self._responses.restoring.ordered:  # its gradients are of lost weights
                order = order._replace(skip=True)
            else:
                order = self._order_for(optimizer, number, factor)
        except Exception:  # what is in force is still in force
            if not self._told:
                self._told = True
                log.exception("esper-otel: an update could not be checked; it is made")
        self.scale, self.skipped = factor * order.lr_scale, order.skip
        self.momentum_scale = order.momentum_scale
        self._skipped_at = self._step.backwards if order.skip else None
        return order

    def _order_for(self, optimizer: Optimizer, number: int, factor: float) -> UpdateOrder:
        step, responses = self._step, self._responses
        rate_hold, momentum_hold = responses.rate_hold, responses.momentum_hold
        guards = self._asking.guards
        if guards is None and not (rate_hold.holds or momentum_hold.holds):
            return AS_IT_IS
        guards, phase = guards or NO_GUARDS, step.training_phase.number
        total, parts = step.loss
        loss = total / parts if type(total) is float and parts else None
        norm = step.norm if type(step.norm) is float else None
        lr_scale, momentum_scale, rate, momentum = 1.0, 1.0, None, None
        if guards.looks_at_rate or rate_hold.holds:
            rate = mean_rate(optimizer.param_groups)
            lr_scale = responses.rate.bounded(rate_hold.factor_at(rate, phase))
            if rate is not None:
                rate *= factor * lr_scale
        if guards.looks_at_momentum or momentum_hold.holds:
            momentum = mean_momentum(optimizer.param_groups)
            momentum_scale = momentum_hold.factor_at(momentum, phase)
            if momentum is not None:
                momentum *= momentum_scale
        if phase != self._guarded_phase:
            rate = momentum = None
        is_held = lr_scale != 1.0 or momentum_scale != 1.0
        hold = UpdateOrder(lr_scale, momentum_scale=momentum_scale) if is_held else AS_IT_IS
        if not guards.crossed(loss, norm, rate, momentum):
            self._skips, self._standing = 0, AS_IT_IS
            return hold
        held = guards.held(loss, norm, rate, momentum)
        order = self._checked(optimizer, number, factor, hold, loss, norm, held)
        lr_scale *= order.lr_scale
        momentum_scale *= order.momentum_scale
        if held.lr_scale < 1.0 and order.lr_scale < 1.0:
            until = RATE_RELEASE * guards.rate.held_to
            rate_hold.take_back(lr_scale, until, phase)
            self._standing = self._standing._replace(lr_scale=1.0)
        if held.momentum_scale < 1.0 and order.momentum_scale < 1.0:
            assert momentum is not None  # else it would not be held
            until = half_way(guards.momentum.held_to, momentum / hold.momentum_scale)
            momentum_hold.take_back(momentum_scale, until, phase)
            self._standing = self._standing._replace(momentum_scale=1.0)
        lr_scale = responses.rate.bounded(lr_scale)
        return order._replace(lr_scale=lr_scale, momentum_scale=momentum_scale)

    def _checked(
        self,
        optimizer: Optimizer,
        number: int,
        factor: float,
        hold: UpdateOrder,
        loss: float | None,
        norm: float | None,
        held: Held,
    ) -> UpdateOrder:
        """What is to be done to an update outside its guards, beside the ``factor`` in force
        and what is on ``hold``."""
        if self._asking.unjudged:
            # Who did not answer just now is not waited for once more.
            return self._unanswered(held)
        row = [nan] * len(STEP_KEYS)
        row[_STEP] = number
        row[_NONFINITE] = 0.0
        row[_LR_SCALE] = factor = factor * hold.lr_scale
        self._sealer.preview(row, loss, norm)
        groups = optimizer.param_groups
        put_optimizer(row, groups, factor, self.base_rate, hold.momentum_scale)
        decision = self._asking.check_update(
            number, perf_counter_ns() + self._clock.offset, row
        )
        if decision.reason in UNJUDGED:
            return self._unanswered(held)
        order = self._responses.order_of(decision)
        self._standing = order._replace(skip=False, restore=False)
        if order.restore and self._responses.restoring.order(decision, agreed=False):
            order = order._replace(skip=True)
        if not order.skip:
            self._skips = 0
        elif isfinite(norm if norm is not None else loss if loss is not None else nan):
            self._skips += 1
            order = order._replace(skip=self._skips <= MOST_SKIPS)
        if order != AS_IT_IS:
            self.decision = decision
        return order

    def _unanswered(self, held: Held) -> UpdateOrder:
        """What is done to an update outside its guards that nobody has judged in time."""
        standing = self._standing
        if held.skip:
            return UpdateOrder(skip=True)
        if held == NOT_HELD or self._asking.unjudged > HELD_STEPS:
            return standing
        norms = [norm for norm in (held.max_norm, standing.max_norm) if norm is not None]
        scale = self._responses.rate.bounded(held.lr_scale)
        return UpdateOrder(
            min(scale, standing.lr_scale),
            min(norms, default=None),
            momentum_scale=min(held.momentum_scale, standing.momentum_scale),
        )
