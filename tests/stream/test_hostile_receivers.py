"""Receivers that answer without end, late, or with something else: none outlasts its time."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.status_pb2 import Status

from esper_otel.stream import redelivery
from esper_otel.stream.destination import Signal, destinations
from esper_otel.stream.sender import (
    LONGEST_ASKED_S,
    LONGEST_PAUSE_S,
    Backoff,
    Sender,
    Verdict,
    open_transport,
)
from esper_otel.stream.transport import one_line
from testkit.receiver import METRICS, Answer, GrpcReceiver, HttpReceiver

TIMEOUT_S = 0.5
PATIENCE_S = 10.0
"""A machine that is busy may let a request take longer than its time-out, not so much."""

OK = b"HTTP/1.1 200 OK\r\n"
RUDE = b"HTTP/1.1 400 \x1b]0;owned\x07\r\nContent-Length: 0\r\n\r\n"


class RawReceiver:
    """Takes a request and answers by ``answer(connection)``, on 127.0.0.1."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ended = threading.Event()
        self.requests = 0

    def __enter__(self) -> RawReceiver:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    self.requests += 1
                    self._answer(connection)
                    self._ended.wait(PATIENCE_S)


class FarAway:
    """Passes connections on to ``port``, and waits half a second before it begins."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve, daemon=True)]

    def __enter__(self) -> FarAway:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                self._ended.wait(0.5)
                far = socket.create_connection(("localhost", self._port))
                self._sockets.append(far)
                for ends in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pass, args=ends))
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)


def test_a_grpc_receiver_that_is_far_away_is_reached_at_the_first_attempt():
    with GrpcReceiver() as receiver, FarAway(receiver.port) as far:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": far.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }
        transport = open_transport(destinations(environ)[Signal.METRICS])
        outcome = transport.send(b"", PATIENCE_S)
        transport.close()
    assert outcome.verdict is Verdict.DELIVERED, outcome


def drip(first: bytes, again: bytes, every_s: float = 0.02):
    """Sends ``first`` and then ``again`` for ever."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(again)
            if every_s:
                time.sleep(every_s)

    return answer


def say(answer: bytes):
    return lambda connection: connection.sendall(answer)


