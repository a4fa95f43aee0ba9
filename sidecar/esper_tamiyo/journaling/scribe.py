"""The scribe process: journal, health endpoint and Tamiyo's own OpenTelemetry.

A process of its own, because files, the OTel SDK and whoever asks after our health may
take their time, and the process that decides may not. It is told notes through a pipe and
ends when the pipe does, so it cannot outlive the decide process, however that dies; what
the pipe still holds is written first.

Run as ``python -m esper_tamiyo.journaling.scribe FD ORDERS``.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

import msgspec

from esper_tamiyo.journaling.entries import AnyEntry, Decided
from esper_tamiyo.journaling.field_reports import Due, report_of
from esper_tamiyo.journaling.health import Health
from esper_tamiyo.journaling.journal import Journal
from esper_tamiyo.journaling.journal_keeper import Keeper
from esper_tamiyo.journaling.notes import (
    Note,
    Pulse,
    Standing,
    is_for_journal,
    notes_in,
    pack,
)
from esper_tamiyo.journaling.own_telemetry import OwnTelemetry
from esper_tamiyo.journaling.scribe_child import MAX_MESSAGE, Orders

log = logging.getLogger("tamiyo")

STANDING_S = 1.0
NICE = 5
"""The decide process answers a waiting trainer; this one may come second."""

JOURNAL_END_S = 1.0
TELEMETRY_END_S = 0.7


class Scribe:
    """Does what the orders say with every note that comes."""

    def __init__(self, pipe: socket.socket, orders: Orders) -> None:
        self._pipe = pipe
        self._keeper: Keeper | None = None
        if orders.journal is not None:
            folder, size, count = orders.journal, orders.journal_bytes, orders.journal_files
            self._keeper = Keeper(lambda: Journal(folder, size, count), folder)
        self._health = None if orders.health is None else Health(orders.health)
        self._telemetry = OwnTelemetry()
        self._said: Standing | None = None

    def run(self) -> None:
        """Take notes until the pipe ends."""
        if self._keeper is not None:
            self._keeper.start()
        if self._health is not None:
            self._health.start()
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        due = 0.0
        while True:
            now = time.monotonic()
            if now >= due or self._is_news():
                due = now + STANDING_S
                self._say_standing()
            if poll.poll(max(0.0, due - now) * 1e3):
                try:
                    data = self._pipe.recv(MAX_MESSAGE)
                except ConnectionResetError:
                    # It ended without having read how we stand. The system says so before
                    # it gives what is still in the pipe.
                    continue
                if not data:
                    break
                self._heed(data)
        if self._keeper is not None:
            self._keeper.close(JOURNAL_END_S)
        self._telemetry.close(TELEMETRY_END_S)

    def _heed(self, data: bytes) -> None:
        try:
            notes: list[Note] = notes_in(data)
        except msgspec.MsgspecError as error:  # only a fault of ours can bring it about
            log.warning("the scribe was told what it cannot read: %s", error)
            return
        entries: list[AnyEntry] = []
        for note in notes:
            if isinstance(note, Pulse):
                if self._health is not None:
                    self._health.beat(note.report)
                self._telemetry.beat(note)
                continue
            if isinstance(note, Decided):
                self._telemetry.tell(note)
            if is_for_journal(note):
                entries.append(report_of(note) if isinstance(note, Due) else note)
        if entries and self._keeper is not None:
            self._keeper.put(entries)

    def _is_news(self) -> bool:
        error = self._keeper.error if self._keeper is not None else ""
        return self._said is None or error != self._said.error

    def _say_standing(self) -> None:
        keeper = self._keeper
        self._said = Standing(
            written=keeper.written if keeper else 0,
            lost=keeper.all_lost if keeper else 0,
            error=keeper.error if keeper else "",
            exports=self._telemetry.endpoints,
        )
        with suppress(OSError):  # nobody reads: it is not for us to wait
            self._pipe.send(pack(self._said), socket.MSG_DONTWAIT)


def main() -> None:
    """Entry point of the process."""
    fd, orders = sys.argv[1:3]
    # They go to the whole group; the end of the pipe is what ends this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    logging.basicConfig(format="tamiyo: %(message)s", level=logging.WARNING)
    pipe = socket.socket(fileno=int(fd))
    Scribe(pipe, msgspec.json.decode(orders, type=Orders, dec_hook=_path)).run()
    sys.stderr.flush()
    os._exit(0)  # threads that wait for a network or a disk need no goodbye


def _path(kind: type, text: object) -> object:
    return kind(text)


if __name__ == "__main__":
    main()
