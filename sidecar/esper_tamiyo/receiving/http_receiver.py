"""OTLP over HTTP with protobuf bodies: ``POST /v1/metrics``."""

from __future__ import annotations

import asyncio
from asyncio import selector_events, sslproto
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from google.rpc import code_pb2

from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.connections import (
    FIRST_S,
    IDLE_S,
    SWEEP_S,
    Acceptor,
    Connections,
)
from esper_tamiyo.receiving.credentials import Certificates
from esper_tamiyo.receiving.intake import (
    MAX_REQUEST,
    REQUEST_S,
    RETRY_AFTER_S,
    BusyError,
    Intake,
    MalformedError,
    Place,
    SlowError,
    TooLargeError,
    UnauthenticatedError,
    refusal,
)

PATH = "/v1/metrics"
PROTOBUF = "application/x-protobuf"

READ_BYTES = 64 * 1024
"""Most bytes that are read from a connection at once, and that its buffers hold before it has
to wait; 256 KiB of each would be hundreds of megabytes."""

LINGER_S = 2.0
"""How long the rest of a refused request is read, so that the refusal gets through."""

_SHOWN = 100


class HttpReceiver:
    """Answers at one address, with HTTPS where there are certificates."""

    def __init__(
        self,
        intake: Intake,
        limit: int,
        certificates: Certificates | None = None,
    ) -> None:
        """``limit`` is the most connections."""
        # asyncio has no setting for it.
        selector_events._SelectorSocketTransport.max_size = READ_BYTES  # type: ignore[attr-defined]
        sslproto.SSLProtocol.max_size = READ_BYTES
        self._intake = intake
        clock = asyncio.get_running_loop().time
        self.connections = Connections(limit, intake.count, clock)
        self._server = web.Server(
            self._handle,
            # Bodies are inflated by the intake, because the limit counts what comes out.
            auto_decompress=False,
            keepalive_timeout=IDLE_S,
            lingering_time=LINGER_S,
            read_bufsize=READ_BYTES,
            access_log=None,
        )
        tls = None if certificates is None else certificates.context
        self._acceptor = Acceptor(self.connections, self._protocol, tls, intake.count)
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port the system gave. Raises ``OSError``."""
        port = self._acceptor.start(address)
        self._sweeper = asyncio.create_task(self._sweep())
        return Address(address.host, port)

    async def stop(self, grace_s: float) -> None:
        """Let running requests end, for a moment."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._acceptor.stop()
        self._server.pre_shutdown()
        await self._server.shutdown(grace_s)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.connections.sweep()

    def _protocol(self) -> asyncio.Protocol:
        return HttpConnection(self._server, self.connections, self._intake)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, HttpConnection)
        connection.release_head()
        self.connections.waits(connection, REQUEST_S + LINGER_S)
        try:
            return await self._answer(request, connection)
        except ConnectionError:
            raise  # it hung up: nobody is there to answer
        except Exception as error:  # whatever one request brings about, others are served
            if connection.transport is None:  # closed by us, to make room or for its silence
                raise ConnectionResetError from error
            self._intake.failed(error)
            response = _problem(500, "internal error", code_pb2.INTERNAL)
            response.force_close()
            return response
        finally:
            connection.rest()

    async def _answer(
        self, request: web.BaseRequest, connection: HttpConnection
    ) -> web.StreamResponse:
        if request.path != PATH:
            return _problem(404, f"expected {PATH}", code_pb2.NOT_FOUND)
        if request.method != "POST":
            response = _problem(405, "expected POST", code_pb2.UNIMPLEMENTED)
            response.headers["Allow"] = "POST"
            return response
        try:
            self._intake.admit(request.headers.get("Authorization"))
        except UnauthenticatedError as error:
            response = _problem(401, str(error), code_pb2.UNAUTHENTICATED)
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        kind, encoding = request.content_type, request.headers.get("Content-Encoding", "")
        encoding = encoding.strip().lower() or "identity"
        if kind != PROTOBUF:
            return _problem(415, f"expected {PROTOBUF}, got {_printable(kind)}")
        if encoding not in ("identity", "gzip"):
            return _problem(
                415, f"expected gzip or no Content-Encoding, got {_printable(encoding)}"
            )
        try:
            answer = await self._take(request, connection, encoding == "gzip")
        except TooLargeError as error:
            return _problem(413, str(error))
        except MalformedError as error:
            return _problem(400, str(error))
        except SlowError as error:
            response = _problem(408, str(error), code_pb2.DEADLINE_EXCEEDED)
            response.force_close()
            return response
        except BusyError as error:
            body = refusal(code_pb2.UNAVAILABLE, str(error), retry=True)
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            return web.Response(status=503, body=body, content_type=PROTOBUF, headers=retry)
        return web.Response(body=answer, content_type=PROTOBUF)

    async def _take(
        self, request: web.BaseRequest, connection: HttpConnection, compressed: bool
    ) -> bytes:
        if (request.content_length or 0) > MAX_REQUEST:
            raise self._intake.too_large()
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # it is no part of the answer
        loop = asyncio.get_running_loop()
        patience = asyncio.timeout(REQUEST_S)
        with Place(self._intake, lambda: patience.reschedule(loop.time())) as place:
            await self._read(request, place, patience)
            self.connections.answers(connection)
            return await self._intake.finish(place, compressed)

    async def _read(
        self, request: web.BaseRequest, place: Place, patience: asyncio.Timeout
    ) -> None:
        try:
            async with patience:
                async for chunk in request.content.iter_any():
                    place.extend(chunk)
        except TimeoutError:
            if place.evicted:
                raise self._intake.busy("others needed the room") from None
            raise self._intake.slow() from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise self._intake.malformed(f"not an HTTP body: {error}") from None


