"""How much OTLP the receiver takes on one core, alone and within a sidecar.

*Alone*: its process by itself, with somebody at the pipe's other end who only empties it. What
half a million points cost is the time that the process was on a processor, as the system counts
it, so whatever else the machine does is not in it.

*Within a sidecar* it goes until producers are told to wait, or cannot send faster. 512
trainers, each with one request of 600 points on its way at most, send faster and faster until
the first of them is refused, or two thirds of the rate is all they reach; the receiver's
process is kept to one core. What was sent must be exactly what was accepted and what was
refused, by the senders' count and by the sidecar's, and every refusal must say when to come
back. There the senders and the decide process share the machine with it, and limit it.

    python -m bench.ingest [--json PATH]
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.figures import Figure, median, run
from bench.fleet import POINTS
from bench.roundtrip import started, tamiyo
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Status, StatusRequest
from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.ingest_child import IngestChild

BENCH = "ingest"

BAR = 500_000
"""Points that the receiver is to take with a second of one core."""

ALONE_RATE, ALONE_S, BLOCKS = 150_000, 3.0, 5
"""Points per second that it gets for so long, so often: fewer than it could take, because a
process that is always behind has its requests together, and that is cheaper."""

FIRST, FACTOR, LAST = 20_000, 1.2, 2_000_000
"""Points per second of the first stage, and by how much each next one is faster."""

REACHED = 2 / 3
"""Share of a stage's rate below which the senders cannot go faster: each waits for its
answer."""

STAGE_S = 6.0
SETTLE_S = 30.0


def figures() -> list[Figure]:
    """All rows of this bench."""
    logging.getLogger("tamiyo").setLevel(logging.ERROR)  # a receiver ends, and it warns
    return [row for protocol in ("http", "grpc") for row in (*alone(protocol), *rows(protocol))]


def alone(protocol: str) -> list[Figure]:
    """Rows of the receiver by itself."""
    with receiver() as child:
        argv = [sys.executable, "-m", "bench.fleet", protocol]
        with started([*argv, child.status()[f"otlp_{protocol}"]]) as (fleet, _):
            stage(fleet, ALONE_RATE, 1.0, Counter())
            costs = []
            for _ in range(BLOCKS):
                sent: Counter[str] = Counter()
                before_s = cpu_s(child.pid)
                stage(fleet, ALONE_RATE, ALONE_S, sent)
                points = sent["accepted"] * POINTS
                costs.append((cpu_s(child.pid) - before_s) / points * BAR)
    return [
        Figure.at_most(
            BENCH,
            f"{protocol}: receiver alone, CPU for {BAR:,} points",
            median(costs),
            "s",
            bar=1.0,
        ),
        Figure.report(
            BENCH,
            f"{protocol}: receiver alone, points per second of CPU",
            BAR / median(costs),
            "/s",
        ),
    ]


@contextmanager
def receiver() -> Iterator[IngestChild]:
    """The receiver's process, listening, with a thread that empties its pipe."""
    anywhere = Address("127.0.0.1", 0)
    child = IngestChild(anywhere, anywhere)
    child.start()
    assert child.pipe is not None
    child.pipe.setblocking(True)
    while not child.listening:
        child.read()

    def drain() -> None:
        while child.pipe is not None:
            child.read()
            child.frames.clear()

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield child
    finally:
        child.pipe.shutdown(socket.SHUT_RDWR)  # which is how the process is told to end
        thread.join()
        child.close()


def cpu_s(pid: int | None) -> float:
    """Time that a process, with all its threads, was on a processor."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def rows(protocol: str) -> list[Figure]:
    """Rows of one protocol, with a sidecar of its own."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        path = Path(folder) / "tamiyo.sock"
        with tamiyo(path) as words:
            pid = counts(path)["pid"]
            keep_to_one_core(pid)
            argv = [sys.executable, "-m", "bench.fleet", protocol, words[f"otlp_{protocol}"]]
            with started(argv) as (fleet, _):
                before_s = cpu_s(pid)
                sent, taken, at_refusal = until_limit(fleet)
            found = settled(path, sent)
            cost = (cpu_s(pid) - before_s) / (sent["accepted"] * POINTS) * BAR
            return [
                Figure.report(
                    BENCH, f"{protocol}: within a sidecar, CPU for {BAR:,} points", cost, "s"
                ),
                *report(protocol, taken, at_refusal, sent, found),
            ]


