"""Spans: one trace per step with its own times, through whichever provider there is."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from math import nan

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.resources import Resource

from esper_otel.leyline.decisions import Action, Decision, Finding, Severity, unanswered
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.leyline.trace_ids import span_id, trace_id
from esper_otel.stream.providers import Tracers, trainer_resource
from esper_otel.stream.spans import emit_spans
from testkit.patience import PATIENCE_S
from testkit.receiver import HttpReceiver

PHASES = [
    ("train.input_wait", 1_000, 2_000),
    ("train.forward", 2_000, 4_000),
    ("train.backward", 4_000, 7_000),
    ("train.optimizer", 7_000, 8_000),
    ("tamiyo.decide", 8_000, 8_500),
]

FINDING = Finding(
    "loss_spike", Action.PAUSE, Severity.HIGH, "loss jumped", {"loss_delta": 0.4}, "s1"
)
DECISION = Decision(
    id="d1",
    run="run",
    step=7,
    observed_step=7,
    action=Action.OPTIMIZER,
    severity=Severity.HIGH,
    reason="loss_spike",
    findings=[FINDING],
    target_seed="s1",
    parameters={"lr_scale": 0.5},
    table_version="default-1",
)


@pytest.fixture
def http():
    with HttpReceiver() as receiver:
        yield receiver


@pytest.fixture
def spans_of(http, open_stream):
    """The spans that reach a receiver, by name."""

    def send(timeline: StepTimeline) -> dict[str, Span]:
        stream = open_stream(http.url)
        stream.timeline(timeline)
        stream.close()
        return {span.name: span for span in http.inbox.spans()}

    return send


def attributes(carrier) -> dict[str, object]:
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value"))
        for attribute in carrier.attributes
    }


def test_a_step_is_one_trace_with_its_own_times(spans_of):
    spans = spans_of(StepTimeline(7, 500, 9_000, PHASES))
    root = spans.pop("train.step")
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (500, 9_000)
    assert root.parent_span_id == b""
    assert [(s.name, s.start_time_unix_nano, s.end_time_unix_nano) for s in spans.values()] == (
        PHASES
    )
    for span in spans.values():
        assert span.parent_span_id == root.span_id
        assert span.trace_id == root.trace_id
    assert len({span.span_id for span in spans.values()}) == len(PHASES)


def test_the_step_span_carries_what_people_look_for(spans_of):
    given = {"loss": 0.25, "gradient_norm": 2.0, "optimizer_lr": 0.1, "lr_scale": 0.5}
    row = [given.get(key, nan) for key in STEP_KEYS]
    root = spans_of(StepTimeline(7, 500, 9_000, PHASES, row, DECISION))["train.step"]
    assert attributes(root) == {
        "esper.step": 7,
        "esper.loss": 0.25,
        "esper.gradient_norm": 2.0,
        "esper.optimizer_lr": 0.1,
        "esper.lr_scale": 0.5,
        "esper.decision.action": "OPTIMIZER",
        "esper.decision.severity": "HIGH",
        "esper.decision.reason": "loss_spike",
    }


def test_the_decision_is_told_with_every_finding(spans_of):
    timeline = StepTimeline(7, 500, 9_000, PHASES, (), DECISION, applied=True)
    decide = spans_of(timeline)["tamiyo.decide"]
    assert decide.kind == Span.SPAN_KIND_CLIENT
    assert decide.status.code == Status.STATUS_CODE_UNSET
    told = attributes(decide)
    assert told["esper.decision.id"] == "d1"
    assert told["esper.decision.observed_step"] == 7
    assert told["esper.decision.target_seed"] == "s1"
    assert told["esper.decision.parameter.lr_scale"] == 0.5
    assert told["esper.decision.applied"] is True
    (event,) = decide.events
    assert (event.name, event.time_unix_nano) == ("esper.finding", 8_500)
    assert attributes(event) == {
        "esper.finding.rule": "loss_spike",
        "esper.finding.action": "PAUSE",
        "esper.finding.severity": "HIGH",
        "esper.finding.text": "loss jumped",
        "esper.finding.seed_id": "s1",
        "esper.finding.value.loss_delta": 0.4,
    }


UPDATE = Decision(
    id="r/0/7/update",
    run="run",
    step=7,
    observed_step=6,
    action=Action.OPTIMIZER,
    severity=Severity.CRITICAL,
    reason="gradient_exploding",
    findings=[FINDING],
    parameters={"max_norm": 1.0, "skip_step": 1.0},
)


@pytest.mark.parametrize("skipped", [True, False])
def test_what_was_done_to_the_step_s_own_update_is_told_on_its_span(spans_of, skipped):
    row = [float(skipped) if key == "update_skipped" else nan for key in STEP_KEYS]
    timeline = StepTimeline(7, 500, 9_000, PHASES, row, DECISION, update=UPDATE)
    spans = spans_of(timeline)
    told = attributes(spans["train.step"])
    assert told["esper.update.reason"] == "gradient_exploding"
    assert told["esper.update.skipped"] is skipped
    assert told["esper.update.parameter.max_norm"] == 1.0
    assert told["esper.update.parameter.skip_step"] == 1.0
    # Beside the decision about the step, which came after its update.
    assert told["esper.decision.reason"] == "loss_spike"
    (event,) = spans["train.step"].events
    assert (event.name, event.time_unix_nano) == ("esper.finding", 9_000)
    assert attributes(event)["esper.finding.rule"] == "loss_spike"


def test_a_step_whose_update_was_not_checked_says_nothing_of_it(spans_of):
    told = attributes(spans_of(StepTimeline(7, 500, 9_000, PHASES, (), DECISION))["train.step"])
    assert not [key for key in told if key.startswith("esper.update.")]


def test_a_decision_is_taken_within_the_next_step_and_is_told_so(spans_of):
    """Sent when its step had ended: its span, and that of what it did, end later."""
    phases = [*PHASES[:-1], ("tamiyo.decide", 9_000, 12_500), ("kasmina.apply", 14_000, 15_000)]
    spans = spans_of(StepTimeline(7, 500, 9_000, phases, (), DECISION, applied=True))
    root, decide, apply = (
        spans[name] for name in ("train.step", "tamiyo.decide", "kasmina.apply")
    )
    assert root.end_time_unix_nano == decide.start_time_unix_nano == 9_000
    assert (decide.end_time_unix_nano, apply.start_time_unix_nano) == (12_500, 14_000)
    assert decide.parent_span_id == apply.parent_span_id == root.span_id


def test_only_a_step_that_nobody_judged_is_an_error(spans_of):
    timeline = StepTimeline(7, 500, 9_000, PHASES, (), unanswered("run", 7, "timeout"))
    spans = spans_of(timeline)
    assert spans["tamiyo.decide"].status.code == Status.STATUS_CODE_ERROR
    assert attributes(spans["tamiyo.decide"])["error.type"] == "timeout"
    others = [span for name, span in spans.items() if name != "tamiyo.decide"]
    assert {span.status.code for span in others} == {Status.STATUS_CODE_UNSET}


def told_by(rank: int, instance: str, timeline: StepTimeline) -> list[Span]:
    """The spans of one step as one process of the run "shared" tells them."""
    tracers = Tracers(trainer_resource("shared", instance, rank, 2))
    emit_spans(timeline, tracers)
    requests: list[bytes] = []
    tracers.encode_finished(lambda body, spans: requests.append(body))
    (request,) = map(ExportTraceServiceRequest.FromString, requests)
    return list(request.resource_spans[0].scope_spans[0].spans)


def test_ids_are_those_that_others_work_out_and_random_numbers_are_not_used():
    random.seed(1)
    before = random.getstate()
    spans = {span.name: span for span in told_by(1, "i", StepTimeline(7, 500, 9_000, PHASES))}
    assert random.getstate() == before
    for name, span in spans.items():
        assert span.trace_id == trace_id("shared", 7).to_bytes(16, "big")
        assert span.span_id == span_id("shared", 1, "i", 7, name).to_bytes(8, "big")


def test_no_two_spans_of_a_step_have_one_id():
    """Two micro-batches, so phases of one name come twice; three processes, two ranks."""
    phases = [("train.forward", 1, 2), ("train.backward", 2, 3)] * 2
    timeline = StepTimeline(7, 1, 9, [*phases, ("tamiyo.decide", 8, 9)])
    spans = [
        span
        for rank, instance in ((0, "a"), (0, "b"), (1, "c"))
        for span in told_by(rank, instance, timeline)
    ]
    assert len({span.span_id for span in spans}) == len(spans) == 3 * 6
    assert len({span.trace_id for span in spans}) == 1


def test_many_spans_are_divided_into_requests():
    tracers = Tracers(Resource({}))
    for step in range(400):
        emit_spans(StepTimeline(step, 1, 9, [("train.forward", 2, 3)]), tracers)
    counts = []
    tracers.encode_finished(lambda body, spans: counts.append(spans))
    tracers.encode_finished(lambda body, spans: counts.append(spans))
    assert counts == [512, 288]


def test_the_users_provider_is_used_and_its_random_numbers_are_left_alone():
    """In a process of its own: a global provider can be set only once."""
    script = """
