"""The page's process as the decide process sees it: started, listened to, replaced."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from esper_tamiyo.child_process import GIVES_MEMORY_BACK, ChildProcess
from esper_tamiyo.receiving.credentials import Credentials

log = logging.getLogger("tamiyo")

END_PATIENCE_S = 1.0

MEMORY_MB = 320.0
"""Most memory of the process, in MB (2**20 bytes); it starts anew beyond that. 55 for Python
and its modules, 32 for curves, 12 for newest values, 40 for decisions, the rest for what is
read, packed and sent."""

PULSE_BYTES = 1 << 20
"""Heartbeats that may wait in the pipe from the journal writer; the system may allow less."""


class UiOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is started with; ``listening`` and ``pulse`` are open descriptors.

    ``state`` and ``journal`` are the folders that it reads, None for none. No secrets, only
    names of files.
    """

    listening: int
    pulse: int
    state: Path | None
    journal: Path | None
    credentials: Credentials
    memory_mb: float = MEMORY_MB


class UiBeat(msgspec.Struct, frozen=True):
    """What the process says about once a second: that it turns its loop, and how it is.

    ``error`` says what it cannot read, "" when it can.
    """

    runs: int = 0
    connections: int = 0
    requests: int = 0
    unauthorized: int = 0
    failed: int = 0
    rss_mb: float = 0.0
    error: str = ""


_beats = msgspec.json.Decoder(UiBeat)


class UiChild(ChildProcess):
    """Starts the process with a socket that listens already, and again when it dies.

    What it shows it reads from files that are written anyway; through its pipe comes nothing
    but its heartbeat.
    """

    def __init__(self, listening: socket.socket, orders: UiOrders, address: str) -> None:
        """``address`` is the page's, as people type it."""
        super().__init__("esper_tamiyo.showing.ui", END_PATIENCE_S, "page")
        self.address = address
        self._listening = listening
        self._orders = orders
        self._beat = UiBeat()

    def start(self) -> None:
        """Start the process; never raises."""
        orders = msgspec.json.encode(self._orders, enc_hook=str).decode()
        inherited = [self._orders.listening, self._orders.pulse]
        try:
            self._launch([orders], inherited, GIVES_MEMORY_BACK)
        except OSError as error:
            log.warning("the page's process cannot be started: %s", error)
            self.reap()

    def restart_when_due(self) -> None:
        """Start it again when it is time."""
        if self.is_due:
            self.start()

    def read(self) -> None:
        """It has said how it is, or is gone."""
        for line in self._receive_lines():
            with suppress(msgspec.MsgspecError):
                self._beat = _beats.decode(line)
                self.pulse.heard()

    def reap(self) -> None:
        """The process is gone, or given up: plan the next one."""
        log.warning("the page's process ended; starting it again in %g s", self._reap())
        self._beat = UiBeat()

    def status(self) -> dict[str, Any]:
        """State and counts as plain data."""
        return {
            "state": self.state,
            "address": self.address,
            "pid": self.pid,
            "restarts": self.restarts,
            "hung": self.hung,
            **msgspec.structs.asdict(self._beat),
        }

    def close(self) -> None:
        """End the process, and listen no more."""
        super().close()
        self._listening.close()
