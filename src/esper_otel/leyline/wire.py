"""Messages of the decision socket and their encoding.

A message is a 4-byte little-endian length and a MessagePack body of at most 64 KiB:
a msgspec struct as an array whose first element is its tag. MessagePack and not pickle,
because a peer that can write to the socket must not be able to run code.

A connection begins with :class:`Hello`, answered by :class:`Welcome` (or
:class:`Refusal`, after which the server closes). Then each :class:`Ask` is answered by
one :class:`Answer` with the same ``request_id``, and so is each :class:`Check`. A client may
send its first Ask right behind the Hello without waiting. Tools send :class:`StatusRequest`,
:class:`LatestRequest`, :class:`RecentRequest` or :class:`SilenceRequest` without a Hello.

Answers also carry the *guards* of the rank, when they have changed: bounds that no update
may cross unchecked. A trainer whose next update crosses one sends a Check before it makes
that update. A sidecar that never sent guards does not support the message, and gets none.

A trainer whose run ends sends a :class:`Goodbye`, which has no answer. A sidecar whose Welcome
does not announce support gets none, because it would close the connection.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from math import inf
from typing import Any

import msgspec

from esper_otel.leyline.decisions import Decision, Proposal

PROTOCOL = 1
MAX_BODY = 64 * 1024

_LENGTH = struct.Struct("<I")
_PEER = struct.Struct("3i")


class WireError(ValueError):
    """Bytes on the socket that are not a message of this protocol."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A trainer introduces itself and names the columns of the rows it will send.

    ``mode`` is its treatment of decisions (``enforce`` or ``advise``), and
    ``began_unix_nano`` the start of its run: of two processes that claim one rank, the one
    that began later is accepted. Older trainers send neither: "" and 0.
    """

    protocol: int
    run: str
    instance: str
    rank: int
    world_size: int
    step_columns: list[str]
    seed_columns: list[str]
    mode: str = ""
    began_unix_nano: int = 0


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The sidecar accepts; ``table_version`` is its current table.

    ``takes_goodbyes``: it supports the message :class:`Goodbye`; older sidecars, without
    this field, do not.
    """

    protocol: int
    table_version: str
    takes_goodbyes: bool = False


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """The sidecar refuses this connection, and the reason."""

    message: str


class SeedRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Values of one seed in the order of ``Hello.seed_columns``; NaN is absent."""

    seed_id: str
    values: list[float]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """A decision request, with the step record of the step just ended.

    ``values`` are in the order of ``Hello.step_columns``; NaN is absent. ``custom`` has the
    step's finite custom values by name; older trainers send none, and older sidecars ignore
    it.
    """

    request_id: int
    step: int
    time_unix_nano: int
    values: list[float]
    seeds: list[SeedRow] = []
    proposal: Proposal | None = None
    custom: dict[str, float] = {}


class Check(msgspec.Struct, frozen=True, array_like=True, tag="check"):
    """May this update be made? With the known values of a step before its optimizer steps.

    ``values`` are in the order of ``Hello.step_columns``; NaN is absent or not known yet,
    and ``nonfinite`` counts non-finite values. The decision of the answer is about this one
    update: its parameters may be ``lr_scale``, ``momentum_scale``, ``max_norm``, ``skip_step``
    and ``restore``.
    The step itself arrives by the Ask or the stream, after the update.
    """

    request_id: int
    step: int
    time_unix_nano: int
    values: list[float]


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    """The run of this connection's trainer has ended after ``step``, its last one.

    ``how`` is a :class:`~esper_otel.leyline.endings.HowEnded`, or a value of a later version;
    ``exception`` the name of the type that ended it. An Ask about a later step withdraws it.
    """

    step: int
    time_unix_nano: int
    how: str
    exception: str = ""


class Guard(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A value of ``metric`` above ``above`` or below ``below`` needs a check.

    ``skips``: a trainer whose values are still on a device, or whose check is not answered in
    time, may skip an update beyond it. An update whose value is above ``held_above`` is made as
    with ``held_to`` where its check is not answered: the gradient norm is clipped, or the
    learning rate or the momentum scaled, to that.
    """

    metric: str
    above: float = inf
    below: float = -inf
    skips: bool = False
    held_above: float = inf
    held_to: float = inf


GUARDED = ("loss", "gradient_norm", "optimizer_lr", "optimizer_momentum", "nonfinite")
"""Metrics that guards are about: known before the update, on a CPU."""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """The decision about the step of the Ask or Check with the same ``request_id``.

    ``guards`` replace those sent before; None: they are unchanged.
    """

    request_id: int
    decision: Decision
    guards: list[Guard] | None = None


class StatusRequest(msgspec.Struct, frozen=True, array_like=True, tag="status?"):
    """A tool requests the state of the sidecar."""


