"""Finds unreachable, always-inhibited and never-resolving rules, and no-op inhibitions.

Also what is asked of an update by a rule that no update is ever checked by.

Such a table is well-formed and does what it says, so it is not refused; but nobody means
it. ``tamiyo check`` reports what is found here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, product
from math import ceil, floor, inf, nextafter
from typing import NamedTuple

from esper_otel.leyline.decisions import MAX_NORM, MOMENTUM_SCALE, SKIP_STEP
from esper_otel.leyline.metrics import Metric
from esper_otel.leyline.wire import GUARDED
from esper_tamiyo.language.derived import KNOWN, metric_of
from esper_tamiyo.language.operators import FORMS, ON_RECORDS, BaselineKind, Operand, Operator
from esper_tamiyo.language.parameters import USUAL_MOMENTUM, USUAL_NORM
from esper_tamiyo.language.table import (
    Combine,
    Condition,
    Group,
    Rule,
    RuleMode,
    Table,
    conditions,
    eased,
    is_guarded,
)

MAX_WAYS = 1024
"""Ways in which one rule may come true that are looked at; one with more is passed over."""
MAX_WAYS_OF_TABLE = 16_384
"""Ways of all rules of a table; rules behind that are passed over."""

_COUNTS = frozenset({"{flag}", "{state}", "{step}", "{violation}", "{value}", "{seed}"})
_LIMITS: dict[str, tuple[float, float]] = {
    "%": (0.0, 100.0),
    "{flag}": (0.0, 1.0),
    "{state}": (0.0, 11.0),
    **dict.fromkeys(("ms", "GBy", "{sample}/s", "{grad}"), (0.0, inf)),
    **dict.fromkeys(("{step}", "{violation}", "{value}", "{seed}"), (0.0, inf)),
    **dict.fromkeys(("accuracy", "grad_conflict_rate", "optimizer_momentum"), (0.0, 1.0)),
    **dict.fromkeys(("grad_var", "loss_volatility", "optimizer_lr"), (0.0, inf)),
    "kasmina.seed.alpha": (0.0, 1.0),
    "kasmina.seed.isolation.cosine": (-1.0, 1.0),
}
"""What values can be, by key or else by unit; anything where neither is named."""


class Doubt(NamedTuple):
    """One rule and what is odd about it."""

    rule: str
    message: str


class Span(NamedTuple):
    """Numbers from ``low`` to ``high``, both included; none when they are crossed."""

    low: float
    high: float

    def within(self, other: Span) -> Span:
        """What both have in common."""
        return Span(max(self.low, other.low), min(self.high, other.high))

    @property
    def empty(self) -> bool:
        """Whether no number is left."""
        return self.low > self.high


def doubts(table: Table) -> list[Doubt]:
    """All that is odd, in the order of the table."""
    by_id = {rule.id: rule for rule in table.rules}
    inhibitors: dict[str, list[Rule]] = {}
    for rule in table.rules:
        if rule.mode is RuleMode.ACT:
            for name in rule.inhibits:
                inhibitors.setdefault(name, []).append(rule)
    ways = _WaysLeft(MAX_WAYS_OF_TABLE)
    return [
        Doubt(rule.id, message)
        for rule in table.rules
        for message in (
            *_never_fires(rule, ways),
            *_never_ends(rule),
            *_never_asked(rule),
            *_norm_unknown(rule),
            *(
                f"inhibits {name} without effect: that rule fires while no data arrives, "
                "beside any other"
                for name in rule.inhibits
                if name in by_id and by_id[name].about_silence
            ),
            *(
                f"is always inhibited: each time it fires, {by.id} fires too and inhibits it"
                for by in inhibitors.get(rule.id, ())
                if _implies(rule, by)
            ),
        )
    ]


def limits(metric: Metric) -> Span:
    """What values of ``metric`` can be."""
    return Span(*_LIMITS.get(metric.key, _LIMITS.get(metric.unit, (-inf, inf))))


def _metric(key: str) -> Metric:
    """What a checked table means by ``key``."""
    metric = metric_of(key)
    assert metric is not None
    return metric


class _WaysLeft:
    """How many ways of rules are still looked at."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, rule: Rule) -> list[tuple[Condition, ...]]:
        """All ways in which ``rule`` may come true; none when there are too many."""
        most = min(MAX_WAYS, self._left)
        ways = list(islice(_ways(rule.when), most + 1))
        self._left -= min(len(ways), most)
        return ways if len(ways) <= most else []


