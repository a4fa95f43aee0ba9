"""Messages between the decide process and the journal writer, both ways.

The decide process sends lists of messages in MessagePack: entries as they are written to
the journal, outcome reports to be worked out, and a heartbeat with the histograms of its
answers, which cost the answering thread a fraction of a microsecond per value. The journal
writer answers with its status.
"""

from __future__ import annotations

from bisect import bisect_left
from math import inf
from typing import Any

import msgspec

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling.entries import AnyEntry, Decided
from esper_tamiyo.journaling.field_reports import DueReport

ANSWER_MS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Bounds for answers, around the trainer's deadline of 5 ms."""

LAG_MS = (1.0, 5.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 10e3, 30e3, 60e3)
"""Bounds for the way from a point's own time to its evaluation."""


class Distribution(msgspec.Struct, frozen=True):
    """A histogram as it stands: ``counts`` has one more element than ``bounds``.

    Without values ``lowest`` is infinite and ``highest`` is minus that.
    """

    bounds: list[float]
    counts: list[int]
    total: float
    lowest: float
    highest: float


class Histogram:
    """Counts of values up to each bound, and one more for what is above all of them."""

    __slots__ = ("_bounds", "_counts", "_highest", "_lowest", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lowest = inf
        self._highest = -inf

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        if value < self._lowest:
            self._lowest = value
        if value > self._highest:
            self._highest = value

    def snapshot(self) -> Distribution:
        """A copy to send away; counts are those since the beginning."""
        return Distribution(
            list(self._bounds), list(self._counts), self._total, self._lowest, self._highest
        )

    def at_most(self, share: float) -> float | None:
        """The bound that ``share`` of the values do not exceed, None without values.

        Infinite when they exceed the highest bound.
        """
        count = sum(self._counts)
        if not count:
            return None
        below = 0
        for bound, here in zip(self._bounds, self._counts, strict=False):
            below += here
            if below >= share * count:
                return bound
        return inf


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="pulse"):
    """How the decide process is, about once a second; never written to the journal.

    ``report`` is that of ``tamiyo status``, ``distributions`` are by name; both count
    from ``began_unix_nano``.
    """

    beat: int
    began_unix_nano: int
    report: dict[str, Any]
    distributions: dict[str, Distribution]


Message = AnyEntry | DueReport | Heartbeat
"""What the decide process sends to the journal writer."""


class JournalWriterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal writer tells the decide process, once a second and on every change.

    ``error`` says why the journal cannot be written, "" when it can; ``written`` and
    ``lost`` count entries, ``files_taken_away`` how often others deleted, moved or cut the
    file that was being written; ``exports`` names the endpoints its own telemetry goes to.
    """

    written: int = 0
    lost: int = 0
    files_taken_away: int = 0
    error: str = ""
    exports: list[str] = []


_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(list[Message])
_status = msgspec.msgpack.Decoder(JournalWriterStatus)


def is_for_journal(message: Message) -> bool:
    """Whether a line of the journal is made of it; a CONTINUE without a finding is a sample
    for the trace."""
    if isinstance(message, Decided):
        return message.action is not Action.CONTINUE or bool(message.findings)
    return not isinstance(message, Heartbeat)


def pack(messages: list[Message] | JournalWriterStatus) -> bytes:
    """The bytes of one datagram between the two processes."""
    return _encoder.encode(messages)


def decode_messages(data: bytes | memoryview) -> list[Message]:
    """The messages of one datagram; raises ``msgspec.MsgspecError``."""
    return _messages.decode(data)


def decode_status(data: bytes) -> JournalWriterStatus:
    """The journal writer's status in one datagram; raises ``msgspec.MsgspecError``."""
    return _status.decode(data)
