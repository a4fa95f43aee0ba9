"""Custom values in OTLP: what the official classes read is what went in, with its step."""

from __future__ import annotations

from math import nan

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.custom import EVALUATION, NAME, is_evaluation, usable_name
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import CUSTOM, RUN_ENDED, STEP_KEYS
from esper_otel.stream.encoding import FrameEncoder, encode_end
from esper_otel.stream.gauges import _custom_observations
from esper_otel.stream.ring import FrameRing

VALUES = st.dictionaries(
    st.text(min_size=1, max_size=20).map(usable_name),
    st.floats(allow_nan=False, allow_infinity=False),
    max_size=4,
)


def row(step):
    return [float(step) if key == "step" else nan for key in STEP_KEYS]


def custom_points(body):
    """{time: {name: value}} of one request; every attribute is as it should be."""
    found = {}
    request = ExportMetricsServiceRequest.FromString(body)
    for scope in request.resource_metrics[0].scope_metrics:
        for metric in scope.metrics:
            if metric.name != CUSTOM.instrument:
                continue
            assert metric.unit == CUSTOM.unit
            for point in metric.gauge.data_points:
                told = {each.key: each.value for each in point.attributes}
                name = told.pop(NAME).string_value
                assert (EVALUATION in told) == is_evaluation(name)
                assert all(value.bool_value for value in told.values())
                at = found.setdefault(point.time_unix_nano, {})
                assert name not in at
                at[name] = point.as_double
    return found


@given(st.lists(VALUES, min_size=1, max_size=12), st.sampled_from([300, 1 << 20]))
def test_each_step_has_its_values_in_the_request_that_it_is_in(steps, max_request):
    ring, encoder = FrameRing(64), FrameEncoder(b"", max_request)
    for step, custom in enumerate(steps):
        assert ring.put(1000 + step, row(step), (), custom)
    found, points, frames = {}, 0, 0
    for request in encoder.encode(ring.drain()):
        told = custom_points(request.body)
        assert set(told) <= set(range(1000 + frames, 1000 + frames + request.frames))
        found |= told
        points += request.points
        frames += request.frames
    assert found == {1000 + step: custom for step, custom in enumerate(steps) if custom}
    assert points == len(steps) + sum(map(len, steps))


def test_a_step_whose_millisecond_is_under_way_keeps_its_values_until_it_is_taken():
    ring = FrameRing(64)
    ring.put(1_000_000, row(1), (), {"a": 1.0})
    ring.put(3_500_000, row(2), (), {"b": 2.0})
    assert ring.drain(3_600_000).customs == [(0, {"a": 1.0})]
    assert ring.drain(9_000_000).customs == [(0, {"b": 2.0})]
    assert ring.drain() is None


def test_what_finds_no_room_is_counted_with_its_values():
    ring = FrameRing(1)
    assert ring.put(1, row(1), (), {"a": 1.0})
    assert not ring.put(2, row(2), (), {"a": 1.0, "b": 2.0})
    assert ring.refused_points == 3
    assert ring.drain().customs == [(0, {"a": 1.0})]


def test_a_meter_of_the_users_sees_the_newest_of_each():
    ring = FrameRing(8)
    ring.put(1, row(1), (), {"kl": 1.0, "val_loss": 2.0})
    ring.put(2, row(2), (), {"kl": 3.0})
    ring.drain()
    seen = {
        (each.attributes[NAME], each.attributes.get(EVALUATION)): each.value
        for each in _custom_observations(ring, 0)
    }
    assert seen == {("kl", None): 3.0, ("val_loss", True): 2.0}


def test_values_behind_the_last_step_come_with_the_end():
    end = StepFrame("r", "i", 0, 7, 99, {"custom.val_loss": 0.5}, ended=RunEnd(HowEnded.DONE))
    body = encode_end(end, b"")
    assert custom_points(body) == {99: {"val_loss": 0.5}}
    (scope,) = ExportMetricsServiceRequest.FromString(body).resource_metrics[0].scope_metrics
    assert scope.metrics[0].name == RUN_ENDED.instrument
