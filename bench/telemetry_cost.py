"""What telemetry costs a training step, against the same by hand with the SDK.

By hand: 24 synchronous gauges set with two attributes, and 5 spans (``train.step`` and
four phases, each a ``with`` as around real work), exported by the SDK's own OTLP/HTTP
exporters. Ours: the recorder told of the same step, which makes 24 metrics of it, and the
stream, which sends every step of them, and spans at the default sampling.

* On the training thread: CPU time of that thread, in blocks of both in turn, in one process.
* Of the whole process: a process each, in turn. What a step costs is the training thread's
  CPU time inside the calls and all CPU time of other threads, from the second second until
  everything is delivered to a receiver in a process of its own. Metrics leave ten times a
  second either way, though the SDK then sends the last of the values and ours every one;
  spans leave as each does by default. First steps back to back, as above, then steps
  with a pause, which is where training lives: the processor's caches have forgotten
  this code each time, and fewer steps share the cost of sending. The processes find
  bytecode, as those of an installed package do: where Python is told to write none, a run
  compiles at its end what it imports there, and few steps would share that.

    python -m bench.telemetry_cost [--json PATH]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns
from types import SimpleNamespace
from typing import NamedTuple

from bench.figures import Figure, alternate, median, run
from esper_otel.leyline.metrics import STEP_METRICS
from esper_otel.run import Run
from esper_otel.settings import EsperSettings, Mode
from esper_otel.tolaria.fetches import size_in
from testkit.receiver import METRICS as METRICS_PATH
from testkit.receiver import TRACES as TRACES_PATH
from testkit.receiver import ReceiverProcess

BENCH = "telemetry_cost"
METRICS = 24
PHASES = ("train.input_wait", "train.forward", "train.backward", "train.optimizer")

BLOCKS, BLOCK_STEPS = 40, 100
RUNS, WARM_S, RUN_S = 3, 1.0, 3.0
BACK_TO_BACK = 500, 4000
PACES_MS = (0, 1, 5, 20, 100)


class Recording(NamedTuple):
    """A way of recording steps: what is called for each, what ends it, and what waits
    until its other threads have nothing left to do."""

    step: Callable[[int], None]
    settle: Callable[[], None]
    close: Callable[[], None]


def figures() -> list[Figure]:
    receiver = ReceiverProcess()
    try:
        rows = on_the_training_thread(receiver.url) + of_the_whole_process(receiver.url)
        counts = receiver.counts()
    finally:
        receiver.kill()
    if not counts["requests"].get(METRICS_PATH) or not counts["requests"].get(TRACES_PATH):
        raise AssertionError(f"the receiver did not get both signals: {counts['requests']}")
    return rows


def on_the_training_thread(url: str) -> list[Figure]:
    ours, sdk = with_esper(url), with_sdk(url)
    steps = iter(range(sys.maxsize))

    def block(recording: Recording) -> float:
        """CPU time of this thread for one step, in µs."""
        numbers = [next(steps) for _ in range(BLOCK_STEPS)]
        began = time.thread_time_ns()
        for number in numbers:
            recording.step(number)
        took_us = (time.thread_time_ns() - began) / 1e3 / BLOCK_STEPS
        # The exports of one must not take processor and interpreter from the other.
        recording.settle()
        return took_us

    block(ours), block(sdk)
    ours_us, sdk_us = alternate(lambda: block(ours), lambda: block(sdk), BLOCKS)
    ours.close()
    sdk.close()
    return [
        Figure.at_most(
            BENCH,
            "CPU of the training thread per step, recording and streaming",
            median(ours_us),
            "µs",
            median(sdk_us),
            bar=1 / 30,
        ),
        Figure.report(
            BENCH, "the same, slowest of the blocks", max(ours_us), "µs", max(sdk_us)
        ),
    ]


def of_the_whole_process(url: str) -> list[Figure]:
    with tempfile.TemporaryDirectory() as bytecode:
        for kind in ("esper", "sdk"):
            _worker(kind, url, 20, bytecode)  # writes it
        return [_at_pace(pace_ms, url, bytecode) for pace_ms in PACES_MS]


def _at_pace(pace_ms: int, url: str, bytecode: str) -> Figure:
    ours, sdk = alternate(
        partial(_worker, "esper", url, pace_ms, bytecode),
        partial(_worker, "sdk", url, pace_ms, bytecode),
        RUNS,
    )
    pace = f"steps of {pace_ms} ms" if pace_ms else "back to back"
    figure = f"CPU of the process per step, {pace}"
    return Figure.at_most(BENCH, figure, median(ours), "µs", median(sdk), bar=1 / 8)


def with_esper(url: str) -> Recording:
    """Our recorder and stream, told of a step as the instrumentor tells them of it.

    Left out are the arithmetic of the gradient norm and the ask; reading loss and norm
    from their tensors, and counting the batch, are in.
    """
    import torch

    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
    os.environ.update(environ)
    run = Run(EsperSettings(mode=Mode.OFF))
    recorder, begin = run._recorder, run._loop.scalars.read_async
    batch = [torch.zeros(64, 1), torch.zeros(64)]
    loss, norm = torch.tensor(0.5), torch.tensor(1.5)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1, "momentum": 0.9}])

    def step(number: int) -> None:
        recorder.batch_came(perf_counter_ns(), size_in(batch))
        recorder.backward_begins()
        recorder.backward_ends(begin(loss))
        recorder.loop_reported(None, {"accuracy": 0.5, "grad_conflict_rate": 0.25})
        recorder.optimizer_begins(perf_counter_ns(), begin(norm))
        run._loop.optimizer_ended(optimizer)

    def settle() -> None:
        # Not asked for its report before: that would take up what is noted on this thread.
        while not run._stream._ring.is_empty or run.stream_report.metrics.spooled:
            time.sleep(0.01)

    return Recording(step, settle, lambda: _closed(run))


def _closed(run: Run) -> None:
    report = run.close()
    if report.metrics.delivered != report.metrics.produced or not report.metrics.produced:
        raise AssertionError(f"not everything was delivered: {report}")
    if report.metrics.produced < (METRICS - 2) * report.frames:
        raise AssertionError(f"fewer than {METRICS} metrics a step: {report}")


def with_sdk(url: str) -> Recording:
    """The SDK's instruments and exporters, by hand."""
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{url}{METRICS_PATH}"), export_interval_millis=100
    )
    meters = MeterProvider([reader])
    tracers = TracerProvider()
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}{TRACES_PATH}")))
    meter, tracer = meters.get_meter("bench"), tracers.get_tracer("bench")
    gauges = [
        meter.create_gauge(metric.instrument, metric.unit) for metric in STEP_METRICS[:METRICS]
    ]
    attributes: dict[str, str | int] = {"run_id": "bench", "rank": 0}

    def step(number: int) -> None:
        with tracer.start_as_current_span("train.step") as span:
            span.set_attribute("step", number)
            for name in PHASES:
                with tracer.start_as_current_span(name):
                    pass
        for gauge in gauges:
            gauge.set(0.5, attributes)

    def close() -> None:
        meters.shutdown()
        tracers.shutdown()

    def settle() -> None:
        meters.force_flush()
        tracers.force_flush()

    return Recording(step, settle, close)


