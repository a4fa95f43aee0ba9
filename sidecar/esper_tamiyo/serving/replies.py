"""Replies: the answer to each message of a client, and the effects of a decision request."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from esper_otel.leyline.decisions import PROTOCOL_ERROR, Decision, unanswered
from esper_otel.leyline.endings import run_end
from esper_otel.leyline.frames import MAX_SEEDS_PER_FRAME, StepFrame
from esper_otel.leyline.wire import (
    PROTOCOL,
    Answer,
    Ask,
    Check,
    Goodbye,
    Guard,
    Hello,
    Latest,
    LatestRequest,
    RecentRequest,
    SilenceReply,
    SilenceRequest,
    Status,
    StatusRequest,
    ToServer,
    Welcome,
    WireError,
)
from esper_tamiyo.journaling.reporter import Reporter
from esper_tamiyo.judging.admission import RefusalReason, fault_of_hello
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.silences import SilenceError
from esper_tamiyo.latency import GarbageSchedule
from esper_tamiyo.serving.connection import ClientConnection, Trainer
from esper_tamiyo.serving.recent_steps import RecentSteps

log = logging.getLogger("tamiyo")


class Replies:
    """Answers the messages of all connections, asks before all else."""

    def __init__(
        self,
        engine: Engine,
        reporter: Reporter,
        garbage: GarbageSchedule,
        recent: RecentSteps,
        status: Callable[[], dict[str, Any]],
        keep_order: Callable[[], None],
    ) -> None:
        """``status`` is what a tool that asks for it is told; ``keep_order`` is called before
        an order is confirmed."""
        self._engine = engine
        self._reporter = reporter
        self._log = reporter.decision_log
        self._garbage = garbage
        self._recent = recent
        self._status = status
        self._keep_order = keep_order
        self._actions: Counter[str] = Counter()
        self._decided_fast = 0
        self.last_ask_at: float | None = None
        """When a trainer asked last, of the monotonic clock; None before the first."""

    def counts(self) -> dict[str, int]:
        """How many asks were answered, by what they were told."""
        return {"at_a_glance": self._decided_fast, **self._actions}

    def reply(self, connection: ClientConnection, message: ToServer, seen_at: int) -> bool:
        """Answer one message, which was seen at ``seen_at`` (of ``perf_counter_ns``).

        False when the client has to be given up; raises :class:`WireError`.
        """
        if type(message) is Ask:  # first and without detour: a trainer waits
            return self._answer(connection, message, seen_at)
        if type(message) is Check:
            return self._check(connection, message, seen_at)
        if type(message) is Goodbye:
            return self._end(connection, message, seen_at)
        return self._reply(connection, message)

    def _reply(self, connection: ClientConnection, message: ToServer) -> bool:
        if type(message) is Hello:
            return self._welcome(connection, message)
        if type(message) is LatestRequest:
            return connection.send(Latest(self._engine.latest(message.run, message.rank)))
        if type(message) is StatusRequest:
            return self._send_status(connection)
        if type(message) is RecentRequest:
            return self._send_recent(connection, message)
        if type(message) is SilenceRequest:
            return connection.send(self._silence(message, connection.uid))
        raise WireError("not a message a client sends")

    def _welcome(self, connection: ClientConnection, hello: Hello) -> bool:
        if hello.protocol != PROTOCOL:
            raise WireError(f"this is protocol {PROTOCOL}, not {hello.protocol}")
        fault = fault_of_hello(hello)
        if fault is not None:
            self._engine.refuse("", 0, fault)
            raise WireError(f"the trainer's greeting: {fault.value}")
        self.part(connection)
        connection.trainer = trainer = Trainer(hello)
        now = time.perf_counter_ns()
        began = hello.began_unix_nano
        self._engine.roster.introduce(trainer.key, trainer.instance, began, now)
        self._log.on_hello(hello)
        self._recent.note_mode(trainer.key, hello.mode)
        version = self._engine.table.version
        return connection.send(Welcome(PROTOCOL, version, takes_goodbyes=True))

    def part(self, connection: ClientConnection) -> None:
        """A connection ends, or somebody else introduces itself on it."""
        trainer, connection.trainer = connection.trainer, None
        if trainer is not None:
            self._engine.roster.leave(trainer.key, trainer.instance)

    def _answer(self, connection: ClientConnection, ask: Ask, seen_at: int) -> bool:
        trainer = connection.trainer
        if trainer is None:
            raise WireError("an Ask came before a Hello")
        connection.asks, connection.heard_ns = True, seen_at
        fast = None
        if trainer.in_registry_order:
            fast = self._engine.decide_fast(trainer.key, trainer.instance, ask)
        if fast is not None and trainer.announced is None:
            # The trainer goes on; what the step did to the history is worked out meanwhile,
            # and so is whether the rows were well-formed.
            sent = connection.send(Answer(ask.request_id, fast))
            self._reporter.record_answer(seen_at)
            self._log.set_context(seen_at, asked=True, proposal=ask.proposal)
            self._engine.commit(trainer.frame_of_ask(ask), fast, seen_at)
            self._decided_fast += 1
        else:
            self._log.set_context(seen_at, asked=True, proposal=ask.proposal)
            if fast is not None:
                # The guards of its next update are those behind this step.
                decision = fast
                self._engine.commit(trainer.frame_of_ask(ask), fast, seen_at)
                self._decided_fast += 1
            else:
                decision = self._judged(trainer, ask, seen_at)
                self._actions[decision.action.value] += 1
            guards = self._new_guards(trainer)
            sent = self._send_decision(connection, ask.request_id, decision, guards)
            self._reporter.record_answer(seen_at)
        self.last_ask_at = time.monotonic()
        self._garbage.count_step()
        return sent

    def _judged(self, trainer: Trainer, ask: Ask, seen_at: int) -> Decision:
        """The decision about an ask that is not answered at a glance."""
        if len(ask.seeds) > MAX_SEEDS_PER_FRAME:  # before they are copied
            return self._engine.refuse(trainer.key[0], ask.step, RefusalReason.SEEDS)
        frame = trainer.frame_of_ask(ask)
        return self._engine.observe(frame, ask.proposal, seen_at, asked=True)

    def _new_guards(self, trainer: Trainer) -> list[Guard] | None:
        """The guards of its updates, if it has any and has to be told."""
        if trainer.announced is None:
            return None
        guards = self._engine.update_guards(trainer.key, trainer.instance)
        return trainer.announced.to_send(guards)

    def _check(self, connection: ClientConnection, check: Check, seen_at: int) -> bool:
        """Answer a trainer that waits with its update; nothing else follows from it."""
        trainer = connection.trainer
        if trainer is None:
            raise WireError("a Check came before a Hello")
        known = trainer.frame_of_check(check)
        decision = self._engine.check(known)
        sent = self._send_decision(connection, check.request_id, decision)
        self._reporter.record_answer(seen_at)
        self._log.on_check(decision, known, seen_at)
        self._recent.note_check(decision, known)
        self._garbage.count_step()
        return sent

    def _end(self, connection: ClientConnection, goodbye: Goodbye, seen_at: int) -> bool:
        """The run of a connection's own trainer has ended; it waits for no answer."""
        trainer = connection.trainer
        if trainer is None:
            raise WireError("a Goodbye came before a Hello")
        ended = run_end(goodbye.how, goodbye.exception)
        if ended is not None:
            run, rank = trainer.key
            self._log.set_context(seen_at, asked=False)
            self._engine.observe(
                StepFrame(
                    run=run,
                    instance=trainer.instance,
                    rank=rank,
                    step=goodbye.step,
                    time_unix_nano=goodbye.time_unix_nano,
                    values={},
                    ended=ended,
                )
            )
        return True

    def _send_decision(
        self,
        connection: ClientConnection,
        request_id: int,
        decision: Decision,
        guards: list[Guard] | None = None,
    ) -> bool:
        try:
            return connection.send(Answer(request_id, decision, guards))
        except WireError:  # findings about seeds with very long names
            self._engine.note_bad_frame()
            empty = unanswered(decision.run, decision.step, PROTOCOL_ERROR)
            return connection.send(Answer(request_id, empty, guards))

    def _send_recent(self, connection: ClientConnection, request: RecentRequest) -> bool:
        now_ns = time.perf_counter_ns()
        recent = self._recent.recent(request, self._engine.roster.ranks, now_ns)
        try:
            return connection.send(recent)
        except WireError:  # many ranks or seeds with very long names
            few = msgspec.structs.replace(
                recent, ranks=recent.ranks[:8], seeds={}, decisions=recent.decisions[-4:]
            )
            return connection.send(few)

    def _silence(self, request: SilenceRequest, uid: int) -> SilenceReply:
        """Do what the user ``uid`` asks for, and record it, or say why not."""
        try:
            order = self._engine.silence(request)
        except SilenceError as error:
            return SilenceReply("", str(error))
        self._keep_order()
        self._log.on_silence(order, uid)
        log.info("run %s: %s %s, by user %d", order.run, order.rule, order.told, uid)
        return SilenceReply(order.told)

    def _send_status(self, connection: ClientConnection) -> bool:
        report = self._status()
        try:
            return connection.send(Status(report))
        except WireError:  # many ranks with many rules that fire, or very long names
            report["engine"]["rules"] = None
            for run in report["engine"]["runs"]:
                run["rules"] = None
            return connection.send(Status(report))
