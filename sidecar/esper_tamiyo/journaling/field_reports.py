"""Outcome reports (field reports): the run's course after a decision, collected over a window.

Followed are decisions and notices: steps that go on as they are, with a finding. Three samples
are taken of the loss, its volatility and the step time: over the :data:`WINDOW` steps up to
the decision, at the step that was decided about, and over the :data:`WINDOW` steps behind it.
What they say is for :mod:`~esper_tamiyo.journaling.outcomes`, in another process.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice, takewhile
from typing import NamedTuple

import msgspec

from esper_otel.leyline.decisions import (
    CLEAR_GRADIENTS,
    MAX_NORM,
    MOMENTUM_SCALE,
    RANK_OF,
    Action,
    Decision,
    Finding,
)
from esper_otel.leyline.frames import StepFrame

WINDOW = 32
"""Steps looked at on either side of a decision."""

_UNSEEN = frozenset({CLEAR_GRADIENTS, MAX_NORM, MOMENTUM_SCALE})
"""Parameters of which the watched steps do not show whether they were applied."""

WATCHED = ("loss", "loss_volatility", "step_latency_ms")
"""Metrics a report is about; of each, less is better."""

MAX_RANKS = 1024
"""Ranks whose last steps are kept; beyond it the one not heard of for longest goes."""

MAX_CHECKED = 32
"""Updates of one rank whose step has not been seen; beyond it the oldest has no report."""

GIVEN_UP_AT_ONCE = 4
"""Ranks that are given up in one call, about once a second: a millisecond's work."""

QUIET_S = 60.0
QUIET_STEPS = 20.0
"""A rank that said nothing for so long, and for so many of its steps, has ended."""


class StepSample(NamedTuple):
    """What a report needs of one step; ``values`` are those of :data:`WATCHED`.

    ``lr_scale`` and ``skipped`` say what its update was made with, None where it did not.
    """

    step: int
    values: tuple[float | None, float | None, float | None]
    nonfinite: float
    lr_scale: float | None = None
    skipped: bool | None = None


class DueReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="due"):
    """All that a report is made of, by :mod:`~esper_tamiyo.journaling.outcomes`.

    ``ended`` says why no more steps will be seen, "" when all have been. ``rule`` is the one
    that decided, or the most severe of a notice, and ``saw`` what it saw. ``unseen``: the
    decision may have done something that no step tells of, to seeds or by clipping.
    """

    time_unix_nano: int
    decision: str
    run: str
    rank: int
    step: int
    action: Action
    reason: str
    mode: str
    ended: str
    before: list[StepSample]
    during: StepSample
    after: list[StepSample]
    update: bool = False
    rule: str = ""
    saw: dict[str, float] = {}
    unseen: bool = False


class _Pending(NamedTuple):
    """A decision whose report is due; ``update``: about an update that was not made yet.

    ``seeds``: there were some that it may have held back.
    """

    decision: Decision
    rank: int
    mode: str
    during: StepSample
    update: bool = False
    seeds: bool = False


class _RankWindow:
    """The last steps of one rank, and the decisions that wait for more of them.

    Both are in the order of their steps; what came before a decision and what came after
    it is only looked up when its report is due. ``checked`` are decisions about updates of
    steps that have not been seen yet.
    """

    __slots__ = ("checked", "heard_s", "instance", "pending", "samples", "time_unix_nano")

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.samples: deque[StepSample] = deque(maxlen=2 * WINDOW + 1)
        self.pending: deque[_Pending] = deque()
        self.checked: deque[_Pending] = deque(maxlen=MAX_CHECKED)
        self.heard_s = 0.0
        self.time_unix_nano = 0

    def __len__(self) -> int:
        """Decisions that wait."""
        return len(self.pending) + len(self.checked)


