"""Messages of the receiver and the table watch to the decide process, over socket pairs.

A message is a length, a kind and a MessagePack body. The kind lies outside the body so
that the decide process can leave frames undecoded until their turn comes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

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


class PackedStep(NamedTuple):
    """A step record that was packed without being built: its message, and which step it is."""

    step: int
    message: bytes

    def unpacked(self) -> StepFrame:
        """The record."""
        return frame(self.message[_HEAD.size :])


Told = StepFrame | PackedStep | Ready | StartFailed | IngestCounts | Table | Unusable | Beat
"""What goes down these pipes."""


def pack(message: Told) -> bytes:
    """The bytes of one message."""
    if type(message) is PackedStep:
        return message.message
    body = _encoder.encode(message)
    return _HEAD.pack(len(body), _KINDS[type(message)]) + body


def frame(body: bytes) -> StepFrame:
    """The frame in the body of a FRAME; raises ``msgspec.MsgspecError`` when it is none."""
    return _frame_decoder.decode(body)


class PackedMap(NamedTuple):
    """A MessagePack map from names to doubles, for :func:`struct.pack`: a double takes nine
    bytes whatever it is, so two maps with the same names differ in these bytes alone."""

    constants: list[bytes | float]
    """What stands between the values, and in their places, every second one, a 0."""
    pack: Callable[..., bytes]

    @classmethod
    def of(cls, names: Sequence[str], seed_id: str) -> PackedMap:
        """The map of these names, behind the id of a seed if it is of one."""
        constants = [_before(name) for name in names]
        lead = _encoder.encode(seed_id) if seed_id else b""
        constants[0] = lead + _map_of(len(names)) + constants[0]
        form = ">" + "".join(f"{len(constant)}sd" for constant in constants)
        both = [part for constant in constants for part in (constant, 0.0)]
        return cls(both, struct.Struct(form).pack)


@lru_cache(maxsize=1024)
def _before(name: str) -> bytes:
    """What stands before a value in a map."""
    return _encoder.encode(name) + b"\xcb"


def _map_of(count: int) -> bytes:
    """How a map of so many entries begins."""
    return bytes((0x80 | count,)) if count < 16 else b"\xde" + count.to_bytes(2, "big")


_FIELDS = bytes((0x90 | len(StepFrame.__struct_fields__),))
_NO_SEEDS, _NO_END = _map_of(0), _encoder.encode(None)
_STEP_AND_TIME = struct.Struct(">BQBQ").pack
_UINT64 = 0xCF


def packed_identity(run: str, instance: str, rank: int) -> bytes:
    """How the step records of a rank begin."""
    return _FIELDS + b"".join(map(_encoder.encode, (run, instance, rank)))


def packed_step(
    identity: bytes, step: int, time_unix_nano: int, values: bytes, seeds: Collection[bytes]
) -> PackedStep:
    """The step record of parts that are packed: the names of its rank, its values, and each
    seed's."""
    mark = _STEP_AND_TIME(_UINT64, step, _UINT64, time_unix_nano)
    rest = b"".join((_map_of(len(seeds)), *seeds, _NO_END)) if seeds else _NO_SEEDS + _NO_END
    size = len(identity) + len(mark) + len(values) + len(rest)
    return PackedStep(
        step, b"".join((_HEAD.pack(size, MessageKind.FRAME), identity, mark, values, rest))
    )


class Inlet:
    """Cuts what the pipe delivers into (kind, body)."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes | memoryview) -> list[tuple[int, bytes]]:
        """The messages completed by ``data``."""
        buffer = self._bytes
        buffer += data
        found: list[tuple[int, bytes]] = []
        end, size = 0, len(buffer)
        with memoryview(buffer) as view:
            while size - end >= _HEAD.size:
                length, kind = _HEAD.unpack_from(view, end)
                begin = end + _HEAD.size
                if size - begin < length:
                    break
                end = begin + length
                found.append((kind, bytes(view[begin:end])))
        del buffer[:end]
        return found
