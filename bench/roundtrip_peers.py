"""The processes beside the sidecar in :mod:`bench.roundtrip`.

    python -m bench.roundtrip_peers echo|grpc SOCKET REPLY_BYTES
    python -m bench.roundtrip_peers feed HOST:PORT REQUESTS

Each prints one line when it is ready. ``feed`` then reads lines of seconds, posts OTLP
at its rate for so long, and answers each with what it has posted, as JSON.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from time import perf_counter, time_ns

from esper_otel.leyline.metrics import BY_KEY, INSTANCE_ID, RANK, RUN_ID

# 24 metrics, as a run on a CPU has them in an ordinary loop.
FRAME = {
    "step": 0.0,
    "loss": 0.5,
    "accuracy": 0.8,
    "gradient_norm": 1.5,
    "samples_per_s": 5000.0,
    "hook_latency_ms": 0.3,
    "tamiyo_latency_ms": 0.1,
    "step_latency_ms": 12.0,
    "forward_ms": 4.0,
    "backward_ms": 6.0,
    "optimizer_ms": 1.5,
    "kasmina.apply_ms": 0.0,
    "kasmina.finalize_ms": 0.0,
    "loss_delta": 0.001,
    "loss_ewma": 0.5,
    "loss_volatility": 0.01,
    "grad_norm_ewma": 1.5,
    "grad_var": 0.01,
    "grad_conflict_rate": 0.0,
    "optimizer_lr": 0.01,
    "optimizer_momentum": 0.9,
    "input_wait_ms": 0.4,
    "cpu_util_percent": 40.0,
    "nonfinite": 0.0,
}

POINTS_PER_S = 20_000
RANKS = 8
STEPS_PER_REQUEST = 10
"""Eight ranks that send every 100 ms: 83 requests of 240 points a second."""

REQUEST_EVERY_S = len(FRAME) * STEPS_PER_REQUEST / POINTS_PER_S


def echo(path: str, reply_bytes: int) -> None:
    """Answer whatever comes with as many bytes, as bare as Python can."""
    reply = bytes(reply_bytes)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        connection, _ = listener.accept()
        while connection.recv(65536):
            connection.sendall(reply)


def grpc(path: str, reply_bytes: int) -> None:
    """Answer the same over gRPC, on raw bytes: no message is made or parsed."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc as library

    reply = bytes(reply_bytes)
    handler = library.unary_unary_rpc_method_handler(lambda request, context: reply)
    service = library.method_handlers_generic_handler("esper.Bench", {"Ask": handler})
    server = library.server(ThreadPoolExecutor(max_workers=1), handlers=[service])
    server.add_insecure_port(f"unix:{path}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def feed(address: str, requests: int) -> None:
    """Post ready-made requests, evenly spread, when and for as long as told on stdin."""
    bodies = list(_bodies(requests))
    connection = HTTPConnection(address, timeout=10)
    print("ready", flush=True)
    for line in sys.stdin:
        began = now = perf_counter()
        until, due, posted = began + float(line), began, 0
        while now < until and bodies:
            _post(connection, bodies.pop())
            posted += 1
            due += REQUEST_EVERY_S
            time.sleep(max(0.0, due - perf_counter()))
            now = perf_counter()
        points = posted * STEPS_PER_REQUEST * len(FRAME)
        print(json.dumps({"points": points, "seconds": now - began}), flush=True)


def _post(connection: HTTPConnection, body: bytes) -> None:
    headers = {"Content-Type": "application/x-protobuf"}
    connection.request("POST", "/v1/metrics", body, headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200 or answer:
        raise SystemExit(f"the sidecar took less than all: {response.status} {answer!r}")


def _bodies(count: int) -> Iterator[bytes]:
    """Requests of rank after rank, newest first, so that they are taken from the end."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )

    now = time_ns()
    for number in reversed(range(count)):
        turn, rank = divmod(number, RANKS)
        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        for name, text in (
            ("service.name", "feed"),
            (RUN_ID, "feed"),
            (INSTANCE_ID, f"f{rank}"),
        ):
            resource.resource.attributes.add(key=name).value.string_value = text
        resource.resource.attributes.add(key=RANK).value.int_value = rank
        for step in range(turn * STEPS_PER_REQUEST, (turn + 1) * STEPS_PER_REQUEST):
            scope = resource.scope_metrics.add()
            scope.scope.name = "esper_otel"
            for key, value in FRAME.items():
                metric = scope.metrics.add(name=BY_KEY[key].instrument, unit=BY_KEY[key].unit)
                point = metric.gauge.data_points.add(time_unix_nano=now + step * 10_000_000)
                point.as_double = float(step) if key == "step" else value
        yield request.SerializeToString()


def main(argv: Sequence[str]) -> None:
    {"echo": echo, "grpc": grpc, "feed": feed}[argv[0]](argv[1], int(argv[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
