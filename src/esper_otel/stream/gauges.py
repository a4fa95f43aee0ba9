"""Gauges: the latest step record through the OpenTelemetry metrics API.

Every metric of the registry is an observable gauge, so a ``MeterProvider`` of the user's
own exports it in its own way. Nothing happens unless a reader collects; then the newest
record of the ring is read, which costs the training thread nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from math import isfinite

from opentelemetry.metrics import CallbackOptions, Observation, get_meter

from esper_otel._version import __version__
from esper_otel.leyline.custom import EVALUATION, NAME, is_evaluation
from esper_otel.leyline.metrics import CUSTOM, SEED_ID, SEED_METRICS, STEP_METRICS
from esper_otel.stream.encoding import SCOPE
from esper_otel.stream.environment import can_have_provider
from esper_otel.stream.ring import FrameRing

log = logging.getLogger("esper_otel")

_Callback = Callable[[CallbackOptions], Iterable[Observation]]


class _Shown:
    """The ring whose latest frame the gauges of this process report."""

    def __init__(self) -> None:
        self.ring: FrameRing | None = None
        self.others: list[FrameRing] = []
        """Of runs that began before and are not over."""
        self.registered = False
        self.lock = threading.Lock()


_shown = _Shown()


def register(ring: FrameRing) -> None:
    """Report the latest frame of ``ring`` from now on; gauges are made once a process."""
    with _shown.lock:
        if _shown.ring is not None:
            _shown.others.append(_shown.ring)
        _shown.ring = ring
        if _shown.registered:
            return
        _shown.registered = True
        if not can_have_provider("OTEL_PYTHON_METER_PROVIDER"):
            return
        meter = get_meter(SCOPE, __version__)
        for slot, metric in enumerate(STEP_METRICS):
            meter.create_observable_gauge(
                metric.instrument, [_step_callback(slot)], metric.unit, metric.meaning
            )
        for slot, metric in enumerate(SEED_METRICS):
            meter.create_observable_gauge(
                metric.instrument, [_seed_callback(slot)], metric.unit, metric.meaning
            )
        meter.create_observable_gauge(
            CUSTOM.instrument, [_observe_custom], CUSTOM.unit, CUSTOM.meaning
        )


def unregister(ring: FrameRing) -> None:
    """Report nothing more of ``ring``, but of the run before that, if there is one."""
    # Without the lock: a forked child calls this, and the lock may be held there forever.
    _shown.others = [other for other in _shown.others if other is not ring]
    if _shown.ring is ring:
        _shown.ring = _shown.others.pop() if _shown.others else None


def _step_callback(slot: int) -> _Callback:
    def observe(options: CallbackOptions) -> Iterable[Observation]:
        return _never_raising(_step_observations, slot)

    return observe


def _seed_callback(slot: int) -> _Callback:
    def observe(options: CallbackOptions) -> Iterable[Observation]:
        return _never_raising(_seed_observations, slot)

    return observe


def _observe_custom(options: CallbackOptions) -> Iterable[Observation]:
    return _never_raising(_custom_observations, 0)


def _never_raising(
    observations: Callable[[FrameRing, int], list[Observation]], slot: int
) -> list[Observation]:
    ring = _shown.ring
    if ring is None:
        return []
    try:
        return observations(ring, slot)
    except Exception:
        log.debug("reading the latest step record failed", exc_info=True)
        return []


def _step_observations(ring: FrameRing, slot: int) -> list[Observation]:
    frames = ring.latest()
    if frames is None:
        return []
    value = float(frames.steps.values[0, slot])
    return [Observation(value)] if isfinite(value) else []


def _custom_observations(ring: FrameRing, slot: int) -> list[Observation]:
    """The newest of each, whenever that was: most steps have none."""
    marked = {True: {EVALUATION: True}, False: {}}
    return [
        Observation(value, {NAME: name, **marked[is_evaluation(name)]})
        for name, value in ring.latest_custom.copy().items()
    ]


def _seed_observations(ring: FrameRing, slot: int) -> list[Observation]:
    frames = ring.latest()
    if frames is None:
        return []
    return [
        Observation(value, {SEED_ID: frames.seed_ids[number]})
        for number, value in zip(
            frames.seeds.tags.tolist(), frames.seeds.values[:, slot].tolist(), strict=True
        )
        if isfinite(value)
    ]
