"""OTLP over gRPC: ``MetricsService/Export``, and nothing else.

A request is asked for here, after the token was looked at and when there is room for it: until
then gRPC's core takes 64 KiB of it from the network and no more. What it takes of one that is
being read is not known to us before the whole is there, so few are read at once.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import grpc
from google.rpc import code_pb2

from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.credentials import Certificates
from esper_tamiyo.receiving.intake import (
    MAX_REQUEST,
    PATIENCE_S,
    REQUEST_S,
    BusyError,
    Intake,
    MalformedError,
    SlowError,
    TooLargeError,
    UnauthenticatedError,
    refusal,
)

METRICS_SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"

MAX_CALLS = 512
"""Most calls at once, of all connections; of each 64 KiB may be there already."""

MAX_STREAMS = 100
"""Most calls at once of one connection."""

MAX_READ_AT_ONCE = 8
"""Requests that are read at once, each of up to :data:`MAX_MESSAGE` bytes."""

MAX_MESSAGE = MAX_REQUEST + (1 << 20)
"""From here on gRPC's core refuses a request itself, before it is read: by RESOURCE_EXHAUSTED,
which some exporters send again. Between our limit and this one they are told that it is in
vain."""

UNDISTURBED_S = 0.1
"""How long a request may be read before it has to make room for others that wait."""

MAX_CHANNELS = 1024
"""Most connections at once, where the system gives so many descriptors."""

COLLECT_BYTES = 8 << 20
"""Bytes of requests after which garbage is collected: gRPC leaves each call, its request
included, in a circle of references, and so few objects are made that it stays there long.
Young garbage at first, all of it only when as many bytes may have grown old: to look through
all objects takes as long as to answer twenty calls."""

IDLE_S = 60.0
"""Longest that a connection may be without a call."""

HANDSHAKE_S = 5.0

_CORE = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_connection_idle_ms", int(IDLE_S * 1e3)),
    ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1e3)),
    # Without: windows grow with the line's speed, and 64 KiB become megabytes of each call.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.experimental.tcp_max_read_chunk_size", 64 * 1024),
)


class ReadingPlaces:
    """Who may read a request now, and who has to stop so that another can.

    Whoever has read for a moment makes room when others wait: a request that was sent in whole
    is read in less, and one that does not end holds nobody up.
    """

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)
        self._readers: dict[asyncio.Future[None], float] = {}
        self._waiting = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    async def occupy(self) -> asyncio.Future[None]:
        """Wait for a place; the future is done when the place has to be left.

        Raises ``TimeoutError`` when there is none in time.
        """
        if self._free.locked():
            self._waiting += 1
            self._hurry()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._free.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._free.acquire()
        eviction: asyncio.Future[None] = self._loop.create_future()
        self._readers[eviction] = self._loop.time()
        return eviction

    def free(self, eviction: asyncio.Future[None]) -> None:
        """Give the place back."""
        del self._readers[eviction]
        self._free.release()

    def _hurry(self) -> None:
        """While somebody waits: those who have read for the longest make room."""
        if self._timer is not None or not self._waiting:
            return
        before = self._loop.time() - UNDISTURBED_S
        for eviction, since in [*self._readers.items()][: self._waiting]:
            if since <= before and not eviction.done():
                eviction.set_result(None)
        self._timer = self._loop.call_later(UNDISTURBED_S / 2, self._hurry_again)

    def _hurry_again(self) -> None:
        self._timer = None
        self._hurry()


class _Refused(NamedTuple):
    """What a call is ended with; ``later``: it may come again."""

    code: grpc.StatusCode
    message: str
    later: bool = False


class GrpcReceiver:
    """Answers at one address, by TLS where there are certificates."""

    def __init__(
        self, intake: Intake, limit: int, certificates: Certificates | None = None
    ) -> None:
        """``limit`` is the most connections."""
        self._intake = intake
        self._tls = None if certificates is None else _tls(certificates)
        self._places = ReadingPlaces(MAX_READ_AT_ONCE)
        self.calls = 0
        """Calls that are under way."""
        self._uncollected = 0
        self._under_way: dict[object, int] = {}
        """Bytes of requests whose calls go on: a collection of the young leaves them old."""
        self._aged = 0
        self._server = grpc.aio.server(
            options=[*_CORE, ("grpc.max_allowed_incoming_connections", limit)]
        )
        export = grpc.stream_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(METRICS_SERVICE, {"Export": export}),)
        )

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port the system gave.

        Raises ``RuntimeError``.
        """
        if self._tls is None:
            port = self._server.add_insecure_port(str(address))
        else:
            port = self._server.add_secure_port(str(address), self._tls)
        await self._server.start()
        return Address(address.host, port)

    async def stop(self, grace_s: float) -> None:
        """Let running requests end, for a moment."""
        await self._server.stop(grace_s)

    async def _export(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> bytes:
        self.calls += 1
        try:
            answer = await self._answer(requests, context)
        finally:
            self.calls -= 1
            if self._uncollected > COLLECT_BYTES:
                self._collect()
            self._under_way.pop(context, None)
        if isinstance(answer, bytes):
            return answer
        if answer.later:
            details = refusal(code_pb2.UNAVAILABLE, answer.message, retry=True)
            context.set_trailing_metadata((("grpc-status-details-bin", details),))
        await context.abort(answer.code, answer.message)
        raise AssertionError("abort raises")

    async def _answer(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> bytes | _Refused:
        try:
            if self.calls > MAX_CALLS:
                raise self._intake.busy("more requests arrive than can be read")
            self._intake.admit(dict(context.invocation_metadata() or ()).get("authorization"))
            request = await self._read(requests)
            self._uncollected += len(request)
            self._under_way[context] = len(request)
            return await self._intake.ingest(request)
        except UnauthenticatedError as error:
            return _Refused(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except (MalformedError, TooLargeError) as error:
            return _Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except SlowError as error:
            return _Refused(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except BusyError as error:
            return _Refused(grpc.StatusCode.UNAVAILABLE, str(error), later=True)
        except ConnectionError:  # nobody is there to take it, and this process ends as well
            return _Refused(grpc.StatusCode.UNAVAILABLE, "the sidecar has ended", later=True)
        except Exception as error:  # whatever one request brings about, others are served
            self._intake.failed(error)
            return _Refused(grpc.StatusCode.INTERNAL, "internal error")

    def _collect(self) -> None:
        """Collect garbage, at the end of a call that is still under way itself."""
        self._uncollected = 0
        self._aged += sum(self._under_way.values())
        is_due = self._aged > COLLECT_BYTES
        if is_due:
            self._aged = 0
        gc.collect(2 if is_due else 1)

    async def _read(self, requests: AsyncIterator[bytes]) -> bytes:
        """The request of a call. What is under way in the core is not to be cancelled: it ends
        when the call does."""
        try:
            eviction = await self._places.occupy()
        except TimeoutError:
            raise self._intake.busy("more requests arrive than can be read") from None
        reading = asyncio.ensure_future(anext(requests))
        try:
            await asyncio.wait(
                (reading, eviction), timeout=REQUEST_S, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                return reading.result()
            if eviction.done():
                raise self._intake.busy("others needed the room")
            raise self._intake.slow()
        except StopAsyncIteration:
            raise self._intake.malformed("a call without a request that can be read") from None
        finally:
            self._places.free(eviction)
            reading.add_done_callback(_look_at)


def _tls(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials that ask at each handshake whether there are newer certificates."""
    told = [certificates.pem()]

    def newer() -> grpc.ServerCertificateConfiguration | None:
        pem = certificates.pem()
        if pem is told[0]:
            return None
        told[0] = pem
        return _configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(told[0]),
        newer,  # type: ignore[arg-type]  # None means that there is nothing new
        require_client_authentication=told[0][2] is not None,
    )


def _configuration(
    pem: tuple[bytes, bytes, bytes | None],
) -> grpc.ServerCertificateConfiguration:
    key, chain, client_ca = pem
    return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca)


def _look_at(reading: asyncio.Future[bytes]) -> None:
    """So that nobody warns of an exception that nobody looked at."""
    if not reading.cancelled():
        reading.exception()
