"""Tape: what a sidecar would have heard of a training, at the moment it would have.

It stands where the client stands that asks a sidecar: it is handed each step's row, the
rows of the seeds and the proposal, and gives the answer that nobody gave. So what is on
it is what a decision request carries, and what the stream carries of the same step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from esper_otel.leyline.decisions import NOT_ASKED, Decision, Proposal, unanswered
from esper_otel.leyline.frames import NO_CUSTOM
from esper_otel.leyline.guards import Guards
from esper_otel.run import Run


class Heard(NamedTuple):
    """One request."""

    step: int
    time_unix_nano: int
    row: list[float]
    seeds: Sequence[tuple[str, list[float]]]
    proposal: Proposal | None


class Tape:
    """Everything asked about by one rank; ``name`` is that of the run.

    ``delay_s`` (settable) is how long after its request an answer comes.
    """

    guards: Guards | None = None
    """No update is checked before it is made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[Heard] = []
        self.delay_s = 0.0
        self._under_way: tuple[int, float] | None = None
        """The step that was asked about last, and when the answer comes (monotonic)."""

    def attach(self, run: Run) -> None:
        """Take the place of the client of ``run``, which has none."""
        # A client needs a socket and a server; what is recorded is the same without.
        run._recorder.set_client(self)

    def send(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Hear it, but for custom values."""
        self.heard.append(Heard(step, time_unix_nano, row, seeds, proposal))
        self._under_way = step, time.perf_counter() + self.delay_s

    def collect(self) -> Decision | None:
        """The answer, once it has come; None when it has been collected."""
        if self._under_way is None:
            return None
        (step, comes_at), self._under_way = self._under_way, None
        if self.delay_s:
            time.sleep(max(0.0, comes_at - time.perf_counter()))
        return unanswered(self.name, step, NOT_ASKED)

    def check(
        self, step: int, time_unix_nano: int, row: list[float], waited_ns: int = 0
    ) -> Decision:
        """The update is made as it is: it was never held against a guard."""
        return unanswered(self.name, step, NOT_ASKED)
