"""Stands before each update: holds it against guards, and does to it what was decided."""

from __future__ import annotations

import logging
from math import isfinite, nan
from time import perf_counter_ns

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.tolaria.asking import Asking
from esper_otel.tolaria.clock import Clock
from esper_otel.tolaria.responses import Responses
from esper_otel.tolaria.seal import Sealer, mean_rate, put_optimizer
from esper_otel.tolaria.step import StepUnderWay
from esper_otel.tolaria.updates import AS_IT_IS, Optimizer, UpdateOrder, Updates

log = logging.getLogger("esper_otel")

MOST_SKIPS = 16
"""Updates in a row that may be left out although their values are finite: what stays so for
longer is the run's new ordinary state, and a run that makes no update learns nothing."""

_STEP = STEP_SLOT["step"]
_LR_SCALE = STEP_SLOT["lr_scale"]
_NONFINITE = STEP_SLOT["nonfinite"]


class UpdateControl:
    """What becomes of the updates of the step under way; :meth:`turn` goes on to the next.

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
        self.skipped = False
        """Whether that was left out."""
        self.made = False
        """Whether any update was made with the factor in force."""
        self.decision: Decision | None = None
        """What was decided about the run's own update, None where nothing was."""
        self._step = step
        self._asking = asking
        self._responses = responses
        self._sealer = sealer
        self._clock = clock
        self._skips = 0
        self._told = False

    def begin(self, optimizer: Optimizer, number: int, *, is_primary: bool) -> None:
        """``optimizer`` is about to step, in the run's step ``number``.

        That of a ``primary`` optimizer is the run's own update: its values are known, and are
        asked about when they cross a guard.
        """
        if not self._responses.enforcing:
            return
        factor = self._responses.lr_scale
        order, norm = AS_IT_IS, None
        if is_primary:
            self.decision = None
            try:
                order = self._order_for(optimizer, number, factor)
            except Exception:  # what is in force is still in force
                if not self._told:
                    self._told = True
                    log.exception("esper-otel: an update could not be checked; it is made")
            norm = self._step.norm
        updates = self.updates
        updates.guard(optimizer)
        try:
            scaled = updates.begin(
                optimizer, factor, order, norm if type(norm) is float else None
            )
        except Exception:
            updates.end(optimizer)  # half of it would be worse than nothing
            raise
        # A factor of 1.0 needs no scaling to be what an update is made with.
        self.made = self.made or scaled or (factor == 1.0 and not order.skip)
        if is_primary:
            self.scale, self.skipped = factor * order.lr_scale, order.skip

    def turn(self) -> None:
        """The step is over."""
        self.scale, self.skipped, self.made, self.decision = None, False, False, None

    def _order_for(self, optimizer: Optimizer, number: int, factor: float) -> UpdateOrder:
        guards = self._asking.guards
        if guards is None:
            return AS_IT_IS
        step = self._step
        total, parts = step.loss
        loss = total / parts if type(total) is float and parts else None
        norm = step.norm if type(step.norm) is float else None
        rate = None
        if guards.looks_at_rate:
            rate = mean_rate(optimizer.param_groups)
            if rate is not None:
                rate *= factor
        if not guards.crossed(loss, norm, rate):
            self._skips = 0
            return AS_IT_IS
        row = [nan] * len(STEP_KEYS)
        row[_STEP] = number
        row[_NONFINITE] = 0.0
        row[_LR_SCALE] = factor
        self._sealer.preview(row, loss, norm)
        put_optimizer(row, optimizer.param_groups, factor)
        decision = self._asking.check(number, perf_counter_ns() + self._clock.offset, row)
        order = self._responses.order_of(decision)
        if not order.skip:
            self._skips = 0
        elif all(each is None or isfinite(each) for each in (loss, norm)):
            self._skips += 1
            order = order._replace(skip=self._skips <= MOST_SKIPS)
        if order != AS_IT_IS:
            self.decision = decision
        return order
