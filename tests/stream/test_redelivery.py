"""Resending files: all of it arrives or stays, and nothing unreadable is thrown away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel.leyline.frames import StepTimeline
from esper_otel.stream import read_recording, resend
from esper_otel.stream.over_http import HttpTransport
from esper_otel.stream.recording import framed
from esper_otel.stream.redelivery import ATTEMPTS
from testkit.patience import PATIENCE_S
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


def test_what_lies_in_one_file_travels_in_one_request(left, http):
    bodies = list(read_recording(left[0]))
    assert send(left[:1], http).is_complete
    assert [request.body for request in http.inbox.requests] == [b"".join(bodies)]


def test_only_what_was_not_delivered_is_kept(left, http):
    bodies = list(read_recording(left[0]))
    assert len(bodies) == 3
    http.answer = lambda request: Answer(400 if bodies[1] in request.body else 200)
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
    answered = []

    def answer(request):
        answered.append(request)
        return Answer(200 if len(answered) == 1 else 503)

    http.answer = answer

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resend(left, {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}, sleep=interrupt)
    assert [path.exists() for path in left] == [False, True]
    http.answer = lambda request: Answer(200)
    assert send(left[1:], http).is_complete
    assert http.inbox.steps() == dict.fromkeys(range(30), 1)
    assert len(http.inbox.spans()) == 2


def test_every_cut_of_a_spool_file_leaves_what_is_before_it(left, http):
    whole = left[0].read_bytes()
    bodies = list(read_recording(left[0]))
    ends = [sum(len(framed(body)) for body in bodies[:count]) for count in range(4)]
    cuts = {place for end in ends for place in (end - 1, end, end + 1, end + 4, end + 5)}
    for cut in sorted(cuts & set(range(len(whole)))):
        left[0].write_bytes(whole[:cut])
        http.inbox.requests.clear()
        report = send(left[:1], http)
        count = max(place for place in range(4) if ends[place] <= cut)
        assert report.is_complete
        assert report.files[0].cut_bytes == cut - ends[count]
        assert b"".join(request.body for request in http.inbox.requests) == b"".join(
            bodies[:count]
        )
        assert not left[0].exists()


@pytest.mark.parametrize("tail", [b"\x00\x00", b"\x00\x00\x01\x00short", framed(b"\xff\xff")])
def test_a_damaged_end_of_a_recording_stays_where_it_is(left, http, tail):
    path = left[0].rename(left[0].with_name("mine.metrics.otlp"))
    path.write_bytes(path.read_bytes() + tail)
    report = send([path], http)
    (file,) = report.files
    assert (file.delivered, file.kept) == (60, 0)
    assert f"{path}: byte " in file.problem
    assert path.read_bytes() == tail


def test_bytes_that_are_no_request_stay_in_a_spool_file_too(left, http):
    path = left[0]
    path.write_bytes(path.read_bytes() + bytes(40))
    (file,) = send([path], http).files
    assert (file.delivered, file.kept, file.cut_bytes) == (60, 0, 0)
    assert "expected the size of a request" in file.problem
    assert path.read_bytes() == bytes(40)


def test_more_rejected_than_there_was_is_all_of_it(left, http):
    partial = ExportMetricsPartialSuccess(rejected_data_points=1 << 40, error_message="all")
    body = ExportMetricsServiceResponse(partial_success=partial).SerializeToString()
    http.answer = lambda request: Answer(200, {}, body)
    (file,) = send(left[:1], http).files
    assert (file.delivered, file.rejected, file.kept) == (0, 60, 0)


def test_a_file_that_cannot_be_removed_is_told_of_and_counted(left, http, monkeypatch):
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        (file,) = send(left[:1], http).files
    assert file.delivered == 60
    assert "60 were delivered, and are still in it" in file.problem


def test_files_of_a_living_process_are_left_to_it(open_stream, row, wait_until, http, tmp_path):
    stream = open_stream("http://127.0.0.1:1")
    stream.frame(1, row(1))
    wait_until(lambda: list((tmp_path / "spool").glob("*.metrics.otlp")))
    (path,) = (tmp_path / "spool").glob("*.metrics.otlp")
    wait_until(lambda: path.stat().st_size)
    # Another process finds it locked, and so does this very one.
    done = subprocess.run(
        [sys.executable, "-m", "esper_otel", "resend", str(path)],
        env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert "another process uses it" in done.stderr
    report = send([path], http)
    assert report.files[0].later
    assert "another process uses it" in report.files[0].problem
    assert http.inbox.requests == []
    (left,) = stream.close().files
    assert left == path
    assert send([path], http).is_complete
    assert http.inbox.steps() == {1: 1}
    assert list(path.parent.iterdir()) == []


def test_a_folder_stands_for_the_spool_files_in_it(left, http):
    command = [sys.executable, "-m", "esper_otel", "resend", str(left[0].parent)]
    environ = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    assert http.inbox.steps() == dict.fromkeys(range(30), 1)
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (0, f"{left[0].parent}: nothing to deliver\n")


def test_the_next_start_of_the_run_delivers_what_the_last_has_left(
    left, http, open_stream, row, wait_until
):
    stranger = left[0].with_name(left[0].name.replace("run-rank0", "run-rank1"))
    stranger.write_bytes(left[0].read_bytes())
    stream = open_stream(http.url)
    stream.frame(1, row(100))
    wait_until(lambda: not any(path.exists() for path in left))
    stream.close()
    assert http.inbox.steps() == dict.fromkeys([*range(30), 100], 1)
    assert len(http.inbox.spans()) == 2
    # A file's lock goes behind the file.
    wait_until(lambda: list(stranger.parent.iterdir()) == [stranger])


def test_what_was_to_take_a_files_place_goes_with_it(left, http):
    # As a process leaves it that was killed between writing and renaming.
    part = left[0].with_name(left[0].name + ".part")
    part.write_bytes(left[0].read_bytes())
    assert send(left, http).is_complete
    assert list(part.parent.iterdir()) == []


def test_a_transport_that_raises_is_a_receiver_that_is_away(left, http, monkeypatch):
    def faulty(*_: object) -> None:
        raise ArithmeticError("ours")

    monkeypatch.setattr(HttpTransport, "send", faulty)
    (file,) = send(left[:1], http).files
    assert (file.delivered, file.kept, file.later) == (0, 60, True)


def test_the_next_start_waits_for_the_receiver(left, open_stream, wait_until):
    with HttpReceiver() as receiver:
        pass
    stream = open_stream(receiver.url)
    with HttpReceiver(receiver.port) as receiver:
        wait_until(lambda: len(receiver.inbox.steps()) == 30)
        wait_until(lambda: not any(path.exists() for path in left))
        stream.close()
        assert receiver.inbox.steps() == dict.fromkeys(range(30), 1)


def test_a_next_start_that_is_refused_goes_on_and_leaves_the_file(
    left, http, open_stream, row, wait_until, caplog
):
    http.answer = lambda request: Answer(400)
    stream = open_stream(http.url)
    wait_until(lambda: "telemetry of an earlier process" in caplog.text)
    http.answer = lambda request: Answer(200)
    stream.frame(1, row(100))
    assert stream.close().metrics.delivered == 2
    assert left[0].exists()


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
