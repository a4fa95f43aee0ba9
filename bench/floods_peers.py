"""The processes beside the sidecar in :mod:`bench.floods`.

    python -m bench.floods_peers bystander SOCKET
    python -m bench.floods_peers honest HTTP GRPC
    python -m bench.floods_peers attack NAME HTTP GRPC SOCKET

Each prints one line when it is ready. The first two work until a line comes on stdin; an
attack reads a line with seconds, or with a number of runs, and does it. Each then prints what
came of it, as JSON. Times are of the monotonic clock, which all processes share.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from math import nan
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Any, NamedTuple

import psutil

from bench.roundtrip import echo, put_step
from bench.roundtrip_peers import FRAME, Trainer
from esper_otel.leyline.decisions import FAILED_OPEN
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import (
    BY_KEY,
    INSTANCE_ID,
    RUN_ID,
    SEED_ID,
    SEED_KEYS,
    STEP_SLOT,
)
from esper_otel.tamiyo.client import TamiyoClient
from esper_tamiyo.latency import shorten_slice
from testkit.half_calls import EXPORT, HalfCalls

PROTOBUF = "application/x-protobuf"
ASK_EVERY_S = 0.01
SEND_EVERY_S = 0.05
AGAIN_S, LONGEST_AGAIN_S = 0.2, 5.0
GIVE_UP_S = 60.0
"""Longest that one honest request is tried."""

NICE = 10
"""Attackers come from elsewhere as a rule: what they take of this machine's processors to make
their requests is not what is measured."""

STEPS_OF_A_RUN, SEEDS_OF_A_RUN = 3, 2
SLOW_CONNECTIONS = 1100
HALF_BODIES, HALF_BYTES = 400, 1 << 20
HALF_CONNECTIONS, CALLS_OF_EACH, CALL_BYTES = 8, 30, 4 << 20
REQUEST_ROOM = (4 << 20) - 200
"""Bytes of the largest request that is taken."""


class Target(NamedTuple):
    """Where the sidecar is."""

    http: str
    grpc: str
    socket: Path


class Outcome(NamedTuple):
    """An honest request: when it was first sent, how often, and whether it was taken after all.

    ``why`` tells of what was neither taken nor told to come again.
    """

    began: float
    way: str
    attempts: int
    waited_s: float
    taken: bool
    why: str = ""


def told_to_stop() -> threading.Event:
    """Set once a line has come on stdin."""
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return stop


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def bystander(path: str) -> None:
    """Ask every 10 ms, and a bare echo beside it: a round trip that is not ours."""
    # A deadline that no ask meets: a tail that is cut off looks better than it is.
    client = TamiyoClient(Path(path), run="bystander", instance="bystander", deadline_ms=5000.0)
    row = step_row()
    for key, value in FRAME.items():
        row[STEP_SLOT[key]] = value
    times: list[tuple[float, float, float, bool]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        echo(Path(folder) / "echo.sock", 700, 200) as bare,
    ):
        for child in psutil.Process().children():  # the echo, woken as the sidecar is
            if not shorten_slice(child.pid):
                os.sched_setscheduler(child.pid, os.SCHED_BATCH, os.sched_param(0))
        print("ready", flush=True)
        stop, step, due = told_to_stop(), 0, time.monotonic()
        while not stop.is_set():
            step += 1
            put_step(row, step)
            echo_s = timed(bare) if step % 2 else 0.0  # who comes first wakes the processor
            began = time.monotonic()
            decision = client.ask(step, time.time_ns(), row)
            ask_s = time.monotonic() - began
            echo_s = echo_s or timed(bare)
            times.append((began, ask_s, echo_s, decision.reason not in FAILED_OPEN))
            due = max(due + ASK_EVERY_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
    print(json.dumps(times), flush=True)


class Sender:
    """An honest producer over one protocol; ``send`` raises what :meth:`_retry` knows."""

    def __init__(self, way: str, send: Callable[[bytes], str | float]) -> None:
        self.outcomes: list[Outcome] = []
        self._way = way
        self._send = send
        self._trainer = Trainer(f"honest-{way}", 0, 1)

    def work(self, stop: threading.Event) -> None:
        """Send a step every 50 ms, the next one when the one before is taken."""
        due = time.monotonic()
        while not stop.is_set():
            self.outcomes.append(self._deliver(self._trainer.request()))
            due = max(due + SEND_EVERY_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def _deliver(self, body: bytes) -> Outcome:
        began = time.monotonic()
        attempts = 0
        while True:
            attempts += 1
            answer = self._send(body)
            waited = time.monotonic() - began
            if isinstance(answer, str):
                return Outcome(began, self._way, attempts, waited, not answer, answer)
            if waited > GIVE_UP_S:
                return Outcome(began, self._way, attempts, waited, False, "never taken")
            time.sleep(min(answer, LONGEST_AGAIN_S))


def http_sender(address: str) -> Callable[[bytes], str | float]:
    """Sends over HTTP: "" when taken, seconds to wait when to come again, else why not."""
    connection = HTTPConnection(address, timeout=10)

    def send(body: bytes) -> str | float:
        try:
            connection.request("POST", "/v1/metrics", body, {"Content-Type": PROTOBUF})
            response = connection.getresponse()
            answer = response.read()
        except (OSError, HTTPException):
            connection.close()
            return AGAIN_S
        if response.status in (408, 429, 502, 503, 504):
            return float(response.headers.get("Retry-After") or AGAIN_S)
        if response.status != 200:
            return f"HTTP {response.status} {answer[:200]!r}"
        return f"not all: {answer!r}" if answer else ""

    return send


def grpc_sender(address: str) -> Callable[[bytes], str | float]:
    """The same over gRPC."""
    import grpc

    channel = grpc.insecure_channel(address, (("grpc.max_reconnect_backoff_ms", 1000),))
    call = channel.unary_unary(EXPORT.decode(), None, None)
    again = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    )

    def send(body: bytes) -> str | float:
        try:
            answer = call(body, timeout=10)
        except grpc.RpcError as error:
            code = error.code()
            return AGAIN_S if code in again else f"gRPC {code.name} {error.details()}"
        return f"not all: {answer!r}" if answer else ""

    return send


def honest(http: str, grpc: str) -> None:
    """Send steps over HTTP and over gRPC until told to stop."""
    senders = [Sender("HTTP", http_sender(http)), Sender("gRPC", grpc_sender(grpc))]
    print("ready", flush=True)
    stop = told_to_stop()
    threads = [threading.Thread(target=each.work, args=(stop,)) for each in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps([each for sender in senders for each in sender.outcomes]), flush=True)


def field(number: int, body: bytes) -> bytes:
    """A field of a protobuf message that holds bytes."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def metric_of(key: str, points: list[tuple[float, str]], began: int) -> bytes:
    """A Metric with a gauge: a value and a seed, or "", for each point, a nanosecond apart
    from the time at which they began."""
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

    metric = Metric(name=BY_KEY[key].instrument)
    for nth, (value, seed) in enumerate(points):
        point = metric.gauge.data_points.add(as_double=value, time_unix_nano=began + nth)
        if seed:
            point.attributes.add(key=SEED_ID).value.string_value = seed
    return metric.SerializeToString()


