"""The decide process: one thread that owns all state and answers asks before all else.

Each turn of the loop first serves every connection that is ready, then reads a little
from the ingest process, then judges one frame of its queue. So an ask waits at most for
one turn, however much OTLP comes in.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec

from esper_otel.leyline.decisions import PROTOCOL_ERROR, Decision, unanswered
from esper_otel.leyline.wire import (
    MAX_BODY,
    PROTOCOL,
    Answer,
    Ask,
    Check,
    Guard,
    Hello,
    Latest,
    LatestRequest,
    Refusal,
    Status,
    StatusRequest,
    ToServer,
    Welcome,
    WireError,
    may_steer,
    peer_uid,
)
from esper_tamiyo.journaling.chronicle import Chronicle
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.receiving.ingest_child import IngestChild
from esper_tamiyo.receiving.pipe import frame
from esper_tamiyo.serving.connection import Connection, Trainer
from esper_tamiyo.serving.listening import Listener
from esper_tamiyo.serving.reloading import Reloading

log = logging.getLogger("tamiyo")

MAX_CONNECTIONS = 512
COLLECT_EVERY = 256
"""Judged steps between two collections of young garbage, made when nobody is waiting. To
look through all that is remembered takes milliseconds: that waits for a second of rest."""

TICK_S = 1.0

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


class Server:
    """Serves one decision socket until SIGTERM or SIGINT."""

    def __init__(
        self,
        engine: Engine,
        listener: Listener,
        ingest: IngestChild | None,
        chronicle: Chronicle,
        reloading: Reloading,
        on_ready: Callable[[], None],
    ) -> None:
        """``on_ready`` is called once, when the socket and both receivers listen."""
        self._engine = engine
        self._listener = listener
        self._ingest = ingest
        self._chronicle = chronicle
        self._reloading = reloading
        self._on_ready: Callable[[], None] | None = on_ready
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._pipe: socket.socket | None = None
        self._buffer = bytearray(MAX_BODY)
        self._view = memoryview(self._buffer)
        self._counts: Counter[str] = Counter()
        self._actions: Counter[str] = Counter()
        self._glanced = 0
        self._since_collection = 0
        self._owes_collection = False
        self._started_at = time.monotonic()
        self._last_frame_at: float | None = None
        self._tick_at = 0.0
        self._seen_at = 0
        """Mark of ``perf_counter_ns`` at which this turn saw what there is to do."""
        self._stopping = False

    def run(self) -> None:
        """Serve until told to end; raises what the ingest process could not start for."""
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        previous = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        self._epoll.register(wake, _READ)
        self._epoll.register(self._listener.socket, _READ)
        try:
            self._chronicle.start(self._epoll)
            self._reloading.start(self._epoll)
            if self._ingest is not None:
                self._watch(self._ingest.start())
            self._keep_garbage_off_the_path()
            _never_preempt()
            self._announce()
            while not self._stopping:
                self._turn(wake)
        finally:
            signal.set_wakeup_fd(previous)
            self._close()
            wake.close()
            woken.close()

    def _stop(self, signum: int, where: FrameType | None) -> None:
        self._stopping = True

    def _reload(self, signum: int, where: FrameType | None) -> None:
        self._reloading.look_now()

    def _keep_garbage_off_the_path(self) -> None:
        """Collections happen between answers (:meth:`_turn`), and skip what lives forever."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def _turn(self, wake: socket.socket) -> None:
        pipe_ready = False
        listener_fd = self._listener.socket.fileno()
        ready = self._epoll.poll(self._patience())
        self._seen_at = time.perf_counter_ns()
        for fd, events in ready:
            connection = self._connections.get(fd)
            if connection is not None:
                try:
                    self._serve(connection, events)
                except Exception:  # whatever one client brings about, the others are served
                    self._counts["failed"] += 1
                    log.exception("gave up a connection")
                    self._hang_up(connection)
            elif fd == listener_fd:
                self._accept()
            elif self._pipe is not None and fd == self._pipe.fileno():
                pipe_ready = True
            elif self._chronicle.owns(fd):
                self._chronicle.hear()
            elif self._reloading.owns(fd):
                self._reloading.hear()
            else:
                with suppress(BlockingIOError):
                    wake.recv(64)
        if self._ingest is not None:
            self._tend(self._ingest, pipe_ready)
            self._announce()
        self._reloading.tend()
        self._tick()
        self._chronicle.tend(self._engine.table, self._report)
        if self._since_collection >= COLLECT_EVERY:
            self._since_collection = 0
            self._owes_collection = True
            gc.collect(0)

    def _tick(self) -> None:
        """About once a second the engine is told the time: it reads no clock itself.

        Not the wall's: that of a trainer may be another, and either may be set meanwhile.
        """
        now = time.monotonic()
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            self._rest(now)
            now_ns = time.perf_counter_ns()
            self._chronicle.notebook.begin(now_ns, asked=False)
            self._engine.tick(now_ns)

    def _rest(self, now: float) -> None:
        """Look through everything for garbage, if it is worth it and nothing happens."""
        seen = self._last_frame_at
        if self._owes_collection and seen is not None and now - seen > TICK_S:
            self._owes_collection = False
            gc.collect()

    def _announce(self) -> None:
        """Once, as soon as everything listens."""
        if self._on_ready is not None and (self._ingest is None or self._ingest.listening):
            self._on_ready()
            self._on_ready = None

    def _patience(self) -> float:
        """How long to wait for something to do, at most until the next tick."""
        dues = [max(0.0, self._tick_at - time.monotonic()), self._chronicle.patience()]
        dues.append(self._reloading.due_in())
        if self._ingest is not None:
            dues.append(0.0 if self._ingest.frames else self._ingest.due_in())
        return min(due for due in dues if due is not None)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.socket.accept()
        except OSError:  # it went away again
            return
        uid = peer_uid(accepted)
        if not may_steer(uid) or len(self._connections) >= MAX_CONNECTIONS:
            self._counts["turned_away"] += 1
            log.warning("turned away a connection of user %d", uid)
            accepted.close()
            return
        connection = Connection(accepted)
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, _READ)
        self._counts["connections"] += 1

    def _serve(self, connection: Connection, events: int) -> None:
        if events & _WRITE and not self._flush(connection):
            return
        if not events & ~_WRITE:
            return
        try:
            count = connection.receive_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count == 0:
            self._hang_up(connection)
            return
        try:
            for message in connection.messages(self._view[:count]):
                if type(message) is Ask:  # first and without detour: a trainer waits
                    alive = self._answer(connection, message)
                elif type(message) is Check:
                    alive = self._check(connection, message)
                else:
                    alive = self._reply(connection, message)
                if not alive:
                    self._counts["gave_up"] += 1
                    self._hang_up(connection)
                    return
        except WireError as error:
            self._counts["malformed"] += 1
            connection.send(Refusal(str(error)[:1000]))
            self._hang_up(connection)
            return
        if connection.backlog:
            self._epoll.modify(connection.fd, _READ | _WRITE)

    def _flush(self, connection: Connection) -> bool:
        if not connection.flush():
            self._hang_up(connection)
            return False
        if not connection.backlog:
            self._epoll.modify(connection.fd, _READ)
        return True

    def _reply(self, connection: Connection, message: ToServer) -> bool:
        """False when the client has to be given up; raises :class:`WireError`."""
        if type(message) is Hello:
            if message.protocol != PROTOCOL:
                raise WireError(f"this is protocol {PROTOCOL}, not {message.protocol}")
            connection.trainer = Trainer(message)
            self._chronicle.notebook.greet(message)
            return connection.send(Welcome(PROTOCOL, self._engine.table.version))
        if type(message) is LatestRequest:
            return connection.send(Latest(self._engine.latest(message.run, message.rank)))
        if type(message) is StatusRequest:
            return self._send_status(connection)
        raise WireError("not a message a client sends")

    def _answer(self, connection: Connection, ask: Ask) -> bool:
        trainer = connection.trainer
        if trainer is None:
            raise WireError("an Ask came before a Hello")
        glanced = (
            self._engine.glance(trainer.key, trainer.instance, ask) if trainer.glances else None
        )
        if glanced is not None and trainer.announced is None:
            # The trainer goes on; what the step did to the history is worked out meanwhile,
            # and so is whether the rows were well-formed.
            sent = connection.send(Answer(ask.request_id, glanced))
            self._chronicle.answered(self._seen_at)
            self._chronicle.notebook.begin(self._seen_at, asked=True, proposal=ask.proposal)
            self._engine.settle(trainer.frame(ask), glanced, self._seen_at)
            self._glanced += 1
        else:
            self._chronicle.notebook.begin(self._seen_at, asked=True, proposal=ask.proposal)
            frame = trainer.frame(ask)
            if glanced is not None:
                # The guards of its next update are those behind this step.
                decision = glanced
                self._engine.settle(frame, glanced, self._seen_at)
                self._glanced += 1
            else:
                decision = self._engine.observe(frame, ask.proposal, self._seen_at)
                self._actions[decision.action.value] += 1
            guards = self._news(trainer)
            sent = self._send_decision(connection, ask.request_id, decision, guards)
            self._chronicle.answered(self._seen_at)
        self._last_frame_at = time.monotonic()
        self._since_collection += 1
        return sent

    def _news(self, trainer: Trainer) -> list[Guard] | None:
        """The guards of its updates, if it has any and has to be told."""
        if trainer.announced is None:
            return None
        guards = self._engine.update_guards(trainer.key, trainer.instance)
        return trainer.announced.news(guards)

    def _check(self, connection: Connection, check: Check) -> bool:
        """Answer a trainer that waits with its update; nothing else follows from it."""
        trainer = connection.trainer
        if trainer is None:
            raise WireError("a Check came before a Hello")
        known = trainer.before_update(check)
        decision = self._engine.check(known)
        sent = self._send_decision(connection, check.request_id, decision)
        self._chronicle.answered(self._seen_at)
        self._chronicle.notebook.checked(decision, known, self._seen_at)
        self._since_collection += 1
        return sent

    def _send_decision(
        self,
        connection: Connection,
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

    def _send_status(self, connection: Connection) -> bool:
        report = self._report()
        try:
            return connection.send(Status(report))
        except WireError:  # many ranks with many rules that fire, or very long names
            report["engine"]["rules"] = None
            for run in report["engine"]["runs"]:
                run["rules"] = None
            return connection.send(Status(report))

    def _hang_up(self, connection: Connection) -> None:
        if self._connections.pop(connection.fd, None) is not None:
            self._epoll.unregister(connection.fd)
            connection.close()

    def _watch(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._epoll.register(pipe, _READ)

    def _tend(self, ingest: IngestChild, pipe_ready: bool) -> None:
        """Judge one frame or, when there is none, read a few; see that the process lives.

        What is not read yet fills the pipe, and that is how producers learn to wait.
        """
        if ingest.frames:
            self._judge(ingest.frames.popleft())
        elif pipe_ready and self._pipe is not None and not ingest.read():
            self._epoll.unregister(self._pipe)
            self._pipe = None
            ingest.bury()
        if self._pipe is None and ingest.due_in() == 0.0:
            restarted = ingest.restart()
            if restarted is not None:
                self._watch(restarted)

    def _judge(self, body: bytes) -> None:
        try:
            streamed = frame(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._engine.note_bad_frame()
            return
        began_at = time.perf_counter_ns()
        self._chronicle.notebook.begin(began_at, asked=False)
        self._engine.observe(streamed, at_ns=began_at)
        self._chronicle.judged(streamed.time_unix_nano)
        self._last_frame_at = time.monotonic()
        self._counts["frames_streamed"] += 1
        self._since_collection += 1

    def _report(self) -> dict[str, Any]:
        now = time.monotonic()
        seen = self._last_frame_at
        return {
            "pid": os.getpid(),
            "uptime_s": now - self._started_at,
            "last_frame_age_s": None if seen is None else now - seen,
            "table": self._reloading.report(),
            "connections": {"open": len(self._connections), **self._counts},
            "answers": {"at_a_glance": self._glanced, **self._actions},
            "engine": self._engine.report(time.perf_counter_ns()),
            "ingest": None if self._ingest is None else self._ingest.report(),
            **self._chronicle.counts(),
        }

    def _close(self) -> None:
        for connection in list(self._connections.values()):
            self._hang_up(connection)
        self._listener.close()
        if self._ingest is not None:
            self._ingest.close()
        self._chronicle.close()
        self._reloading.close()
        self._epoll.close()


def _never_preempt() -> None:
    """Wake up on a free processor, or behind whoever runs on this one.

    A trainer sends its request and goes on computing. A process that is woken takes the
    processor from the one that woke it, if both are on the same: then the whole evaluation
    lies within the trainer's ``send``, 80 to 200 µs instead of some 10. The policy SCHED_BATCH
    says that this one need not; whoever waits for an answer gives its processor away anyway.
    """
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