def _never_fires(rule: Rule, left: _WaysLeft) -> Iterator[str]:
    """One message when no way is left, else one for each part that cannot hold."""
    ways = left.take(rule)
    if not ways:
        return
    reasons = [_impossible(way) for way in ways]
    if all(reasons):
        yield f"can never fire: {reasons[0]}"
        return
    if len(reasons) > 1:
        for reason in dict.fromkeys(filter(None, reasons)):
            yield f"has a part that can never hold: {reason}"
    times = sum(_times(way) for way, reason in zip(ways, reasons, strict=True) if not reason)
    if times < rule.persistence:
        asked = rule.persistence
        yield f"can never fire: it holds at {times:g} steps at most, and for asks for {asked}"


def _never_ends(rule: Rule) -> Iterator[str]:
    easier = eased(rule.when)
    if not isinstance(easier, Condition) or FORMS[easier.operator].operand is not Operand.BOUND:
        return
    everything = limits(_metric(easier.metric))
    if _holds(easier).within(everything) == everything:
        yield (
            f"can never end: {easier.metric} lies {_range(everything)}, so it is "
            f"always {easier.operator.value.replace('_', ' ')} {easier.number:g}, its release"
        )


def _never_asked(rule: Rule) -> Iterator[str]:
    """Whether it asks something of updates that is decided before they are made, when it is
    only judged after them."""
    only_before = (MAX_NORM, USUAL_NORM, MOMENTUM_SCALE, USUAL_MOMENTUM, SKIP_STEP)
    asked = [name for name in only_before if name in rule.parameters]
    if not asked:
        return
    if rule.downgrade or rule.about_seeds or rule.about_ranks:
        why = (
            "counts only beside a proposal"
            if rule.downgrade
            else f"is about {'seeds' if rule.about_seeds else 'other ranks'}"
        )
    elif not any(is_guarded(part) for part in conditions(rule.when)):
        why = f"has no condition on {', '.join(GUARDED[:-1])} or {GUARDED[-1]}"
    else:
        return
    for name in asked:
        yield f"asks for {name} without effect: no update is checked by a rule that {why}"


def _norm_unknown(rule: Rule) -> Iterator[str]:
    """Whether it asks for the usual norm without a condition that tells it."""
    if USUAL_NORM in rule.parameters and not any(
        part.metric == "gradient_norm"
        and part.operator in (Operator.ABOVE_RECORD, Operator.ABOVE_BASELINE)
        for part in conditions(rule.when)
    ):
        yield (
            f"asks for {USUAL_NORM} without effect: no condition uses the record or baseline "
            "of gradient_norm"
        )


def _ways(when: Condition | Group) -> Iterator[tuple[Condition, ...]]:
    """Sets of conditions, any one of which makes ``when`` true when all of it holds."""
    if isinstance(when, Condition):
        yield (when,)
    elif when.combine is Combine.ANY:
        for part in when.parts:
            yield from _ways(part)
    else:
        for choice in product(*(list(islice(_ways(part), MAX_WAYS)) for part in when.parts)):
            yield tuple(condition for part in choice for condition in part)


def _times(way: Iterable[Condition]) -> float:
    """How often all of ``way`` can hold: no step comes twice."""
    steps = limits(KNOWN["step"])
    for condition in way:
        if condition.metric == "step":
            steps = steps.within(_holds(condition))
    low, high = _whole(steps, KNOWN["step"])
    return high - low + 1


def _impossible(way: tuple[Condition, ...]) -> str:
    """Why all of ``way`` cannot hold at once; empty when it can."""
    return _out_of_bounds(way) or _at_odds(way) or _factors_at_odds(way)


def _out_of_bounds(way: Iterable[Condition]) -> str:
    """Why no value is as ``way`` asks, as far as fixed numbers tell."""
    left: dict[str, Span] = {}
    asked: dict[str, list[Condition]] = {}
    for condition in way:
        key = condition.metric
        everything = limits(_metric(key))
        if key == "step" and condition.operator is Operator.UNCHANGED_FOR:
            return "no step comes twice"
        if key == "step" and condition.operator is Operator.NONFINITE:
            return "every step has its number"
        if condition.operator is Operator.RISES_BY and (
            condition.number > everything.high - everything.low
        ):
            return f"{key} lies {_range(everything)}, and cannot rise by {condition.number:g}"
        span = _holds(condition).within(left.get(key, everything))
        others = asked.setdefault(key, [])
        others.append(condition)
        if _whole(span, _metric(key)).empty:
            if len(others) == 1:
                return f"{key} lies {_range(everything)}, and is never {_said(condition)}"
            return _not_at_once(key, others)
        left[key] = span
    return ""