ANSWERS = {
    "a status line that never ends": (drip(b"HTTP/1.1 200 ", b"a"), Verdict.RETRY),
    "headers that never end": (drip(OK, b"x: y\r\n"), Verdict.RETRY),
    "a header that never ends": (drip(OK + b"x: ", b"y"), Verdict.RETRY),
    "interim answers for ever": (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), Verdict.RETRY),
    "interim answers, fast": (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0), Verdict.RETRY),
    "no answer": (lambda connection: None, Verdict.RETRY),
    "bytes that are no HTTP": (say(b"\x15\x03\x01\x00\x02\x02\x16\r\n\r\n"), Verdict.RETRY),
    "a status that is none": (say(b"HTTP/1.1 999999 no\r\n\r\n"), Verdict.RETRY),
    "a body byte by byte": (
        drip(OK + b"Content-Length: 60000\r\n\r\n", b"x"),
        Verdict.DELIVERED,
    ),
    "a body without end, fast": (drip(OK + b"\r\n", b"x" * 65536, 0), Verdict.DELIVERED),
    "chunks without end": (
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        Verdict.DELIVERED,
    ),
    "a chunk of negative size": (
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 65536, 0),
        Verdict.DELIVERED,
    ),
    "a size of a chunk that never ends": (
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        Verdict.DELIVERED,
    ),
    "trailers without end": (
        drip(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
        Verdict.DELIVERED,
    ),
    "a refusal byte by byte": (
        drip(b"HTTP/1.1 503 no\r\nContent-Length: 60000\r\n\r\n", b"x"),
        Verdict.RETRY,
    ),
    "HTML": (
        say(OK + b"Content-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"),
        Verdict.DELIVERED,
    ),
    "a redirect to itself": (
        say(b"HTTP/1.1 307 again\r\nLocation: /v1/metrics\r\nContent-Length: 0\r\n\r\n"),
        Verdict.REFUSED,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_waited_for_within_the_time_of_its_request(name):
    answer, verdict = ANSWERS[name]
    with RawReceiver(answer) as receiver:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        transport = open_transport(destinations(environ)[Signal.METRICS])
        began = time.monotonic()
        outcome = transport.send(b"\x0a\x00", TIMEOUT_S)
        took_s = time.monotonic() - began
        transport.close()
    assert outcome.verdict is verdict, outcome
    assert took_s < TIMEOUT_S + PATIENCE_S / 2
    assert receiver.requests == 1  # a redirect is not followed
    assert len(outcome.reason) < 500


def test_after_an_answer_that_broke_off_the_next_request_has_its_own():
    answers = [drip(OK + b"Content-Length: 60000\r\n\r\n", b"x"), say(OK + b"\r\n")]
    with RawReceiver(lambda connection: answers.pop(0)(connection)) as receiver:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        transport = open_transport(destinations(environ)[Signal.METRICS])
        assert transport.send(b"\x0a\x00", TIMEOUT_S).verdict is Verdict.DELIVERED
        assert transport.send(b"\x0a\x00", TIMEOUT_S).verdict is not Verdict.REFUSED
        transport.close()


def test_a_page_instead_of_an_answer_is_told_of_once(open_stream, row, caplog, wait_until):
    with HttpReceiver() as http:
        http.answer = lambda request: Answer(
            200, {"Content-Type": "text/html"}, b"<html></html>"
        )
        stream = open_stream(http.url)
        for step in range(3):
            stream.frame(step, row(step))
            wait_until(lambda made=2 * (step + 1): stream.snapshot().metrics.delivered == made)
    assert caplog.text.count("an answer that is not OTLP") == 1


def test_what_a_receiver_says_cannot_write_on_a_terminal(open_stream, row, caplog):
    with RawReceiver(say(RUDE)) as receiver:
        stream = open_stream(receiver.url)
        stream.frame(1, row(1))
        stream.close()
    assert "HTTP 400 \ufffd]0;owned\ufffd" in caplog.text
    assert "\x1b" not in caplog.text
    assert one_line("\x1b]0;owned\x07 two\nlines") == "\ufffd]0;owned\ufffd two lines"
    assert len(one_line("x" * 10_000)) == 400


# Pauses that a receiver asks for.


@pytest.mark.parametrize(
    ("value", "least_s", "most_s"),
    [
        ("0", 0, LONGEST_PAUSE_S),
        ("7", 7, 7),
        ("3600", LONGEST_ASKED_S, LONGEST_ASKED_S),
        ("99999999999", LONGEST_ASKED_S, LONGEST_ASKED_S),
        ("1e300", LONGEST_ASKED_S, LONGEST_ASKED_S),
        ("-5", 0, LONGEST_PAUSE_S),
        ("-1e300", 0, LONGEST_PAUSE_S),
        ("nan", 0, LONGEST_PAUSE_S),
        ("inf", 0, LONGEST_PAUSE_S),
        ("", 0, LONGEST_PAUSE_S),
        ("soon", 0, LONGEST_PAUSE_S),
        ("9" * 5000, 0, LONGEST_PAUSE_S),
        ("Wed, 21 Oct 2099 07:28:00 GMT", LONGEST_ASKED_S, LONGEST_ASKED_S),
        ("Wed, 21 Oct 1999 07:28:00 GMT", 0, LONGEST_PAUSE_S),
        ("Fri, 31 Dec 9999 23:59:59 -0000", 0, LONGEST_ASKED_S),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0, LONGEST_PAUSE_S),
        ("99 Foo 99999999999 99:99:99", 0, LONGEST_PAUSE_S),
        (", , ,", 0, LONGEST_PAUSE_S),
    ],
)
def test_a_pause_is_granted_up_to_a_bound(value, least_s, most_s):
    with HttpReceiver() as http:
        http.answer = lambda request: Answer(429, {"Retry-After": value})
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}
        transport = open_transport(destinations(environ)[Signal.METRICS])
        outcome = transport.send(b"\x0a\x00", 5.0)
        transport.close()
    assert outcome.verdict is Verdict.RETRY
    assert least_s <= Backoff().pause_s(outcome.retry_after_s) <= most_s


