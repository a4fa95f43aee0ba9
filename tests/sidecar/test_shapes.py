"""What is read by its shape is what the official classes read."""

from math import inf, nan

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.frames import MAX_SEEDS_PER_FRAME
from esper_otel.leyline.metrics import BY_KEY, SEED_ID, SEED_KEYS
from esper_otel.leyline.protobuf import FieldError
from esper_tamiyo.receiving import otlp_frames, shapes
from esper_tamiyo.receiving.harvest import SEEDS, Harvest
from esper_tamiyo.receiving.otlp_frames import Known, frames_of, gather
from esper_tamiyo.receiving.pipe import PackedStep
from sidecar.frames_made import frame, otlp_of, put, records, runs

KEYS = ("step", "loss", "gradient_norm", *SEED_KEYS[:2])
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.5, 1e308, nan, inf, -inf, 5, 0, -3])


def told(harvest):
    # By repr, as a NaN is not equal to itself.
    return repr((records(harvest), harvest.used, harvest.foreign, harvest.reasons))


def taken(request, known):
    harvest = Harvest.of_request()
    for _ in gather(request.SerializeToString(), harvest, known=known):
        pass
    return harvest


@st.composite
def plans(draw):
    """What the metrics of one part are, but for their times and values."""
    return draw(
        st.lists(
            st.tuples(
                st.sampled_from([*KEYS, "other"]),
                st.sampled_from(["gauge", "gauge", "gauge", "sum", "histogram", None]),
                st.sampled_from(["", "s1", "s22"]),
                st.integers(0, 2),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        )
    )


def add_part(scopes, plan, draw):
    """One more part as planned, with times and values of its own."""
    time = draw(st.sampled_from([0, 1, 2, 3, (1 << 64) - 1]))
    has_one_time = draw(st.integers(0, 3)) > 0
    are_whole = draw(st.booleans())
    scope = scopes.add()
    for key, kind, seed_id, count, is_annotated in plan:
        metric = scope.metrics.add(name=BY_KEY[key].instrument if key in BY_KEY else key)
        if kind is None:
            continue
        for _ in range(count):
            point = getattr(metric, kind).data_points.add()
            point.time_unix_nano = time if has_one_time else draw(st.integers(0, 3))
            if seed_id:
                put(point.attributes, SEED_ID, seed_id)
            if kind == "histogram":
                continue
            value = draw(NUMBERS)
            if isinstance(value, int) and are_whole:
                point.as_int = value
            else:
                point.as_double = value
            if is_annotated:
                point.start_time_unix_nano = 7
                point.exemplars.add(as_double=1.0, time_unix_nano=5)


@given(st.data())
def test_any_parts_are_read_as_by_the_official_classes(data):
    kinds = data.draw(st.lists(plans(), min_size=1, max_size=3))
    known = Known()
    for _ in range(4):
        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        put(resource.resource.attributes, "service.name", data.draw(st.sampled_from("ab")))
        for plan in kinds:
            for _ in range(data.draw(st.integers(0, 2))):
                add_part(resource.scope_metrics, plan, data.draw)
        assert told(taken(request, known)) == told(frames_of(request))


@given(runs(max_size=6), st.data())
def test_a_wrong_byte_is_seen_where_the_shape_is_known(frames, data):
    known = Known()
    request = otlp_of(*frames)
    for _ in range(2):
        taken(request, known)
    body = bytearray(request.SerializeToString())
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    harvest = Harvest.of_request()
    try:
        for _ in gather(bytes(body), harvest, known=known):
            pass
    except (DecodeError, FieldError):
        with pytest.raises(DecodeError):
            frames_of(ExportMetricsServiceRequest.FromString(bytes(body)))
    else:
        official = frames_of(ExportMetricsServiceRequest.FromString(bytes(body)))
        assert told(harvest) == told(official)


def a_run(*steps):
    return [frame(step, {"s1": {KEYS[3]: 0.5, KEYS[4]: step / 8}}, loss=2.0) for step in steps]


def test_a_shape_that_came_twice_is_parsed_no_more(monkeypatch):
    known = Known()
    taken(otlp_of(*a_run(1, 2)), known)
    expected = frames_of(otlp_of(*a_run(*range(3, 60)))).frames
    monkeypatch.setattr(otlp_frames, "_take", None)
    harvest = taken(otlp_of(*a_run(*range(3, 60))), known)
    assert {type(one) for one in harvest.frames} == {PackedStep}
    assert records(harvest) == expected


def test_limits_hold_for_what_is_read_by_its_shape():
    known = Known()
    seeds = [f"s{number:04}" for number in range(MAX_SEEDS_PER_FRAME + 3)]

    def request():
        made = otlp_of(frame(1))
        for seed_id in seeds:
            scope = made.resource_metrics[0].scope_metrics.add()
            metric = scope.metrics.add(name=BY_KEY[KEYS[3]].instrument)
            point = metric.gauge.data_points.add(time_unix_nano=2, as_double=1.0)
            put(point.attributes, SEED_ID, seed_id)
        return made

    first = told(taken(request(), known))
    for _ in range(MAX_SEEDS_PER_FRAME // shapes.MAX_LEARNED + 1):
        harvest = taken(request(), known)
    assert told(harvest) == first
    assert harvest.reasons == {SEEDS: 3}


def test_ever_new_shapes_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(shapes, "MAX_BYTES", 20_000)
    known = Known()
    for number in range(200):
        request = otlp_of(*(frame(step, loss=1.0) for step in range(4)))
        for scope in request.resource_metrics[0].scope_metrics:
            scope.scope.name = f"scope {number}"
        assert told(taken(request, known)) == told(frames_of(request))
        held = [one for every in known.shapes._layouts.values() for one in every]
        assert sum(len(layout.parts) for layout in held) < 100


def test_of_one_request_few_shapes_are_learned():
    known = Known()
    request = otlp_of(frame(0))
    for number in range(1000):
        scope = request.resource_metrics[0].scope_metrics.add()
        scope.CopyFrom(otlp_of(frame(number, loss=1.0)).resource_metrics[0].scope_metrics[0])
        scope.scope.version = f"{number:06}"
    taken(request, known)
    held = [one for every in known.shapes._layouts.values() for one in every]
    assert sum(len(layout.parts) for layout in held) == shapes.MAX_LEARNED
