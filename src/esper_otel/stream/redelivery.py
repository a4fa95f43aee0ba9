"""Redelivery: deliver what earlier runs had to leave in files.

Nothing is lost on the way: a file goes when all of it was delivered, otherwise what is
left of it, unreadable bytes included, takes its place in one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from esper_otel.leyline.otlp_file import RecordingError, framed
from esper_otel.stream.destination import Destination, Signal, destinations
from esper_otel.stream.recording import read_recording, signal_of
from esper_otel.stream.sender import Backoff, open_transport
from esper_otel.stream.transport import SendResult, Transport, Verdict

ATTEMPTS = 5
"""For one request, before its file is given up for now."""


class FileReport(msgspec.Struct, frozen=True):
    """What became of one file, counted in data points or spans.

    ``rejected`` is what the receiver took out of delivered requests. ``problem`` says why
    something was kept, empty when the file was delivered whole.
    """

    path: Path
    delivered: int = 0
    rejected: int = 0
    kept: int = 0
    problem: str = ""


class ResendReport(msgspec.Struct, frozen=True):
    """What became of all files."""

    files: tuple[FileReport, ...]

    @property
    def is_complete(self) -> bool:
        """Whether nothing was kept and every file could be read."""
        return not any(report.problem for report in self.files)


def resend(
    files: Iterable[Path],
    environ: Mapping[str, str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> ResendReport:
    """Deliver spool files to where ``environ`` (default: the process's) says.

    Tries each request :data:`ATTEMPTS` times. Delivery is at least once: who interrupts a
    resend, or loses an answer, may deliver a request twice.
    """
    receivers = destinations(environ)
    transports: dict[Signal, Transport] = {}
    try:
        return ResendReport(
            tuple(_resend_file(path, receivers, transports, sleep) for path in files)
        )
    finally:
        for transport in transports.values():
            transport.close()


def _resend_file(
    path: Path,
    receivers: Mapping[Signal, Destination],
    transports: dict[Signal, Transport],
    sleep: Callable[[float], None],
) -> FileReport:
    signal = signal_of(path)
    if signal is None:
        names = " or ".join(f"*.{each}.otlp" for each in Signal)
        return FileReport(path, problem=f"{path}: expected a file named {names}")
    if signal not in receivers:
        return FileReport(
            path, problem=f"{path}: OTEL_{signal.upper()}_EXPORTER=none, so nothing is sent"
        )
    try:
        bodies, bad_from, problem = _readable_part(path, signal)
        rest = path.read_bytes()[bad_from:]
    except OSError as error:
        return FileReport(path, problem=f"{path}: {error.strerror or error}")
    if not bodies and not problem:
        return FileReport(path, problem=f"{path}: the file is empty")
    destination = receivers[signal]
    try:
        if signal not in transports:
            transports[signal] = open_transport(destination)
    except (OSError, ValueError) as error:
        return FileReport(path, problem=f"{path}: {destination.endpoint}: {error}")
    sent = delivered = rejected = 0
    try:
        for body in bodies:
            outcome = _send(body, destination, transports[signal], sleep)
            if outcome.verdict is not Verdict.DELIVERED:
                problem = f"{path}: {destination.endpoint}: {outcome.reason}"
                break
            sent += 1
            delivered += _items(body, signal) - outcome.rejected
            rejected += outcome.rejected
    finally:
        # Also when interrupted: what was delivered need not be delivered again.
        _keep(path, bodies[sent:], rest)
    kept = sum(_items(body, signal) for body in bodies[sent:])
    return FileReport(path, delivered, rejected, kept, problem)


def _readable_part(path: Path, signal: Signal) -> tuple[list[bytes], int, str]:
    """(requests, offset behind the last good one, what is wrong there)."""
    bodies: list[bytes] = []
    offset = 0
    try:
        for body in read_recording(path):
            if not _items(body, signal):
                raise RecordingError(path, offset, f"not an OTLP {signal} request")
            bodies.append(body)
            offset += len(framed(body))
    except RecordingError as error:
        return bodies, offset, str(error)
    return bodies, offset, ""


def _send(
    body: bytes,
    destination: Destination,
    transport: Transport,
    sleep: Callable[[float], None],
) -> SendResult:
    """Send one request, again while that makes sense."""
    backoff = Backoff()
    outcome = transport.send(body, destination.timeout_s)
    for _ in range(ATTEMPTS - 1):
        if outcome.verdict not in (Verdict.RETRY, Verdict.UNREACHABLE):
            break
        sleep(backoff.pause_s(outcome.retry_after_s))
        outcome = transport.send(body, destination.timeout_s)
    return outcome


def _keep(path: Path, bodies: list[bytes], rest: bytes) -> None:
    """Replace the file by what was not delivered, or remove it when nothing is left."""
    if not bodies and not rest:
        path.unlink()
        return
    content = b"".join(map(framed, bodies)) + rest
    if len(content) == path.stat().st_size:
        return
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


def _items(body: bytes, signal: Signal) -> int:
    """Points, spans or records in a request, 0 when it is no request of this signal."""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
        ExportLogsServiceRequest,
    )
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
    )

    try:
        if signal is Signal.TRACES:
            return sum(
                len(scope.spans)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans
                for scope in resource.scope_spans
            )
        if signal is Signal.LOGS:
            return sum(
                len(scope.log_records)
                for resource in ExportLogsServiceRequest.FromString(body).resource_logs
                for scope in resource.scope_logs
            )
        return sum(
            len(getattr(metric, metric.WhichOneof("data") or "gauge").data_points)
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        )
    except DecodeError:
        return 0
