"""How long a step waits for its decision while 50,000 OTLP points per second come in.

Eight ranks with steps of 4 ms send their metrics to the sidecar's receiver. Meanwhile the
sidecar is asked through the client that training uses, with 0, 1, 10 and 100 ms between
asks, and in turn with it, in short blocks and under the same load, a bare Python echo with
messages of the same sizes: what the echo's tail has, the machine does.

    python -m bench.answers_under_load [--json PATH]
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from bench.figures import Figure, percentile, run
from bench.roundtrip import Ask, Asked, Feed, echo, feeder, tamiyo, timed

BENCH = "answers_under_load"

POINTS_PER_S = 50_000
GAPS = ((0, 100, 10.0), (1, 50, 15.0), (10, 10, 20.0), (100, 2, 60.0))
"""Gap between asks in ms, asks per block, and seconds in all."""

BAR = 3.0


def figures() -> list[Figure]:
    """All rows of this bench."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        words = stack.enter_context(tamiyo(folder / "tamiyo.sock"))
        asked = stack.enter_context(Asked(folder / "tamiyo.sock"))
        bare = stack.enter_context(echo(folder / "echo.sock", *asked.sizes()))
        feed = stack.enter_context(feeder(words["otlp_http"], POINTS_PER_S))
        feed.begin(1.0)  # the first requests find the receiver still importing
        feed.finish()
        rows = [row for gap in GAPS for row in at_gap(*gap, asked.ask, bare, feed)]
    return [*rows, Figure.report(BENCH, "points taken meanwhile", feed.rate, "points/s")]


def at_gap(
    gap_ms: int, asks: int, seconds: float, ours: Ask, bare: Ask, feed: Feed
) -> list[Figure]:
    """Rows of one gap between asks."""
    times: dict[str, list[float]] = {"ours": [], "echo": []}
    feed.begin(seconds)
    until = perf_counter() + seconds
    while perf_counter() < until:
        for name, ask in (("ours", ours), ("echo", bare)):
            times[name] += [timed(ask, gap_ms / 1e3) for _ in range(asks)]
    feed.finish()
    rows = []
    for label, percent in (("p50", 50), ("p99", 99), ("p99.9", 99.9), ("max", 100)):
        value, baseline = (percentile(times[name], percent) for name in ("ours", "echo"))
        name = f"answer {label} over echo, {gap_ms} ms between asks"
        rows.append(
            Figure.at_most(BENCH, name, value, "µs", baseline, bar=BAR)
            if label == "p99"
            else Figure.report(BENCH, name, value, "µs", baseline)
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(run(figures))
