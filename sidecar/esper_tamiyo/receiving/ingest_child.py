"""The ingest process as the decide process sees it: started, listened to, restarted."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections import deque
from typing import Any

import msgspec

from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.credentials import Credentials
from esper_tamiyo.receiving.pipe import Failed, Inlet, Kind, Ready, Tally
from esper_tamiyo.restarts import Restarts, end

log = logging.getLogger("tamiyo")

READ_BYTES = 8 * 1024
"""About 20 frames, which takes 25 µs to cut up: an ask may have to wait for it."""

END_PATIENCE_S = 1.5


class IngestError(Exception):
    """The ingest process could not start."""


class IngestChild:
    """Starts the process, queues its frames undecoded, and starts it again when it dies."""

    def __init__(
        self, grpc_at: Address, http_at: Address, credentials: Credentials | None = None
    ) -> None:
        self._addresses = (str(grpc_at), str(http_at))
        self._credentials = msgspec.json.encode(credentials or Credentials()).decode()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: socket.socket | None = None
        self._inlet = Inlet()
        self._buffer = bytearray(READ_BYTES)
        self._restarts = Restarts()
        self._tally = Tally()
        self.frames: deque[bytes] = deque()
        self.ready: Ready | None = None
        self.listening = False

    def start(self) -> socket.socket:
        """Start the process; returns our end of the pipe, to be watched for reading."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                sys.executable,
                "-P",
                "-m",
                "esper_tamiyo.receiving.ingest",
                str(theirs.fileno()),
            ]
            try:
                self._process = subprocess.Popen(
                    [*command, *self._addresses, self._credentials],  # no secrets, only names
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._pipe = ours
        self._inlet = Inlet()
        self._restarts.started()
        return ours

    def read(self) -> bool:
        """Take in what the pipe holds; False when the process is gone.

        Raises :class:`IngestError` when it cannot listen the first time.
        """
        if self._pipe is None:
            return False
        try:
            count = self._pipe.recv_into(self._buffer)
        except BlockingIOError:
            return True
        except OSError:
            count = 0
        for kind, body in self._inlet.feed(memoryview(self._buffer)[:count]):
            if kind == Kind.FRAME:
                self.frames.append(body)
            else:
                self._heed(kind, body)
        if count == 0 and self.ready is None:
            raise IngestError("the ingest process ended before it listened")
        return count > 0

    def bury(self) -> None:
        """The process is gone: plan the next one."""
        self._end(patience_s=0.0)
        wait_s = self._restarts.ended()
        log.warning("the ingest process ended; starting it again in %g s", wait_s)

    def due_in(self) -> float | None:
        """Seconds until the process is to be started again, None when it runs."""
        return self._restarts.due_in()

    def restart(self) -> socket.socket | None:
        """Start the process again, at the same addresses; None: not now, it is due later."""
        try:
            return self.start()
        except OSError as error:
            wait_s = self._restarts.ended()
            log.warning("the ingest process cannot start: %s; again in %g s", error, wait_s)
            return None

    def close(self) -> None:
        """End the process and wait for it, not long."""
        self._end(END_PATIENCE_S)

    def report(self) -> dict[str, Any]:
        """State and counts as plain data."""
        return {
            "listening": self.listening,
            "otlp_grpc": self._addresses[0],
            "otlp_http": self._addresses[1],
            "pid": self._process.pid if self._process else None,
            "restarts": self._restarts.count,
            "frames_waiting": len(self.frames),
            **msgspec.structs.asdict(self._tally),
        }

    def _heed(self, kind: int, body: bytes) -> None:
        if kind == Kind.TALLY:
            news = msgspec.msgpack.decode(body, type=Tally)
            for field in Tally.__struct_fields__:
                setattr(self._tally, field, getattr(self._tally, field) + getattr(news, field))
        elif kind == Kind.READY:
            self.ready = msgspec.msgpack.decode(body, type=Ready)
            self._addresses = (self.ready.grpc, self.ready.http)
            self.listening = True
        elif kind == Kind.FAILED:
            message = msgspec.msgpack.decode(body, type=Failed).message
            if self.ready is None:
                raise IngestError(message)
            log.warning("%s", message)

    def _end(self, patience_s: float) -> None:
        self.listening = False
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        process, self._process = self._process, None
        end(process, patience_s)