class Complaints(Protocol):
    """Who is told what went wrong with a connection."""

    def malformed(self, why: str) -> Exception:
        """What came is no HTTP."""

    def failed(self, error: BaseException) -> None:
        """Something that nobody expected."""


class HttpConnection(web.RequestHandler):
    """One connection, which tells when it waits for its peer."""

    __slots__ = ("_complaints", "_connections", "_head", "_rests")

    def __init__(
        self, server: web.Server, connections: Connections, complaints: Complaints
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **server._kwargs)
        self._connections = connections
        self._complaints = complaints
        self._rests = False
        self._head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It may send now."""
        super().connection_made(transport)
        self._connections.waits(self, FIRST_S)

    def data_received(self, data: bytes) -> None:
        """Something came: if it is the first of a request, the rest has to come soon."""
        if self._rests:
            self._rests = False
            self._connections.waits(self, FIRST_S)
        super().data_received(data)
        if self._waiter is not None and not self._messages:  # it is no body, nor a whole head
            self._head += len(data)
            self._connections.hold_head(len(data))

    def release_head(self) -> None:
        """The headers are complete, or nobody waits for them any more."""
        head, self._head = self._head, 0
        self._connections.hold_head(-head)

    def rest(self) -> None:
        """A request is done with, and the next one may take its time."""
        if self.transport is not None:
            self._rests = True
            self._connections.waits(self, IDLE_S)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        self.release_head()
        self._connections.forget(self)
        super().connection_lost(exc)

    def abort(self) -> None:
        """Close it without waiting for its peer to read."""
        self.release_head()
        transport = self.transport
        self.force_close()
        if isinstance(transport, asyncio.Transport):
            transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP: it is counted, and not worth a line of the log."""
        if status < 500:
            self._complaints.malformed("not HTTP")
        return super().handle_error(request, status, exc, message)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Once for each kind, and without a traceback; nothing once it is closed."""
        if self.transport is None:
            return
        error = kw.get("exc_info")
        known = HttpProcessingError | ConnectionError  # counted, or nobody is left to be told
        if isinstance(error, BaseException) and not isinstance(error, known):
            self._complaints.failed(error)


def _problem(status: int, message: str, code: int = code_pb2.INVALID_ARGUMENT) -> web.Response:
    body = refusal(code, message)
    return web.Response(status=status, body=body, content_type=PROTOBUF)


def _printable(text: str) -> str:
    """What a header said, as a message may repeat it."""
    return text[:_SHOWN].encode("ascii", "backslashreplace").decode()
