"""Spans as bytes: what the official classes read is what the SDK's own encoder makes."""

from __future__ import annotations

import gc
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from esper_otel.leyline.decisions import Action, Decision, Finding, Severity, unanswered
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.stream.providers import Tracers, trainer_resource
from esper_otel.stream.spans import emit_spans

TIMES = st.integers(0, 2**64 - 1)
TEXTS = st.text(max_size=200)
NUMBERS = st.floats(allow_nan=False) | st.just(inf)
VALUES = TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | NUMBERS
KEYS = st.text(min_size=1, max_size=20)
SEVERITIES = st.sampled_from(Severity)
ACTIONS = st.sampled_from(Action)
FINDINGS = st.builds(
    Finding,
    TEXTS,
    ACTIONS,
    SEVERITIES,
    TEXTS,
    st.dictionaries(KEYS, NUMBERS, max_size=3),
    st.none() | TEXTS,
)
DECISIONS = st.builds(
    Decision,
    id=TEXTS,
    run=TEXTS,
    step=st.integers(0, 2**60),
    observed_step=st.integers(-1, 2**60),
    action=ACTIONS,
    severity=SEVERITIES,
    reason=TEXTS,
    findings=st.lists(FINDINGS, max_size=3),
    target_seed=st.none() | TEXTS,
    parameters=st.dictionaries(KEYS, NUMBERS, max_size=2),
    conservative=st.booleans(),
    table_version=TEXTS,
)
NOT_DECIDED = st.builds(
    unanswered, TEXTS, st.just(1), st.sampled_from(["timeout", "unreachable"])
)
EVENTS = st.builds(
    Event, TEXTS, TIMES, SEVERITIES, TEXTS, st.dictionaries(KEYS, VALUES, max_size=3)
)
NAMES = st.sampled_from(["train.forward", "train.backward", "tamiyo.decide"]) | TEXTS
TIMELINES = st.builds(
    StepTimeline,
    st.integers(0, 2**60),
    TIMES,
    TIMES,
    st.lists(st.tuples(NAMES, TIMES, TIMES), max_size=6),
    st.just(())
    | st.lists(NUMBERS | st.just(nan), min_size=len(STEP_KEYS), max_size=len(STEP_KEYS)),
    st.none() | DECISIONS | NOT_DECIDED,
    st.booleans(),
    st.lists(EVENTS, max_size=2),
    st.none() | DECISIONS,
    TEXTS,
)


def tracers(run="run"):
    return Tracers(trainer_resource(run, "i", 1, 2, 0))


def requests_of(of_us, timelines):
    for timeline in timelines:
        emit_spans(timeline, of_us)
    found = []
    of_us.encode_finished(lambda body, count: found.append((body, count)))
    return [(ExportTraceServiceRequest.FromString(body), count) for body, count in found]


def by_sdk(timelines, run="run"):
    """As the SDK's objects and its encoder make it."""
    sdk = tracers(run)
    sdk._encodes = False
    return requests_of(sdk, timelines)


@settings(deadline=None)
@given(st.lists(TIMELINES, min_size=1, max_size=3), TEXTS)
def test_bytes_are_those_of_the_sdk(timelines, run):
    assert requests_of(tracers(run), timelines) == by_sdk(timelines, run)


def test_ordinary_steps_make_no_object_of_the_sdk(monkeypatch):
    monkeypatch.setattr("opentelemetry.sdk.trace.Tracer.start_span", None)
    ((request, count),) = requests_of(tracers(), [ORDINARY])
    assert count == len(request.resource_spans[0].scope_spans[0].spans) == 3


ORDINARY = StepTimeline(
    7,
    500,
    9_000,
    [("train.forward", 1_000, 2_000), ("tamiyo.decide", 2_000, 3_000)],
    [0.5] * len(STEP_KEYS),
    Decision(
        id="d",
        run="run",
        step=7,
        observed_step=7,
        action=Action.PAUSE,
        severity=Severity.HIGH,
        reason="loss_spike",
        findings=[
            Finding("loss_spike", Action.PAUSE, Severity.HIGH, "ü" * 40, {"loss": 3.0}),
            Finding("other", Action.PAUSE, Severity.HIGH, "text", {"loss": 3.0}),
        ],
    ),
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "3"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "1"),
        ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "2"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "2"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "5"),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "5"),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=ü,k=v"),
        ("OTEL_TRACES_SAMPLER", "always_off"),
        ("OTEL_TRACES_SAMPLER", "always_on"),
        ("OTEL_TRACES_SAMPLER", "parentbased_always_off"),
        ("OTEL_SDK_DISABLED", "true"),
    ],
)
def test_settings_of_opentelemetry_mean_what_they_did(monkeypatch, name, value):
    plain = requests_of(tracers(), [ORDINARY])
    monkeypatch.setenv(name, value)
    with_it = requests_of(tracers(), [ORDINARY])
    assert with_it == by_sdk([ORDINARY])
    assert (with_it == plain) is (value == "always_on")


@pytest.mark.parametrize("sampler", ["traceidratio", "parentbased_traceidratio"])
def test_steps_are_sampled_by_their_trace(monkeypatch, sampler):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.4")
    steps = [ORDINARY._replace(step=step) for step in range(60)]
    found = requests_of(tracers(), steps)
    assert found == by_sdk(steps)
    assert 0 < found[0][1] < 3 * len(steps)


def test_nothing_that_waits_is_followed_by_the_garbage_collector():
    of_us = tracers()
    emit_spans(ORDINARY, of_us)
    gc.collect()
    before = len(gc.get_objects())
    for step in range(200):
        emit_spans(ORDINARY._replace(step=step), of_us)
    after = len(gc.get_objects())
    assert of_us.waiting == 603
    assert after - before < 20