def _worker(kind: str, url: str, pace_ms: int, bytecode: str) -> float:
    """CPU time per step in µs that a process spends on recording steps in this way.

    It keeps bytecode in the folder ``bytecode``.
    """
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    finished = subprocess.run(
        [sys.executable, "-m", "bench.telemetry_cost", "--worker", kind, url, str(pace_ms)],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(finished.stdout)


def work(kind: str, url: str, pace_ms: str) -> None:
    """Record steps at a steady pace and print the CPU time each took, in µs."""
    recording = with_esper(url) if kind == "esper" else with_sdk(url)
    pause_s = int(pace_ms) / 1e3
    warm, steps = (int(WARM_S / pause_s), int(RUN_S / pause_s)) if pause_s else BACK_TO_BACK
    for number in range(warm):
        recording.step(number)
        time.sleep(pause_s)
    process, thread, calls = time.process_time_ns(), time.thread_time_ns(), 0
    for number in range(warm, warm + steps):
        began = time.thread_time_ns()
        recording.step(number)
        calls += time.thread_time_ns() - began
        if pause_s:
            time.sleep(pause_s)
    began = time.thread_time_ns()
    recording.close()
    calls += time.thread_time_ns() - began
    others = (time.process_time_ns() - process) - (time.thread_time_ns() - thread)
    print((calls + others) / 1e3 / steps)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        sys.exit(run(figures))
