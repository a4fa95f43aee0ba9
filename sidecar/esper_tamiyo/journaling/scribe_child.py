"""The scribe process as the decide process sees it: told, never waited for, restarted."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from esper_tamiyo.journaling.entries import Gap
from esper_tamiyo.journaling.notes import Note, Standing, is_for_journal, pack, standing_in
from esper_tamiyo.restarts import Restarts, end

log = logging.getLogger("tamiyo")

PIPE_BYTES = 1 << 20
"""Notes that may wait in the pipe; the system may allow less."""

MAX_MESSAGE = 128 * 1024
SILENT_AFTER_S = 5.0
END_PATIENCE_S = 2.0


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the scribe is started with; ``health`` is an open descriptor."""

    journal: Path | None = None
    journal_bytes: int = 0
    journal_files: int = 0
    health: int | None = None


class ScribeChild:
    """Starts the process, tells it notes, and starts it again when it dies.

    The pipe keeps messages whole (``SOCK_SEQPACKET``): one that does not fit is dropped
    and counted, and nothing is ever left half sent.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.socket: socket.socket | None = None
        """To be watched for reading; None while no scribe runs."""
        self.lost = 0
        """Entries that never reached a scribe, or that one had not accounted for when it
        ended: at most so many are missing, as it may have written some of those."""
        self._process: subprocess.Popen[bytes] | None = None
        self._standing: Standing | None = None
        self._handed = 0
        """Entries for the journal that the pipe to this scribe took."""
        self._heard_at = 0.0
        self._restarts = Restarts()
        self._written_before = 0
        self._lost_before = 0
        """Entries that scribes before this one had written, and had not been able to."""
        self._told_error = ""

    def start(self) -> None:
        """Start the process; never raises."""
        self._restarts.started()
        self._heard_at = time.monotonic()
        try:
            self._start()
        except OSError as error:
            log.warning("the scribe process cannot be started: %s", error)
            self.bury()

    def tell(self, notes: list[Note]) -> bool:
        """Hand ``notes`` over without waiting; False when some could not be taken.

        Entries among those are counted as lost, but for gaps: who tells of one tells
        again.
        """
        if not notes:
            return True
        data = pack(notes)
        if len(data) > MAX_MESSAGE and len(notes) > 1:
            middle = len(notes) // 2
            first, second = self.tell(notes[:middle]), self.tell(notes[middle:])
            return first and second
        if len(data) > MAX_MESSAGE or not self._send(data):
            self.lost += sum(
                is_for_journal(note) and not isinstance(note, Gap) for note in notes
            )
            return False
        if self.orders.journal is not None:
            self._handed += sum(map(is_for_journal, notes))
        return True

    def read(self) -> bool:
        """Take in how the scribe stands; False when it is gone."""
        if self.socket is None:
            return False
        try:
            data = self.socket.recv(MAX_MESSAGE)
        except (BlockingIOError, ConnectionResetError):
            # The latter when it ended with notes unread: what it said last comes after it.
            return True
        except OSError:
            data = b""
        if not data:
            return False
        with suppress(msgspec.MsgspecError):
            self._standing = standing_in(data)
            self._heard_at = time.monotonic()
            self._say(self._standing.error)
        return True

    def bury(self) -> None:
        """The process is gone: count what died with it, and plan the next one."""
        self._end(patience_s=0.0)
        standing = self._standing or Standing()
        self._written_before += standing.written
        self._lost_before += standing.lost
        self.lost += self._handed - standing.written - standing.lost
        self._standing, self._handed = None, 0
        log.warning(
            "the scribe process ended: no journal until it is started again, in %g s",
            self._restarts.ended(),
        )

    def due_in(self) -> float | None:
        """Seconds until the process is to be started again, None when it runs."""
        return self._restarts.due_in()

    def close(self) -> None:
        """Let the process write what it was told, and end."""
        self._end(END_PATIENCE_S)

    def report(self) -> dict[str, Any]:
        """State and counts as plain data.

        ``state`` is ``working``, ``starting``, ``silent`` (it lives and does not say so) or
        ``down``; ``error`` says why the journal cannot be written.
        """
        standing = self._standing
        return {
            "state": self._state(),
            "pid": self._process.pid if self._process else None,
            "restarts": self._restarts.count,
            "journal": str(self.orders.journal) if self.orders.journal else None,
            "error": standing.error if standing else "",
            "written": self._written_before + (standing.written if standing else 0),
            "lost": self.lost + self._lost_before + (standing.lost if standing else 0),
            "exports": standing.exports if standing else [],
        }

    def _state(self) -> str:
        if self.socket is None:
            return "down"
        if time.monotonic() - self._heard_at > SILENT_AFTER_S:
            return "silent"
        return "working" if self._standing else "starting"

    def _say(self, error: str) -> None:
        """Once for each thing that is wrong, and once when it is right again."""
        if error and error != self._told_error:
            log.warning("the journal cannot be written: %s; decisions go on without it", error)
        elif self._told_error and not error:
            log.warning("the journal is written again")
        self._told_error = error

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIPE_BYTES)
            descriptors = [theirs.fileno()]
            if self.orders.health is not None:
                descriptors.append(self.orders.health)
            orders = msgspec.json.encode(self.orders, enc_hook=str).decode()
            try:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "esper_tamiyo.journaling.scribe"),
                        *(str(theirs.fileno()), orders),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=descriptors,
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self.socket = ours

    def _send(self, data: bytes) -> bool:
        if self.socket is None:
            return False
        try:
            self.socket.send(data)
        except OSError:  # full, or gone: the loop will hear of the latter
            return False
        return True

    def _end(self, patience_s: float) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        process, self._process = self._process, None
        end(process, patience_s)
