"""Targets that are reached over sockets: one sidecar each, as real as a user's."""

from __future__ import annotations

import gzip
import re
import socket
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path

import grpc
from hypothesis import strategies as st

from esper_otel.leyline.wire import (
    Answer,
    Ask,
    Check,
    Goodbye,
    MessageBuffer,
    Refusal,
    WireError,
    decode_to_client,
    decode_to_server,
    encode,
)
from esper_tamiyo.receiving.pieces import PIECE
from fuzz.fuzzing import Target
from fuzz.mutations import mutations
from fuzz.otlp_made import REQUESTS, point_count
from sidecar.frames_made import frame, otlp_of
from sidecar.running import PATIENCE_S, Client, is_alive, sidecar, until
from sidecar.test_any_message import MESSAGES, NAMES, NUMBERS
from sidecar.test_receiving_bounds import was_taken

POINTS = ("points_used", "points_foreign", "points_unusable", "points_old")
REFUSED = ("malformed", "too_large", "turned_away_busy", "unauthorized", "timed_out", "failed")
STATED = {200, 400, 404, 405, 408, 413, 415, 503}
"""What docs/security.md and docs/limits.md say that is answered over HTTP."""

QUIET_S = 0.05
"""Silence of the receiver after which an answer is not waited for that may never come."""


class Watched:
    """A sidecar, none of whose processes may end, fail or be replaced."""

    def __init__(self, running, log: Path) -> None:
        self.running = running
        self._log = log
        self._before = self._processes()

    def _processes(self) -> dict[str, object]:
        report = self.running.status()
        parts = {"scribe": report["scribe"], "ingest": report["ingest"] or {}}
        told = {
            f"{name} {key}": part.get(key)
            for name, part in parts.items()
            for key in ("pid", "restarts", "hung")
        }
        return told | {"pid": report["pid"], "state": report["state"]["restarts"]}

    def check(self) -> None:
        """All processes are the same, and nobody told of a fault of ours."""
        said = self._log.read_text()
        assert self._processes() == self._before, said
        assert is_alive(self.running.process.pid)
        assert "Traceback" not in said, said
        assert "failed in the receiver" not in said, said

    def counts(self) -> Counter[str]:
        """What became of requests and points."""
        ingest = self.running.status()["ingest"]
        return Counter({name: ingest[name] for name in ("requests", *POINTS, *REFUSED)})


@contextmanager
def watched(folder: Path, *arguments, ingest=False):
    log = folder / "log"
    with (
        log.open("w") as stderr,
        sidecar(folder / "t.sock", *arguments, ingest=ingest, stderr=stderr) as running,
    ):
        one = Watched(running, log)
        yield one
        one.check()


class Account:
    """Held against the counts of a sidecar: every point of every request that was taken."""

    def __init__(self, one: Watched) -> None:
        self._one = one
        self._counts = one.counts()
        self.seen: Counter[str] = Counter()
        """What became of all requests and points so far."""

    def begin(self) -> None:
        """Count from here on, whatever became of an example that failed."""
        self._counts = self._one.counts()

    def settle(self, taken: list[bytes], refused: Counter[str]) -> None:
        """``taken`` are the bodies that were answered by success since the last time."""
        known = [point_count(body) for body in taken]
        # Of a resource that is read in pieces a field of no use may be skipped, torn or not.
        is_counted = all(count is not None for count in known)
        assert is_counted or max(map(len, taken)) > PIECE, "what was taken is no request"
        expected = Counter({"requests": len(taken), "points": sum(known) if is_counted else 0})
        expected += refused
        before = self._counts

        def told() -> Counter[str]:
            self._counts = self._one.counts()
            more = self._counts - before
            points = sum(more.pop(name, 0) for name in POINTS)
            return more + Counter(points=points if is_counted else 0)

        deadline = time.monotonic() + PATIENCE_S
        while (found := told()) != expected:
            assert time.monotonic() < deadline, (found, expected)
            time.sleep(0.002)
        self.seen += self._counts - before


# OTLP over HTTP.

SOUND = otlp_of(frame(1, run="sound", loss=1.0)).SerializeToString()
BODIES = mutations(st.one_of(REQUESTS, REQUESTS, st.just(SOUND)), [SOUND], most=4)


