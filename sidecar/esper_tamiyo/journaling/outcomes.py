"""Outcomes: the run's course after a decision, compared with excursions without an action.

A report says what happened *after*, which need not be *because*: there is no second run
to compare with. It compares three samples: *before*, the median over the steps up to the
decision; *during*, the step that was decided about; *after*, the median over the steps behind
it.

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
decided about and of those behind it. Where nothing was done the outcome says so
(``came_back`` in place of ``improved``), and is kept as something to compare with: what is
far out often comes back by itself, so a run that improved after an action is worth as much as
fewer of its excursions did without one.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from enum import StrEnum
from statistics import median
from typing import NamedTuple

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling.entries import Reported
from esper_tamiyo.journaling.field_reports import (
    WATCHED,
    WINDOW,
    DueReport,
    StepSample,
)

TOLERANCE = 0.1
UNSTEADINESS = 2.0

MAX_RUNS = 1024
"""Runs whose excursions are remembered; beyond it the one reported of least lately goes."""

MAX_EXCURSIONS = 64
"""Excursions of one metric of a run that are remembered, the newest."""


class RunOutcome(StrEnum):
    """How the run went on; the last four where nothing was done."""

    IMPROVED = "improved"
    NEUTRAL = "neutral"
    WORSE = "worse"
    INCONCLUSIVE = "inconclusive"
    CAME_BACK = "came_back"
    """As ``improved``, of what had left the ordinary."""
    GOT_BETTER = "got_better"
    """As ``improved``, where nothing had left the ordinary."""
    STAYED = "stayed"
    GOT_WORSE = "got_worse"


class _Judgement(NamedTuple):
    """An outcome, what it rests on in words, and what became of each metric that had left the
    ordinary at the decision."""

    outcome: RunOutcome
    because: str
    unusual: dict[str, _Verdict]


class _Comparison(NamedTuple):
    """An outcome beside what ``left_alone`` excursions did, of which ``came_back`` so many."""

    outcome: RunOutcome
    words: str = ""
    left_alone: int = 0
    came_back: int = 0


class _RunExcursions:
    """What became of the excursions of one run at which nothing was done, by metric."""

    def __init__(self) -> None:
        self.came_back: dict[str, deque[bool]] = defaultdict(
            lambda: deque(maxlen=MAX_EXCURSIONS)
        )
        self._last: dict[str, int] = {}

    def add(self, step: int, unusual: dict[str, _Verdict]) -> None:
        """One more; what several rules, steps or ranks say of one excursion counts once."""
        for key, verdict in unusual.items():
            last = self._last.get(key)
            if verdict.outcome is RunOutcome.INCONCLUSIVE:
                continue
            if last is None or abs(step - last) > WINDOW:
                self._last[key] = step
                self.came_back[key].append(verdict.outcome is RunOutcome.IMPROVED)


class OutcomeReports:
    """Makes outcome reports, each with what the run's excursions did when left alone.

    Bounded: :data:`MAX_RUNS` runs with :data:`MAX_EXCURSIONS` excursions of each metric.
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _RunExcursions] = OrderedDict()

    def report(self, due: DueReport) -> Reported:
        """The report, which counts for those that follow."""
        past = self._runs.setdefault(due.run, _RunExcursions())
        self._runs.move_to_end(due.run)
        if len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)
        judged = _judge(due)
        was_applied = applied(due)
        if was_applied is False:
            past.add(due.step, judged.unusual)
            return _report(due, judged, _Comparison(_unaided(judged)))
        return _report(due, judged, _compared_with(past, judged, known=bool(was_applied)))


def applied(due: DueReport) -> bool | None:
    """Whether anything was done to the run within the window; None where nobody knows."""
    samples = [due.during, *due.after]
    if any(sample.skipped or sample.lr_scale not in (None, 1.0) for sample in samples):
        return True
    if due.mode == "advise" or due.action is Action.CONTINUE:
        return False
    if due.unseen:
        return True if due.mode == "enforce" else None
    return False if any(sample.lr_scale is not None for sample in samples) else None


