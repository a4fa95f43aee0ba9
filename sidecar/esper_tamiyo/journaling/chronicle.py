"""The chronicle: the decide process's part of keeping a record.

It puts the notebook, the scribe process and a pulse once a second together, so that the
server has one thing to call at the end of each turn, when nobody waits for an answer.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

from esper_tamiyo.journaling.distributions import ANSWER_MS, LAG_MS, Histogram
from esper_tamiyo.journaling.entries import Gap
from esper_tamiyo.journaling.notebook import Notebook, table_entry
from esper_tamiyo.journaling.notes import Pulse
from esper_tamiyo.journaling.scribe_child import ScribeChild
from esper_tamiyo.language.table import Table

PULSE_S = 0.95
"""A little less than the tick that wakes the loop, or every other one would pass by."""
NOTES_PER_TURN = 32
"""Things of the notebook that are written between two looks for asks: about 0.2 ms."""


class Chronicle:
    """Keeps the record of one decide process."""

    def __init__(self, scribe: ScribeChild | None, trace_every: int = 0) -> None:
        """``scribe`` None: nothing is written, only counted."""
        self.notebook = Notebook(trace_every)
        self._answers = Histogram(ANSWER_MS)
        self._lag = Histogram(LAG_MS)
        self._scribe = scribe
        self._epoll: select.epoll | None = None
        self._fd = -1
        self._began_unix_nano = time.time_ns()
        self._beat = 0
        self._pulse_at = 0.0
        self._table: Table | None = None
        self._accounted = 0

    def start(self, epoll: select.epoll) -> None:
        """Start the scribe; ``epoll`` tells when it has something to say."""
        if self._scribe is not None:
            self._epoll = epoll
            self._start(self._scribe)

    def owns(self, fd: int) -> bool:
        """Whether an event of ``fd`` is for :meth:`hear`."""
        return fd == self._fd

    def hear(self) -> None:
        """The scribe has said something, or is gone."""
        if self._scribe is not None and not self._scribe.read():
            self._unwatch()
            self._scribe.bury()

    def answered(self, seen_at: int) -> None:
        """An ask that was seen at a mark of ``perf_counter_ns`` has been answered."""
        self._answers.add((time.perf_counter_ns() - seen_at) / 1e6)

    def judged(self, time_unix_nano: int) -> None:
        """A streamed step that ended at ``time_unix_nano`` has been evaluated."""
        self._lag.add(max(0, time.time_ns() - time_unix_nano) / 1e6)

    def patience(self) -> float | None:
        """Seconds until :meth:`tend` has something to do; None: no sooner than the pulse.

        The pulse goes with the server's tick.
        """
        if self.notebook.waiting:
            return 0.0
        return None if self._scribe is None else self._scribe.due_in()

    def tend(self, table: Table, report: Callable[[], dict[str, Any]]) -> None:
        """Write down some of what was heard; once a second say how things are."""
        now_s = time.monotonic()
        entries = self.notebook.write(NOTES_PER_TURN, now_s) if self.notebook.waiting else []
        scribe = self._scribe
        if scribe is None:
            return
        if scribe.due_in() == 0.0:
            self._start(scribe)
        if table is not self._table and scribe.socket is not None:
            self._table = table if scribe.tell([table_entry(table)]) else None
        if entries:
            scribe.tell([*entries])
        if now_s >= self._pulse_at:
            self._pulse_at = now_s + PULSE_S
            self._tell_gap(scribe)
            scribe.tell([*self.notebook.quiet(now_s), self._pulse(report())])

    def close(self) -> None:
        """Write down the rest and let the scribe end."""
        scribe = self._scribe
        if scribe is not None:
            scribe.tell([*self.notebook.close()])
            self._tell_gap(scribe)
            self._unwatch()
            scribe.close()

    def counts(self) -> dict[str, Any]:
        """Its part of ``tamiyo status``: what was decided, and how fast."""
        decisions = self.notebook.decisions
        return {
            "decisions": [
                {"action": action, "severity": severity, "rule": rule, "count": count}
                for (action, severity, rule), count in sorted(decisions.items())
            ],
            "answer_ms": _summary(self._answers),
            "ingest_lag_ms": _summary(self._lag),
            "checks": dict(self.notebook.checks),
            "missed_steps": self.notebook.missed,
            "scribe": self._scribe_report(),
        }

    def _scribe_report(self) -> dict[str, Any] | None:
        if self._scribe is None:
            return None
        return {
            **self._scribe.report(),
            "notes_waiting": self.notebook.waiting,
            "field_reports_pending": self.notebook.reports_pending,
        }

    def _start(self, scribe: ScribeChild) -> None:
        scribe.start()
        self._table = None  # whoever writes now has to be told
        if scribe.socket is not None and self._epoll is not None:
            self._fd = scribe.socket.fileno()
            self._epoll.register(self._fd, select.EPOLLIN)

    def _unwatch(self) -> None:
        if self._fd >= 0 and self._epoll is not None:
            self._epoll.unregister(self._fd)
        self._fd = -1

    def _tell_gap(self, scribe: ScribeChild) -> None:
        """What was lost since this was last said, to be said where it is missing."""
        lost = scribe.lost + self.notebook.dropped - self._accounted
        gap = Gap(
            time_unix_nano=time.time_ns(),
            lost=lost,
            because="at most so many: the scribe ended, was away or did not keep up",
        )
        if lost and scribe.tell([gap]):
            self._accounted += lost

    def _pulse(self, report: dict[str, Any]) -> Pulse:
        self._beat += 1
        return Pulse(
            beat=self._beat,
            began_unix_nano=self._began_unix_nano,
            report=report,
            distributions={
                "answers": self._answers.as_it_stands(),
                "lag": self._lag.as_it_stands(),
            },
        )


def _summary(values: Histogram) -> dict[str, float | None]:
    """Bounds that half, and 99 of 100, of the values do not exceed."""
    return {"p50_at_most": values.at_most(0.5), "p99_at_most": values.at_most(0.99)}
