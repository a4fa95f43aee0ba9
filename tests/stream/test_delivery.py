"""Delivery over real sockets: both protocols, and everything a receiver may answer."""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
import subprocess
import threading
import time
from email.utils import formatdate
from shutil import which

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from esper_otel.leyline.frames import StepTimeline
from esper_otel.stream.destination import Signal, destinations
from esper_otel.stream.sender import Verdict, open_transport
from testkit.receiver import METRICS, TRACES, Answer, GrpcReceiver, HttpReceiver

PROTOCOLS = {"http/protobuf": HttpReceiver, "grpc": GrpcReceiver}


@pytest.fixture(params=PROTOCOLS)
def receiver(request):
    with PROTOCOLS[request.param]() as receiver:
        receiver.protocol = request.param
        yield receiver


@pytest.fixture
def http():
    with HttpReceiver() as receiver:
        yield receiver


def balances(report) -> bool:
    return all(
        account.produced == account.delivered + account.spooled + account.dropped
        for account in (report.metrics, report.traces)
    )


def send_one(receiver, timeout_s: float = 5.0, signal=Signal.METRICS, **environ: str):
    """The outcome of one request to ``receiver``."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": getattr(receiver, "protocol", "http/protobuf"),
        **environ,
    }
    transport = open_transport(destinations(environ)[signal])
    try:
        return transport.send(b"\x0a\x00", timeout_s)
    finally:
        transport.close()


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_every_step_and_span_arrives(receiver, compression, open_stream, row, seed):
    stream = open_stream(
        receiver.url,
        {
            "OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol,
            "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
        },
    )
    for step in range(200):
        stream.frame(1000 + step, row(step), [seed("s1")] if step % 2 else ())
        if step % 50 == 0:
            stream.timeline(StepTimeline(step, 1, 9, [("train.forward", 2, 3)], row(step)))
    report = stream.close()
    assert report.metrics.delivered == report.metrics.produced == 200 * 2 + 100 * 2
    assert report.traces.delivered == report.traces.produced == 8
    assert receiver.inbox.steps() == dict.fromkeys(range(200), 1)
    assert {point.time_unix_nano for _, point in receiver.inbox.points()} == set(
        range(1000, 1200)
    )
    assert len(receiver.inbox.spans()) == 8
    assert not report.files


def test_headers_reach_the_receiver(receiver):
    outcome = send_one(
        receiver, OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20token,x-tenant=a"
    )
    assert outcome.verdict is Verdict.DELIVERED
    (request,) = receiver.inbox.requests
    assert request.headers["authorization"] == "Bearer token"
    assert request.headers["x-tenant"] == "a"
    assert "esper-otel/" in request.headers["user-agent"]


def test_http_is_protobuf_on_one_connection(http, open_stream, row, wait_until):
    stream = open_stream(http.url, {"OTEL_TRACES_EXPORTER": "none"})
    for step in range(5):
        stream.frame(step, row(step))
        wait_until(lambda wanted=2 * (step + 1): stream.snapshot().metrics.delivered == wanted)
    assert http.connections == 1
    assert http.inbox.requests[0].headers["content-type"] == "application/x-protobuf"


def test_a_proxy_of_the_environment_is_used(http, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", http.url.replace("//", "//user:pa%20ss@"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.invalid:4318"}
    transport = open_transport(destinations(environ)[Signal.METRICS])
    assert transport.send(b"\x0a\x00", 5.0).verdict is Verdict.DELIVERED
    transport.close()
    (request,) = http.inbox.requests
    assert request.path == "http://collector.invalid:4318/v1/metrics"
    assert request.headers["host"] == "collector.invalid:4318"
    assert request.headers["proxy-authorization"] == "Basic dXNlcjpwYSBzcw=="
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert send_one(http).verdict is Verdict.DELIVERED
    assert http.inbox.requests[-1].path == METRICS


def test_user_and_password_of_a_url_become_a_header(http):
    endpoint = http.url.replace("//", "//user:secret@")
    assert send_one(http, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint).verdict is Verdict.DELIVERED
    assert http.inbox.requests[0].headers["authorization"] == "Basic dXNlcjpzZWNyZXQ="


@pytest.fixture
def connected(http):
    """A transport that has a connection to ``http``."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}
    transport = open_transport(destinations(environ)[Signal.METRICS])
    assert not transport.send_at_once(b"\x0a\x00"), "a connection would be waited for"
    assert transport.finish_begun(5.0).verdict is Verdict.DELIVERED
    yield transport
    transport.close()


