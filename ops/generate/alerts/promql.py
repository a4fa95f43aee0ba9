"""Conditions of a threshold table as PromQL, or the reason why they have none.

A table counts observations, PromQL knows times:

- A rule that one observation is enough for looks at the most extreme value of the last five
  minutes. A rule that wants several looks at the last minute's median, which holds for most of
  it.
- Parts of ``all`` about different values are compared at the same steps: at the newest step of
  each second, or of each five seconds where the rule wants several observations. Only where a
  part looks at a range itself is it enough that all are true within the same minutes.
- Nothing is said of a rank that began a moment ago, or whose run has ended well
  (:data:`JUDGED`).
- A rolling baseline is the median of the last ten minutes, recorded once a minute.
- A record of excursions is the farthest of ten minutes, five minutes ago: a value is beyond it
  when it is out by more than twice as much. So trouble that lasts is not compared with itself
  before its alert has fired.
- A rank is missing by the steps that others of its run are ahead of it, not by its own time;
  one that has said that its run ended is not.
- ``unchanged_for`` is sound and late: nothing changed for an hour with so many observations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import msgspec

from esper_otel.leyline.custom import NAME, PREFIX, is_custom
from esper_otel.leyline.endings import HowEnded
from esper_otel.leyline.metrics import (
    BY_KEY,
    CUSTOM,
    HOW_ENDED,
    RANK,
    RUN_ENDED,
    RUN_ID,
    SEED_ID,
)
from esper_tamiyo.judging.history import BEYOND, END
from esper_tamiyo.language.derived import DERIVED, KNOWN, is_seeds
from esper_tamiyo.language.operators import ON_EARLIER, ON_RECORDS, BaselineKind, Operator
from esper_tamiyo.language.table import Baseline, Combine, Condition, Group, Rule
from ops.generate.prometheus_names import label_name, prometheus_name

PAST_S = 600
RECENT, LATELY, SINCE = "1m", "5m", "6m"
"""What "now" is for what lasts, and for what one step had; and "since before" the latter."""

BEFORE, PAST, EVER, LONG = "5m", f"{PAST_S // 60}m", "1d", "1h"
"""What "before the trouble", a rolling baseline, "ever" and "for long" are in PromQL."""

EACH_SECOND, OFTEN, MOST = "1s", "5s", 6
"""How often parts of ``all`` are compared, of a single step and of what lasts; and of how many
of the latter times in :data:`RECENT` more than half are more."""

YOUNG = "5m"
"""A rank that began less than this ago has no alerts."""

RECORD = 2
"""Times the farthest that a value was out in the past, which is what a record explains."""

RUN = label_name(RUN_ID)
RANK_KEYS = (RUN, label_name(RANK), "instance")
WHOEVER_KEYS = RANK_KEYS[:2]
"""A rank, whichever process it is by now."""

MAY_BE_NEGATIVE = frozenset({"loss", "loss_ewma", "loss_delta"})
"""Of a baseline below zero "so many times" is seen from the baseline, as in tables."""

SEED_KEYS = (*RANK_KEYS, label_name(SEED_ID))

_SIGNS = {
    Operator.ABOVE: ">",
    Operator.AT_LEAST: ">=",
    Operator.BELOW: "<",
    Operator.AT_MOST: "<=",
    Operator.ABOVE_BASELINE: ">",
    Operator.BELOW_BASELINE: "<",
    Operator.ABOVE_RECORD: ">",
    Operator.BELOW_RECORD: "<",
    Operator.ABOVE_PEERS: ">",
    Operator.BELOW_PEERS: "<",
}


class UntranslatableError(Exception):
    """Why a condition, and the rule it is part of, has no PromQL."""


class Expression(msgspec.Struct, frozen=True):
    """An expression, and whether its series are of seeds (else of ranks)."""

    text: str
    of_seeds: bool
    judged_by: tuple[str, ...] = WHOEVER_KEYS
    """Labels that it shares with :data:`JUDGED`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The labels by which its series are told apart."""
        return SEED_KEYS if self.of_seeds else RANK_KEYS


class Recording(msgspec.Struct, frozen=True):
    """A series that Prometheus is to make of others."""

    record: str
    expr: str


class Translator:
    """Translates conditions, and keeps what has to be recorded for them."""

    def __init__(self, baseline: Baseline) -> None:
        self.recordings: dict[str, Recording] = {}
        self._warmup = baseline.warmup
        self._rule = ""

    def translate(self, rule: Rule) -> Expression:
        """What is true while ``rule`` fires; raises :class:`UntranslatableError`."""
        if rule.downgrade:
            raise UntranslatableError(
                "it counts only while a seed operation is proposed, and no metric reports that"
            )
        self._rule = rule.id
        return self._when(rule.when, is_lasting(rule))

    def _when(self, when: Condition | Group, lasting: bool) -> Expression:
        if isinstance(when, Condition):
            return self._condition(when, lasting)
        if when.combine is Combine.ALL and _is_of_several(when):
            return self._together(when, lasting)
        parts = [self._when(part, lasting) for part in when.parts]
        # What tells seeds apart first: labels of the left side are those of the alert.
        first, *others = sorted(parts, key=lambda part: not part.of_seeds)
        if when.combine is Combine.ANY and any(o.of_seeds != first.of_seeds for o in others):
            raise UntranslatableError("`any` mixes metrics of seeds and of ranks")
        joint = "and" if when.combine is Combine.ALL else "or"
        text = f"({first.text})"
        for other in others:
            text += f"\n  {joint} {_on(other.keys)} ({other.text})"
        judged_by = min((part.judged_by for part in parts), key=len)
        return Expression(text, first.of_seeds, judged_by)

    def _together(self, group: Group, lasting: bool) -> Expression:
        """What is true of all parts at the same step."""
        at_once = self._at_once(group)
        if not lasting:
            # Recorded once a minute, as it is asked for each second of it.
            name = f"esper:{self._rule}:at_once"
            while name in self.recordings:  # another part of the same rule
                name += "_too"
            self._record(name, f"last_over_time(({at_once.text})[{RECENT}:{EACH_SECOND}])")
            return Expression(f"last_over_time({name}[{LATELY}])", at_once.of_seeds)
        # The median is what is shown; of a rank that has stopped there is none.
        shown = f"quantile_over_time(0.5, {self._series(_first_of(group).metric)}[{RECENT}])"
        often = f"count_over_time(({at_once.text})[{RECENT}:{OFTEN}]) > {MOST}"
        return Expression(f"{shown}\n  and {_on(at_once.keys)} ({often})", at_once.of_seeds)

    def _at_once(self, when: Condition | Group) -> Expression:
        """What is true at the newest step."""
        if isinstance(when, Condition):
            # What is worked out is recorded once a minute, so here it is worked out anew.
            derived = _DERIVATIONS.get(when.metric)
            now = f"({derived})" if derived else self._newest(when.metric)
            return Expression(self._compared(when, now), _of_seeds(when.metric))
        first, *others = map(self._at_once, sorted(when.parts, key=_of_whom))
        joint = "and" if when.combine is Combine.ALL else "or"
        text = f"({first.text})"
        for other in others:
            text += f" {joint} {_on(other.keys)} ({other.text})"
        return Expression(text, first.of_seeds)

    def _condition(self, condition: Condition, lasting: bool) -> Expression:
        own: dict[Operator, Callable[[Condition], str]] = {
            Operator.RISES_BY: self._rises,
            Operator.RISEN_FOR: self._beyond_before,
            Operator.FALLEN_FOR: self._beyond_before,
            Operator.UNCHANGED_FOR: self._unchanged,
            Operator.RUNS_OUT_WITHIN: self._runs_out,
            Operator.NONFINITE: self._nonfinite,
            Operator.MISSING_FOR: self._missing,
        }
        if condition.operator in own:
            text = own[condition.operator](condition)
        else:
            sign = _SIGNS[condition.operator]
            text = self._compared(condition, self._now(condition.metric, sign, lasting))
        silent = condition.operator is Operator.MISSING_FOR
        return Expression(text, _of_seeds(condition.metric), (RUN,) if silent else WHOEVER_KEYS)

    def _compared(self, condition: Condition, now: str) -> str:
        """Where what is ``now`` is beyond the condition's bound."""
        sign, operator, number = (
            _SIGNS[condition.operator],
            condition.operator,
            condition.number,
        )
        if operator in (Operator.ABOVE_BASELINE, Operator.BELOW_BASELINE):
            return f"{now} {sign} {self._baseline(condition)}"
        if operator in ON_RECORDS:
            return f"{now} {sign} {self._record_bound(condition)}"
        if operator in (Operator.ABOVE_PEERS, Operator.BELOW_PEERS):
            peers = f"quantile by ({RUN}) (0.5, {now})"
            several = f"(count by ({RUN}) ({now}) > 1)"
            return (
                f"{now} {sign} on({RUN}) group_left () ({number:g} * {peers})"
                f" and on({RUN}) {several}"
            )
        return f"{now} {sign} {number:g}"

    def _now(self, key: str, sign: str, lasting: bool) -> str:
        series = self._series(key)
        if lasting:
            return f"quantile_over_time(0.5, {series}[{RECENT}])"
        return f"{'max' if sign[0] == '>' else 'min'}_over_time({series}[{LATELY}])"

    def _baseline(self, condition: Condition) -> str:
        key = condition.baseline_of or condition.metric
        series = self._series(key)
        name = f"{series if ':' in series else f'esper:{series}'}:median{PAST}"
        self._record(
            name,
            f"quantile_over_time(0.5, {series}[{PAST}])"
            f" and count_over_time({series}[{PAST}]) >= {self._warmup}",
        )
        match condition.baseline:
            case BaselineKind.ROLLING:
                base = name
            case BaselineKind.LOWEST:
                base = f"min_over_time({name}[{EVER}])"
            case BaselineKind.HIGHEST:
                base = f"max_over_time({name}[{EVER}])"
            case BaselineKind.FROZEN:
                raise UntranslatableError(
                    "its baseline is from the start of the run, which moves out of every range "
                    "that PromQL can look at"
                )
        bound = f"({condition.number:g} * {base})"
        if key in MAY_BE_NEGATIVE:
            bound = f"({base} + {condition.number - 1:g} * abs({base}))"
        if _of_seeds(condition.metric) and not _of_seeds(key):
            return f"{_on(RANK_KEYS)} group_left () {bound}"
        return f"{_on(SEED_KEYS if _of_seeds(key) else RANK_KEYS)} {bound}"

    def _record_bound(self, condition: Condition) -> str:
        series = self._series(condition.metric)
        ordinary = Condition(condition.metric, Operator.ABOVE_BASELINE, 1.0, condition.metric)
        self._baseline(ordinary)
        side = "max" if condition.operator is Operator.ABOVE_RECORD else "min"
        level, farthest = f"esper:{series}:median{PAST}", f"esper:{series}:{side}{PAST}"
        self._record(farthest, f"{side}_over_time({series}[{PAST}] offset {BEFORE})")
        keys = _on(SEED_KEYS if _of_seeds(condition.metric) else RANK_KEYS)
        way = f"{condition.number * RECORD:g} * ({farthest} - {keys} {level})"
        return f"{keys} ({level} + {keys} {way})"

    def _rises(self, condition: Condition) -> str:
        series = self._series(condition.metric)
        # A range has no sample at its left end in Prometheus 3, so that two of one length,
        # one after the other, do not show what rose between them.
        risen = f"max_over_time({series}[{LATELY}]) - min_over_time({series}[{SINCE}])"
        return f"{risen} >= {condition.number:g}"

    def _beyond_before(self, condition: Condition) -> str:
        series, rises = self._series(condition.metric), condition.operator is Operator.RISEN_FOR
        side, share = ("upper", 1 - END) if rises else ("lower", END)
        name = f"esper:{series.removeprefix('esper:')}:{side}{PAST}"
        self._record(name, f"quantile_over_time({share:g}, {series}[{PAST}] offset {BEFORE})")
        now, keys = (
            f"quantile_over_time(0.5, {series}[{RECENT}])",
            _on(SEED_KEYS if _of_seeds(condition.metric) else RANK_KEYS),
        )
        bound = f"({name} {'+' if rises else '-'} {BEYOND:g} * abs({name}))"
        return f"{now} {'>' if rises else '<'} {keys} {bound}"

    def _unchanged(self, condition: Condition) -> str:
        series = self._series(condition.metric)
        return (
            f"changes({series}[{LONG}]) == 0"
            f" and count_over_time({series}[{LONG}]) >= {condition.number:g}"
        )

    def _runs_out(self, condition: Condition) -> str:
        series = self._series(condition.metric)
        step_s = f"({self._series('step_latency_ms')} / 1000)"
        slope = f"(deriv({series}[{PAST}]) < 0)"
        left = f"{condition.number:g} * {slope} * {_on(RANK_KEYS)} {step_s}"
        return f"{series} + {_on(RANK_KEYS)} ({left}) <= 0"

    def _nonfinite(self, condition: Condition) -> str:
        if condition.metric != "nonfinite":
            raise UntranslatableError("no metric reports which value was not finite")
        return f"max_over_time({self._series('nonfinite')}[{LATELY}]) > 0"

    def _missing(self, condition: Condition) -> str:
        if condition.metric != "step":
            raise UntranslatableError(
                "how many steps a value has been absent cannot be counted"
            )
        series = self._series("step")
        newest = f"esper:{series}:newest"
        whoever = ", ".join(WHOEVER_KEYS)
        self._record(newest, f"max by ({whoever}) (last_over_time({series}[{RECENT}]))")
        run = f"max by ({RUN}) (last_over_time({newest}[{PAST}]))"
        behind = f"{run} - on({RUN}) group_right () last_over_time({newest}[{EVER}])"
        # Who has said that it is done is not missed; of who has said nothing a run without
        # anybody to be behind of may have ended as well.
        ended = f"max by ({whoever}) (last_over_time({prometheus_name(RUN_ENDED)}[{EVER}]))"
        return (
            f"({behind} >= {condition.number:g})"
            f" unless {_on(WHOEVER_KEYS)} count_over_time({series}[{RECENT}])"
            f" unless {_on(WHOEVER_KEYS)}"
            f" ({ended} >= {_on(WHOEVER_KEYS)} last_over_time({newest}[{EVER}]))"
        )

    def _newest(self, key: str) -> str:
        """The series itself, and not what is recorded of it once a minute."""
        return _of_custom(key) if is_custom(key) else self._series(key)

    def _series(self, key: str) -> str:
        if is_custom(key):
            series = f"esper:{label_name(prometheus_name(CUSTOM) + '_' + key)}"
            self._record(series, _of_custom(key))
            return series
        metric = KNOWN[key]
        if key not in {row.metric.key for row in DERIVED}:
            return prometheus_name(metric)
        name = f"esper:{label_name(metric.instrument)}"
        self._record(name, _DERIVATIONS[key])
        return name

    def _record(self, name: str, expr: str) -> None:
        self.recordings[name] = Recording(name, expr)


