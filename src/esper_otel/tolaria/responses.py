"""What a decision does to the run: the one place where anything is applied."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from esper_otel.leyline.decisions import Action, Decision

log = logging.getLogger("esper_otel")


class Optimizer(Protocol):
    """As much of ``torch.optim.Optimizer`` as a response touches."""

    param_groups: list[dict[str, Any]]


class _Group:
    """What has been done to the learning rate of one parameter group."""

    __slots__ = ("scale", "written")

    def __init__(self) -> None:
        self.scale = 1.0
        """Product of all factors applied and not given back."""
        self.written = math.nan
        """The learning rate as last left here."""


class LearningRate:
    """Scales the learning rates of an optimizer, and gives them back.

    Each OPTIMIZER decision multiplies by its ``lr_scale``; the product of all of them
    stays within ``[minimum, maximum]``. After ``release_steps`` steps without one, the
    rate is given back geometrically over as many steps. Trouble that comes back while it
    is being given back, or is just given back, doubles the wait, as a breaker's cool-down
    does: a cause that never goes away is tried again ever more rarely.

    A scheduler is not fought. When it has set the rate meanwhile, the ratio to what was
    left here tells which kind it is: one that sets rates absolutely (``LambdaLR``) has
    undone the scaling, which is then forgotten; one that multiplies what it finds
    (``MultiStepLR``) has kept it, and so has this.
    """

    LONGEST_WAIT = 16
    """Times ``release_steps`` that the wait may grow to."""

    def __init__(self, *, minimum: float, maximum: float, release_steps: int) -> None:
        self._minimum = minimum
        self._maximum = maximum
        self._release_steps = release_steps
        self._wait = release_steps
        self._clean_steps = 0
        self._return_factor = 1.0
        self._groups: list[_Group] = []
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._warned = False

    @property
    def scale(self) -> float:
        """The factor in force: 1.0 when the rate is the run's own (mean over groups)."""
        if not self._groups:
            return 1.0
        return sum(group.scale for group in self._groups) / len(self._groups)

    def scale_by(self, factor: float, optimizer: Optimizer) -> None:
        """Multiply the learning rates by ``factor``, within the bounds."""
        if not (math.isfinite(factor) and factor > 0):
            log.warning("lr_scale %r is not a positive number: not applied", factor)
            return
        if self._clean_steps > self._wait:
            self._wait = min(2 * self._wait, self.LONGEST_WAIT * self._release_steps)
        self._clean_steps = 0
        self._multiply(factor, optimizer)

    def step_passed(self, optimizer: Optimizer) -> None:
        """A step without an OPTIMIZER decision: after enough of them, give back."""
        self._clean_steps += 1
        past = self._clean_steps - self._wait
        if past <= 0:
            return
        if past == 1:
            scale = self.scale
            self._return_factor = (1.0 / scale) ** (1.0 / self._release_steps)
        if past <= self._release_steps:
            last = past == self._release_steps
            self._multiply(math.inf if last else self._return_factor, optimizer)
        elif past > self._wait + self._release_steps:
            # As long again with the run's own rate: whatever it was, it is over.
            self._groups = []
            self._wait, self._clean_steps = self._release_steps, 0

    @property
    def at_rest(self) -> bool:
        """Whether nothing is held and nothing remembered: no work at a clean step."""
        return not self._groups

    def _multiply(self, factor: float, optimizer: Optimizer) -> None:
        """``factor`` infinite: give everything back at once."""
        groups = optimizer.param_groups
        if self._optimizer is None or self._optimizer() is not optimizer:
            self._groups = []  # another optimizer: what was done to the last one is its own
            self._optimizer = weakref.ref(optimizer)
        while len(self._groups) < len(groups):
            self._groups.append(_Group())
        for state, group in zip(self._groups, groups, strict=False):
            rate = self._read(group)
            if rate is None:
                continue
            self._notice_scheduler(state, rate)
            if math.isinf(factor):
                scale = 1.0
            else:
                scale = min(self._maximum, max(self._minimum, state.scale * factor))
            if scale != state.scale:
                rate *= scale / state.scale
                _write(group, rate)
            state.scale, state.written = scale, rate

    def _read(self, group: dict[str, Any]) -> float | None:
        rate = group.get("lr")
        if isinstance(rate, int | float):
            return float(rate)
        if getattr(getattr(rate, "device", None), "type", None) == "cpu":
            return float(rate)  # type: ignore[arg-type]  # a 0-d tensor, as capturable=True has
        if not self._warned:
            self._warned = True
            log.warning(
                "the learning rate lies on a device, reading it would stall the run: "
                "OPTIMIZER decisions are not applied to it"
            )
        return None

    @staticmethod
    def _notice_scheduler(state: _Group, rate: float) -> None:
        if state.scale == 1.0 or rate == state.written or rate <= 0 or state.written <= 0:
            return
        moved = math.log(rate / state.written)
        undone = -math.log(state.scale)
        if abs(moved - undone) < abs(moved):
            state.scale = 1.0


def _write(group: dict[str, Any], rate: float) -> None:
    held = group["lr"]
    if isinstance(held, int | float):
        group["lr"] = rate
    else:
        held.fill_(rate)  # in place: a captured graph reads this very tensor


class Responses:
    """Applies decisions to a run when told to, and only counts them otherwise."""

    def __init__(self, learning_rate: LearningRate, *, enforce: bool) -> None:
        self._learning_rate = learning_rate
        self._enforce = enforce
        self._on_pause: list[Callable[[Decision], None]] = []
        self.applied = 0
        """Decisions that changed something."""

    @property
    def enforcing(self) -> bool:
        """Whether decisions are applied (``enforce``) or only reported (``advise``)."""
        return self._enforce

    @property
    def lr_scale(self) -> float:
        """The factor in force on the learning rate."""
        return self._learning_rate.scale

    def on_pause(self, freeze: Callable[[Decision], None]) -> None:
        """Register what a PAUSE freezes; ``freeze`` is called with the decision."""
        self._on_pause.append(freeze)

    def apply(self, decision: Decision, optimizer: Optimizer | None) -> bool:
        """Do what ``decision`` says; returns whether there was anything to do."""
        if not self._enforce:
            return False
        acted = False
        if decision.action is Action.OPTIMIZER and "lr_scale" in decision.parameters:
            if optimizer is not None:
                self._learning_rate.scale_by(decision.parameters["lr_scale"], optimizer)
                acted = True
        elif optimizer is not None and not self._learning_rate.at_rest:
            self._learning_rate.step_passed(optimizer)
        if decision.action is Action.PAUSE:
            for freeze in self._on_pause:
                freeze(decision)
                acted = True
        self.applied += acted
        return acted
