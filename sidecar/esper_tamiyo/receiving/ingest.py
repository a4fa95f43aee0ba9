"""The receiver process: OTLP over gRPC and HTTP/protobuf in, step records down the pipe.

A process of its own because parsing 10,000 points holds the interpreter for 50 ms, ten
times what a trainer waits for a decision. It ends when its pipe does, so it cannot
outlive the decide process, however that dies.

Run as ``python -m esper_tamiyo.receiving.ingest FD GRPC_ADDRESS HTTP_ADDRESS CREDENTIALS MB``,
the credentials as JSON; MB is the most memory it may have.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach the user by our words

import msgspec

from esper_otel.leyline.terminal import log_to_stderr
from esper_tamiyo.child_process import BY_TERMINALS, become_child, rss_mb
from esper_tamiyo.receiving.addresses import Address, bind_refusal
from esper_tamiyo.receiving.connections import MAX_CONNECTIONS
from esper_tamiyo.receiving.credentials import (
    BearerAuth,
    Certificates,
    Credentials,
    CredentialsError,
)
from esper_tamiyo.receiving.grpc_receiver import MAX_CHANNELS, GrpcReceiver
from esper_tamiyo.receiving.http_receiver import HttpReceiver
from esper_tamiyo.receiving.intake import PIPE_BACKLOG, Intake
from esper_tamiyo.receiving.pipe import Beat, Ready, StartFailed, pack

log = logging.getLogger("tamiyo")

BEAT_S = 1.0
"""How often the process says that it turns its loop."""

OWN_DESCRIPTORS = 96
"""Descriptors that are not for connections: files, listening sockets, those of gRPC."""

STOP_GRACE_S = 0.3
NICE = 10
"""The decide process answers a waiting trainer; this one comes second, and so it does to the
training itself."""


class CannotListenError(Exception):
    """The system does not give us that address."""


async def serve(
    pipe: socket.socket,
    grpc_at: Address,
    http_at: Address,
    credentials: Credentials,
    memory_mb: float,
) -> None:
    """Receive until the pipe ends."""
    reader, writer = await asyncio.open_connection(sock=pipe)
    try:
        intake = Intake(writer, BearerAuth(credentials.token_file))
        asyncio.get_running_loop().set_exception_handler(_handler_for(intake))
        certificates = Certificates(credentials) if credentials.tls_cert else None
        http_limit, grpc_limit = connection_limits(
            resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        )
        grpc_receiver = GrpcReceiver(intake, grpc_limit, certificates)
        http_receiver = HttpReceiver(intake, http_limit, certificates)
        grpc_at = await _listen("--otlp-grpc", grpc_at, grpc_receiver)
        http_at = await _listen("--otlp-http", http_at, http_receiver)
    except (CannotListenError, CredentialsError) as error:
        await _give_up(writer, str(error))
    gc.collect()
    gc.freeze()  # what is there now stays, so that collecting the rest takes no time
    writer.write(pack(Ready(str(grpc_at), str(http_at))))
    beating = asyncio.create_task(
        _beat(writer, intake, grpc_receiver, http_receiver, memory_mb)
    )
    with suppress(OSError):
        await reader.read()  # nothing is ever sent this way: it returns when the pipe ends
    beating.cancel()
    await asyncio.gather(grpc_receiver.stop(STOP_GRACE_S), http_receiver.stop(STOP_GRACE_S))


async def _beat(
    pipe: asyncio.StreamWriter,
    intake: Intake,
    grpc_receiver: GrpcReceiver,
    http_receiver: HttpReceiver,
    memory_mb: float,
) -> None:
    """Say about once a second that the loop turns, and end when too much memory is held.

    The bounds of all parts keep well below ``memory_mb``; it is for what they do not know of.
    """
    while True:
        rss = rss_mb()
        if rss > memory_mb:
            log.error(
                "the ingest process has %.0f MB, more than its limit of %.0f MB: it restarts, "
                "and producers resend unanswered requests",
                rss,
                memory_mb,
            )
            os._exit(1)
        if pipe.transport.get_write_buffer_size() < PIPE_BACKLOG:  # else enough waits there
            pipe.write(
                pack(
                    Beat(len(http_receiver.connections), grpc_receiver.calls, intake.held, rss)
                )
            )
        await asyncio.sleep(BEAT_S)


def connection_limits(descriptors: int) -> tuple[int, int]:
    """Most connections over HTTP and over gRPC, with so many descriptors in all."""
    free = max(descriptors - OWN_DESCRIPTORS, 8)
    share = free // 4
    over_grpc = min(MAX_CHANNELS, max(share, free - MAX_CONNECTIONS))
    return min(MAX_CONNECTIONS, free - over_grpc), over_grpc


def _handler_for(intake: Intake) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What the loop tells of exceptions that nobody caught: counted, each kind logged once."""

    def on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, ConnectionError | ssl.SSLError):
            intake.failed(error or RuntimeError(context.get("message")))

    return on_exception


async def _listen(
    option: str, address: Address, receiver: GrpcReceiver | HttpReceiver
) -> Address:
    refusal = bind_refusal(address)
    if refusal is None:
        try:
            return await receiver.start(address)
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
    fd, grpc_at, http_at, credentials, memory_mb = sys.argv[1:6]
    # What was not answered is sent again.
    pipe = become_child(fd, ignored=BY_TERMINALS, at_parents_death=signal.SIGKILL, nice=NICE)
    log_to_stderr(logging.WARNING)
    for other in ("asyncio", "grpc", "aiohttp"):  # what a stranger brings about is counted
        logging.getLogger(other).setLevel(logging.CRITICAL)
    asyncio.run(
        serve(
            pipe,
            Address.parse(grpc_at),
            Address.parse(http_at),
            msgspec.json.decode(credentials, type=Credentials),
            float(memory_mb),
        )
    )


if __name__ == "__main__":
    main()
