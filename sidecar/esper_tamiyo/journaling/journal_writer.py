"""The journal writer (scribe): journal, health endpoint and Tamiyo's own OpenTelemetry.

A process of its own, because files, the OTel SDK and whoever asks after our health may
take their time, and the process that decides may not. It is sent messages through a pipe
and ends when the pipe does, so it cannot outlive the decide process, however that dies;
what the pipe still holds is written first.

The health endpoint is what an orchestrator asks, over plain HTTP: ``GET /livez`` is 200
while the decide process beats, ``GET /readyz`` while it also hears what it should hear;
otherwise 503. Both answer with JSON that names each check. Nothing of a run is told, so the
endpoint may be reachable from other machines: a kubelet is one.

Run as ``python -m esper_tamiyo.journaling.journal_writer FD ORDERS``.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from esper_otel.leyline.endpoints import hiding
from esper_otel.leyline.terminal import log_to_stderr
from esper_tamiyo.child_process import BY_SUPERVISORS, become_child
from esper_tamiyo.journaling.entries import AnyEntry, Decided
from esper_tamiyo.journaling.field_reports import DueReport
from esper_tamiyo.journaling.journal import Journal
from esper_tamiyo.journaling.journal_thread import JournalThread
from esper_tamiyo.journaling.journal_writer_child import MAX_MESSAGE, Orders
from esper_tamiyo.journaling.messages import (
    Heartbeat,
    JournalWriterStatus,
    Message,
    decode_messages,
    is_for_journal,
    pack,
)
from esper_tamiyo.journaling.outcomes import OutcomeReports
from esper_tamiyo.journaling.own_telemetry import OwnTelemetry

log = logging.getLogger("tamiyo")

STATUS_S = 1.0
NICE = 5
"""The decide process answers a waiting trainer; this one may come second."""

JOURNAL_END_S = 1.0
TELEMETRY_END_S = 0.7

STALE_AFTER_S = 3.0
"""A decide process that has not beaten for so long is not alive: three beats."""

REQUEST_TIMEOUT_S = 5.0


class HealthEndpoint:
    """Answers at an already listening socket, from the newest heartbeat."""

    def __init__(self, fd: int) -> None:
        self._server = _HealthServer(socket.socket(fileno=fd), self)
        self._report: dict[str, Any] = {}
        self._beat_at: float | None = None

    def start(self) -> None:
        """Answer from now on, on threads of their own."""
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def on_heartbeat(self, report: dict[str, Any]) -> None:
        """The decide process is alive, and this is how it is."""
        self._report = report
        self._beat_at = time.monotonic()

    def checks(self, path: str) -> dict[str, bool] | None:
        """What ``path`` asks for, each True or False; None for a path that is none."""
        alive = self._beat_at is not None and time.monotonic() - self._beat_at < STALE_AFTER_S
        if path == "/livez":
            return {"deciding": alive}
        if path != "/readyz":
            return None
        ingest = self._report.get("ingest")
        return {
            "deciding": alive,
            "receiving": alive and (ingest is None or bool(ingest["listening"])),
        }

    def reason(self, checks: dict[str, bool]) -> str:
        """What is the matter, in words; "" when nothing is."""
        if not checks["deciding"]:
            return f"no heartbeat of the decide process for {STALE_AFTER_S:g} s"
        if checks.get("receiving", True):
            return ""
        silent = self._report["ingest"].get("state") == "silent"
        return "the ingest process " + ("does not respond" if silent else "is being started")


class _HealthServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket, health: HealthEndpoint) -> None:
        address = listening.getsockname()
        super().__init__(address[:2], _HealthHandler, bind_and_activate=False)
        self.socket.close()  # the one that the base class made
        self.socket = listening
        self.health = health

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's trouble."""


