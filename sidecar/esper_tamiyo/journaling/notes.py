"""Notes: what the decide process tells the scribe, and what it is told in return.

Each message of their pipe is a list of notes in MessagePack. Entries travel as they are
written to the journal.
"""

from __future__ import annotations

from typing import Any

import msgspec

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling.entries import AnyEntry, Decided
from esper_tamiyo.journaling.field_reports import Due


class Distribution(msgspec.Struct, frozen=True):
    """A histogram as it stands: ``counts`` has one more element than ``bounds``.

    Without values ``lowest`` is infinite and ``highest`` is minus that.
    """

    bounds: list[float]
    counts: list[int]
    total: float
    lowest: float
    highest: float


class Pulse(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="pulse"):
    """How the decide process is, about once a second; never written to the journal.

    ``report`` is that of ``tamiyo status``, ``distributions`` are by name; both count
    from ``began_unix_nano``.
    """

    beat: int
    began_unix_nano: int
    report: dict[str, Any]
    distributions: dict[str, Distribution]


Note = AnyEntry | Due | Pulse
"""What the decide process tells the scribe."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What the scribe tells the decide process, about once a second and on every change.

    ``error`` says why the journal cannot be written, "" when it can; ``written`` and
    ``lost`` count entries; ``exports`` names the endpoints its own telemetry goes to.
    """

    written: int = 0
    lost: int = 0
    error: str = ""
    exports: list[str] = []


_encoder = msgspec.msgpack.Encoder()
_notes = msgspec.msgpack.Decoder(list[Note])
_standing = msgspec.msgpack.Decoder(Standing)


def is_for_journal(note: Note) -> bool:
    """Whether a line of the journal is made of it; a CONTINUE is a sample for the trace."""
    if isinstance(note, Decided):
        return note.action is not Action.CONTINUE
    return not isinstance(note, Pulse)


def pack(notes: list[Note] | Standing) -> bytes:
    """The bytes of one message between the two processes."""
    return _encoder.encode(notes)


def notes_in(data: bytes | memoryview) -> list[Note]:
    """The notes of one message; raises ``msgspec.MsgspecError``."""
    return _notes.decode(data)


def standing_in(data: bytes) -> Standing:
    """The scribe's standing in one message; raises ``msgspec.MsgspecError``."""
    return _standing.decode(data)
