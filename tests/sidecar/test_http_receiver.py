"""The HTTP receiver beside strangers: slow ones, silent ones, and such as speak no HTTP."""

import asyncio
import gzip

import pytest

from esper_tamiyo.receiving import connections, http_receiver
from esper_tamiyo.receiving import intake as intake_module
from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.credentials import BearerAuth
from esper_tamiyo.receiving.http_receiver import HttpReceiver
from esper_tamiyo.receiving.intake import Intake
from sidecar.frames_made import frame, otlp_of
from sidecar.test_intake import Pipe
from testkit.patience import PATIENCE_S

HEAD = b"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n"


class Receiver:
    """A receiver in this process, and raw connections to it."""

    def __init__(self, token_file="", limit=8):
        self.pipe = Pipe()
        self.intake = Intake(self.pipe, BearerAuth(token_file))
        self.http = HttpReceiver(self.intake, limit)

    async def __aenter__(self):
        self.port = (await self.http.start(Address("127.0.0.1", 0))).port
        return self

    async def __aexit__(self, *raised):
        await self.http.stop(0.1)

    async def connect(self, data=b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        return reader, writer

    async def status(self, data):
        """The status of the answer to these bytes, 0 when there is none but the end."""
        reader, writer = await self.connect(data)
        status = await answer(reader)
        writer.close()
        return status


async def answer(reader):
    try:
        line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
    except ConnectionResetError:
        return 0
    return int(line.split()[1]) if line else 0


def served(test, **options):
    async def run():
        async with Receiver(**options) as receiver:
            await test(receiver)

    asyncio.run(run())


def whole(step, head=HEAD):
    body = otlp_of(frame(step)).SerializeToString()
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (whole(1), 200),
        (HEAD + b"Authorization: Bearer \xff\xfe\r\nContent-Length: 0\r\n\r\n", 200),
        (HEAD + b"Content-Encoding: \xff\r\nContent-Length: 0\r\n\r\n", 415),
        (HEAD.replace(b"-protobuf", b"-\xff\xfe") + b"Content-Length: 0\r\n\r\n", 415),
        (HEAD.replace(b"/v1", b"/v\xff") + b"Content-Length: 0\r\n\r\n", 400),
        (HEAD.replace(b"POST", b"P\xffST") + b"\r\n", 400),
        (HEAD.replace(b"POST", b"PROPFIND") + b"\r\n", 405),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: %d\r\n\r\n" % (1 << 40), 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 3 + b"\r\n\r\n", 400),
        (HEAD + b"X: " + b"x" * 20_000 + b"\r\n\r\n", 400),
    ],
)
def test_whatever_bytes_come_the_answer_has_a_status_and_others_are_served(
    data, status, caplog
):
    async def test(receiver):
        assert await receiver.status(data) == status
        assert receiver.pipe.told("failed") == 0
        assert await receiver.status(whole(7)) == 200
        assert receiver.pipe.steps[-1] == 7

    served(test)
    assert caplog.text == ""


