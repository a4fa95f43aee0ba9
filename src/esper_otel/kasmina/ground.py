"""Ground: what the plots of a garden share: settings, tools, and how the run is doing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import isfinite, nan
from time import perf_counter_ns

from torch.optim import Optimizer

from esper_otel.kasmina.gates import Limits
from esper_otel.kasmina.kernels import KernelFetcher
from esper_otel.kasmina.optimizers import OptimizerFactory
from esper_otel.kasmina.schedules import SCHEDULES
from esper_otel.kasmina.seed import Read
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
        fetcher: KernelFetcher,
        make_optimizer: OptimizerFactory,
        read: Read,
    ) -> None:
        self.settings = settings
        self.limits = Limits(
            gradient_ratio=settings.gradient_ratio_max,
            kernel_ms=settings.kernel_budget_ms,
            loss_rise=settings.loss_rise_max,
            loss_fall=settings.loss_fall_min,
            step_rise=settings.step_rise_max,
        )
        self.schedule = SCHEDULES[settings.alpha_schedule]
        self.fetcher = fetcher
        self.make_optimizer = make_optimizer
        self.read = read
        self.host: Callable[[], Optimizer | None] = lambda: None
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

    def tell(self, name: str, severity: Severity, text: str, **attributes: Attribute) -> None:
        """Note an event; ``attributes`` by name, without their prefix ``esper.``."""
        named = {f"esper.{key.replace('_', '.')}": value for key, value in attributes.items()}
        self.events.append(Event(name, perf_counter_ns(), severity, text, named))
