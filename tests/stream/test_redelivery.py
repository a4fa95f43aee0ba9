"""Resending files: all of it arrives or stays, and nothing unreadable is thrown away."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_otel.leyline.frames import StepTimeline
from esper_otel.stream import read_recording, resend
from esper_otel.stream.recording import framed
from esper_otel.stream.redelivery import ATTEMPTS
from testkit.receiver import METRICS, Answer, HttpReceiver


@pytest.fixture
def http():
    with HttpReceiver() as receiver:
        yield receiver


@pytest.fixture
def left(open_stream, row, wait_until) -> list[Path]:
    """Files of a run that nobody listened to: 30 steps in three requests, one trace."""
    stream = open_stream("http://127.0.0.1:1")
    for step in range(30):
        stream.frame(step + 1, row(step))
        if step % 10 == 9:
            wait_until(lambda made=2 * (step + 1): stream.snapshot().metrics.produced == made)
    stream.timeline(StepTimeline(1, 1, 9, [("train.forward", 2, 3)]))
    files = sorted(stream.close().files)
    assert len(files) == 2
    return files


def send(files, receiver, pauses=None):
    pauses = [] if pauses is None else pauses
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
    return resend(files, environ, sleep=pauses.append)


def test_what_was_left_is_delivered_and_the_files_go(left, http):
    report = send(left, http)
    assert report.is_complete
    assert [(file.delivered, file.kept) for file in report.files] == [(60, 0), (2, 0)]
    assert set(http.inbox.steps()) == set(range(30))
    assert len(http.inbox.spans()) == 2
    assert not any(path.exists() for path in left)


def test_a_receiver_that_is_away_is_tried_a_few_times_and_the_file_stays(left):
    receiver = HttpReceiver().start()
    receiver.stop()
    before = left[0].read_bytes()
    pauses = []
    report = send(left[:1], receiver, pauses)
    assert not report.is_complete
    assert (report.files[0].delivered, report.files[0].kept) == (0, 60)
    assert "refused" in report.files[0].problem
    assert len(pauses) == ATTEMPTS - 1
    assert left[0].read_bytes() == before


def test_what_a_receiver_asks_to_wait_is_waited(left, http):
    answers = [Answer(503, {"Retry-After": "30"})]
    http.answer = lambda request: answers.pop() if answers else Answer(200)
    pauses = []
    assert send(left[:1], http, pauses).is_complete
    assert pauses == [30.0]


def test_only_what_was_not_delivered_is_kept(left, http):
    bodies = list(read_recording(left[0]))
    http.answer = lambda request: Answer(400 if request.body == bodies[1] else 200)
    report = send(left[:1], http)
    (file,) = report.files
    assert 0 < file.delivered < 60
    assert file.delivered + file.kept == 60
    assert "HTTP 400" in file.problem
    assert list(read_recording(left[0])) == bodies[1:]
    http.answer = lambda request: Answer(200)
    assert send(left[:1], http).is_complete
    assert http.inbox.steps() == dict.fromkeys(range(30), 1)


def test_an_interrupted_resend_keeps_what_was_not_delivered(left, http):
    bodies = list(read_recording(left[0]))
    answered = []

    def answer(request):
        answered.append(request)
        return Answer(200 if len(answered) == 1 else 503)

    http.answer = answer

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resend(left[:1], {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}, sleep=interrupt)
    assert list(read_recording(left[0])) == bodies[1:]


@pytest.mark.parametrize("tail", [b"\x00\x00", b"\x00\x00\x01\x00short", framed(b"\xff\xff")])
def test_a_damaged_end_stays_where_it_is(left, http, tail):
    path = left[0]
    path.write_bytes(path.read_bytes() + tail)
    report = send([path], http)
    (file,) = report.files
    assert (file.delivered, file.kept) == (60, 0)
    assert f"{path}: byte " in file.problem
    assert path.read_bytes() == tail


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("run.metrics.otlp", b"", "the file is empty"),
        ("run.metrics.otlp", b"#!/bin/sh\necho\n", "byte 0: expected the size"),
        ("run.metrics.otlp", framed(b"what is this"), "byte 0: not an OTLP metrics request"),
        ("run.txt", b"text", "expected a file named *.metrics.otlp or *.traces.otlp"),
        ("absent.metrics.otlp", None, "No such file"),
    ],
)
def test_a_file_that_is_none_is_named_and_left_alone(tmp_path, http, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    report = send([path], http)
    assert not report.is_complete
    assert str(path) in report.files[0].problem
    assert problem in report.files[0].problem
    assert (path.read_bytes() if content is not None else None) == content
    assert http.inbox.attempts[METRICS] == 0


def test_a_traces_file_under_the_name_of_metrics_is_not_sent(left, http):
    wrong = left[1].with_name("renamed.metrics.otlp")
    left[1].rename(wrong)
    report = send([wrong], http)
    assert "not an OTLP metrics request" in report.files[0].problem
    assert wrong.exists()


def test_a_signal_that_is_switched_off_is_not_resent(left, http):
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url, "OTEL_METRICS_EXPORTER": "none"}
    report = resend(left[:1], environ)
    assert "OTEL_METRICS_EXPORTER=none" in report.files[0].problem
    assert left[0].exists()
