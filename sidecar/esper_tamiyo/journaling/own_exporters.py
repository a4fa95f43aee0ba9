"""The OTLP exporters of the official SDK, chosen as ``OTEL_EXPORTER_OTLP_PROTOCOL`` says.

The SDK's own histograms are filled a value at a time. Ours are counted in the decide
process, so they are put into what the SDK exports as they stand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
)
from opentelemetry.sdk.trace.export import SpanExporter

from esper_tamiyo.journaling.messages import Distribution
from esper_tamiyo.journaling.own_metrics import OwnMetric

Adding = Callable[[MetricsData], list[Metric]]


def protocol_of(signal: str) -> str:
    """``http/protobuf`` unless a variable says ``grpc``."""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "")
    told = own or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    return told.strip().lower() or "http/protobuf"


def span_exporter() -> SpanExporter:
    """The exporter of spans."""
    if protocol_of("TRACES") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as OverHttp,
    )

    return OverHttp()


def metric_exporter(adding: Adding) -> MetricExporter:
    """The exporter of metrics, which adds what ``adding`` gives."""
    if protocol_of("METRICS") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

        return Supplemented(OTLPMetricExporter(), adding)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
        OTLPMetricExporter as OverHttp,
    )

    return Supplemented(OverHttp(), adding)


class Supplemented(MetricExporter):
    """Exports through another exporter, with more metrics in the first scope."""

    def __init__(self, exporter: MetricExporter, adding: Adding) -> None:
        super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)
        self._exporter = exporter
        self._adding = adding

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """Add, and export."""
        more = self._adding(metrics_data)
        resource, *resources = metrics_data.resource_metrics
        scope, *scopes = resource.scope_metrics
        scope = replace(scope, metrics=[*scope.metrics, *more])
        resource = replace(resource, scope_metrics=[scope, *scopes])
        supplemented = MetricsData([resource, *resources])
        return self._exporter.export(supplemented, timeout_millis, **kwargs)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """As the other exporter does."""
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """As the other exporter does."""
        self._exporter.shutdown(timeout_millis, **kwargs)


def histogram(metric: OwnMetric, values: Distribution, began_unix_nano: int) -> Metric:
    """``values`` as the SDK has its own: cumulative since the decide process began."""
    point = HistogramDataPoint(
        attributes={},
        start_time_unix_nano=began_unix_nano,
        time_unix_nano=time.time_ns(),
        count=sum(values.counts),
        sum=values.total,
        bucket_counts=values.counts,
        explicit_bounds=values.bounds,
        min=values.lowest if isfinite(values.lowest) else 0.0,
        max=values.highest if isfinite(values.highest) else 0.0,
    )
    data = Histogram([point], AggregationTemporality.CUMULATIVE)
    return Metric(metric.name, metric.meaning, metric.unit, data)
