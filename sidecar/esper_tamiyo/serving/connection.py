"""One connection of the decision socket: bytes in, messages out, never waiting."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from itertools import compress
from math import isfinite

from esper_otel.leyline.custom import custom_key
from esper_otel.leyline.frames import MAX_CUSTOM, MAX_CUSTOM_NAME, StepFrame
from esper_otel.leyline.metrics import SEED_SLOT, STEP_SLOT
from esper_otel.leyline.wire import (
    Ask,
    Check,
    Hello,
    MessageBuffer,
    ToClient,
    ToServer,
    WireError,
    decode_to_server,
    encode,
    peer_uid,
)
from esper_tamiyo.judging.update_guards import AnnouncedGuards

IDLE_NS = 600_000_000_000
"""Ten minutes without a message, after which a connection that asked once may have to go."""

MAX_BACKLOG = 256 * 1024
"""Unread answers, in bytes, after which a client is given up."""

ENFORCE = "enforce"
"""What a trainer says of itself that applies decisions."""

_UNKNOWN = ""
"""Stands for every column that is not in the registry."""


class Columns:
    """Turns rows of one kind into values by key."""

    __slots__ = ("_all_known", "_keys", "in_registry_order")

    def __init__(self, names: list[str], known: dict[str, int]) -> None:
        self._keys = [name if name in known else _UNKNOWN for name in names]
        self._all_known = _UNKNOWN not in self._keys
        self.in_registry_order = names == list(known)

    def values(self, row: list[float]) -> dict[str, float]:
        """The present values of a row, the finite ones; raises :class:`WireError`."""
        if len(row) != len(self._keys):
            raise WireError(f"{len(self._keys)} columns were named, a row has {len(row)}")
        values = dict(compress(zip(self._keys, row, strict=True), map(isfinite, row)))
        if not self._all_known:
            values.pop(_UNKNOWN, None)
        return values


class Trainer:
    """Who asks on a connection, and what the places of its rows mean."""

    __slots__ = (
        "_seed_columns",
        "_step_columns",
        "announced",
        "in_registry_order",
        "instance",
        "key",
    )

    def __init__(self, hello: Hello) -> None:
        self.key = (hello.run, hello.rank)
        self.instance = hello.instance
        self._step_columns = Columns(hello.step_columns, STEP_SLOT)
        self._seed_columns = Columns(hello.seed_columns, SEED_SLOT)
        self.in_registry_order = self._step_columns.in_registry_order
        """Whether its rows can be held against guards as they are."""
        self.announced = AnnouncedGuards() if hello.mode == ENFORCE else None
        """What it was told of the guards of its updates; None: it makes them as they are."""

    def frame_of_check(self, check: Check) -> StepFrame:
        """What a check says of its step; raises :class:`WireError` for a row that does not
        fit."""
        values = self._step_columns.values(check.values)
        values["step"] = float(check.step)
        run, rank = self.key
        return StepFrame(run, self.instance, rank, check.step, check.time_unix_nano, values)

    def frame_of_ask(self, ask: Ask) -> StepFrame:
        """The frame of an ask; raises :class:`WireError` for rows that do not fit."""
        values = self._step_columns.values(ask.values)
        values["step"] = float(ask.step)
        if ask.custom:
            values.update(_custom_values(ask.custom))
        seeds = (
            {row.seed_id: self._seed_columns.values(row.values) for row in ask.seeds}
            if ask.seeds
            else {}
        )
        run, rank = self.key
        return StepFrame(run, self.instance, rank, ask.step, ask.time_unix_nano, values, seeds)


def _custom_values(custom: dict[str, float]) -> dict[str, float]:
    """Custom values by key; raises :class:`WireError` for more, or longer names, than any
    trainer has."""
    if len(custom) > MAX_CUSTOM or any(len(name) > MAX_CUSTOM_NAME for name in custom):
        raise WireError(
            f"a step may have {MAX_CUSTOM} custom values, with names of {MAX_CUSTOM_NAME} "
            "characters"
        )
    return {custom_key(name): value for name, value in custom.items() if isfinite(value)}


class ClientConnection:
    """A client's socket with what it has not yet sent and not yet read."""

    __slots__ = ("_incoming", "_outgoing", "_socket", "asks", "fd", "heard_ns", "trainer")

    def __init__(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        self._socket = accepted
        self.fd = accepted.fileno()
        self.trainer: Trainer | None = None
        self.asks = False
        """Whether it has ever asked about a step."""
        self.heard_ns = time.perf_counter_ns()
        """When it was made or asked last."""
        self._incoming = MessageBuffer()
        self._outgoing = bytearray()

    def messages(self, data: memoryview) -> Iterable[ToServer]:
        """The messages completed by ``data``; raises :class:`WireError`."""
        return map(decode_to_server, self._incoming.feed(data))

    def receive_into(self, buffer: bytearray) -> int:
        """As ``socket.recv_into``: 0 is the end, and errors are the socket's."""
        return self._socket.recv_into(buffer)

    def send(self, message: ToClient) -> bool:
        """Send what the socket takes now and keep the rest; False: the client is gone."""
        data = encode(message)
        if self._outgoing:
            self._outgoing += data
            return len(self._outgoing) <= MAX_BACKLOG
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent < len(data):
            self._outgoing += data[sent:]
        return True

    def flush(self) -> bool:
        """Send more of what was kept; False: the client is gone."""
        try:
            sent = self._socket.send(self._outgoing)
        except BlockingIOError:
            return True
        except OSError:
            return False
        del self._outgoing[:sent]
        return True

    @property
    def uid(self) -> int:
        """The user at the other end, as the kernel knows it."""
        return peer_uid(self._socket)

    @property
    def backlog(self) -> int:
        """Bytes the client has not read yet."""
        return len(self._outgoing)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def idlest(connections: Iterable[ClientConnection]) -> ClientConnection | None:
    """Who has to go when there are too many: who was never asked anything by, for longest.

    A trainer asks within a step, a tool at once. Of those that have asked, one goes that did
    not for :data:`IDLE_NS`, as a trainer connects anew; None where there is none.
    """
    oldest = min(connections, key=lambda each: (each.asks, each.heard_ns), default=None)
    if oldest is None or not oldest.asks:
        return oldest
    return oldest if time.perf_counter_ns() - oldest.heard_ns > IDLE_NS else None