def test_a_request_is_sent_at_once_and_its_answer_looked_at_later(http, connected, wait_until):
    for _ in range(3):
        assert connected.send_at_once(b"\x0a\x00")
        outcomes = []
        wait_until(lambda seen=outcomes: seen.append(connected.answer_at_once()) or seen[-1])
        assert outcomes[-1].verdict is Verdict.DELIVERED
    assert len(http.inbox.requests) == 4
    assert http.connections == 1


def test_an_answer_that_says_more_is_read_among_others(http, connected, wait_until):
    reasons = []
    for rejected in (0, 0, 3, 3, 0):
        partial = ExportMetricsPartialSuccess(
            rejected_data_points=rejected, error_message="why"
        )
        more = ExportMetricsServiceResponse(partial_success=partial if rejected else None)
        body = more.SerializeToString()
        http.answer = lambda request, body=body: Answer(200, {}, body)
        assert connected.send_at_once(b"\x0a\x00")
        outcomes = []
        wait_until(lambda seen=outcomes: seen.append(connected.answer_at_once()) or seen[-1])
        reasons.append((outcomes[-1].rejected, outcomes[-1].reason))
    assert reasons == [(0, ""), (0, ""), (3, "why"), (3, "why"), (0, "")]


def test_what_the_kernel_has_no_room_for_is_finished_later(http, connected):
    body = b"".join((b"\x0a\x00",) * (8 << 20))
    assert not connected.send_at_once(body)
    assert connected.finish_begun(30.0).verdict is Verdict.DELIVERED
    assert http.inbox.requests[-1].body == body


def test_any_answer_but_a_delivery_is_left_to_who_may_wait(http, connected, wait_until):
    http.answer = lambda request: Answer(503, {"Retry-After": "7"})
    assert connected.send_at_once(b"\x0a\x00")
    wait_until(lambda: connected.answer_at_once() is None and connected._begun)
    outcome = connected.finish_begun(5.0)
    assert (outcome.verdict, outcome.retry_after_s) == (Verdict.RETRY, 7.0)
    assert connected.send_at_once(b"\x0a\x00")
    http.stop()
    assert connected.finish_begun(5.0).verdict is Verdict.RETRY
    assert not connected.send_at_once(b"\x0a\x00")
    assert connected.finish_begun(5.0).verdict is Verdict.UNREACHABLE


def test_a_healthy_receiver_needs_no_thread_but_the_one_that_drains(
    http, open_stream, row, wait_until, monkeypatch
):
    stream = open_stream(http.url)
    stream.frame(1, row(1))
    wait_until(lambda: stream.snapshot().metrics.delivered == 2)
    threads, deliver = set(), stream._spool.deliver

    def noted(group, rejected=0):
        threads.add(threading.current_thread().name)
        deliver(group, rejected)

    monkeypatch.setattr(stream._spool, "deliver", noted)
    steps = itertools.count(2)
    # A receiver that is late for once, on a busy machine, is waited for by another thread.
    wait_until(lambda: stream.frame(next(steps), row(2)) or "esper-stream" in threads)


def test_a_connection_that_the_receiver_closed_meanwhile_is_made_anew(http):
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.url}
    transport = open_transport(destinations(environ)[Signal.METRICS])
    for _ in range(3):
        assert transport.send(b"\x0a\x00", 5.0).verdict is Verdict.DELIVERED
        http.stop()
        http.start()
    transport.close()
    assert len(http.inbox.requests) == 3


HTTP_ANSWERS = [
    (200, Verdict.DELIVERED),
    (202, Verdict.DELIVERED),
    (301, Verdict.REFUSED),
    (400, Verdict.REFUSED),
    (401, Verdict.REFUSED),
    (404, Verdict.UNSUPPORTED),
    (413, Verdict.REFUSED),
    (429, Verdict.RETRY),
    (500, Verdict.REFUSED),
    (501, Verdict.UNSUPPORTED),
    (502, Verdict.RETRY),
    (503, Verdict.RETRY),
    (504, Verdict.RETRY),
]


@pytest.mark.parametrize(("status", "verdict"), HTTP_ANSWERS)
def test_what_an_http_status_means(http, status, verdict):
    http.answer = lambda request: Answer(status)
    outcome = send_one(http)
    assert outcome.verdict is verdict
    assert (str(status) in outcome.reason) is (verdict is not Verdict.DELIVERED)


@pytest.mark.parametrize(("value", "seconds"), [("7", 7.0), ("later", None), ("inf", None)])
def test_retry_after_in_seconds_is_read(http, value, seconds):
    http.answer = lambda request: Answer(503, {"Retry-After": value})
    assert send_one(http).retry_after_s == seconds


