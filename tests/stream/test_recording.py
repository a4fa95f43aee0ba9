"""Files of OTLP: the Collector's format, read up to the bad place, nothing lost."""

from __future__ import annotations

import re
import struct
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import StepFrame
from esper_otel.stream import RecordingError, read_frames, read_recording
from esper_otel.stream.destination import Signal
from esper_otel.stream.encoding import encode_end
from esper_otel.stream.recording import LONGEST_RUN, Recording, framed, stem
from sidecar.frames_made import otlp_of

M, T = Signal.METRICS, Signal.TRACES


def test_a_request_lies_behind_its_size_most_significant_byte_first():
    # As the Collector's file exporter writes with "format: proto".
    assert framed(b"abc") == struct.pack(">I", 3) + b"abc"


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=10))
def test_what_is_recorded_is_read(tmp_path_factory, bodies):
    folder = tmp_path_factory.mktemp("recording")
    recording = Recording(folder, "run")
    for body in bodies:
        recording.append(M, body)
    recording.close()
    assert [body for path in recording.paths for body in read_recording(path)] == bodies


def test_each_signal_has_its_file_and_each_attempt_its_own(tmp_path, caplog):
    folder = tmp_path / "deep" / "down"
    for body in (b"1", b"2", b"3"):
        recording = Recording(folder, "run-rank0")
        recording.append(T, b"t" + body)
        recording.append(M, b"m" + body)
        recording.append(M, b"more")
        recording.close()
    for number, name in enumerate(("run-rank0", "run-rank0-attempt2", "run-rank0-attempt3"), 1):
        told = [f"m{number}".encode(), b"more"]
        assert list(read_recording(folder / f"{name}.metrics.otlp")) == told
        assert list(read_recording(folder / f"{name}.traces.otlp")) == [f"t{number}".encode()]
    assert [record.message for record in caplog.records] == [
        f"run-rank0 has been recorded in {folder} before; this is attempt {number}, "
        f"recorded as run-rank0-attempt{number}"
        for number in (2, 3)
    ]


def test_two_that_record_one_run_at_once_share_no_file(tmp_path):
    both = [Recording(tmp_path, "run-rank0") for _ in range(2)]
    for place in (0, 1, 0):
        both[place].append(M, b"of %d" % place)
    for recording in both:
        recording.close()
    assert [list(read_recording(each.paths[0])) for each in both] == [
        [b"of 0", b"of 0"],
        [b"of 1"],
    ]


def test_a_file_of_any_signal_is_enough_for_another_attempt(tmp_path):
    (tmp_path / "run.logs.otlp").write_bytes(framed(b"kept"))
    recording = Recording(tmp_path, "run")
    recording.append(Signal.LOGS, b"new")
    recording.close()
    assert (tmp_path / "run.logs.otlp").read_bytes() == framed(b"kept")
    assert list(read_recording(tmp_path / "run-attempt2.logs.otlp")) == [b"new"]


def test_custom_values_are_in_the_frames_and_those_behind_the_last_step_too(tmp_path):
    made = StepFrame("run", "one", 0, 1, 7, {"step": 1.0, "custom.kl": 0.5})
    end = StepFrame(
        "run", "one", 0, 1, 9, {"custom.val_loss": 0.25}, ended=RunEnd(HowEnded.DONE)
    )
    path = tmp_path / "run.metrics.otlp"
    bodies = [otlp_of(made).SerializeToString(), encode_end(end, b"")]
    path.write_bytes(b"".join(map(framed, bodies)))
    assert [(each.step, each.values) for each in read_frames(path)] == [
        (1, {"step": 1.0, "custom.kl": 0.5}),
        (1, {"step": 1.0, "custom.val_loss": 0.25}),
    ]


@pytest.mark.parametrize(
    ("tail", "problem"),
    [
        (b"\x00\x00", "ends inside a size"),
        (b"\x00\x00\x00\x09half", "9 bytes has only 4"),
        (b"#!/bin/sh\n", "expected the size of a request"),
        (bytes(40), "expected the size of a request"),
    ],
)
def test_a_bad_file_is_read_up_to_the_bad_place(tmp_path, tail, problem):
    path = tmp_path / "run.metrics.otlp"
    path.write_bytes(framed(b"good") + tail)
    read = []
    with pytest.raises(RecordingError, match=problem) as caught:
        read.extend(read_recording(path))
    assert caught.value.offset == 8
    assert str(path) in str(caught.value)
    bodies = read_recording(path)
    assert next(bodies) == b"good"


def test_an_empty_file_holds_nothing(tmp_path):
    path = tmp_path / "run.metrics.otlp"
    path.touch()
    assert list(read_recording(path)) == []


def test_a_metrics_file_that_holds_something_else_is_named_with_its_place(tmp_path):
    path = tmp_path / "run.metrics.otlp"
    path.write_bytes(framed(b"\x0a\x00") + framed(b"\xff\xff"))
    with pytest.raises(RecordingError, match="byte 6: not an OTLP metrics request"):
        list(read_frames(path))


def test_what_is_no_number_and_what_is_no_step_is_passed_over(tmp_path):
    told = {}
    for step in (1.0, nan, inf, -1.0, 2.0**60):
        told[step] = StepFrame(
            "run", "one", 0, 0, 1, {"step": step, "loss": nan, "accuracy": 1.0}
        )
    path = tmp_path / "run.metrics.otlp"
    path.write_bytes(
        b"".join(framed(otlp_of(each).SerializeToString()) for each in told.values())
    )
    found = list(read_frames(path))
    assert [(each.step, each.values) for each in found] == [(1, {"step": 1.0, "accuracy": 1.0})]


def test_a_disk_that_fails_ends_the_recording_with_one_warning(tmp_path, caplog):
    (tmp_path / "file").touch()
    recording = Recording(tmp_path / "file", "run")
    for _ in range(3):
        recording.append(M, b"body")
    recording.close()
    assert caplog.text.count("recording to") == 1
    assert recording.paths == ()


@pytest.mark.parametrize("run", ["plain-1.0_x", "x" * LONGEST_RUN])
def test_a_runs_name_is_that_of_its_files_where_it_can_be(run):
    assert stem(run, 3) == f"{run}-rank3"
    assert stem(run, 3, 77) == f"{run}-rank3-77"


@pytest.mark.parametrize(
    ("run", "begins"),
    [
        ("../../etc/pass wd", "_.._etc_pass_wd-"),
        ("naïve/ü", "na_ve__-"),
        ("a\nb\x1b[2J", "a_b__2J-"),
        ("\udcff", "_-"),
        ("", "-"),
        ("x" * (LONGEST_RUN + 1), "xxxx"),
        ("x" * 5000, "xxxx"),
    ],
)
def test_another_name_makes_a_harmless_and_short_file_name_of_its_own(run, begins):
    name = stem(run, 3)
    assert name.startswith(begins)
    assert name.endswith("-rank3")
    assert len(name) <= LONGEST_RUN + len("-rank3")
    assert re.fullmatch(r"[\w.-]+", name, re.ASCII)


def test_names_that_would_become_one_stay_two(tmp_path):
    runs = ["a/b", "a_b", "a:b", "x" * 300, "x" * 301, ".a_b"]
    assert len({stem(run, 0) for run in runs}) == len(runs)
    recording = Recording(tmp_path, stem("ü" * 256, 12_345))
    recording.append(M, b"body")
    recording.close()
    assert [body for path in recording.paths for body in read_recording(path)] == [b"body"]
