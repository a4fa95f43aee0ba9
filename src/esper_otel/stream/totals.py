"""Totals: sums over a run so far, and the newest decisions about it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from esper_otel.leyline.decisions import FAILED_OPEN, Action
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST = 64
"""Decisions that are remembered."""

PARTS = 64
"""A curve has at least half as many parts once there are as many steps; the parts then become
twice as long whenever all are full."""

_STEP = STEP_SLOT["step"]
_LATENCY = STEP_SLOT["step_latency_ms"]
_LOSS = STEP_SLOT["loss"]
_NONFINITE = STEP_SLOT["nonfinite"]
_LR_SCALE = STEP_SLOT["lr_scale"]
_SKIPPED = STEP_SLOT["update_skipped"]
_UNJUDGED = STEP_SLOT["unjudged_steps"]

_SUMMED = (
    "steps",
    "nonfinite_steps",
    "skipped_updates",
    "scaled_updates",
    "unjudged_steps",
    "held_unjudged_steps",
    "decisions",
    "applied",
    "before_updates",
    "_timed_steps",
    "_sums",
    "_counts",
)


class DecisionMark(NamedTuple):
    """One decision, or notice; ``applied``: it changed something in the run."""

    step: int
    action: str
    severity: str
    reason: str
    applied: bool


class DecisionMarks:
    """The newest of those that :class:`RunTotals` counts."""

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


class LossCurve:
    """The curve of a run's loss: means over equal parts of its steps, in a constant size."""

    def __init__(self) -> None:
        self._steps = 0
        self._width = 1
        """Steps of one part."""
        self._sums = np.zeros(PARTS)
        self._known = np.zeros(PARTS, np.int64)
        self._broken = np.zeros(PARTS, np.int64)

    def extend(self, losses: NDArray[Any], broken: NDArray[Any]) -> None:
        """Take in the losses of the next steps, NaN where there is none; ``broken`` says at
        which steps something was not finite."""
        while self._steps + len(losses) > PARTS * self._width:
            self._halve()
        places = np.arange(self._steps, self._steps + len(losses)) // self._width
        known = np.isfinite(losses)
        with np.errstate(over="ignore"):
            self._sums += np.bincount(places, np.where(known, losses, 0.0), PARTS)
        self._known += np.bincount(places, known, PARTS).astype(np.int64)
        self._broken += np.bincount(places, broken & ~known, PARTS).astype(np.int64)
        self._steps += len(losses)

    def _halve(self) -> None:
        """Have parts twice as long."""
        self._width *= 2
        half = PARTS // 2
        for name in ("_sums", "_known", "_broken"):
            parts = getattr(self, name)
            merged = np.zeros_like(parts)
            with np.errstate(over="ignore"):
                merged[:half] = parts[0::2] + parts[1::2]
            setattr(self, name, merged)

    def means(self, most: int) -> list[float | None]:
        """At most that many means, in order of steps.

        None where no loss is known, NaN where none was finite.
        """
        parts = -(-self._steps // self._width)
        together = max(1, -(-parts // most))
        # Lists, as so few numbers are not worth a call of numpy each.
        sums, counts = self._sums.tolist(), self._known.tolist()
        broken = self._broken.tolist()
        found: list[float | None] = []
        for start in range(0, parts, together):
            part = slice(start, min(start + together, parts))
            known = sum(counts[part])
            if known:
                found.append(sum(sums[part]) / known)
            else:
                found.append(nan if any(broken[part]) else None)
        return found


class RunTotals:
    """Sums of one run, as far as they have been summed up. Read while that is done, they are
    wrong by no more than the steps which are added."""

    def __init__(self) -> None:
        self.runs = 1
        """How many are summed."""
        self.complete = False
        """Whether no step follows."""
        self.steps = 0
        self.first_unix_nano = 0
        self.last_unix_nano = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.losses = LossCurve()
        self.nonfinite_steps = 0
        self.skipped_updates = 0
        self.scaled_updates = 0
        """Updates that were made with learning rates scaled by a decision."""
        self.unjudged_steps = 0
        """Steps at which the newest decision request had not been answered."""
        self.held_unjudged_steps = 0
        """Those of them at which a decision still scaled the learning rates."""
        self.decisions: Counter[tuple[str, str]] = Counter()
        """How often each (action, reason) was decided; CONTINUE without a finding is not
        counted."""
        self.applied: Counter[tuple[str, str]] = Counter()
        """How often it changed something in the run."""
        self.before_updates: Counter[str] = Counter()
        """How often each reason changed an update before it was made."""
        self.unanswered: set[str] = set()
        """Why nobody answered, where nobody did and the step had spans."""
        self.marks = DecisionMarks()
        self._timed_steps = 0
        self._sums = np.zeros(len(STEP_KEYS))
        self._counts = np.zeros(len(STEP_KEYS), np.int64)

    @classmethod
    def sum_of(cls, several: Sequence[RunTotals]) -> RunTotals:
        """Those of several runs, one after the other or in turn; no losses of one are kept."""
        total = cls()
        total.runs = sum(each.runs for each in several)
        total.complete = all(each.complete for each in several)
        some = [each for each in several if each.steps]
        total.first_unix_nano = min((each.first_unix_nano for each in some), default=0)
        total.last_unix_nano = max((each.last_unix_nano for each in some), default=0)
        for each in several:
            for name in _SUMMED:
                setattr(total, name, getattr(total, name) + getattr(each, name))
            total.unanswered |= each.unanswered
        return total

    def add(self, times: NDArray[Any], rows: NDArray[Any]) -> None:
        """Take in ``rows`` (steps × metrics, NaN is absent), at Unix ``times`` (steps)."""
        if not self.steps:
            self.first_unix_nano = int(times[0])
            self.marks.begin(rows)
        self.last_unix_nano = int(times[-1])
        broken = rows[:, _NONFINITE] > 0.0
        self.nonfinite_steps += int(broken.sum())
        skipped = rows[:, _SKIPPED] > 0.0
        scale = rows[:, _LR_SCALE]
        scaled = (scale != 1.0) & (scale == scale)
        self.skipped_updates += int(skipped.sum())
        self.scaled_updates += int((scaled & ~skipped).sum())
        unjudged = rows[:, _UNJUDGED] > 0.0
        self.unjudged_steps += int(unjudged.sum())
        self.held_unjudged_steps += int((unjudged & (rows[:, _LR_SCALE] != 1.0)).sum())
        present = ~np.isnan(rows)
        # Steps whose whole time is known, which the first one's is not: their parts add up.
        timed = present & present[:, [_LATENCY]]
        self._timed_steps += int(timed[:, _LATENCY].sum())
        self._sums += np.where(timed, rows, 0.0).sum(axis=0)
        self._counts += timed.sum(axis=0)
        self.losses.extend(rows[:, _LOSS], broken)
        losses = rows[present[:, _LOSS], _LOSS]
        if len(losses):
            if self.first_loss is None:
                self.first_loss = float(losses[0])
            self.last_loss = float(losses[-1])
        self.steps += len(rows)  # last: whoever sees these steps sees their loss

    def count_decision(self, timeline: StepTimeline) -> None:
        """Take in what was decided about a step, and about its update before that was made."""
        if timeline.update is not None:
            self.before_updates[timeline.update.reason] += 1
        decision = timeline.decision
        if decision is None:
            return
        if decision.reason in FAILED_OPEN:
            self.unanswered.add(decision.reason)
        elif decision.action is not Action.CONTINUE or decision.findings:
            what = decision.action.value, decision.reason
            self.decisions[what] += 1
            self.marks.note(timeline)
            if timeline.applied:
                self.applied[what] += 1

    def per_step(self, key: str) -> float | None:
        """What a step with a latency had of ``key`` on average, None when none had any."""
        if not self._counts[STEP_SLOT[key]]:
            return None
        return float(self._sums[STEP_SLOT[key]]) / self._timed_steps


MOST_TOTALS = 256
"""Trainings whose sums are kept apart. Beyond it those in the middle are added up."""


def shortened(totals: Iterable[tuple[str, RunTotals]]) -> list[tuple[str, RunTotals]]:
    """``totals``, those that are complete added up where there are too many."""
    kept = list(totals)
    if len(kept) <= MOST_TOTALS:
        return kept
    first, others = kept[: MOST_TOTALS // 4], kept[MOST_TOTALS // 4 :]
    complete = [each for _, each in others if each.complete]
    rest = [(name, each) for name, each in others if not each.complete]
    if not complete:
        return kept
    return [*first, ("", RunTotals.sum_of(complete)), *rest]
