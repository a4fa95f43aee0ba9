"""A part goes away, alone, while a run goes on: what the others have of it."""

import os
import signal
import time
import urllib.request
from http.client import HTTPConnection
from itertools import count
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import StatusRequest
from testkit.patience import PATIENCE_S

STEP_NS = 2_000_000
BEFORE, DURING, AFTER = range(40), range(40, 80), range(80, 120)
ALL = range(120)
SPANS = 4
FLOOD, FLOOD_BYTES = 400, 64 << 10
"""So many requests, each so large: many times what the queue for Tamiyo has room for."""


class Run:
    """A simulated run whose steps are two milliseconds apart, whatever the machine does."""

    def __init__(self, rank, wait_until):
        self.name = rank.run
        self.began = (time.time_ns() // STEP_NS - 1000) * STEP_NS
        self._rank = rank
        self._wait_until = wait_until

    def train(self, steps):
        for step in steps:
            start = self.began + step * STEP_NS
            self._rank.step(step, start)
            self._rank.trace(step, start, STEP_NS // 4)

    def delivered(self, steps):
        """Wait until so many steps, and their spans, were taken by the Collector."""

        def are():
            report = self._rank.stream.snapshot()
            metrics, spans = report.metrics, report.traces
            return (
                metrics.produced == metrics.delivered == steps * len(STEP_KEYS)
                and spans.produced == spans.delivered == steps * SPANS
            )

        self._wait_until(are)

    def end(self):
        return self._rank.close(30.0)

    def in_prometheus(self, stack):
        """(millisecond, value) of every loss."""
        found = stack.prometheus.series(f'tolaria_loss{{esper_run_id="{self.name}"}}')
        return found[0].samples if found else []

    def expected(self, steps):
        return [((self.began + step * STEP_NS) // 1_000_000, step + 0.01) for step in steps]

    def in_jaeger(self, stack):
        """Steps that have a trace."""
        return sorted(
            tag["value"]
            for trace in stack.jaeger.traces(self.name)
            for span in trace["spans"]
            if span["operationName"] == "train.step"  # and not Tamiyo's part of the trace
            for tag in span["tags"]
            if tag["key"] == "esper.step"
        )

    def in_tamiyo(self, stack):
        """The newest step that Tamiyo has judged."""
        runs = reply_to(StatusRequest(), stack.socket).report["engine"]["runs"]
        return next((run["newest_step"] for run in runs if run["run"] == self.name), None)


@pytest.fixture
def run(rank, wait_until, request, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", request.node.name)
    return Run(rank(flush_timeout_s=30), wait_until)


def killed(part):
    part.kill()
    assert part.pid is None


def back(part):
    part.start()
    part.wait()


def assert_nothing_lost(report):
    for account in (report.metrics, report.traces):
        assert account.produced == account.delivered + account.spooled + account.dropped
        assert account.dropped == account.spooled == 0


def test_the_collector_is_killed(stack, run, wait_until):
    run.train(BEFORE)
    run.delivered(len(BEFORE))
    killed(stack.parts["collector"])
    run.train(DURING)
    back(stack.parts["collector"])
    run.train(AFTER)
    assert_nothing_lost(run.end())
    wait_until(lambda: len(run.in_prometheus(stack)) >= len(ALL))
    assert run.in_prometheus(stack) == run.expected(ALL)
    wait_until(lambda: run.in_jaeger(stack) == list(ALL))


def test_prometheus_is_killed(stack, run, wait_until):
    run.train(BEFORE)
    run.delivered(len(BEFORE))
    killed(stack.parts["prometheus"])
    run.train(DURING)
    run.delivered(len(BEFORE) + len(DURING))
    wait_until(lambda: run.in_tamiyo(stack) == DURING[-1])
    wait_until(lambda: run.in_jaeger(stack) == [*BEFORE, *DURING])
    back(stack.parts["prometheus"])
    run.train(AFTER)
    assert_nothing_lost(run.end())
    wait_until(lambda: len(run.in_prometheus(stack)) >= len(ALL))
    assert run.in_prometheus(stack) == run.expected(ALL)


def test_jaeger_is_killed(stack, run, wait_until):
    run.train(BEFORE)
    run.delivered(len(BEFORE))
    wait_until(lambda: run.in_jaeger(stack) == list(BEFORE))
    killed(stack.parts["jaeger"])
    run.train(DURING)
    run.delivered(len(BEFORE) + len(DURING))
    wait_until(lambda: run.in_tamiyo(stack) == DURING[-1])
    wait_until(lambda: run.in_prometheus(stack) == run.expected([*BEFORE, *DURING]))
    back(stack.parts["jaeger"])
    run.train(AFTER)
    assert_nothing_lost(run.end())
    # What it had kept was in its memory; what was sent meanwhile has waited for it.
    wait_until(lambda: run.in_jaeger(stack) == [*DURING, *AFTER])


def test_tamiyo_is_killed(stack, run, wait_until):
    run.train(BEFORE)
    run.delivered(len(BEFORE))
    wait_until(lambda: run.in_tamiyo(stack) == BEFORE[-1])
    killed(stack.parts["tamiyo"])
    run.train(DURING)
    run.delivered(len(BEFORE) + len(DURING))
    wait_until(lambda: run.in_prometheus(stack) == run.expected([*BEFORE, *DURING]))
    wait_until(lambda: run.in_jaeger(stack) == [*BEFORE, *DURING])
    back(stack.parts["tamiyo"])

    steps = count(AFTER[0])

    def is_heard():
        run.train([next(steps)])
        return (run.in_tamiyo(stack) or 0) > DURING[-1]  # it goes on from BEFORE[-1]

    wait_until(is_heard)
    frames = reply_to(StatusRequest(), stack.socket).report["connections"]["frames_streamed"]
    newest = run.in_tamiyo(stack)
    assert frames <= newest - DURING[-1], "what it missed is not told to it later"
    assert_nothing_lost(run.end())


def some_request():
    """One point of a registered metric, of another run, in a large request."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    attributes = resource.resource.attributes
    attributes.add(key="esper.run_id").value.string_value = "flood"
    # Not among the labels that Prometheus is given: resource/labels takes it away.
    attributes.add(key="process.padding").value.string_value = "x" * FLOOD_BYTES
    metric = resource.scope_metrics.add().metrics.add(name="tolaria.step")
    metric.gauge.data_points.add(time_unix_nano=time.time_ns(), as_double=1.0)
    return request.SerializeToString()


def answers(stack, body, times):
    """The statuses that posting ``body`` so often got."""
    connection = HTTPConnection("127.0.0.1", stack.ports.otlp_http, timeout=PATIENCE_S)
    got = set()
    for _ in range(times):
        headers = {"Content-Type": "application/x-protobuf"}
        connection.request("POST", "/v1/metrics", body, headers)
        answer = connection.getresponse()
        answer.read()
        got.add(answer.status)
    connection.close()
    return got


def test_tamiyo_hangs_and_nobody_waits_for_it(stack, run, wait_until):
    run.train(BEFORE)
    run.delivered(len(BEFORE))
    wait_until(lambda: run.in_tamiyo(stack) == BEFORE[-1])
    pid = stack.parts["tamiyo"].pid
    stopped = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        # Much more than the queue for Tamiyo has room for: nothing of it is refused.
        assert answers(stack, some_request(), FLOOD) == {200}
        run.train([*DURING, *AFTER])
        run.delivered(len(ALL))
        wait_until(lambda: run.in_prometheus(stack) == run.expected(ALL))
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)
    assert_nothing_lost(run.end())
    metrics = f"http://127.0.0.1:{stack.ports.collector_metrics}/metrics"
    with urllib.request.urlopen(metrics) as answer:
        refused = [
            line
            for line in answer.read().decode().splitlines()
            if line.startswith("otelcol_exporter_enqueue_failed_metric_points")
            and 'exporter="otlp_http/tamiyo"' in line
        ]
    assert refused, "the queue was full, and what it had no room for was counted"
