"""OTLP bytes become the frames that were meant, point by point accounted for."""

from math import inf, nan

import pytest
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import RANK, RUN_ENDED, RUN_ID, SEED_ID
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load
from esper_tamiyo.receiving import intake
from esper_tamiyo.receiving.otlp_frames import frames_of
from esper_tamiyo.receiving.pipe import Inlet, MessageKind, pack
from esper_tamiyo.receiving.pipe import frame as frame_of
from esper_tamiyo.serving.connection import Trainer
from sidecar.frames_made import add_point, frame, hello_of, otlp_of, put, runs, set_client

PROTOTYPE = load("prototype")


def reaped(request):
    """Frames of a request that has been over the network."""
    return frames_of(ExportMetricsServiceRequest.FromString(request.SerializeToString()))


@given(runs())
def test_frames_survive_otlp(frames):
    harvest = reaped(otlp_of(*frames))
    assert harvest.frames == frames
    points = sum(
        len(one.values) + sum(len(seed) for seed in one.seeds.values()) for one in frames
    )
    assert (harvest.used, harvest.foreign, harvest.unusable) == (points, 0, 0)


@given(runs())
def test_stream_and_asks_give_the_same_decisions(frames):
    asked, streamed = Engine(PROTOTYPE), Engine(PROTOTYPE)
    through_asks = []
    for one in frames:
        trainer = Trainer(hello_of(one))
        through_asks.append(asked.observe(trainer.frame_of_ask(set_client(one))))
    bodies = [
        body
        for kind, body in Inlet().feed(b"".join(map(pack, reaped(otlp_of(*frames)).frames)))
        if kind == MessageKind.FRAME
    ]
    assert [streamed.observe(frame_of(body)) for body in bodies] == through_asks
    assert streamed.latest("run") == asked.latest("run")


@given(runs(), st.lists(st.integers(1, 400), max_size=20))
def test_messages_are_whole_however_the_pipe_cuts_them(frames, sizes):
    data, inlet, begin, found = b"".join(map(pack, frames)), Inlet(), 0, []
    for size in [*sizes, len(data)]:
        found += inlet.feed(memoryview(data)[begin : begin + size])
        begin += size
    assert found == [(MessageKind.FRAME, pack(one)[5:]) for one in frames]


def test_sdk_shape_points_of_several_steps_in_one_metric():
    request = otlp_of(frame(0))
    request.resource_metrics[0].ClearField("scope_metrics")
    scope = request.resource_metrics[0].scope_metrics.add()
    for key, kind in (("tolaria.step", "gauge"), ("tolaria.loss", "sum")):
        metric = scope.metrics.add(name=key)
        for step in (2, 1):
            point = getattr(metric, kind).data_points.add(time_unix_nano=step)
            point.as_int = step
    assert reaped(request).frames == [
        StepFrame("run", "one", 0, step, step, {"step": float(step), "loss": float(step)})
        for step in (1, 2)
    ]


def test_foreign_metrics_are_left_alone():
    request = otlp_of(frame(0, loss=1.0))
    scope = request.resource_metrics[0].scope_metrics[0]
    add_point(scope, "http.server.active_requests", 1, 1.0)
    scope.metrics.add(name="loss").gauge.data_points.add(time_unix_nano=1)  # only a key
    scope.metrics.add(name="latency").histogram.data_points.add()
    scope.metrics.add(name="empty")
    scope.metrics.add(name="tolaria.loss").histogram.data_points.add()
    harvest = reaped(request)
    assert harvest.frames == [frame(0, loss=1.0)]
    assert (harvest.used, harvest.foreign, harvest.unusable) == (2, 4, 0)


def test_points_of_ours_that_cannot_be_placed_are_unusable():
    request = otlp_of(frame(0, loss=1.0))
    scope = request.resource_metrics[0].scope_metrics[0]
    add_point(scope, "accuracy", 999, 1.0)  # no step at that time
    add_point(scope, "kasmina.seed.alpha", 1, 1.0)  # no seed_id
    scope.metrics.add(name="tolaria.accuracy").gauge.data_points.add(time_unix_nano=1)
    harvest = reaped(request)
    assert harvest.frames == [frame(0, loss=1.0)]
    assert (harvest.used, harvest.unusable) == (2, 3)


@pytest.mark.parametrize("kind", ["sum", "histogram", "summary"])
def test_an_end_of_a_run_that_is_no_gauge_is_somebody_elses(kind):
    request = otlp_of(frame(0))
    scope = request.resource_metrics[0].scope_metrics[0]
    metric = scope.metrics.add(name=RUN_ENDED.instrument)
    getattr(metric, kind).data_points.add(time_unix_nano=1)
    harvest = reaped(request)
    assert harvest.frames == [frame(0)]
    assert (harvest.used, harvest.foreign, harvest.unusable) == (1, 1, 0)


@pytest.mark.parametrize("step", [-1.0, 0.5, 2.0**53, nan, inf])
def test_a_step_that_is_no_step_makes_no_frame(step):
    request = otlp_of(StepFrame("run", "one", 0, 0, 1, {"step": step, "loss": 1.0}))
    harvest = reaped(request)
    assert harvest.frames == []
    assert harvest.unusable == 2


def test_values_that_are_not_finite_are_counted_and_left_out():
    request = otlp_of(frame(0, loss=nan, accuracy=inf, nonfinite=1.0))
    scope = request.resource_metrics[0].scope_metrics[0]
    put(add_point(scope, "kasmina.seed.alpha", 1, -inf).attributes, SEED_ID, "s")
    harvest = reaped(request)
    assert harvest.frames == [frame(0, {"s": {}}, nonfinite=4.0)]
    assert (harvest.used, harvest.unusable) == (5, 0)


def test_identity_comes_from_the_resource():
    def identity(**attributes):
        request = otlp_of(frame(0))
        resource = request.resource_metrics[0].resource
        resource.ClearField("attributes")
        for key, value in attributes.items():
            attribute = resource.attributes.add(key=key.replace("_", ".", 1))
            if isinstance(value, int):
                attribute.value.int_value = value
            else:
                attribute.value.string_value = value
        (one,) = reaped(request).frames
        return one.run, one.rank, one.instance

    assert (RUN_ID, RANK) == ("esper.run_id", "esper.rank")
    assert identity() == ("", 0, "")
    assert identity(service_name="svc") == ("svc", 0, "")
    assert identity(service_name="svc", esper_run_id="r", esper_rank=3) == ("r", 3, "")
    assert identity(esper_run_id=17, esper_rank="4") == ("17", 4, "")
    assert identity(esper_run_id="r", esper_rank="four") == ("r", 0, "")
    assert identity(esper_run_id="r", esper_rank="٣") == ("r", 0, "")


def test_resources_are_apart():
    one, two = otlp_of(frame(0, loss=1.0)), otlp_of(frame(0, rank=1, loss=2.0))
    one.MergeFrom(two)
    assert reaped(one).frames == [frame(0, loss=1.0), frame(0, rank=1, loss=2.0)]


def test_status_bytes_are_google_rpc_status():
    message = "no room, " * 40
    status = Status.FromString(intake.refusal(code_pb2.UNAVAILABLE, message, retry=True))
    assert (status.code, status.message) == (14, message)
    info = RetryInfo()
    assert status.details[0].Unpack(info)
    assert info.retry_delay.seconds == intake.RETRY_AFTER_S
    assert not Status.FromString(intake.refusal(3, "x")).details
