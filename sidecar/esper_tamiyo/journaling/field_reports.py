"""Field reports: what a run did after a decision.

A report says what happened *after*, which need not be *because*: there is no second run
to compare with. It compares three samples at the loss, its volatility and the step time:

- *before*: the median over the :data:`WINDOW` steps up to the decision,
- *during*: the step that was decided about,
- *after*: the median over the :data:`WINDOW` steps behind it.

A difference counts when it is more than a tenth of what it is held against and more than
twice the usual unsteadiness (the median absolute deviation before the decision). What had left
the ordinary at the decision is what the report is about; when nothing had, all three are.
For each of them *after* is held against *during*, or against *before* where *during* was
ordinary: lower is ``improved``, and so is back to the ordinary; higher is ``worse``. One
that got worse makes the report ``worse``; else one that improved makes it ``improved``;
else it is ``neutral``. With fewer than half of the steps, or of their values, it is
``inconclusive``, unless values went missing because they were not finite, which is
``worse``.

A decision need not have been applied. What each update was made with is told by the step
itself (``lr_scale``, ``update_skipped``), and a report repeats it, of the step that was
decided about and of those behind it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from enum import StrEnum
from statistics import median
from typing import NamedTuple

import msgspec

from esper_otel.leyline.decisions import Action, Decision
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.journaling.entries import Reported

WINDOW = 32
"""Steps looked at on either side of a decision."""

WATCHED = ("loss", "loss_volatility", "step_latency_ms")
"""Metrics a report is about; of each, less is better."""

TOLERANCE = 0.1
UNSTEADINESS = 2.0

MAX_RANKS = 1024
"""Ranks whose last steps are kept; beyond it the one not heard of for longest goes."""

MAX_CHECKED = 32
"""Updates of one rank whose step has not been seen; beyond it the oldest has no report."""

QUIET_S = 60.0
QUIET_STEPS = 20.0
"""A rank that said nothing for so long, and for so many of its steps, has ended."""


class RunOutcome(StrEnum):
    """How the run went on."""

    IMPROVED = "improved"
    NEUTRAL = "neutral"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"


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
    """All that a report is made of, by :func:`report_of`.

    ``ended`` says why no more steps will be seen, "" when all have been.
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


class _Pending(NamedTuple):
    """A decision whose report is due; ``update``: about an update that was not made yet."""

    decision: Decision
    rank: int
    mode: str
    during: StepSample
    update: bool = False


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


class FieldReports:
    """Follows decisions until their reports are due.

    Fed with every judged frame and every decision, in their order; a CONTINUE has no
    report. What falls due is handed on to be made into a report elsewhere: medians are not
    for the thread that answers. Reads no clock: ``now_s`` is handed in, in seconds of any
    one monotonic clock.
    """

    def __init__(self) -> None:
        self._ranks: OrderedDict[tuple[str, int], _RankWindow] = OrderedDict()

    @property
    def pending(self) -> int:
        """Decisions whose report is due."""
        return sum(len(past.pending) + len(past.checked) for past in self._ranks.values())

    def add_frame(self, frame: StepFrame, now_s: float) -> list[DueReport]:
        """A step was seen: the reports that it completes."""
        key = (frame.run, frame.rank)
        past = self._ranks.get(key)
        reports: list[DueReport] = []
        if past is None or (frame.instance and past.instance != frame.instance):
            if past is not None:
                reports = _given_up(past, "the process was replaced by another")
            past = self._ranks[key] = _RankWindow(frame.instance)
            if len(self._ranks) > MAX_RANKS:
                _, forgotten = self._ranks.popitem(last=False)
                reports += _given_up(forgotten, "the run was forgotten")
        self._ranks.move_to_end(key)
        past.heard_s = now_s
        past.time_unix_nano = frame.time_unix_nano
        sample = _sample(frame)
        past.samples.append(sample)
        while past.checked and past.checked[0].decision.step <= frame.step:
            known = past.checked.popleft()
            is_it = known.decision.step == frame.step
            past.pending.append(known._replace(during=sample) if is_it else known)
        while past.pending and frame.step >= past.pending[0].decision.step + WINDOW:
            reports.append(_due(past, past.pending.popleft()))
        return reports

    def add_decision(self, decision: Decision, frame: StepFrame, mode: str) -> None:
        """A decision was made about ``frame``; a later one about the same step replaces it.

        One about a silence, whose frame is empty, has the id of the last step's own and says
        nothing of that step.
        """
        past = self._ranks.get((frame.run, frame.rank))
        if past is None or not frame.values:
            return
        if past.pending:
            last = past.pending[-1]
            if last.decision.step == decision.step and not last.update:
                past.pending.pop()
        if decision.action is not Action.CONTINUE:
            past.pending.append(_Pending(decision, frame.rank, mode, _sample(frame)))

    def add_check(self, decision: Decision, known: StepFrame, mode: str) -> None:
        """A decision was made about the update of a step that is still to be seen.

        ``known`` is what was known of the step then; how its update was made is not.
        """
        past = self._ranks.get((known.run, known.rank))
        if past is None:
            return
        if past.checked and past.checked[-1].decision.step == decision.step:
            past.checked.pop()
        sample = _sample(known)._replace(lr_scale=None, skipped=None)
        past.checked.append(_Pending(decision, known.rank, mode, sample, update=True))

    def expire(self, now_s: float) -> list[DueReport]:
        """Give up on ranks that have ended, as far as silence can tell."""
        return [
            report
            for past in self._ranks.values()
            if (past.pending or past.checked) and now_s - past.heard_s > _patience_s(past)
            for report in _given_up(past, "the run said no more")
        ]

    def close(self) -> list[DueReport]:
        """Give up on all: nobody will see what the runs do next."""
        return [
            report
            for past in self._ranks.values()
            for report in _given_up(past, "the sidecar ended")
        ]


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


