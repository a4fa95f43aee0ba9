"""A request that is cut into pieces says what it says in one piece, within its limits."""

from types import SimpleNamespace

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from esper_otel.leyline.frames import MAX_NAME, MAX_SEEDS_PER_FRAME, MAX_TIME_UNIX_NANO
from esper_otel.leyline.protobuf import FieldError
from esper_tamiyo.receiving import harvest as harvests
from esper_tamiyo.receiving import otlp_frames, pieces
from esper_tamiyo.receiving.harvest import (
    AMOUNT,
    MAX_STEPS,
    MAX_WALKED,
    NAME,
    NO_STEP,
    SEEDS,
    TIME,
    Harvest,
    TooMuchError,
)
from esper_tamiyo.receiving.otlp_frames import MAX_RESOURCES, STEPS_AT_ONCE, frames_of, gather
from sidecar.frames_made import add_point, field, frame, otlp_of, put, records, runs


def gathered(data):
    """What becomes of the bytes of a request, and how often others had the loop meanwhile."""
    harvest = Harvest.of_request()
    pauses = sum(1 for _ in gather(data, harvest))
    return harvest, pauses


def of_one_piece(data):
    return frames_of(ExportMetricsServiceRequest.FromString(data))


def told(harvest):
    return records(harvest), harvest.used, harvest.foreign, harvest.unusable, harvest.reasons


@pytest.fixture
def small_pieces(monkeypatch):
    for module in (pieces, otlp_frames):
        monkeypatch.setattr(module, "PIECE", 200)


@given(runs(max_size=8), st.integers(200, 3000))
def test_cut_anywhere_it_says_the_same(frames, piece):
    request = otlp_of(*frames)
    request.MergeFrom(otlp_of(*frames[:2]))
    data = request.SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        patch.setattr(otlp_frames, "PIECE", piece)
        harvest, _ = gathered(data)
    assert told(harvest) == told(of_one_piece(data))


@given(st.binary(max_size=60))
def test_what_is_no_request_is_said_to_be_none(data):
    try:
        harvest, _ = gathered(data)
    except (DecodeError, FieldError):
        return
    assert harvest.frames == []


@given(runs(max_size=4), st.data())
def test_a_request_with_a_wrong_byte_is_refused_or_taken_and_nothing_else(frames, data):
    body = bytearray(otlp_of(*frames).SerializeToString())
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    try:
        gathered(bytes(body))
    except (DecodeError, FieldError):
        with pytest.raises(DecodeError):
            of_one_piece(bytes(body))


def test_a_metric_with_many_points_is_taken_in_parts(small_pieces):
    request = otlp_of(frame(0, run="sdk"))
    metrics = request.resource_metrics[0].scope_metrics[0].metrics
    loss = metrics.add(name="tolaria.loss", description="x" * 1000)
    for step in range(1, 100):
        metrics[0].gauge.data_points.add(time_unix_nano=1 + step, as_double=step)
        loss.gauge.data_points.add(time_unix_nano=1 + step, as_double=step / 2)
    other = metrics.add(name="somebody.else")
    for _ in range(100):
        other.histogram.data_points.add(count=3, explicit_bounds=[1.0, 2.0])
    harvest, pauses = gathered(request.SerializeToString())
    assert [(one.step, one.values.get("loss")) for one in harvest.frames[1:]] == [
        (step, step / 2) for step in range(1, 100)
    ]
    assert (harvest.used, harvest.foreign, harvest.unusable) == (199, 100, 0)
    assert pauses > 20, "others have the loop between the pieces"


def test_a_point_larger_than_a_piece_is_not_looked_at(small_pieces):
    request = otlp_of(frame(0, loss=1.0))
    loss = request.resource_metrics[0].scope_metrics[0].metrics[1]
    put(loss.gauge.data_points[0].attributes, "note", "x" * 300)
    harvest, _ = gathered(request.SerializeToString())
    assert [one.values for one in harvest.frames] == [{"step": 0.0}]
    assert (harvest.used, harvest.reasons) == (1, {NO_STEP: 1})


LONG = "x" * (MAX_NAME + 1)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: otlp_of(frame(0, run=LONG)), NAME),
        (lambda: otlp_of(frame(0, instance=LONG)), NAME),
        (lambda: otlp_of(frame(0, run="x" * pieces.PIECE)), NAME),
        (lambda: otlp_of(frame(1 << 53)), TIME),
        (lambda: at_time(MAX_TIME_UNIX_NANO + 1), TIME),
        (lambda: at_time((1 << 64) - 1), TIME),
        (lambda: with_rank("99999999999"), NAME),
        (lambda: with_rank(str(1 << 31)), NAME),
    ],
)
def test_what_is_out_of_range_is_refused_and_the_producer_is_told_why(made, reason):
    harvest, _ = gathered(made().SerializeToString())
    assert harvest.frames == []
    assert (harvest.used, harvest.unusable, harvest.reasons) == (0, 1, {reason: 1})


