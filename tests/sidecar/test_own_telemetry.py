"""Tamiyo's own OpenTelemetry: one trace across two processes, and its metrics."""

import os
import socket
import subprocess
import sys

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from esper_otel.leyline.trace_ids import DECIDE_SPAN, STEP_SPAN, span_id, trace_id
from esper_tamiyo.journaling.entries import Silenced
from esper_tamiyo.journaling.own_metrics import OWN_METRICS, InstrumentKind
from esper_tamiyo.journaling.own_telemetry import endpoint_of, make_span
from esper_tamiyo.receiving.pipe import IngestCounts
from sidecar.entries_made import decided
from sidecar.running import sidecar, until
from testkit.patience import PATIENCE_S
from testkit.receiver import METRICS, TRACES, HttpReceiver

TRAINER = """
import esper_otel
run = esper_otel.start(run_id="shared", tamiyo_socket={socket!r}, span_every=0,
                       tamiyo_deadline_ms=5000.0, stream_interval_ms=10.0)
for step in range(40):
    run.report(loss=1.0 if step < 30 else 50.0)
    run.step()
run.close()
"""


@pytest.fixture
def receiver():
    with HttpReceiver() as receiver:
        yield receiver


@pytest.fixture
def environment(monkeypatch):
    """Nothing of OTel or ours but what a test sets."""
    for name in list(os.environ):
        if name.startswith(("OTEL_", "ESPER_", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    return monkeypatch


def attributes(carrier):
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value")) for one in carrier.attributes
    }


def spans_by_service(receiver):
    """(service.name, rank, span) of all that came."""
    return [
        (told.get("service.name"), told.get("esper.rank"), span)
        for request in receiver.inbox.requests
        if request.path == TRACES
        for group in ExportTraceServiceRequest.FromString(request.body).resource_spans
        for told in (attributes(group.resource),)
        for scope in group.scope_spans
        for span in scope.spans
    ]


def exports(receiver):
    """{metric: [(attributes, point)]} of each export of the sidecar's own metrics."""
    for request in receiver.inbox.requests:
        if request.path != METRICS:
            continue
        for group in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
            if attributes(group.resource).get("service.name") != "tamiyo":
                continue
            found = {}
            for metric in group.scope_metrics[0].metrics:
                data = getattr(metric, metric.WhichOneof("data"))
                found[metric.name] = [(attributes(point), point) for point in data.data_points]
            yield found


def points(receiver):
    """{metric: [(attributes, point)]}, of each metric the newest."""
    return {name: told for export in exports(receiver) for name, told in export.items()}


def total(receiver, metric, **attributes):
    """The sum of a counter over the points with these attributes."""
    told = points(receiver)[metric]
    return sum(point.as_int for at, point in told if attributes.items() <= at.items())


def has_been_healthy(receiver):
    """Whether some export said so of one run, which the newest may call stale by now."""
    told = [export.get("tamiyo.runs", []) for export in exports(receiver)]
    return any(
        at["state"] == "healthy" and one.as_int == 1 for runs in told for at, one in runs
    )


def test_one_trace_holds_the_step_of_both_ranks_and_the_decisions_about_it(
    tmp_path, receiver, environment
):
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    script = TRAINER.format(socket=str(tmp_path / "t.sock"))
    with sidecar(tmp_path / "t.sock", "--table", "prototype"):
        trainers = [
            subprocess.Popen(
                [sys.executable, "-c", script],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            )
            for rank in (0, 1)
        ]
        assert [trainer.wait(PATIENCE_S) for trainer in trainers] == [0, 0]
    spans = [
        (service, rank, span)
        for service, rank, span in spans_by_service(receiver)
        if span.trace_id == trace_id("shared", 31).to_bytes(16, "big")
    ]
    own = [span for service, _, span in spans if service == "tamiyo"]
    asks = {
        rank: span
        for service, rank, span in spans
        if service == "esper-trainer" and span.name == "tamiyo.decide"
    }
    steps = {
        rank: span
        for service, rank, span in spans
        if service == "esper-trainer" and span.name == "train.step"
    }
    assert len(own) == 2
    assert asks.keys() == steps.keys() == {0, 1}
    assert len({span.span_id for *_, span in spans}) == len(spans), "no two spans collide"
    for span in own:
        told = attributes(span)
        ask = asks[told["esper.rank"]]
        assert span.name == "tamiyo.decide"
        assert span.kind == span.SPAN_KIND_SERVER
        assert span.parent_span_id == ask.span_id
        assert ask.parent_span_id == steps[told["esper.rank"]].span_id
        theirs = attributes(ask)
        del theirs["esper.decision.applied"]
        assert theirs.items() <= told.items(), "both sides tell a decision in the same words"
        for here, there in zip(span.events, ask.events, strict=True):
            assert attributes(there).items() <= attributes(here).items()
        assert told["esper.decision.action"] == "PAUSE"
        assert told["esper.decision.reason"] == "loss_spike"
        assert told["esper.decision.mode"] == "advise"
        assert told["esper.step"] == told["esper.decision.observed_step"] == 31
        (spike,) = [
            event
            for event in span.events
            if attributes(event)["esper.finding.rule"] == "loss_spike"
        ]
        assert spike.name == "esper.finding"
        assert attributes(spike)["esper.finding.value.loss_delta"] == 49.0
        assert attributes(spike)["esper.finding.firing_since_step"] == 31


@pytest.mark.parametrize(("asked", "above"), [(True, DECIDE_SPAN), (False, STEP_SPAN)])
def test_a_step_that_nobody_asked_about_has_its_decision_below_the_step(asked, above):
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    quiet = Silenced("loss_warning", "loss_spike")
    make_span(provider, decided(3, run="r", rank=1, asked=asked, silenced=[quiet]))
    (span,) = exporter.get_finished_spans()
    assert span.context.trace_id == trace_id("r", 3)
    assert span.parent.span_id == span_id("r", 1, "one", 3, above)
    finding, silenced = span.events
    assert finding.attributes["esper.finding.rule"] == "loss_spike"
    assert (silenced.name, dict(silenced.attributes)) == (
        "esper.silenced",
        {"esper.finding.rule": "loss_warning", "esper.finding.silenced_by": "loss_spike"},
    )


def test_a_check_has_a_span_of_its_own_below_the_step():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    asked = {"skip_step": 1.0}
    make_span(provider, decided(3, id="r/1/3/update", run="r", rank=1, update=True))
    make_span(provider, decided(3, run="r", rank=1, parameters=asked))
    check, decision = exporter.get_finished_spans()
    assert (check.name, decision.name) == ("tamiyo.check", DECIDE_SPAN)
    assert check.context.trace_id == decision.context.trace_id
    assert check.parent.span_id == span_id("r", 1, "one", 3, STEP_SPAN)
    assert check.attributes["esper.decision.update"] is True
    assert "esper.decision.update" not in decision.attributes
    assert decision.attributes["esper.decision.parameter.skip_step"] == 1.0


def test_status_and_log_show_no_secret(tmp_path, receiver, environment, capfd):
    said = []

    def log():
        said.append(capfd.readouterr().err)
        return "".join(said)

    url = receiver.url.replace("//", "//user:hunter2@")
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{url}?key=hunter2")
    environment.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization: Bearer hunter2")
    environment.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
    with sidecar(tmp_path / "t.sock", ingest=True) as running:
        exports = until(lambda: running.status()["scribe"]["exports"])
        assert exports == [receiver.url] * 2
        assert "Header format invalid" in until(lambda: "***" in log() and log())
        assert "hunter2" not in str(running.status())
    assert "hunter2" not in log()


def test_its_metrics_tell_what_it_did(tmp_path, receiver, environment):
    environment.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{receiver.url}/v1/metrics")
    environment.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
    with (
        sidecar(tmp_path / "t.sock", "--table", "prototype", ingest=True) as running,
        running.client() as client,
    ):
        client.hello(run="r")
        for step in (0, 1, 2, 7):
            client.ask(step, loss_delta=0.5 if step == 2 else 0.0)
        client.ask(7)
        client.ask(8, loss_delta=0.5)
        client.check(9, loss=1.0)
        names = {metric.name for metric in OWN_METRICS}
        # One metric comes from what is answered, others from entries and a report a second.
        until(lambda: points(receiver).keys() == names)
        until(lambda: points(receiver)["tamiyo.answer.duration"][0][1].count == 7)
        until(lambda: total(receiver, "tamiyo.decisions", action="PAUSE") == 2)
        until(lambda: total(receiver, "tamiyo.frames", state="judged") == 5)
        until(lambda: has_been_healthy(receiver))
        told = points(receiver)
        endpoints = until(lambda: running.status()["scribe"]["exports"])
    assert endpoints == [f"{receiver.url}/v1/metrics"]
    for metric in OWN_METRICS:
        assert {name for at, _ in told[metric.name] for name in at} == set(metric.attributes)
    decisions = {
        (at["action"], at["severity"], at["rule"]): point.as_int
        for at, point in told["tamiyo.decisions"]
    }
    assert decisions[("PAUSE", "HIGH", "loss_spike")] == 2
    assert decisions[("CONTINUE", "NORMAL", "nominal")] == 3
    frames = {at["state"]: point.as_int for at, point in told["tamiyo.frames"]}
    assert (frames["judged"], frames["duplicate"]) == (5, 1)
    assert told["tamiyo.frames.missed"][0][1].as_int == 4
    ((_, answers),) = told["tamiyo.answer.duration"]
    assert sum(answers.bucket_counts) == answers.count == 7
    assert 0 < answers.min <= answers.max <= answers.sum
    checks = {at["decided"]: point.as_int for at, point in told["tamiyo.checks"]}
    assert checks == {"unchanged": 1, "smaller": 0, "skipped": 0, "unjudged": 0}
    assert told["tamiyo.table.info"][0][0]["version"].startswith("prototype-1+")
    assert told["tamiyo.heartbeat"][0][1].as_int >= 1
    assert {at["queue"] for at, _ in told["tamiyo.queue.depth"]} == {
        "frames",
        "notes",
        "field_reports",
    }
    rules = {(at["rule"], at["state"]): point.as_int for at, point in told["tamiyo.rules"]}
    assert rules[("loss_spike", "firing")] == 1
    ways = ("requests", "points", "unusable", "connections.closed")
    shown = sum(len(told[f"tamiyo.ingest.{what}"]) for what in ways)
    assert shown == len(IngestCounts.__struct_fields__), "whatever became of a request is told"
    hung = {at["process"] for at, _ in told["tamiyo.hung"]}
    assert hung == {"ingest", "scribe", "state_writer", "table_watch"}
    restarted = {at["process"] for at, _ in told["tamiyo.restarts"]}
    assert restarted == {"ingest", "scribe", "state_writer", "table_watch"}


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318"),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t:1/v1/traces",
            },
            "http://t:1/v1/traces",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "TRUE"}, ""),
    ],
)
def test_nothing_is_sent_to_an_address_that_nobody_named(environment, variables, endpoint):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert endpoint_of("TRACES") == endpoint


