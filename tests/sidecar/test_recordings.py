"""Reading recordings: every shape of file, cut anywhere, damaged anywhere."""

import sys
from itertools import cycle

import msgspec
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from esper_otel.leyline import otlp_files
from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.otlp_file import MAX_MESSAGE, framed
from esper_tamiyo.receiving.otlp_frames import frames_of
from esper_tamiyo.replaying.recordings import HORIZON_NS, Assembly, RecordedRuns
from sidecar.frames_made import frame, otlp_of, runs
from sidecar.recorded_runs import FORMATS, as_json, cut, proposed

SECOND = 1_000_000_000


def at(step, time_s, **values):
    """A frame that ended ``time_s`` after the recording began."""
    made = frame(step, **values)
    return msgspec.structs.replace(made, time_unix_nano=SECOND + round(time_s * SECOND))


def frames_in(path, **options):
    """The frames in a recording, which is to be whole."""
    recording = RecordedRuns(path)
    frames = [frame for frame, _ in recording.steps(**options)]
    assert recording.problems == []
    return frames


def as_read(frame):
    """A frame as it comes back: a seed without values leaves no trace in OTLP."""
    seeds = {seed_id: values for seed_id, values in frame.seeds.items() if values}
    return msgspec.structs.replace(frame, seeds=seeds)


SEEDED = [
    frame(step, {"s1": {"kasmina.seed.stage": 4.0, "kasmina.seed.alpha": 0.5}}, loss=0.5)
    for step in range(1, 40)
]


@pytest.mark.parametrize("shape", FORMATS)
def test_every_shape_of_a_file_holds_the_same_frames(shape, tmp_path):
    path = tmp_path / "recording"
    path.write_bytes(FORMATS[shape](list(cut(SEEDED, cycle([7])))))
    assert frames_in(path) == SEEDED


@settings(deadline=None)
@given(runs(), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.data())
def test_a_step_that_was_cut_in_two_is_one_frame(frames, sizes, data):
    assembly = Assembly()
    read = [one for each in cut(frames, cycle(sizes)) for one in assembly.add_request(each)]
    assert [*read, *assembly.rest()] == [as_read(one) for one in frames]
    assert assembly.tally.unusable == 0


def test_requests_that_come_out_of_order_and_twice_are_put_in_order():
    frames = [at(step, step, loss=float(step)) for step in range(40)]
    parts = [frames[5:10], frames[0:5], frames[0:5], *([one] for one in frames[10:])]
    assembly = Assembly()
    read = [one for part in parts for one in assembly.add_request(otlp_of(*part))]
    assert read, "what is older than the horizon does not wait for the end"
    assert [*read, *assembly.rest()] == frames


def test_what_comes_later_than_the_horizon_comes_late_but_comes():
    late, punctual = at(1, 0, loss=1.0), at(2, 2 * HORIZON_NS / SECOND, loss=1.0)
    assembly = Assembly()
    assert list(assembly.add_request(otlp_of(punctual))) == []
    assert list(assembly.add_request(otlp_of(late))) == [late]
    assert list(assembly.rest()) == [punctual]


def test_steps_are_not_held_without_end_whatever_their_times_say(monkeypatch):
    monkeypatch.setattr("esper_tamiyo.replaying.recordings.MAX_HELD", 3)
    frames = [at(step, 1 + step / 1e6, loss=1.0) for step in range(5)]
    assembly = Assembly()
    assert list(assembly.add_request(otlp_of(*frames))) == frames[:2]
    assert list(assembly.rest()) == frames[2:]


def test_ranks_of_several_files_go_in_order_of_time(tmp_path):
    for rank in range(3):
        frames = [
            msgspec.structs.replace(at(step, step + rank / 10), rank=rank) for step in range(50)
        ]
        path = tmp_path / f"run-rank{rank}.metrics.otlp"
        path.write_bytes(FORMATS["proto"]([otlp_of(*frames[:25]), otlp_of(*frames[25:])]))
    read = frames_in(tmp_path)
    assert [(one.step, one.rank) for one in read] == [
        (s, r) for s in range(50) for r in range(3)
    ]


