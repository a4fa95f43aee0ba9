"""Several runs of one process: one sender, and each run's telemetry under its own name."""

import threading

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.trace_ids import STEP_SPAN, span_id, trace_id
from esper_otel.stream import Stream, gauges, read_frames
from testkit.receiver import METRICS, HttpReceiver


def beside(stream, settings, name, **changes):
    other = Stream(
        settings(**changes), run_id=name, instance_id=f"instance of {name}", beside=stream
    )
    other.start()
    return other


def steps_by_run(receiver):
    found = {}
    for request in receiver.inbox.requests:
        if request.path != METRICS:
            continue
        for resource in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
            who = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if metric.name == "tolaria.step":
                        steps = found.setdefault(
                            (who["esper.run_id"], who["service.instance.id"]), []
                        )
                        steps += [int(point.as_double) for point in metric.gauge.data_points]
    return found


def test_each_run_is_told_under_its_own_name_and_all_are_accounted_for(
    open_stream, settings, row
):
    with HttpReceiver() as receiver:
        stream = open_stream(receiver.url)
        first, second = (beside(stream, settings, name) for name in ("run-2", "run-3"))
        threads = [each.name for each in threading.enumerate()]
        assert threads.count("esper-stream") == 1
        for step in range(1, 41):
            for each in (stream, first, second):
                each.frame(1000 + step, row(step))
        first.timeline(StepTimeline(1, 1, 9, [], row(1)))
        first.event(Event("esper.seed.culled", 5, Severity.NORMAL, "", {"esper.step": 1}))
        first.close()
        assert first.close().frames == 40
        first.frame(2000, row(99))
        report = stream.close()
        steps = steps_by_run(receiver)
        (span,) = receiver.inbox.spans()
    whole = list(range(1, 41))
    assert steps == {
        ("run", "instance"): whole,
        ("run-2", "instance of run-2"): whole,
        ("run-3", "instance of run-3"): whole,
    }
    assert report.frames == 120
    assert report.metrics.produced == report.metrics.delivered == 240
    assert (report.traces.delivered, report.logs.delivered) == (1, 1)
    ids = trace_id("run-2", 1), span_id("run-2", 0, "instance of run-2", 1, STEP_SPAN)
    assert (span.trace_id, span.span_id) == (ids[0].to_bytes(16), ids[1].to_bytes(8))
    assert [each.totals.steps for each in (stream, first, second)] == [40, 40, 40]
    assert all(each.totals.complete for each in (stream, first, second))


def test_what_one_run_had_no_room_for_is_in_the_account_of_all(open_stream, settings, row):
    with HttpReceiver() as receiver:
        stream = open_stream(receiver.url, stream_interval_ms=60_000.0)
        other = beside(stream, settings, "run-2", ring_steps=16)
        for step in range(20):
            other.frame(1000 + step, row(step))
        other.close()
        report = stream.close()
    assert (report.frames, report.refused_frames) == (16, 4)
    assert (report.metrics.produced, report.metrics.dropped) == (40, 8)


def test_each_run_has_recordings_of_its_own(open_stream, settings, row, tmp_path):
    with HttpReceiver() as receiver:
        stream = open_stream(receiver.url, recording_dir=str(tmp_path))
        other = beside(stream, settings, "run-2", recording_dir=str(tmp_path))
        for step in (1, 2):
            stream.frame(1000 + step, row(step))
            other.frame(1000 + step, row(step))
        other.close()
        report = stream.close()
    names = ["run-rank0.metrics.otlp", "run-2-rank0.metrics.otlp"]
    assert {path.name for path in report.recordings} == set(names)
    for name in names:
        frames = list(read_frames(tmp_path / name))
        assert [(frame.run, frame.step) for frame in frames] == [
            (name.removesuffix("-rank0.metrics.otlp"), step) for step in (1, 2)
        ]


def test_beside_a_stream_that_is_closed_nothing_is_sent(open_stream, settings, row):
    with HttpReceiver() as receiver:
        stream = open_stream(receiver.url)
        stream.close()
        other = beside(stream, settings, "run-2")
        other.frame(1000, row(1))
        assert other.close().frames == 0
        assert not receiver.inbox.requests


def test_gauges_show_the_newest_run_that_is_open(monkeypatch):
    monkeypatch.setattr(gauges, "_shown", gauges._Shown())
    gauges._shown.registered = True
    first, second, third = object(), object(), object()
    for ring in (first, second, third):
        gauges.register(ring)
    gauges.unregister(second)
    assert gauges._shown.ring is third
    gauges.unregister(third)
    assert gauges._shown.ring is first
    gauges.unregister(first)
    assert gauges._shown.ring is None