def test_without_a_journal_and_an_endpoint_no_process_writes_or_sends(tmp_path, environment):
    with sidecar(tmp_path / "t.sock", "--no-journal") as running:
        assert running.status()["scribe"] is None


def test_nothing_is_sent_to_itself(tmp_path, environment):
    with socket.socket() as held:  # so that nobody else is given the port meanwhile
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*held.getsockname())
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{address}")
        with sidecar(tmp_path / "t.sock", "--otlp-http", address, ingest=True) as running:
            assert running.words["otlp_http"] == address
            until(lambda: running.status()["scribe"]["written"] >= 1)
            assert running.status()["scribe"]["exports"] == []


def test_a_collector_that_is_not_there_holds_up_nothing(tmp_path, environment):
    with HttpReceiver() as receiver:
        url = receiver.url
    environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    with sidecar(tmp_path / "t.sock", "--table", "prototype") as running:
        with running.client() as client:
            client.hello(run="r")
            for step in range(50):
                client.ask(step, loss_delta=0.5)
        process = running.process
        process.terminate()
        assert process.wait(60) == 0, "and its end is not held up either"


def test_every_metric_is_named_alike():
    names = [metric.name for metric in OWN_METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("tamiyo.") for name in names)
    for metric in OWN_METRICS:
        assert (metric.kind is InstrumentKind.HISTOGRAM) == bool(metric.distribution)


def test_the_decide_process_never_loads_the_sdk():
    code = (
        "import sys, esper_tamiyo.serving.server, esper_tamiyo.commands.serve\n"
        "import esper_tamiyo.journaling.reporter\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
