"""Ground: what the plots of a garden share: settings, tools, and how the run is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import isfinite, nan
from time import monotonic, perf_counter_ns

import torch
from torch.optim import Optimizer

from esper_otel.kasmina.gates import Limits
from esper_otel.kasmina.kernels import KernelFetcher
from esper_otel.kasmina.optimizers import OptimizerFactory
from esper_otel.kasmina.schedules import Course
from esper_otel.kasmina.seed import Read
from esper_otel.kasmina.state import WeatherState
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Attribute, Event
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.settings import EsperSettings

WEIGHT = 0.2
"""Of the newest step in the weighted mean of step latency, as in all our statistics."""

MAX_EVENTS = 1024
"""Events that wait for somebody to take them; beyond it the oldest are forgotten."""

_LOSS = STEP_SLOT["loss"]
_LOSS_EWMA = STEP_SLOT["loss_ewma"]
_GRADIENT_NORM = STEP_SLOT["gradient_norm"]
_STEP_LATENCY = STEP_SLOT["step_latency_ms"]


class Ground:
    """What the plots of a garden share: settings, tools, and how the run is doing."""

    def __init__(
        self,
        settings: EsperSettings,
        *,
        host: Callable[[], Optimizer | None],
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
        self.course = Course(
            settings.alpha_schedule.value, settings.blending_steps, settings.alpha_temperature
        )
        """How alpha rises in seeds that begin to blend from now on."""
        self.clock = clock
        """Monotonic seconds."""
        # initial_seed only tells what the generator was seeded with; it draws nothing.
        self.root = torch.initial_seed()
        """What the parameters of all seeds are made from, together with their ids."""
        self.fetcher = fetcher
        self.make_optimizer = make_optimizer
        self.read = read
        self.host = host
        """The host's optimizer, which is not kept alive here."""
        self.loss = nan
        self.host_norm = nan
        self.step_ms = nan
        self.fetch_ms = nan
        self.violations = 0
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def look_at(self, latest: Sequence[float]) -> None:
        """Take in how the run is doing from the newest row that is whole."""
        loss = latest[_LOSS_EWMA]
        # The weighted mean is gated, the loss is not.
        self.loss = loss if loss == loss else latest[_LOSS]
        self.host_norm = latest[_GRADIENT_NORM]
        took, mean = latest[_STEP_LATENCY], self.step_ms
        if isfinite(took):
            self.step_ms = took if mean != mean else mean + WEIGHT * (took - mean)

    def weather(self) -> WeatherState:
        """How the run is doing, for :meth:`resume`."""
        return WeatherState(
            loss=self.loss,
            host_norm=self.host_norm,
            step_ms=self.step_ms,
            fetch_ms=self.fetch_ms,
            violations=self.violations,
        )

    def resume(self, weather: WeatherState, root: int) -> None:
        """Go on from there."""
        self.loss, self.host_norm, self.step_ms = (
            weather.loss,
            weather.host_norm,
            weather.step_ms,
        )
        self.fetch_ms, self.violations = weather.fetch_ms, weather.violations
        self.root = root

    def tell(self, name: str, severity: Severity, text: str, **attributes: Attribute) -> None:
        """Note an event; ``attributes`` by name, without their prefix ``esper.``."""
        named = {f"esper.{key.replace('_', '.')}": value for key, value in attributes.items()}
        self.events.append(Event(name, perf_counter_ns(), severity, text, named))