def until_limit(
    fleet: subprocess.Popen[str],
) -> tuple[Counter[str], float, float | None]:
    """Fates of all requests; points taken per second, at most in a stage without a refusal,
    and in the one with the first, None without any."""
    sent: Counter[str] = Counter()
    fastest = 0.0
    rate = float(FIRST)
    stage(fleet, rate, 1.0, sent)  # the receiver meets every connection once
    while rate < LAST:
        taken = stage(fleet, rate, STAGE_S, sent)
        if sent.total() > sent["accepted"]:
            return sent, fastest, taken
        fastest = max(fastest, taken)
        if taken < REACHED * rate:
            return sent, fastest, None
        rate *= FACTOR
    raise RuntimeError(f"{fastest:,.0f} points/s, and neither side had enough")


def stage(
    fleet: subprocess.Popen[str], rate: float, seconds: float, sent: Counter[str]
) -> float:
    """Send at a rate for some time; points taken per second."""
    assert fleet.stdin is not None
    assert fleet.stdout is not None
    fleet.stdin.write(f"{rate} {seconds}\n")
    fleet.stdin.flush()
    told = json.loads(fleet.stdout.readline())
    sent.update(told["fates"])
    return float(told["fates"].get("accepted", 0) * POINTS / told["seconds"])


def keep_to_one_core(pid: int) -> None:
    """The receiver has threads of gRPC's, too."""
    core = max(os.sched_getaffinity(0))
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def counts(path: Path) -> dict[str, Any]:
    """What the sidecar says of its receiver."""
    reply = reply_to(StatusRequest(), path)
    assert isinstance(reply, Status)
    return dict(reply.report["ingest"])


def settled(path: Path, sent: Counter[str]) -> dict[str, Any]:
    """The sidecar's counts, once it has read all that its receiver took."""
    until = time.monotonic() + SETTLE_S
    while True:
        found = counts(path)
        requests = found["requests"] + found["turned_away_busy"]
        if requests >= sent.total() or time.monotonic() > until:
            return found
        time.sleep(0.1)


def report(
    protocol: str,
    taken: float,
    at_refusal: float | None,
    sent: Counter[str],
    ingest: dict[str, Any],
) -> list[Figure]:
    """The rows."""
    points = sum(ingest[f"points_{fate}"] for fate in ("used", "foreign", "unusable"))
    other = sent.total() - sent["accepted"] - sent["refused"]
    lost = abs(points - sent["accepted"] * POINTS) + other * POINTS
    lost += abs(ingest["turned_away_busy"] - sent["refused"]) * POINTS
    unusable = ingest["points_foreign"] + ingest["points_unusable"]
    refusing = f"{protocol}: taken while some are refused"
    refused = (
        [] if at_refusal is None else [Figure.report(BENCH, refusing, at_refusal, "points/s")]
    )
    return [
        Figure.report(
            BENCH, f"{protocol}: taken, fastest without a refusal", taken, "points/s"
        ),
        *refused,
        Figure.report(BENCH, f"{protocol}: sent in all", sent.total() * POINTS, "points"),
        Figure.report(BENCH, f"{protocol}: refused", sent["refused"] * POINTS, "points"),
        Figure.at_most(
            BENCH,
            f"{protocol}: neither accepted nor refused",
            lost,
            "points",
            bar=0.0,
        ),
        Figure.at_most(
            BENCH, f"{protocol}: accepted, but not used", unusable, "points", bar=0.0
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(run(figures))