class _HealthHandler(BaseHTTPRequestHandler):
    server: _HealthServer
    timeout = REQUEST_TIMEOUT_S
    protocol_version = "HTTP/1.1"
    server_version = "tamiyo"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one question."""
        checks = self.server.health.checks(self.path.partition("?")[0])
        if checks is None:
            self._reply(404, {"error": "expected /livez or /readyz"})
            return
        if all(checks.values()):
            self._reply(200, {"status": "ok", **checks})
        else:
            reason = self.server.health.reason(checks)
            self._reply(503, {"status": "failing", **checks, "reason": reason})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A probe every second is not worth a line."""

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class JournalWriter:
    """Does what the orders say with every message that comes."""

    def __init__(self, pipe: socket.socket, orders: Orders) -> None:
        self._pipe = pipe
        self._journal: JournalThread | None = None
        if orders.journal is not None:
            folder, size, count = orders.journal, orders.journal_bytes, orders.journal_files
            self._journal = JournalThread(lambda: Journal(folder, size, count), folder)
        self._health = None if orders.health is None else HealthEndpoint(orders.health)
        self._pulse = None if orders.pulse is None else socket.socket(fileno=orders.pulse)
        self._telemetry = OwnTelemetry()
        self._outcomes = OutcomeReports()
        self._said: JournalWriterStatus | None = None

    def run(self) -> None:
        """Take messages until the pipe ends."""
        if self._journal is not None:
            self._journal.start()
        if self._health is not None:
            self._health.start()
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        due = 0.0
        while True:
            now = time.monotonic()
            if now >= due or self._has_new_error():
                due = now + STATUS_S
                self._send_status()
            if poll.poll(max(0.0, due - now) * 1e3):
                try:
                    data = self._pipe.recv(MAX_MESSAGE)
                except ConnectionResetError:
                    # It ended without having read how we stand. The system says so before
                    # it gives what is still in the pipe.
                    continue
                if not data:
                    break
                self._handle(data)
        if self._journal is not None:
            self._journal.close(JOURNAL_END_S)
        self._telemetry.close(TELEMETRY_END_S)

    def _handle(self, data: bytes) -> None:
        try:
            messages: list[Message] = decode_messages(data)
        except msgspec.MsgspecError as error:  # only a fault of ours can bring it about
            log.warning("the journal writer received an unreadable message: %s", error)
            return
        entries: list[AnyEntry] = []
        for message in messages:
            if isinstance(message, Heartbeat):
                if self._health is not None:
                    self._health.on_heartbeat(message.report)
                self._telemetry.on_heartbeat(message)
                self._hand_on(data)
                continue
            if isinstance(message, Decided):
                self._telemetry.export_decision(message)
            if is_for_journal(message):
                entries.append(
                    self._outcomes.report(message)
                    if isinstance(message, DueReport)
                    else message
                )
        if entries and self._journal is not None:
            self._journal.put(entries)

    def _hand_on(self, data: bytes) -> None:
        """Give a heartbeat, as it came, to the page's process; it may be slow, or away."""
        if self._pulse is not None:
            with suppress(OSError):
                self._pulse.send(data, socket.MSG_DONTWAIT)

    def _has_new_error(self) -> bool:
        error = self._journal.error if self._journal is not None else ""
        return self._said is None or error != self._said.error

    def _send_status(self) -> None:
        journal = self._journal
        self._said = JournalWriterStatus(
            written=journal.written if journal else 0,
            lost=journal.all_lost if journal else 0,
            files_taken_away=journal.taken_away if journal else 0,
            error=journal.error if journal else "",
            exports=self._telemetry.endpoints,
        )
        with suppress(OSError):  # nobody reads: it is not for us to wait
            self._pipe.send(pack(self._said), socket.MSG_DONTWAIT)


def main() -> None:
    """Entry point of the process."""
    fd, orders = sys.argv[1:3]
    # When the decide process dies it goes on, to write what is in the pipe, and to end.
    pipe = become_child(fd, ignored=BY_SUPERVISORS, at_parents_death=signal.SIGCONT, nice=NICE)
    # Exporters log the headers that they cannot read.
    log_to_stderr(logging.WARNING, hiding(os.environ))
    JournalWriter(pipe, msgspec.json.decode(orders, type=Orders, dec_hook=_path)).run()
    os._exit(0)  # threads that wait for a network or a disk need no goodbye


def _path(kind: type, text: object) -> object:
    return kind(text)


if __name__ == "__main__":
    main()