class FieldReports:
    """Follows decisions until their reports are due.

    Fed with every judged frame and every decision, in their order; a CONTINUE without a
    finding has no report. What falls due is handed on to be made into a report elsewhere:
    medians are not for the thread that answers. Reads no clock: ``now_s`` is handed in, in
    seconds of any one monotonic clock.
    """

    def __init__(self) -> None:
        self._ranks: OrderedDict[tuple[str, int], _RankWindow] = OrderedDict()
        self._waiting: OrderedDict[tuple[str, int], _RankWindow] = OrderedDict()
        """Those with a decision that waits, in the same order."""
        self.pending = 0
        """Decisions whose report is due."""

    def add_frame(self, frame: StepFrame, now_s: float) -> list[DueReport]:
        """A step was seen: the reports that it completes."""
        key = (frame.run, frame.rank)
        past = self._ranks.get(key)
        reports: list[DueReport] = []
        if past is None or (frame.instance and past.instance != frame.instance):
            reports = self._give_up(key, "the process was replaced by another")
            past = self._ranks[key] = _RankWindow(frame.instance)
            if len(self._ranks) > MAX_RANKS:
                oldest = next(iter(self._ranks))
                reports += self._give_up(oldest, "the run was forgotten")
                del self._ranks[oldest]
        self._ranks.move_to_end(key)
        past.heard_s = now_s
        past.time_unix_nano = frame.time_unix_nano
        sample = _sample(frame)
        past.samples.append(sample)
        if not (past.pending or past.checked):  # as nearly always
            return reports
        before = len(past)
        while past.checked and past.checked[0].decision.step <= frame.step:
            known = past.checked.popleft()
            is_it = known.decision.step == frame.step
            past.pending.append(known._replace(during=sample) if is_it else known)
        while past.pending and frame.step >= past.pending[0].decision.step + WINDOW:
            reports.append(_due(past, past.pending.popleft()))
        self._count(key, past, before)
        if key in self._waiting:
            self._waiting.move_to_end(key)
        return reports

    def add_decision(self, decision: Decision, frame: StepFrame, mode: str) -> None:
        """A decision was made about ``frame``; a later one about the same step replaces it.

        One about a silence, whose frame is empty, has the id of the last step's own and says
        nothing of that step.
        """
        past = self._ranks.get((frame.run, frame.rank))
        if past is None or not frame.values:
            return
        before = len(past)
        if past.pending:
            last = past.pending[-1]
            if last.decision.step == decision.step and not last.update:
                past.pending.pop()
        if decision.findings or decision.action is not Action.CONTINUE:
            seeds = bool(frame.seeds)
            sample = _sample(frame)
            past.pending.append(_Pending(decision, frame.rank, mode, sample, seeds=seeds))
        self._count((frame.run, frame.rank), past, before)

    def add_check(self, decision: Decision, known: StepFrame, mode: str) -> None:
        """A decision was made about the update of a step that is still to be seen.

        ``known`` is what was known of the step then; how its update was made is not.
        """
        past = self._ranks.get((known.run, known.rank))
        if past is None:
            return
        before = len(past)
        if past.checked and past.checked[-1].decision.step == decision.step:
            past.checked.pop()
        sample = _sample(known)._replace(lr_scale=None, skipped=None)
        past.checked.append(_Pending(decision, known.rank, mode, sample, update=True))
        self._count((known.run, known.rank), past, before)

    def end_rank(self, run: str, rank: int) -> list[DueReport]:
        """Give up on a rank that has ended."""
        return self._give_up((run, rank), "the run ended")

    def expire(self, now_s: float) -> list[DueReport]:
        """Give up on ranks that have ended, as far as silence can tell: on some of them, the
        others have another call."""
        quiet = takewhile(lambda item: now_s - item[1].heard_s > QUIET_S, self._waiting.items())
        ended = (key for key, past in quiet if now_s - past.heard_s > _patience_s(past))
        return [
            report
            for key in list(islice(ended, GIVEN_UP_AT_ONCE))
            for report in self._give_up(key, "the run sent no more steps")
        ]

    def close(self) -> list[DueReport]:
        """Give up on all: nobody will see what the runs do next."""
        return [
            report
            for key in list(self._waiting)
            for report in self._give_up(key, "the sidecar ended")
        ]

    def _count(self, key: tuple[str, int], past: _RankWindow, before: int) -> None:
        """As many decisions as there are wait now, where ``before`` did."""
        self.pending += len(past) - before
        if past:
            self._waiting[key] = past
        else:
            self._waiting.pop(key, None)

    def _give_up(self, key: tuple[str, int], because: str) -> list[DueReport]:
        past = self._waiting.pop(key, None)
        if past is None:
            return []
        reports = [_due(past, each, because) for each in (*past.pending, *past.checked)]
        self.pending -= len(past)
        past.pending.clear()
        past.checked.clear()
        return reports


def _sample(frame: StepFrame) -> StepSample:
    values = frame.values
    skipped = values.get("update_skipped")
    return StepSample(
        frame.step,
        (values.get("loss"), values.get("loss_volatility"), values.get("step_latency_ms")),
        values.get("nonfinite", 0.0),
        values.get("lr_scale"),
        None if skipped is None else skipped > 0,
    )


def _patience_s(past: _RankWindow) -> float:
    step_ms = past.samples[-1].values[2]
    return max(QUIET_S, QUIET_STEPS * (step_ms or 0.0) / 1e3)


def _due(past: _RankWindow, pending: _Pending, ended: str = "") -> DueReport:
    decision = pending.decision
    step = decision.step
    finding = _deciding(decision)
    holds_seeds = pending.seeds and decision.action in (Action.SEED, Action.PAUSE)
    return DueReport(
        time_unix_nano=past.time_unix_nano,
        decision=decision.id,
        run=decision.run,
        rank=pending.rank,
        step=step,
        action=decision.action,
        reason=decision.reason,
        mode=pending.mode,
        ended=ended,
        before=[sample for sample in past.samples if sample.step < step][-WINDOW:],
        during=pending.during,
        after=[sample for sample in past.samples if step < sample.step <= step + WINDOW],
        update=pending.update,
        rule=finding.rule if finding else "",
        saw=finding.values if finding else {},
        unseen=holds_seeds or not _UNSEEN.isdisjoint(decision.parameters),
    )


def _deciding(decision: Decision) -> Finding | None:
    """The finding that decided, or the most severe one of a notice."""
    if decision.action is Action.CONTINUE:
        return max(decision.findings, key=lambda each: RANK_OF[each.severity], default=None)
    return next((each for each in decision.findings if each.rule == decision.reason), None)