def is_lasting(rule: Rule) -> bool:
    """Whether it takes more than one step to break."""
    return rule.persistence > 1 or any(
        each.operator in ON_EARLIER for each in _conditions(rule.when)
    )


def _of_custom(key: str) -> str:
    name = json.dumps(key.removeprefix(PREFIX), ensure_ascii=False)
    return f"{prometheus_name(CUSTOM)}{{{NAME}={name}}}"


def guarded(expression: Expression) -> str:
    """An expression that is empty for whom nothing is said about (:data:`JUDGED`)."""
    return f"({expression.text})\nand {_on(expression.judged_by)} {JUDGED.record}"


def _is_of_several(group: Group) -> bool:
    """Whether its parts are about different values, and all comparisons of one step's."""
    conditions = list(_conditions(group))
    values = {(each.metric, _SIGNS.get(each.operator, "")[:1]) for each in conditions}
    return len(values) > 1 and all(each.operator in _SIGNS for each in conditions)


def _conditions(when: Condition | Group) -> Iterator[Condition]:
    if isinstance(when, Condition):
        yield when
        return
    for part in when.parts:
        yield from _conditions(part)


def _of_whom(when: Condition | Group) -> bool:
    """By which parts are sorted: what tells seeds apart first."""
    return not any(_of_seeds(each.metric) for each in _conditions(when))


