"""Holds: ranges that keep the verdict of a condition, or of a whole rule, for some more steps.

A hold is a range that a metric must not leave. While it does not, and while each step has the
same metrics as the one before, the verdict is known without looking, however the past moves
meanwhile: for a baseline by how far a median can go in so many steps. A verdict of a group
needs a hold of one of its parts or of each, as Kleene's logic has it; of several the one that
leaves most room is taken. Holds are sufficient conditions, never necessary ones: leaving one
proves nothing.

The other way round than :mod:`~esper_tamiyo.judging.guards`, which say that no rule can be
*true*; here false and unknown are told apart as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from functools import cache
from math import inf, nextafter
from typing import NamedTuple

from esper_tamiyo.judging.excursions import Excursions
from esper_tamiyo.judging.guards import is_lower
from esper_tamiyo.judging.history import BaselineKey, Earlier, History
from esper_tamiyo.judging.observations import Last
from esper_tamiyo.judging.rules import Test, Values, Verdict, test_of, times
from esper_tamiyo.language.operators import (
    ON_BASELINES,
    ON_EARLIER,
    ON_PEERS,
    ON_RECORDS,
    BaselineKind,
    Operator,
)
from esper_tamiyo.language.table import Combine, Condition, Group

ENDLESS = 1 << 62

BRIEF = 64
"""A condition on so few equal values in a row is tried with each: its range holds no longer."""

ENOUGH = 0.25
"""Room of a hold for which no better one is looked for."""

LITTLE = 0.02
"""Room that holds by tests are taken to leave: they cost more than ranges."""

_MARGIN = 1e-9
"""For rounding, where a bound is no product."""

Range = tuple[float, float, int]
"""The least and the most that a value may be, and for how many steps that holds."""

ANY: Range = (-inf, inf, ENDLESS)

Within = Callable[[int], Range | None]
"""The range for so many steps to come, None where it does not keep the verdict any more."""


class Wanted(Enum):
    """What a verdict has to stay."""

    FALSE = (False,)
    UNKNOWN = (None,)
    NOT_TRUE = (None, False)
    NOT_FALSE = (None, True)


class Hold(NamedTuple):
    """What keeps the verdict of one condition.

    ``within`` is the range of its metric, and ``is_fixed`` whether always the same. With
    ``edge`` the metric is compared with excursions besides, by the test of the condition where
    it is beyond their edge; with ``repeats`` it must not come to so many equal values in a row,
    and with ``runs`` not have come to so many beyond an end of what was before.
    """

    metric: str
    within: Within
    is_fixed: bool = False
    edge: tuple[Excursions, bool, Test] | None = None
    repeats: tuple[Last, int] | None = None
    runs: tuple[Earlier, bool, int] | None = None
    condition: Condition | None = None


Holds = tuple[float, list[Hold]]
"""Holds, and how much room they leave."""


class Past(NamedTuple):
    """The newest values of a rank or seed, its past with them, and steps to look ahead.

    ``told`` are the metrics whose past goes on: of a seed those of its rank as well.
    ``crossed`` says how often the range that a condition asks for was left.
    """

    values: Values
    history: History
    steps: int
    told: Collection[str]
    crossed: Mapping[Condition | None, int]


def holds_of(when: Condition | Group, wanted: Wanted, past: Past) -> Holds | None:
    """Holds that keep the verdict on ``when``; None where there are none."""
    if isinstance(when, Condition):
        return _holds_of(when, wanted, past)
    is_all = when.combine is Combine.ALL
    if wanted is Wanted.UNKNOWN:
        others = Wanted.NOT_FALSE if is_all else Wanted.NOT_TRUE
        rest, one = _every(when.parts, others, past), _best(when.parts, wanted, past)
        return None if rest is None or one is None else (min(rest[0], one[0]), rest[1] + one[1])
    is_one_enough = is_all is (wanted is not Wanted.NOT_FALSE)
    return (_best if is_one_enough else _every)(when.parts, wanted, past)


def _every(parts: Sequence[Condition | Group], wanted: Wanted, past: Past) -> Holds | None:
    least, holds = inf, []
    for part in parts:
        found = holds_of(part, wanted, past)
        if found is None:
            return None
        least = min(least, found[0])
        holds += found[1]
    return least, holds


def _best(parts: Sequence[Condition | Group], wanted: Wanted, past: Past) -> Holds | None:
    best = None
    for part in parts:
        found = holds_of(part, wanted, past)
        if found is not None and (best is None or found[0] > best[0]):
            best = found
            if found[0] >= ENOUGH:
                break
    return best


def _holds_of(condition: Condition, wanted: Wanted, past: Past) -> Holds | None:
    for verdict in wanted.value:
        made = _hold_of(condition, verdict, past)
        within = None if made is None else made.within(past.steps)
        if made is None or within is None:
            continue
        if made.within is _always and made.edge is None:
            return inf, []  # nothing that a step can say changes it
        room = _room(past.values.get(made.metric, 0.0), within)
        if room >= 0.0:
            if made.edge or made.repeats or made.runs:
                room = LITTLE
            if past.crossed:
                room /= (1 + past.crossed.get(condition, 0)) ** 2
            return room, [made._replace(condition=condition)]
    return None


def _room(value: float, within: Range) -> float:
    """Between a value and the nearer end of its range, over the larger of both; negative
    outside of it."""
    low, high, steps = within
    if steps < 1:
        return -1.0
    room = inf
    if low > -inf:
        room = (value - low) / (max(abs(value), abs(low)) or 1.0)
    if high < inf:
        room = min(room, (high - value) / (max(abs(value), abs(high)) or 1.0))
    return room


def _hold_of(condition: Condition, verdict: Verdict, past: Past) -> Hold | None:
    """What would keep that verdict, if it is so now."""
    operator, metric = condition.operator, condition.metric
    if operator is Operator.NONFINITE:
        return _on_nonfinite(condition, verdict, past)
    if operator is Operator.MISSING_FOR:
        return _hold(metric, _missing(condition, verdict, past))
    if metric not in past.values:
        return _hold(metric, _always) if verdict is None else None
    if operator in ON_BASELINES:
        return _hold(metric, _OnBaseline(condition, verdict, past))
    if operator in ON_RECORDS:
        return _on_record(condition, verdict, past)
    if operator in ON_EARLIER:
        return _beyond_earlier(condition, verdict, past)
    if operator in ON_PEERS:
        alone = metric not in past.history.peers
        return _hold(metric, _always) if alone and verdict is None else None
    if operator is Operator.UNCHANGED_FOR:
        return _unchanged(condition, verdict, past)
    if operator is Operator.RISES_BY:
        return _hold(metric, _rises(condition, verdict, past))
    if operator is Operator.RUNS_OUT_WITHIN:
        return _hold(metric, _runs_out(condition, verdict, past))
    return _fixed(condition, verdict)


def _always(steps: int) -> Range | None:
    return ANY


def _hold(metric: str, within: Within | None) -> Hold | None:
    return Hold(metric, within) if within else None


def _fixed(condition: Condition, verdict: Verdict) -> Hold | None:
    if verdict is None:
        return None
    metric, number = condition.metric, condition.number
    above, below = nextafter(number, inf), nextafter(number, -inf)
    made = {
        (Operator.ABOVE, False): (-inf, number),
        (Operator.ABOVE, True): (above, inf),
        (Operator.AT_LEAST, False): (-inf, below),
        (Operator.AT_LEAST, True): (number, inf),
        (Operator.BELOW, False): (number, inf),
        (Operator.BELOW, True): (-inf, below),
        (Operator.AT_MOST, False): (above, inf),
        (Operator.AT_MOST, True): (-inf, number),
    }.get((condition.operator, verdict))
    if made is None:  # an operator that nothing is known of here: its rules are tried
        return None
    return Hold(metric, lambda steps: (*made, ENDLESS), True)


@cache
def _name(metric: str, kind: BaselineKind) -> str:
    return BaselineKey(metric, kind).name


class _OnBaseline:
    """A bound is a product, and so lies between those of the ends of where the median may be.
    Nothing is known of a baseline of zero, or one that may change its sign.

    No closure: of each rank there are twenty, and those take five times the memory.
    """

    __slots__ = ("_factor", "_is_lower", "_is_told", "_reference", "_verdict")

    def __init__(self, condition: Condition, verdict: Verdict, past: Past) -> None:
        self._factor, self._verdict = condition.number, verdict
        self._is_lower = is_lower(condition.operator)
        name = _name(condition.baseline_of, condition.baseline)
        self._reference = past.history.baselines[name]
        self._is_told = condition.baseline_of in past.told

    def __call__(self, steps: int) -> Range | None:
        value, verdict = self._reference.value, self._verdict
        if self._is_told:
            span = self._reference.range_in(steps)
            if span is None:
                return None
        elif value is None:
            return ANY if verdict is None else None
        else:
            span = (value, value)
        if verdict is None:
            return ANY if span == (0.0, 0.0) else None
        bounds = self._bounds(*span)
        if bounds is None or not bounds[1] - bounds[0] < inf:
            return None
        nearest, farthest = bounds
        if self._is_lower:
            if verdict:
                return -inf, nextafter(nearest, -inf), ENDLESS
            return farthest, inf, ENDLESS
        if verdict:
            return nextafter(farthest, inf), inf, ENDLESS
        return -inf, nearest, ENDLESS

    def _bounds(self, least: float, most: float) -> tuple[float, float] | None:
        factor = self._factor
        if least > 0.0:
            return factor * least, factor * most
        if most < 0.0:
            ends = times(factor, least), times(factor, most)
            margin = _MARGIN * max(abs(least), abs(most), *map(abs, ends))
            return min(ends) - margin, max(ends) + margin
        return None


def _on_record(condition: Condition, verdict: Verdict, past: Past) -> Hold | None:
    """False within the edge, unless the number is a share of a record; else by its test."""
    if verdict is not False or condition.number < 1.0:
        return None
    below = condition.operator is Operator.BELOW_RECORD
    excursions = past.history.excursions[condition.metric, below]
    test = test_of(condition)
    if test(past.values, past.history) is not False:
        return None
    return Hold(condition.metric, _always, True, (excursions, below, test))


def _beyond_earlier(condition: Condition, verdict: Verdict, past: Past) -> Hold | None:
    """Unknown until enough are in, false until so many can be in a row."""
    metric, most = condition.metric, int(condition.number) - 1
    earlier, below = past.history.earlier[metric], is_lower(condition.operator)

    def within(steps: int) -> Range | None:
        left, count = earlier.missing, earlier.below if below else earlier.above
        if verdict is None:
            return (-inf, inf, left) if left else None
        return None if left or count >= most else ANY

    runs = None if verdict is None else (earlier, below, most)
    return None if verdict else Hold(metric, within, runs=runs)


def _rises(condition: Condition, verdict: Verdict, past: Past) -> Within | None:
    """False while all values lie in less than the number."""
    last, number = past.history.lasts[condition.metric], condition.number
    if verdict is not False or number <= 0.0:
        return None

    def within(steps: int) -> Range | None:
        value = last.value
        if value is None:
            return None
        low, high = value - 0.25 * number, value + 0.5 * number
        return (low, high, ENDLESS) if high - low < number else (value, value, ENDLESS)

    return within


class _Unchanged:
    """Unknown while all values there ever were are the same, else false until enough are."""

    __slots__ = ("_last", "_needed", "_verdict")

    def __init__(self, last: Last, needed: int, verdict: Verdict) -> None:
        self._last, self._needed, self._verdict = last, needed, verdict

    def __call__(self, steps: int) -> Range | None:
        last, verdict = self._last, self._verdict
        value, left = last.value, self._needed - 1 - last.repeats
        if value is None:
            return None
        if verdict:
            return (value, value, ENDLESS) if left <= 0 else None
        if left <= 0 or (verdict is None) is not (last.repeats == last.total):
            return None
        if verdict is None:
            return value, value, left
        return ANY if self._needed <= BRIEF else (-inf, inf, left)


def _unchanged(condition: Condition, verdict: Verdict, past: Past) -> Hold:
    metric, needed = condition.metric, int(condition.number)
    last = past.history.lasts[metric]
    is_brief = verdict is False and needed <= BRIEF
    repeats = (last, needed) if is_brief else None
    return Hold(metric, _Unchanged(last, needed, verdict), repeats=repeats)


def _runs_out(condition: Condition, verdict: Verdict, past: Past) -> Within | None:
    slope, number = past.history.slopes[condition.metric], condition.number

    def unknown(steps: int) -> Range | None:
        return (-inf, inf, slope.missing) if slope.missing > 0 else None

    def false(steps: int) -> Range | None:
        highest = slope.highest
        if highest is None:
            return None
        highest += 0.01 * abs(highest)
        floor = slope.floor(highest, number)
        return None if floor is None else (floor, highest, ENDLESS)

    return {None: unknown, False: false}.get(verdict)


def _missing(condition: Condition, verdict: Verdict, past: Past) -> Within | None:
    metric, last = condition.metric, past.history.lasts[condition.metric]
    if metric in past.values:
        return _always if verdict is False else None

    def within(steps: int) -> Range | None:
        left = condition.number - 1 - last.missed
        if verdict is None:
            return None if last.total else ANY
        if verdict:
            return ANY if last.total and left <= 0 else None
        return (-inf, inf, int(left)) if last.total and left > 0 else None

    return within


def _on_nonfinite(condition: Condition, verdict: Verdict, past: Past) -> Hold | None:
    """Of any value that was not finite, or of one: that is absent then."""
    metric, counted = condition.metric, "nonfinite"
    if metric != counted and metric in past.values:
        return _hold(metric, _always) if verdict is False else None
    if counted not in past.values:
        return _hold(counted, _always) if verdict is None else None
    if verdict:
        return Hold(counted, lambda steps: (nextafter(0.0, inf), inf, ENDLESS), True)
    if (verdict is None) is (metric == counted):
        return None
    return Hold(counted, lambda steps: (-inf, 0.0, ENDLESS), True)
