"""The processes beside the sidecar in :mod:`bench.roundtrip`.

    python -m bench.roundtrip_peers echo|grpc SOCKET REPLY_BYTES
    python -m bench.roundtrip_peers feed HOST:PORT POINTS_PER_S

Each prints one line when it is ready. ``feed`` then reads lines of seconds, posts OTLP
at its rate for so long, and answers each with what it has posted, as JSON.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from random import Random
from time import perf_counter, time_ns

import numpy as np

from esper_otel.leyline.metrics import BY_KEY, INSTANCE_ID, RANK, RUN_ID
from testkit.patched_requests import MARK, PatchedRequest

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

# No run has the same loss at every step, and a table calls it stuck: a rule that fires at each
# step is not what an ordinary answer costs.
_random = Random(0)
NOISE = [1.0 + 0.02 * _random.gauss(0.0, 1.0) for _ in range(4096)]


def varying(step: int) -> dict[str, float]:
    """The values of :data:`FRAME` that no two steps share, at ``step``."""
    noise = NOISE[step % len(NOISE)]
    return {key: FRAME[key] * noise for key in ("loss", "gradient_norm", "step_latency_ms")}


RANKS = 8
REQUEST_EVERY_S = 0.012
"""Eight ranks that send about every 100 ms: 83 requests a second."""


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


def feed(address: str, points_per_s: int) -> None:
    """Post requests, evenly spread, when and for as long as told on stdin."""
    steps = round(points_per_s * REQUEST_EVERY_S / len(FRAME))
    trainers = [Trainer("feed", rank, steps) for rank in range(RANKS)]
    connection = HTTPConnection(address, timeout=10)
    print("ready", flush=True)
    for line in sys.stdin:
        began = now = perf_counter()
        until, due, posted = began + float(line), began, 0
        while now < until:
            _post(connection, trainers[posted % RANKS].request())
            posted += 1
            due += REQUEST_EVERY_S
            time.sleep(max(0.0, due - perf_counter()))
            now = perf_counter()
        points = posted * steps * len(FRAME)
        print(json.dumps({"points": points, "seconds": now - began}), flush=True)


def _post(connection: HTTPConnection, body: bytes) -> None:
    headers = {"Content-Type": "application/x-protobuf"}
    connection.request("POST", "/v1/metrics", body, headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200 or answer:
        raise SystemExit(f"the sidecar took less than all: {response.status} {answer!r}")


class Trainer:
    """A rank that sends so many steps at a time, the newest of them ended just now."""

    def __init__(self, run: str, rank: int, steps: int) -> None:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        request = ExportMetricsServiceRequest()
        self._step = 0
        resource = request.resource_metrics.add()
        for name, text in (
            ("service.name", run),
            (RUN_ID, run),
            (INSTANCE_ID, f"{run}-{rank}"),
        ):
            resource.resource.attributes.add(key=name).value.string_value = text
        resource.resource.attributes.add(key=RANK).value.int_value = rank
        for _ in range(steps):
            scope = resource.scope_metrics.add()
            scope.scope.name = "esper_otel"
            for key, value in FRAME.items():
                metric = scope.metrics.add(name=BY_KEY[key].instrument, unit=BY_KEY[key].unit)
                metric.gauge.data_points.add(as_double=value, time_unix_nano=MARK)
        self._patched = PatchedRequest(request.SerializeToString())
        self._steps = self._patched.values.reshape(steps, len(FRAME))
        self._ages = np.repeat(np.arange(steps, 0, -1) * 1_000, len(FRAME))

    def request(self) -> bytes:
        """The next steps."""
        keys = [*FRAME]
        for place, row in enumerate(self._steps):
            step = self._step + place
            for key, value in {"step": float(step), **varying(step)}.items():
                row[keys.index(key)] = value
        self._step += len(self._steps)
        return self._patched.request(time_ns() - self._ages)


def main(argv: Sequence[str]) -> None:
    {"echo": echo, "grpc": grpc, "feed": feed}[argv[0]](argv[1], int(argv[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