import json, random
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.trace_ids import span_id, trace_id
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream

stream = Stream(EsperSettings(stream_interval_ms=10.0), run_id="run", instance_id="i")
stream.start()
exporter = InMemorySpanExporter()
provider = TracerProvider(resource=Resource({"mine": True}))
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
random.seed(7)
before = random.getstate()
stream.timeline(StepTimeline(3, 1, 9, [("train.forward", 2, 3)]))
report = stream.close()
untouched = random.getstate() == before
with trace.get_tracer("mine").start_as_current_span("mine"):
    pass
spans = exporter.get_finished_spans()
print(json.dumps({
    "names": [span.name for span in spans],
    "known_ids": spans[1].context.span_id == span_id("run", 0, "i", 3, "train.step")
    and spans[0].context.trace_id == spans[1].context.trace_id == trace_id("run", 3)
    and spans[2].context.trace_id != trace_id("run", 3),
    "mine": all(span.resource.attributes["mine"] for span in spans),
    "untouched": untouched,
    "accounted": report.traces.produced,
    "users_ids_still_random": random.getstate() != before,
}))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OTEL_METRICS_EXPORTER": "none"},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert json.loads(finished.stdout) == {
        "names": ["train.forward", "train.step", "mine"],
        "known_ids": True,
        "mine": True,
        "untouched": True,
        "accounted": 0,
        "users_ids_still_random": True,
    }
