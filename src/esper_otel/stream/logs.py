"""Logs: events as log records, in OTLP or through a logger of the user's own.

Events are rare, so they go through the protobuf classes. They are log records with an
event name, as OpenTelemetry's event model has them, and belong to the trace of the step
in which they happened and to its span ``train.step``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from opentelemetry import _logs as api
from opentelemetry.context import Context
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

from esper_otel._version import __version__
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Attribute, Event
from esper_otel.leyline.trace_ids import STEP_SPAN, span_id, trace_id

SCOPE = "esper_otel"

_SEVERITIES: dict[Severity, SeverityNumber.ValueType] = {
    Severity.NORMAL: SeverityNumber.SEVERITY_NUMBER_INFO,
    Severity.WARNING: SeverityNumber.SEVERITY_NUMBER_WARN,
    Severity.HIGH: SeverityNumber.SEVERITY_NUMBER_ERROR,
    Severity.CRITICAL: SeverityNumber.SEVERITY_NUMBER_FATAL,
}


class TrainerIdentity(NamedTuple):
    """Whose events these are, as far as the ids of its traces follow from it."""

    run: str
    rank: int
    instance: str

    def span_of(self, event: Event) -> tuple[int, int]:
        """Trace and span id of the step that ``event`` happened in; zeros without a step."""
        step = event.attributes.get("esper.step")
        if not isinstance(step, int):
            return 0, 0
        run, rank, instance = self
        return trace_id(run, step), span_id(run, rank, instance, step, STEP_SPAN)


def encode_events(events: Sequence[Event], resource: bytes, trainer: TrainerIdentity) -> bytes:
    """One export request with a record per event; ``resource`` is serialised already.

    The events' marks must be Unix nanoseconds by now.
    """
    request = ExportLogsServiceRequest()
    of_us = request.resource_logs.add()
    of_us.resource.ParseFromString(resource)
    scope = of_us.scope_logs.add()
    scope.scope.name, scope.scope.version = SCOPE, __version__
    observed = time.time_ns()
    scope.log_records.extend(_record(event, observed, trainer) for event in events)
    return request.SerializeToString()


def emit_events(events: Sequence[Event], logger: api.Logger, trainer: TrainerIdentity) -> None:
    """The same records through a logger; the events' marks are Unix nanoseconds."""
    observed = time.time_ns()
    for event in events:
        logger.emit(
            timestamp=event.mark,
            observed_timestamp=observed,
            context=_context(*trainer.span_of(event)),
            severity_number=api.SeverityNumber(_SEVERITIES[event.severity]),
            severity_text=str(event.severity),
            body=event.text,
            attributes=dict(event.attributes),
            event_name=event.name,
        )


def _context(trace: int, span: int) -> Context:
    """In which that span is the current one; without ids nothing is."""
    if not trace:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED)
    parent = NonRecordingSpan(SpanContext(trace, span, is_remote=False, trace_flags=flags))
    return set_span_in_context(parent, Context())


def _record(event: Event, observed_unix_nano: int, trainer: TrainerIdentity) -> LogRecord:
    record = LogRecord(
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
    trace, span = trainer.span_of(event)
    if trace:
        record.trace_id = trace.to_bytes(16, "big")
        record.span_id = span.to_bytes(8, "big")
        record.flags = TraceFlags.SAMPLED
    return record


def _any(value: Attribute) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(string_value=value)
