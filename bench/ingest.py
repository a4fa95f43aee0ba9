"""How much OTLP the receiver takes on one core before it tells producers to wait.

512 trainers, each with one request of 600 points on its way at most, send faster and
faster until the first of them is refused; the receiver's process is kept to one core. What
was sent must be exactly what was accepted and what was refused, by the senders' count and
by the sidecar's, and every refusal must say when to come back.

    python -m bench.ingest [--json PATH]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.figures import Figure, run
from bench.fleet import POINTS
from bench.roundtrip import started, tamiyo
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Status, StatusRequest

BENCH = "ingest"

FIRST, FACTOR, LAST = 20_000, 1.2, 2_000_000
"""Points per second of the first stage, and by how much each next one is faster."""

STAGE_S = 6.0
SETTLE_S = 30.0


def figures() -> list[Figure]:
    """All rows of this bench."""
    return [row for protocol in ("http", "grpc") for row in rows(protocol)]


def rows(protocol: str) -> list[Figure]:
    """Rows of one protocol, with a sidecar of its own."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        path = Path(folder) / "tamiyo.sock"
        with tamiyo(path) as words:
            keep_to_one_core(counts(path)["pid"])
            argv = [sys.executable, "-m", "bench.fleet", protocol, words[f"otlp_{protocol}"]]
            with started(argv) as (fleet, _):
                sent, taken, at_refusal = until_refused(fleet)
            return report(protocol, taken, at_refusal, sent, settled(path, sent))


def until_refused(
    fleet: subprocess.Popen[str],
) -> tuple[Counter[str], float, float]:
    """Fates of all requests; points taken per second in the last two stages."""
    sent: Counter[str] = Counter()
    taken = before = 0.0
    rate = float(FIRST)
    stage(fleet, rate, 1.0, sent)  # the receiver meets every connection once
    while sent.total() == sent["accepted"]:
        before, taken = taken, stage(fleet, rate, STAGE_S, sent)
        rate *= FACTOR
        if rate > LAST:
            raise RuntimeError("it was never refused")
    return sent, before, taken


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
    protocol: str, taken: float, at_refusal: float, sent: Counter[str], ingest: dict[str, Any]
) -> list[Figure]:
    """The rows."""
    points = sum(ingest[f"points_{fate}"] for fate in ("used", "foreign", "unusable"))
    other = sent.total() - sent["accepted"] - sent["refused"]
    lost = abs(points - sent["accepted"] * POINTS) + other * POINTS
    lost += abs(ingest["turned_away_busy"] - sent["refused"]) * POINTS
    unusable = ingest["points_foreign"] + ingest["points_unusable"]
    return [
        Figure.report(
            BENCH, f"{protocol}: taken, fastest without a refusal", taken, "points/s"
        ),
        Figure.report(
            BENCH, f"{protocol}: taken while some are refused", at_refusal, "points/s"
        ),
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
