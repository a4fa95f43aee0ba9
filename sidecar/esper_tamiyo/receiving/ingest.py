"""The ingest process: OTLP metrics over gRPC and HTTP/protobuf in, frames down the pipe.

A process of its own because parsing 10,000 points holds the interpreter for 50 ms, ten
times what a trainer waits for a decision. It ends when its pipe does, so it cannot
outlive the decide process, however that dies.

Run as ``python -m esper_tamiyo.receiving.ingest FD GRPC_ADDRESS HTTP_ADDRESS CREDENTIALS``, the
last as JSON.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import zlib
from contextlib import suppress
from typing import Any, NoReturn

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach the user by our words

import grpc
import msgspec
from aiohttp import web
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from esper_otel.leyline.terminal import log_to_stderr
from esper_tamiyo.receiving.addresses import Address, bind_refusal
from esper_tamiyo.receiving.credentials import BearerAuth, Credentials, CredentialsError
from esper_tamiyo.receiving.otlp_frames import frames_of
from esper_tamiyo.receiving.pipe import IngestCounts, Ready, StartFailed, pack
from esper_tamiyo.receiving.staleness import StalenessFilter

MAX_REQUEST = 4 << 20
"""Largest request after decompression, in bytes."""

PIPE_BACKLOG = 1 << 20
"""Bytes that may wait for the decide process before producers are told to wait."""

MAX_HELD = 16 << 20
"""Bytes of requests that may wait for their turn before producers are told to wait."""

PATIENCE_S = 1.0
"""Longest that a request waits for its turn and the pipe before it is turned away."""

RETRY_AFTER_S = 1
"""When a producer that was turned away may come again."""

STOP_GRACE_S = 0.3
NICE = 10
"""The decide process answers a waiting trainer; this one comes second, and so it does to the
training itself."""

METRICS_SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"
PROTOBUF = "application/x-protobuf"


class MalformedError(Exception):
    """The request is not OTLP."""


class TooLargeError(Exception):
    """The request has more than :data:`MAX_REQUEST` bytes."""


class BusyError(Exception):
    """More comes in than can be taken; the producer should come again later."""


class UnauthenticatedError(Exception):
    """The request does not carry the token."""


class CannotListenError(Exception):
    """The system does not give us that address."""


class Intake:
    """Takes requests in whole or not at all, whichever protocol brought them.

    One at a time, in the order they came: what arrives meanwhile is held, so that too much
    of it is noticed here, and refused with words, instead of growing in memory.
    """

    def __init__(self, pipe: asyncio.StreamWriter, auth: BearerAuth) -> None:
        self._pipe = pipe
        pipe.transport.set_write_buffer_limits(high=PIPE_BACKLOG)
        self._auth = auth
        self._turn = asyncio.Lock()
        self._held = 0
        self._staleness = StalenessFilter()

    def admit(self, authorization: str | bytes | None) -> None:
        """Raise :class:`UnauthenticatedError` for a request without the token.

        Where there is no token to carry, none is asked for.
        """
        if not self._auth.admits(authorization):
            self.count(IngestCounts(unauthorized=1))
            raise UnauthenticatedError(
                "expected the header `Authorization: Bearer` and the token"
            )

    async def ingest(self, data: bytes) -> bytes:
        """Hand the frames of a request on; returns the bytes of the OTLP response."""
        if len(data) > MAX_REQUEST:
            self.count(IngestCounts(too_large=1))
            raise TooLargeError(f"a request may have {MAX_REQUEST} bytes, this has {len(data)}")
        if self._held + len(data) > MAX_HELD:
            raise self._busy("more requests come in than can be read")
        self._held += len(data)
        try:
            async with asyncio.timeout(PATIENCE_S), self._turn:
                await self._pipe.drain()
                return self._hand_on(data)
        except TimeoutError:
            raise self._busy("the decide process does not keep up") from None
        finally:
            self._held -= len(data)

    def count(self, counts: IngestCounts) -> None:
        """Tell the decide process what came in."""
        self._pipe.write(pack(counts))

    def _hand_on(self, data: bytes) -> bytes:
        try:
            request = ExportMetricsServiceRequest.FromString(data)
        except DecodeError as error:
            self.count(IngestCounts(malformed=1))
            raise MalformedError(f"not an ExportMetricsServiceRequest: {error}") from None
        harvest = frames_of(request, self._staleness.is_old)
        self._pipe.writelines([pack(frame) for frame in harvest.frames])
        self.count(
            IngestCounts(
                requests=1,
                points_used=harvest.used,
                points_foreign=harvest.foreign,
                points_unusable=harvest.unusable,
                points_old=harvest.old,
            )
        )
        return success(harvest.unusable)

    def _busy(self, why: str) -> BusyError:
        self.count(IngestCounts(turned_away_busy=1))
        return BusyError(f"{why}; come again later")


class HttpReceiver:
    """``POST /v1/metrics``."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        app = web.Application(client_max_size=MAX_REQUEST + 1)
        app.router.add_post("/v1/metrics", self._export)
        # Bodies are inflated here, because the limit counts what comes out.
        self._runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, shutdown_timeout=STOP_GRACE_S
        )

    async def start(self, address: Address, credentials: Credentials) -> Address:
        """Listen; returns the address with the port the system gave."""
        await self._runner.setup()
        tls = credentials.ssl_context() if credentials.tls_cert else None
        site = web.TCPSite(self._runner, address.host, address.port, ssl_context=tls)
        await site.start()
        return Address(address.host, self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Let running requests end, for a moment."""
        await self._runner.cleanup()

    async def _export(self, request: web.Request) -> web.Response:
        try:
            self._intake.admit(request.headers.get("Authorization"))
        except UnauthenticatedError as error:
            problem = _problem(401, str(error), code_pb2.UNAUTHENTICATED)
            problem.headers["WWW-Authenticate"] = "Bearer"
            return problem
        if request.content_type != PROTOBUF:
            return _problem(415, f"expected {PROTOBUF}, got {request.content_type}")
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("identity", "gzip"):
            return _problem(415, f"expected gzip or no Content-Encoding, got {encoding}")
        try:
            body = await request.read()
            data = inflated(body) if encoding == "gzip" else body
            answer = await self._intake.ingest(data)
        except (web.HTTPRequestEntityTooLarge, TooLargeError):
            return _problem(413, f"a request may have {MAX_REQUEST} bytes after decompression")
        except MalformedError as error:
            return _problem(400, str(error))
        except BusyError as error:
            body = refusal(code_pb2.UNAVAILABLE, str(error), retry=True)
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            return web.Response(status=503, body=body, content_type=PROTOBUF, headers=retry)
        return web.Response(body=answer, content_type=PROTOBUF)


class GrpcReceiver:
    """``MetricsService/Export``, and nothing else."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        # The core's own limit answers RESOURCE_EXHAUSTED, which Python exporters retry;
        # it is set above ours, which answers INVALID_ARGUMENT.
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", 4 * MAX_REQUEST),
        ]
        self._server = grpc.aio.server(options=options)
        export = grpc.unary_unary_rpc_method_handler(self._export)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(METRICS_SERVICE, {"Export": export}),)
        )

    async def start(self, address: Address, credentials: Credentials) -> Address:
        """Listen; returns the address with the port the system gave."""
        if credentials.tls_cert:
            key, chain, client_ca = credentials.pem()
            tls = grpc.ssl_server_credentials(
                [(key, chain)], client_ca, require_client_auth=client_ca is not None
            )
            port = self._server.add_secure_port(str(address), tls)
        else:
            port = self._server.add_insecure_port(str(address))
        await self._server.start()
        return Address(address.host, port)

    async def stop(self) -> None:
        """Let running requests end, for a moment."""
        await self._server.stop(STOP_GRACE_S)

    async def _export(self, data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        sent = dict(context.invocation_metadata() or ())
        try:
            self._intake.admit(sent.get("authorization"))
            return await self._intake.ingest(data)
        except UnauthenticatedError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except (MalformedError, TooLargeError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except BusyError as error:
            details = refusal(code_pb2.UNAVAILABLE, str(error), retry=True)
            context.set_trailing_metadata((("grpc-status-details-bin", details),))
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise AssertionError("abort raises")


def success(unusable: int) -> bytes:
    """An ``ExportMetricsServiceResponse`` that tells of points we could not use."""
    if not unusable:
        return b""
    partial = ExportMetricsPartialSuccess(
        rejected_data_points=unusable,
        error_message=(
            f"{unusable} points of Tolaria or Kasmina without a number, a seed_id, "
            "or a tolaria.step of the same resource and time"
        ),
    )
    return ExportMetricsServiceResponse(partial_success=partial).SerializeToString()


def refusal(code: int, message: str, retry: bool = False) -> bytes:
    """A ``google.rpc.Status``; with ``retry`` it says when to come again."""
    status = Status(code=code, message=message)
    if retry:
        detail = AnyMessage()
        detail.Pack(RetryInfo(retry_delay=Duration(seconds=RETRY_AFTER_S)))
        status.details.append(detail)
    encoded: bytes = status.SerializeToString()
    return encoded


def inflated(body: bytes) -> bytes:
    """``body`` unzipped, but never much beyond the limit."""
    unzip = zlib.decompressobj(wbits=31)
    try:
        data = unzip.decompress(body, MAX_REQUEST + 1)
    except zlib.error as error:
        raise MalformedError(f"not gzip: {error}") from None
    if len(data) <= MAX_REQUEST and not unzip.eof:
        raise MalformedError("not gzip: it ends too early")
    return data


def _problem(status: int, message: str, code: int = code_pb2.INVALID_ARGUMENT) -> web.Response:
    body = refusal(code, message)
    return web.Response(status=status, body=body, content_type=PROTOBUF)


async def serve(
    pipe: socket.socket, grpc_at: Address, http_at: Address, credentials: Credentials
) -> None:
    """Receive until the pipe ends."""
    reader, writer = await asyncio.open_connection(sock=pipe)
    try:
        intake = Intake(writer, BearerAuth(credentials.token_file))
        grpc_receiver, http_receiver = GrpcReceiver(intake), HttpReceiver(intake)
        grpc_at = await _listen(grpc_receiver, grpc_at, credentials, "--otlp-grpc")
        http_at = await _listen(http_receiver, http_at, credentials, "--otlp-http")
    except (CannotListenError, CredentialsError) as error:
        await _give_up(writer, str(error))
    writer.write(pack(Ready(str(grpc_at), str(http_at))))
    with suppress(OSError):
        await reader.read()  # nothing is ever sent this way: it returns when the pipe ends
    await asyncio.gather(grpc_receiver.stop(), http_receiver.stop())


async def _listen(
    receiver: GrpcReceiver | HttpReceiver,
    address: Address,
    credentials: Credentials,
    option: str,
) -> Address:
    refusal = bind_refusal(address)
    if refusal is None:
        try:
            return await receiver.start(address, credentials)
        except (OSError, RuntimeError) as error:
            refusal = str(error)
    raise CannotListenError(f"{option} {address}: cannot listen: {refusal}")


async def _give_up(writer: asyncio.StreamWriter, message: str) -> NoReturn:
    writer.write(pack(StartFailed(message)))
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    os._exit(1)  # gRPC's threads need no goodbye


def main() -> None:
    """Entry point of the child."""
    fd, grpc_at, http_at, credentials = sys.argv[1:5]
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to the whole group
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(logging.WARNING)
    os.nice(NICE)
    with suppress(OSError):  # a batch process never takes the core from whom it finds there
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    pipe = socket.socket(fileno=int(fd))
    asyncio.run(
        serve(
            pipe,
            Address.parse(grpc_at),
            Address.parse(http_at),
            msgspec.json.decode(credentials, type=Credentials),
        )
    )


if __name__ == "__main__":
    main()
