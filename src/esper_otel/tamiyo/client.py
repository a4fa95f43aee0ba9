"""Asking the sidecar, within a deadline, and going on without it when it does not answer."""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter_ns

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    PROTOCOL_ERROR,
    TIMEOUT,
    UNREACHABLE,
    Decision,
    Proposal,
    unanswered,
)
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.tamiyo.breaker import Breaker, State

log = logging.getLogger("esper_otel")

_RECEIVE = 16 * 1024
_LENGTH = struct.Struct("<I")
_PEER = struct.Struct("3i")


class _Failure(Exception):  # noqa: N818  (not an error of anybody's: it never leaves here)
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class TamiyoClient:
    """One persistent connection to the sidecar of this host.

    :meth:`ask` waits at most ``deadline_ms`` and never raises. Late, absent or malformed
    answers give ``CONTINUE`` with the reason ``timeout``, ``unreachable`` or
    ``protocol_error``; three in a row open the breaker, and while that is open an ask
    returns at once with the reason ``breaker_open``. A probe is *sent* when the
    cool-down has passed but not waited for: its answer is looked for a deadline later, so
    that a frozen sidecar costs three deadlines and not one more per cool-down.
    """

    def __init__(
        self,
        path: Path,
        *,
        run: str,
        instance: str,
        rank: int = 0,
        world_size: int = 1,
        deadline_ms: float = 5.0,
    ) -> None:
        wire.check_socket_path(path)
        self.path = path
        self.breaker = Breaker()
        self.table_version = ""
        """Table the sidecar decides by, once it has said so."""
        self._run = run
        self._deadline_ns = int(deadline_ms * 1e6)
        self._hello = wire.encode(
            wire.Hello(
                protocol=wire.PROTOCOL,
                run=run,
                instance=instance,
                rank=rank,
                world_size=world_size,
                step_columns=list(STEP_KEYS),
                seed_columns=list(SEED_KEYS),
            )
        )
        self._socket: socket.socket | None = None
        self._poll = select.poll()
        self._unsent = b""
        self._incoming = bytearray(_RECEIVE)
        self._view = memoryview(self._incoming)
        self._buffer = wire.MessageBuffer()
        self._request_id = 0
        self._probe_id = 0
        self._probe_until_ns = 0
        self._reported_down = False

    def ask(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
    ) -> Decision:
        """The decision about ``step``, whose frame is given as registry rows."""
        now = perf_counter_ns()
        breaker = self.breaker
        if breaker.state is State.HALF_OPEN and now >= self._probe_until_ns:
            self._look_for_probe()
        if breaker.state is State.HALF_OPEN or (
            breaker.state is State.OPEN and not breaker.may_probe(now)
        ):
            return unanswered(self._run, step, BREAKER_OPEN)
        self._request_id = request_id = self._request_id + 1
        message = wire.Ask(
            request_id,
            step,
            time_unix_nano,
            row,
            [wire.SeedRow(seed_id, values) for seed_id, values in seeds] if seeds else [],
            proposal,
        )
        until = now + self._deadline_ns
        try:
            if breaker.state is State.OPEN:
                self._send(message)
                breaker.probing()
                self._probe_id, self._probe_until_ns = request_id, until
                return unanswered(self._run, step, BREAKER_OPEN)
            self._send(message)
            decision = self._await(request_id, until)
        except _Failure as failure:
            return self._failed(step, failure)
        except Exception as error:  # whatever it is, the training loop must not see it
            return self._failed(step, _Failure(PROTOCOL_ERROR, repr(error)))
        breaker.succeeded()
        if self._reported_down:
            self._report_up()
        return decision

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _look_for_probe(self) -> None:
        """Once, when the probe's deadline has passed: looking at every step costs more."""
        try:
            decision = self._receive(self._probe_id)
        except _Failure as failure:
            self._failed(0, failure)
            return
        if decision is not None:
            self.breaker.succeeded()
        else:
            self._failed(0, _Failure(TIMEOUT, "the probe was not answered"))

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            # A Unix socket connects at once or fails at once (EAGAIN: its backlog is full).
            connection.connect(os.fspath(self.path))
            _, uid, _ = _PEER.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )
        except OSError as error:
            connection.close()
            raise _Failure(UNREACHABLE, f"{self.path}: {error.strerror}") from None
        if uid not in (os.geteuid(), 0):
            connection.close()
            raise _Failure(UNREACHABLE, f"{self.path}: listened on by another user ({uid})")
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._buffer = wire.MessageBuffer()
        self._unsent = self._hello
        self._socket = connection
        return connection

    def _send(self, message: wire.Ask) -> None:
        connection = self._socket or self._connect()
        data = self._unsent + wire.encode(message)
        try:
            sent = connection.send(data)
        except BlockingIOError:
            raise _Failure(TIMEOUT, "the sidecar does not read") from None
        except OSError as error:
            raise _Failure(UNREACHABLE, f"{self.path}: {error.strerror}") from None
        if sent < len(data):
            self.close()
            raise _Failure(TIMEOUT, "the sidecar does not read")
        self._unsent = b""

    def _await(self, request_id: int, until: int) -> Decision:
        # poll waits in whole milliseconds, so only the first wait may be rounded up.
        # select would refuse descriptors over 1023. A receive bounded by SO_RCVTIMEO saves
        # a system call, but counts kernel ticks and rounds up: 5 ms became 8.
        patience = math.ceil((until - perf_counter_ns()) / 1e6)
        while patience > 0 and self._poll.poll(patience):
            decision = self._receive(request_id)
            if decision is not None:
                return decision
            patience = (until - perf_counter_ns()) // 1_000_000
        raise _Failure(TIMEOUT, "no answer within the deadline")

    def _receive(self, request_id: int) -> Decision | None:
        """The answer to ``request_id`` if it is here by now; older answers are dropped."""
        if self._socket is None:
            raise _Failure(UNREACHABLE, "not connected")
        found = None
        try:
            count = self._socket.recv_into(self._incoming)
            if not count:
                raise _Failure(UNREACHABLE, "the sidecar closed the connection")
            for message in self._messages(self._view[:count]):
                if isinstance(message, wire.Answer):
                    if message.request_id == request_id:
                        found = message.decision
                elif isinstance(message, wire.Welcome):
                    self.table_version = message.table_version
                elif isinstance(message, wire.Refusal):
                    raise _Failure(PROTOCOL_ERROR, f"the sidecar refused: {message.message}")
        except BlockingIOError:
            return None
        except OSError as error:
            raise _Failure(UNREACHABLE, f"{self.path}: {error.strerror}") from None
        except wire.WireError as error:
            raise _Failure(PROTOCOL_ERROR, str(error)) from None
        return found

    def _messages(self, data: memoryview) -> Iterable[wire.ToClient]:
        if not self._buffer and len(data) > 4 and _LENGTH.unpack_from(data)[0] == len(data) - 4:
            return (wire.decode_to_client(data[4:]),)  # nearly always: one read, one message
        return map(wire.decode_to_client, self._buffer.feed(data))

    def _failed(self, step: int, failure: _Failure) -> Decision:
        # After a time-out the connection stays: the late answer is recognised by its id
        # and dropped. Anything else, or a message cut in two, needs a fresh one.
        if failure.reason != TIMEOUT or self._unsent or len(self._buffer):
            self.close()
        self.breaker.failed(perf_counter_ns())
        if self.breaker.state is State.OPEN and not self._reported_down:
            self._reported_down = True
            log.warning("no decisions from Tamiyo (%s): training goes on without them", failure)
        return unanswered(self._run, step, failure.reason)

    def _report_up(self) -> None:
        self._reported_down = False
        log.info("Tamiyo answers again at %s", self.path)
