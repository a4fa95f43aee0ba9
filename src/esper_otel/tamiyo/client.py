"""Asking the sidecar, within a deadline, and going on without it when it does not answer."""

from __future__ import annotations

import _thread
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns

import msgspec

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import BREAKER_OPEN, Decision, Proposal, unanswered
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.tamiyo.breaker import Breaker, State
from esper_otel.tamiyo.connection import Connection, Failure

_PATIENCE = 0.95
"""Share of the deadline that is waited: the kernel ends a wait about 0.1 ms late, and to give
up takes time as well."""

log = logging.getLogger("esper_otel")


class TamiyoClient:
    """Asks the sidecar of this host.

    :meth:`ask` waits at most ``deadline_ms`` and never raises. Late, absent or malformed
    answers give ``CONTINUE`` with the reason ``timeout``, ``unreachable`` or
    ``protocol_error``; three in a row open the breaker, and while that is open an ask
    returns at once with the reason ``breaker_open``.

    Whether the sidecar answers again is found out by a thread that lives only while the
    breaker is open: after each cool-down it repeats the ask that failed last. The training
    thread neither sends a probe nor looks at one. Who owns the connection follows from the
    breaker: closed, the asking thread; otherwise that thread. So there is no lock.

    In a forked child a client asks no more: the run belongs to the parent.
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
        mode: str = "",
    ) -> None:
        """``mode`` is what this trainer does with decisions; the sidecar is told."""
        hello = wire.Hello(
            protocol=wire.PROTOCOL,
            run=run,
            instance=instance,
            rank=rank,
            world_size=world_size,
            step_columns=list(STEP_KEYS),
            seed_columns=list(SEED_KEYS),
            mode=mode,
        )
        self.path = path
        self.breaker = Breaker()
        self._connection = Connection(path, hello)
        self._run = run
        self._patience_ns = int(_PATIENCE * deadline_ms * 1e6)
        self._request_id = 0
        self._reported_down = False
        self._closed = threading.Event()
        _clients.add(self)

    @property
    def table_version(self) -> str:
        """Table the sidecar decides by, once it has said so."""
        return self._connection.table_version

    def ask(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
    ) -> Decision:
        """The decision about ``step``, whose frame is given as registry rows."""
        if self.breaker.state is not State.CLOSED:
            return unanswered(self._run, step, BREAKER_OPEN)
        until_ns = perf_counter_ns() + self._patience_ns
        self._request_id = request_id = self._request_id + 1
        message = wire.Ask(
            request_id,
            step,
            time_unix_nano,
            row,
            [wire.SeedRow(seed_id, values) for seed_id, values in seeds] if seeds else [],
            proposal,
        )
        try:
            decision = self._connection.ask(message, until_ns)
        except Failure as failure:
            self._failed(failure, message)
            return unanswered(self._run, step, failure.reason)
        self.breaker.succeeded()
        if self._reported_down:
            self._reported_down = False
            log.info("Tamiyo answers again at %s", self.path)
        return decision

    def close(self) -> None:
        """End the connection, and the thread if there is one; does not wait for it."""
        self._closed.set()
        if self.breaker.state is State.CLOSED:
            self._connection.close()

    def forget(self) -> None:
        """Never ask again: in a forked child the parent's connection must not be used."""
        self._connection.close()
        self.breaker.state = State.OPEN

    def _failed(self, failure: Failure, message: wire.Ask) -> None:
        self.breaker.failed(perf_counter_ns())
        if self.breaker.state is State.CLOSED:
            return
        if not self._reported_down:
            self._reported_down = True
            log.warning("no decisions from Tamiyo (%s): training goes on without them", failure)
        # The rows are the caller's: a probe has copies. It proposes nothing, because
        # nobody would hear that it was granted.
        probe = msgspec.structs.replace(
            message,
            values=message.values[:],
            seeds=[wire.SeedRow(seed.seed_id, seed.values[:]) for seed in message.seeds],
            proposal=None,
        )
        try:
            # threading.Thread.start waits until the thread runs: up to 11 ms, seen here on
            # a busy machine. This returns after 30 µs.
            _thread.start_new_thread(self._probe, (probe,))
        except RuntimeError:  # the system gives no more threads: go on asking, within deadlines
            self.breaker = Breaker()

    def _probe(self, message: wire.Ask) -> None:
        """Until an answer comes or the client is closed; runs on a thread of its own.

        Whoever trained on while this cools down has newer steps, but a repeated one is
        judged and answered all the same: what is asked here is whether answers come.
        """
        breaker, connection = self.breaker, self._connection
        while True:
            wait_ns = breaker.retry_at_ns - perf_counter_ns()
            if self._closed.wait(max(0, wait_ns) / 1e9):
                connection.close()
                return
            if not breaker.may_probe(perf_counter_ns()):
                continue
            breaker.probing()
            self._request_id += 1
            probe = msgspec.structs.replace(message, request_id=self._request_id)
            try:
                connection.ask(probe, perf_counter_ns() + self._patience_ns)
            except Failure:
                breaker.failed(perf_counter_ns())
                continue
            breaker.succeeded()  # from here on all of it is the asking thread's
            if self._closed.is_set():
                connection.close()
            return


_clients: weakref.WeakSet[TamiyoClient] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