class Status(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """The sidecar's state as plain data, for tools and people."""

    report: dict[str, Any]


class LatestRequest(msgspec.Struct, frozen=True, array_like=True, tag="latest?"):
    """A tool requests the newest decision of a rank; an empty run means the newest run."""

    run: str = ""
    rank: int = 0


class Latest(msgspec.Struct, frozen=True, array_like=True, tag="latest"):
    """The newest decision of that rank, None if the sidecar does not know the rank."""

    decision: Decision | None


class RecentRequest(msgspec.Struct, frozen=True, array_like=True, tag="recent?"):
    """A tool requests the state of the ranks, and the new steps and decisions of one of them.

    An empty ``run`` means the newest run. Of the process ``instance`` it knows the steps up to
    ``step``, and of the run the decisions up to number ``decision``.
    """

    run: str = ""
    rank: int = 0
    instance: str = ""
    step: int = -1
    decision: int = 0


class RankNow(msgspec.Struct, frozen=True, array_like=True):
    """One rank: its newest step, its state, and the newest decision about it.

    ``state`` is healthy, stale, finished or failed, and ``ended`` says how it ended, if it
    did. ``mode`` is the trainer's treatment of decisions, "" if unknown. Unknown values are
    NaN.
    """

    run: str
    rank: int
    step: int
    time_unix_nano: int
    state: str
    ended: str
    mode: str
    action: str
    reason: str
    loss: float
    step_latency_ms: float


class DecisionNote(msgspec.Struct, frozen=True, array_like=True):
    """A decision that was not CONTINUE, or had findings; ``number`` counts all that were made.

    ``of_update``: about an update before it was made. ``text`` is that of the winning rule.
    """

    number: int
    rank: int
    step: int
    time_unix_nano: int
    action: str
    severity: str
    reason: str
    of_update: bool
    text: str
    values: dict[str, float]


class Recent(msgspec.Struct, frozen=True, array_like=True, tag="recent"):
    """Some or all of the ``of`` ranks, and the requested data of one rank.

    ``rows`` are steps, their first two columns the step and its Unix time in nanoseconds, then
    those that ``columns`` name, NaN for an absent value; ``more`` rows wait for the next
    request. ``seeds`` has (stage, alpha) by seed, at the newest step.
    """

    ranks: list[RankNow]
    of: int
    run: str
    rank: int
    instance: str
    columns: list[str]
    rows: list[list[float]]
    more: bool
    seeds: dict[str, tuple[float, float]]
    decisions: list[DecisionNote]


class SilenceRequest(msgspec.Struct, frozen=True, array_like=True, tag="silence?"):
    """A tool requests that a rule neither acts nor is among the findings for one run.

    ``steps`` says for how many, None until the run ends; ``undo`` ends it.
    """

    run: str
    rule: str
    steps: int | None = None
    undo: bool = False


class SilenceReply(msgspec.Struct, frozen=True, array_like=True, tag="silence"):
    """The outcome, in words; ``error`` has the reason of a failure, "" after success."""

    told: str
    error: str = ""


ToServer = (
    Hello
    | Ask
    | Check
    | Goodbye
    | StatusRequest
    | LatestRequest
    | RecentRequest
    | SilenceRequest
)
ToClient = Welcome | Refusal | Answer | Status | Latest | Recent | SilenceReply

_NO_MESSAGE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises; the last one for fields nobody asked for that are nested too deeply."""

_encoder = msgspec.msgpack.Encoder()
_server_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
_client_decoder: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


def encode(message: ToServer | ToClient) -> bytes:
    """The bytes of one message, length included; :class:`WireError` when over 64 KiB."""
    body = _encoder.encode(message)
    if len(body) > MAX_BODY:
        raise WireError(f"a message may have {MAX_BODY} bytes, this one has {len(body)}")
    return _LENGTH.pack(len(body)) + body


def decode_to_server(body: bytes | bytearray | memoryview) -> ToServer:
    """A body as the server reads it; :class:`WireError` when it is none."""
    try:
        return _server_decoder.decode(body)
    except _NO_MESSAGE as error:
        raise WireError(f"not a message of protocol {PROTOCOL}: {error}") from None


def decode_to_client(body: bytes | bytearray | memoryview) -> ToClient:
    """A body as the client reads it; :class:`WireError` when it is none."""
    try:
        return _client_decoder.decode(body)
    except _NO_MESSAGE as error:
        raise WireError(f"not a message of protocol {PROTOCOL}: {error}") from None


class MessageBuffer:
    """Cuts a byte stream into bodies; what is left of the last one waits for more."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        """Bytes that wait for the rest of their message."""
        return len(self._bytes)

    def feed(self, data: bytes | memoryview) -> Iterator[bytes | memoryview]:
        """Each body completed by ``data``; to be used up before ``data`` is overwritten.

        Raises :class:`WireError` as soon as a length over 64 KiB is announced, so that
        nobody makes the reader hold more than that.
        """
        length = len(data) - 4
        if (
            not self._bytes
            and 0 < length <= MAX_BODY
            and _LENGTH.unpack_from(data)[0] == length
        ):
            return iter((data[4:],))  # nearly always: one read, one message
        return self._cut(data)

    def _cut(self, data: bytes | memoryview) -> Iterator[bytes]:
        buffer = self._bytes
        buffer += data
        while len(buffer) >= 4:
            (length,) = _LENGTH.unpack_from(buffer)
            if length > MAX_BODY:
                raise WireError(f"a message may have {MAX_BODY} bytes, one of {length} came")
            if len(buffer) < 4 + length:
                return
            body = bytes(buffer[4 : 4 + length])
            del buffer[: 4 + length]
            yield body


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(peer)[1])


def may_steer(uid: int) -> bool:
    """Whether that user may be at the other end: ourselves, and root, who could anyway."""
    return uid in (0, os.geteuid())
