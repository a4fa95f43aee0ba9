"""From a trainer's stream through the Collector into Prometheus, Jaeger and Tamiyo."""

import json
import subprocess
import sys
import time
import urllib.request
from statistics import median

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.custom import custom_key
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import STAGE_CHANGED, Event
from esper_otel.leyline.metrics import CUSTOM, RUN_ENDED, SEED_METRICS, STEP_METRICS
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import StatusRequest
from esper_otel.stream import read_frames
from ops.generate.prometheus_names import prometheus_name
from ops.stack.services import clean_environment
from testkit.patience import PATIENCE_S
from testkit.simulated_ranks import Rank

STEPS = 120
STEP_NS = 2_000_000

PHASES_US = {"forward": 2000, "backward": 2000, "optimizer": 1000}
WITHIN_PHASES = 0.9
"""Of a step that does nothing but sleep in its phases."""

LOOP = f"""
import time
import esper_otel
run = esper_otel.start(span_every=1, mode="enforce")
for step in range(20):
    for name, us in {PHASES_US}.items():
        with run.phase(name):
            time.sleep(us / 1e6)
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
        custom = {"val loss/é": step / 7, **({"kl": 0.5} if step % 2 else {})}
        rank.step(step, began + step * STEP_NS + 123_456, custom)
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


def test_values_of_the_scripts_own_are_one_metric_by_name(stack, wait_until, sent):
    for name, marked, steps in (
        ("val loss/é", {"esper_evaluation": "true"}, STEPS),
        ("kl", {}, STEPS // 2),
    ):
        (one,) = series(stack, wait_until, CUSTOM, steps=steps, name=name)
        assert one.samples == [
            (milliseconds(frame), value)
            for frame in sent
            if (value := frame.values.get(custom_key(name))) is not None
        ]
        assert one.labels.items() >= {"name": name, "esper_rank": "1", **marked}.items()
        assert ("esper_evaluation" in one.labels) == bool(marked)


def status(stack):
    return reply_to(StatusRequest(), stack.socket).report


def test_tamiyo_has_judged_every_step_that_went_through_the_collector(stack, wait_until, sent):
    def judged():
        runs = status(stack)["engine"]["runs"]
        return [one for one in runs if one["run"] == "whole"]

    (run,) = wait_until(lambda: [o for o in judged() if o["newest_step"] == STEPS - 1])
    assert run["rank"] == 1


@pytest.fixture(scope="session")
def traces(stack, tmp_path_factory):
    """Gives the traces that there are by now of a loop that has asked Tamiyo at every step."""
    script = tmp_path_factory.mktemp("loop") / "loop.py"
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
        timeout=PATIENCE_S,
    )
    return lambda: stack.jaeger.traces("loop")


def spans_of(trace, service):
    """Its spans that this service has told of, by their names."""
    return {
        span["operationName"]: span
        for span in trace["spans"]
        if trace["processes"][span["processID"]]["serviceName"] == service
    }


def test_a_trace_in_jaeger_holds_a_step_whose_phases_lie_inside_it(traces, wait_until):
    found = wait_until(lambda: len(found := traces()) >= 20 and found)
    trace = next(trace for trace in found if step_of(trace) == 10)
    spans = spans_of(trace, "loop")
    step = spans["train.step"]
    phases = {name: spans[f"train.{name}"] for name in PHASES_US}
    # Jaeger keeps microseconds: each of the times may be one short.
    for name, phase in phases.items():
        assert phase["references"][0]["spanID"] == step["spanID"]
        assert phase["startTime"] >= step["startTime"]
        assert phase["duration"] + 2 >= PHASES_US[name]
    assert spans["tamiyo.decide"]["references"][0]["spanID"] == step["spanID"]


def test_what_the_spans_within_a_step_take_adds_up_to_the_step(traces, wait_until):
    found = wait_until(lambda: len(found := traces()) >= 20 and found)
    shares = []
    for trace in found:
        step = spans_of(trace, "loop")["train.step"]
        # The decision is collected within the next step, and what it says applied there.
        within = [
            span["duration"]
            for name, span in spans_of(trace, "loop").items()
            if name not in ("train.step", "tamiyo.decide", "kasmina.apply")
            and span["references"][0]["spanID"] == step["spanID"]
        ]
        # Jaeger keeps microseconds: each of the times may be one short.
        assert sum(within) <= step["duration"] + len(within)
        shares.append(sum(within) / step["duration"])
    # The rest is the loop's own, between its phases; a busy machine may let one step wait.
    assert median(shares) >= WITHIN_PHASES


def test_the_same_trace_holds_what_tamiyo_decided(traces, wait_until):
    def decided():
        """The trace of the step with the NaN, when both processes have told of it."""
        for trace in traces():
            services = {p["serviceName"] for p in trace["processes"].values()}
            if step_of(trace) == 15 and services == {"loop", "tamiyo"}:
                return trace
        return None

    trace = wait_until(decided)
    asked = spans_of(trace, "loop")["tamiyo.decide"]
    answered = spans_of(trace, "tamiyo")["tamiyo.decide"]
    tags = {tag["key"]: tag["value"] for tag in answered["tags"]}
    assert tags["esper.decision.reason"] == "nonfinite_loss"
    assert answered["references"][0]["spanID"] == asked["spanID"]


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


def test_tamiyo_is_sent_only_what_it_judges_by(stack, wait_until, rank):
    one = rank()
    one.step(0)
    foreign = ExportMetricsServiceRequest()
    scope = foreign.resource_metrics.add().scope_metrics.add()
    scope.metrics.add(name="other").gauge.data_points.add(time_unix_nano=time.time_ns())
    sent = urllib.request.Request(
        f"{stack.url}/v1/metrics",
        foreign.SerializeToString(),
        {"Content-Type": "application/x-protobuf"},
    )
    with urllib.request.urlopen(sent) as answer:
        assert answer.status == 200
    wait_until(lambda: stack.prometheus.value("other") is not None)
    one.step(1)
    one.close(20.0)

    def judged():
        runs = status(stack)["engine"]["runs"]
        return [run for run in runs if run["run"] == one.run and run["newest_step"] == 1]

    wait_until(judged)
    assert status(stack)["ingest"]["points_foreign"] == 0


def test_sampled_spans_are_counted_by_name_in_prometheus(stack, wait_until, traces):
    count = "traces_span_metrics_duration_milliseconds_count"
    wait_until(
        lambda: stack.prometheus.value(f'{count}{{job="loop", span_name="train.step"}}') == 20
    )


FAILING = """
import esper_otel
run = esper_otel.start(mode="off")
for step in range(5):
    run.report(loss=1.0)
    run.step()
raise ValueError
"""


def test_how_a_run_ended_comes_to_prometheus_and_tamiyo_by_the_stream_alone(
    stack, wait_until, tmp_path
):
    before = status(stack)["engine"]["states"].get("failed", 0)
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": stack.url, "ESPER_RUN_ID": "failing"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=clean_environment(environment),
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    selector = f'{prometheus_name(RUN_ENDED)}{{esper_run_id="failing"}}'
    (series,) = wait_until(lambda: stack.prometheus.series(selector))
    assert series.labels.items() >= {
        ("esper_run_ended", "exception"),
        ("exception_type", "ValueError"),
    }
    assert [value for _, value in series.samples] == [5.0]

    def failed():
        return status(stack)["engine"]["states"].get("failed", 0)

    # Of more than 16 ranks a status tells some in detail, stale ones of other tests first.
    wait_until(lambda: failed() > before)
    for run in status(stack)["engine"]["runs"]:
        if run["run"] == "failing":
            assert (run["ended"], run["newest_step"]) == ("exception ValueError", 5)
