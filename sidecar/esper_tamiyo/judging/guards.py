"""Bounds that a step, or an update, must cross before any rule can possibly fire.

A trainer waits for its answer, and nearly every step is healthy. Whether *no* rule can
be true is one comparison per metric, done in C over the row as it came; only a step that
crosses a bound is judged before it is answered, any other is judged right after. Guards
are necessary conditions, never sufficient ones: crossing one proves nothing.

The guards of updates, which go to the trainer, are made of the same parts
(:mod:`~esper_tamiyo.judging.update_guards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, nextafter
from operator import gt, itemgetter, lt

import msgspec

from esper_otel.leyline.custom import PREFIX, is_custom
from esper_otel.leyline.metrics import STEP_SLOT
from esper_tamiyo.judging.history import BaselineKey, History
from esper_tamiyo.judging.rules import times
from esper_tamiyo.language.operators import (
    FORMS,
    ON_BASELINES,
    ON_EARLIER,
    ON_RECORDS,
    Operator,
)
from esper_tamiyo.language.table import Combine, Condition, Group, Table

_FIXED = frozenset({Operator.ABOVE, Operator.AT_LEAST, Operator.BELOW, Operator.AT_MOST})

_EFFORT = {
    Operator.UNCHANGED_FOR: 2,
    Operator.MISSING_FOR: 3,
    Operator.ABOVE_PEERS: -1,
    Operator.BELOW_PEERS: -1,
}
"""How little, or at what cost, an operator guards; 0 for fixed bounds, else 1. A constant
learning rate is unchanged at every step. Peers are compared behind the answer, and unknown
to a rank that is alone: no row makes such a condition true."""


class GuardPlan(msgspec.Struct, frozen=True):
    """The guards of a table.

    Fixed bounds by metric, the conditions whose bounds follow the run, and those that are
    crossed by absence. ``custom`` conditions are on custom values, which are in no row.
    """

    upper: dict[str, float]
    lower: dict[str, float]
    moving: list[Condition]
    missing: list[Condition]
    custom: list[Condition] = []


def plan(table: Table) -> GuardPlan:
    """One condition of each rule's, or several, without which it cannot be true.

    Rules about seeds have no guards; a step with seeds needs them judged when there are
    such rules, and without seeds they are unknown. A silent rank is seen by no frame.
    """
    made = GuardPlan({}, {}, [], [])
    for rule in table.rules:
        if not rule.about_seeds and not rule.about_silence:
            for condition in needed(rule.when):
                if is_custom(condition.metric):
                    made.custom.append(condition)
                else:
                    add_guard(made, condition)
    return msgspec.structs.replace(made, moving=[*nearest(made.moving)])


def nearest(moving: Iterable[Condition]) -> tuple[Condition, ...]:
    """``moving``, but of several factors of one baseline, or of one record, the one that is
    crossed first."""
    found: dict[object, Condition] = {}
    for condition in moving:
        key: object = condition
        if condition.operator in ON_BASELINES or condition.operator in ON_RECORDS:
            key = msgspec.structs.replace(condition, number=0.0, release=None)
            others = [condition, *filter(None, [found.get(key)])]
            pick = max if condition.operator is Operator.BELOW_BASELINE else min
            condition = pick(others, key=lambda other: other.number)
        found[key] = condition
    return tuple(found.values())


def add_guard(made: GuardPlan, condition: Condition) -> None:
    """Have ``made`` guard ``condition``."""
    upper, lower = made.upper, made.lower
    metric, number = condition.metric, condition.number
    match condition.operator:
        case Operator.ABOVE:
            upper[metric] = min(number, upper.get(metric, inf))
        case Operator.AT_LEAST:
            upper[metric] = min(nextafter(number, -inf), upper.get(metric, inf))
        case Operator.BELOW:
            lower[metric] = max(number, lower.get(metric, -inf))
        case Operator.AT_MOST:
            lower[metric] = max(nextafter(number, inf), lower.get(metric, -inf))
        case Operator.NONFINITE:
            upper["nonfinite"] = min(0.0, upper.get("nonfinite", inf))
        case Operator.MISSING_FOR:
            made.missing.append(condition)
        case Operator.ABOVE_PEERS | Operator.BELOW_PEERS:
            pass
        case operator:
            made.moving.append(condition)
            if is_lower(operator):
                lower.setdefault(metric, -inf)
            else:
                upper.setdefault(metric, inf)


class AskGuards:
    """The guards of one rank, after what it has been through."""

    __slots__ = (
        "_custom_missing",
        "_due",
        "_fixed_lower",
        "_fixed_upper",
        "_history",
        "_lower",
        "_lower_of",
        "_missing",
        "_moving_lower",
        "_moving_upper",
        "_stale",
        "_upper",
        "_upper_of",
        "custom",
    )

    def __init__(self, plan: GuardPlan, history: History) -> None:
        self._history = history
        self._upper_of = _picker(plan.upper)
        self._lower_of = _picker(plan.lower) if plan.lower else None
        self._fixed_upper = [*plan.upper.values(), inf, inf]
        self._fixed_lower = [*plan.lower.values(), -inf, -inf]
        self._moving_upper = _placed(plan.upper, plan.moving, history, lower=False)
        self._moving_lower = _placed(plan.lower, plan.moving, history, lower=True)
        self._missing = plan.missing
        self._due: list[int] = []
        self.custom = frozenset(each.metric.removeprefix(PREFIX) for each in plan.custom)
        """Names of the custom values by which a step that has them may cross a bound."""
        self._custom_missing = [
            condition for condition in plan.custom if condition.operator is Operator.MISSING_FOR
        ]
        self.move_bounds()

    def crossed(self, row: Sequence[float]) -> bool:
        """Whether a rule might be true of a row in registry order; NaN crosses nothing."""
        if self._stale:
            return True
        if any(map(gt, self._upper_of(row), self._upper)):
            return True
        if self._lower_of is not None and any(map(lt, self._lower_of(row), self._lower)):
            return True
        return any(row[slot] != row[slot] for slot in self._due)

    def mark_stale(self) -> None:
        """Not to be trusted before :meth:`move_bounds`; spares it where nobody would look."""
        self._stale = True

    def move_bounds(self) -> None:
        """Move the bounds that depend on the past."""
        self._stale = False
        if self._custom_missing:  # no row shows whether they are missing
            self._stale = any(_is_due(each, self._history) for each in self._custom_missing)
        upper = self._upper = self._fixed_upper.copy()
        for place, bound in self._moving_upper:
            moved = bound()
            if moved < upper[place]:
                upper[place] = moved
        lower = self._lower = self._fixed_lower.copy()
        for place, bound in self._moving_lower:
            moved = bound()
            if moved > lower[place]:
                lower[place] = moved
        if self._missing:
            self._due = [
                STEP_SLOT[condition.metric]
                for condition in self._missing
                if _is_due(condition, self._history)
            ]


Bound = Callable[[], float]
"""Where a bound is now."""


def _picker(bounds: Mapping[str, float]) -> Callable[[Sequence[float]], Sequence[float]]:
    """Picks the guarded values out of a row; padded, as one alone would not be a tuple."""
    step = STEP_SLOT["step"]
    return itemgetter(*(STEP_SLOT[metric] for metric in bounds), step, step)


def _placed(
    bounds: Mapping[str, float],
    moving: Sequence[Condition],
    history: History,
    *,
    lower: bool,
) -> list[tuple[int, Bound]]:
    place = {metric: place for place, metric in enumerate(bounds)}
    return [
        (place[condition.metric], bound_of(condition, history))
        for condition in moving
        if is_lower(condition.operator) is lower
    ]


def is_lower(operator: Operator) -> bool:
    """Whether values *below* the bound cross it."""
    below = (Operator.BELOW_RECORD, Operator.FALLEN_FOR)
    return operator in below or (FORMS[operator].eases > 0)


def bound_of(condition: Condition, history: History) -> Bound:
    """Where the bound of a condition is that follows the run; infinite where it cannot hold."""
    metric, number = condition.metric, condition.number
    if condition.operator is Operator.RUNS_OUT_WITHIN:
        slope = history.slopes[metric]
        return lambda: -inf if slope.oldest is None else slope.oldest  # only what falls
    if condition.operator is Operator.RISES_BY:
        last = history.lasts[metric]
        return lambda: inf if last.value is None else last.value
    if condition.operator is Operator.UNCHANGED_FOR:
        last = history.lasts[metric]
        return lambda: -inf if last.repeats + 1 >= number else inf
    if condition.operator in ON_RECORDS:
        return _record_bound(condition, history)
    if condition.operator in ON_EARLIER:
        return _earlier_bound(condition, history)
    name = BaselineKey(condition.baseline_of, condition.baseline).name
    reference = history.baselines[name]
    never = -inf if is_lower(condition.operator) else inf

    def bound() -> float:
        median = reference.value
        if not median:
            return never
        return number * median if median > 0.0 else times(number, median)

    return bound


def _record_bound(condition: Condition, history: History) -> Bound:
    hold, factor, rising = condition.hold, condition.number, condition.rising
    below = condition.operator is Operator.BELOW_RECORD
    excursions = history.excursions[condition.metric, below]
    never = -inf if below else inf
    version, moved = -1, never

    def bound() -> float:
        nonlocal version, moved
        if excursions.version != version:
            version = excursions.version
            found = excursions.bound(hold, factor, rising=rising)
            moved = never if found is None else found
        return moved

    return bound


def _earlier_bound(condition: Condition, history: History) -> Bound:
    """Where the last of the observations in a row has to be; nowhere while others lack."""
    earlier, others = history.earlier[condition.metric], condition.number - 1

    def above() -> float:
        end = earlier.upper
        return inf if end is None or earlier.above < others else end

    def below() -> float:
        end = earlier.lower
        return -inf if end is None or earlier.below < others else end

    return below if is_lower(condition.operator) else above


def _is_due(condition: Condition, history: History) -> bool:
    last = history.lasts[condition.metric]
    return bool(last.total) and last.missed + 1 >= condition.number


def needed(
    when: Condition | Group, usable: Callable[[Condition], bool] = lambda condition: True
) -> list[Condition]:
    """Conditions of which at least one holds whenever ``when`` does; empty where ``usable``
    ones do not suffice for that."""
    if isinstance(when, Condition):
        return [when] if usable(when) else []
    found = [needed(part, usable) for part in when.parts]
    if when.combine is Combine.ANY:
        return [condition for part in found for condition in part] if all(found) else []
    return min(filter(None, found), key=_effort, default=[])  # any part of an "all" would do


def _effort(part: list[Condition]) -> int:
    return max(_effort_of(condition) for condition in part)


def _effort_of(condition: Condition) -> int:
    operator, number = condition.operator, condition.number
    if operator in (Operator.ABOVE, Operator.AT_LEAST) and number <= 0.0:
        return 4  # most metrics are above zero at every step
    if operator in _FIXED:
        return 0
    if (operator is Operator.ABOVE_BASELINE and number < 1.0) or (
        operator is Operator.BELOW_BASELINE and number > 1.0
    ):
        return 5  # what is usual is beyond it: nearly every step would be judged first
    return _EFFORT.get(operator, 1)