def _zipped(body: bytes, kind: str) -> bytes:
    whole = gzip.compress(body, 1, mtime=0)
    return {
        "whole": whole,
        "two members": gzip.compress(body[:9], mtime=0) + gzip.compress(body[9:], mtime=0),
        "behind nothing": gzip.compress(b"", mtime=0) * 3 + whole,
        "cut": whole[: len(whole) // 2],
        "with a tail": whole + b"\0" * 8,
        "too many members": gzip.compress(b"", mtime=0) * 1100 + whole,
        "too large": gzip.compress(body + bytes(5 << 20), 1, mtime=0),
    }[kind]


def _unzipped(body: bytes) -> bytes:
    return gzip.decompress(body)


ZIPPED = st.builds(
    lambda body, kind: (_zipped(body, kind), "gzip"),
    BODIES,
    st.sampled_from(
        ["whole"] * 4
        + ["two members", "behind nothing", "cut", "with a tail"] * 2
        + ["too many members", "too large"]
    ),
)
TORN = mutations(REQUESTS.map(lambda body: _zipped(body, "whole"))).map(lambda b: (b, "GZIP "))
CODED = st.one_of(
    st.just((SOUND, "")),
    BODIES.map(lambda body: (body, "")),
    BODIES.map(lambda body: (body, "identity")),
    ZIPPED,
    TORN,
    BODIES.map(lambda body: (body, "br")),
)
HEADERS = st.lists(
    st.sampled_from(
        [
            b"X-Odd: \xff\xfe",
            b"X-Empty:",
            b"Authorization: Bearer \xe9",
            b"Accept-Encoding: br",
            b"Expect: 100-continue",
            b"X-Long: " + b"x" * 4000,
            b"Cookie: a=b; c",
            b"TE: trailers",
            b"Content-Type: text/plain",
            b"Upgrade: h2c",
            b"Connection: x",
        ]
    ),
    max_size=3,
)
LINES = st.sampled_from(
    [b"POST /v1/metrics"] * 12
    + [b"POST /v1/metrics?x=1", b"GET /v1/metrics", b"POST /v1/traces", b"PUT /v1/metrics"]
    + [b"POST //v1/metrics", b"POST http://x/v1/metrics", b"OPTIONS *", b"HEAD /v1/metrics"]
)


def as_http(
    line: bytes, body: bytes, encoding: str, headers: list[bytes], chunks: int
) -> bytes:
    """One request; in chunks of so many bytes where that is not 0."""
    head = [line + b" HTTP/1.1", b"Host: here", b"Content-Type: application/x-protobuf"]
    head += headers
    if encoding:
        head.append(b"Content-Encoding: " + encoding.encode())
    if chunks:
        head.append(b"Transfer-Encoding: chunked")
        parts = [body[at : at + chunks] for at in range(0, len(body), chunks)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    else:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


WHOLE = st.lists(
    st.tuples(LINES, CODED, HEADERS, st.sampled_from([0, 0, 1000, 1 << 20])),
    min_size=1,
    max_size=6,
)


def _connected(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


class HttpConnection:
    """One connection, on which answer behind answer is read."""

    def __init__(self, address: str) -> None:
        self._socket = _connected(address)
        self._file = self._socket.makefile("rb")

    def say(self, data: bytes) -> None:
        """Send all of it; whoever hung up before has answered."""
        with suppress(ConnectionError):
            self._socket.sendall(data)

    def answer(self, method: str) -> HTTPResponse:
        """The next answer, read to its end."""
        response = HTTPResponse(self, method=method)
        response.begin()
        response.read()
        return response

    def makefile(self, mode: str) -> HttpConnection:
        """Of HTTPResponse, which would read ahead."""
        return self

    def readline(self, limit: int = -1) -> bytes:
        return self._file.readline(limit)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def flush(self) -> None:
        """Nothing is written."""

    def close(self) -> None:
        """Of HTTPResponse, behind each answer."""

    def end(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


@contextmanager
def _conversation(one: Watched):
    connection = HttpConnection(one.running.words["otlp_http"])
    try:
        yield connection
    finally:
        connection.end()


@contextmanager
def http(folder: Path):
    """Whole requests, one behind the other before the first was answered."""
    with watched(folder, ingest=True) as one:
        account = Account(one)

        def check(requests) -> None:
            taken, refused = [], Counter()
            account.begin()
            data = b"".join(
                as_http(line, *coded, headers, chunks)
                for line, coded, headers, chunks in requests
            )
            with _conversation(one) as connection:
                connection.say(data)
                for line, (body, encoding), _, _ in requests:
                    response = connection.answer(line.split()[0].decode())
                    assert response.status in STATED, response.status
                    if response.status == 200:
                        zipped = encoding.strip().lower() == "gzip"
                        taken.append(_unzipped(body) if zipped else body)
                    refused += Counter(_counted(response.status))
                    if response.will_close:
                        break
            account.settle(taken, refused)
            one.check()

        yield check
        assert {*POINTS[:3], "requests", "malformed"} <= {*account.seen}, account.seen


def _counted(status: int) -> dict[str, int]:
    names = {400: "malformed", 413: "too_large", 503: "turned_away_busy", 408: "timed_out"}
    return {names[status]: 1} if status in names else {}


@contextmanager
def http_bytes(folder: Path):
    """Requests whose heads are torn as well, of which some never end."""
    with watched(folder, ingest=True) as one:

        def check(data: bytes) -> None:
            with closing(_connected(one.running.words["otlp_http"])) as connection:
                for answer in re.findall(rb"HTTP/1\.[01] (\d+) ", _told(connection, data)):
                    assert int(answer) in STATED | {100}, answer
            until(lambda: _is_taken(one))
            one.check()
            assert one.counts()["failed"] == 0

        yield check


def _is_taken(one: Watched) -> bool:
    """Whether an honest request is; it may be told to come again."""
    with _conversation(one) as connection:
        connection.say(as_http(b"POST /v1/metrics", SOUND, "", [], 0))
        status = connection.answer("POST").status
    assert status in (200, 503)
    return status == 200


def _told(connection: socket.socket, data: bytes) -> bytes:
    """What is answered to ``data`` until it has been quiet for a moment."""
    told = b""
    try:
        connection.sendall(data)
        connection.settimeout(QUIET_S)
        while part := connection.recv(65536):
            told += part
    except (TimeoutError, ConnectionError):
        pass
    return told


CONVERSATIONS = st.lists(st.tuples(LINES, CODED, HEADERS, st.sampled_from([0, 50])), max_size=3)
TORN_HTTP = mutations(
    CONVERSATIONS.map(
        lambda made: b"".join(as_http(line, *coded, h, c) for line, coded, h, c in made)
    ),
    [
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"\r\n\r\nffffffffffffffffff\r\n",
        b"Transfer-Encoding: gzip, chunked\r\nExpect: 200-maybe\r\nContent-Length: -1\r\n",
        b"GET / HTTP/9.9\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)

# OTLP over gRPC.

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
CALLS = st.lists(
    st.tuples(
        st.sampled_from([EXPORT] * 8 + ["/x/y", EXPORT + "s", "/"]),
        st.one_of(BODIES, BODIES, st.just(bytes(5 << 20)), st.just(bytes((4 << 20) + 1))),
        st.sampled_from([grpc.Compression.NoCompression, grpc.Compression.Gzip]),
        st.lists(
            st.sampled_from(
                [
                    ("authorization", "Bearer x"),
                    ("x-bin", b"\xff"),
                    ("grpc-x-bin", b""),
                    ("authorization-bin", b"\xff\xfe"),
                    ("user-agent", "é" * 9),
                ]
            ),
            max_size=2,
        ),
    ),
    min_size=1,
    max_size=5,
)
CODES = {
    grpc.StatusCode.DEADLINE_EXCEEDED,  # of a client that has no processor to send with
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
}


@contextmanager
def grpc_calls(folder: Path):
    """Calls with any bytes for a request."""
    with (
        watched(folder, ingest=True) as one,
        grpc.insecure_channel(one.running.words["otlp_grpc"]) as channel,
    ):
        account = Account(one)

        def check(calls) -> None:
            taken, refused = [], Counter()
            account.begin()
            for method, body, compression, metadata in calls:
                call = channel.unary_unary(
                    method, request_serializer=None, response_deserializer=None
                )
                sound = [(key, value) for key, value in metadata if _is_sendable(value)]
                try:
                    call(body, timeout=PATIENCE_S, compression=compression, metadata=sound)
                except grpc.RpcError as error:
                    refused += _refused_call(error)
                else:
                    taken.append(body)
            account.settle(taken, refused)
            one.check()

        yield check
        assert {*POINTS[:3], "requests", "malformed"} <= {*account.seen}, account.seen


def _refused_call(error: grpc.RpcError) -> Counter[str]:
    """As what it is counted."""
    code = error.code()
    assert code in CODES, error
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return Counter({"too_large" if "may have" in error.details() else "malformed": 1})
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Counter({"timed_out": 1})
    return Counter({"turned_away_busy": code is grpc.StatusCode.UNAVAILABLE})


def _is_sendable(value: str | bytes) -> bool:
    return isinstance(value, bytes) or value.isascii()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
TORN_HTTP2 = mutations(
    st.lists(
        st.builds(
            lambda kind, flags, stream, body: (
                len(body).to_bytes(3, "big")
                + bytes((kind, flags))
                + stream.to_bytes(4, "big")
                + body
            ),
            st.integers(0, 10),
            st.sampled_from([0, 1, 4, 5, 0x2D, 255]),
            st.sampled_from([0, 1, 3, 2**31 - 1]),
            st.binary(max_size=40) | st.just(b"\0\0\0\0\5hello"),
        ),
        max_size=8,
    ).map(lambda frames: PREFACE + SETTINGS + b"".join(frames)),
    [PREFACE, SETTINGS, SOUND],
)


@contextmanager
def grpc_bytes(folder: Path):
    """Connections to the gRPC receiver that say whatever they like."""
    with watched(folder, ingest=True) as one:

        def check(data: bytes) -> None:
            with closing(_connected(one.running.words["otlp_grpc"])) as connection:
                _told(connection, data)
            until(lambda: was_taken(one.running, SOUND))
            one.check()

        yield check


# The decision socket.


def _encoded(message) -> bytes:
    try:
        return encode(message)
    except WireError:
        return b"\0\0\0\0"


SAID = (MESSAGES | st.builds(Goodbye, NUMBERS, NUMBERS, NAMES, NAMES)).map(_encoded)
MOVES = st.lists(
    st.one_of(SAID, SAID, mutations(SAID, [b"\x91" * 3000, b"\xa3ask", b"\xa5hello"])),
    max_size=8,
)
NESTED = b"\x92\xa7status?" + b"\x91" * 60_000 + b"\xc0"
CONNECTIONS = st.lists(
    st.tuples(
        MOVES | st.just([len(NESTED).to_bytes(4, "little") + NESTED]), st.integers(1, 400)
    ),
    min_size=1,
    max_size=3,
)


@contextmanager
def decision_socket(folder: Path):
    """Any messages, whole or not, beside a trainer that must not notice."""
    with watched(folder) as one, closing(Client(one.running.socket)) as bystander:
        bystander.hello(run="bystander")
        steps = iter(range(1 << 50))

        def check(connections) -> None:
            for moves, size in connections:
                _talk(one.running.socket, b"".join(moves), size)
                step = next(steps)
                answer = bystander.answer(step, loss=1.0 + step % 2)
                assert answer.decision.reason in ("nominal", "warming_up"), answer
            assert bystander.status()["engine"]["witness_failed"] == 0
            one.check()

        yield check


def _talk(path: Path, data: bytes, size: int) -> None:
    """Say ``data`` in pieces; every ask that is understood before the end is answered."""
    wanted, asks_of = _understood(data)
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(path))
        try:
            for at in range(0, len(data), size * 50):
                connection.sendall(data[at : at + size * 50])
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has hung up already
        told = b""
        try:
            while part := connection.recv(65536):
                told += part
        except ConnectionResetError:
            return
    answers = [decode_to_client(body) for body in MessageBuffer().feed(told)]
    is_refused = bool(answers) and isinstance(answers[-1], Refusal)
    assert is_refused or len(answers) == wanted
    answered = [each.request_id for each in answers if isinstance(each, Answer)]
    assert answered == asks_of[: len(answered)]


def _understood(data: bytes) -> tuple[int, list[int]]:
    """How many messages want an answer, up to the first that is none; the asks among them."""
    count, asks = 0, []
    try:
        for body in MessageBuffer().feed(data):
            message = decode_to_server(body)
            count += not isinstance(message, Goodbye)
            if isinstance(message, Ask | Check):
                asks.append(message.request_id)
    except WireError:
        pass
    return count, asks


TARGETS = (
    Target("http", http, WHOLE, 60),
    Target("http_bytes", http_bytes, TORN_HTTP, 40),
    Target("grpc", grpc_calls, CALLS, 50),
    Target("grpc_bytes", grpc_bytes, TORN_HTTP2, 40),
    Target("socket", decision_socket, CONNECTIONS, 100),
)
