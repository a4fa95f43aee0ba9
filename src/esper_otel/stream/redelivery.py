"""Redelivery: sends the files left by earlier processes.

Nothing is lost on the way: a file goes when all of it was delivered, otherwise what is
left of it, unreadable bytes included, takes its place in one step. A spool file
(:mod:`esper_otel.stream.spool_files`) is one request, so who is killed while delivering it
repeats that one at most. Files of a process that is running are its own to deliver.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from esper_otel.leyline.otlp_file import MAX_MESSAGE, SIZE_BYTES, RecordingError, framed
from esper_otel.stream.destination import Destination, Signal, destinations
from esper_otel.stream.recording import read_recording, signal_of
from esper_otel.stream.sender import Backoff, open_transport
from esper_otel.stream.spool import MAX_GROUP
from esper_otel.stream.spool_files import PART, SpoolLock, lock_path_of, spool_files_in
from esper_otel.stream.transport import SendResult, Transport, Verdict, plain

log = logging.getLogger("esper_otel")

ATTEMPTS = 5
"""For one request, before its file is given up for now."""

AGAIN_S = 30.0
"""Files that another process was at are looked at again after so long."""


class FileReport(msgspec.Struct, frozen=True):
    """What became of one file, counted in data points or spans.

    ``rejected`` is what the receiver took out of delivered requests. ``problem`` says why
    something was kept, empty when the file was delivered whole; ``later`` whether that may
    pass. ``cut_bytes`` are of a request that was cut off when the process that wrote it ended.
    """

    path: Path
    delivered: int = 0
    rejected: int = 0
    kept: int = 0
    problem: str = ""
    later: bool = False
    cut_bytes: int = 0


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
    sleep: Callable[[float], object] = time.sleep,
) -> ResendReport:
    """Deliver spool files to where ``environ`` (default: the process's) says.

    Tries each request :data:`ATTEMPTS` times. Delivery is at least once: who interrupts a
    resend, or loses an answer, may deliver a request twice. Of a file that is larger than two
    requests, which no trainer leaves, who *kills* a resend repeats all.
    """
    with _Resending(destinations(environ), sleep, ATTEMPTS) as resending:
        return ResendReport(tuple(resending.deliver_file(path) for path in files))


class EarlierProcesses:
    """Thread that delivers what earlier processes of the same run and rank have left.

    Beside the run's own telemetry, one request at a time. It ends when nothing is left; what it
    has not come to when the run ends stays in its file.
    """

    def __init__(
        self, folder: Path, stem: str, receivers: Mapping[Signal, Destination]
    ) -> None:
        self._folder = folder
        self._stem = stem
        self._receivers = receivers
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-resend", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        # Here, as a fork would meet an import of the thread half done.
        _items(b"", Signal.METRICS)
        self._thread.start()

    def stop(self) -> None:
        """Have it end after the request that is on its way, which is not waited for."""
        self._stopping.set()

    def _run(self) -> None:
        try:
            self._deliver()
        except Exception as error:
            # What is there stays there, and `esper-otel resend` says more.
            log.warning(
                "telemetry of earlier processes of this run in %s could not be delivered: %s",
                self._folder,
                error,
            )

    def _deliver(self) -> None:
        given_up: set[Path] = set()
        points = 0
        pauses = Backoff()
        while not self._stopping.is_set():
            files = [path for path in self._files() if path not in given_up]
            if not files:
                break
            pause_s = 0.0
            with _Resending(self._receivers, self._stopping.wait, attempts=1) as resending:
                for path in files:
                    report = resending.deliver_file(path)
                    points += report.delivered
                    if report.problem and not report.later:
                        given_up.add(path)
                        # A receiver without traces, which a sidecar is, is none at fault.
                        is_grave = signal_of(path) is Signal.METRICS
                        level = logging.WARNING if is_grave else logging.INFO
                        log.log(level, "telemetry of an earlier process: %s", report.problem)
                    elif report.later and resending.is_held(path):
                        pause_s = AGAIN_S
                    elif report.later:
                        pause_s = pauses.pause_s(None)
                        break
                    if self._stopping.is_set():
                        break
            self._stopping.wait(pause_s)
        if points:
            log.info("delivered %d items of earlier processes of this run", points)

    def _files(self) -> list[Path]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return spool_files_in(self._folder, self._stem)
        return []


_Request = tuple[bytes, int]
"""A request and how many points, spans or records it holds."""


class _Sent(msgspec.Struct):
    """What became of a file's requests so far; ``problem`` says what stopped it."""

    problem: str = ""
    delivered: int = 0
    rejected: int = 0
    later: bool = False


class _Resending:
    """Receivers and locks while files are delivered one after the other."""

    def __init__(
        self,
        receivers: Mapping[Signal, Destination],
        sleep: Callable[[float], object],
        attempts: int,
    ) -> None:
        self._receivers = receivers
        self._sleep = sleep
        self._attempts = attempts
        self._transports: dict[Signal, Transport] = {}
        self._locks: dict[Path, SpoolLock | None] = {}

    def __enter__(self) -> _Resending:
        return self

    def __exit__(self, *_: object) -> None:
        for transport in self._transports.values():
            transport.close()
        for path, lock in self._locks.items():
            if lock is not None:
                with suppress(OSError):
                    _remove_parts(path)
                lock.close()

    def is_held(self, path: Path) -> bool:
        """Whether another process, or another part of this one, was found to be at ``path``."""
        lock = lock_path_of(path)
        return lock is not None and self._locks.get(lock, self) is None

    def deliver_file(self, path: Path) -> FileReport:
        """Deliver what ``path`` holds; raises nothing for what is wrong with it."""
        signal = signal_of(path)
        if signal is None:
            names = " or ".join(f"*.{each}.otlp" for each in Signal)
            return FileReport(path, problem=f"{path}: expected a file named {names}")
        if signal not in self._receivers:
            variable = f"OTEL_{signal.upper()}_EXPORTER"
            return FileReport(path, problem=f"{path}: {variable}=none, so nothing is sent")
        try:
            if not self._is_ours_to_take(path):
                problem = f"{path}: another process uses it: its own, or one that delivers it"
                return FileReport(path, problem=problem, later=True)
            return self._deliver_contents(path, signal)
        except OSError as error:
            return FileReport(path, problem=f"{path}: {error.strerror or error}")

    def _is_ours_to_take(self, path: Path) -> bool:
        """Whether no other process is at ``path``; it is locked for us from here on."""
        lock = lock_path_of(path)
        if lock is None:
            return True  # a recording, or a file under another name
        if lock not in self._locks:
            if not path.exists():
                return True  # there is nothing to lock; reading it says so
            self._locks[lock] = SpoolLock.take(lock)
        return self._locks[lock] is not None

    def _deliver_contents(self, path: Path, signal: Signal) -> FileReport:
        requests, bad_from, problem = _readable_part(path, signal)
        rest = path.read_bytes()[bad_from:]
        cut_bytes = 0
        if lock_path_of(path) is not None and _is_cut(rest):
            # So it ends where a process was killed while it wrote.
            cut_bytes, rest, problem = len(rest), b"", ""
        elif not requests and not problem:
            return FileReport(path, problem=f"{path}: the file is empty")
        waiting = deque(_groups(requests))
        # A file of one request goes as soon as that is delivered; a long one is not written
        # anew for each of its requests.
        is_short = path.stat().st_size <= 2 * MAX_GROUP
        sent = _Sent(problem)
        try:
            while waiting and self._send_first(waiting, signal, sent):
                if is_short:
                    _keep(path, waiting, rest)
        except OSError as error:
            sent.problem = f"{sent.delivered:,} were delivered, and are still in it: {error}"
        finally:
            # Also when interrupted: what was delivered need not be delivered again.
            with suppress(OSError):
                _keep(path, waiting, rest)
        problem = f"{path}: {sent.problem}" if sent.problem else ""
        kept = sum(number for group in waiting for _, number in group)
        return FileReport(
            path, sent.delivered, sent.rejected, kept, problem, sent.later, cut_bytes
        )

    def _send_first(self, waiting: deque[list[_Request]], signal: Signal, sent: _Sent) -> bool:
        """Send the first of ``waiting`` and take it out; False where that cannot be now."""
        group = waiting[0]
        outcome = self._send(b"".join(body for body, _ in group), signal)
        if outcome.verdict is Verdict.REFUSED and len(group) > 1:
            # One bad request should not keep its neighbours from being delivered.
            waiting.popleft()
            waiting.extendleft([each] for each in reversed(group))
            return True
        if outcome.verdict is not Verdict.DELIVERED:
            sent.problem = f"{self._receivers[signal].shown}: {outcome.reason}"
            sent.later = outcome.verdict in (Verdict.RETRY, Verdict.UNREACHABLE)
            return False
        waiting.popleft()
        items = sum(number for _, number in group)
        rejected = min(outcome.rejected, items)
        sent.delivered += items - rejected
        sent.rejected += rejected
        return True

    def _send(self, body: bytes, signal: Signal) -> SendResult:
        """Send one request, again while that makes sense."""
        destination = self._receivers[signal]
        if signal not in self._transports:
            self._transports[signal] = open_transport(destination)
        transport = self._transports[signal]
        backoff = Backoff()
        for attempt in range(self._attempts):
            try:
                outcome = transport.send(body, destination.timeout_s)
            except Exception as error:
                log.debug("sending failed", exc_info=True)
                outcome = SendResult(Verdict.RETRY, plain(error))
            if outcome.verdict not in (Verdict.RETRY, Verdict.UNREACHABLE):
                break
            if attempt < self._attempts - 1:
                self._sleep(backoff.pause_s(outcome.retry_after_s))
        return outcome


def _readable_part(path: Path, signal: Signal) -> tuple[list[_Request], int, str]:
    """(requests, offset behind the last good one, what is wrong there)."""
    requests: list[_Request] = []
    offset = 0
    try:
        for body in read_recording(path):
            items = _items(body, signal)
            if not items:
                raise RecordingError(path, offset, f"not an OTLP {signal} request")
            requests.append((body, items))
            offset += len(body) + SIZE_BYTES
    except RecordingError as error:
        return requests, offset, str(error).removeprefix(f"{path}: ")
    return requests, offset, ""


def _is_cut(rest: bytes) -> bool:
    """Whether ``rest`` is the beginning of a request, its size included, or nothing."""
    if len(rest) < SIZE_BYTES:
        return True
    size = int.from_bytes(rest[:SIZE_BYTES], "big")
    return len(rest) - SIZE_BYTES < size <= MAX_MESSAGE


def _groups(requests: list[_Request]) -> Iterator[list[_Request]]:
    """``requests``, those together that travel in one: laid end to end they are one."""
    group: list[_Request] = []
    size = 0
    for request in requests:
        if group and size + len(request[0]) > MAX_GROUP:
            yield group
            group, size = [], 0
        group.append(request)
        size += len(request[0])
    if group:
        yield group


def _keep(path: Path, waiting: Iterable[list[_Request]], rest: bytes) -> None:
    """Replace the file by what was not delivered, or remove it when nothing is left."""
    content = b"".join(framed(body) for group in waiting for body, _ in group) + rest
    if not content:
        path.unlink(missing_ok=True)
        return
    if len(content) == path.stat().st_size:
        return
    beside = path.with_name(path.name + PART)
    beside.write_bytes(content)
    beside.replace(path)


def _remove_parts(lock: Path) -> None:
    """Remove what a process that was killed had written to take a file's place."""
    for path in lock.parent.iterdir():
        if path.name.startswith(f"{lock.stem}.") and path.name.endswith(PART):
            path.unlink(missing_ok=True)


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
