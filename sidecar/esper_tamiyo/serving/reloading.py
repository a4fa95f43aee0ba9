"""The table in use and its file, as the decide process sees them.

The file is read and checked by another process (:mod:`esper_tamiyo.serving.table_watch`); what
comes out of its pipe is a table that is known to be good, or words about one that is not.
"""

from __future__ import annotations

import logging
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import msgspec

from esper_tamiyo.judging.engine import Engine, ReloadReport
from esper_tamiyo.language.table import Table
from esper_tamiyo.receiving.pipe import Inlet, Kind, Unusable
from esper_tamiyo.restarts import Restarts, end

log = logging.getLogger("tamiyo")

READ_BYTES = 16 * 1024
END_PATIENCE_S = 1.0

_tables = msgspec.msgpack.Decoder(Table)


class Reloading:
    """Keeps an engine's table what its file says, and says how that went.

    A table that cannot be used changes nothing: the last good one stays, and ``last_error``
    in the report says why until a good one comes.
    """

    def __init__(self, engine: Engine, name: str, *, watched: bool) -> None:
        """``watched`` is false for a table that comes with the package and never changes."""
        self._engine = engine
        self._name = name
        self._watched = watched
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: socket.socket | None = None
        self._inlet = Inlet()
        self._restarts = Restarts()
        self._epoll: select.epoll | None = None
        self._loaded_at = time.time()
        self._reloads = 0
        self._refused = 0
        self._last_error = ""

    def start(self, epoll: select.epoll) -> None:
        """Begin to watch; ``epoll`` tells when there is news. Never raises."""
        self._epoll = epoll
        if self._watched:
            self._start()

    def look_now(self) -> None:
        """Read the file again at once, changed or not: what SIGHUP asks for."""
        if not self._watched:
            log.info("%s comes with the package: there is nothing to reload", self._name)
        elif self._pipe is not None:  # while there is none the next process looks first of all
            with suppress(OSError):  # full, or ending: then the next process looks
                self._pipe.send(b"!")

    def owns(self, fd: int) -> bool:
        """Whether an event of ``fd`` is for :meth:`hear`."""
        return self._pipe is not None and fd == self._pipe.fileno()

    def hear(self) -> None:
        """There is news, or the process is gone."""
        if self._pipe is None:
            return
        try:
            data = self._pipe.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        for kind, body in self._inlet.feed(data):
            self._heed(kind, body)
        if not data:
            self._end(patience_s=0.0)
            wait_s = self._restarts.ended()
            log.warning("the watch of %s ended; starting it again in %g s", self._name, wait_s)

    def due_in(self) -> float | None:
        """Seconds until :meth:`tend` has something to do; None for never."""
        return self._restarts.due_in()

    def tend(self) -> None:
        """Start the process again when it is time."""
        if self._restarts.due_in() == 0.0:
            self._start()

    def report(self) -> dict[str, Any]:
        """The table in use, and how keeping it so goes; ``loaded_at`` is Unix time."""
        table = self._engine.table
        return {
            "version": table.version,
            "rules": len(table.rules),
            "source": self._name,
            "loaded_at": self._loaded_at,
            "reloads": self._reloads,
            "refused": self._refused,
            "last_error": self._last_error,
            "restarts": self._restarts.count,
        }

    def close(self) -> None:
        """End the process and wait for it, not long."""
        self._end(END_PATIENCE_S)

    def _heed(self, kind: int, body: bytes) -> None:
        try:
            if kind == Kind.TABLE:
                self._take(_tables.decode(body))
            elif kind == Kind.UNUSABLE:
                self._refuse(msgspec.msgpack.decode(body, type=Unusable).message)
        except Exception as error:  # whatever it is, asks go on by the table in use
            log.exception("a table that was read could not be taken")
            self._refused += 1
            self._last_error = repr(error)

    def _take(self, table: Table) -> None:
        change = self._engine.reload(table)
        self._loaded_at = time.time()
        self._reloads += 1
        self._last_error = ""
        log.info("table %s loaded: %s", table.version, _in_words(change))

    def _refuse(self, message: str) -> None:
        self._refused += 1
        if message != self._last_error:
            log.warning(
                "the table cannot be used, %s stays:\n%s", self._engine.table.version, message
            )
        self._last_error = message

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), self._name, self._engine.table.version]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "esper_tamiyo.serving.table_watch",
                        *arguments,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                ours.close()
                wait_s = self._restarts.ended()
                log.warning("cannot watch %s: %s; again in %g s", self._name, error, wait_s)
                return
        ours.setblocking(False)
        self._pipe, self._inlet = ours, Inlet()
        self._restarts.started()
        if self._epoll is not None:
            self._epoll.register(ours, select.EPOLLIN)

    def _end(self, patience_s: float) -> None:
        if self._pipe is not None:
            if self._epoll is not None:
                self._epoll.unregister(self._pipe)
            self._pipe.close()
            self._pipe = None
        process, self._process = self._process, None
        end(process, patience_s)


def _in_words(change: ReloadReport) -> str:
    """What became of the rules, as a person would say it."""
    parts = [f"{len(change.kept)} rules as before"]
    for what, ids in (
        ("changed", change.changed),
        ("new", change.added),
        ("gone", change.removed),
    ):
        if ids:
            parts.append(f"{what}: {', '.join(ids)}")
    if not change.baselines_kept:
        parts.append("baselines begin anew")
    return "; ".join(parts)