def _given_up(past: _RankWindow, because: str) -> list[DueReport]:
    reports = [_due(past, pending, because) for pending in (*past.pending, *past.checked)]
    past.pending.clear()
    past.checked.clear()
    return reports


def _due(past: _RankWindow, pending: _Pending, ended: str = "") -> DueReport:
    decision = pending.decision
    step = decision.step
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
    )


def report_of(due: DueReport) -> Reported:
    """The report: what the medians were, and how the run went on."""
    outcome, because = (RunOutcome.INCONCLUSIVE, due.ended) if due.ended else _judge(due)
    scaled_from, scale = _scaled(due)
    return Reported(
        time_unix_nano=due.time_unix_nano,
        decision=due.decision,
        run=due.run,
        rank=due.rank,
        step=due.step,
        action=due.action,
        reason=due.reason,
        mode=due.mode,
        outcome=outcome,
        because=because,
        window=WINDOW,
        observed=len(due.after),
        before=_medians(due.before),
        during=_by_key(due.during.values),
        after=_medians(due.after),
        update=due.update,
        lr_scale=due.during.lr_scale,
        skipped=due.during.skipped,
        scaled_from=scaled_from,
        lr_scale_after=scale,
        skipped_after=sum(1 for sample in due.after if sample.skipped),
    )


def _scaled(due: DueReport) -> tuple[int | None, float | None]:
    """The first step behind the decision whose update had another factor, and that factor;
    of the last one where none had, and None where nobody said."""
    before = due.during.lr_scale
    told = [
        (sample.step, sample.lr_scale) for sample in due.after if sample.lr_scale is not None
    ]
    if not told:
        return None, None
    for step, scale in told:
        if scale != (1.0 if before is None else before):
            return step, scale
    return None, told[-1][1]


def _judge(due: DueReport) -> tuple[RunOutcome, str]:
    """The outcome and, in words, what it rests on."""
    if 2 * len(due.after) < WINDOW:
        return RunOutcome.INCONCLUSIVE, f"only {len(due.after)} of {WINDOW} steps were seen"
    known = []
    for place, key in enumerate(WATCHED):
        verdict = _verdict(due, place)
        if verdict is not None:
            known.append((key, verdict))
    subjects = [each for each in known if each[1].unusual] or known
    for outcome in (
        RunOutcome.WORSE,
        RunOutcome.IMPROVED,
        RunOutcome.INCONCLUSIVE,
        RunOutcome.NEUTRAL,
    ):
        whys = [f"{key} {told.why}" for key, told in subjects if told.outcome is outcome]
        if whys:
            return outcome, "; ".join(whys)
    return RunOutcome.INCONCLUSIVE, "none of the values it looks at was there"


class _Verdict(NamedTuple):
    """What became of one metric; ``unusual``: it had left the ordinary at the decision."""

    outcome: RunOutcome
    unusual: bool
    why: str


def _verdict(due: DueReport, place: int) -> _Verdict | None:
    """What became of one of :data:`WATCHED`; None where nobody knows what it was before."""
    before = _values(due.before, place)
    if not before:
        return None
    usual = median(before)
    tolerance = _tolerance(before, usual)
    then = due.during.values[place]
    gone = then is None and due.during.nonfinite > 0
    unusual = gone or (then is not None and abs(then - usual) > tolerance)
    values = _values(due.after, place)
    if 2 * len(values) < len(due.after):
        return _missing(due.after, unusual)
    after = median(values)
    reference = then if unusual and then is not None else usual
    if (gone or reference > usual) and after <= usual + tolerance:
        return _Verdict(RunOutcome.IMPROVED, True, "is back to what it was")
    if gone:
        return _Verdict(RunOutcome.WORSE, True, "is finite again, and higher than it was")
    return _compared(after, reference, tolerance, unusual)


def _tolerance(before: list[float], usual: float) -> float:
    """By how much a value differs from what is usual before that counts."""
    spread = median(abs(value - usual) for value in before)
    return max(TOLERANCE * abs(usual), UNSTEADINESS * spread)


def _missing(after: list[StepSample], unusual: bool) -> _Verdict:
    """Of a metric that was not there at most steps behind the decision."""
    if any(sample.nonfinite for sample in after):
        return _Verdict(RunOutcome.WORSE, True, "is not finite any more")
    return _Verdict(RunOutcome.INCONCLUSIVE, unusual, "was missing afterwards")


def _compared(after: float, reference: float, tolerance: float, unusual: bool) -> _Verdict:
    tolerance = max(tolerance, TOLERANCE * abs(reference))
    if after < reference - tolerance:
        return _Verdict(RunOutcome.IMPROVED, unusual, "is lower")
    if after > reference + tolerance:
        return _Verdict(RunOutcome.WORSE, unusual, "is higher")
    return _Verdict(RunOutcome.NEUTRAL, unusual, "is much the same")


def _values(samples: list[StepSample], place: int) -> list[float]:
    return [value for sample in samples if (value := sample.values[place]) is not None]


def _medians(samples: list[StepSample]) -> dict[str, float]:
    values = [_values(samples, place) for place in range(len(WATCHED))]
    return {key: median(of) for key, of in zip(WATCHED, values, strict=True) if of}


def _by_key(values: tuple[float | None, ...]) -> dict[str, float]:
    pairs = zip(WATCHED, values, strict=True)
    return {key: value for key, value in pairs if value is not None}