def _unaided(judged: _Judgement) -> RunOutcome:
    """What an outcome is called where nothing was done."""
    return {
        RunOutcome.IMPROVED: RunOutcome.CAME_BACK if judged.unusual else RunOutcome.GOT_BETTER,
        RunOutcome.NEUTRAL: RunOutcome.STAYED,
        RunOutcome.WORSE: RunOutcome.GOT_WORSE,
    }.get(judged.outcome, judged.outcome)


def _compared_with(past: _RunExcursions, judged: _Judgement, *, known: bool) -> _Comparison:
    """The outcome beside what the same metric did when left alone; ``known``: something was
    done for certain."""
    outcome = judged.outcome
    if outcome is RunOutcome.INCONCLUSIVE:
        return _Comparison(outcome)
    if not known:
        return _Comparison(outcome, "whether anything was applied is not known")
    key = next((key for key, told in judged.unusual.items() if told.outcome is outcome), "")
    unknowable = "so the effect of the action is unknown"
    if not key:
        return _Comparison(outcome, f"no value was unusual, {unknowable}")
    alone = past.came_back[key]
    if not alone:
        words = f"no such excursion of this run was without an action, {unknowable}"
        return _Comparison(outcome, words)
    count, back = len(alone), sum(alone)
    words = f"{back} of {count} such excursions of this run came back by themselves"
    return _Comparison(outcome, words, count, back)


def _report(due: DueReport, judged: _Judgement, compared: _Comparison) -> Reported:
    """What the medians were, and how the run went on."""
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
        outcome=compared.outcome,
        because=judged.because,
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
        applied=applied(due),
        left_alone=compared.left_alone,
        came_back=compared.came_back,
        comparison=compared.words,
        rule=due.rule,
        saw=due.saw,
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


def _judge(due: DueReport) -> _Judgement:
    """The outcome and, in words, what it rests on."""
    if due.ended:
        return _Judgement(RunOutcome.INCONCLUSIVE, due.ended, {})
    if 2 * len(due.after) < WINDOW:
        because = f"only {len(due.after)} of {WINDOW} steps were seen"
        return _Judgement(RunOutcome.INCONCLUSIVE, because, {})
    known: dict[str, _Verdict] = {}
    for place, key in enumerate(WATCHED):
        verdict = _verdict(due, place)
        if verdict is not None:
            known[key] = verdict
    unusual = {key: verdict for key, verdict in known.items() if verdict.unusual}
    for outcome in (
        RunOutcome.WORSE,
        RunOutcome.IMPROVED,
        RunOutcome.INCONCLUSIVE,
        RunOutcome.NEUTRAL,
    ):
        whys = [
            f"{key} {told.why}"
            for key, told in (unusual or known).items()
            if told.outcome is outcome
        ]
        if whys:
            return _Judgement(outcome, "; ".join(whys), unusual)
    because = "none of its values arrived"
    return _Judgement(RunOutcome.INCONCLUSIVE, because, {})


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
        return _Verdict(RunOutcome.IMPROVED, True, "is back to its earlier value")
    if gone:
        return _Verdict(RunOutcome.WORSE, True, "is finite again, and higher than before")
    return _compared(after, reference, tolerance, unusual)


def _tolerance(before: list[float], usual: float) -> float:
    """By how much a value differs from what is usual before that counts."""
    spread = median(abs(value - usual) for value in before)
    return max(TOLERANCE * abs(usual), UNSTEADINESS * spread)


def _missing(after: list[StepSample], unusual: bool) -> _Verdict:
    """Of a metric that was not there at most steps behind the decision."""
    if any(sample.nonfinite for sample in after):
        return _Verdict(RunOutcome.WORSE, True, "is no longer finite")
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