@pytest.mark.parametrize("ahead_s", [60, -60])
def test_retry_after_as_a_date_is_read(http, ahead_s):
    date = formatdate(time.time() + ahead_s, usegmt=True)
    http.answer = lambda request: Answer(503, {"Retry-After": date})
    assert send_one(http).retry_after_s == pytest.approx(max(ahead_s, 0), abs=5)


def retry_info(seconds: int, code: str) -> Answer:
    detail = Any()
    detail.Pack(RetryInfo(retry_delay=Duration(seconds=seconds)))
    number = grpc.StatusCode[code].value[0]
    status = Status(code=number, message="as told", details=[detail])
    return Answer(code, {"grpc-status-details-bin": status.SerializeToString()})


GRPC_ANSWERS = [
    (Answer("OK"), Verdict.DELIVERED, None),
    (Answer("CANCELLED"), Verdict.RETRY, None),
    (Answer("DEADLINE_EXCEEDED"), Verdict.RETRY, None),
    (Answer("ABORTED"), Verdict.RETRY, None),
    (Answer("OUT_OF_RANGE"), Verdict.RETRY, None),
    (Answer("DATA_LOSS"), Verdict.RETRY, None),
    (Answer("UNAVAILABLE"), Verdict.UNREACHABLE, None),
    (retry_info(3, "UNAVAILABLE"), Verdict.RETRY, 3.0),
    (Answer("RESOURCE_EXHAUSTED"), Verdict.REFUSED, None),
    (retry_info(4, "RESOURCE_EXHAUSTED"), Verdict.RETRY, 4.0),
    (Answer("INVALID_ARGUMENT"), Verdict.REFUSED, None),
    (Answer("UNAUTHENTICATED"), Verdict.REFUSED, None),
    (Answer("INTERNAL"), Verdict.REFUSED, None),
    (Answer("UNIMPLEMENTED"), Verdict.UNSUPPORTED, None),
]


@pytest.mark.parametrize(("answer", "verdict", "after"), GRPC_ANSWERS)
def test_what_a_grpc_status_means(answer, verdict, after):
    with GrpcReceiver() as receiver:
        receiver.protocol = "grpc"
        receiver.answer = lambda request: answer
        outcome = send_one(receiver)
    assert (outcome.verdict, outcome.retry_after_s) == (verdict, after)


def test_a_partial_success_is_counted_and_not_sent_again(receiver, open_stream, row, caplog):
    body = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(
            rejected_data_points=1, error_message="too old"
        )
    ).SerializeToString()
    status = 200 if receiver.protocol != "grpc" else "OK"
    receiver.answer = lambda request: Answer(status, {}, body)
    stream = open_stream(receiver.url, {"OTEL_EXPORTER_OTLP_PROTOCOL": receiver.protocol})
    stream.frame(1, row(1))
    report = stream.close()
    assert (report.metrics.delivered, report.metrics.dropped) == (1, 1)
    assert receiver.inbox.attempts[METRICS] == 1
    assert caplog.text.count("too old") == 1


def test_no_answer_in_time_is_tried_again():
    # The kernel accepts the connection, nobody ever reads from it.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        transport = open_transport(destinations(environ)[Signal.METRICS])
        assert transport.send(b"", 0.1).verdict is Verdict.RETRY
        transport.close()


def test_an_answer_without_end_is_not_read_to_its_end(http):
    http.answer = lambda request: Answer(200, {}, bytes(50 << 20))
    assert send_one(http).verdict is Verdict.DELIVERED


def test_a_receiver_that_says_later_gets_it_later(http, open_stream, row, caplog, wait_until):
    answers = [Answer(429), Answer(503, {"Retry-After": "0"})]
    http.answer = lambda request: answers.pop() if answers else Answer(200)
    with caplog.at_level(logging.INFO, "esper_otel"):
        stream = open_stream(http.url)
        stream.frame(1, row(1))
        wait_until(lambda: stream.snapshot().metrics.delivered == 2)
    assert http.inbox.attempts[METRICS] == 3
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "delivered" in caplog.records[-1].getMessage()


def test_what_is_refused_for_good_is_dropped_counted_and_said_once(
    http, open_stream, row, caplog, wait_until
):
    http.answer = lambda request: Answer(400)
    stream = open_stream(http.url)
    for step in range(3):
        stream.frame(step, row(step))
        wait_until(lambda wanted=2 * (step + 1): stream.snapshot().metrics.refused == wanted)
    http.answer = lambda request: Answer(200)
    stream.frame(9, row(9))
    report = stream.close()
    assert (report.metrics.delivered, report.metrics.dropped) == (2, 6)
    assert caplog.text.count("HTTP 400") == 1


