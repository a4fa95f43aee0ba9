"""Messages of the receiver and the table watch to the decide process, over socket pairs.

A message is a length, a kind and a MessagePack body. The kind lies outside the body so
that the decide process can leave frames undecoded until their turn comes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

import msgspec

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.language.table import Table


class MessageKind(IntEnum):
    """What a body is."""

    FRAME = 0
    READY = 1
    FAILED = 2
    COUNTS = 3
    TABLE = 4
    UNUSABLE = 5
    BEAT = 6


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """Both receivers listen, at these addresses (host:port)."""

    grpc: str
    http: str


class StartFailed(msgspec.Struct, frozen=True, array_like=True):
    """The ingest process cannot start, and why."""

    message: str


class Unusable(msgspec.Struct, frozen=True, array_like=True):
    """The table's file cannot be used as it is now, and why."""

    message: str


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """The process turns its loop, said about once a second; and how it is.

    ``connections`` are those of the HTTP receiver, ``calls`` those of gRPC that are under way,
    ``held_bytes`` what of requests is coming in or waits.
    """

    connections: int = 0
    calls: int = 0
    held_bytes: int = 0
    rss_mb: float = 0.0


class IngestCounts(msgspec.Struct, array_like=True):
    """What came in since it was last told.

    Every data point of a request that could be read is one of used, foreign, unusable and
    old; ``unusable_*`` say why, and add up to unusable. Of requests that were refused
    (malformed, too large, turned away, unauthorized, timed out, failed) nothing was taken.
    ``connections_evicted`` were closed to make room for others, ``connections_timed_out``
    because nothing came from them; ``accepts_failed`` found the system without descriptors.
    """

    requests: int = 0
    points_used: int = 0
    points_foreign: int = 0
    points_unusable: int = 0
    points_old: int = 0
    malformed: int = 0
    too_large: int = 0
    turned_away_busy: int = 0
    unauthorized: int = 0
    timed_out: int = 0
    failed: int = 0
    unusable_no_step: int = 0
    unusable_name: int = 0
    unusable_time: int = 0
    unusable_seeds: int = 0
    unusable_amount: int = 0
    connections_evicted: int = 0
    connections_timed_out: int = 0
    accepts_failed: int = 0


_HEAD = struct.Struct("<IB")
_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(StepFrame)

_KINDS: dict[type, MessageKind] = {
    StepFrame: MessageKind.FRAME,
    Ready: MessageKind.READY,
    StartFailed: MessageKind.FAILED,
    IngestCounts: MessageKind.COUNTS,
    Beat: MessageKind.BEAT,
    Table: MessageKind.TABLE,
    Unusable: MessageKind.UNUSABLE,
}


Told = StepFrame | Ready | StartFailed | IngestCounts | Table | Unusable | Beat
"""What goes down these pipes."""


def pack(message: Told) -> bytes:
    """The bytes of one message."""
    body = _encoder.encode(message)
    return _HEAD.pack(len(body), _KINDS[type(message)]) + body


def frame(body: bytes) -> StepFrame:
    """The frame in the body of a FRAME; raises ``msgspec.MsgspecError`` when it is none."""
    return _frame_decoder.decode(body)


class Inlet:
    """Cuts what the pipe delivers into (kind, body)."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield each message completed by ``data``."""
        buffer = self._bytes
        buffer += data
        while len(buffer) >= _HEAD.size:
            length, kind = _HEAD.unpack_from(buffer)
            end = _HEAD.size + length
            if len(buffer) < end:
                return
            body = bytes(buffer[_HEAD.size : end])
            del buffer[:end]
            yield kind, body
