"""Bounds that a step must cross before any rule can possibly fire.

A trainer waits for its answer, and nearly every step is healthy. Whether *no* rule can
be true is one comparison per metric, done in C over the row as it came; only a step that
crosses a bound is judged before it is answered, any other is judged right after. Guards
are necessary conditions, never sufficient ones: crossing one proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, nextafter
from operator import gt, itemgetter, lt

import msgspec

from esper_otel.leyline.metrics import STEP_SLOT
from esper_tamiyo.history import History
from esper_tamiyo.table import Combine, Condition, Group, Operator, Table


class GuardPlan(msgspec.Struct, frozen=True):
    """The guards of a table: fixed bounds by metric, and those that follow the run."""

    upper: dict[str, float]
    lower: dict[str, float]
    moving: list[Condition]


def plan(table: Table) -> GuardPlan:
    """One condition of each rule's, or several, without which it cannot be true.

    Rules about seeds have no guards; a step with seeds needs them judged when there are
    such rules, and without seeds they are unknown.
    """
    upper: dict[str, float] = {}
    lower: dict[str, float] = {}
    moving: list[Condition] = []
    for rule in table.rules:
        if rule.about_seeds:
            continue
        for condition in _needed(rule.when):
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
                case _:
                    moving.append(condition)
                    upper.setdefault(metric, inf)
    return GuardPlan(upper, lower, moving)


class Guards:
    """The guards of one rank, after what it has been through."""

    __slots__ = ("_fixed", "_lower", "_lower_of", "_moving", "_upper", "_upper_of")

    def __init__(self, plan: GuardPlan) -> None:
        self._upper_of = _picker(plan.upper)
        self._lower_of = _picker(plan.lower)
        self._fixed = [*plan.upper.values(), inf, inf]
        self._upper = self._fixed
        self._lower = [*plan.lower.values(), -inf, -inf] if plan.lower else None
        place = {metric: place for place, metric in enumerate(plan.upper)}
        self._moving = [(place[condition.metric], condition) for condition in plan.moving]

    def crossed(self, row: Sequence[float]) -> bool:
        """Whether a rule might be true of a row in registry order; NaN crosses nothing."""
        if any(map(gt, self._upper_of(row), self._upper)):
            return True
        return self._lower is not None and any(map(lt, self._lower_of(row), self._lower))

    def follow(self, history: History) -> None:
        """Move the bounds that depend on the past."""
        upper = self._upper = self._fixed.copy()
        for place, condition in self._moving:
            bound = _bound(condition, history)
            if bound < upper[place]:
                upper[place] = bound


def _picker(bounds: Mapping[str, float]) -> Callable[[Sequence[float]], Sequence[float]]:
    """Picks the guarded values out of a row; padded, as one alone would not be a tuple."""
    step = STEP_SLOT["step"]
    return itemgetter(*(STEP_SLOT[metric] for metric in bounds), step, step)


def _bound(condition: Condition, history: History) -> float:
    metric = condition.metric
    if condition.operator is Operator.ABOVE_BASELINE:
        median = history.medians[condition.baseline_of].median()
        return inf if median is None or median < 0.0 else condition.number * median
    last = history.lasts[metric]
    if condition.operator is Operator.RISES_BY:
        return inf if last.value is None else last.value
    return -inf if last.repeats + 1 >= condition.number else inf  # unchanged_for


def _needed(when: Condition | Group) -> list[Condition]:
    """Conditions of which at least one holds whenever ``when`` does."""
    if isinstance(when, Condition):
        return [when]
    needed = [_needed(part) for part in when.parts]
    if when.combine is Combine.ANY:
        return [condition for part in needed for condition in part]
    # Any part of an "all" would do. A constant learning rate is unchanged at every
    # step, so that such a condition guards least.
    return min(
        needed,
        key=lambda part: any(
            condition.operator is Operator.UNCHANGED_FOR for condition in part
        ),
    )
