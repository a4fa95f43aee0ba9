"""Who connects to the decision socket: let in, turned away, or left waiting a moment."""

from __future__ import annotations

import logging
import select
import socket
from collections import Counter
from collections.abc import Callable

from esper_otel.leyline.wire import may_steer, peer_uid
from esper_tamiyo.serving.connection import ClientConnection

log = logging.getLogger("tamiyo")


class Accepting:
    """Accepts at one listening socket.

    When the system has no descriptors left, whoever waits goes on waiting, and the socket stays
    readable: it is then not looked at until the next tick, or the loop would spin.
    """

    def __init__(
        self, listening: socket.socket, epoll: select.epoll, counts: Counter[str]
    ) -> None:
        """``counts`` is where connections are counted by what became of them."""
        self._listening = listening
        self._epoll = epoll
        self._counts = counts
        self._paused = False
        self._told = False

    def start(self) -> None:
        """Have the loop told of who connects."""
        self._epoll.register(self._listening, select.EPOLLIN)

    def accept(self, has_room: Callable[[], bool]) -> ClientConnection | None:
        """Who connected, if it may, and ``has_room`` says so."""
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None  # it went away again
        except OSError as error:
            self._pause(error)
            return None
        uid = peer_uid(accepted)
        if not may_steer(uid) or not has_room():
            self._counts["turned_away"] += 1
            log.warning("rejected a connection of user %d", uid)
            accepted.close()
            return None
        self._counts["connections"] += 1
        return ClientConnection(accepted)

    def resume(self) -> None:
        """At each tick: look again, if nobody could be accepted."""
        if self._paused:
            self._paused = False
            self._epoll.modify(self._listening, select.EPOLLIN)

    def _pause(self, error: OSError) -> None:
        self._counts["accepts_failed"] += 1
        self._paused = True
        self._epoll.modify(self._listening, 0)
        if not self._told:
            self._told = True
            log.warning(
                "cannot accept a connection at the decision socket: %s; it is tried again "
                "every second, and this is only counted from now on",
                error.strerror or error,
            )
