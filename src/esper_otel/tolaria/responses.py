"""What a decision does to the run: the one place where anything is applied."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isfinite

from esper_otel.leyline.decisions import (
    LR_SCALE,
    MAX_NORM,
    SKIP_STEP,
    UNJUDGED,
    Action,
    Decision,
)
from esper_otel.tolaria.rate_factor import RateFactor
from esper_otel.tolaria.updates import AS_IT_IS, UpdateOrder

log = logging.getLogger("esper_otel")


class Responses:
    """Applies decisions to a run in ``enforce``, and nothing otherwise."""

    def __init__(self, rate: RateFactor, *, enforce: bool) -> None:
        self.rate = rate
        self._enforce = enforce
        self._on_pause: list[Callable[[Decision], None]] = []

    @property
    def enforcing(self) -> bool:
        """Whether decisions are applied (``enforce``) or only reported (``advise``)."""
        return self._enforce

    @property
    def lr_scale(self) -> float:
        """The factor in force on learning rates, always 1.0 in ``advise``."""
        return self.rate.value if self._enforce else 1.0

    def on_pause(self, freeze: Callable[[Decision], None]) -> None:
        """Register what a PAUSE freezes; ``freeze`` is called with the decision."""
        self._on_pause.append(freeze)

    def apply_rate(self, decision: Decision) -> bool:
        """Scale the rate as ``decision`` says, or count a clean step; whether it changed.

        A decision that no sidecar made is neither: what is held stays held.
        """
        if not self._enforce or decision.reason in UNJUDGED:
            return False
        if decision.action is Action.OPTIMIZER and LR_SCALE in decision.parameters:
            return self.rate.scale_by(decision.parameters[LR_SCALE])
        self.rate.clean_step()
        return False

    def order_of(self, decision: Decision) -> UpdateOrder:
        """What ``decision``, made about one update, asks for; within the bounds of the rate."""
        parameters = decision.parameters
        if not self._enforce or not parameters or decision.reason in UNJUDGED:
            return AS_IT_IS
        scale, max_norm = parameters.get(LR_SCALE, 1.0), parameters.get(MAX_NORM)
        if max_norm is not None and not (isfinite(max_norm) and max_norm > 0.0):
            max_norm = None
        return UpdateOrder(
            self.rate.bounded(scale), max_norm, skip=parameters.get(SKIP_STEP) == 1.0
        )

    def pause(self, decision: Decision) -> bool:
        """Call what is registered for a PAUSE, each on its own; whether any was called."""
        if not self._enforce or decision.action is not Action.PAUSE:
            return False
        for freeze in self._on_pause:
            try:
                freeze(decision)
            except Exception:
                log.exception("esper-otel: a callback of run.on_pause raised; the run goes on")
        return bool(self._on_pause)
