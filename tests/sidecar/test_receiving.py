"""OTLP over HTTP and gRPC into a real sidecar, and what happens when its receiver dies."""

import gzip
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from http.client import HTTPConnection
from types import SimpleNamespace

import grpc
import msgspec
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceStub,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from esper_tamiyo.latency import SLICE_NS
from esper_tamiyo.receiving.intake import MAX_REQUEST, PIPE_BACKLOG
from esper_tamiyo.serving.server import FRAMES_PER_TURN, Server
from sidecar.frames_made import add_point, frame, otlp_of
from sidecar.running import PATIENCE_S, is_alive, sidecar, tamiyo, until

PROTOBUF = "application/x-protobuf"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "t.sock"
    with sidecar(path, "--table", "prototype", ingest=True) as running:
        yield running


def post(running, body, *, path="/v1/metrics", method="POST", **headers):
    """(status, content type, body, headers) of one HTTP request."""
    connection = HTTPConnection(running.words["otlp_http"], timeout=PATIENCE_S)
    try:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Content-Type": PROTOBUF} | headers)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), response.read(), response
    finally:
        connection.close()


def export(running, data, **options):
    """One gRPC export of raw bytes."""
    with grpc.insecure_channel(running.words["otlp_grpc"]) as channel:
        call = channel.unary_unary(
            "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
            request_serializer=None,
            response_deserializer=None,
        )
        return call(data, timeout=PATIENCE_S, **options)


def judged(running, run):
    """The decision about step 1 of a run, once there is one."""

    def latest():
        with running.client() as client:
            decision = client.latest(run)
            return decision if decision and decision.step == 1 else None

    return until(latest)


def spike(run):
    return otlp_of(frame(0, run=run), frame(1, run=run, loss_delta=0.5))


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_http(shared, encoding):
    body = spike(f"http-{encoding}").SerializeToString()
    body = gzip.compress(body, mtime=0) if encoding == "gzip" else body
    status, kind, answer, _ = post(shared, body, Content_Encoding=encoding)
    assert (status, kind, answer) == (200, PROTOBUF, b"")
    until(lambda: shared.status()["ingest_lag_ms"]["p50_at_most"])
    decision = judged(shared, f"http-{encoding}")
    assert (decision.step, decision.reason) == (1, "loss_spike")


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_grpc(shared, compression):
    run = f"grpc-{compression.name}"
    with grpc.insecure_channel(shared.words["otlp_grpc"]) as channel:
        answer = MetricsServiceStub(channel).Export(
            spike(run), timeout=PATIENCE_S, compression=compression
        )
    assert answer == ExportMetricsServiceResponse()
    assert judged(shared, run).reason == "loss_spike"


def test_points_that_cannot_be_used_are_reported_and_all_are_counted(shared):
    def counts():
        ingest = shared.status()["ingest"]
        return [ingest[f"points_{fate}"] for fate in ("used", "foreign", "unusable")]

    request = otlp_of(frame(0, run="partial", loss=1.0))
    scope = request.resource_metrics[0].scope_metrics[0]
    add_point(scope, "accuracy", 999, 1.0)
    add_point(scope, "somebody.else", 1, 1.0)
    before = counts()
    _, _, body, _ = post(shared, request.SerializeToString())
    partial = ExportMetricsServiceResponse.FromString(body).partial_success
    assert partial.rejected_data_points == 1
    assert "tolaria.step" in partial.error_message
    expected = [before[0] + 2, before[1] + 1, before[2] + 1]
    until(lambda: counts() == expected)


BOMB = gzip.compress(bytes(MAX_REQUEST + 1), mtime=0)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\xff\xff\xff", {}, 400),
        (b"", {}, 200),
        (b"not gzip", {"Content_Encoding": "gzip"}, 400),
        (gzip.compress(b"abc" * 100, mtime=0)[:-9], {"Content_Encoding": "gzip"}, 400),
        (b"{}", {"Content_Type": "application/json"}, 415),
        (b"x", {"Content_Encoding": "br"}, 415),
        (bytes(MAX_REQUEST + 2), {}, 413),
        (BOMB, {"Content_Encoding": "gzip"}, 413),
        (b"", {"path": "/v1/traces"}, 404),
        (b"", {"path": "/"}, 404),
        (None, {"method": "GET"}, 405),
    ],
)
def test_http_refuses_what_it_cannot_take(shared, body, headers, status):
    assert post(shared, body, **headers)[0] == status
    run = f"after-{status}-{len(body or b'')}"
    assert post(shared, spike(run).SerializeToString())[0] == 200
    assert judged(shared, run).reason == "loss_spike"


