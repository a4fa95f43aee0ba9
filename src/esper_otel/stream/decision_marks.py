"""Decision marks: the newest decisions about a run, one by one, and how far along they were."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_SLOT

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST = 64
"""Decisions that are remembered."""

_STEP = STEP_SLOT["step"]


class DecisionMark(NamedTuple):
    """One decision, or notice; ``applied``: it changed something in the run."""

    step: int
    action: str
    severity: str
    reason: str
    applied: bool


class DecisionMarks:
    """The newest of those that :class:`~esper_otel.stream.totals.RunTotals` counts."""

    def __init__(self) -> None:
        self.newest: deque[DecisionMark] = deque(maxlen=MOST)
        self._first: int | None = None

    def begin(self, rows: NDArray[Any]) -> None:
        """Steps of the run: the first of the first ones is where it began."""
        if self._first is None:
            self._first = int(np.nan_to_num(rows[0, _STEP]))

    def note(self, timeline: StepTimeline) -> None:
        """Remember what was decided about a step."""
        decision = timeline.decision
        if decision is not None:
            what = decision.action.value, decision.severity.value, decision.reason
            self.newest.append(DecisionMark(timeline.step, *what, timeline.applied))

    def share_of(self, mark: DecisionMark, steps: int) -> float:
        """How far along so many steps it was, from 0 to 1."""
        share = (mark.step - (self._first or 0)) / max(steps - 1, 1)
        return min(max(share, 0.0), 1.0)