def request_of(attributes: dict[str, str], metrics: list[bytes]) -> bytes:
    """A request of one resource."""
    resource = b"".join(
        field(1, field(1, key.encode()) + field(2, field(1, text.encode())))
        for key, text in attributes.items()
    )
    scope = b"".join(field(2, each) for each in metrics)
    return field(1, field(1, resource) + field(2, scope))


def run_of(number: int) -> bytes:
    """A short run nobody heard of before, with seeds of its own."""
    steps = [(float(step), "") for step in range(STEPS_OF_A_RUN)]
    began = time.time_ns()
    metrics = [metric_of(key, steps, began) for key in ("step", "loss", "gradient_norm")]
    for seed in range(SEEDS_OF_A_RUN):
        points = [(float(step), f"seed-{number}-{seed}") for step, _ in steps]
        metrics += [metric_of(key, points, began) for key in SEED_KEYS[:3]]
    name = f"ever-new-{number}"
    return request_of({RUN_ID: name, INSTANCE_ID: f"{name}-0"}, metrics)


def many_over_otlp(target: Target, amount: float, counts: Counter[str]) -> None:
    """So many short runs one after the other, over HTTP."""
    send = http_sender(target.http)
    for number in range(int(amount)):
        body = run_of(number)
        answer = send(body)
        while isinstance(answer, float):
            counts["told to come again"] += 1
            time.sleep(answer)
            answer = send(body)
        counts[answer or "taken"] += 1


