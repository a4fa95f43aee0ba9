"""Bounds that no update may cross unchecked, and those that a trainer still needs.

A trainer holds against them what it knows of a step before it makes the update, and only
asks where one is crossed (:meth:`~esper_tamiyo.judging.engine.Engine.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nextafter
from typing import NamedTuple

import msgspec

from esper_otel.leyline.decisions import SKIP_STEP
from esper_otel.leyline.wire import Guard
from esper_tamiyo.judging.deciding import SETTING_OF, usual_norm, usual_setting
from esper_tamiyo.judging.guards import (
    GuardPlan,
    add_guard,
    bound_of,
    is_lower,
    nearest,
    needed,
)
from esper_tamiyo.judging.history import BaselineKey, History
from esper_tamiyo.judging.rules import times
from esper_tamiyo.judging.seen import seen_by
from esper_tamiyo.language.operators import ON_BASELINES, ON_RECORDS, Operator
from esper_tamiyo.language.parameters import USUAL_NORM
from esper_tamiyo.language.table import (
    Combine,
    Condition,
    Group,
    Rule,
    Table,
    acts_on_updates,
    conditions,
    is_guarded,
)


class Edge(NamedTuple):
    """One side of what a metric may be.

    ``fixed`` is the nearest fixed bound, infinite without any; ``moving`` are the conditions
    whose bounds follow the run. Where one rule alone guards the metric, ``others`` are the
    conditions on it that this rule needs as well: crossed is only what is beyond all.
    """

    metric: str
    lower: bool
    fixed: float
    moving: tuple[Condition, ...]
    others: tuple[Condition, ...] = ()


class UpdatePlan(msgspec.Struct, frozen=True):
    """The guards that updates have by a table; ``skips`` is of the one on ``nonfinite``.

    ``held``: by metric, the rule whose answer a trainer can give itself where none comes.
    """

    edges: tuple[Edge, ...]
    skips: bool
    held: dict[str, Rule] = {}


def update_plan(table: Table) -> UpdatePlan:
    """The bounds one of which is crossed whenever a rule of ``table`` changes an update.

    A rule that may fire while everything in :data:`~esper_otel.leyline.wire.GUARDED` is as
    usual has no guard: it only counts where an update is checked because of another.
    """
    made = GuardPlan({}, {}, [], [])
    acting = [rule for rule in table.rules if acts_on_updates(rule)]
    guarding: dict[str, list[Rule]] = {}
    for rule in acting:
        for condition in needed(rule.when, is_guarded):
            add_guard(made, condition)
            guarding.setdefault(condition.metric, []).append(rule)
    edges = tuple(
        Edge(
            metric,
            lower,
            fixed,
            nearest(
                condition
                for condition in made.moving
                if condition.metric == metric and is_lower(condition.operator) is lower
            ),
            _others(guarding.get(metric, ())),
        )
        for lower, bounds in ((False, made.upper), (True, made.lower))
        for metric, fixed in bounds.items()
    )
    inhibited = {name for rule in table.rules for name in rule.inhibits}
    free = [rule for rule in acting if rule.id not in inhibited]
    held = {metric: rule for rule in reversed(free) if (metric := _held_metric(rule))}
    return UpdatePlan(edges, any(map(_skips, free)), held)


def _others(rules: Sequence[Rule]) -> tuple[Condition, ...]:
    """Conditions of the only one of ``rules``, where all are upper bounds of one metric."""
    if len(rules) != 1 or not isinstance(when := rules[0].when, Group):
        return ()
    parts = tuple(conditions(when))
    is_of_one = all(_is_upper_bound(part, parts[0].metric) for part in when.parts)
    return parts if when.combine is Combine.ALL and is_of_one else ()


_HELD = {USUAL_NORM: "gradient_norm", **SETTING_OF}
"""What each parameter takes to what is usual."""


def _held_metric(rule: Rule) -> str | None:
    """The metric that alone decides whether ``rule`` fires, and that it takes to what is usual.

    None where there is none: then its answer depends on more than a trainer could compare.
    """
    metrics = [metric for name, metric in _HELD.items() if name in rule.parameters]
    if len(metrics) != 1 or rule.persistence > 1 or rule.cooldown:
        return None
    metric, when = metrics[0], rule.when
    if isinstance(when, Group) and when.combine is not Combine.ALL:
        return None
    parts = when.parts if isinstance(when, Group) else (when,)
    return metric if all(_is_upper_bound(part, metric) for part in parts) else None


def _is_upper_bound(part: Condition | Group, metric: str) -> bool:
    return isinstance(part, Condition) and part.metric == metric and part.operator in _UPPER


_UPPER = frozenset(
    {Operator.ABOVE, Operator.AT_LEAST, Operator.ABOVE_BASELINE, Operator.ABOVE_RECORD}
)


def _skips(rule: Rule) -> bool:
    """Whether any gradient that is not finite has its update left out by ``rule``."""
    return (
        SKIP_STEP in rule.parameters
        and rule.persistence == 1
        and not rule.cooldown
        and isinstance(rule.when, Condition)
        and rule.when.operator is Operator.NONFINITE
        and rule.when.metric != "loss"
    )


MovingBound = Callable[[], tuple[float, float]]
"""Where a bound is now, and how far that is from what is usual."""


class UpdateGuards:
    """The guards of one rank's updates, after what it has been through.

    ``moving`` are the edges that follow the run, by their place in the plan. Those of lower
    edges are negated: so every value is to be at or below its bound.
    """

    __slots__ = ("_history", "moving", "plan")

    def __init__(self, plan: UpdatePlan, history: History) -> None:
        self.plan = plan
        self._history = history
        self.moving = [
            (place, _nearest_bound(edge, history))
            for place, edge in enumerate(plan.edges)
            if edge.moving or edge.others
        ]

    def held(self, metric: str) -> tuple[float, float]:
        """Above which value ``metric`` is held where nobody answers, and to which; infinite
        where it is not."""
        rule = self.plan.held.get(metric)
        if rule is None:
            return inf, inf
        history = self._history
        above = max(_moving_bound(each, history)()[0] for each in conditions(rule.when))
        seen = seen_by(rule, {}, history)
        is_norm = metric == "gradient_norm"
        usual = usual_norm(seen) if is_norm else usual_setting(metric, seen)
        return (above, usual) if 0.0 < usual < above else (inf, inf)


def _nearest_bound(edge: Edge, history: History) -> MovingBound:
    """The nearest of an edge's bounds, or the farthest of those that count together."""
    if edge.others:
        together = [_moving_bound(condition, history) for condition in edge.others]
        return lambda: max(bound() for bound in together)
    if edge.fixed == (-inf if edge.lower else inf) and len(edge.moving) == 1:
        return _moving_bound(edge.moving[0], history)
    moving = [_moving_bound(condition, history) for condition in edge.moving]
    fixed = (-edge.fixed if edge.lower else edge.fixed, 0.0)

    def nearest() -> tuple[float, float]:
        return min(fixed, *(bound() for bound in moving))

    return nearest


