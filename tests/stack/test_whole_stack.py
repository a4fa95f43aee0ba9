"""From a trainer's stream through the Collector into Prometheus, Jaeger and Tamiyo."""

import json
import subprocess
import sys
import time

import pytest

from bench.ranks import Rank
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.docs import prometheus_name
from esper_otel.leyline.events import STAGE_CHANGED, Event
from esper_otel.leyline.metrics import SEED_METRICS, STEP_METRICS
from esper_otel.leyline.wire import StatusRequest
from esper_otel.stream import read_frames
from esper_tamiyo.serving.asking import reply_to
from stack.services import clean_environment

STEPS = 120
STEP_NS = 2_000_000

LOOP = """
import os, sys, time
import esper_otel
run = esper_otel.start(span_every=1, mode="enforce")
for step in range(20):
    with run.phase("forward"):
        time.sleep(0.002)
    with run.phase("backward"):
        time.sleep(0.002)
    with run.phase("optimizer"):
        time.sleep(0.001)
    run.report(loss=float("nan") if step == 14 else 1.0 / (step + 1))
    run.step()
report = run.close(20.0)
assert report.traces.delivered == report.traces.produced > 0, report
"""


@pytest.fixture(scope="session")
def sent(stack, tmp_path_factory):
    """Steps with every metric of the registry, of two seeds too, as they were recorded."""
    folder = tmp_path_factory.mktemp("sent")
    rank = Rank(
        stack.url,
        folder,
        run="whole",
        rank=1,
        world_size=2,
        seeds=2,
        stream_interval_ms=20,
        recording_dir=str(folder),
    )
    began = time.time_ns() - (STEPS + 1) * STEP_NS
    for step in range(STEPS):
        rank.step(step, began + step * STEP_NS + 123_456)
    report = rank.close(20.0)
    assert report.metrics.delivered == report.metrics.produced > 0
    return list(read_frames(folder / "whole-rank1.metrics.otlp"))


def series(stack, wait_until, metric, run="whole", steps=STEPS, **labels):
    """The series of a metric, once all their steps have come."""
    more = "".join(f', {name}="{value}"' for name, value in labels.items())
    selector = f'{prometheus_name(metric)}{{esper_run_id="{run}"{more}}}'

    def complete():
        found = stack.prometheus.series(selector)
        return found if found and all(len(one.samples) >= steps for one in found) else None

    return wait_until(complete)


def milliseconds(frame):
    return frame.time_unix_nano // 1_000_000


@pytest.mark.parametrize("metric", STEP_METRICS, ids=lambda metric: metric.key)
def test_every_metric_of_a_step_is_in_prometheus_with_every_value_and_millisecond(
    stack, wait_until, sent, metric
):
    (one,) = series(stack, wait_until, metric)
    assert one.samples == [(milliseconds(frame), frame.values[metric.key]) for frame in sent]
    assert one.labels == {
        "__name__": prometheus_name(metric),
        "esper_run_id": "whole",
        "esper_rank": "1",
        "esper_world_size": "2",
        "instance": "whole-1",
        "job": "esper-trainer",
    }


@pytest.mark.parametrize("metric", SEED_METRICS, ids=lambda metric: metric.key)
def test_every_metric_of_a_seed_is_there_by_seed(stack, wait_until, sent, metric):
    found = {one.labels["seed_id"]: one for one in series(stack, wait_until, metric)}
    assert set(found) == set(sent[0].seeds)
    for seed, one in found.items():
        assert one.samples == [
            (milliseconds(frame), frame.seeds[seed][metric.key]) for frame in sent
        ]


def status(stack):
    return reply_to(StatusRequest(), stack.socket).report


def test_tamiyo_has_judged_every_step_that_went_through_the_collector(stack, wait_until, sent):
    def judged():
        runs = status(stack)["engine"]["runs"]
        return [one for one in runs if one["run"] == "whole"]

    (run,) = wait_until(lambda: [o for o in judged() if o["newest_step"] == STEPS - 1])
    assert run["rank"] == 1


def test_a_trace_in_jaeger_holds_a_step_whose_phases_lie_inside_it(stack, wait_until, tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": stack.url,
        "OTEL_SERVICE_NAME": "loop",
        "ESPER_TAMIYO_SOCKET": str(stack.socket),
        "ESPER_TAMIYO_DEADLINE_MS": "1000",
        "ESPER_RUN_ID": "loop",
    }
    subprocess.run(
        [sys.executable, str(script)],
        env=clean_environment(environment),
        check=True,
        timeout=60,
    )
    traces = wait_until(
        lambda: len(found := stack.jaeger.traces("loop")) >= 20 and found, patience_s=30
    )
    trace = next(trace for trace in traces if step_of(trace) == 10)
    spans = {span["operationName"]: span for span in trace["spans"]}
    step = spans["train.step"]
    phases = [spans[f"train.{name}"] for name in ("forward", "backward", "optimizer")]
    for phase in phases:
        assert phase["references"][0]["spanID"] == step["spanID"]
        assert phase["startTime"] >= step["startTime"]
    # Jaeger keeps microseconds: each of the times may be one short.
    within = sum(phase["duration"] for phase in phases)
    assert within <= step["duration"] + len(phases)
    assert spans["tamiyo.decide"]["references"][0]["spanID"] == step["spanID"]


def test_the_same_trace_holds_what_tamiyo_decided(stack, wait_until, tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": stack.url,
        "OTEL_SERVICE_NAME": "decided",
        "ESPER_TAMIYO_SOCKET": str(stack.socket),
        "ESPER_TAMIYO_DEADLINE_MS": "1000",
        "ESPER_RUN_ID": "decided",
    }
    subprocess.run(
        [sys.executable, str(script)],
        env=clean_environment(environment),
        check=True,
        timeout=60,
    )

    def decided():
        """The trace of the step with the NaN, when both processes have told of it."""
        for trace in stack.jaeger.traces("decided"):
            services = {p["serviceName"] for p in trace["processes"].values()}
            if step_of(trace) == 15 and services == {"decided", "tamiyo"}:
                return trace
        return None

    trace = wait_until(decided, patience_s=30)
    mine = [s for s in trace["spans"] if s["operationName"] == "tamiyo.decide"]
    theirs = {trace["processes"][span["processID"]]["serviceName"]: span for span in mine}
    tags = {tag["key"]: tag["value"] for tag in theirs["tamiyo"]["tags"]}
    assert tags["esper.decision.reason"] == "nonfinite_loss"
    assert theirs["tamiyo"]["references"][0]["spanID"] == theirs["decided"]["spanID"]


def step_of(trace):
    for span in trace["spans"]:
        for tag in span["tags"]:
            if tag["key"] == "esper.step":
                return tag["value"]
    return None


def test_what_happened_to_a_seed_is_a_line_in_the_file_of_events(stack, wait_until, rank):
    one = rank()
    one.stream.event(
        Event(STAGE_CHANGED, time.time_ns(), Severity.NORMAL, "it grew", {"esper.slot": "a"})
    )
    assert one.close(20.0).logs.delivered == 1
    events = stack.state / "collector" / "events.jsonl"

    def records():
        if not events.exists():
            return []
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        return [
            record["body"]["stringValue"]
            for line in lines
            for resource in line["resourceLogs"]
            for scope in resource["scopeLogs"]
            for record in scope["logRecords"]
        ]

    assert wait_until(records) == ["it grew"]
