"""The ingest process: OTLP metrics over gRPC and HTTP/protobuf in, frames down the pipe.

A process of its own because parsing 10,000 points holds the interpreter for 50 ms, ten
times what a trainer waits for a decision. It ends when its pipe does, so it cannot
outlive the decide process, however that dies.

Run as ``python -m esper_tamiyo.ingest FD GRPC_ADDRESS HTTP_ADDRESS``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import zlib
from contextlib import suppress
from typing import Any, NoReturn

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach the user by our words

import grpc
from aiohttp import web
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_tamiyo import otlp_replies
from esper_tamiyo.addresses import Address, bind_refusal
from esper_tamiyo.otlp_frames import frames_of
from esper_tamiyo.pipe import Failed, Ready, Tally, pack

MAX_REQUEST = 4 << 20
"""Largest request after decompression, in bytes."""

PIPE_BACKLOG = 1 << 20
"""Bytes that may wait for the decide process before producers are told to wait."""

PIPE_PATIENCE_S = 1.0
"""Longest that a request waits for the pipe before it is turned away."""

STOP_GRACE_S = 0.3
NICE = 5
"""The decide process answers a waiting trainer; this one may come second."""

METRICS_SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"
PROTOBUF = "application/x-protobuf"


class MalformedError(Exception):
    """The request is not OTLP."""


class TooLargeError(Exception):
    """The request has more than :data:`MAX_REQUEST` bytes."""


class BusyError(Exception):
    """The decide process does not keep up; the producer should come again later."""


class CannotListenError(Exception):
    """The system does not give us that address."""


class Intake:
    """Takes requests in whole or not at all, whichever protocol brought them."""

    def __init__(self, pipe: asyncio.StreamWriter) -> None:
        self._pipe = pipe
        pipe.transport.set_write_buffer_limits(high=PIPE_BACKLOG)

    async def take(self, data: bytes) -> bytes:
        """Hand the frames of a request on; returns the bytes of the OTLP response."""
        if len(data) > MAX_REQUEST:
            self.count(Tally(too_large=1))
            raise TooLargeError(f"a request may have {MAX_REQUEST} bytes, this has {len(data)}")
        await self._room()
        try:
            request = ExportMetricsServiceRequest.FromString(data)
        except DecodeError as error:
            self.count(Tally(malformed=1))
            raise MalformedError(f"not an ExportMetricsServiceRequest: {error}") from None
        harvest = frames_of(request)
        self._pipe.writelines([pack(frame) for frame in harvest.frames])
        self.count(
            Tally(
                requests=1,
                points_used=harvest.used,
                points_foreign=harvest.foreign,
                points_unusable=harvest.unusable,
            )
        )
        return otlp_replies.success(harvest.unusable)

    def count(self, tally: Tally) -> None:
        """Tell the decide process what came in."""
        self._pipe.write(pack(tally))

    async def _room(self) -> None:
        try:
            await asyncio.wait_for(self._pipe.drain(), PIPE_PATIENCE_S)
        except TimeoutError:
            self.count(Tally(turned_away_busy=1))
            raise BusyError("the decide process does not keep up") from None


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

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port the system gave."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, address.host, address.port)
        await site.start()
        return Address(address.host, self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Let running requests end, for a moment."""
        await self._runner.cleanup()

    async def _export(self, request: web.Request) -> web.Response:
        if request.content_type != PROTOBUF:
            return _problem(415, f"expected {PROTOBUF}, got {request.content_type}")
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("identity", "gzip"):
            return _problem(415, f"expected gzip or no Content-Encoding, got {encoding}")
        try:
            body = await request.read()
            data = inflated(body) if encoding == "gzip" else body
            answer = await self._intake.take(data)
        except (web.HTTPRequestEntityTooLarge, TooLargeError):
            return _problem(413, f"a request may have {MAX_REQUEST} bytes after decompression")
        except MalformedError as error:
            return _problem(400, str(error))
        except BusyError as error:
            body = otlp_replies.status(otlp_replies.UNAVAILABLE, str(error), retry=True)
            retry = {"Retry-After": str(otlp_replies.RETRY_AFTER_S)}
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

    async def start(self, address: Address) -> Address:
        """Listen; returns the address with the port the system gave."""
        port = self._server.add_insecure_port(str(address))
        await self._server.start()
        return Address(address.host, port)

    async def stop(self) -> None:
        """Let running requests end, for a moment."""
        await self._server.stop(STOP_GRACE_S)

    async def _export(self, data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            return await self._intake.take(data)
        except (MalformedError, TooLargeError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except BusyError as error:
            details = otlp_replies.status(otlp_replies.UNAVAILABLE, str(error), retry=True)
            context.set_trailing_metadata((("grpc-status-details-bin", details),))
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise AssertionError("abort raises")


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


def _problem(status: int, message: str) -> web.Response:
    body = otlp_replies.status(otlp_replies.INVALID_ARGUMENT, message)
    return web.Response(status=status, body=body, content_type=PROTOBUF)


async def serve(pipe: socket.socket, grpc_at: Address, http_at: Address) -> None:
    """Receive until the pipe ends."""
    reader, writer = await asyncio.open_connection(sock=pipe)
    intake = Intake(writer)
    grpc_receiver, http_receiver = GrpcReceiver(intake), HttpReceiver(intake)
    try:
        grpc_at = await _listen(grpc_receiver, grpc_at, "--otlp-grpc")
        http_at = await _listen(http_receiver, http_at, "--otlp-http")
    except CannotListenError as error:
        await _give_up(writer, str(error))
    writer.write(pack(Ready(str(grpc_at), str(http_at))))
    with suppress(OSError):
        await reader.read()  # nothing is ever sent this way: it returns when the pipe ends
    await asyncio.gather(grpc_receiver.stop(), http_receiver.stop())


async def _listen(
    receiver: GrpcReceiver | HttpReceiver, address: Address, option: str
) -> Address:
    refusal = bind_refusal(address)
    if refusal is None:
        try:
            return await receiver.start(address)
        except (OSError, RuntimeError) as error:
            refusal = str(error)
    raise CannotListenError(f"{option} {address}: cannot listen: {refusal}")


async def _give_up(writer: asyncio.StreamWriter, message: str) -> NoReturn:
    writer.write(pack(Failed(message)))
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    os._exit(1)  # gRPC's threads need no goodbye


def main() -> None:
    """Entry point of the child."""
    fd, grpc_at, http_at = sys.argv[1:4]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group
    os.nice(NICE)
    pipe = socket.socket(fileno=int(fd))
    asyncio.run(serve(pipe, Address.parse(grpc_at), Address.parse(http_at)))


if __name__ == "__main__":
    main()