def many_over_socket(target: Target, amount: float, counts: Counter[str]) -> None:
    """The same by trainers that ask."""
    row, columns = step_row(), len(SEED_KEYS)
    row[STEP_SLOT["loss"]] = 1.0
    for number in range(int(amount)):
        name = f"ever-asking-{number}"
        seeds = [(f"seed-{number}-{seed}", [0.5] * columns) for seed in range(SEEDS_OF_A_RUN)]
        client = TamiyoClient(
            target.socket, run=name, instance=name, rank=number, deadline_ms=5000.0
        )
        for step in range(STEPS_OF_A_RUN):
            row[STEP_SLOT["step"]] = float(step)
            counts[client.ask(step, time.time_ns(), row, seeds).reason] += 1
        client.close()


def seeds_without_end(target: Target, seconds: float, counts: Counter[str]) -> None:
    """Runs that ask with 256 new seeds at every step."""
    until, number = time.monotonic() + seconds, 0
    row = step_row()
    while time.monotonic() < until:
        number += 1
        name = f"ever-seeds-{number}"
        client = TamiyoClient(target.socket, run=name, instance=name, deadline_ms=5000.0)
        for step in range(20):
            seeds = [(f"{step}-{seed}", [0.5] + [nan] * 9) for seed in range(256)]
            row[STEP_SLOT["step"]] = float(step)
            counts[client.ask(step, time.time_ns(), row, seeds).reason] += 1
        client.close()