def test_a_rotated_set_is_one_recording_also_where_a_step_was_cut(tmp_path):
    requests = list(cut(SEEDED, cycle([11])))
    names = ("run-2026-11-01T10-00-00.000.json", "run-2026-11-01T10-01-00.000.json", "run.json")
    for place, name in enumerate(names):
        part = requests[place * 4 : place * 4 + 4] if place < 2 else requests[8:]
        (tmp_path / name).write_bytes(FORMATS["json"](part))
    assert frames_in(tmp_path) == SEEDED


def test_a_run_is_chosen_by_its_name(tmp_path):
    path = tmp_path / "both"
    frames = [frame(step, run=run) for run in ("a", "b") for step in (1, 2)]
    path.write_bytes(FORMATS["proto"]([otlp_of(*frames[:2]), otlp_of(*frames[2:])]))
    assert frames_in(path, run="b") == frames[2:]
    assert len(frames_in(path)) == 4


# JSON has a way of its own for metrics, beside protobuf's.


def by_protobuf(data):
    return json_format.Parse(data, ExportMetricsServiceRequest(), ignore_unknown_fields=True)


@settings(deadline=None)
@given(runs(), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_json_gives_the_request_that_was_written(frames, sizes):
    for each in cut(frames, cycle(sizes)):
        assert otlp_files.json_request(as_json(each), ExportMetricsServiceRequest) == each


JSON_METRICS = {
    "whole numbers": '{"name": "tolaria.step", "gauge": {"dataPoints": [{"asInt": "7"}]}}',
    "sums": '{"name": "tolaria.step", "sum": {"dataPoints": [{"asInt": 7}]}}',
    "not finite": '{"name": "a", "gauge": {"dataPoints": [{"asDouble": "-Infinity"}]}}',
    "others": '{"name": "a", "histogram": {"dataPoints": [{"count": "1"}, {}]}}',
    "no points": '{"name": "a", "gauge": {}}',
    "nothing known": '{"name": "a", "violin": {}}',
    "nulls": '{"name": "a", "unit": null, "gauge": {"dataPoints": null}}',
}


@pytest.mark.parametrize("case", JSON_METRICS)
def test_json_is_read_as_protobuf_reads_it(case):
    data = (
        f'{{"resourceMetrics": [{{"scopeMetrics": [{{"metrics": [{JSON_METRICS[case]}]}}]}}]}}'
    )
    ours = frames_of(otlp_files.json_request(data.encode(), ExportMetricsServiceRequest))
    assert ours == frames_of(by_protobuf(data))


# What was proposed.


TOLD = [(2, "train", "s1"), (4, "none", ""), (5, "blend", "s2")]
TRAIN, BLEND = ("s1", "train"), ("s2", "blend")
HELD = {1: None, 2: TRAIN, 3: TRAIN, 4: None, 5: BLEND, 6: BLEND}


def proposals_in(path):
    recording = RecordedRuns(path)
    found = {
        frame.step: proposal and (proposal.seed_id, str(proposal.operation))
        for frame, proposal in recording.steps()
    }
    assert recording.problems == []
    return found


@pytest.mark.parametrize("shape", FORMATS)
def test_a_proposal_holds_until_the_next(shape, tmp_path):
    metrics = [otlp_of(frame(step)) for step in range(1, 7)]
    path = tmp_path / "run-rank0.metrics.otlp"
    path.write_bytes(FORMATS[shape](metrics))
    (tmp_path / "run-rank0.logs.otlp").write_bytes(FORMATS[shape]([proposed(*TOLD)]))
    assert proposals_in(tmp_path) == HELD
    assert proposals_in(path) == HELD, "the logs beside a file of metrics belong to it"


def test_proposals_may_be_written_after_the_steps_they_hold_from(tmp_path):
    """A Collector has a queue for each signal, and may have one file for all."""
    path = tmp_path / "everything.json"
    metrics = [otlp_of(frame(step)) for step in range(1, 7)]
    path.write_bytes(FORMATS["json"]([*metrics, proposed(*TOLD)]))
    assert proposals_in(path) == HELD


def test_a_proposal_is_of_one_process(tmp_path):
    path = tmp_path / "run"
    frames = [frame(1, instance=instance) for instance in ("one", "two")]
    told = proposed((1, "train", "s1"), instance="two")
    path.write_bytes(FORMATS["json"]([otlp_of(frames[0]), otlp_of(frames[1]), told]))
    assert [proposal for _, proposal in RecordedRuns(path).steps()] == [
        None,
        Proposal("s1", SeedOperation.TRAIN),
    ]


def test_an_operation_of_a_later_version_is_left_out_and_said(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(FORMATS["json"]([otlp_of(frame(1)), proposed((1, "graft", "s1"))]))
    recording = RecordedRuns(path)
    assert [proposal for _, proposal in recording.steps()] == [None]
    assert recording.problems == ["a proposal was skipped: unknown operation 'graft'"]


@pytest.mark.parametrize("step", ["9" * 17, "9" * 5000, "²", "١", "-1", ""])
def test_a_proposal_of_what_is_no_step_is_left_out(step, tmp_path):
    told = proposed((1, "advance", "s1"))
    attribute = told.resource_logs[0].scope_logs[0].log_records[0].attributes[0]
    attribute.value.string_value = step
    path = tmp_path / "run"
    path.write_bytes(FORMATS["json"]([otlp_of(frame(1)), told]))
    assert [proposal for _, proposal in RecordedRuns(path).steps()] == [None]


def test_a_second_copy_of_a_step_is_counted_as_one(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(FORMATS["proto"]([otlp_of(frame(1, loss=1.0))] * 2))
    recording = RecordedRuns(path)
    assert len(list(recording.steps())) == 1
    assert (recording.points.used, recording.points.old) == (2, 2)


# Damage.

WHOLE = [otlp_of(frame(step, loss=float(step))) for step in range(1, 6)]


def torn(data, shape):
    """``data`` without its last few bytes; compressed streams lose their last frame."""
    return data[:-5]


@pytest.mark.parametrize("shape", FORMATS)
def test_a_file_that_ends_in_the_middle_is_read_up_to_there(shape, tmp_path):
    path = tmp_path / "recording"
    path.write_bytes(torn(FORMATS[shape](WHOLE), shape))
    recording = RecordedRuns(path)
    steps = [frame.step for frame, _ in recording.steps()]
    assert steps == list(range(1, 1 + len(steps)))
    if shape != "proto, one zstd frame":  # whose only frame it is
        assert len(steps) >= 4
    (problem,) = recording.problems
    assert problem.startswith(f"{path}: byte ")
    assert problem.endswith("; read up to there")


@settings(deadline=None)
@given(st.data())
def test_any_byte_may_be_wrong_and_nothing_raises(tmp_path_factory, data):
    shape = data.draw(st.sampled_from(sorted(FORMATS)))
    content = bytearray(FORMATS[shape](WHOLE))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "recording"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    recording = RecordedRuns(path)
    for _ in recording.steps():
        pass
    assert len(recording.problems) <= 1


def test_a_file_that_is_rotated_while_it_is_damaged_ends_alone(tmp_path):
    whole, damaged = [otlp_of(frame(1))], [otlp_of(frame(2)), otlp_of(frame(3))]
    (tmp_path / "a").write_bytes(FORMATS["proto"](whole))
    (tmp_path / "b").write_bytes(FORMATS["proto"](damaged)[:-1])
    recording = RecordedRuns(tmp_path)
    assert [frame.step for frame, _ in recording.steps()] == [1, 2]
    assert len(recording.problems) == 1


OTHERS = {
    "empty": (b"", "byte 0: the file is empty"),
    "text": (b"#!/bin/sh\necho\n", "byte 0: expected the size of a request, found"),
    "other json": (b'{"a": 1}\n', "byte 0: not an OTLP request: it has none of the signals"),
    "half a line": (as_json(WHOLE[0])[:-9], "byte 0: not an OTLP request: "),
    "other bytes": (framed(b"\xff\xff"), "byte 0: not an OTLP request"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "byte 0: expected the size of a request"),
    "no gzip": (b"\x1f\x8b" + bytes(99), "byte 0: the compressed data is damaged"),
    "no zstd": (b"\x28\xb5\x2f\xfd" + b"\xff" * 99, "byte 0: the compressed data is damaged"),
    "no zstd inside": (framed(b"\x28\xb5\x2f\xfd\xff\xff"), "the compressed data is damaged"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_that_is_not_ours_is_named_with_what_was_expected(other, tmp_path):
    content, problem = OTHERS[other]
    path = tmp_path / "recording"
    path.write_bytes(content)
    recording = RecordedRuns(path)
    assert list(recording.steps()) == []
    (told,) = recording.problems
    assert told.startswith(f"{path}: ")
    assert problem in told


def one_point(**point):
    """A request of one point, as JSON."""
    metric = {"name": "tolaria.step", "gauge": {"dataPoints": [{"asInt": "6", **point}]}}
    return msgspec.json.encode({"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]})


OUT_OF_RANGE = {
    "a time before 1970": one_point(timeUnixNano="-5"),
    "a time of 71 bits": one_point(timeUnixNano=str(1 << 70)),
    "a value of 71 bits": one_point(asInt=str(1 << 70)),
    "nested without end": b'{"resourceMetrics":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}",
}


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_what_no_request_can_hold_ends_its_file(wrong, tmp_path):
    path = tmp_path / "recording"
    good = FORMATS["json"](WHOLE)
    path.write_bytes(good + OUT_OF_RANGE[wrong] + b"\n" + FORMATS["json"]([otlp_of(frame(7))]))
    recording = RecordedRuns(path)
    assert [frame.step for frame, _ in recording.steps()] == [1, 2, 3, 4, 5]
    (told,) = recording.problems
    assert told.startswith(f"{path}: byte {len(good):,}: not an OTLP request: ")


def test_requests_of_other_signals_are_passed_over(tmp_path):
    traces = ExportTraceServiceRequest()
    span = traces.resource_spans.add().scope_spans.add().spans.add()
    span.trace_id, span.span_id, span.name = b"0123456789abcdef", b"01234567", "train.step"
    for shape in ("proto", "json"):
        path = tmp_path / shape
        path.write_bytes(FORMATS[shape]([traces, proposed((1, "none", "")), WHOLE[0]]))
        assert [frame.step for frame in frames_in(path)] == [1]


def test_a_request_behind_an_absurd_size_is_not_waited_for(tmp_path):
    path = tmp_path / "recording"
    path.write_bytes((MAX_MESSAGE + 1).to_bytes(4, "big") + bytes(99))
    recording = RecordedRuns(path)
    assert list(recording.steps()) == []
    assert "expected the size of a request" in recording.problems[0]


def test_without_zstandard_it_is_said_what_to_install(tmp_path, monkeypatch):
    shapes = [shape for shape in FORMATS if "zstd" in shape]
    for place, shape in enumerate(shapes):
        (tmp_path / str(place)).write_bytes(FORMATS[shape](WHOLE))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    recording = RecordedRuns(tmp_path)
    assert list(recording.steps()) == []
    assert len(recording.problems) == len(shapes)
    assert all("pip install 'esper-otel[zstd]'" in problem for problem in recording.problems)


def test_a_file_that_cannot_be_read_is_told_beside_those_that_can(tmp_path):
    (tmp_path / "good").write_bytes(FORMATS["proto"](WHOLE))
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden").write_bytes(b"not read")
    (tmp_path / "run-rank0.traces.otlp").write_bytes(b"not read either")
    assert len(frames_in(tmp_path)) == 5


def test_nothing_there_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        RecordedRuns(tmp_path / "nowhere")
