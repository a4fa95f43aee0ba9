"""Expectations: the normal range of a rule when it fired, and the smallest change to pass it.

Both are made of the values that the finding saw and of the rule's condition, as the journal
has them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from math import ceil, floor, log10
from pathlib import Path

import msgspec

from esper_otel.leyline.decisions import Action
from esper_tamiyo.journaling.entries import Found, RuleText, TableInUse
from esper_tamiyo.journaling.lines import QUANTITIES, seen_beside
from esper_tamiyo.judging.history import BaselineKey
from esper_tamiyo.judging.rules import times
from esper_tamiyo.language.operators import (
    FORMS,
    ON_BASELINES,
    ON_PEERS,
    ON_RECORDS,
    BaselineKind,
    Operand,
    Operator,
)
from esper_tamiyo.language.table import Combine, Condition, Group
from esper_tamiyo.language.table_file import shipped_tables

Values = Mapping[str, float]

_ROUNDING = 1e-9

_LIMITS = {
    Operator.ABOVE: "at most",
    Operator.AT_LEAST: "below",
    Operator.BELOW: "at least",
    Operator.AT_MOST: "above",
    Operator.ABOVE_BASELINE: "at most",
    Operator.BELOW_BASELINE: "at least",
    Operator.ABOVE_RECORD: "at most",
    Operator.BELOW_RECORD: "at least",
    Operator.ABOVE_PEERS: "at most",
    Operator.BELOW_PEERS: "at least",
    Operator.RISES_BY: "below",
}
"""How the bound of an operator is told: on which side of it a value is expected."""


def expected(when: Condition | Group, values: Values, table: TableInUse) -> Iterator[str]:
    """A sentence for each condition that held: the value, and what was expected of it."""
    if isinstance(when, Group):
        for part in when.parts:
            yield from expected(part, values, table)
        return
    sentence = _sentence(when, values, table)
    if sentence:
        yield sentence


def if_false_alarm(found: Found, rule: RuleText, table: TableInUse, run: str) -> Iterator[str]:
    """What to change where it was one: a table, or a command for this run alone."""
    what, lines = _remedy(found, rule)
    yield f"If that was a false alarm, a table with these lines {what}:"
    yield from (f"  {line}" for line in (f"extends: {_base(table)}", *lines))
    yield "or, for this run alone and while it runs, say:"
    yield f"  tamiyo silence {shlex.quote(run)} {found.rule}"


def _remedy(found: Found, rule: RuleText) -> tuple[str, list[str]]:
    """What a table does about a rule, and its lines."""
    easier = None if rule.condition is None else passing(rule.condition, found.values)
    if easier is not None:
        fields = [f"    {line}" for line in as_yaml(easier)]
        return "lets it pass", ["rules:", f"  - id: {found.rule}", *fields]
    if found.action is Action.CONTINUE:
        return "is without it", [f"remove: [{found.rule}]"]
    return "only reports it", ["rules:", f"  - id: {found.rule}", "    mode: observe"]


def _base(table: TableInUse) -> str:
    """The table to extend, as that which decided names it."""
    shipped = shipped_tables()
    if table.source:
        return table.source if table.source in shipped else Path(table.source).name
    named = (name for name in shipped if table.version.startswith(f"{name}-"))
    return next(named, "TABLE.yaml")


def passing(when: Condition | Group, values: Values) -> Condition | Group | None:
    """``when`` with numbers by which it would not have held; None where no number does that.

    Of conditions that all have to hold only one is changed, the one that takes least.
    """
    found = _eased(when, values)
    return None if found is None else found[0]


def as_yaml(when: Condition | Group) -> Iterator[str]:
    """The fields of a condition or group, as a rule of a table has them: one a line."""
    if isinstance(when, Group):
        yield f"{when.combine}: [{', '.join(map(_flow, when.parts))}]"
    else:
        yield from (f"{name}: {value}" for name, value in _fields(when))


def _sentence(condition: Condition, values: Values, table: TableInUse) -> str:
    """Nothing for a condition that did not hold, or of which the values do not tell."""
    metric, number = condition.metric, condition.number
    match condition.operator:
        case Operator.NONFINITE:
            count = values.get("nonfinite", 0.0)
            if metric == "nonfinite":
                return f"{count:g} values of the step not finite, expected none"
            return f"{metric} not finite, expected a number"
        case Operator.MISSING_FOR if "silent(s)" in values:
            silent_s = values["silent(s)"]
            within = f"{number:g} of its step times"
            return f"nothing came for {silent_s:.3g} s, expected a step within {within}"
        case Operator.MISSING_FOR if f"missing({metric})" in values:
            missed = values[f"missing({metric})"]
            return f"{metric} missing for {missed:g} steps, expected to come within {number:g}"
    value = values.get(metric)
    if value is None:
        return ""
    head = f"{metric} {value:.4g}, expected"
    match condition.operator:
        case Operator.UNCHANGED_FOR:
            return f"{head} to change within {number:g} observations"
        case Operator.RISEN_FOR | Operator.FALLEN_FOR:
            above = condition.operator is Operator.RISEN_FOR
            end = values.get(f"{'upper' if above else 'lower'}({metric})")
            side = "at most" if above else "at least"
            told = "" if end is None else f" {side} {end:.4g}"
            return f"{head}{told} within {number:g} observations: what it was before"
        case Operator.RUNS_OUT_WITHIN:
            left = values.get(f"left({metric})")
            told = "" if left is None else f": at its slope {left:.3g} are left"
            return f"{head} to last more than {number:g} observations{told}"
    beside = "".join(f"; {told}" for told in _beside(metric, values))
    return f"{head} {limit}{beside}" if (limit := _limit(condition, values, table)) else ""


def _limit(condition: Condition, values: Values, table: TableInUse) -> str:
    """What was expected of the value of a condition that compares it, and why."""
    value = values[condition.metric]
    if condition.operator not in _LIMITS:  # what it expected is among what it saw
        bound = values.get(f"expected({condition.metric})")
        if bound is None:
            return f"otherwise: it is {str(condition).removeprefix(condition.metric).strip()}"
        return f"at {'most' if value > bound else 'least'} {bound:.4g}"
    for number, released in ((condition.number, False), (condition.release, True)):
        bound = None if number is None else _bound(condition, number, values)
        if number is not None and bound is not None and _holds(condition, value, bound):
            why = _why(condition, number, values, table)
            also = ", the release" if released else ""
            return f"{_LIMITS[condition.operator]} {bound:.4g}{why}{also}"
    return ""


def _reference(condition: Condition, values: Values) -> float | None:
    """What the number of a condition is a factor of, or an amount above."""
    if condition.operator in ON_BASELINES:
        return values.get(BaselineKey(condition.baseline_of, condition.baseline).name)
    what = "peers" if condition.operator in ON_PEERS else "previous"
    return values.get(f"{what}({condition.metric})")


def _bound(condition: Condition, number: float, values: Values) -> float | None:
    """The value that fires the rule, or beyond which a value does; None where unknown."""
    if FORMS[condition.operator].operand is Operand.BOUND:
        return number
    if condition.operator in ON_RECORDS:
        ordinary = _ordinary(condition, values)
        return None if ordinary is None else ordinary[0] + number * ordinary[1]
    reference = _reference(condition, values)
    if reference is None:
        return None
    if condition.operator is Operator.RISES_BY:
        return reference + number
    return number * reference if reference >= 0.0 else times(number, reference)


def _ordinary(condition: Condition, values: Values) -> tuple[float, float] | None:
    """The level of a metric, and how far from it its record explains."""
    level = values.get(f"level({condition.metric})")
    bound = values.get(f"expected({condition.metric})")
    if level is None or bound is None or bound == level:
        return None
    return level, bound - level


def _holds(condition: Condition, value: float, bound: float) -> bool:
    if condition.operator in (Operator.AT_LEAST, Operator.RISES_BY):
        return value >= bound
    if condition.operator is Operator.AT_MOST:
        return value <= bound
    if FORMS[condition.operator].eases > 0 or condition.operator is Operator.BELOW_RECORD:
        return value < bound
    return value > bound


def _why(condition: Condition, number: float, values: Values, table: TableInUse) -> str:
    """Where a bound comes from."""
    if condition.operator in ON_RECORDS:
        return f": {number:g} × its record"
    reference = _reference(condition, values)
    if reference is None:
        return ""
    if condition.operator is Operator.RISES_BY:
        return f": {number:g} above the {reference:.4g} of before"
    if condition.operator in ON_PEERS:
        at = f" at step {values['step']:g}" if "step" in values else ""
        return f": {number:g} × the {reference:.4g} of the other ranks{at}"
    own = condition.baseline_of == condition.metric
    baseline = f"its baseline of {reference:.4g}"
    if not own:
        baseline = f"{reference:.4g}, the baseline of {condition.baseline_of}"
    kind = _kind(condition.baseline, table.window)
    if reference < 0.0:  # of it a factor would be less
        side = "above" if number >= 1.0 else "below"
        return f": {abs(number - 1.0):g} times its size {side} {baseline} ({kind})"
    return f": {number:g} × {baseline} ({kind})"


def _kind(kind: BaselineKind, window: int) -> str:
    last = f"of the last {window}" if window else ""
    return {
        BaselineKind.ROLLING: f"rolling median {last}".strip(),
        BaselineKind.FROZEN: f"median of the first {window or ''}".strip(),
        BaselineKind.LOWEST: f"lowest rolling median {last} so far".replace("  ", " "),
        BaselineKind.HIGHEST: f"highest rolling median {last} so far".replace("  ", " "),
    }.get(kind, f"{kind} baseline")


def _beside(metric: str, values: Values) -> Iterator[str]:
    """What else the rule knew of the past of ``metric``."""
    for word, value in seen_beside(metric, values):
        if word != "expected":
            yield f"{QUANTITIES.get(word, word)} {value:.4g}"


def _eased(when: Condition | Group, values: Values) -> tuple[Condition | Group, float] | None:
    """:func:`passing`, and how far numbers were moved, relative to what they were."""
    if isinstance(when, Condition):
        number = _passing_number(when, values)
        if number is None:
            return None
        way = abs(number - when.number) / (abs(when.number) or 1.0)
        return msgspec.structs.replace(when, number=number), way
    found = [_eased(part, values) if _held(part, values) else None for part in when.parts]
    parts = list(when.parts)
    if when.combine is Combine.ALL:
        ways = {place: one[1] for place, one in enumerate(found) if one is not None}
        if not ways:
            return None
        changed = {min(ways, key=lambda place: ways[place])}
    else:
        changed = {place for place, part in enumerate(parts) if _held(part, values)}
    total = 0.0
    for place in changed:
        one = found[place]
        if one is None:
            return None
        parts[place], way = one
        total += way
    return (Group(when.combine, tuple(parts)), total) if changed else None


def _held(when: Condition | Group, values: Values) -> bool:
    """Whether it held, as far as the values tell; so where they do not."""
    if isinstance(when, Group):
        held = [_held(part, values) for part in when.parts]
        return all(held) if when.combine is Combine.ALL else any(held)
    value = values.get(when.metric)
    if when.operator is Operator.NONFINITE or when.operator is Operator.MISSING_FOR:
        return value is None or when.metric == "nonfinite"
    if value is None or when.operator not in _LIMITS:
        return value is not None
    bound = _bound(when, when.number, values)
    return bound is not None and _holds(when, value, bound)


def _passing_number(condition: Condition, values: Values) -> float | None:
    """The nearest number of two digits by which it would not have held."""
    value = values.get(condition.metric)
    if value is None or condition.operator not in _LIMITS:
        return None
    exact: float | None = value
    reference = _reference(condition, values)
    if condition.operator in ON_RECORDS:
        ordinary = _ordinary(condition, values)
        exact = None if ordinary is None else (value - ordinary[0]) / ordinary[1]
    elif condition.operator is Operator.RISES_BY:
        exact = None if reference is None else value - reference
    elif FORMS[condition.operator].operand is Operand.FACTOR:
        exact = 1.0 + (value - reference) / abs(reference) if reference else None
    if not exact or (exact < 0.0 and FORMS[condition.operator].operand is not Operand.BOUND):
        return None
    up = FORMS[condition.operator].eases <= 0
    unit = 10.0 ** (floor(log10(abs(exact))) - 1)
    scaled = exact / unit
    digits = ceil(scaled - _ROUNDING) if up else floor(scaled + _ROUNDING)
    for _ in range(3):
        number = float(f"{digits * unit:.12g}")
        bound = _bound(condition, number, values)
        if condition.operator is Operator.RISES_BY and reference is not None:
            if value - reference < number:  # as rules have it: a sum is rounded otherwise
                return number
        elif bound is not None and not _holds(condition, value, bound):
            return number
        digits += 1 if up else -1
    return None


def _flow(part: Condition | Group) -> str:
    return f"{{{', '.join(as_yaml(part))}}}"


_SAID = ("metric", "operator", "number", "hold")
"""Fields that are not written as themselves; ``hold`` is its rule's ``for`` and ``of``."""


def _fields(condition: Condition) -> Iterator[tuple[str, str]]:
    """The fields of a condition that are not what they are by default."""
    is_flag = FORMS[condition.operator].operand is Operand.FLAG
    yield "metric", condition.metric
    yield condition.operator.value, "true" if is_flag else _plain(condition.number)
    for field in msgspec.structs.fields(Condition):
        value = getattr(condition, field.name)
        is_said = field.name in _SAID or value == field.default
        if not is_said and not (field.name == "baseline_of" and value == condition.metric):
            yield (
                field.encode_name,
                _plain(value) if isinstance(value, float) else str(value).lower(),
            )


def _plain(number: float) -> str:
    return f"{number:.12g}"
