"""Responses: the effect of a decision on the run, the only place that applies anything.

What it does to the learning rates is one number, :class:`RateFactor`, that is given back in
time. Weights are put back by :class:`~esper_otel.tolaria.restoring.Restoring`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any

import msgspec

from esper_otel.leyline.decisions import (
    CLEAR_GRADIENTS,
    LR_SCALE,
    MAX_NORM,
    MOMENTUM_SCALE,
    RESTORE,
    SKIP_STEP,
    UNJUDGED,
    Action,
    Decision,
)
from esper_otel.tolaria.restoring import Restoring
from esper_otel.tolaria.updates import AS_IT_IS, UpdateOrder

log = logging.getLogger("esper_otel")

_MOMENTUM = "optimizer_momentum"


class RateState(msgspec.Struct, forbid_unknown_fields=True):
    """What a :class:`RateFactor` needs to go on after a restart; counts are steps."""

    factor: float
    wait: int
    clean_steps: int
    return_factor: float
    safe: float = 1.0


SMALLEST = 1e-9
"""A factor of zero could not be given back."""


class RateFactor:
    """One number for all learning rates of a run: 1.0 when they are the script's own.

    Each ``lr_scale`` multiplies it; the product of all of them stays within
    ``[minimum, maximum]``. After ``release_steps`` clean steps it is given back
    geometrically over as many more. Trouble that comes back meanwhile, or just after, brings
    back the factor under which there was none, and doubles the wait, as a circuit breaker's
    cool-down does: a cause that never goes away is tried again ever more rarely. A step is
    clean when the sidecar has judged it and asked for no cut; an unjudged step changes
    nothing here.
    """

    LONGEST_WAIT = 16
    """Times ``release_steps`` that the wait may grow to."""

    def __init__(self, *, minimum: float, maximum: float, release_steps: int) -> None:
        self.value = 1.0
        """The factor in force."""
        self._minimum = max(minimum, SMALLEST)
        self._maximum = maximum
        self._release_steps = release_steps
        self._wait = release_steps
        self._clean_steps = 0
        self._return_factor = 1.0
        self._safe = 1.0
        self._at_rest = True
        self._told = False

    def scale_by(self, factor: float) -> bool:
        """Multiply by ``factor``, within the bounds; whether that changed anything.

        What is no positive, finite number is reported once and not applied.
        """
        if not self._is_usable(factor):
            return False
        before = self.value
        after = before * factor
        if self._clean_steps > self._wait and factor < 1.0:
            self._wait = min(2 * self._wait, self.LONGEST_WAIT * self._release_steps)
            after = min(after, self._safe)
        self._clean_steps = 0
        self.value = self._within_bounds(after)
        self._at_rest = self._at_rest and self.value == 1.0
        return self.value != before

    def clean_step(self) -> None:
        """The sidecar has judged a step and asked for no cut: after enough, give back."""
        if self._at_rest:
            return
        self._clean_steps += 1
        past = self._clean_steps - self._wait
        if past <= 0:
            return
        if past == 1:
            self._safe = self.value
            self._return_factor = (1.0 / self.value) ** (1.0 / self._release_steps)
        if past < self._release_steps:
            self.value = self._within_bounds(self.value * self._return_factor)
        elif past == self._release_steps:
            self.value = 1.0
        elif past > self._wait + self._release_steps:
            # As long again with the script's own rate: whatever it was, it is over.
            self._at_rest = True
            self._wait, self._clean_steps = self._release_steps, 0

    def bounded(self, factor: float) -> float:
        """As much of ``factor``, meant for one update, as the bounds leave room for."""
        if not self._is_usable(factor):
            return 1.0
        return self._within_bounds(self.value * factor) / self.value

    def reset(self) -> None:
        """As it was at the beginning: the rates are the script's own."""
        self.value = self._return_factor = self._safe = 1.0
        self._wait, self._clean_steps, self._at_rest = self._release_steps, 0, True

    @property
    def held(self) -> bool:
        """Whether the rates are not the script's own."""
        return self.value != 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain data for :meth:`load_state_dict`."""
        state = RateState(
            self.value, self._wait, self._clean_steps, self._return_factor, self._safe
        )
        return msgspec.structs.asdict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up ``state``.

        Raises ``ValueError`` for what is no such state, and changes nothing then.
        """
        try:
            new = msgspec.convert(dict(state), RateState)
        except (TypeError, msgspec.ValidationError) as error:
            raise ValueError(f"rate: {error}") from None
        for name in ("factor", "return_factor", "safe"):
            number = getattr(new, name)
            if not (isfinite(number) and number > 0.0):
                raise ValueError(f"{name}={number!r}: expected a positive number")
        longest = self.LONGEST_WAIT * self._release_steps
        if not (1 <= new.wait <= longest and new.clean_steps >= 0):
            raise ValueError(
                f"wait={new.wait}, clean_steps={new.clean_steps}: expected 1 to {longest}, and "
                "0 or more"
            )
        self.value = self._within_bounds(new.factor)
        self._wait, self._clean_steps = new.wait, new.clean_steps
        self._return_factor, self._safe = new.return_factor, new.safe
        self._at_rest = self.value == 1.0 and not new.clean_steps

    def _within_bounds(self, factor: float) -> float:
        return min(self._maximum, max(self._minimum, factor))

    def _is_usable(self, factor: float) -> bool:
        if isfinite(factor) and factor > 0.0:
            return True
        if not self._told:
            self._told = True
            log.warning(
                "esper-otel: a decision has lr_scale=%r, expected a positive number; "
                "it is not applied",
                factor,
            )
        return False