@pytest.mark.parametrize("value", ["3600", "1e300", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_receiver_that_asked_for_too_much_is_tried_once_more_at_the_end(
    open_stream, row, value
):
    answers = [Answer(429, {"Retry-After": value})]
    with HttpReceiver() as http:
        http.answer = lambda request: answers.pop() if answers else Answer(200)
        stream = open_stream(http.url)
        stream.frame(1, row(1))
        while not http.inbox.attempts:
            time.sleep(0.005)
        stream.frame(2, row(2))
        assert stream.close().metrics.delivered == 4


@pytest.mark.parametrize("asked_s", [float("inf"), float("nan"), -1.0, 1e300])
def test_whatever_is_asked_for_is_a_pause_that_can_be_made(asked_s):
    assert 0 <= Backoff().pause_s(asked_s) <= LONGEST_ASKED_S


def test_details_of_grpc_that_are_none_are_passed_over():
    detail = Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff\xff")
    status = Status(code=14, details=[detail]).SerializeToString()
    assert grpc.StatusCode.UNAVAILABLE.value[0] == 14
    with GrpcReceiver() as receiver:
        receiver.answer = lambda request: Answer(
            "UNAVAILABLE", {"grpc-status-details-bin": status}
        )
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }
        transport = open_transport(destinations(environ)[Signal.METRICS])
        outcome = transport.send(b"\x0a\x00", 5.0)
        transport.close()
    assert outcome.verdict is Verdict.UNREACHABLE


# Faults of our own.


def test_a_fault_of_ours_while_sending_is_told_once_and_sending_goes_on(
    open_stream, row, caplog, wait_until, monkeypatch
):
    faults = [3]
    delivered = Sender._delivered

    def faulty(sender, group, outcome):
        if faults[0]:
            faults[0] -= 1
            raise ArithmeticError("ours")
        delivered(sender, group, outcome)

    monkeypatch.setattr(Sender, "_delivered", faulty)
    monkeypatch.setattr("esper_otel.stream.sender.LONGEST_PAUSE_S", 0.01)
    with HttpReceiver() as http:
        stream = open_stream(http.url, {"OTEL_TRACES_EXPORTER": "none"})
        stream.frame(1, row(1))
        wait_until(lambda: stream.snapshot().metrics.delivered == 2)
        assert http.inbox.attempts[METRICS] == 4
    assert caplog.text.count("failed in esper-otel itself") == 1


def test_a_fault_of_ours_while_draining_is_told_once_and_draining_goes_on(
    open_stream, row, caplog, wait_until, monkeypatch
):
    from esper_otel.stream.totals import RunTotals

    add = RunTotals.add
    with HttpReceiver() as http:
        stream = open_stream(http.url)

        def faulty(totals, *rows):
            if totals is stream.totals:  # a stream of another test may still be about to end
                raise ArithmeticError("ours")
            add(totals, *rows)

        monkeypatch.setattr(RunTotals, "add", faulty)
        for step in range(3):
            stream.frame(step, row(step))
            wait_until(lambda made=2 * (step + 1): stream.snapshot().metrics.delivered == made)
        stream.close()
    assert caplog.text.count("could not be turned into OTLP") == 1


def test_a_fault_of_ours_in_delivering_what_was_left_is_told_and_hurts_nobody(
    open_stream, row, caplog, wait_until, monkeypatch
):
    def faulty(*_: object) -> None:
        raise ArithmeticError("ours")

    monkeypatch.setattr(redelivery, "spool_files_in", faulty)
    caplog.set_level(logging.WARNING)
    with HttpReceiver() as http:
        stream = open_stream(http.url)
        wait_until(lambda: "could not be delivered" in caplog.text)
        stream.frame(1, row(1))
        assert stream.close().metrics.delivered == 2
