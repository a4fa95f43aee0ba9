"""Files of OTLP: ours, and those of the Collector's file exporter.

Two framings: one JSON object a line, or each request behind its size
(:mod:`esper_otel.leyline.otlp_file`). The Collector compresses either each request (then
JSON too lies behind a size) or the file as one stream, by zstd; a rotated file is often
gzipped later. What a file is shows in its bytes, so that its name need say nothing.

The ids of OTLP's JSON are hexadecimal and its enums numbers; protobuf's own JSON reader takes
the latter, and the former for something else, but nothing here looks at an id. That reader
takes half a millisecond for a step of 24 metrics, several times all the rest of a replay, so
that metrics have a way of their own: what frames are made of, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    Gauge,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from esper_otel.leyline.decompression import ZSTD, DamagedError, opened, unzstd
from esper_otel.leyline.otlp_file import MAX_MESSAGE, RecordingError, bodies

Request = ExportMetricsServiceRequest | ExportLogsServiceRequest | ExportTraceServiceRequest
Kind = TypeVar(
    "Kind", ExportMetricsServiceRequest, ExportLogsServiceRequest, ExportTraceServiceRequest
)

_OBJECT = b"{"


def requests(path: Path, kind: type[Kind]) -> Iterator[Kind]:
    """The requests of one signal in ``path``, in order; others are passed over.

    Raises :class:`~esper_otel.leyline.otlp_file.RecordingError` at the first byte from
    which on there is none, after everything before it was yielded; offsets count
    uncompressed bytes. Raises :class:`OSError` when the file cannot be read, and
    :class:`~esper_otel.leyline.decompression.ZstdMissingError`.
    """
    for offset, data in payloads(path):
        request = request_in(data, kind, path, offset)
        if isinstance(request, kind):
            yield request


def payloads(path: Path) -> Iterator[tuple[int, bytes]]:
    """The requests in ``path`` as they lie there, JSON or protobuf, each with its offset.

    Without what compresses them; raises what :func:`requests` does.
    """
    offset = 0
    try:
        with opened(path) as file:
            start = file.peek(1)[:1]
            if not start:
                raise RecordingError(path, 0, "the file is empty")
            for offset, data in _lines(file, path) if start == _OBJECT else bodies(file, path):
                yield offset, unzstd(data, MAX_MESSAGE) if data.startswith(ZSTD) else data
    except DamagedError as error:
        raise RecordingError(path, offset, str(error)) from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of ``file`` that are not blank, each with its offset."""
    offset = 0
    while line := file.readline(MAX_MESSAGE):
        if not line.endswith(b"\n") and len(line) == MAX_MESSAGE:
            raise RecordingError(path, offset, f"a line of more than {MAX_MESSAGE:,} bytes")
        if not line.isspace():
            yield offset, line
        offset += len(line)


def request_in(data: bytes, kind: type[Kind], path: Path, offset: int) -> Request | None:
    """The request, None when it is of another signal and that shows without reading it.

    Raises :class:`~esper_otel.leyline.otlp_file.RecordingError`.
    """
    if data[:1] == _OBJECT:
        try:
            return json_request(data, kind)
        except JsonError as error:
            raise RecordingError(path, offset, str(error)) from None
    for signal, speaks in _SIGNALS:
        try:
            request = signal.FromString(data)
        except DecodeError:
            continue
        if speaks(request):
            return request
    raise RecordingError(path, offset, "not an OTLP request")


# The requests of all signals begin alike, and protobuf reads one as another when the
# types of fields happen to agree; each has one field that no other signal has there.


