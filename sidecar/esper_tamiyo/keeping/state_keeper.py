"""The keeper of state: the decide process's part of surviving a restart.

Between the engine and its observer it hears of every step that was judged. At the end of a
turn, when the answers are out, these go down a pipe to the process that writes them
(:mod:`~esper_tamiyo.keeping.writer`). Every few seconds each rank that has gone on is saved,
one in a turn; a restart judges again only what came after that. Nothing here waits for a disk.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo import release
from esper_tamiyo.child_process import ChildProcess
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.liveness import Key
from esper_tamiyo.judging.observer import EngineObserver, RuleChange
from esper_tamiyo.judging.roster import STATE_BYTES
from esper_tamiyo.judging.saved_state import (
    changes_besides_ranks,
    saved_engine,
)
from esper_tamiyo.keeping.bodies import (
    FORMAT,
    OURS,
    Header,
    StepsBody,
    WriterStatus,
    encode_body,
    writer_status,
)
from esper_tamiyo.keeping.rank_queue import RankQueue
from esper_tamiyo.keeping.restoring import MAX_AGE_S, Restored, restore
from esper_tamiyo.keeping.segments import (
    KEPT_SEGMENTS,
    LOCK_PATIENCE_S,
    EntryKind,
    framed,
    locked,
)
from esper_tamiyo.language.table import Table

log = logging.getLogger("tamiyo")

GATHER_S, GATHERED = 0.02, 64
"""Steps within so long, so many at most, go down the pipe together: what a kill costs."""
ROUND_S = 5.0
"""Between two times that a rank which goes on is saved."""

SEGMENT_BYTES = 8 << 20
"""A segment is no longer than this, or than all ranks take that are saved."""

MAX_RANKS_BYTES = 64 << 20
"""What all ranks may take; beyond it those that were not heard for longest are not saved."""

MAX_BACKLOG = 8 << 20
"""Bytes that wait for a slow writer; beyond it all is dropped, and saved anew later."""

PIPE_BYTES = 1 << 20
FLUSH_AGAIN_S = 0.005
ALIVE_S = 1.0
"""Between two notes that the sidecar is there: the time away is no silence of ranks."""

RETRY_S = 10.0
END_PATIENCE_S = 2.0
CLOSING_S = 0.5  # for saving ranks at the end; what is not saved then is judged again


class StateKeeper(ChildProcess):
    """An observer that passes on what it hears, and keeps the state of the engine in a folder;
    without a folder it keeps nothing."""

    def __init__(
        self,
        folder: Path | None,
        source: str,
        observer: EngineObserver,
        round_s: float = ROUND_S,
    ) -> None:
        """``source`` is the name or file of the table."""
        super().__init__("esper_tamiyo.keeping.writer", END_PATIENCE_S, "state writer")
        self.restored = Restored()
        self._folder = folder
        self._source = source
        self._observer = observer
        self._hears = False
        self._lock: int | None = None
        self._error = ""
        self._engine: Engine | None = None
        self._table: Table | None = None
        self._besides: object = None
        self._frames: list[StepFrame] = []
        self._write_at = 0.0
        self._alive_at = 0.0
        self._changed: dict[Key, None] = {}
        self._due = RankQueue()
        self._round_s = round_s
        self._round_at = 0.0
        self._outgoing = bytearray()
        self._segment_bytes = self._ranks_bytes = 0
        self._is_settled = True
        self._is_torn = False
        """Whether something is missing in the segment, so that another has to begin."""
        self._retry_at = 0.0
        self._lost = 0
        self._told = WriterStatus()
        self._logged_error = ""

    def on_rule_change(self, change: RuleChange) -> None:
        """A rule's state changed."""
        if self._hears:
            self._changed[change.run, change.rank] = None
            self._observer.on_rule_change(change)

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """A frame was judged."""
        if self._hears:
            self._frames.append(frame)
            self._observer.on_frame(frame, decision)

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        """A decision became the newest of its rank."""
        if self._hears:
            self._observer.on_decision(decision, frame)

    def on_end(self, ending: StepFrame) -> None:
        """A rank has said that its run is over."""
        if self._hears:
            self._frames.append(ending)
            self._observer.on_end(ending)

    # At the start.

    def open(self, table: Table, state_bytes: int = STATE_BYTES) -> Engine:
        """An engine that goes on where the one before it ended; never raises.

        Waits a little for a writer that has not ended yet.
        """
        engine = None
        if self._folder is not None:
            self._take_lock(self._folder)
            if self._lock is not None:
                engine, self.restored = restore(self._folder, table, self, state_bytes)
        self._engine = engine or Engine(table, state_bytes, self)
        self._hears = True
        return self._engine

    def start(self, epoll: select.epoll) -> None:
        """Keep state from now on; ``epoll`` tells how the writer stands. Never raises."""
        self.watch(epoll)
        if self._lock is not None:
            self._start()

    def keep(self) -> None:
        """Write down what was judged in this turn, and save a rank where one is due."""
        engine = self._engine
        if self._lock is None or engine is None:
            self._frames.clear()
            return
        now = time.monotonic()
        if self.pipe is None:
            if self.is_due:
                self._start()
            else:
                self._frames.clear()
                return
        if self._is_torn:
            self._frames.clear()
            if not self._outgoing and now >= self._retry_at:
                self._begin_segment(engine)
        elif (
            not self._frames  # then what has happened besides steps is written at once
            or (now >= self._write_at or len(self._frames) >= GATHERED)
            or (self._due and now >= self._due.at)
            or engine.table is not self._table
        ):
            self._write_at = now + GATHER_S if self._frames else now
            self._note(engine)
            self._save_next(engine, now)
            if now >= self._alive_at:
                self._alive_at = now + ALIVE_S
                self._put(EntryKind.ALIVE, str(time.time_ns()).encode())
        if self._outgoing:
            self._flush()

    def keep_order(self) -> None:
        """Hand to the writer what somebody has ordered, before it is confirmed, so that it
        outlives this process as far as state is kept."""
        if self._engine is not None and self.pipe is not None and not self._is_torn:
            self._note(self._engine)
            self._flush()

    def due_in_s(self) -> float | None:
        """Seconds until :meth:`keep` has something to do that no frame brings about."""
        if self._lock is None:
            return None
        if self.pipe is None:
            return self.due_in()
        if self._outgoing:
            return FLUSH_AGAIN_S
        if self._is_torn:
            return max(0.0, self._retry_at - time.monotonic())
        dues = [self._write_at] if self._frames else []
        if self._due or self._changed:
            dues.append(self._due.at if self._due else self._round_at)
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def read(self) -> None:
        """The writer has said how it stands, or is gone."""
        for line in self._receive_lines():
            with suppress(msgspec.MsgspecError):
                self._told = writer_status(line)
                self.pulse.heard()
                self._take_in(self._told.error)

    def reap(self) -> None:
        """The writer is gone, or given up: plan the next one."""
        log.warning("state is not kept: its writer ended; again in %g s", self._reap())

    def close(self) -> None:
        """Save the ranks that have gone on, and let the writer end."""
        engine, until = self._engine, time.monotonic() + CLOSING_S
        if self.pipe is not None and engine is not None and not self._is_torn:
            self._note(engine)
            self._due.enqueue(self._changed)
            self._changed.clear()
            while self._due and time.monotonic() < until:
                self._save_one(engine)
            with suppress(OSError):
                self.pipe.settimeout(END_PATIENCE_S)
                self.pipe.sendall(self._outgoing)
        super().close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def status(self) -> dict[str, Any]:
        """How state is kept, and what was restored; empty where none is kept.

        ``written_at`` is Unix time, ``bytes`` what was written since the writer started.
        ``waiting`` steps are not handed over yet, ``lost`` counts the times that they could
        not be; for ``left_out`` ranks there was no room.
        """
        if self._folder is None:
            return {}
        error = self._error or self._told.error
        if not error and self._lock is not None and self.pipe is None:
            error = "its writer is being started again"
        return {
            "folder": str(self._folder),
            "error": error,
            "written_at": self._told.at / 1e9 or None,
            "bytes": self._told.written,
            "waiting": len(self._frames),
            "lost": self._lost,
            "left_out": self._due.left_out,
            "restarts": self.restarts,
            "hung": self.hung,
            "restored": msgspec.structs.asdict(self.restored),
        }

    def _take_lock(self, folder: Path) -> None:
        try:
            self._lock = locked(folder, LOCK_PATIENCE_S)
        except OSError as error:
            self._error = f"{folder}: {(error.strerror or str(error)).lower()}"
            log.warning("state is not kept: %s; a restart forgets it", self._error)

    def _start(self) -> None:
        assert self._folder is not None
        assert self._lock is not None
        try:
            pipe = self._launch([str(self._folder), str(self._lock)], [self._lock])
            pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIPE_BYTES)
        except OSError as error:
            log.warning("state is not kept: its writer cannot be started: %s", error)
            self._reap()
            return
        self._outgoing.clear()
        self._told = WriterStatus()
        if self._engine is not None:
            self._frames.clear()
            self._begin_segment(self._engine)

    def _take_in(self, error: str) -> None:
        """The writer cannot write, or can again: the latter only shows with a new segment."""
        if error and not self._is_torn:
            self._is_torn, self._retry_at = True, time.monotonic() + RETRY_S
            self._due.clear()
        if error and error != self._logged_error:
            log.warning("state is not kept: %s; decisions continue without it", error)
        elif self._logged_error and not error:
            log.warning("state is kept again")
        self._logged_error = error

    def _begin_segment(self, engine: Engine) -> None:
        """Begin another file, and save all ranks into it, as many as there is room for."""
        self._is_torn, self._is_settled = False, False
        self._segment_bytes = self._ranks_bytes = 0
        self._table = engine.table
        head = Header(OURS, FORMAT, release(), self._source, engine.table)
        self._put(EntryKind.HEADER, encode_body(head))
        self._put_engine(engine)
        since_ns = time.perf_counter_ns() - int(MAX_AGE_S * 1e9)
        self._due.start_over(engine, since_ns)
        self._changed.clear()

    def _note(self, engine: Engine) -> None:
        """What has happened in this turn."""
        frames = self._frames
        if frames:
            self._put(EntryKind.STEPS, encode_body(StepsBody(time.time_ns(), frames)))
            for frame in frames:
                self._changed[frame.run, frame.rank] = None
            frames.clear()
        if engine.table is not self._table:
            self._table = engine.table
            self._put(EntryKind.TABLE, encode_body(engine.table))
        if changes_besides_ranks(engine) != self._besides:
            self._put_engine(engine)

    def _put_engine(self, engine: Engine) -> None:
        self._besides = changes_besides_ranks(engine)
        self._put(EntryKind.ENGINE, encode_body(saved_engine(engine)))

    def _save_next(self, engine: Engine, now: float) -> None:
        """Save the rank whose turn it is; begin a round, or a segment, when it is time."""
        if self._due:
            if now >= self._due.at:
                self._save_one(engine)
            return
        if not self._is_settled:
            self._is_settled = True
            self._put(EntryKind.SETTLED, KEPT_SEGMENTS)
        if self._segment_bytes > max(SEGMENT_BYTES, 2 * self._ranks_bytes):
            self._begin_segment(engine)
        elif now >= self._round_at and self._changed:
            self._round_at = now + self._round_s
            self._due.enqueue(self._changed)
            self._changed.clear()

    def _save_one(self, engine: Engine) -> None:
        if not self._is_settled and self._ranks_bytes > MAX_RANKS_BYTES:
            self._due.leave_out()
            return
        body = self._due.pop(engine)
        if body is None:
            return
        if not self._is_settled:
            self._ranks_bytes += len(body)
        self._put(EntryKind.RANK, body)

    def _put(self, kind: EntryKind, body: bytes) -> None:
        if self._is_torn:
            return
        if len(self._outgoing) + len(body) > max(MAX_BACKLOG, 2 * len(body)):
            self._is_torn = True
            self._lost += 1
            self._due.clear()
            return
        entry = framed(kind, body)
        self._segment_bytes += len(entry)
        self._outgoing += entry

    def _flush(self) -> None:
        outgoing = self._outgoing
        if outgoing and self.pipe is not None:
            try:
                del outgoing[: self.pipe.send(outgoing)]
            except BlockingIOError:
                return
            except OSError:  # gone: the loop will hear of it
                outgoing.clear()
