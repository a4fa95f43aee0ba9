"""What a receiver that goes away costs: nothing but time.

3,000 steps of 24 metrics; the receiver, a process of its own, is killed after a third of
them and started again on the same port after two thirds. It writes down what it takes
before it answers, so what it took outlives it.

    python -m bench.outage [--json PATH]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from bench.figures import Figure, percentile, run
from esper_otel.leyline.frames import step_row
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream, StreamReport, read_frames
from testkit.receiver import ReceiverProcess

BENCH = "outage"
STEPS, METRICS, STEP_S = 3000, 24, 0.001


def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as name:
        folder = Path(name)
        receiver = ReceiverProcess(folder / "journal")
        try:
            report, frame_us = _train(receiver, folder / "spool")
        finally:
            receiver.kill()
        # A receiver that is started again writes files of its own.
        files = (folder / "journal").glob("*.metrics.otlp")
        taken = [frame.step for file in files for frame in read_frames(file)]
    metrics = report.metrics
    if metrics.produced != STEPS * METRICS:
        raise AssertionError(f"{metrics.produced} points of {STEPS * METRICS} were produced")
    unaccounted = metrics.produced - metrics.delivered - metrics.spooled - metrics.dropped
    return [
        Figure.at_most(
            BENCH,
            "produced - delivered - spooled - dropped",
            abs(unaccounted),
            "points",
            bar=0,
        ),
        Figure.at_most(BENCH, "dropped", metrics.dropped, "points", bar=0),
        Figure.at_most(
            BENCH, "steps that never came", len(set(range(STEPS)) - set(taken)), "steps", bar=0
        ),
        Figure.report(BENCH, "left in a file at the end", metrics.spooled, "points"),
        Figure.report(BENCH, "steps that came twice", len(taken) - len(set(taken)), "steps"),
        Figure.report(BENCH, "handing over a frame, p99", percentile(frame_us, 99), "µs"),
    ]


def _train(receiver: ReceiverProcess, spool: Path) -> tuple[StreamReport, list[float]]:
    """Run the steps; what became of them, and how long each handing over took in µs."""
    stream = Stream(
        EsperSettings(spool_dir=str(spool)),
        run_id="bench",
        instance_id="bench",
        environ={
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_TRACES_EXPORTER": "none",
        },
    )
    stream.start()
    row = [0.5] * METRICS + step_row()[METRICS:]
    frame_us = []
    for step in range(STEPS):
        if step == STEPS // 3:
            receiver.kill()
        if step == STEPS * 2 // 3:
            receiver.start()
        row[0] = float(step)
        began = time.perf_counter_ns()
        stream.frame(time.time_ns(), row)
        frame_us.append((time.perf_counter_ns() - began) / 1e3)
        time.sleep(STEP_S)
    return stream.close(), frame_us


if __name__ == "__main__":
    sys.exit(run(figures))
