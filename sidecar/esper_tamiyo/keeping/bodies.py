"""Bodies: the contents of a segment's entries, as typed MessagePack."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import structs

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.liveness import Key
from esper_tamiyo.judging.saved_structs import SavedEngine, SavedRank, SavedTarget
from esper_tamiyo.language.table import Table

OURS = "tamiyo state"

FORMAT = 1
"""Of all bodies. Another one whenever a field of :mod:`~esper_tamiyo.judging.saved_structs`
comes, goes or changes its meaning: state of another format is set aside."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """The first entry of a segment. ``source`` is the name or file of the table."""

    what: str
    format: int
    release: str
    source: str
    table: Table


class HeaderStart(msgspec.Struct, frozen=True, array_like=True):
    """The part of a header that all formats have."""

    what: str
    format: int


class RankBody(msgspec.Struct, frozen=True, array_like=True):
    """A rank, when it was heard last, and what is known of it."""

    run: str
    rank: int
    heard_unix_nano: int
    saved: msgspec.Raw

    @property
    def key(self) -> Key:
        """Whose it is."""
        return self.run, self.rank


class StepsBody(msgspec.Struct, frozen=True, array_like=True):
    """Steps that were judged in one turn, in their order, and when that was."""

    at_unix_nano: int
    frames: list[StepFrame]


class WriterStatus(msgspec.Struct, frozen=True):
    """How the process that writes stands, as it says: what it cannot write, bytes, when."""

    error: str = ""
    written: int = 0
    at: int = 0


_encoder = msgspec.msgpack.Encoder()
_headers = msgspec.msgpack.Decoder(Header)
_starts = msgspec.msgpack.Decoder(HeaderStart)
_tables = msgspec.msgpack.Decoder(Table)
_engines = msgspec.msgpack.Decoder(SavedEngine)
_rank_bodies = msgspec.msgpack.Decoder(RankBody)
_ranks = msgspec.msgpack.Decoder(SavedRank)
_steps = msgspec.msgpack.Decoder(StepsBody)
_writer_status = msgspec.json.Decoder(WriterStatus)


class ForeignStateError(ValueError):
    """Something else than state of this format; the text says what."""


def encode_body(body: Header | Table | SavedEngine | StepsBody) -> bytes:
    """The bytes of a body."""
    return _encoder.encode(body)


def encode_rank(
    key: Key, saved: SavedRank, heard_unix_nano: int, seeds: Sequence[msgspec.Raw] = ()
) -> bytes:
    """The bytes of a :class:`RankBody`; ``seeds`` come before those of ``saved``."""
    if seeds:
        saved = structs.replace(saved, seeds=[*seeds, *saved.seeds])
    raw = msgspec.Raw(_encoder.encode(saved))
    return _encoder.encode(RankBody(*key, heard_unix_nano, raw))


def encode_seed(saved: SavedTarget) -> msgspec.Raw:
    """A seed as it lies in the body of its rank."""
    return msgspec.Raw(_encoder.encode(saved))


def header(body: bytes | memoryview) -> Header:
    """The header in a body; raises :class:`ForeignStateError`."""
    try:
        start = _starts.decode(body)
    except msgspec.MsgspecError:
        raise ForeignStateError("not state of a sidecar") from None
    if start.what != OURS:
        raise ForeignStateError("not state of a sidecar")
    if start.format != FORMAT:
        raise ForeignStateError(f"state of format {start.format}, and this is {FORMAT}")
    return _headers.decode(body)


def table(body: bytes | memoryview) -> Table:
    """The table in a body; this and what follows raises ``msgspec.MsgspecError``."""
    return _tables.decode(body)


def engine(body: bytes | memoryview) -> SavedEngine:
    """What was saved of the engine, in a body."""
    return _engines.decode(body)


def rank_body(body: bytes | memoryview) -> RankBody:
    """A rank in a body, what is known of it still encoded."""
    return _rank_bodies.decode(body)


def rank(saved: bytes | msgspec.Raw) -> SavedRank:
    """What is known of a rank."""
    return _ranks.decode(saved)


def steps(body: bytes | memoryview) -> StepsBody:
    """The steps in a body."""
    return _steps.decode(body)


def writer_status(line: bytes) -> WriterStatus:
    """What the process that writes has said."""
    return _writer_status.decode(line)