def test_a_request_of_just_the_limit_is_taken(shared):
    run = "limit"
    request = spike(run)
    scope = request.resource_metrics[0].scope_metrics[0]
    metric = scope.metrics.add(name="big")
    metric.description = "x" * (MAX_REQUEST - len(request.SerializeToString()) - 20)
    metric.description += "x" * (MAX_REQUEST - len(request.SerializeToString()))
    data = request.SerializeToString()
    assert len(data) == MAX_REQUEST
    assert post(shared, data)[0] == 200
    assert export(shared, data) == b""


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", bytes(MAX_REQUEST + 1)], ids=["malformed", "too large"]
)
@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_grpc_refuses_what_it_cannot_take(shared, data, compression):
    with pytest.raises(grpc.RpcError) as caught:
        export(shared, data, compression=compression)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_traces_are_not_implemented(shared):
    with (
        grpc.insecure_channel(shared.words["otlp_grpc"]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        TraceServiceStub(channel).Export(ExportTraceServiceRequest(), timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_stream_and_asks_meet_in_one_sidecar(shared):
    """Fed twice, by ask and by stream, each step is judged once and decided the same."""
    frames = [
        frame(step, run="streamed", loss_delta=0.2 * (step % 7 == 3), grad_var=0.1 * step)
        for step in range(40)
    ]
    before = shared.status()["engine"]["frames"]
    with shared.client() as client:
        client.hello(run="asked")
        asked = [
            client.ask(one.step, **{k: v for k, v in one.values.items() if k != "step"})
            for one in frames
        ]
        for one, decision in zip(frames, asked, strict=True):
            # Of one time, those of ten seconds later would be too old, on a busy machine.
            one = msgspec.structs.replace(one, time_unix_nano=time.time_ns())
            post(shared, otlp_of(one).SerializeToString())
            streamed = until(
                lambda step=one.step: (
                    (latest := client.latest("streamed")) and latest.step == step and latest
                )
            )
            assert (streamed.action, streamed.reason, streamed.conservative) == (
                decision.action,
                decision.reason,
                decision.conservative,
            )
            assert streamed.findings == decision.findings
        client.hello(run="streamed")
        again = client.ask(39, loss_delta=0.0, grad_var=3.9)
        assert (again.reason, again.observed_step) == (asked[-1].reason, 39)
    after = shared.status()["engine"]["frames"]
    assert after["judged"] - before["judged"] == 80
    assert after["duplicate"] - before["duplicate"] == 1


def test_a_receiver_killed_is_started_again_at_the_same_ports_while_asks_go_on(tmp_path):
    with sidecar(tmp_path / "t.sock", ingest=True) as running, running.client() as client:
        client.hello(run="asks")
        killed = client.status()["ingest"]["pid"]
        os.kill(killed, signal.SIGKILL)
        step = 0

        def restarted():
            nonlocal step
            step += 1
            assert client.ask(step).reason in ("warming_up", "nominal")
            ingest = client.status()["ingest"]
            return ingest["restarts"] == 1 and ingest["listening"] and ingest

        ingest = until(restarted)
        assert ingest["pid"] != killed
        assert ingest["otlp_http"] == running.words["otlp_http"]
        assert post(running, spike("after").SerializeToString())[0] == 200
        assert judged(running, "after").step == 1
        pid = ingest["pid"]
    assert not is_alive(pid)


def test_where_the_system_has_no_room_for_a_receiver_asks_go_on_and_it_is_tried_again(
    tmp_path, capfd
):
    with sidecar(tmp_path / "t.sock", ingest=True) as running, running.client() as client:
        client.hello(run="asks")
        killed = client.status()["ingest"]["pid"]
        pid = running.process.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(killed, signal.SIGKILL)
        told = []

        def refused():
            told.append(capfd.readouterr().err)
            assert client.ask(len(told)).reason in ("warming_up", "nominal")
            return "the ingest process cannot start: [Errno 24]" in "".join(told)

        until(refused)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        until(lambda: client.status()["ingest"]["listening"])
        assert client.status()["ingest"]["restarts"] == 1


def test_the_receiver_does_not_outlive_a_sidecar_that_is_killed(tmp_path):
    path = tmp_path / "t.sock"
    with sidecar(path, ingest=True) as running:
        pid = running.status()["ingest"]["pid"]
        running.process.kill()
        running.process.wait()
        until(lambda: not is_alive(pid))


def test_a_port_in_use_is_said_and_nothing_is_left(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for option, other in (("--otlp-grpc", "--otlp-http"), ("--otlp-http", "--otlp-grpc")):
            path = tmp_path / "t.sock"
            ended = tamiyo("serve", "--socket", path, option, address, other, "127.0.0.1:0")
            assert ended.returncode == 1
            assert ended.stderr == (
                f"tamiyo: {option} {address}: cannot listen: address already in use\n"
            )
            assert not path.exists()


def test_when_the_pipe_is_full_producers_are_told_to_come_back(tmp_path):
    """The decide process is stopped: what was accepted arrives, the rest was refused."""
    with sidecar(tmp_path / "t.sock", ingest=True) as running:
        points = 0
        os.kill(running.process.pid, signal.SIGSTOP)
        try:
            values = dict.fromkeys(("loss", "accuracy", "grad_var", "loss_ewma"), 1.0)
            for turn in range(200):
                first = turn * 200
                # Of now: what comes ever later than its time is late, and left out.
                now = time.time_ns()
                frames = [
                    msgspec.structs.replace(
                        frame(first + n, run="full", **values), time_unix_nano=now + n
                    )
                    for n in range(200)
                ]
                request = otlp_of(*frames)
                status, _, _, response = post(running, request.SerializeToString())
                if status == 503:
                    break
                points += 1000
            assert status == 503
            assert response.getheader("Retry-After") == "1"
            assert points * 10 > PIPE_BACKLOG / 100
            with pytest.raises(grpc.RpcError) as caught:
                export(running, request.SerializeToString())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            metadata = dict(caught.value.trailing_metadata())
            assert b"RetryInfo" in metadata["grpc-status-details-bin"]
        finally:
            os.kill(running.process.pid, signal.SIGCONT)
        until(lambda: running.status()["ingest"]["turned_away_busy"] == 2)
        until(lambda: running.status()["ingest"]["points_used"] >= points)
        until(lambda: running.status()["ingest"]["frames_waiting"] == 0)
        status = running.status()
        assert status["ingest"]["points_used"] == points
        assert status["engine"]["frames"]["judged"] == points // 5


def test_the_receiving_process_needs_no_torch():
    code = "import sys, esper_tamiyo.receiving.ingest; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "False\n"


class Ready:
    """An epoll that finds ready, time after time, what it was told."""

    def __init__(self, *times):
        self._times = iter(times)

    def poll(self, timeout):
        assert timeout == 0  # nobody waits while frames do
        return [(fd, 1) for fd in next(self._times, [PIPE])]


PIPE, TRAINER = 7, 8


def judged_in_a_turn(monkeypatch, frames, *ready, takes=SLICE_NS + 1, is_prompt=False):
    """How many of so many frames, each of which takes so long, are judged in one turn; the
    others are left."""
    server, judged, now = Server.__new__(Server), [], [0]

    def judge(body, began_at):
        assert began_at == now[0]
        judged.append(body)
        now[0] += takes

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    server._epoll, server._judge = Ready(*ready), judge
    ingest = SimpleNamespace(
        frames=deque(range(frames)), has_pipe=lambda fd: fd == PIPE, is_due=False
    )
    server._ingest, server._pipe_ready, server._on_ready = ingest, True, None
    server._is_prompt = is_prompt
    server._work_on_stream()
    assert [*judged, *ingest.frames] == list(range(frames))
    return len(judged)


def test_a_turn_judges_some_frames_and_ends_with_who_asks(monkeypatch):
    assert judged_in_a_turn(monkeypatch, 3) == 3
    assert judged_in_a_turn(monkeypatch, 100) == FRAMES_PER_TURN
    assert judged_in_a_turn(monkeypatch, 100, [PIPE], [], [PIPE, TRAINER]) == 3
    assert judged_in_a_turn(monkeypatch, 100, [TRAINER]) == 1


def test_who_asks_waits_for_no_more_quick_frames_than_a_slice_has_time_for(monkeypatch):
    for fit in (2, 3, 5):
        takes = SLICE_NS // fit
        assert judged_in_a_turn(monkeypatch, 100, [TRAINER], takes=takes) == fit + 1


def test_a_server_that_takes_processors_gives_its_own_away_between_frames(monkeypatch):
    yields = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(1))
    assert judged_in_a_turn(monkeypatch, 3) == 3
    assert len(yields) == 0
    assert judged_in_a_turn(monkeypatch, 3, is_prompt=True) == 3
    assert len(yields) == 2