def _first_of(group: Group) -> Condition:
    return next(_conditions(sorted(group.parts, key=_of_whom)[0]))


def _of_seeds(key: str) -> bool:
    return is_seeds(key)


def _on(keys: tuple[str, ...]) -> str:
    return f"on({', '.join(keys)})"


def _name(key: str) -> str:
    return prometheus_name(KNOWN[key])


_DERIVATIONS = {
    "kasmina.seed.isolation.cosine": (
        f"{_name('kasmina.seed.isolation.dot')} / ({_name('kasmina.seed.isolation.host_norm')}"
        f" * {_name('kasmina.seed.isolation.seed_norm')} > 0)"
    )
}
"""What Tamiyo works out (``esper_tamiyo.language.derived``), worked out by Prometheus."""


def _judged() -> str:
    """Ranks that have been at it for a while, and have not said since their last step that they
    ended well."""
    step, who = prometheus_name(BY_KEY["step"]), ", ".join(WHOEVER_KEYS)
    well = f'{label_name(HOW_ENDED)}!="{HowEnded.EXCEPTION}"'
    grown = f"max by ({who}) (last_over_time({step}[{PAST}] offset {YOUNG}))"
    ended = f"max by ({who}) (timestamp({prometheus_name(RUN_ENDED)}{{{well}}}))"
    later = f"max by ({who}) (timestamp({step})) > {_on(WHOEVER_KEYS)} {ended}"
    return (
        f"{grown}\n  unless {_on(WHOEVER_KEYS)} ({ended} unless {_on(WHOEVER_KEYS)} ({later}))"
    )


JUDGED = Recording("esper:rank:judged", _judged())
"""The ranks that alerts are about, recorded just before them."""
