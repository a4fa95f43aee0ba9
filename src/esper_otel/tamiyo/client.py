"""Asking the sidecar within a deadline, and continuing without it when it does not answer."""

from __future__ import annotations

import _thread
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter_ns, time_ns

import msgspec

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import (
    BREAKER_OPEN,
    CLEAR_GRADIENTS,
    CONSERVATIVE_MODE,
    FORCE,
    LR_SCALE,
    MOMENTUM_SCALE,
    RESTORE,
    SUPERSEDED,
    TIMEOUT,
    Action,
    Decision,
    Proposal,
    unanswered,
)
from esper_otel.leyline.endings import RunEnd
from esper_otel.leyline.frames import NO_CUSTOM
from esper_otel.leyline.guards import Guards
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.tamiyo.breaker import Breaker, State
from esper_otel.tamiyo.connection import Connection, RequestFailure

_PATIENCE = 0.95
"""Share of the deadline that is waited: the kernel ends a wait about 0.1 ms late, and to give
up takes time as well."""

_CLOSED = State.CLOSED
_BREAKER_IS_OPEN = RequestFailure(BREAKER_OPEN, "the circuit breaker is open")

log = logging.getLogger("esper_otel")


class TamiyoClient:
    """Asks the sidecar of this host.

    :meth:`send` sends a request and returns at once; :meth:`collect` takes its answer, later,
    and waits only while the deadline, which counts from the sending, has not passed. Neither
    raises. Late, absent or malformed answers give ``CONTINUE`` with the reason ``timeout``,
    ``unreachable`` or ``protocol_error``; three in a row open the circuit breaker, and while
    that is open nothing is sent and the reason is ``breaker_open``.

    What a late answer asks for, be it a smaller rate, a pause or weights put back, comes with
    the answer behind it: the rule that fired is in its cool-down by then and does not ask
    again. What it grants a seed, or gives back, is dropped.

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
            began_unix_nano=time_ns(),
        )
        self.path = path
        self.breaker = Breaker()
        self._connection = Connection(path, hello)
        self._run = run
        self._rank = rank
        self._patience_ns = int(_PATIENCE * deadline_ms * 1e6)
        self._request_id = 0
        self._under_way: wire.Ask | wire.Check | None = None
        self._until_ns = 0
        self._missed: set[int] = set()
        """Asks that ended without their answer while the connection held."""
        self._failure: RequestFailure | None = None
        """Why the message under way is not answered, as far as the sending has shown it."""
        self._reported_down = False
        self._reported_superseded = False
        self._closed = threading.Event()
        _clients.add(self)

    @property
    def guards(self) -> Guards | None:
        """Bounds that no update may cross unjudged; None before the sidecar has sent any."""
        return self._connection.guards

    @property
    def table_version(self) -> str:
        """Table the sidecar decides by, once it has said so."""
        return self._connection.table_version

    def send(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Ask about ``step``, whose frame is given as registry rows; does not wait.

        The answer to an ask before it that was not collected is dropped when it comes.
        """
        self._request_id = request_id = self._request_id + 1
        message = wire.Ask(
            request_id,
            step,
            time_unix_nano,
            row,
            [wire.SeedRow(seed_id, values) for seed_id, values in seeds] if seeds else [],
            proposal,
            {**custom} if custom else {},
        )
        self._send(message)

    def check(
        self, step: int, time_unix_nano: int, row: list[float], waited_ns: int = 0
    ) -> Decision:
        """What is to become of the update of ``step``, of which ``row`` is known; waits.

        The deadline is shorter by what the same step has ``waited_ns`` before.
        """
        self._request_id = request_id = self._request_id + 1
        self._send(wire.Check(request_id, step, time_unix_nano, row))
        self._until_ns -= waited_ns
        decision = self.collect()
        assert decision is not None
        return decision

    def collect(self) -> Decision | None:
        """The decision that was asked for last; None when it has been collected."""
        message, self._under_way = self._under_way, None
        if message is None:
            return None
        failure = self._failure
        if failure is None:
            try:
                answer = self._connection.answer_to(message.request_id, self._until_ns)
            except RequestFailure as late:
                failure = late
            else:
                self.breaker.succeeded()
                if self._reported_down:
                    self._reported_down = False
                    log.info("esper-otel: Tamiyo answers again at %s", self.path)
                decision = answer.decision
                if decision.reason == SUPERSEDED and not self._reported_superseded:
                    self._tell_superseded()
                if self._missed and isinstance(message, wire.Ask):
                    decision = self._with_late(decision)
                    self._missed.clear()
                return decision
        self._failure = None
        decision = unanswered(self._run, message.step, failure.reason)
        if isinstance(message, wire.Ask):
            if self._missed:
                decision = self._with_late(decision)
            if failure.reason == TIMEOUT:
                self._missed.add(message.request_id)
        if failure.reason != BREAKER_OPEN:
            self._failed(failure, message)
        return decision

    def ask(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> Decision:
        """:meth:`send`, and wait for the answer: the decision about ``step``."""
        self.send(step, time_unix_nano, row, seeds, proposal, custom)
        decision = self.collect()
        assert decision is not None
        return decision

    def _with_late(self, decision: Decision) -> Decision:
        """``decision``, or a stronger one that came too late for its own step."""
        late, missed = self._connection.late, self._missed
        while late:
            answer = late.popleft()
            if answer.request_id in missed:
                missed.discard(answer.request_id)
                if _still_counts(answer.decision, decision):
                    decision = msgspec.structs.replace(answer.decision, step=decision.step)
        return decision

    def _send(self, message: wire.Ask | wire.Check) -> None:
        self._under_way = message
        self._failure = None
        if self.breaker.state is not _CLOSED:
            self._failure = _BREAKER_IS_OPEN
            return
        self._until_ns = perf_counter_ns() + self._patience_ns
        try:
            self._connection.send(message)
        except RequestFailure as failure:
            self._failure = failure

    def _tell_superseded(self) -> None:
        self._reported_superseded = True
        log.warning(
            "esper-otel: another process, which began later, trains as rank %d of run %s: "
            "this one gets no decisions; give each training a run id of its own (--run-id)",
            self._rank,
            self._run,
        )

    def say_goodbye(self, step: int, time_unix_nano: int, end: RunEnd) -> None:
        """The run has ended behind ``step``; does not wait, and nobody answers.

        Nothing is sent to a sidecar that is away, or too old to know what that is.
        """
        if self.breaker.state is State.CLOSED and self._connection.takes_goodbyes:
            with suppress(RequestFailure):
                self._connection.send(
                    wire.Goodbye(step, time_unix_nano, end.how.value, end.exception)
                )

    def close(self) -> None:
        """End the connection, and the thread if there is one; does not wait for it."""
        self._closed.set()
        if self.breaker.state is State.CLOSED:
            self._connection.close()

    def disable(self) -> None:
        """Never ask again: in a forked child the parent's connection must not be used."""
        self._connection.close()
        self._under_way = None
        self.breaker.state = State.OPEN

    def _failed(self, failure: RequestFailure, message: wire.Ask | wire.Check) -> None:
        self.breaker.failed(perf_counter_ns())
        if self.breaker.state is State.CLOSED:
            return
        self._missed.clear()  # nobody knows how old an answer is that comes after this
        if not self._reported_down:
            self._reported_down = True
            log.warning(
                "esper-otel: Tamiyo is unreachable (%s); training continues without decisions "
                "and will reconnect",
                failure,
            )
        probe = _probe_of(message)
        try:
            # threading.Thread.start waits until the thread runs: up to 11 ms, seen here on
            # a busy machine. This returns after 30 µs.
            _thread.start_new_thread(self._probe, (probe,))
        except RuntimeError:  # the system gives no more threads: go on asking, within deadlines
            self.breaker = Breaker()

    def _probe(self, message: wire.Ask | wire.Check) -> None:
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
                connection.send(probe)
                connection.answer_to(probe.request_id, perf_counter_ns() + self._patience_ns)
            except RequestFailure:
                breaker.failed(perf_counter_ns())
                continue
            breaker.succeeded()  # from here on all of it is the asking thread's
            if self._closed.is_set():
                connection.close()
            return


def _still_counts(late: Decision, newer: Decision) -> bool:
    """Whether ``late`` asks for what is as right a step later, and ``newer`` asks for less."""
    parameters = late.parameters
    asks = (
        parameters.get(LR_SCALE, 1.0) < 1.0
        or MOMENTUM_SCALE in parameters
        or RESTORE in parameters
        or CLEAR_GRADIENTS in parameters
        or (late.action is Action.PAUSE and late.reason != CONSERVATIVE_MODE)
    )
    return asks and FORCE[late.action] > FORCE[newer.action]


def _probe_of(message: wire.Ask | wire.Check) -> wire.Ask | wire.Check:
    """``message`` with copies of its rows, which are the caller's.

    It proposes nothing, because nobody would hear that it was granted.
    """
    copied = msgspec.structs.replace(message, values=message.values[:])
    if isinstance(copied, wire.Check):
        return copied
    seeds = [wire.SeedRow(seed.seed_id, seed.values[:]) for seed in copied.seeds]
    return msgspec.structs.replace(copied, seeds=seeds, proposal=None)


_clients: weakref.WeakSet[TamiyoClient] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client.disable()


os.register_at_fork(after_in_child=_after_fork_in_child)
