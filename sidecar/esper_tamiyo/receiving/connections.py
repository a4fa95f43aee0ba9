"""Connections of the HTTP receiver: how many, for how long, and which close to make room.

Whoever sends nothing, or a request that never ends, is closed after a while. When there are
too many, or no descriptors are left, the one that has been silent or unfinished for the longest
goes for the one that comes: a stranger who holds a thousand connections keeps nobody out.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.pipe import IngestCounts

log = logging.getLogger("tamiyo")

MAX_CONNECTIONS = 1024
"""Most connections at once, where the system gives so many descriptors."""

FIRST_S = 10.0
"""Longest that a connection may take to its first whole request's headers, TLS included."""

IDLE_S = 120.0
"""Longest that a connection may be silent between two requests."""

ANSWER_S = 60.0
"""Longest that a whole request is with us and its answer with the producer."""

HANDSHAKE_S = 5.0
SWEEP_S = 1.0
PAUSE_S = 0.5
"""How long nobody is accepted when the system has no descriptors left."""

MAX_HEADS = 4 << 20
"""Most bytes of requests whose headers are not complete, of all connections together."""

_AT_ONCE = 64


class Abortable(Protocol):
    """What is kept of an open connection."""

    def abort(self) -> None:
        """Close it, now."""


class Connections:
    """Who is connected, and until when that may go on without news."""

    def __init__(
        self, limit: int, count: Callable[[IngestCounts], None], clock: Callable[[], float]
    ) -> None:
        """``clock`` gives seconds, those of the event loop."""
        self.limit = limit
        self._count = count
        self._clock = clock
        self._waiting: dict[Abortable, float] = {}
        """Until when, of those that are silent or unfinished; the longest so come first."""
        self._answering: dict[Abortable, float] = {}
        self._heads = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._answering)

    def waits(self, connection: Abortable, seconds: float) -> None:
        """It is to send something within so many seconds."""
        self.forget(connection)
        self._waiting[connection] = self._clock() + seconds

    def answers(self, connection: Abortable) -> None:
        """Its request is whole: what happens now is up to us."""
        self.forget(connection)
        self._answering[connection] = self._clock() + ANSWER_S

    def forget(self, connection: Abortable) -> None:
        """It is closed."""
        self._waiting.pop(connection, None)
        self._answering.pop(connection, None)

    def hold_head(self, size: int) -> None:
        """Some more, or less, of headers that are not complete is held."""
        self._heads += size
        while self._heads > MAX_HEADS and self.evict():
            pass

    def make_room(self) -> None:
        """See that one more is within the limit."""
        while len(self) >= self.limit and self.evict():
            pass

    def evict(self) -> bool:
        """Close the one that has been silent or unfinished for the longest, if there is one."""
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        self._close(oldest)
        self._count(IngestCounts(connections_evicted=1))
        return True

    def sweep(self) -> None:
        """Close those whose time is over."""
        now = self._clock()
        for some in (self._waiting, self._answering):
            for late in [each for each, until in some.items() if until <= now]:
                self._close(late)
                self._count(IngestCounts(connections_timed_out=1))

    def _close(self, connection: Abortable) -> None:
        self.forget(connection)
        connection.abort()


class Acceptor:
    """Accepts connections at one address and hands them to a protocol each."""

    def __init__(
        self,
        connections: Connections,
        protocol: Callable[[], asyncio.Protocol],
        tls: Callable[[], ssl.SSLContext] | None,
        count: Callable[[IngestCounts], None],
    ) -> None:
        """``tls`` gives the context for a connection that comes now, None: no TLS."""
        self._connections = connections
        self._protocol = protocol
        self._tls = tls
        self._count = count
        self._loop = asyncio.get_running_loop()
        self._listening: socket.socket | None = None
        self._opening: dict[asyncio.Task[None], _Opening] = {}
        self._told = False

    def start(self, address: Address) -> int:
        """Listen; returns the port. Raises ``OSError``."""
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return self.accept_at(socket.create_server((address.host, address.port), family=family))

    def accept_at(self, listening: socket.socket) -> int:
        """Accept from a socket that listens already; returns its port."""
        self._listening = listening
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening, self._accept)
        port: int = self._listening.getsockname()[1]
        return port

    def stop(self) -> None:
        """Accept nobody any more."""
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        for task in list(self._opening):
            task.cancel()

    def _accept(self) -> None:
        if self._listening is None:
            return
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            self._connections.make_room()
            accepted.setblocking(False)
            opening = _Opening(accepted)
            self._connections.waits(opening, FIRST_S)
            task = self._loop.create_task(self._open(accepted))
            opening.task = task
            self._opening[task] = opening
            task.add_done_callback(self._opened)

    async def _open(self, accepted: socket.socket) -> None:
        tls = None if self._tls is None else self._tls()
        await self._loop.connect_accepted_socket(
            self._protocol,
            accepted,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
        )

    def _opened(self, task: asyncio.Task[None]) -> None:
        opening = self._opening.pop(task)
        self._connections.forget(opening)
        # It went away again, or speaks no TLS: told to nobody, as it is no trouble of ours.
        if task.cancelled() or task.exception() is not None:
            opening.accepted.close()

    def _pause(self, error: OSError) -> None:
        """No descriptors: someone has to go, and what is in the queue can wait for it."""
        assert self._listening is not None
        self._loop.remove_reader(self._listening)
        self._loop.call_later(PAUSE_S, self._resume)
        self._connections.evict()
        self._count(IngestCounts(accepts_failed=1))
        if not self._told:
            self._told = True
            log.warning(
                "the OTLP receiver cannot accept a connection: %s; silent ones are closed for "
                "it, and this is only counted from now on",
                error.strerror or error,
            )

    def _resume(self) -> None:
        if self._listening is not None:
            self._loop.add_reader(self._listening, self._accept)


class _Opening:
    """A connection that was accepted and is not ready yet."""

    def __init__(self, accepted: socket.socket) -> None:
        self.accepted = accepted
        self.task: asyncio.Task[None] | None = None

    def abort(self) -> None:
        """Close it, now."""
        if self.task is not None:
            self.task.cancel()
