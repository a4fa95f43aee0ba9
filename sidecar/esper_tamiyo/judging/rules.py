"""Rules as pure functions of (values, history): true, false or unknown.

A missing value makes a condition unknown, never false, because false would mean healthy.
Groups combine the three values as Kleene's logic does. Rows are compiled once into
closures, so that judging a step costs a dictionary look-up and a comparison per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from esper_otel.leyline.decisions import FORCE, RANK_OF, Action, Finding
from esper_tamiyo.judging.history import BaselineKey, History
from esper_tamiyo.judging.seen import seen_by
from esper_tamiyo.language.operators import Operator
from esper_tamiyo.language.parameters import USUAL_NORM
from esper_tamiyo.language.table import (
    Combine,
    Condition,
    Group,
    Rule,
    RuleMode,
    eased,
)

Verdict = bool | None
"""None is unknown."""

Values = Mapping[str, float]
Test = Callable[[Values, History], Verdict]
IsKnown = Callable[[Condition], bool]
"""Whether the values at hand suffice for a condition."""


class CompiledRule(msgspec.Struct, frozen=True):
    """A row ready to run.

    ``keeps`` is the test with the easier numbers of ``release``, None without any.
    ``weight`` orders rules by force, then severity. ``window`` has a one for each
    observation that ``of`` speaks of, 0 where they must follow each other.
    """

    rule: Rule
    test: Test
    keeps: Test | None
    weight: tuple[int, int]
    window: int
    acts: bool
    keeps_norm: bool
    """Whether it has updates made with the usual gradient norm."""
    is_trouble: bool
    """Whether a step at which it fires is not a clean one. What is only told is not: a drift
    that has come to stay must not keep seeds waiting for ever."""

    def seen(self, values: Values, history: History) -> dict[str, float]:
        """The values behind a verdict."""
        return seen_by(self.rule, values, history)

    def finding(self, values: Values, history: History, seed_id: str | None) -> Finding:
        """What the rule saw when it fired."""
        rule = self.rule
        seen = seen_by(rule, values, history)
        action = rule.action if self.acts else Action.CONTINUE
        return Finding(rule.id, action, rule.severity, rule.text, seen, seed_id)


def compiled(rule: Rule, is_known: IsKnown | None = None) -> CompiledRule:
    """``rule``, ready to run; with ``is_known`` a condition that it refuses is unknown."""
    acts = rule.mode is RuleMode.ACT
    only_tells = rule.action is Action.CONTINUE and not rule.conservative
    easier = eased(rule.when)
    return CompiledRule(
        rule=rule,
        test=_tested(rule.when, is_known),
        keeps=None if easier is None else _tested(easier, is_known),
        weight=(FORCE[rule.action], RANK_OF[rule.severity]),
        window=(1 << rule.of) - 1 if rule.of > rule.persistence else 0,
        acts=acts,
        keeps_norm=acts and USUAL_NORM in rule.parameters,
        is_trouble=acts and not rule.downgrade and not only_tells,
    )


def test_of(when: Condition | Group) -> Test:
    """The test of a condition or group."""
    return _tested(when, None)


def _tested(when: Condition | Group, is_known: IsKnown | None) -> Test:
    if isinstance(when, Condition):
        if is_known is not None and not is_known(when):
            return _unknown
        return _CONDITIONS[when.operator](when)
    parts = tuple(_tested(part, is_known) for part in when.parts)
    return _every(parts) if when.combine is Combine.ALL else _some(parts)


def _unknown(values: Values, history: History) -> Verdict:
    return None


def _both(first: Test, second: Test) -> Test:
    """:func:`_every` of two, which nearly all groups are: judged at every step, for most rules
    the first part is the whole of it."""

    def test(values: Values, history: History) -> Verdict:
        one = first(values, history)
        if one is False:
            return False
        other = second(values, history)
        return None if one is None and other is not False else other

    return test


def _every(parts: tuple[Test, ...]) -> Test:
    if len(parts) == 2:
        return _both(*parts)

    def test(values: Values, history: History) -> Verdict:
        verdict: Verdict = True
        for part in parts:
            found = part(values, history)
            if found is False:
                return False
            if found is None:
                verdict = None
        return verdict

    return test


def _some(parts: tuple[Test, ...]) -> Test:
    def test(values: Values, history: History) -> Verdict:
        verdict: Verdict = False
        for part in parts:
            found = part(values, history)
            if found:
                return True
            if found is None:
                verdict = None
        return verdict

    return test


# The four comparisons are spelt out: one more call per row (operator.gt and the like)
# would cost as much as the comparison.


def _above(condition: Condition) -> Test:
    metric, number = condition.metric, condition.number

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        return None if value is None else value > number

    return test


def _at_least(condition: Condition) -> Test:
    metric, number = condition.metric, condition.number

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        return None if value is None else value >= number

    return test


def _below(condition: Condition) -> Test:
    metric, number = condition.metric, condition.number

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        return None if value is None else value < number

    return test


def _at_most(condition: Condition) -> Test:
    metric, number = condition.metric, condition.number

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        return None if value is None else value <= number

    return test


def _on_baseline(condition: Condition) -> Test:
    """Unknown in warm-up, and of a baseline of zero, of which anything is any number of times;
    of one below zero see :func:`times`."""
    metric, factor = condition.metric, condition.number
    above = condition.operator is Operator.ABOVE_BASELINE
    name = BaselineKey(condition.baseline_of, condition.baseline).name

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        if value is None:
            return None
        median = history.baselines[name].value
        if not median:
            return None
        bound = factor * median if median > 0.0 else times(factor, median)
        return value > bound if above else value < bound

    return test


def times(factor: float, baseline: float) -> float:
    """``factor`` times ``baseline``, seen from the baseline: factor - 1 of its size above it.

    That is the product for a baseline above zero. Twice a loss of -50 would be -100, and
    less; a loss that is as far above -50 as 2 is above 1 stands at 0.
    """
    return baseline + (factor - 1.0) * abs(baseline)


def _on_record(condition: Condition) -> Test:
    """Most values are within a scatter, where no record is exceeded: that is tried first."""
    metric, factor, hold = condition.metric, condition.number, condition.hold
    rising, below = condition.rising, condition.operator is Operator.BELOW_RECORD
    key, is_short = (metric, below), factor < 1.0

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        if value is None:
            return None
        excursions = history.excursions[key]
        edge = excursions.edge
        if edge is None:
            return None
        if not is_short and (value >= edge if below else value <= edge):
            return False
        bound = excursions.bound(hold, factor, rising=rising)
        assert bound is not None
        return value < bound if below else value > bound

    return test


def _on_peers(condition: Condition) -> Test:
    metric, factor = condition.metric, condition.number
    above = condition.operator is Operator.ABOVE_PEERS

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        others = history.peers.get(metric)
        if value is None or others is None or others < 0.0:
            return None
        return value > factor * others if above else value < factor * others

    return test


def _rises_by(condition: Condition) -> Test:
    metric, number = condition.metric, condition.number

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        previous = history.lasts[metric].value
        if value is None or previous is None:
            return None
        return value - previous >= number

    return test


def _unchanged_for(condition: Condition) -> Test:
    """Unknown while there were too few observations to say, all of them equal."""
    metric, needed = condition.metric, int(condition.number)

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        if value is None:
            return None
        last = history.lasts[metric]
        repeats = last.repeats + 1 if value == last.value else 1
        if repeats >= needed:
            return True
        return None if repeats > last.total else False

    return test


def _beyond_earlier(condition: Condition) -> Test:
    """The inertia is worked out at the end, as it costs as much as all rules at a step."""
    metric, needed = condition.metric, int(condition.number)
    below = condition.operator is Operator.FALLEN_FOR

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        earlier = history.earlier[metric]
        end = earlier.lower if below else earlier.upper
        if value is None or end is None:
            return None
        if value >= end if below else value <= end:
            return False
        count = 1 + (earlier.below if below else earlier.above)
        return count >= needed and count >= needed * earlier.inertia

    return test


def _nonfinite(condition: Condition) -> Test:
    """Frames hold finite values only, so a metric that is missing while some value of
    the step was not finite is taken to be that value."""
    metric = condition.metric

    def test(values: Values, history: History) -> Verdict:
        count = values.get("nonfinite")
        if metric == "nonfinite":
            return None if count is None else count > 0.0
        if metric in values:
            return False
        return True if count is not None and count > 0.0 else None

    return test


def _runs_out_within(condition: Condition) -> Test:
    metric, number = condition.metric, condition.number

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        return None if value is None else history.slopes[metric].within(value, number)

    return test


def _missing_for(condition: Condition) -> Test:
    """Unknown for what was never there: it may be that this run does not have it."""
    metric, needed = condition.metric, int(condition.number)

    def test(values: Values, history: History) -> Verdict:
        if metric in values:
            return False
        last = history.lasts[metric]
        return last.missed + 1 >= needed if last.total else None

    return test


_CONDITIONS: dict[Operator, Callable[[Condition], Test]] = {
    Operator.ABOVE: _above,
    Operator.AT_LEAST: _at_least,
    Operator.BELOW: _below,
    Operator.AT_MOST: _at_most,
    Operator.ABOVE_BASELINE: _on_baseline,
    Operator.BELOW_BASELINE: _on_baseline,
    Operator.ABOVE_RECORD: _on_record,
    Operator.BELOW_RECORD: _on_record,
    Operator.ABOVE_PEERS: _on_peers,
    Operator.BELOW_PEERS: _on_peers,
    Operator.RISES_BY: _rises_by,
    Operator.RISEN_FOR: _beyond_earlier,
    Operator.FALLEN_FOR: _beyond_earlier,
    Operator.UNCHANGED_FOR: _unchanged_for,
    Operator.RUNS_OUT_WITHIN: _runs_out_within,
    Operator.NONFINITE: _nonfinite,
    Operator.MISSING_FOR: _missing_for,
}
