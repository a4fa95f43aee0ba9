"""The ingest process as the decide process sees it: started, listened to, restarted."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import msgspec

from esper_tamiyo.child_process import GIVES_MEMORY_BACK, ChildProcess
from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.credentials import Credentials
from esper_tamiyo.receiving.pipe import (
    Beat,
    IngestCounts,
    Inlet,
    MessageKind,
    Ready,
    StartFailed,
)

log = logging.getLogger("tamiyo")

READ_BYTES = 8 * 1024
"""About 20 frames, which takes 25 µs to cut up: an ask may have to wait for it."""

END_PATIENCE_S = 1.5

MEMORY_MB = 192.0
"""Most memory of the process, in MB (2**20 bytes): 50 for Python and its modules, 16 for
requests that wait, 40 for those that gRPC reads, 32 for calls that it does not read yet, 34 for
connections, 20 for the request that is parsed."""


class IngestError(Exception):
    """The ingest process could not start."""


class IngestChild(ChildProcess):
    """Starts the process, queues its frames undecoded, and starts it again when it dies."""

    def __init__(
        self, grpc_at: Address, http_at: Address, credentials: Credentials | None = None
    ) -> None:
        super().__init__("esper_tamiyo.receiving.ingest", END_PATIENCE_S, "ingest")
        self.memory_mb = MEMORY_MB
        """Most memory that the process may have, from its next start on."""
        self._beat = Beat()
        self._addresses = (str(grpc_at), str(http_at))
        self._credentials = msgspec.json.encode(credentials or Credentials()).decode()
        self._inlet = Inlet()
        self._buffer = bytearray(READ_BYTES)
        self._counts = IngestCounts()
        self.frames: deque[bytes] = deque()
        self.ready: Ready | None = None
        self.listening = False

    def start(self) -> None:
        """Start the process, at the same addresses when it is not the first."""
        arguments = [*self._addresses, self._credentials]  # no secrets, only names
        self._launch([*arguments, str(self.memory_mb)], environment=GIVES_MEMORY_BACK)
        self._inlet = Inlet()
        self._beat = Beat()

    def read(self) -> None:
        """Take in what came through the pipe, or that the process is gone.

        Raises :class:`IngestError` when it cannot listen the first time.
        """
        if self.pipe is None:
            return
        try:
            count = self.pipe.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count:
            self.pulse.heard()
        for kind, body in self._inlet.feed(memoryview(self._buffer)[:count]):
            if kind == MessageKind.FRAME:
                self.frames.append(body)
            else:
                self._handle(kind, body)
        if count == 0:
            if self.ready is None:
                raise IngestError("the ingest process ended before it listened")
            self.reap()

    def reap(self) -> None:
        """The process is gone: plan the next one."""
        wait_s = self._reap()
        log.warning("the ingest process ended; starting it again in %g s", wait_s)

    def restart(self) -> None:
        """Start the process again, or plan to do so later."""
        try:
            self.start()
        except OSError as error:
            wait_s = self._reap()
            log.warning("the ingest process cannot start: %s; again in %g s", error, wait_s)

    def status(self) -> dict[str, Any]:
        """State and counts as plain data."""
        return {
            "state": self.state,
            "listening": self.listening and self.state != "silent",
            "otlp_grpc": self._addresses[0],
            "otlp_http": self._addresses[1],
            "pid": self.pid,
            "restarts": self.restarts,
            "hung": self.hung,
            **msgspec.structs.asdict(self._beat),
            "frames_waiting": len(self.frames),
            **msgspec.structs.asdict(self._counts),
        }

    def _handle(self, kind: int, body: bytes) -> None:
        if kind == MessageKind.COUNTS:
            news = msgspec.msgpack.decode(body, type=IngestCounts)
            for field in IngestCounts.__struct_fields__:
                setattr(
                    self._counts, field, getattr(self._counts, field) + getattr(news, field)
                )
        elif kind == MessageKind.BEAT:
            self._beat = msgspec.msgpack.decode(body, type=Beat)
        elif kind == MessageKind.READY:
            self.ready = msgspec.msgpack.decode(body, type=Ready)
            self._addresses = (self.ready.grpc, self.ready.http)
            self.listening = True
        elif kind == MessageKind.FAILED:
            message = msgspec.msgpack.decode(body, type=StartFailed).message
            if self.ready is None:
                raise IngestError(message)
            log.warning("%s", message)

    def _end(self, patience_s: float) -> None:
        self.listening = False
        super()._end(patience_s)
