"""An engine whose state is kept in files, within one process: a restart without a process."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from esper_otel.leyline.decisions import Decision, Proposal
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.observer import EngineObserver, RuleChange
from esper_tamiyo.keeping.restoring import Restored
from esper_tamiyo.keeping.state_keeper import StateKeeper
from esper_tamiyo.keeping.writer import SegmentWriter
from esper_tamiyo.language.table import Table

READ_BYTES = 1 << 20


class Observed:
    """An observer that remembers all that it is told."""

    def __init__(self) -> None:
        self.changes: list[RuleChange] = []
        self.decisions: list[Decision] = []

    def on_rule_change(self, change: RuleChange) -> None:
        """A rule's state changed."""
        self.changes.append(change)

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """Comes once more to :meth:`on_decision`."""

    def on_end(self, frame: StepFrame) -> None:
        """Not of interest."""

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        """A decision became the newest of its rank."""
        self.decisions.append(decision)


class _KeeperHere(StateKeeper):
    """A keeper whose writer writes when it is told to."""

    def __init__(self, folder: Path, observer: EngineObserver, round_s: float) -> None:
        super().__init__(folder, "a table", observer, round_s)
        self._writer = SegmentWriter(folder)
        self._theirs: socket.socket | None = None

    def start_here(self) -> None:
        """Keep state from now on."""
        self._start()

    def turn(self) -> None:
        """The end of a turn, at which nothing waits for more."""
        self._write_at = self._retry_at = 0.0
        self.keep()

    def write_out(self) -> None:
        """Have in files all that was kept."""
        assert self._theirs is not None
        while True:
            self._flush()
            try:
                self._writer.feed(self._theirs.recv(READ_BYTES))
            except BlockingIOError:
                if not self._outgoing:
                    return

    def kill(self) -> None:
        """End without a word: what went down the pipe is written, and no more."""
        assert self.pipe is not None
        assert self._theirs is not None
        self.write_out()
        self.pipe.close()
        self._theirs.close()
        self.pipe = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _launch(
        self,
        arguments: Sequence[str],
        inherited: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> socket.socket:
        ours, self._theirs = socket.socketpair()
        for end in (ours, self._theirs):
            end.setblocking(False)
        self.pipe = ours
        return ours


class KeptEngine:
    """An engine that goes on where the state in a folder ends, and keeps it there."""

    def __init__(
        self,
        folder: Path,
        table: Table,
        observer: EngineObserver | None = None,
        round_s: float = 0.0,
    ) -> None:
        self._keeper = _KeeperHere(folder, observer or Observed(), round_s)
        self.engine = self._keeper.open(table)
        self._keeper.start_here()

    @property
    def restored(self) -> Restored:
        """What became of the state that was found."""
        return self._keeper.restored

    def judge(self, frame: StepFrame, proposal: Proposal | None = None) -> Decision:
        """The decision about a frame, and then what a server does at the end of a turn."""
        decision = self.engine.observe(frame, proposal, perf_counter_ns())
        self.turn()
        return decision

    def turn(self, *, write_out: bool = True) -> None:
        """What a server does at the end of a turn; and what the writer does then."""
        self._keeper.turn()
        if write_out:
            self._keeper.write_out()

    def keep_order(self) -> None:
        """What a server does before it confirms an order."""
        self._keeper.keep_order()

    def status(self) -> dict[str, Any]:
        """How state is kept."""
        return self._keeper.status()

    def kill(self) -> None:
        """End as by SIGKILL."""
        self._keeper.kill()
