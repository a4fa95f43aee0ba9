"""How much telemetry a rank makes: points, bytes, and how long places to wait in last.

A step of 24 metrics, without seeds and with 4, is encoded as the stream encodes it: in a
request of its own, which is what the default interval makes of ten steps a second, and as
one of a hundred in a request. From these follows what an outage piles up. Nothing is timed,
so the figures are the same on every machine.

    python -m bench.sizing [--json PATH]
"""

from __future__ import annotations

import gzip
import sys
from math import sin

from bench.figures import Figure, run
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import SEED_KEYS
from esper_otel.settings import EsperSettings
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.providers import serialised_resource, trainer_resource
from esper_otel.stream.ring import FrameRing

BENCH = "sizing"
METRICS, SEEDS, STEPS_PER_S, TOGETHER, RANKS = 24, 4, 10, 100, 64
START_NS, STEP_NS = 1_790_000_000_000_000_000, 100_000_000
QUEUE_BYTES = 1 << 30
"""Of each queue on disk, unless ``COLLECTOR_QUEUE_BYTES`` says otherwise."""


def figures() -> list[Figure]:
    rows = []
    for seeds in (0, SEEDS):
        what = f"{METRICS} metrics" + (f" and {seeds} seeds" if seeds else "")
        alone, together = _request(1, seeds), _request(TOGETHER, seeds)
        step = sum(len(body) for body in alone)
        zipped = sum(len(gzip.compress(body)) for body in alone)
        among = sum(len(body) for body in together) / TOGETHER
        hour = step * STEPS_PER_S * 3600
        rows += [
            (f"{what}: points of a step", METRICS + seeds * len(SEED_KEYS), "points"),
            (f"{what}: a step in a request of its own", step, "bytes"),
            (f"{what}: the same, gzip", zipped, "bytes"),
            (f"{what}: a step among {TOGETHER} in a request", among, "bytes"),
            (f"{what}: an hour of {STEPS_PER_S} steps/s that nobody takes", hour / 1e6, "MB"),
            (
                f"{what}: until a trainer's spool is full at that rate",
                EsperSettings().spool_mb * 1e6 / hour * 60,
                "min",
            ),
            (
                f"{what}: until a Collector's queue is full of {RANKS} such ranks",
                QUEUE_BYTES / (RANKS * hour) * 60,
                "min",
            ),
        ]
    return [Figure.report(BENCH, name, value, unit) for name, value, unit in rows]


def _request(steps: int, seeds: int) -> list[bytes]:
    """So many steps as the stream would send them at once."""
    ring = FrameRing(steps * max(seeds, 1) + 1)
    absent = step_row()[METRICS:]
    for step in range(steps):
        values = [sin(step + metric) for metric in range(1, METRICS)]
        row = [float(step), *values, *absent]
        grown = [
            (f"features.{seed}-1", [sin(step + seed + at) for at in range(len(SEED_KEYS))])
            for seed in range(seeds)
        ]
        ring.put(START_NS + step * STEP_NS, row, grown)
    frames = ring.drain()
    assert frames is not None
    resource = trainer_resource("run-of-usual-length", "0123456789abcdef", 0, 64)
    encoder = FrameEncoder(serialised_resource(resource))
    return [request.body for request in encoder.encode(frames)]


if __name__ == "__main__":
    sys.exit(run(figures))
