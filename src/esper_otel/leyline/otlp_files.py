"""Files of OTLP: ours, and those of the Collector's file exporter.

Two framings: one JSON object a line, or each request behind its size
(:mod:`esper_otel.leyline.otlp_file`). The Collector compresses either each request (then
JSON too lies behind a size) or the file as one stream, by zstd; a rotated file is often
gzipped later. What a file is shows in its bytes, so that its name need say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

from esper_otel.leyline import otlp_json
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
            return otlp_json.request(data, kind)
        except otlp_json.JsonError as error:
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
