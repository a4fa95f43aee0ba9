"""Logs: events as OTLP log records.

Events are rare, so they go through the protobuf classes. They are log records with an
event name, as OpenTelemetry's event model has them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber

from esper_otel import __version__
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Attribute, Event

SCOPE = "esper_otel"

_SEVERITIES: dict[Severity, SeverityNumber.ValueType] = {
    Severity.NORMAL: SeverityNumber.SEVERITY_NUMBER_INFO,
    Severity.WARNING: SeverityNumber.SEVERITY_NUMBER_WARN,
    Severity.HIGH: SeverityNumber.SEVERITY_NUMBER_ERROR,
    Severity.CRITICAL: SeverityNumber.SEVERITY_NUMBER_FATAL,
}


def encode_events(events: Sequence[Event], resource: bytes) -> bytes:
    """One export request with a record per event; ``resource`` is serialised already.

    The events' marks must be Unix nanoseconds by now.
    """
    request = ExportLogsServiceRequest()
    of_us = request.resource_logs.add()
    of_us.resource.ParseFromString(resource)
    scope = of_us.scope_logs.add()
    scope.scope.name, scope.scope.version = SCOPE, __version__
    observed = time.time_ns()
    scope.log_records.extend(_record(event, observed) for event in events)
    return request.SerializeToString()


def _record(event: Event, observed_unix_nano: int) -> LogRecord:
    return LogRecord(
        time_unix_nano=event.mark,
        observed_time_unix_nano=observed_unix_nano,
        severity_number=_SEVERITIES[event.severity],
        severity_text=event.severity,
        body=AnyValue(string_value=event.text),
        attributes=[
            KeyValue(key=key, value=_any(value)) for key, value in event.attributes.items()
        ],
        event_name=event.name,
    )


def _any(value: Attribute) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(string_value=value)
