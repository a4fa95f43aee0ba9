"""Context: data shared by the slots of a garden, and a slot's reports about its seed.

:class:`GardenContext` has the settings, the tools and how the run is doing, with the events
that wait to be taken; :class:`SlotEvents` writes those of one slot.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from math import inf, isfinite, nan
from time import monotonic, perf_counter_ns

import torch
from torch import nn
from torch.optim import Optimizer

from esper_otel.kasmina.blending import AlphaSchedule
from esper_otel.kasmina.gates import GateFailed, Limits, Verdict
from esper_otel.kasmina.host import OptimizerFactory
from esper_otel.kasmina.kernels import KernelFetcher
from esper_otel.kasmina.seed import Read, Seed
from esper_otel.kasmina.state import PlateauState, RunSignals
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Attribute, Event
from esper_otel.leyline.metrics import STEP_SLOT, WEIGHT
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings

MAX_EVENTS = 1024
"""Events that wait for somebody to take them; beyond it the oldest are forgotten."""

_LOSS = STEP_SLOT["loss"]
_LOSS_EWMA = STEP_SLOT["loss_ewma"]
_GRADIENT_NORM = STEP_SLOT["gradient_norm"]
_STEP_LATENCY = STEP_SLOT["step_latency_ms"]


class Plateau:
    """Says when a loss has stopped falling.

    ``steps`` without one that is lower than the best by a share of ``improvement`` make a
    plateau; a step without a loss does not count.
    """

    __slots__ = ("_improvement", "_steps", "best", "waited")

    def __init__(self, steps: int, improvement: float) -> None:
        self._steps = steps
        self._improvement = improvement
        self.best = inf
        self.waited = 0

    def update(self, loss: float) -> None:
        """Take the loss of one step; NaN is none."""
        if not isfinite(loss):
            return
        if loss < self.best - self._improvement * abs(self.best) or self.best == inf:
            self.best = loss
            self.waited = 0
        else:
            self.waited += 1

    @property
    def reached(self) -> bool:
        """Whether it has lasted long enough."""
        return self.waited >= self._steps

    @property
    def state(self) -> PlateauState:
        """How long the loss has not fallen, for :meth:`load_state`."""
        return PlateauState(best=self.best, waited=self.waited)

    def load_state(self, state: PlateauState) -> None:
        """Set how long the loss has not fallen."""
        self.best, self.waited = state.best, state.waited

    def restart(self) -> None:
        """The network is another one now: what it can do has to show anew."""
        self.best = inf
        self.waited = 0


class GardenContext:
    """Settings, tools, and how the run is doing; one for all slots of a garden."""

    def __init__(
        self,
        settings: EsperSettings,
        *,
        host_optimizer: Callable[[], Optimizer | None],
        fetcher: KernelFetcher,
        make_optimizer: OptimizerFactory,
        read: Read,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.settings = settings
        self.limits = Limits(
            gradient_ratio=settings.gradient_ratio_max,
            kernel_ms=settings.kernel_budget_ms,
            loss_rise=settings.loss_rise_max,
            loss_fall=settings.loss_fall_min,
            step_rise=settings.step_rise_max,
        )
        self.alpha_schedule = AlphaSchedule(
            settings.alpha_schedule.value, settings.blending_steps, settings.alpha_temperature
        )
        """How alpha rises in seeds that begin to blend from now on."""
        self.clock = clock
        """Monotonic seconds."""
        # initial_seed only tells what the generator was seeded with; it draws nothing.
        self.rng_root = torch.initial_seed()
        """What the parameters of all seeds are made from, together with their ids."""
        self.fetcher = fetcher
        self.make_optimizer = make_optimizer
        self.read = read
        self.host_optimizer = host_optimizer
        """Gives the host's optimizer, which is not kept alive here."""
        self.followers: list[weakref.ref[nn.Module]] = []
        """Copies of the model that get each fossil as well."""
        self.loss = nan
        self.host_norm = nan
        self.step_ms = nan
        self.fetch_ms = nan
        self.violations = 0
        self.plateau = Plateau(settings.plateau_steps, settings.plateau_improvement)
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def update_signals(self, latest: Sequence[float]) -> None:
        """Take in how the run is doing from the newest row that is whole."""
        loss = latest[_LOSS_EWMA]
        # The weighted mean is gated, the loss is not.
        self.loss = loss if loss == loss else latest[_LOSS]
        self.host_norm = latest[_GRADIENT_NORM]
        took, mean = latest[_STEP_LATENCY], self.step_ms
        if isfinite(took):
            self.step_ms = took if mean != mean else mean + WEIGHT * (took - mean)
        self.plateau.update(self.loss)

    def signals(self) -> RunSignals:
        """How the run is doing, for :meth:`load_signals`."""
        return RunSignals(
            loss=self.loss,
            host_norm=self.host_norm,
            step_ms=self.step_ms,
            fetch_ms=self.fetch_ms,
            violations=self.violations,
        )

    def load_signals(self, signals: RunSignals) -> None:
        """Set how the run is doing to what :meth:`signals` gave before a restart."""
        self.loss, self.host_norm = signals.loss, signals.host_norm
        self.step_ms, self.fetch_ms = signals.step_ms, signals.fetch_ms
        self.violations = signals.violations

    def add_event(
        self, name: str, severity: Severity, text: str, **attributes: Attribute
    ) -> None:
        """Note an event; ``attributes`` by name, without their prefix ``esper.``."""
        named = {f"esper.{key.replace('_', '.')}": value for key, value in attributes.items()}
        self._events.append(Event(name, perf_counter_ns(), severity, text, named))

    def take_events(self) -> list[Event]:
        """The events since last asked."""
        if not self._events:
            return []
        taken = list(self._events)
        self._events.clear()
        return taken


