"""A receiver of OTLP that counts, for tests and benches.

In a process of its own: ``python -m testkit.receiver [--port N] [--journal FOLDER]`` prints
``ready PORT``, takes OTLP over HTTP, answers ``GET /counts`` with JSON, and ends on
SIGTERM. What is in the journal was written before it was answered for, so it outlives a
kill. In-process:
:class:`HttpReceiver` and :class:`GrpcReceiver`, which can be told what to answer, stopped,
and started again on the same port.
"""

from __future__ import annotations

import argparse
import gzip
import json
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from esper_otel.stream.destination import Signal
from esper_otel.stream.recording import Recording
from testkit.patience import PATIENCE_S

METRICS, TRACES, LOGS = "/v1/metrics", "/v1/traces", "/v1/logs"
STEP = "tolaria.step"


class Answer(NamedTuple):
    """What a receiver answers to one request; the body is not kept unless it is 2xx.

    For gRPC ``status`` is the name of a code, ``OK`` for success, and ``headers`` are
    trailing metadata.
    """

    status: int | str
    headers: Mapping[str, str | bytes] = {}
    body: bytes = b""


class Request(NamedTuple):
    """One request as it arrived, body decompressed."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class Inbox:
    """Requests that came, in order, and what they hold."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.requests: list[Request] = []

    def points(self) -> list[tuple[str, NumberDataPoint]]:
        """(metric name, point) of everything taken."""
        return [
            (metric.name, point)
            for request in self.requests
            if request.path == METRICS
            for resource in ExportMetricsServiceRequest.FromString(
                request.body
            ).resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.gauge.data_points
        ]

    def spans(self) -> list[Span]:
        """Every span taken."""
        return [
            span
            for request in self.requests
            if request.path == TRACES
            for resource in ExportTraceServiceRequest.FromString(request.body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def steps(self) -> Counter[int]:
        """How often each step came."""
        return Counter(int(point.as_double) for name, point in self.points() if name == STEP)

    def counts(self) -> dict[str, Any]:
        """Requests, points, spans and steps, as plain data."""
        return {
            "requests": Counter(request.path for request in self.requests),
            "attempts": self.attempts,
            "bytes": sum(len(request.body) for request in self.requests),
            "points": len(self.points()),
            "spans": len(self.spans()),
            "steps": sorted(self.steps()),
        }


Answering = Callable[[Request], Answer]


class HttpReceiver:
    """OTLP over HTTP on 127.0.0.1. ``answer`` decides what each request gets."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.inbox = Inbox()
        self.answer: Answering = lambda request: Answer(200)
        self.connections = 0
        self.port = port
        self._tls = tls
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """For ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}"

    def start(self) -> HttpReceiver:
        """Listen, on the port of last time if there was one."""
        self._server = _Server(("127.0.0.1", self.port), self, self._tls)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and cut every connection, as a killed process would."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None

    def __enter__(self) -> HttpReceiver:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], receiver: HttpReceiver, tls: ssl.SSLContext | None
    ) -> None:
        self.receiver = receiver
        self._tls = tls
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True)
        self.receiver.connections += 1
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that was cut is no news."""

    def cut(self) -> None:
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Nagle would hold back the body of an answer until the other side has acknowledged
    # its headers, 40 ms later.
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        receiver = self.server.receiver
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.path, headers, body)
        receiver.inbox.attempts[self.path] += 1
        answer = receiver.answer(request)
        status = int(answer.status)
        if 200 <= status < 300:
            receiver.inbox.requests.append(request)
        self._respond(status, answer.headers, answer.body)

    def do_GET(self) -> None:
        self._respond(200, {}, json.dumps(self.server.receiver.inbox.counts()).encode())

    def _respond(self, status: int, headers: Mapping[str, str | bytes], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silent."""


class GrpcReceiver:
    """OTLP over gRPC on 127.0.0.1; paths are named as for HTTP."""

    def __init__(
        self, port: int = 0, credentials: grpc.ServerCredentials | None = None
    ) -> None:
        self.inbox = Inbox()
        self.answer: Answering = lambda request: Answer("OK")
        self.port = port
        self._credentials = credentials
        self._server: grpc.Server | None = None

    @property
    def url(self) -> str:
        """For ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"{'https' if self._credentials else 'http'}://localhost:{self.port}"

    def start(self) -> GrpcReceiver:
        """Listen, on the port of last time if there was one."""
        server = grpc.server(futures.ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers(
            (
                self._handlers(
                    "opentelemetry.proto.collector.metrics.v1.MetricsService", METRICS
                ),
                self._handlers("opentelemetry.proto.collector.trace.v1.TraceService", TRACES),
                self._handlers("opentelemetry.proto.collector.logs.v1.LogsService", LOGS),
            )
        )
        address = f"localhost:{self.port}"
        if self._credentials is None:
            self.port = server.add_insecure_port(address)
        else:
            self.port = server.add_secure_port(address, self._credentials)
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """Stop at once."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def __enter__(self) -> GrpcReceiver:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _handlers(self, service: str, path: str) -> grpc.GenericRpcHandler[bytes, bytes]:
        def export(body: bytes, context: grpc.ServicerContext) -> bytes:
            headers = {key: str(value) for key, value in context.invocation_metadata() or ()}
            request = Request(path, headers, body)
            self.inbox.attempts[path] += 1
            answer = self.answer(request)
            context.set_trailing_metadata(tuple(answer.headers.items()))
            if answer.status != "OK":
                context.abort(grpc.StatusCode[str(answer.status)], "as told")
            self.inbox.requests.append(request)
            return answer.body

        handler = grpc.unary_unary_rpc_method_handler(export)
        return grpc.method_handlers_generic_handler(service, {"Export": handler})


class ReceiverProcess:
    """A receiver in a process of its own, which can be killed and started again."""

    def __init__(self, journal: Path | None = None) -> None:
        self.port = 0
        self._journal = [] if journal is None else ["--journal", str(journal)]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def url(self) -> str:
        """For ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the port of last time if there was one; wait until it listens."""
        self._process = subprocess.Popen(
            [
                sys.executable,
                *("-m", "testkit.receiver", "--port", str(self.port)),
                *self._journal,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        output = self._process.stdout
        if output is None or not select.select([output], [], [], PATIENCE_S)[0]:
            raise RuntimeError("the receiver did not start within 30 s")
        word, _, port = output.readline().partition(" ")
        if word != "ready":
            raise RuntimeError("the receiver did not start")
        self.port = int(port)

    def counts(self) -> dict[str, Any]:
        """What came since it was started last."""
        with urllib.request.urlopen(f"{self.url}/counts", timeout=PATIENCE_S) as response:
            counts: dict[str, Any] = json.load(response)
        return counts

    def kill(self) -> None:
        """End it at once; what it has counted is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None


def _journaling(folder: Path) -> Answering:
    """Answers 200 to a request once it is in the journal."""
    recording = Recording(folder, "received")
    lock = threading.Lock()

    def answer(request: Request) -> Answer:
        with lock:
            signal = Signal(request.path.removeprefix("/v1/"))
            recording.append(signal, request.body)
        return Answer(200)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testkit.receiver")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--journal", type=Path)
    options = parser.parse_args()
    receiver = HttpReceiver(options.port)
    if options.journal is not None:
        receiver.answer = _journaling(options.journal)
    receiver.start()
    print(f"ready {receiver.port}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    receiver.stop()


if __name__ == "__main__":
    main()
