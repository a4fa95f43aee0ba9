"""The reporter: the decide process's part of keeping records, outside the answering path.

It puts the decision log, the journal writer and a heartbeat once a second together, so that
the server has one thing to call at the end of each turn.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

from esper_tamiyo.journaling.decision_log import DecisionLog
from esper_tamiyo.journaling.entries import AnyEntry, Gap, table_entry
from esper_tamiyo.journaling.field_reports import DueReport
from esper_tamiyo.journaling.journal_writer_child import JournalWriterChild
from esper_tamiyo.journaling.messages import (
    ANSWER_MS,
    LAG_MS,
    Heartbeat,
    Histogram,
    Message,
)
from esper_tamiyo.language.table import Table

log = logging.getLogger("tamiyo")

StatusInParts = Callable[[], Iterator[dict[str, Any] | None]]
"""Gathers how things are: None for each part of the work that one turn has time for, and what
came of it last."""

MAX_FAILURES_TOLD = 16
"""Kinds of failure that are said, each of them once."""

HEARTBEAT_S = 0.95
"""A little less than the tick that wakes the loop, or every other one would pass by."""
WRITTEN_PER_TURN = 32
"""Things of the decision log that are written between two looks for asks: about 0.2 ms."""
GATHER_S = 0.02
"""Time in which things of the decision log gather before they are written, unless nothing was
written for as long: a journal writer that wakes at each ask takes the processor, and the
caches, from the next one."""


class Reporter:
    """Keeps the record of one decide process."""

    def __init__(
        self, writer: JournalWriterChild | None, trace_every: int = 0, table_source: str = ""
    ) -> None:
        """``writer`` None: nothing is written, only counted. ``table_source`` is the name or
        file of the table."""
        self.decision_log = DecisionLog(trace_every)
        self._answers = Histogram(ANSWER_MS)
        self._lag = Histogram(LAG_MS)
        self.writer = writer
        """The journal writer, None where there is none."""
        self._table_source = table_source
        self._began_unix_nano = time.time_ns()
        self._beat = 0
        self._heartbeat_at = 0.0
        self._write_at = 0.0
        """When things of the decision log are written next."""
        self._gathering: Iterator[dict[str, Any] | None] | None = None
        """How things are, while that is gathered for a heartbeat."""
        self._table: Table | None = None
        self._accounted = 0
        self._failed = 0
        self._failures: set[str] = set()
        """Kinds of failure that have been said."""

    def start(self, epoll: select.epoll) -> None:
        """Start the journal writer; ``epoll`` tells when it has something to say."""
        if self.writer is not None:
            self.writer.watch(epoll)
            self.writer.start()

    def record_answer(self, seen_at: int) -> None:
        """An ask that was seen at a mark of ``perf_counter_ns`` has been answered."""
        self._answers.add((time.perf_counter_ns() - seen_at) / 1e6)

    def record_lag(self, time_unix_nano: int) -> None:
        """A streamed step that ended at ``time_unix_nano`` has been evaluated."""
        self._lag.add(max(0, time.time_ns() - time_unix_nano) / 1e6)

    def due_in(self) -> float | None:
        """Seconds until there is something to write down; None: not before the heartbeat.

        The heartbeat goes with the server's tick.
        """
        if self._gathering is not None:
            return 0.0
        dues = [] if self.writer is None else [self.writer.due_in()]
        if self.decision_log.waiting:
            now_s = time.monotonic()
            dues.append(0.0 if self._is_due(now_s) else self._write_at - now_s)
        return min((due for due in dues if due is not None), default=None)

    def write_down(self, table: Table, status: StatusInParts) -> None:
        """Write down some of what was heard; once a second say how things are.

        Never raises: what cannot be written down is counted, and said once for each kind.
        """
        try:
            self._write_down(table, status)
        except Exception as error:
            self._gathering = None
            self._note_failure(error)

    def _write_down(self, table: Table, status: StatusInParts) -> None:
        now_s = time.monotonic()
        log = self.decision_log
        entries = self._entries(now_s)
        writer = self.writer
        if writer is None:
            return
        if writer.is_due:
            writer.start()
            self._table = None  # whoever writes now has to be told
        if table is not self._table and writer.pipe is not None:
            entry = table_entry(table, self._table_source)
            self._table = table if writer.send([entry]) else None
        if entries:
            self._send(writer, [*entries])
        if now_s >= self._heartbeat_at:
            self._heartbeat_at = now_s + HEARTBEAT_S
            self._gathering = status()
        if self._gathering is not None:
            whole = next(self._gathering)
            if whole is not None:
                self._gathering = None
                self._send_gap(writer)
                self._send(writer, [*log.expire(now_s), self._heartbeat(whole)])

    def _is_due(self, now_s: float) -> bool:
        return now_s >= self._write_at or self.decision_log.waiting >= WRITTEN_PER_TURN

    def _entries(self, now_s: float) -> list[AnyEntry | DueReport]:
        """Some of what the decision log heard, once that is worth a message."""
        log = self.decision_log
        if not log.waiting or not self._is_due(now_s):
            return []
        entries = log.make_entries(WRITTEN_PER_TURN, now_s)
        if not log.waiting:  # what is left over goes in the next turns
            self._write_at = now_s + GATHER_S
        return entries

    def close(self) -> None:
        """Write down the rest and let the journal writer end."""
        writer = self.writer
        if writer is not None:
            self._send(writer, [*self.decision_log.close()])
            self._send_gap(writer)
            writer.close()

    def status(self) -> dict[str, Any]:
        """Its part of ``tamiyo status``: what was decided, and how fast."""
        decisions = self.decision_log.decisions
        return {
            "decisions": [
                {"action": action, "severity": severity, "rule": rule, "count": count}
                for (action, severity, rule), count in sorted(decisions.items())
            ],
            "answer_ms": _summary(self._answers),
            "ingest_lag_ms": _summary(self._lag),
            "checks": dict(self.decision_log.checks),
            "ends": dict(self.decision_log.ends),
            "missed_steps": self.decision_log.missed,
            "recording_failed": self._failed,
            "scribe": self._writer_status(),
        }

    def _writer_status(self) -> dict[str, Any] | None:
        if self.writer is None:
            return None
        return {
            **self.writer.status(),
            "notes_waiting": self.decision_log.waiting,
            "field_reports_pending": self.decision_log.reports_pending,
        }

    def _send(self, writer: JournalWriterChild, messages: list[Message]) -> None:
        """Hand messages over; one that no message can carry is that one's failure."""
        try:
            writer.send(messages)
        except Exception as error:
            if len(messages) > 1:
                for message in messages:
                    self._send(writer, [message])
            else:
                self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        self._failed += 1
        kind = f"{type(error).__name__}: {error}"[:100]
        if kind not in self._failures and len(self._failures) < MAX_FAILURES_TOLD:
            self._failures.add(kind)
            log.error("an entry could not be recorded: %s", kind, exc_info=error)

    def _send_gap(self, writer: JournalWriterChild) -> None:
        """What was lost since this was last said, to be said where it is missing."""
        lost = writer.lost + self.decision_log.dropped + self._failed - self._accounted
        gap = Gap(
            time_unix_nano=time.time_ns(),
            lost=lost,
            because="an upper bound: the journal writer ended, restarted or did not keep up",
        )
        if lost and writer.send([gap]):
            self._accounted += lost

    def _heartbeat(self, status: dict[str, Any]) -> Heartbeat:
        self._beat += 1
        return Heartbeat(
            beat=self._beat,
            began_unix_nano=self._began_unix_nano,
            report=status,
            distributions={
                "answers": self._answers.snapshot(),
                "lag": self._lag.snapshot(),
            },
        )


def _summary(values: Histogram) -> dict[str, float | None]:
    """Bounds that half, and 99 of 100, of the values do not exceed."""
    return {"p50_at_most": values.at_most(0.5), "p99_at_most": values.at_most(0.99)}