def _at_odds(way: Iterable[Condition]) -> str:
    """Why the operators of ``way`` exclude each other."""
    asked: dict[str, list[Condition]] = {}
    for condition in way:
        asked.setdefault(condition.metric, []).append(condition)
    for key, others in asked.items():
        absent = [condition for condition in others if _is_absence(condition)]
        operators = {condition.operator for condition in others}
        if 0 < len(absent) < len(others):
            return _not_at_once(key, others)
        if operators >= {Operator.RISES_BY, Operator.UNCHANGED_FOR}:
            return _not_at_once(key, others)
    return ""


def _factors_at_odds(way: Iterable[Condition]) -> str:
    """Why no value is so many times the same reference, which is never below zero."""
    asked: dict[tuple[str, str, BaselineKind], list[Condition]] = {}
    for condition in way:
        if condition.operator not in ON_RECORDS and (
            FORMS[condition.operator].operand is Operand.FACTOR
        ):
            reference = condition.metric, condition.baseline_of, condition.baseline
            asked.setdefault(reference, []).append(condition)
    for (key, _, _), others in asked.items():
        above = [other.number for other in others if FORMS[other.operator].eases < 0]
        below = [other.number for other in others if FORMS[other.operator].eases > 0]
        if above and below and max(above) >= min(below):
            return _not_at_once(key, others)
    return ""


def _not_at_once(key: str, conditions: Iterable[Condition]) -> str:
    return f"{key} cannot be {' and '.join(map(_said, conditions))} at once"


def _is_absence(condition: Condition) -> bool:
    """Whether it holds only of a metric that has no value; ``nonfinite`` counts the others."""
    if condition.operator is Operator.NONFINITE:
        return condition.metric != "nonfinite"
    return condition.operator is Operator.MISSING_FOR


def _implies(rule: Rule, by: Rule) -> bool:
    """Whether ``by`` fires whenever ``rule`` does, as far as one condition tells."""
    condition = by.when
    if not isinstance(condition, Condition) or by.about_seeds != rule.about_seeds:
        return False
    if (by.persistence, by.of) != (rule.persistence, rule.of):
        return False
    if any(part.release is not None for part in conditions(rule.when)):
        return False  # it goes on when the other may have ended
    return _is_as_strict(rule.when, condition)


def _is_as_strict(when: Condition | Group, other: Condition) -> bool:
    """Whether each way in which ``when`` comes true has a condition as strict as ``other``."""
    if isinstance(when, Condition):
        return _as_strict(when, other)
    joined = any if when.combine is Combine.ALL else all
    return joined(_is_as_strict(part, other) for part in when.parts)


def _as_strict(part: Condition, other: Condition) -> bool:
    """Whether ``other`` holds whenever ``part`` does."""
    if (part.metric, part.baseline_of, part.baseline) != (
        other.metric,
        other.baseline_of,
        other.baseline,
    ) or (other.rising and not part.rising):
        return False
    if Operand.BOUND is FORMS[part.operator].operand is FORMS[other.operator].operand:
        return _holds(part).within(_holds(other)) == _holds(part)
    if part.operator is not other.operator:
        return False
    if FORMS[part.operator].eases:
        return (part.number - other.number) * FORMS[part.operator].eases <= 0
    return part.number >= other.number


def _holds(condition: Condition) -> Span:
    """The values for which a condition with a fixed bound holds; else all."""
    number = condition.number
    match condition.operator:
        case Operator.ABOVE:
            return Span(nextafter(number, inf), inf)
        case Operator.AT_LEAST:
            return Span(number, inf)
        case Operator.BELOW:
            return Span(-inf, nextafter(number, -inf))
        case Operator.AT_MOST:
            return Span(-inf, number)
        case Operator.NONFINITE if condition.metric == "nonfinite":
            return Span(nextafter(0.0, inf), inf)
        case _:
            return Span(-inf, inf)


def _whole(span: Span, metric: Metric) -> Span:
    """What is left of ``span`` where only whole numbers count."""
    if metric.unit not in _COUNTS or span.empty:
        return span
    low = span.low if span.low == -inf else ceil(span.low)
    return Span(low, span.high if span.high == inf else floor(span.high))


def _said(condition: Condition) -> str:
    if condition.operator is Operator.NONFINITE:
        return "not finite" if _is_absence(condition) else "above 0"
    return str(condition).removeprefix(f"{condition.metric} ")


def _range(span: Span) -> str:
    if span.high == inf:
        return f"at or above {span.low:g}"
    return f"from {span.low:g} to {span.high:g}"
