"""The encoder: what the official classes read is what went in."""

from __future__ import annotations

from math import inf, isfinite, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from esper_otel import __version__
from esper_otel.leyline.metrics import SEED_KEYS, SEED_METRICS, STEP_KEYS, STEP_METRICS
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.ring import FrameRing

RESOURCE = Resource(attributes=[KeyValue(key="service.name")])
RESOURCE.attributes[0].value.string_value = "trainer"

cells = st.one_of(st.just(nan), st.floats(width=64))
step_rows = st.lists(cells, min_size=len(STEP_KEYS), max_size=len(STEP_KEYS))
seed_rows = st.lists(cells, min_size=len(SEED_KEYS), max_size=len(SEED_KEYS))
seeds = st.lists(
    st.tuples(st.text(st.characters(codec="utf-8"), max_size=12), seed_rows), max_size=3
)
times = st.integers(0, 2**63 - 1)
frames = st.lists(st.tuples(times, step_rows, seeds), min_size=1, max_size=8)


def encoded(recorded, max_request=2 << 20):
    """The requests that ``recorded`` frames make, decoded, and what was said of them."""
    ring = FrameRing(4096)
    for time_unix_nano, row, seeds in recorded:
        assert ring.put(time_unix_nano, row, seeds)
    encoder = FrameEncoder(RESOURCE.SerializeToString(), max_request)
    requests = list(encoder.encode(ring.drain()))
    return [ExportMetricsServiceRequest.FromString(each.body) for each in requests], requests


def scopes_of(messages):
    return [
        scope
        for message in messages
        for resource in message.resource_metrics
        for scope in resource.scope_metrics
    ]


def told(scope):
    """(time, seed id, {(name, unit): value}) of one decoded ``ScopeMetrics``."""
    points = [
        (metric.name, metric.unit, point)
        for metric in scope.metrics
        for point in metric.gauge.data_points
    ]
    seed_ids = {
        attribute.value.string_value
        for _, _, point in points
        for attribute in point.attributes
        if attribute.key == "seed_id"
    }
    (time_unix_nano,) = {point.time_unix_nano for _, _, point in points}
    values = {(name, unit): point.as_double for name, unit, point in points}
    assert len(values) == len(points)
    return time_unix_nano, seed_ids.pop() if seed_ids else None, values


def expected(metrics, time_unix_nano, seed_id, row):
    values = {
        (metric.instrument, metric.unit): value
        for metric, value in zip(metrics, row, strict=True)
        if isfinite(value)
    }
    return [(time_unix_nano, seed_id, values)] if values else []


@settings(max_examples=60, deadline=None)
@given(frames, st.sampled_from([1, 5000, 2 << 20]))
def test_decoding_gives_back_every_frame(recorded, max_request):
    messages, requests = encoded(recorded, max_request)
    assert sum(request.frames for request in requests) == len(recorded)
    position = 0
    for message, request in zip(messages, requests, strict=True):
        inside = recorded[position : position + request.frames]
        position += request.frames
        wanted = []
        for time_unix_nano, row, _ in inside:
            wanted += expected(STEP_METRICS, time_unix_nano, None, row)
        for time_unix_nano, _, its_seeds in inside:
            for seed_id, row in its_seeds:
                wanted += expected(SEED_METRICS, time_unix_nano, seed_id, row)
        assert [told(scope) for scope in scopes_of([message])] == wanted
        assert request.points == sum(len(values) for _, _, values in wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(times, step_rows), min_size=1, max_size=8),
    st.sampled_from([1, 5000, 2 << 20]),
)
def test_a_few_steps_are_encoded_as_many_are(recorded, max_request):
    rings = FrameRing(8), FrameRing(8)
    for ring in rings:
        for time_unix_nano, row in recorded:
            ring.put(time_unix_nano, row, ())
    encoder = FrameEncoder(RESOURCE.SerializeToString(), max_request)
    few = encoder.encode_few(rings[0].drain_few())
    assert list(few) == list(encoder.encode(rings[1].drain()))


def test_the_message_is_canonical_and_says_who_sent_it():
    row = [float(slot) for slot in range(len(STEP_KEYS))]
    messages, requests = encoded([(1, row, [("s", [1.0] * len(SEED_KEYS))])])
    assert messages[0].SerializeToString() == requests[0].body
    (resource_metrics,) = messages[0].resource_metrics
    assert resource_metrics.resource == RESOURCE
    for scope in resource_metrics.scope_metrics:
        assert (scope.scope.name, scope.scope.version) == ("esper_otel", __version__)


@pytest.mark.parametrize("absent", [nan, inf, -inf])
def test_what_is_not_finite_is_absent(absent):
    row = [1.0, absent] + [nan] * (len(STEP_KEYS) - 2)
    messages, requests = encoded([(1, row, ())])
    assert requests[0].points == 1
    assert told(scopes_of(messages)[0])[2] == {("tolaria.step", "{step}"): 1.0}


@pytest.mark.parametrize("value", [-0.0, 5e-324, 1.7976931348623157e308, 1 / 3])
def test_values_keep_every_bit(value):
    messages, _ = encoded([(1, [value] + [nan] * (len(STEP_KEYS) - 1), ())])
    (read,) = told(scopes_of(messages)[0])[2].values()
    assert (read.hex(), str(read)) == (value.hex(), str(value))


def test_requests_stay_below_the_bound_and_hold_whole_frames():
    row = [1.0] * len(STEP_KEYS)
    its_seeds = [("a", [1.0] * len(SEED_KEYS)), ("b", [2.0] * len(SEED_KEYS))]
    messages, requests = encoded([(step, row, its_seeds) for step in range(1000)], 50_000)
    assert len(requests) > 20
    assert max(len(request.body) for request in requests) <= 50_000
    for message, request in zip(messages, requests, strict=True):
        told_times = [told(scope)[0] for scope in scopes_of([message])]
        steps = told_times[: request.frames]
        assert sorted(told_times) == sorted(steps * 3)


def test_a_frame_larger_than_the_bound_is_sent_by_itself():
    row = [1.0] * len(STEP_KEYS)
    _, requests = encoded([(step, row, ()) for step in range(3)], 500)
    assert [request.frames for request in requests] == [1, 1, 1]


def test_many_seeds_that_come_and_go_are_told_apart():
    row = [1.0] + [nan] * (len(STEP_KEYS) - 1)
    recorded = [
        (
            step,
            row,
            [(f"seed-{step + each}", [float(step)] * len(SEED_KEYS)) for each in (0, 1)],
        )
        for step in range(600)
    ]
    messages, _ = encoded(recorded)
    seen = [(time, seed_id) for time, seed_id, _ in map(told, scopes_of(messages)) if seed_id]
    assert sorted(seen) == sorted(
        (step, seed_id) for step, _, its_seeds in recorded for seed_id, _ in its_seeds
    )