def at_time(time_unix_nano):
    request = otlp_of(frame(0))
    scope = request.resource_metrics[0].scope_metrics[0]
    scope.metrics[0].gauge.data_points[0].time_unix_nano = time_unix_nano
    return request


def with_rank(text):
    request = otlp_of(frame(0))
    request.resource_metrics[0].resource.attributes[2].value.string_value = text
    return request


def test_names_of_just_the_limit_are_taken():
    name = "é" * MAX_NAME
    seeds = {name: {"kasmina.seed.alpha": 0.5}}
    (one,) = gathered(otlp_of(frame(0, seeds, run=name, instance=name)).SerializeToString())[
        0
    ].frames
    assert (one.run, one.instance, set(one.seeds)) == (name, name, {name})


def test_of_too_many_seeds_in_a_step_the_first_are_taken():
    values = {"kasmina.seed.alpha": 0.5}
    seeds = {f"s{number}": values for number in range(MAX_SEEDS_PER_FRAME + 3)}
    harvest, _ = gathered(otlp_of(frame(0, seeds | {LONG: values})).SerializeToString())
    ((one),) = harvest.frames
    assert list(one.seeds) == list(seeds)[:MAX_SEEDS_PER_FRAME]
    assert harvest.reasons == {SEEDS: 3, NAME: 1}
    assert harvest.used == MAX_SEEDS_PER_FRAME + 1


def steps_in_one_metric(count):
    request = otlp_of(frame(0))
    points = request.resource_metrics[0].scope_metrics[0].metrics[0].gauge.data_points
    for step in range(1, count):
        points.add(time_unix_nano=1 + step, as_double=step)
    return request.SerializeToString()


def test_of_too_many_steps_in_a_request_the_first_are_taken():
    data = steps_in_one_metric(MAX_STEPS + 5)
    harvest, pauses = gathered(data)
    assert len(harvest.frames) == harvest.used == MAX_STEPS
    assert (harvest.unusable, harvest.reasons) == (5, {AMOUNT: 5})
    assert pauses >= len(data) / pieces.PIECE - 1 + MAX_STEPS / STEPS_AT_ONCE


def test_of_too_many_seeds_in_a_request_the_first_are_taken(monkeypatch):
    monkeypatch.setattr(harvests, "MAX_SEED_ROWS", 10)
    values = {"kasmina.seed.alpha": 0.5}
    frames = [frame(step, {f"s{n}": values for n in range(4)}) for step in range(4)]
    harvest, _ = gathered(otlp_of(*frames).SerializeToString())
    assert sum(len(one.seeds) for one in harvest.frames) == 10
    assert harvest.reasons == {AMOUNT: 6}


@pytest.mark.parametrize(("length", "is_parsed"), [(1000, True), (1100, False)])
def test_a_name_too_long_for_a_metric_is_not_parsed_with_each_part(
    length, is_parsed, monkeypatch
):
    parsed = []

    def counted(part):
        parsed.append(len(part))
        return Metric.FromString(part)

    monkeypatch.setattr(pieces, "Metric", SimpleNamespace(FromString=counted))
    parts = field(1, b"x" * length) + b"\x2a\x00" * pieces.PIECE
    gathered(field(1, field(2, field(2, parts))))
    assert len(parsed) == pieces.PIECE
    assert (min(parsed) > length) is is_parsed


TOO_MANY = b"\x22\x00" * (MAX_WALKED + 1)
"""Empty fields of a number that no part of a request has."""


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x00" * (MAX_RESOURCES + 1),
        field(1, b"\x12\x00" * (MAX_WALKED + 1)),
        TOO_MANY,
        field(1, TOO_MANY),
        field(1, field(2, field(2, TOO_MANY))),
    ],
    ids=["resources", "scopes", "others", "others of a resource", "others of a metric"],
)
def test_a_request_of_nothing_but_empty_parts_is_given_up(data):
    with pytest.raises(TooMuchError):
        gathered(data)


def test_points_that_nobody_can_use_are_counted_in_any_case():
    request = otlp_of(frame(0, loss=1.0))
    scope = request.resource_metrics[0].scope_metrics[0]
    scope.metrics[1].gauge.data_points.add(time_unix_nano=1)
    add_point(scope, "accuracy", 999, 1.0)
    add_point(scope, "kasmina.seed.alpha", 1, 1.0)
    harvest, _ = gathered(request.SerializeToString())
    assert (harvest.used, harvest.unusable, harvest.reasons) == (2, 3, {NO_STEP: 3})
