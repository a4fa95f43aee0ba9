"""A real sidecar under what strangers send: its memory stays within what is stated."""

import gzip
import os
import re
import signal
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection, RemoteDisconnected
from pathlib import Path

import grpc
import psutil
import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from esper_tamiyo.receiving.grpc_receiver import MAX_MESSAGE
from esper_tamiyo.receiving.ingest_child import MEMORY_MB
from esper_tamiyo.receiving.intake import MAX_HELD, MAX_REQUEST
from sidecar.frames_made import field, frame, otlp_of
from sidecar.running import is_alive, sidecar, tamiyo, until
from sidecar.test_receiving import PROTOBUF, export, post
from testkit.half_calls import HalfCalls
from testkit.patience import PATIENCE_S

ROOM = MAX_REQUEST - 200


def of_metric(name, points):
    """A request with one gauge, of these bytes."""
    return field(1, field(2, field(2, field(1, name) + field(5, points))))


def of_parts(name):
    """A request with one metric that is in a very great many parts."""
    parts = b"\x2a\x00" * ((ROOM - len(name)) // 2)
    return field(1, field(2, field(2, field(1, name) + parts)))


def steps(count, seeds=False):
    metric = Metric(name="kasmina.seed.alpha" if seeds else "tolaria.step")
    for step in range(count):
        point = metric.gauge.data_points.add(as_double=step, time_unix_nano=step + 1)
        if seeds:
            point.attributes.add(key="seed_id").value.string_value = f"s{step}"
    return field(2, metric.SerializeToString())


def named(text, body):
    attribute = field(1, b"service.name") + field(2, field(1, text.encode()))
    return field(1, field(1, field(1, attribute)) + field(2, body))


BOMBS = {
    "points": lambda: of_metric(b"tolaria.loss", b"\x0a\x00" * (ROOM // 2)),
    "metrics": lambda: field(1, field(2, b"\x12\x00" * (ROOM // 2))),
    "scopes": lambda: field(1, b"\x12\x00" * (ROOM // 2)),
    "resources": lambda: b"\x0a\x00" * (ROOM // 2),
    "parts of a metric of a long name": lambda: of_parts(b"x" * 60_000),
    "attributes of a point": lambda: of_metric(
        b"tolaria.loss", field(1, b"\x3a\x00" * (ROOM // 2))
    ),
    "attributes of a resource": lambda: field(1, field(1, b"\x0a\x00" * (ROOM // 2))),
    "steps of a long name": lambda: named("x" * 200_000, steps(10_000)),
    "steps of a name just short enough": lambda: named("é" * 256, steps(60_000)),
    "steps": lambda: field(1, field(2, steps(150_000))),
    "seeds": lambda: field(1, field(2, steps(75_000, seeds=True))),
}
"""Requests that take much of a receiver that copies or parses before it counts. Each is
made for its test alone, as every process of tests imports this."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    path = tmp_path_factory.mktemp("b") / "t.sock"
    with sidecar(path, ingest=True, is_forked=False) as running:
        yield running


def peak_mb(running):
    """Most memory that the ingest process ever had."""
    status = Path(f"/proc/{running.status()['ingest']['pid']}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def answered(running, body, **headers):
    """What comes back; None where the connection ends before, which has an exporter send again.

    A receiver of low priority that gets no processor for ten seconds closes those that wait.
    """
    with suppress(RemoteDisconnected, ConnectionResetError):
        return post(running, body, **headers)


def refused(running):
    """How many requests were told to come again, or took too long to come in.

    Which of the two a request meets depends on how soon the receiver gets a processor.
    """
    ingest = running.status()["ingest"]
    return ingest["turned_away_busy"] + ingest["timed_out"]


def is_well(running, run):
    """Honest OTLP comes in, within the bound, by the process that was there before."""
    honest = otlp_of(frame(1, run=run)).SerializeToString()
    assert until(lambda: answered(running, honest))[0] == 200
    ingest = running.status()["ingest"]
    assert (ingest["restarts"], ingest["hung"], ingest["failed"]) == (0, 0, 0)
    return peak_mb(running) < MEMORY_MB


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_request_does_not_become_a_large_one(attacked, name):
    data = BOMBS[name]()
    assert len(data) <= MAX_REQUEST
    body = gzip.compress(data, 6, mtime=0)
    status, _, answer, _ = until(lambda: answered(attacked, body, Content_Encoding="gzip"))
    assert status in (200, 413)
    assert answer or name == "attributes of a resource", "what is not taken is told"
    assert is_well(attacked, f"after {name}")


def test_bodies_that_lack_a_byte_are_held_within_the_limit(attacked):
    size = 1 << 20
    head = f"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Type: {PROTOBUF}\r\n"
    request = f"{head}Content-Length: {size}\r\n\r\n".encode() + bytes(size - 1)
    host, _, port = attacked.words["otlp_http"].rpartition(":")
    before = refused(attacked)
    open_ones = []
    try:
        for _ in range(60):
            one = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
            open_ones.append(one)
            with suppress(BrokenPipeError, ConnectionResetError):  # by then it is refused
                one.sendall(request)
        assert is_well(attacked, "beside bodies")
        until(lambda: refused(attacked) - before >= 60 - MAX_HELD // size)
        assert is_well(attacked, "still beside bodies")
    finally:
        for one in open_ones:
            one.close()


def test_calls_that_lack_a_byte_are_held_within_the_limit(attacked):
    before = refused(attacked)
    connections = [HalfCalls(attacked.words["otlp_grpc"]) for _ in range(2)]
    try:
        for connection in connections:
            for _ in range(30):
                connection.begin(MAX_REQUEST)
        data = otlp_of(frame(1, run="beside calls")).SerializeToString()
        until(lambda: was_taken(attacked, data))
        assert is_well(attacked, "beside calls too")
        until(lambda: refused(attacked) > before)
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("size", [MAX_REQUEST + 1, MAX_MESSAGE])
def test_of_large_calls_one_after_the_other_nothing_is_left(attacked, size):
    data = bytes(size)
    for _ in range(50):
        with pytest.raises(grpc.RpcError) as refused:
            export(attacked, data, compression=grpc.Compression.Gzip)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert is_well(attacked, f"after calls of {size}")


def was_taken(running, data):
    """Whether a call is, and not told to come again."""
    try:
        return export(running, data) == b""
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        raise


def test_a_call_that_unfolds_beyond_the_limit_is_refused(attacked):
    with pytest.raises(grpc.RpcError) as caught:
        export(attacked, bytes(100 << 20), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert is_well(attacked, "after a bomb")


def test_whole_requests_of_many_at_once_are_taken_or_told_to_come_again(attacked):
    data = otlp_of(*(frame(step, run="many") for step in range(3000))).SerializeToString()
    statuses = []

    def send():
        connection = HTTPConnection(attacked.words["otlp_http"], timeout=PATIENCE_S)
        connection.request("POST", "/v1/metrics", data, {"Content-Type": PROTOBUF})
        statuses.append(connection.getresponse().status)
        connection.close()

    senders = [threading.Thread(target=send) for _ in range(40)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert set(statuses) <= {200, 503}
    assert is_well(attacked, "after many")


def test_one_that_has_more_than_it_may_have_starts_anew(tmp_path, capfd):
    """With next to nothing allowed: what it has without a request is too much then."""
    path = tmp_path / "t.sock"
    with sidecar(path, "--ingest-mb", "20", ingest=True, is_forked=False) as running:
        until(lambda: running.status()["ingest"]["restarts"])
    assert "MB: it restarts" in capfd.readouterr().err


def test_stopped_children_do_not_outlive_a_killed_sidecar(tmp_path):
    """They would keep its ports, and the lock of its state, from the next one."""
    with sidecar(tmp_path / "t.sock", ingest=True, is_forked=False) as running:
        until(lambda: running.status()["state"]["written_at"])
        until(lambda: running.status()["scribe"]["state"] == "working")
        children = psutil.Process(running.process.pid).children()
        assert len(children) == 3
        try:
            for child in children:
                child.suspend()
            running.process.kill()
            running.process.wait()
            until(lambda: not any(is_alive(child.pid) for child in children))
        finally:
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def test_a_receiver_that_hangs_is_replaced_and_told_meanwhile(tmp_path, capfd):
    with sidecar(tmp_path / "t.sock", ingest=True) as running, running.client() as client:
        client.hello(run="asks")
        until(lambda: client.status()["ingest"]["state"] == "working")
        hung = client.status()["ingest"]["pid"]
        os.kill(hung, signal.SIGSTOP)
        status = until(
            lambda: (found := client.status()["ingest"])["state"] == "silent" and found
        )
        assert not status["listening"]
        told = tamiyo("status", "--socket", tmp_path / "t.sock")
        step = 0

        def replaced():
            nonlocal step
            step += 1
            assert client.ask(step).step == step, "asks go on"
            ingest = client.status()["ingest"]
            return ingest["hung"] == 1 and ingest["state"] == "working" and ingest["listening"]

        until(replaced, 40.0)
        assert client.status()["ingest"]["pid"] != hung
        assert post(running, otlp_of(frame(1, run="after")).SerializeToString())[0] == 200
    if "is restarting" not in told.stderr:  # it may have been replaced by then
        assert told.returncode == 3
        assert "OTLP is not received: the ingest process does not respond" in told.stderr
    assert "the ingest process does not respond: it is killed" in capfd.readouterr().err
