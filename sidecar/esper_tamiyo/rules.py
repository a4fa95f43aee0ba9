"""Rules as pure functions of (values, history): true, false or unknown.

A missing value makes a condition unknown, never false, because false would mean healthy.
Groups combine the three values as Kleene's logic does. Rows are compiled once into
closures, so that judging a step costs a dictionary look-up and a comparison per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from esper_otel.leyline.decisions import FORCE, RANK_OF, Finding
from esper_otel.leyline.metrics import BY_KEY, Scope
from esper_tamiyo.history import History, Watched
from esper_tamiyo.table import Combine, Condition, Group, Operator, Rule, Table, conditions

Verdict = bool | None
"""None is unknown."""

Values = Mapping[str, float]
Test = Callable[[Values, History], Verdict]


class CompiledRule(msgspec.Struct, frozen=True):
    """A row ready to run; ``weight`` orders rules by force, then severity."""

    rule: Rule
    test: Test
    about_seeds: bool
    weight: tuple[int, int]

    def finding(self, values: Values, history: History, seed_id: str | None) -> Finding:
        """What the rule saw when it fired."""
        rule = self.rule
        seen = seen_by(rule, values, history)
        return Finding(rule.id, rule.action, rule.severity, rule.text, seen, seed_id)


def compiled(table: Table) -> tuple[CompiledRule, ...]:
    """The rules of ``table`` in its order."""
    return tuple(
        CompiledRule(
            rule=rule,
            test=test_of(rule.when),
            about_seeds=rule.about_seeds,
            weight=(FORCE[rule.action], RANK_OF[rule.severity]),
        )
        for rule in table.rules
    )


def watched(table: Table, scope: Scope) -> Watched:
    """The metrics of ``scope`` whose past the rules of ``table`` need."""
    medians: dict[str, None] = {}
    lasts: dict[str, None] = {}
    for rule in table.rules:
        for condition in conditions(rule.when):
            if condition.operator is Operator.ABOVE_BASELINE:
                medians[condition.baseline_of] = None
            elif condition.operator in (Operator.RISES_BY, Operator.UNCHANGED_FOR):
                lasts[condition.metric] = None
    return Watched(
        medians=tuple(key for key in medians if BY_KEY[key].scope == scope),
        lasts=tuple(key for key in lasts if BY_KEY[key].scope == scope),
        window=table.baseline.window,
        warmup=table.baseline.warmup,
    )


def seen_by(rule: Rule, values: Values, history: History) -> dict[str, float]:
    """The values behind a verdict; ``baseline(key)`` and ``previous(key)`` where used."""
    seen: dict[str, float] = {}
    for condition in conditions(rule.when):
        also = ("nonfinite",) if condition.operator is Operator.NONFINITE else ()
        for key in (condition.metric, *also):
            value = values.get(key)
            if value is not None:
                seen[key] = value
        if condition.operator is Operator.ABOVE_BASELINE:
            median = history.medians[condition.baseline_of].median()
            if median is not None:
                seen[f"baseline({condition.baseline_of})"] = median
        elif condition.operator is Operator.RISES_BY:
            previous = history.lasts[condition.metric].value
            if previous is not None:
                seen[f"previous({condition.metric})"] = previous
    return seen


def test_of(when: Condition | Group) -> Test:
    """The test of a condition or group."""
    if isinstance(when, Condition):
        return _CONDITIONS[when.operator](when)
    parts = tuple(test_of(part) for part in when.parts)
    return _every(parts) if when.combine is Combine.ALL else _some(parts)


def _every(parts: tuple[Test, ...]) -> Test:
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


def _above_baseline(condition: Condition) -> Test:
    """Unknown in warm-up, and below zero, where "so many times" has no meaning."""
    metric, factor, whose = condition.metric, condition.number, condition.baseline_of

    def test(values: Values, history: History) -> Verdict:
        value = values.get(metric)
        if value is None:
            return None
        median = history.medians[whose].median()
        if median is None or median < 0.0:
            return None
        return value > factor * median

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


_CONDITIONS: dict[Operator, Callable[[Condition], Test]] = {
    Operator.ABOVE: _above,
    Operator.AT_LEAST: _at_least,
    Operator.BELOW: _below,
    Operator.AT_MOST: _at_most,
    Operator.ABOVE_BASELINE: _above_baseline,
    Operator.RISES_BY: _rises_by,
    Operator.UNCHANGED_FOR: _unchanged_for,
    Operator.NONFINITE: _nonfinite,
}
