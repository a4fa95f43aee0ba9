"""The table in use and its file, as the decide process sees them.

The file is read and checked by another process (:mod:`esper_tamiyo.serving.table_watch`); what
comes out of its pipe is a table that is known to be good, or words about one that is not.
"""

from __future__ import annotations

import logging
import select
import time
from contextlib import suppress
from typing import Any

import msgspec

from esper_otel.leyline.terminal import Lines, printable
from esper_tamiyo.child_process import ChildProcess
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.rulebook import ReloadReport
from esper_tamiyo.language.table import Table
from esper_tamiyo.receiving.pipe import Inlet, MessageKind, Unusable

log = logging.getLogger("tamiyo")

READ_BYTES = 16 * 1024
END_PATIENCE_S = 1.0

_tables = msgspec.msgpack.Decoder(Table)


class Reloading(ChildProcess):
    """Keeps an engine's table what its file says, and says how that went.

    A table that cannot be used changes nothing: the last good one stays, and ``last_error``
    in the report says why until a good one comes.
    """

    def __init__(
        self, engine: Engine, name: str, *, watched: bool, last_error: str = ""
    ) -> None:
        """``watched`` is false for a table that comes with the package and never changes.

        ``last_error`` says why the file could not be used at the start.
        """
        super().__init__("esper_tamiyo.serving.table_watch", END_PATIENCE_S, "table watch")
        self._engine = engine
        self._name = name
        self._watched = watched
        self._inlet = Inlet()
        self._loaded_at = time.time()
        self._reloads = 0
        self._refused = 0
        self._last_error = last_error

    def start(self, epoll: select.epoll) -> None:
        """Begin to watch; ``epoll`` tells when there is news. Never raises."""
        self.watch(epoll)
        if self._watched:
            self._start()

    def look_now(self) -> None:
        """Read the file again at once, changed or not: what SIGHUP asks for."""
        if not self._watched:
            log.info("%s comes with the package: there is nothing to reload", self._name)
        elif self.pipe is not None:  # while there is none the next process looks first of all
            with suppress(OSError):  # full, or ending: then the next process looks
                self.pipe.send(b"!")

    def read(self) -> None:
        """There is news, or the process is gone."""
        data = self._receive(READ_BYTES)
        if data is None:
            return
        if data:
            self.pulse.heard()
        for kind, body in self._inlet.feed(data):
            self._handle(kind, body)
        if not data:
            self.reap()

    def reap(self) -> None:
        """The process is gone: plan the next one."""
        wait_s = self._reap()
        log.warning("the watch of %s ended; starting it again in %g s", self._name, wait_s)

    def restart_when_due(self) -> None:
        """Start the process again when it is time."""
        if self.is_due:
            self._start()

    def status(self) -> dict[str, Any]:
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
            "watch": self.state if self._watched else "off",
            "restarts": self.restarts,
            "hung": self.hung,
        }

    def _handle(self, kind: int, body: bytes) -> None:
        try:
            if kind == MessageKind.TABLE:
                self._load(_tables.decode(body))
            elif kind == MessageKind.UNUSABLE:
                self._refuse(msgspec.msgpack.decode(body, type=Unusable).message)
        except Exception as error:  # whatever it is, asks go on by the table in use
            log.exception("a table that was read could not be taken")
            self._refused += 1
            self._last_error = printable(repr(error))

    def _load(self, table: Table) -> None:
        change = self._engine.reload(table)
        self._loaded_at = time.time()
        self._reloads += 1
        self._last_error = ""
        log.info("table %s loaded: %s", table.version, _in_words(change))

    def _refuse(self, message: str) -> None:
        self._refused += 1
        if message != self._last_error:
            log.warning(
                "the table cannot be used, %s stays:\n%s",
                printable(self._engine.table.version),
                Lines(message),
            )
        self._last_error = message

    def _start(self) -> None:
        try:
            self._launch([self._name, self._engine.table.version])
        except OSError as error:
            log.warning("cannot watch %s: %s; again in %g s", self._name, error, self._reap())
            return
        self._inlet = Inlet()


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
        parts.append("baselines start afresh")
    return "; ".join(parts)
