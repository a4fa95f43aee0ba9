"""The client's end of the decision socket: one message out, one answer back, in time."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from pathlib import Path
from time import perf_counter_ns

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import PROTOCOL_ERROR, TIMEOUT, UNREACHABLE
from esper_otel.leyline.folders import check_socket_path
from esper_otel.leyline.guards import Guards

_RECEIVE = 16 * 1024

_MOST_LATE = 4
"""Answers that are kept for who did not wait for them: more failures in a row than this open
the circuit breaker."""

_MAX_SELECT = 1024
"""select takes no descriptor from this on (FD_SETSIZE)."""


class RequestFailure(Exception):  # noqa: N818  (not an error of anybody's: it never leaves the client)
    """No decision; ``reason`` is the one the ask will give."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Connection:
    """One persistent connection, made when it is first needed and again after it broke."""

    def __init__(self, path: Path, hello: wire.Hello) -> None:
        check_socket_path(path)
        self.path = path
        self.table_version = ""
        """Table the sidecar decides by, once it has said so."""
        self.guards: Guards | None = None
        """Bounds that no update may cross unjudged; None before the sidecar has sent any."""
        self.takes_goodbyes = False
        """Whether who is connected knows what a Goodbye is."""
        self.late: deque[wire.Answer] = deque(maxlen=_MOST_LATE)
        """Answers that came after the request behind theirs was sent."""
        self._hello = wire.encode(hello)
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._unsent = b""
        self._incoming = bytearray(_RECEIVE)
        self._view = memoryview(self._incoming)
        self._buffer = wire.MessageBuffer()

    def send(self, message: wire.Ask | wire.Check | wire.Goodbye) -> None:
        """Send ``message`` without waiting for anything.

        Raises :class:`RequestFailure` and nothing else. Anything but a sidecar that does not
        read, or a message cut in two, needs a fresh connection, which the next call makes.
        """
        try:
            connection = self._socket or self._connect()
            data = wire.encode(message)
            if self._unsent:
                data = self._unsent + data
            if connection.send(data) < len(data):
                self.close()
                raise RequestFailure(TIMEOUT, "the sidecar does not read")
            self._unsent = b""
        except BlockingIOError as error:
            failure = RequestFailure(TIMEOUT, "the sidecar does not read")
            raise self._failure_of(failure) from error
        except OSError as error:
            failure = RequestFailure(UNREACHABLE, f"{self.path}: {error.strerror}")
            raise self._failure_of(failure) from error
        except Exception as error:
            raise self._failure_of(error) from error

    def answer_to(self, request_id: int, until_ns: int) -> wire.Answer:
        """The answer, if it is here by ``until_ns`` of ``perf_counter_ns``.

        Raises :class:`RequestFailure` and nothing else. After a time-out the connection stays:
        the late answer is recognised by its id, and goes to :attr:`late`.
        """
        try:
            # Without asking whether there is something to read: an answer that is collected a
            # forward and backward pass later nearly always is.
            answer = self._receive(request_id)
            while answer is None:
                if not self._readable(until_ns):
                    raise RequestFailure(TIMEOUT, "no answer within the deadline")
                answer = self._receive(request_id)
            return answer
        except Exception as error:
            raise self._failure_of(error) from error

    def close(self) -> None:
        """End it."""
        self.takes_goodbyes = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            # A Unix socket connects at once or fails at once (EAGAIN: its backlog is full).
            connection.connect(os.fspath(self.path))
            uid = wire.peer_uid(connection)
        except OSError as error:
            connection.close()
            raise RequestFailure(UNREACHABLE, f"{self.path}: {error.strerror}") from None
        if not wire.may_steer(uid):
            connection.close()
            raise RequestFailure(
                UNREACHABLE, f"{self.path}: listened on by another user ({uid})"
            )
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._buffer = wire.MessageBuffer()
        self._unsent = self._hello
        self._socket = connection
        return connection

    def _failure_of(self, error: Exception) -> RequestFailure:
        """What the client is told of ``error``; the connection is closed unless it is whole."""
        if not isinstance(
            error, RequestFailure
        ):  # whatever it is, the training loop must not see it
            error = RequestFailure(PROTOCOL_ERROR, repr(error))
        if error.reason != TIMEOUT or self._unsent or len(self._buffer):
            self.close()
        return error

    def _readable(self, until_ns: int) -> bool:
        """Wait for something to read; False when the deadline came first.

        poll waits in whole milliseconds, so the fraction that remains is left to select. A
        receive bounded by SO_RCVTIMEO saves a system call, but counts kernel ticks and
        rounds up: 5 ms became 8.
        """
        connection = self._socket
        assert connection is not None
        while True:
            left_ns = until_ns - perf_counter_ns()
            if left_ns >= 1_000_000 or connection.fileno() >= _MAX_SELECT:
                if self._poll.poll(max(0, left_ns // 1_000_000)):
                    return True
                if left_ns < 1_000_000:
                    return False
            else:
                return bool(select.select((connection,), (), (), max(0, left_ns) / 1e9)[0])

    def _receive(self, request_id: int) -> wire.Answer | None:
        """The answer to ``request_id`` if it is here by now; older answers are late."""
        if self._socket is None:
            raise RequestFailure(UNREACHABLE, f"{self.path}: the connection was lost")
        found = None
        try:
            count = self._socket.recv_into(self._incoming)
            if not count:
                raise RequestFailure(UNREACHABLE, "the sidecar closed the connection")
            for body in self._buffer.feed(self._view[:count]):
                message = wire.decode_to_client(body)
                if isinstance(message, wire.Answer):
                    if message.guards is not None:  # also those of an answer that is late
                        self.guards = Guards(message.guards)
                    if message.request_id == request_id:
                        found = message
                    else:
                        self.late.append(message)
                elif isinstance(message, wire.Welcome):
                    self.table_version = message.table_version
                    self.takes_goodbyes = message.takes_goodbyes
                elif isinstance(message, wire.Refusal):
                    raise RequestFailure(
                        PROTOCOL_ERROR, f"the sidecar refused: {message.message}"
                    )
        except BlockingIOError:
            return None
        except OSError as error:
            raise RequestFailure(UNREACHABLE, f"{self.path}: {error.strerror}") from None
        except wire.WireError as error:
            raise RequestFailure(PROTOCOL_ERROR, str(error)) from None
        return found