def _has_metrics(request: ExportMetricsServiceRequest) -> bool:
    """Whether its metrics have names, or it has none at all."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                return bool(metric.name)
    return True


def _has_records(request: ExportLogsServiceRequest) -> bool:
    return any(
        record.time_unix_nano or record.observed_time_unix_nano
        for resource in request.resource_logs
        for scope in resource.scope_logs
        for record in scope.log_records
    )


def _has_spans(request: ExportTraceServiceRequest) -> bool:
    return any(
        span.trace_id
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    )


_SIGNALS = cast(
    tuple[tuple[type[Request], Callable[[Request], bool]], ...],
    (
        (ExportMetricsServiceRequest, _has_metrics),
        (ExportLogsServiceRequest, _has_records),
        (ExportTraceServiceRequest, _has_spans),
    ),
)


class JsonError(ValueError):
    """Text that is not an OTLP request."""


class _JsonSignals(msgspec.Struct, rename="camel"):
    """Which signal a request is of."""

    resource_metrics: msgspec.Raw = msgspec.Raw()
    resource_logs: msgspec.Raw = msgspec.Raw()
    resource_spans: msgspec.Raw = msgspec.Raw()


_json_signals = msgspec.json.Decoder(_JsonSignals)


def json_request(data: bytes, kind: type[Kind]) -> Kind | None:
    """The request in ``data``, None when it is not of that kind.

    Raises :class:`JsonError`.
    """
    try:
        signals = _json_signals.decode(data)
        known: dict[type[Message], msgspec.Raw] = {
            ExportMetricsServiceRequest: signals.resource_metrics,
            ExportLogsServiceRequest: signals.resource_logs,
            ExportTraceServiceRequest: signals.resource_spans,
        }
        if not any(map(bytes, known.values())):
            raise ValueError("it has none of the signals")
        if not bytes(known[kind]):
            return None
        if kind is ExportMetricsServiceRequest:
            metrics = _metrics(signals.resource_metrics)
            if metrics is not None:
                return metrics
        return json_format.Parse(data, kind(), ignore_unknown_fields=True)
    except (
        msgspec.MsgspecError,
        json_format.ParseError,
        ValueError,  # no UTF-8, or a number that no field of the request can hold
        RecursionError,
    ) as error:
        raise JsonError(f"not an OTLP request: {error}") from None


class _Value(msgspec.Struct, frozen=True, rename="camel"):
    string_value: str | None = None
    int_value: int | None = None


class _Attribute(msgspec.Struct, frozen=True):
    key: str = ""
    value: _Value = _Value()


class _Point(msgspec.Struct, frozen=True, rename="camel"):
    time_unix_nano: int = 0
    as_double: float | None = None
    as_int: int | None = None
    attributes: list[_Attribute] = []


class _Points(msgspec.Struct, frozen=True, rename="camel"):
    data_points: list[_Point] = []


class _Uncounted(msgspec.Struct, frozen=True, rename="camel"):
    """Points of which only the number matters."""

    data_points: list[msgspec.Raw] = []


class _Metric(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    gauge: _Points | None = None
    sum: _Points | None = None
    histogram: _Uncounted | None = None
    exponential_histogram: _Uncounted | None = None
    summary: _Uncounted | None = None


class _Scope(msgspec.Struct, frozen=True):
    metrics: list[_Metric] = []


class _Resource(msgspec.Struct, frozen=True):
    attributes: list[_Attribute] = []


class _Group(msgspec.Struct, frozen=True, rename="camel"):
    resource: _Resource = _Resource()
    scope_metrics: list[_Scope] = []


# Whole numbers of 64 bits are strings in this JSON, which a decoder that is not strict
# takes for numbers.
_groups = msgspec.json.Decoder(list[_Group], strict=False)


def _metrics(data: msgspec.Raw) -> ExportMetricsServiceRequest | None:
    """The request, None when it is written in a way that is not known here."""
    try:
        groups = _groups.decode(data)
    except msgspec.ValidationError:
        return None
    return ExportMetricsServiceRequest(
        resource_metrics=[
            ResourceMetrics(
                resource=Resource(attributes=_attributes(group.resource.attributes)),
                scope_metrics=[
                    ScopeMetrics(metrics=[_metric(metric) for metric in scope.metrics])
                    for scope in group.scope_metrics
                ],
            )
            for group in groups
        ]
    )


def _metric(metric: _Metric) -> Metric:
    if metric.gauge is not None:
        return Metric(name=metric.name, gauge=Gauge(data_points=_points(metric.gauge)))
    if metric.sum is not None:
        return Metric(name=metric.name, sum=Sum(data_points=_points(metric.sum)))
    other = Metric(name=metric.name)
    for kind in ("histogram", "exponential_histogram", "summary"):
        uncounted: _Uncounted | None = getattr(metric, kind)
        for _ in uncounted.data_points if uncounted is not None else ():
            getattr(other, kind).data_points.add()
    return other


def _points(points: _Points) -> Iterator[NumberDataPoint]:
    for point in points.data_points:
        number = NumberDataPoint(
            time_unix_nano=point.time_unix_nano, attributes=_attributes(point.attributes)
        )
        if point.as_double is not None:
            number.as_double = point.as_double
        elif point.as_int is not None:
            number.as_int = point.as_int
        yield number


def _attributes(attributes: list[_Attribute]) -> Iterator[KeyValue]:
    for attribute in attributes:
        value = AnyValue()
        if attribute.value.string_value is not None:
            value.string_value = attribute.value.string_value
        elif attribute.value.int_value is not None:
            value.int_value = attribute.value.int_value
        yield KeyValue(key=attribute.key, value=value)
