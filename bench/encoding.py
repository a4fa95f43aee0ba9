"""What it costs to turn steps into OTLP bytes: template patching against the SDK.

24 metrics of 1,000 steps, from values in memory to bytes. The baseline makes the same
message as ours, one ``ScopeMetrics`` per step: the SDK's encoder is given what a reader
would collect after each step, in data classes made before the clock starts. (In one call
it cannot: of several ``ScopeMetrics`` with the same scope it keeps the last.) The two are
compared as decoded messages.

Reported beside it: the cheapest shape the SDK has for the same points, 24 gauges with
1,000 points each. No reader of its own ever collects that, since a gauge keeps one value.

    python -m bench.encoding [--json PATH]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics as PB2ScopeMetrics
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from bench.figures import Figure, alternate, median, run
from esper_otel import __version__
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_METRICS
from esper_otel.stream.encoding import SCOPE, FrameEncoder
from esper_otel.stream.providers import serialised_resource, trainer_resource
from esper_otel.stream.ring import FrameRing, Frames

BENCH = "encoding"
METRICS, STEPS, BLOCKS = 24, 1000, 15
START_NS = 1_790_000_000_000_000_000


def figures() -> list[Figure]:
    rows = [
        [float(step), *(step * 0.001 + metric for metric in range(1, METRICS))]
        for step in range(STEPS)
    ]
    resource = trainer_resource("bench", "bench", 0, 1)
    encoder = FrameEncoder(serialised_resource(resource))
    frames = _frames(rows)
    by_step = [_metrics_data(resource, [row]) for row in rows]
    by_gauge = _metrics_data(resource, rows)

    def ours() -> list[bytes]:
        return [request.body for request in encoder.encode(frames)]

    def sdk_by_step() -> list[bytes]:
        return [encode_metrics(data).SerializeToString() for data in by_step]

    def sdk_by_gauge() -> list[bytes]:
        return [encode_metrics(by_gauge).SerializeToString()]

    if _scopes(ours()) != _scopes(sdk_by_step()):
        raise AssertionError("the two encodings are not the same message")
    ours_us, sdk_us = alternate(lambda: _timed(ours), lambda: _timed(sdk_by_step), BLOCKS)
    ours_again_us, gauge_us = alternate(
        lambda: _timed(ours), lambda: _timed(sdk_by_gauge), BLOCKS
    )
    return [
        Figure.at_most(
            BENCH,
            f"encoding one step of {METRICS} metrics, CPU",
            median(ours_us),
            "µs",
            median(sdk_us),
            bar=1 / 50,
        ),
        Figure.report(BENCH, "the same, slowest block", max(ours_us), "µs", max(sdk_us)),
        Figure.report(
            BENCH,
            f"against the SDK with {STEPS:,} points per gauge",
            median(ours_again_us),
            "µs",
            median(gauge_us),
        ),
    ]


def _timed(encode: Callable[[], list[bytes]]) -> float:
    """CPU time of encoding one step, in µs."""
    start = time.thread_time_ns()
    encode()
    return (time.thread_time_ns() - start) / 1e3 / STEPS


def _frames(rows: list[list[float]]) -> Frames:
    ring = FrameRing(STEPS)
    absent = step_row()[METRICS:]
    for step, row in enumerate(rows):
        ring.put(START_NS + step, row + absent, ())
    frames = ring.drain()
    if frames is None:
        raise AssertionError("the ring is empty")
    return frames


def _metrics_data(resource: Resource, rows: list[list[float]]) -> MetricsData:
    """The values of ``rows`` in the SDK's data classes, one point per row and gauge."""
    metrics = [
        Metric(
            name=metric.instrument,
            description=None,
            unit=metric.unit,
            data=Gauge(
                [NumberDataPoint({}, 0, START_NS + int(row[0]), row[slot]) for row in rows]
            ),
        )
        for slot, metric in enumerate(STEP_METRICS[:METRICS])
    ]
    scope_metrics = ScopeMetrics(InstrumentationScope(SCOPE, __version__), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope_metrics], "")])


def _scopes(bodies: list[bytes]) -> list[PB2ScopeMetrics]:
    """Every ``ScopeMetrics``, as the official classes read them."""
    return [
        scope
        for body in bodies
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
    ]


if __name__ == "__main__":
    sys.exit(run(figures))