RATE_RELEASE = 1.5
"""Times the usual rate, at which a rate that leapt is the script's own again. Given back as
soon as it is below the bound that it crossed, it would leap once more."""


class LeapHold:
    """One factor for a setting that leapt, a learning rate or a momentum, until the script's
    own is usual again.

    Held to a fixed value, it would stay up where its schedule comes down.
    """

    def __init__(self) -> None:
        self._factor = 1.0
        self._until = inf
        self._usual: float | None = None
        self._phase = 0

    @property
    def holds(self) -> bool:
        """Whether the next update may not be made as the script has it."""
        return self._factor != 1.0 or self._usual is not None

    def factor_at(self, value: float | None, phase: int) -> float:
        """The factor for an update that the script makes with ``value``, in ``phase``.

        1.0 where nothing is held; another phase, and a value that is no number, end it.
        """
        if not self.holds:
            return 1.0
        usual, self._usual = self._usual, None
        if usual is not None and value is not None and value > self._until:
            self._factor = usual / value
        if value is None or value <= self._until or phase != self._phase:
            self._factor = 1.0
        return self._factor

    def take_back(self, factor: float, until: float, phase: int) -> None:
        """The setting leapt in ``phase``; ``factor`` takes it back to what is usual, which it
        is again at ``until`` or below."""
        self._factor, self._until, self._phase = factor, until, phase

    def take_back_to(self, usual: float, leapt: float, phase: int) -> None:
        """The setting leapt to ``leapt`` in ``phase``, which was seen in a step that is over:
        from the next update on it is ``usual``, unless it has come half of the way back by
        itself."""
        self._usual, self._until, self._phase = usual, half_way(usual, leapt), phase


def half_way(usual: float, leapt: float) -> float:
    """Where a momentum that ``leapt`` is the script's own again: a leap of one step must not
    take back a value that is no leap and follows it."""
    return (usual + leapt) / 2


class Responses:
    """Applies decisions to a run in ``enforce``, and nothing otherwise."""

    def __init__(
        self, rate: RateFactor, *, enforce: bool, restoring: Restoring | None = None
    ) -> None:
        self.rate = rate
        self.rate_hold = LeapHold()
        self.momentum_hold = LeapHold()
        self.restoring = restoring or Restoring()
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
        parameters = decision.parameters
        if LR_SCALE in parameters and (
            decision.action is Action.OPTIMIZER or RESTORE in parameters
        ):
            return self.rate.scale_by(parameters[LR_SCALE])
        self.rate.clean_step()
        return False

    def asks_to_restore(self, decision: Decision) -> bool:
        """Whether ``decision``, about a step, is to put weights back: of whichever action, as
        the stronger one of another rule takes nothing from it."""
        asks = decision.parameters.get(RESTORE) == 1.0
        return asks and self._enforce and decision.reason not in UNJUDGED

    def asks_to_clear(self, decision: Decision) -> bool:
        """Whether gradients that the script keeps are to be cleared from now on."""
        asks = decision.parameters.get(CLEAR_GRADIENTS) == 1.0
        return asks and self._enforce and decision.reason not in UNJUDGED

    def usual_momentum(self, decision: Decision) -> tuple[float, float] | None:
        """The momentum that ``decision``, about a step, takes the next updates back to, and the
        one that it saw; None where it is not about that."""
        scale = decision.parameters.get(MOMENTUM_SCALE, 1.0)
        if not (self._enforce and 0.0 < scale < 1.0) or decision.reason in UNJUDGED:
            return None
        seen = (each.values for each in decision.findings if each.rule == decision.reason)
        momentum = next((values[_MOMENTUM] for values in seen if _MOMENTUM in values), None)
        return None if momentum is None else (scale * momentum, momentum)

    def order_of(self, decision: Decision) -> UpdateOrder:
        """What ``decision``, made about one update, asks for; within the bounds of the rate."""
        parameters = decision.parameters
        if not self._enforce or not parameters or decision.reason in UNJUDGED:
            return AS_IT_IS
        scale, max_norm = parameters.get(LR_SCALE, 1.0), parameters.get(MAX_NORM)
        if max_norm is not None and not (isfinite(max_norm) and max_norm > 0.0):
            max_norm = None
        momentum = parameters.get(MOMENTUM_SCALE, 1.0)
        return UpdateOrder(
            self.rate.bounded(scale),
            max_norm,
            skip=parameters.get(SKIP_STEP) == 1.0,
            restore=parameters.get(RESTORE) == 1.0,
            momentum_scale=momentum if 0.0 < momentum < 1.0 else 1.0,
        )

    def apply_pause(self, decision: Decision) -> bool:
        """Call what is registered for a PAUSE, each on its own; whether any was called."""
        if not self._enforce or decision.action is not Action.PAUSE:
            return False
        for freeze in self._on_pause:
            try:
                freeze(decision)
            except Exception:
                log.exception(
                    "esper-otel: a callback of run.on_pause raised; the run continues"
                )
        return bool(self._on_pause)