@pytest.mark.parametrize("answer", [Answer(404), Answer(501)])
def test_a_receiver_without_traces_gets_no_more_of_them(
    http, open_stream, row, caplog, answer, wait_until
):
    http.answer = lambda request: answer if request.path == TRACES else Answer(200)
    caplog.set_level(logging.INFO, "esper_otel")
    stream = open_stream(http.url)
    timeline = StepTimeline(1, 1, 9, [("train.forward", 2, 3)])
    stream.timeline(timeline)
    wait_until(lambda: stream.snapshot().traces.refused == 2)
    for step in range(5):
        stream.frame(step, row(step))
        stream.timeline(timeline)
    report = stream.close()
    assert report.metrics.delivered == 10
    assert report.traces.dropped == report.traces.refused == report.traces.produced == 2
    assert http.inbox.attempts[TRACES] == 1
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "does not accept traces" in caplog.text


def test_nothing_listening_is_said_once_in_a_run(open_stream, row, caplog, wait_until):
    caplog.set_level(logging.INFO, "esper_otel")
    receiver = HttpReceiver().start()
    receiver.stop()
    stream = open_stream(receiver.url)
    timeline = StepTimeline(1, 1, 9, [])
    for step in range(3):
        stream.frame(step, row(step))
        stream.timeline(timeline)
    wait_until(lambda: "cannot be delivered" in caplog.text)
    receiver.start()
    wait_until(lambda: "delivered to" in caplog.text and "again" in caplog.text)
    wait_until(lambda: stream.snapshot().metrics.delivered == 6)
    receiver.stop()
    stream.frame(4, row(4))
    wait_until(lambda: stream.snapshot().metrics.spooled == 2)
    report = stream.close()
    receiver.start()
    receiver.stop()
    assert balances(report)
    outages = [r for r in caplog.records if "cannot be delivered" in r.getMessage()]
    assert [record.levelname for record in outages] == ["WARNING"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_outage_costs_nothing_but_time(protocol, open_stream, row, wait_until):
    receiver = PROTOCOLS[protocol]().start()
    stream = open_stream(receiver.url, {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol})

    def train(steps: range) -> None:
        for step in steps:
            stream.frame(step, row(step))

    train(range(100))
    wait_until(lambda: stream.snapshot().metrics.delivered == 200)
    receiver.stop()
    train(range(100, 200))
    wait_until(lambda: stream.snapshot().metrics.spooled == 200)
    assert balances(stream.snapshot())
    receiver.start()
    train(range(200, 300))
    wait_until(lambda: stream.snapshot().metrics.delivered == 600)
    report = stream.close()
    receiver.stop()
    assert (report.metrics.dropped, report.metrics.spooled) == (0, 0)
    assert set(receiver.inbox.steps()) == set(range(300))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(certificate, key) of localhost, signed by itself."""
    if which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(cert), "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def tls_receiver(protocol: str, certificate, ask_client: bool):
    cert, key = certificate
    if protocol == "grpc":
        pair = (key.read_bytes(), cert.read_bytes())
        client_ca = cert.read_bytes() if ask_client else None
        return GrpcReceiver(
            credentials=grpc.ssl_server_credentials([pair], client_ca, ask_client)
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    if ask_client:
        context.load_verify_locations(cert)
        context.verify_mode = ssl.CERT_REQUIRED
    return HttpReceiver(tls=context)


@pytest.mark.parametrize("ask_client", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tls_with_a_certificate_of_ones_own(protocol, certificate, ask_client):
    cert, key = map(str, certificate)
    environ = {"OTEL_EXPORTER_OTLP_CERTIFICATE": cert}
    if ask_client:
        environ["OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"] = cert
        environ["OTEL_EXPORTER_OTLP_CLIENT_KEY"] = key
    with tls_receiver(protocol, certificate, ask_client) as receiver:
        receiver.protocol = protocol
        assert send_one(receiver, **environ).verdict is Verdict.DELIVERED


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_certificate_nobody_knows_is_not_trusted(protocol, certificate):
    with tls_receiver(protocol, certificate, False) as receiver:
        receiver.protocol = protocol
        outcome = send_one(receiver)
        assert outcome.verdict is Verdict.UNREACHABLE
        assert receiver.inbox.requests == []
    assert "certificate" in outcome.reason.lower()


@pytest.mark.parametrize(
    "environ",
    [
        {"OTEL_METRICS_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_a_signal_switched_off_is_not_sent(http, open_stream, row, environ):
    stream = open_stream(http.url, environ)
    stream.frame(1, row(1))
    stream.timeline(StepTimeline(1, 1, 9, []))
    report = stream.close()
    off = METRICS if "OTEL_METRICS_EXPORTER" in environ else TRACES
    assert http.inbox.attempts[off] == 0
    assert sum(http.inbox.attempts.values()) == 1
    assert balances(report)
