"""Many trainers that send OTLP at once, for :mod:`bench.ingest`.

    python -m bench.fleet http|grpc HOST:PORT

Prints one line when it is ready. Then reads lines of points per second and seconds, sends
for so long, and answers each line with what became of what it sent, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

import grpc

from bench.roundtrip_peers import FRAME, Trainer

TRAINERS = 512
STEPS = 25
POINTS = STEPS * len(FRAME)
"""Data points in a request."""

CHANNELS = 8
EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"

Send = Callable[[bytes], Awaitable[str]]
"""Sends a request; ``accepted``, ``refused`` (with a time to come back), or what else."""


async def http_sender(host: str, port: int, stack: AsyncExitStack) -> Send:
    """Sends over a connection of its own, and over a new one where that was closed as idle."""
    reader, writer = await asyncio.open_connection(host, port)
    stack.callback(lambda: writer.close())

    async def answer_to(body: bytes) -> tuple[bytes, bytes]:
        writer.write(
            b"POST /v1/metrics HTTP/1.1\r\nHost: bench\r\nContent-Type: application/x-protobuf"
            b"\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        writer.write(body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        return head, await reader.readexactly(length)

    async def send(body: bytes) -> str:
        nonlocal reader, writer
        while True:
            try:
                head, answer = await answer_to(body)
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                reader, writer = await asyncio.open_connection(host, port)
            else:
                break
        status = head.split()[1].decode()
        if status == "200" and not answer:
            return "accepted"
        return "refused" if status == "503" and b"retry-after:" in head else status

    return send


def grpc_sender(channel: grpc.aio.Channel) -> Send:
    """Sends over a channel that others share."""
    call = channel.unary_unary(EXPORT, None, None)

    async def send(body: bytes) -> str:
        try:
            answer = await call(body, timeout=30)
        except grpc.aio.AioRpcError as error:
            trailers: Any = error.trailing_metadata() or ()
            later = error.code() is grpc.StatusCode.UNAVAILABLE and (
                b"RetryInfo" in dict(trailers).get("grpc-status-details-bin", b"")
            )
            return "refused" if later else error.code().name
        return "rejected in part" if answer else "accepted"

    return send


async def one(
    trainer: Trainer, send: Send, place: int, every_s: float, until: float, fates: Counter[str]
) -> None:
    """A trainer that sends when it is time, or late, but never two requests at once."""
    due = perf_counter() + every_s * place / TRAINERS
    while due < until:
        await asyncio.sleep(max(0.0, due - perf_counter()))
        fates[await send(trainer.request())] += 1
        due += every_s


async def serve(protocol: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    trainers = [Trainer("fleet", rank, STEPS) for rank in range(TRAINERS)]
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        if protocol == "http":
            senders = [await http_sender(host, int(port), stack) for _ in trainers]
        else:
            own = [("grpc.use_local_subchannel_pool", 1)]
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address, own))
                for _ in range(CHANNELS)
            ]
            senders = [grpc_sender(channels[rank % CHANNELS]) for rank in range(TRAINERS)]
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            rate, seconds = map(float, line.split())
            fates: Counter[str] = Counter()
            began = perf_counter()
            await asyncio.gather(
                *(
                    one(trainer, send, place, TRAINERS * POINTS / rate, began + seconds, fates)
                    for place, (trainer, send) in enumerate(zip(trainers, senders, strict=True))
                )
            )
            took = perf_counter() - began
            print(json.dumps({"fates": fates, "seconds": took}), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:3]))
