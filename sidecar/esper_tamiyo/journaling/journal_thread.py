"""JournalThread: writes the journal, so that a slow disk holds up nothing else.

It is given entries through a bounded queue, writes them at once, has the disk keep them about
once a second, and tries again when the journal cannot be written. What others did to the file
is looked for before each writing, and once a second.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from esper_tamiyo import release
from esper_tamiyo.journaling.entries import AnyEntry, Closed, Gap, Opened, TableInUse
from esper_tamiyo.journaling.journal import Journal

log = logging.getLogger("tamiyo")

SYNC_S = 1.0
RETRY_S = 5.0
LOCK_PATIENCE_S = 3.0
"""How long the first opening waits for the writer of a killed sidecar to leave the journal.
Entries wait meanwhile; later ones are lost until the next try."""
LOOK_AGAIN_S = 0.01
REPEAT_S = 60.0
"""How often it is said that files are taken away, at most."""
MAX_QUEUE = 1024
"""Lists of entries that wait for the disk; beyond it they are dropped, and counted."""


class JournalThread:
    """Owns a :class:`Journal` and the thread that writes to it.

    ``opening`` opens the journal and may raise ``OSError``, as everything of a journal.
    """

    def __init__(self, opening: Callable[[], Journal], folder: Path) -> None:
        self.error = ""
        """Why the journal cannot be written, "" while it can."""
        self.written = 0
        self.lost = 0
        self.taken_away = 0
        """How often the file that was being written was deleted, moved or cut by others."""
        self._opening = opening
        self._folder = folder
        self._journal: Journal | None = None
        self._table: TableInUse | None = None
        self._accounted = 0
        self._retry_at = 0.0
        self._patience_s = LOCK_PATIENCE_S
        self._say_again_at = 0.0
        self._queue: queue.Queue[list[AnyEntry] | None] = queue.Queue(MAX_QUEUE)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Open the journal and write from now on."""
        self._thread.start()

    def put(self, entries: list[AnyEntry]) -> None:
        """Have ``entries`` written; never waits."""
        try:
            self._queue.put_nowait(entries)
        except queue.Full:
            self._dropped += len(entries)

    def close(self, timeout_s: float) -> None:
        """Write what is queued and stop, within a time."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    @property
    def all_lost(self) -> int:
        """Entries that were given and are not in the journal."""
        return self.lost + self._dropped

    def _run(self) -> None:
        self._attempt([])
        sync_at = time.monotonic() + SYNC_S
        while True:
            try:
                entries = self._queue.get(timeout=max(0.0, sync_at - time.monotonic()))
            except queue.Empty:
                entries = []
            if entries is None:
                break
            self._attempt(entries)
            if time.monotonic() >= sync_at:
                sync_at = time.monotonic() + SYNC_S
                self._sync()
        self._attempt([Closed(time_unix_nano=time.time_ns(), pid=os.getpid())])
        if self._journal is not None:
            with suppress(OSError):
                self._journal.close()

    def _attempt(self, entries: list[AnyEntry]) -> None:
        """Write ``entries``, or count them as lost."""
        self._table = next((e for e in entries if isinstance(e, TableInUse)), self._table)
        try:
            if self._journal is None:
                if time.monotonic() < self._retry_at:
                    self.lost += len(entries)
                    return
                self._journal = self._open_journal()
            self._keep_in_place(self._journal)
            self._journal.append(self._with_gap(entries))
        except OSError as error:
            self._failed(error)
            self.lost += len(entries)
        else:
            self.written += len(entries)
            self._accounted = self.all_lost
            self.error = ""

    def _keep_in_place(self, journal: Journal) -> None:
        """Write where readers look, whatever others did to the file; raises ``OSError``."""
        path = journal.path
        what = journal.go_on()
        if not what:
            return
        self.taken_away += 1
        now = time.monotonic()
        if now >= self._say_again_at:
            self._say_again_at = now + REPEAT_S
            log.warning(
                "the journal's file %s %s; it continues in %s", path, what, journal.path
            )

    def _open_journal(self) -> Journal:
        journal = self._opened()
        opened = Opened(time_unix_nano=time.time_ns(), pid=os.getpid(), release=release())
        journal.append([opened, *([self._table] if self._table else [])])
        return journal

    def _opened(self) -> Journal:
        until = time.monotonic() + self._patience_s
        self._patience_s = 0.0
        while True:
            try:
                return self._opening()
            except BlockingIOError:  # somebody else writes there
                if time.monotonic() >= until:
                    raise
            time.sleep(LOOK_AGAIN_S)

    def _with_gap(self, entries: list[AnyEntry]) -> list[AnyEntry]:
        lost = self.all_lost - self._accounted
        if not lost:
            return entries
        because = self.error or "the disk did not keep up"
        return [Gap(time_unix_nano=time.time_ns(), lost=lost, because=because), *entries]

    def _sync(self) -> None:
        try:
            if self._journal is not None:
                self._journal.sync()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.error = f"{self._folder}: {(error.strerror or str(error)).lower()}"
        self._retry_at = time.monotonic() + RETRY_S
        journal, self._journal = self._journal, None
        if journal is not None:
            with suppress(OSError):
                journal.close()
