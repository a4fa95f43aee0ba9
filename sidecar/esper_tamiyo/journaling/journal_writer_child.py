"""The decide process's handle on the journal writer: sends without waiting, and restarts it."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from esper_tamiyo.child_process import ChildProcess
from esper_tamiyo.journaling.entries import Gap
from esper_tamiyo.journaling.messages import (
    JournalWriterStatus,
    Message,
    decode_status,
    is_for_journal,
    pack,
)

log = logging.getLogger("tamiyo")

PIPE_BYTES = 1 << 20
"""Messages that may wait in the pipe; the system may allow less."""

MAX_MESSAGE = 128 * 1024
END_PATIENCE_S = 2.0


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal writer is started with; ``health`` and ``pulse`` are open descriptors.

    ``pulse`` is a pipe to whoever else wants the heartbeats of the process that decides.
    """

    journal: Path | None = None
    journal_bytes: int = 0
    journal_files: int = 0
    health: int | None = None
    pulse: int | None = None


class JournalWriterChild(ChildProcess):
    """Starts the process, sends it messages, and starts it again when it dies.

    The pipe keeps messages whole (``SOCK_SEQPACKET``): one that does not fit is dropped
    and counted, and nothing is ever left half sent.
    """

    kind = socket.SOCK_SEQPACKET

    def __init__(self, orders: Orders) -> None:
        super().__init__("esper_tamiyo.journaling.journal_writer", END_PATIENCE_S, "scribe")
        self.orders = orders
        self.lost = 0
        """Entries that never reached the process, or that it had not accounted for when it
        ended: at most so many are missing, as it may have written some of those."""
        self._status: JournalWriterStatus | None = None
        self._handed = 0
        """Entries for the journal that the pipe to this journal writer took."""
        self._written_before = 0
        self._lost_before = 0
        """Entries that processes before this one had written, and had not been able to."""
        self._taken_away_before = 0
        self._logged_error = ""

    def start(self) -> None:
        """Start the process; never raises."""
        orders = msgspec.json.encode(self.orders, enc_hook=str).decode()
        ours = (self.orders.health, self.orders.pulse)
        inherited = [descriptor for descriptor in ours if descriptor is not None]
        try:
            pipe = self._launch([orders], inherited)
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIPE_BYTES)
        except OSError as error:
            log.warning("the journal writer cannot be started: %s", error)
            self.reap()

    def send(self, messages: list[Message]) -> bool:
        """Hand ``messages`` over without waiting; False when some could not be taken.

        Entries among those are counted as lost, but for gaps: whoever sends one sends
        it again.
        """
        if not messages:
            return True
        data = pack(messages)
        if len(data) > MAX_MESSAGE and len(messages) > 1:
            middle = len(messages) // 2
            first, second = self.send(messages[:middle]), self.send(messages[middle:])
            return first and second
        if len(data) > MAX_MESSAGE or not self._try_to_send(data):
            self.lost += sum(
                is_for_journal(message) and not isinstance(message, Gap) for message in messages
            )
            return False
        if self.orders.journal is not None:
            self._handed += sum(map(is_for_journal, messages))
        return True

    def read(self) -> None:
        """Take in how the journal writer stands, or that it is gone."""
        if self.pipe is None:
            return
        try:
            data = self.pipe.recv(MAX_MESSAGE)
        except (BlockingIOError, ConnectionResetError):
            # The latter when it ended with messages unread: what it said last comes after it.
            return
        except OSError:
            data = b""
        if not data:
            self.reap()
            return
        with suppress(msgspec.MsgspecError):
            self._status = decode_status(data)
            self.pulse.heard()
            self._log_change(self._status.error)

    def reap(self) -> None:
        """The process is gone: count what died with it, and plan the next one."""
        wait_s = self._reap()
        status = self._status or JournalWriterStatus()
        self._written_before += status.written
        self._lost_before += status.lost
        self._taken_away_before += status.files_taken_away
        self.lost += self._handed - status.written - status.lost
        self._status, self._handed = None, 0
        log.warning(
            "the journal writer ended: no journal until it is started again, in %g s", wait_s
        )

    def status(self) -> dict[str, Any]:
        """State and counts as plain data.

        ``error`` says why the journal cannot be written.
        """
        status = self._status
        return {
            "state": self.state,
            "pid": self.pid,
            "restarts": self.restarts,
            "hung": self.hung,
            "journal": str(self.orders.journal) if self.orders.journal else None,
            "error": status.error if status else "",
            "written": self._written_before + (status.written if status else 0),
            "lost": self.lost + self._lost_before + (status.lost if status else 0),
            "files_taken_away": self._taken_away_before
            + (status.files_taken_away if status else 0),
            "exports": status.exports if status else [],
        }

    def _log_change(self, error: str) -> None:
        """Once for each thing that is wrong, and once when it is right again."""
        if error and error != self._logged_error:
            log.warning(
                "the journal cannot be written: %s; decisions continue without it", error
            )
        elif self._logged_error and not error:
            log.warning("the journal is written again")
        self._logged_error = error

    def _try_to_send(self, data: bytes) -> bool:
        if self.pipe is None:
            return False
        try:
            self.pipe.send(data)
        except OSError:  # full, or gone: the loop will hear of the latter
            return False
        return True