def _moving_bound(condition: Condition, history: History) -> MovingBound:
    number = condition.number
    if condition.operator in (Operator.ABOVE, Operator.AT_LEAST):
        fixed = number if condition.operator is Operator.ABOVE else nextafter(number, -inf)
        return lambda: (fixed, 0.0)
    sign = -1.0 if is_lower(condition.operator) else 1.0
    if condition.operator in ON_BASELINES:
        name = BaselineKey(condition.baseline_of, condition.baseline).name
        reference = history.baselines[name]

        def of_baseline() -> tuple[float, float]:
            median = reference.value
            if not median:
                return inf, 0.0
            bound = number * median if median > 0.0 else times(number, median)
            return sign * bound, abs(bound - median)

        return of_baseline
    if condition.operator in ON_RECORDS:
        return _record_bound(condition, history, sign)
    bound = bound_of(condition, history)
    if condition.operator is Operator.RISES_BY:
        half = number / 2  # well clear of rounding

        def of_last() -> tuple[float, float]:
            last = bound()
            return (inf, 0.0) if last == inf else (nextafter(last + half, -inf), half)

        return of_last
    return lambda: (sign * bound(), 0.0)


def _record_bound(condition: Condition, history: History, sign: float) -> MovingBound:
    excursions = history.excursions[condition.metric, sign < 0.0]

    def of_record() -> tuple[float, float]:
        bound = excursions.bound(condition.hold, condition.number, rising=condition.rising)
        if bound is None or excursions.level is None:
            return inf, 0.0
        return sign * bound, abs(bound - excursions.level)

    return of_record


SLACK = 0.1
"""Share of its way from the usual value by which a bound is told nearer to it: of twice the
usual value, a twentieth of the bound."""

FAR = 0.3
"""Share by which what was told may lie nearer, before it is told again."""


class AnnouncedGuards:
    """The guards that one trainer was told.

    A bound that follows the run moves a little with every step, and the trainer is not told
    each time. What it was told has to stay a necessary condition all the same, so it is told
    a bound that is a little nearer to what is usual than the true one, and another as soon
    as the true one comes nearer than that. When the true one has moved away it is told as
    well, though not as soon: until then some updates are checked in vain.
    """

    __slots__ = ("_plan", "_told")

    def __init__(self) -> None:
        self._plan: UpdatePlan | None = None
        self._told: list[float] | None = None

    def to_send(self, guards: UpdateGuards | None) -> list[Guard] | None:
        """What the trainer has to be told now; None: what it was told still holds.

        Without ``guards``, as nobody knows its rank, it is told so once.
        """
        told = self._told
        if guards is None:
            self._told = self._told or []
            return [] if told is None else None
        if told is not None and guards.plan is self._plan:
            for place, moving in guards.moving:
                bound, way = moving()
                if not bound - FAR * way <= told[place] <= bound:
                    break
            else:
                return None
        self._plan = guards.plan
        self._told = told = _nearer(guards)
        return _as_sent(guards, told)


def _nearer(guards: UpdateGuards) -> list[float]:
    """The bound of every edge, as it is told; those of lower edges are negated."""
    told = [-edge.fixed if edge.lower else edge.fixed for edge in guards.plan.edges]
    for place, moving in guards.moving:
        bound, way = moving()
        nearer = bound - SLACK * way
        told[place] = nearer if nearer == nearer else bound
    return told


def _as_sent(guards: UpdateGuards, told: Sequence[float]) -> list[Guard]:
    """One guard for each metric that has a bound now."""
    plan = guards.plan
    above: dict[str, float] = {}
    below: dict[str, float] = {}
    for edge, bound in zip(plan.edges, told, strict=True):
        if bound < inf:  # else there is nothing beyond it
            if edge.lower:
                below[edge.metric] = -bound
            else:
                above[edge.metric] = bound
    return [
        Guard(
            metric,
            above.get(metric, inf),
            below.get(metric, -inf),
            plan.skips and metric == "nonfinite",
            *guards.held(metric),
        )
        for metric in dict.fromkeys((*above, *below))
    ]
