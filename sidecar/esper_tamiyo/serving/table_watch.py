"""The process that watches a table's file: checks a change and sends it down the pipe.

A process of its own because reading a table takes tens of milliseconds of Python, and a
trainer waits five for its decision; and because a file system can hang. It ends when its
pipe does.

Run as ``python -m esper_tamiyo.serving.table_watch FD TABLE VERSION``, the version being that
of the table in use. A byte that comes down the pipe means: look now.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
import time
from pathlib import Path

from esper_otel.leyline.terminal import log_to_stderr, printable
from esper_tamiyo.child_process import BY_TERMINALS, become_child
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import TableError, files_behind, load
from esper_tamiyo.receiving.pipe import Beat, Unusable, pack

LOOK_EVERY_S = 0.4
"""A change is taken once two looks in a row saw the same: editors write in pieces, and
half a table can be a valid one."""

BEAT_S = 1.0
"""How often the process says that it turns its loop."""

NICE = 10

Signature = tuple[int, int, int, int]
_NEVER: list[Signature | None] = []


def signature(name: str) -> Signature | None:
    """What tells one state of the file from the next; None when it is not there.

    Symbolic links are followed, because a ConfigMap is replaced by moving one.
    """
    try:
        found = Path(name).stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)


def read(name: str, warn: bool = True) -> Table | Unusable:
    """The table, or what is wrong with it; ``warn`` as for ``load``."""
    try:
        return load(name, warn)
    except TableError as error:
        return Unusable(str(error))
    except Exception as error:  # the watch must outlive whatever a file can hold
        return Unusable(printable(f"{name}: {error!r}"))


class FileWatch:
    """A table's file with those that it extends, and which states of them have been dealt with.

    Pure but for the files.
    """

    def __init__(self, name: str, version: str) -> None:
        self._name = name
        self._files = files_behind(name)
        self._last = self._signatures()
        found = read(name, warn=False)  # who serves it has read it as well
        # It may have changed before we looked: then this state is news like any other.
        told = isinstance(found, Table) and found.version == version
        self._taken = self._last if told else _NEVER

    def look(self, now: bool) -> Table | Unusable | None:
        """What the table has become, None when there is nothing new; ``now``: tell anyway."""
        seen = self._signatures()
        settled, self._last = seen == self._last, seen
        if not now and (seen == self._taken or not settled):
            return None
        files = files_behind(self._name)
        if files != self._files:
            self._files = files
            seen = self._last = self._signatures()
            if not now:  # the files that are new among them have to settle as well
                return None
        found = read(self._name)
        if now or self._signatures() == seen:
            self._taken = seen
            return found
        return None

    def _signatures(self) -> list[Signature | None]:
        return [signature(name) for name in self._files]


def serve(pipe: socket.socket, watch: FileWatch) -> None:
    """Look until the pipe ends."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    beat_at = 0.0
    while True:
        if time.monotonic() >= beat_at:
            beat_at = time.monotonic() + BEAT_S
            pipe.sendall(pack(Beat()))
        asked = bool(poll.poll(LOOK_EVERY_S * 1e3))
        if asked and not pipe.recv(64):
            return
        news = watch.look(now=asked)
        if news is not None:
            pipe.sendall(pack(news))


def main() -> None:
    """Entry point of the process."""
    fd, name, version = sys.argv[1:4]
    pipe = become_child(fd, ignored=BY_TERMINALS, at_parents_death=signal.SIGKILL, nice=NICE)
    log_to_stderr(logging.WARNING)
    try:
        serve(pipe, FileWatch(name, version))
    except OSError:  # the decide process is gone
        sys.exit(1)


if __name__ == "__main__":
    main()
