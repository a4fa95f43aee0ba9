"""The factor that decisions put on a run's learning rates, and how it is given back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec

log = logging.getLogger("esper_otel")


class RateState(msgspec.Struct, forbid_unknown_fields=True):
    """What a :class:`RateFactor` needs to go on after a restart; counts are steps."""

    factor: float
    wait: int
    clean_steps: int
    return_factor: float


class RateFactor:
    """One number for all learning rates of a run: 1.0 when they are the script's own.

    Each ``lr_scale`` multiplies it; the product of all of them stays within
    ``[minimum, maximum]``. After ``release_steps`` clean steps it is given back
    geometrically over as many more. Trouble that comes back meanwhile, or just after,
    doubles the wait, as a circuit breaker's cool-down does: a cause that never goes away
    is tried again ever more rarely. A step is clean when the sidecar has judged it and
    asked for no cut; an unjudged step changes nothing here.
    """

    LONGEST_WAIT = 16
    """Times ``release_steps`` that the wait may grow to."""

    def __init__(self, *, minimum: float, maximum: float, release_steps: int) -> None:
        self.value = 1.0
        """The factor in force."""
        self._minimum = minimum
        self._maximum = maximum
        self._release_steps = release_steps
        self._wait = release_steps
        self._clean_steps = 0
        self._return_factor = 1.0
        self._at_rest = True
        self._told = False

    def scale_by(self, factor: float) -> bool:
        """Multiply by ``factor``, within the bounds; whether that changed anything.

        What is no positive, finite number is reported once and not applied.
        """
        if not self._is_usable(factor):
            return False
        if self._clean_steps > self._wait:
            self._wait = min(2 * self._wait, self.LONGEST_WAIT * self._release_steps)
        self._clean_steps = 0
        before = self.value
        self.value = self._within_bounds(before * factor)
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
            self._return_factor = (1.0 / self.value) ** (1.0 / self._release_steps)
        if past < self._release_steps:
            self.value *= self._return_factor
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

    @property
    def held(self) -> bool:
        """Whether the rates are not the script's own."""
        return self.value != 1.0

    def state(self) -> dict[str, Any]:
        """Plain data for :meth:`resume`."""
        state = RateState(self.value, self._wait, self._clean_steps, self._return_factor)
        return msgspec.structs.asdict(state)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from there; ``ValueError`` for what is no such state, and then as before."""
        try:
            new = msgspec.convert(dict(state), RateState)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from None
        for name in ("factor", "return_factor"):
            number = getattr(new, name)
            if not (math.isfinite(number) and number > 0.0):
                raise ValueError(f"{name}={number!r}: expected a positive number")
        self.value = self._within_bounds(new.factor)
        self._wait, self._clean_steps = new.wait, new.clean_steps
        self._return_factor = new.return_factor
        self._at_rest = self.value == 1.0 and not new.clean_steps

    def _within_bounds(self, factor: float) -> float:
        return min(self._maximum, max(self._minimum, factor))

    def _is_usable(self, factor: float) -> bool:
        if math.isfinite(factor) and factor > 0.0:
            return True
        if not self._told:
            self._told = True
            log.warning(
                "esper-otel: a decision has lr_scale=%r, expected a positive number; "
                "it is not applied",
                factor,
            )
        return False