class SlotEvents:
    """Events of the slot called ``slot`` and of the seed in it, none twice in a row."""

    __slots__ = ("_context", "_slot", "fallback", "faults", "unused")

    def __init__(self, slot: str, context: GardenContext) -> None:
        self._slot = slot
        self._context = context
        self.unused = False
        """Whether it was reported that nothing can grow here."""
        self.fallback = ""
        """The fallback reported last, of the seed that is here."""
        self.faults: set[str] = set()
        """What of the seed that is here was reported to have raised."""

    def seed_changed(self) -> None:
        """Another seed comes: what was reported of the last one is new again."""
        self.fallback = ""
        self.faults = set()

    def add(
        self,
        seed: Seed | None,
        name: str,
        severity: Severity,
        text: str,
        **attributes: Attribute,
    ) -> None:
        """Note the event ``name``, with slot, seed and blueprint besides ``attributes``."""
        if seed is not None:
            attributes["seed_id"] = seed.id
            attributes["blueprint"] = seed.blueprint
        self._context.add_event(name, severity, text, slot=self._slot, **attributes)

    def stage_changed(self, seed: Seed | None, left: Stage, target: Stage, why: str) -> None:
        """The slot went from one stage to the next."""
        self.add(
            seed,
            events.STAGE_CHANGED,
            Severity.NORMAL,
            f"{self._who(seed)}: {left.name} to {target.name} ({why})",
            stage=target.name,
            stage_before=left.name,
        )

    def gate_checked(self, seed: Seed, gate: str, verdict: Verdict) -> None:
        """A gate opened, or shut for another reason than before."""
        reason = verdict.reason if isinstance(verdict, GateFailed) else ""
        if seed.gates.get(gate) == reason:
            return
        seed.gates[gate] = reason
        text, severity = f"{seed.id}: {gate} is open", Severity.NORMAL
        if isinstance(verdict, GateFailed):
            text, severity = f"{seed.id}: {gate} is shut: {verdict}", Severity.WARNING
        self.add(seed, events.GATE, severity, text, gate=gate, passed=not reason, reason=reason)

    def fell_back(self, seed: Seed, reason: str) -> None:
        """Identity took the place of the seed's kernel."""
        if reason == self.fallback:
            return
        self.fallback = reason
        text = f"identity replaces {seed.id}: {reason}"
        self.add(
            seed,
            events.FALLBACK,
            Severity.WARNING,
            text,
            reason=reason,
            attempts=seed.attempts,
        )

    def fault_raised(self, seed: Seed | None, what: str, error: Exception) -> None:
        """Something of the seed raised; reported once per seed."""
        if what in self.faults:
            return
        self.faults.add(what)
        text = f"{self._who(seed)}: {what}: {type(error).__name__}: {error}"
        self.add(seed, events.FAULT, Severity.HIGH, text, reason=repr(error))

    def slot_unused(self, seed: Seed | None, why: str) -> None:
        """Nothing can grow here; reported once per slot."""
        if not self.unused:
            self.unused = True
            self.add(seed, events.UNUSED_SLOT, Severity.WARNING, why)

    def _who(self, seed: Seed | None) -> str:
        return self._slot if seed is None else seed.id