def test_a_token_of_any_bytes_is_no_token(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")

    async def test(receiver):
        odd = HEAD + b"Authorization: Bearer \xff\xfe\r\nContent-Length: 0\r\n\r\n"
        assert await receiver.status(odd) == 401
        assert receiver.pipe.told("unauthorized") == 1

    served(test, token_file=str(token))


def test_what_nobody_expected_is_answered_counted_and_harms_nobody(monkeypatch, caplog):
    async def test(receiver):
        monkeypatch.setattr(receiver.intake, "admit", lambda header: 1 / 0)
        for _ in range(3):
            assert await receiver.status(whole(1)) == 500
        monkeypatch.undo()
        assert receiver.pipe.told("failed") == 3
        assert await receiver.status(whole(2)) == 200

    served(test)
    assert len(caplog.records) == 1
    assert "Traceback" not in caplog.text


def test_a_producer_that_waits_for_leave_to_send_gets_it():
    async def test(receiver):
        head, _, body = whole(1).partition(b"\r\n\r\n")
        reader, writer = await receiver.connect(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert await answer(reader) == 100
        await reader.readline()
        writer.write(body)
        assert await answer(reader) == 200
        writer.close()

    served(test)


def test_a_body_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(http_receiver, "REQUEST_S", 0.05)

    async def test(receiver):
        assert await receiver.status(whole(1)[:-1]) == 408
        assert receiver.pipe.told("timed_out") == 1
        assert receiver.intake.held == 0

    served(test)


@pytest.mark.parametrize("sent", [b"", HEAD, b"POST"])
def test_who_never_comes_to_the_point_is_closed(monkeypatch, sent):
    # Not connections.FIRST_S: a connection that a busy machine opens so slowly counts as well.
    monkeypatch.setattr(http_receiver, "FIRST_S", 0.05)
    monkeypatch.setattr(http_receiver, "SWEEP_S", 0.02)

    async def test(receiver):
        assert await receiver.status(sent) == 0
        assert receiver.pipe.told("connections_timed_out") == 1

    served(test)


def test_a_kept_connection_may_rest_but_a_request_once_begun_has_to_come(monkeypatch):
    async def test(receiver):
        reader, writer = await receiver.connect(whole(1))
        assert await answer(reader) == 200
        (until,) = receiver.http.connections._waiting.values()
        writer.write(b"POST /v1")
        await writer.drain()
        while [until] == list(receiver.http.connections._waiting.values()):
            await asyncio.sleep(0)
        (sooner,) = receiver.http.connections._waiting.values()
        assert sooner < until
        writer.close()

    served(test)


def test_silent_connections_make_room_for_honest_ones():
    async def test(receiver):
        silent = [await receiver.connect(HEAD) for _ in range(20)]
        assert await receiver.status(whole(1)) == 200
        assert len(receiver.http.connections) <= 8
        assert receiver.pipe.told("connections_evicted") >= 13
        closed = [await answer(reader) for reader, _ in silent[:13]]
        assert closed == [0] * 13
        for _, writer in silent:
            writer.close()

    served(test)


def test_unfinished_bodies_make_room_for_whole_ones(monkeypatch):
    body = otlp_of(*(frame(step) for step in range(100))).SerializeToString()
    monkeypatch.setattr(intake_module, "MAX_HELD", 3 * len(body))
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def test(receiver):
        halves = [await receiver.connect(request[:-1]) for _ in range(5)]
        assert [await answer(reader) for reader, _ in halves[:2]] == [503, 503]
        assert await receiver.status(request) == 200
        assert receiver.intake.held <= 3 * len(body)
        for _, writer in halves:
            writer.close()

    served(test)


def test_gzip_is_read_to_its_last_member():
    async def test(receiver):
        body = b"".join(
            gzip.compress(otlp_of(frame(step)).SerializeToString()) for step in (1, 2)
        )
        head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        assert await receiver.status(head % len(body) + body) == 200
        assert receiver.pipe.steps == [1, 2]
        rubbish = body + b"rubbish"
        assert await receiver.status(head % len(rubbish) + rubbish) == 400

    served(test)


def test_headers_without_an_end_are_held_within_a_limit(monkeypatch):
    monkeypatch.setattr(connections, "MAX_HEADS", 20_000)
    head = HEAD + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(6))

    async def test(receiver):
        endless = [await receiver.connect(head) for _ in range(6)]
        assert [await answer(reader) for reader, _ in endless[:2]] == [0, 0]
        assert await receiver.status(whole(1)) == 200
        assert receiver.http.connections._heads <= 20_000
        for _, writer in endless:
            writer.close()
        while receiver.http.connections._heads:
            await asyncio.sleep(0)

    served(test)


def test_one_that_is_closed_while_its_body_comes_in_is_no_failure(monkeypatch, caplog):
    body = otlp_of(*(frame(step) for step in range(100))).SerializeToString()
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)

    async def test(receiver):
        reader, writer = await receiver.connect(head + body[:-1])
        while receiver.intake.held < len(body) - 1:
            await asyncio.sleep(0)
        assert receiver.http.connections._heads == 0, "a body is no head"
        assert receiver.http.connections.evict()
        assert await answer(reader) == 0
        while receiver.intake.held:
            await asyncio.sleep(0)
        assert receiver.pipe.told("failed") == 0
        assert await receiver.status(whole(1)) == 200
        writer.close()

    served(test)
    assert caplog.text == ""


def test_what_is_left_of_a_refused_body_is_no_head(monkeypatch):
    monkeypatch.setattr(connections, "MAX_HEADS", 1000)

    async def test(receiver):
        head = HEAD.replace(b"-protobuf", b"-json") + b"Content-Length: 100000\r\n\r\n"
        reader, writer = await receiver.connect(head)
        assert await answer(reader) == 415
        (length,) = [
            int(line.split()[1])
            for line in (await reader.readuntil(b"\r\n\r\n")).splitlines()
            if line.startswith(b"Content-Length")
        ]
        await reader.readexactly(length)
        writer.write(bytes(100_000) + whole(1))
        assert await answer(reader) == 200, "it is still open"
        assert receiver.pipe.told("connections_evicted") == 0
        writer.close()

    served(test)
