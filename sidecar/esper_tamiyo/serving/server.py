"""The decide process: one thread that owns all state and answers decision requests first.

Each turn of the loop first serves every connection that is ready, then reads a little from the
ingest process or judges some frames of its queue, and does some upkeep, for as long as nobody
asks. So an ask waits for one slice and one frame at most, or for one part of the upkeep.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec

from esper_otel.leyline.wire import MAX_BODY, Refusal, WireError
from esper_tamiyo.child_process import ChildProcess
from esper_tamiyo.journaling.reporter import Reporter
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.keeping.state_keeper import StateKeeper
from esper_tamiyo.latency import SLICE_NS, GarbageSchedule, Upkeep, never_preempt, shorten_slice
from esper_tamiyo.receiving.ingest_child import IngestChild
from esper_tamiyo.receiving.pipe import frame
from esper_tamiyo.serving.connection import ClientConnection, idlest
from esper_tamiyo.serving.listening import Accepting, DecisionSocket, raise_descriptor_limit
from esper_tamiyo.serving.recent_steps import RecentSteps
from esper_tamiyo.serving.reloading import Reloading
from esper_tamiyo.serving.replies import Replies
from esper_tamiyo.showing.ui_child import UiChild

log = logging.getLogger("tamiyo")

MAX_CONNECTIONS = 512
TICK_S = 1.0
RANKS_PER_TURN = 32
"""Ranks that are looked at for a heartbeat in one turn: at most 0.3 ms with cold caches."""

SILENCES_PER_TURN = 8
"""Ranks that are looked at for silence in one turn: to find that one has fallen silent takes up
to 0.3 ms."""

FRAMES_PER_TURN = 16
"""Streamed frames that are judged in one turn, while nothing but more of them comes: what a
turn does besides takes as long as to judge half of one."""

READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"
"""What a supervisor such as systemd is told."""

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


class Server:
    """Serves one decision socket until SIGTERM or SIGINT."""

    def __init__(
        self,
        engine: Engine,
        listener: DecisionSocket,
        ingest: IngestChild | None,
        reporter: Reporter,
        reloading: Reloading,
        keeper: StateKeeper,
        recent: RecentSteps,
        on_ready: Callable[[], None],
        page: UiChild | None = None,
    ) -> None:
        """``on_ready`` is called once, when the socket and both receivers listen."""
        self._engine = engine
        self._listener = listener
        self._ingest = ingest
        self._reporter = reporter
        self._log = reporter.decision_log
        self._reloading = reloading
        self._keeper = keeper
        self._page = page
        children: Sequence[ChildProcess | None]
        children = (reporter.writer, reloading, keeper, ingest, page)
        self._children = [child for child in children if child is not None]
        self._on_ready: Callable[[], None] | None = on_ready
        self._epoll = select.epoll()
        self._connections: dict[int, ClientConnection] = {}
        self._buffer = bytearray(MAX_BODY)
        self._view = memoryview(self._buffer)
        self._counts: Counter[str] = Counter()
        self._accepting = Accepting(listener.socket, self._epoll, self._counts)
        self._garbage = GarbageSchedule()
        self._replies = Replies(
            engine, reporter, self._garbage, recent, self._status, keeper.keep_order
        )
        self._started_at = time.monotonic()
        self._last_streamed_at: float | None = None
        self._tick_at = 0.0
        self._ticking: Iterator[None] | None = None
        """The look for silent ranks that goes on, some of them in each turn."""
        self._seen_at = 0
        """Mark of ``perf_counter_ns`` at which this turn saw what there is to do."""
        self._is_prompt = False
        """Whether it takes a processor when it is woken, and gives it back with the answer."""
        self._pipe_ready = False
        """Whether the ingest process has sent more, as this turn saw it."""
        self._upkeep = Upkeep(
            (
                self._work_on_stream,
                reloading.restart_when_due,
                self._tick,
                keeper.keep,
                lambda: reporter.write_down(engine.table, self._status_in_parts),
                self._garbage.collect_young,
            ),
            self._is_asked,
        )
        self._stopping = False

    def run(self) -> None:
        """Serve until told to end; raises what the ingest process could not start for."""
        raise_descriptor_limit()
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        previous = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        self._epoll.register(wake, _READ)
        self._accepting.start()
        try:
            self._reporter.start(self._epoll)
            self._reloading.start(self._epoll)
            self._keeper.start(self._epoll)
            if self._page is not None:
                self._page.watch(self._epoll)
                self._page.start()
            if self._ingest is not None:
                self._ingest.watch(self._epoll)
                self._ingest.start()
            self._garbage.take_over()
            self._is_prompt = shorten_slice()
            if not self._is_prompt:
                never_preempt()
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

    def _turn(self, wake: socket.socket) -> None:
        self._pipe_ready = is_served = False
        listener_fd = self._listener.socket.fileno()
        ready = self._epoll.poll(self._patience())
        self._seen_at = time.perf_counter_ns()
        for fd, events in ready:
            connection = self._connections.get(fd)
            if connection is not None:
                is_served = True
                try:
                    self._serve(connection, events)
                except Exception:  # whatever one client brings about, the others are served
                    self._counts["failed"] += 1
                    log.exception("gave up a connection")
                    self._hang_up(connection)
            elif fd == listener_fd:
                self._accept()
            elif self._ingest is not None and self._ingest.has_pipe(fd):
                self._pipe_ready = True
            elif fd == wake.fileno():
                with suppress(BlockingIOError):
                    wake.recv(64)
            else:
                for child in self._children:
                    if child.has_pipe(fd):
                        child.read()
        if is_served:
            self._give_way()
        self._upkeep.go_on(self._seen_at)

    def _is_asked(self) -> bool:
        """Whether there is anything to do that is not more of the stream."""
        self._give_way()  # to whoever is about to ask
        ingest = self._ingest
        return any(ingest is None or not ingest.has_pipe(fd) for fd, _ in self._epoll.poll(0))

    def _give_way(self) -> None:
        """Let run who was woken on this processor meanwhile, by its answer as a rule."""
        if self._is_prompt:
            os.sched_yield()

    def _tick(self) -> None:
        """About once a second the engine is told the time: it reads no clock itself.

        Not the wall's: that of a trainer may be another, and either may be set meanwhile.
        """
        now = time.monotonic()
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            notify(ALIVE)
            self._accepting.resume()
            for child in self._children:
                child.check_pulse()
            if self._page is not None:  # when it is started again, it may be a second late
                self._page.restart_when_due()
            seen = self._last_frame_at()
            if seen is not None and now - seen > TICK_S:
                self._garbage.collect_all()
            self._ticking = self._engine.tick_in_parts(
                time.perf_counter_ns(), SILENCES_PER_TURN
            )
        if self._ticking is not None:
            self._log.set_context(time.perf_counter_ns(), asked=False)
            if next(self._ticking, True):  # the last of its parts
                self._ticking = None

    def _announce(self) -> None:
        """Once, as soon as everything listens."""
        if self._on_ready is not None and (self._ingest is None or self._ingest.listening):
            self._on_ready()
            self._on_ready = None
            notify(READY)

    def _patience(self) -> float:
        """How long to wait for something to do, at most until the next tick."""
        if self._ticking is not None:
            return 0.0
        dues = [
            max(0.0, self._tick_at - time.monotonic()),
            self._reporter.due_in(),
            self._reloading.due_in(),
            self._keeper.due_in_s(),
        ]
        if self._ingest is not None:
            dues.append(0.0 if self._ingest.frames else self._ingest.due_in())
        return min(due for due in dues if due is not None)

    def _accept(self) -> None:
        connection = self._accepting.accept(self._has_room)
        if connection is not None:
            self._connections[connection.fd] = connection
            self._epoll.register(connection.fd, _READ)

    def _has_room(self) -> bool:
        """Whether one more connection can be kept, where need be after an idle one has gone."""
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        idle = idlest(self._connections.values())
        if idle is None:
            return False
        self._counts["gave_up_idle"] += 1
        self._hang_up(idle)
        return True

    def _serve(self, connection: ClientConnection, events: int) -> None:
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
                if not self._replies.reply(connection, message, self._seen_at):
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

    def _flush(self, connection: ClientConnection) -> bool:
        if not connection.flush():
            self._hang_up(connection)
            return False
        if not connection.backlog:
            self._epoll.modify(connection.fd, _READ)
        return True

    def _hang_up(self, connection: ClientConnection) -> None:
        if self._connections.pop(connection.fd, None) is not None:
            self._replies.part(connection)
            self._epoll.unregister(connection.fd)
            connection.close()

    def _work_on_stream(self) -> None:
        """Judge some frames or, when there are none, read a few; see that the process lives.

        What is not read yet fills the pipe, and that is how producers learn to wait.
        """
        ingest = self._ingest
        if ingest is None:
            return
        if frames := ingest.frames:
            looked_at = now = time.perf_counter_ns()
            for _ in range(min(len(frames), FRAMES_PER_TURN)):
                if now - looked_at > SLICE_NS:
                    if self._is_asked():
                        break
                    looked_at = now
                self._judge(frames.popleft(), now)
                now = time.perf_counter_ns()
        elif self._pipe_ready:
            ingest.read()
        if ingest.is_due:
            ingest.restart()
        self._announce()

    def _judge(self, body: bytes, began_at: int) -> None:
        try:
            streamed = frame(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._engine.note_bad_frame()
            return
        self._log.set_context(began_at, asked=False)
        self._engine.observe(streamed, at_ns=began_at)
        self._reporter.record_lag(streamed.time_unix_nano)
        self._last_streamed_at = time.monotonic()
        self._counts["frames_streamed"] += 1
        self._garbage.count_step()

    def _last_frame_at(self) -> float | None:
        """When a frame came last, asked about or streamed."""
        times = [self._replies.last_ask_at, self._last_streamed_at]
        return max((at for at in times if at is not None), default=None)

    def _status_in_parts(self) -> Iterator[dict[str, Any] | None]:
        now_ns = time.perf_counter_ns()
        for overview in self._engine.overview_in_parts(now_ns, RANKS_PER_TURN):
            yield None if overview is None else self._status(overview)

    def _status(self, overview: dict[str, Any] | None = None) -> dict[str, Any]:
        now = time.monotonic()
        seen = self._last_frame_at()
        return {
            "pid": os.getpid(),
            "uptime_s": now - self._started_at,
            "last_frame_age_s": None if seen is None else now - seen,
            "table": self._reloading.status(),
            "state": self._keeper.status(),
            "connections": {"open": len(self._connections), **self._counts},
            "answers": self._replies.counts(),
            "engine": overview or self._engine.overview(time.perf_counter_ns()),
            "ingest": None if self._ingest is None else self._ingest.status(),
            "page": None if self._page is None else self._page.status(),
            **self._reporter.status(),
        }

    def _close(self) -> None:
        notify(STOPPING)
        for connection in list(self._connections.values()):
            self._hang_up(connection)
        self._listener.close()
        self._keeper.close()
        if self._ingest is not None:
            self._ingest.close()
        if self._page is not None:
            self._page.close()
        self._reporter.close()
        self._reloading.close()
        self._epoll.close()


def notify(state: str) -> None:
    """Tell whoever listens at ``$NOTIFY_SOCKET``, as sd_notify(3) does.

    Never waits or raises.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):  # of the abstract name space
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as told:
        told.sendto(state.encode(), address)
