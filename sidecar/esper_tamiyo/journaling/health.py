"""The health endpoint: what an orchestrator asks, over plain HTTP.

``GET /livez`` is 200 while the decide process beats, ``GET /readyz`` while it also hears
what it should hear; otherwise 503. Both answer with JSON that names each check. Nothing of
a run is told, so the endpoint may be reachable from other machines: a kubelet is one.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALE_AFTER_S = 3.0
"""A decide process that has not beaten for so long is not alive: three beats."""

REQUEST_TIMEOUT_S = 5.0


class Health:
    """Answers at an already listening socket, from the newest pulse."""

    def __init__(self, fd: int) -> None:
        self._server = _Server(socket.socket(fileno=fd), self)
        self._report: dict[str, Any] = {}
        self._beat_at: float | None = None

    def start(self) -> None:
        """Answer from now on, on threads of their own."""
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def beat(self, report: dict[str, Any]) -> None:
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket, health: Health) -> None:
        address = listening.getsockname()
        super().__init__(address[:2], _Handler, bind_and_activate=False)
        self.socket.close()  # the one that the base class made
        self.socket = listening
        self.health = health

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's trouble."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
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
        good = all(checks.values())
        self._reply(200 if good else 503, {"status": "ok" if good else "failing", **checks})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A probe every second is not worth a line."""

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
