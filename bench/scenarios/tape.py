"""Tape: what a sidecar would have heard of a training, at the moment it would have.

It stands where the client stands that asks a sidecar: it is handed each step's row, the
rows of the seeds and the proposal, and gives the answer that nobody gave. So what is on
it is what an ask carries, and what the stream carries of the same step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from esper_otel.leyline.decisions import NOT_ASKED, Decision, Proposal, unanswered
from esper_otel.run import Run


class Heard(NamedTuple):
    """One ask."""

    step: int
    time_unix_nano: int
    row: list[float]
    seeds: Sequence[tuple[str, list[float]]]
    proposal: Proposal | None


class Tape:
    """Everything asked about by one rank; ``name`` is that of the run.

    ``delay_s`` (settable) is how long an answer takes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[Heard] = []
        self.delay_s = 0.0

    def attach(self, run: Run) -> None:
        """Take the place of the client of ``run``."""
        # A client needs a socket and a server; what is recorded is the same without.
        run.recorder._client = self

    def ask(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
    ) -> Decision:
        """Hear it."""
        self.heard.append(Heard(step, time_unix_nano, row, seeds, proposal))
        if self.delay_s:
            time.sleep(self.delay_s)
        return unanswered(self.name, step, NOT_ASKED)