def connected(address: str) -> socket.socket:
    """A connection to an address."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def half_bodies(target: Target, seconds: float, counts: Counter[str]) -> None:
    """Requests over HTTP without their last byte, ever new ones, the last 400 kept open."""
    head = f"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Type: {PROTOBUF}\r\n"
    request = f"{head}Content-Length: {HALF_BYTES}\r\n\r\n".encode() + bytes(HALF_BYTES - 1)
    until = time.monotonic() + seconds
    open_ones: list[socket.socket] = []
    while time.monotonic() < until:
        try:
            one = connected(target.http)
            open_ones.append(one)
            one.settimeout(1)
            one.sendall(request)
            counts["sent"] += 1
        except OSError:
            counts["closed or not read"] += 1
        if len(open_ones) > HALF_BODIES:
            open_ones.pop(0).close()
    for one in open_ones:
        one.close()


def half_calls(target: Target, seconds: float, counts: Counter[str]) -> None:
    """The same over gRPC, many calls on each connection."""
    until = time.monotonic() + seconds
    open_ones: list[HalfCalls] = []
    while time.monotonic() < until:
        try:
            one = HalfCalls(target.grpc)
            open_ones.append(one)
            for _ in range(CALLS_OF_EACH):
                if time.monotonic() > until:
                    break
                counts["bytes taken"] += one.begin(CALL_BYTES)
                counts["calls"] += 1
        except OSError:
            counts["closed"] += 1
        if len(open_ones) > HALF_CONNECTIONS:
            open_ones.pop(0).close()
    for one in open_ones:
        one.close()


def slow_connections(target: Target, seconds: float, counts: Counter[str]) -> None:
    """1,100 connections that send their headers a byte a second, and come again when closed."""
    until = time.monotonic() + seconds
    places: list[socket.socket | None] = [None] * SLOW_CONNECTIONS
    while time.monotonic() < until:
        round_ends = time.monotonic() + 1
        for place, one in enumerate(places):
            try:
                if one is None:
                    places[place] = one = connected(target.http)
                    one.sendall(b"POST /v1/metrics HTTP/1.1\r\nX-Slow: ")
                    counts["opened"] += 1
                else:
                    one.sendall(b"x")
            except OSError:
                counts["closed"] += 1
                places[place] = None
        time.sleep(max(0.0, round_ends - time.monotonic()))
    for one in places:
        if one is not None:
            one.close()


def bodies(target: Target, seconds: float, counts: Counter[str], *made: bytes) -> None:
    """These bodies over HTTP, gzipped, by two connections at once, in turn."""

    def send(first: int) -> None:
        connection = HTTPConnection(target.http, timeout=10)
        nth = first
        while time.monotonic() < until:
            nth += 1
            try:
                connection.request("POST", "/v1/metrics", zipped[nth % len(zipped)], heads)
                response = connection.getresponse()
                response.read()
                counts[f"HTTP {response.status}"] += 1
            except (OSError, HTTPException):
                connection.close()
                counts["closed"] += 1

    heads = {"Content-Type": PROTOBUF, "Content-Encoding": "gzip"}
    zipped = [gzip.compress(body, 6, mtime=0) for body in made]
    counts["bytes of the largest"] = max(map(len, zipped))
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=send, args=(nth,)) for nth in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def gzip_bombs(target: Target, seconds: float, counts: Counter[str]) -> None:
    """100 MB of nothing, and as much as may be in a request: points, and names of points."""
    gauge = field(1, b"tolaria.loss")
    points = field(2, field(2, field(2, gauge + field(5, b"\x0a\x00" * (REQUEST_ROOM // 2)))))
    attributes = field(1, b"\x3a\x00" * (REQUEST_ROOM // 2))
    named = field(2, field(2, field(2, gauge + field(5, attributes))))
    bodies(target, seconds, counts, bytes(100 << 20), field(1, points), field(1, named))


def long_names(target: Target, seconds: float, counts: Counter[str]) -> None:
    """Few bytes of a long name and many steps, each of which has that name."""
    began = time.time_ns()
    made = [
        request_of(
            {"service.name": name},
            [metric_of("step", [(float(n), "") for n in range(steps)], began)],
        )
        for name, steps in (("x" * 200_000, 10_000), ("é" * 256, 60_000), ("y" * 256, 150_000))
    ]
    bodies(target, seconds, counts, *made)


def empty_messages(target: Target, seconds: float, counts: Counter[str]) -> None:
    """Requests of resources, of scopes, and of metrics, all empty."""
    full = REQUEST_ROOM // 2
    bodies(
        target,
        seconds,
        counts,
        b"\x0a\x00" * full,
        field(1, b"\x12\x00" * full),
        field(1, field(2, b"\x12\x00" * full)),
        field(1, field(1, b"\x0a\x00" * full)),
    )


ATTACKS: dict[str, Callable[[Target, float, Counter[str]], None]] = {
    "runs over OTLP": many_over_otlp,
    "runs over the socket": many_over_socket,
    "256 new seeds a step": seeds_without_end,
    "half requests over HTTP": half_bodies,
    "half calls over gRPC": half_calls,
    "slow connections": slow_connections,
    "gzip bombs": gzip_bombs,
    "long names, many steps": long_names,
    "empty messages": empty_messages,
}
BY_NUMBER = ("runs over OTLP", "runs over the socket")
"""Attacks that last for a number of runs."""


def attack(name: str, http: str, grpc: str, path: str) -> None:
    """Do so once, when told."""
    os.nice(NICE)
    with suppress(OSError, ValueError):
        setrlimit(RLIMIT_NOFILE, (getrlimit(RLIMIT_NOFILE)[1],) * 2)
    print("ready", flush=True)
    counts: Counter[str] = Counter()
    ATTACKS[name](Target(http, grpc, Path(path)), float(sys.stdin.readline()), counts)
    print(json.dumps(counts), flush=True)


ROLES: dict[str, Callable[..., Any]] = {
    "bystander": bystander,
    "honest": honest,
    "attack": attack,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
