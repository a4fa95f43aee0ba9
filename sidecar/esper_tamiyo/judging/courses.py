"""Courses: a rank and its seeds in a stretch, as rows of numbers.

A row has what the ranges of the stretch and the pasts need of one step, from first to last in
the same places: so a step is compared in C, and many are taken in at once.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from math import inf
from operator import gt, itemgetter, lt
from struct import Struct
from typing import NamedTuple

from esper_otel.leyline.frames import NO_CUSTOM, StepFrame
from esper_tamiyo.judging.excursions import Excursions
from esper_tamiyo.judging.history import Earlier
from esper_tamiyo.judging.holds import ANY, Hold, Within
from esper_tamiyo.judging.observations import Last
from esper_tamiyo.judging.rule_status import RuleTarget
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.judging.rules import Test, Values
from esper_tamiyo.language.table import Condition


class _Repeats:
    """How often in a row a value has come, and when that is too often."""

    __slots__ = ("_count", "_last", "_needed", "_value", "place")

    def __init__(self, place: int, last: Last, needed: int) -> None:
        self.place = place
        self._last = last
        self._needed = needed
        self.start()

    def start(self) -> None:
        """Go on from what is remembered."""
        self._value, self._count = self._last.value, self._last.repeats

    def are_enough(self, value: float) -> bool:
        """Whether ``value`` makes them so many."""
        if value != self._value:
            self._value, self._count = value, 1
            return False
        self._count += 1
        return self._count >= self._needed


class _Edge(NamedTuple):
    """A value that is compared with the edge of excursions, and the test of what is beyond."""

    place: int
    excursions: Excursions
    below: bool
    test: Test
    part: int


Derivation = Callable[[Values], float | None]

_Pick = Callable[[Values], tuple[float, ...]]


class _Side:
    """Values within the edge of excursions that these have not taken in yet: so few that the
    edge stays where it is."""

    __slots__ = ("_excursions", "edge", "place", "room", "sign", "waiting")

    def __init__(self, place: int, excursions: Excursions, *, below: bool) -> None:
        self.place = place
        self._excursions = excursions
        self.sign = -1.0 if below else 1.0
        self.waiting: list[float] = []
        self.flush()

    def flush(self) -> None:
        """Take in what waits, and go on behind it."""
        excursions = self._excursions
        if self.waiting:
            excursions.add_steady(self.waiting)
            self.waiting.clear()
        edge = excursions.edge
        self.room = excursions.steady_for - 1
        """Values within the edge that may wait: the next one moves it."""
        self.edge = -inf if edge is None else self.sign * edge

    def take_in(self, value: float) -> None:
        """Take in a value, and what waits before it."""
        if self.room >= 0 and self.sign * value <= self.edge:
            self.waiting.append(value)
        else:
            self.flush()
            self._excursions.add(value)
        self.flush()


class _Part(NamedTuple):
    """A rank, or one of its seeds: what a row has of it.

    ``derived`` are the metrics that follow from its values, and ``absent`` those that cannot be
    told. ``columns`` are the places of what its past takes in, among all that is put off.
    """

    target: RuleTarget
    keys: tuple[str, ...]
    pick: _Pick
    derived: list[Derivation]
    absent: list[Derivation]
    columns: dict[str, int]


_SeedReader = tuple[tuple[str, ...], _Pick, list[Derivation], list[Derivation]]
"""Of a :class:`_Part` its keys, and what picks and derives its values."""


class Course:
    """The ranges of a rank and its seeds, and what their pasts have not taken in yet: a row of
    values for each step."""

    __slots__ = (
        "_book",
        "_bounded",
        "_capped",
        "_caps",
        "_crossed",
        "_earlier",
        "_edges",
        "_floored",
        "_floors",
        "_keep",
        "_kept",
        "_least",
        "_lower",
        "_most",
        "_moving",
        "_names",
        "_of_seeds",
        "_pack",
        "_parts",
        "_repeats",
        "_rows",
        "_runs",
        "_shape",
        "_sides",
        "_steps",
        "_upper",
    )

    def __init__(self, book: Rulebook, crossed: Counter[Condition | None]) -> None:
        """``crossed`` counts how often the range of each condition was left."""
        self._book = book
        self._crossed = crossed
        self._parts: list[_Part] = []
        self._of_seeds: list[_SeedReader] = []
        """What reads the values of each seed."""
        self._names: list[str] = []
        """The metric of each place in a row."""
        self._least: list[float] = []
        self._most: list[float] = []
        """The ends of ranges that do not move."""
        self._bounded: tuple[list[int], list[int]] = ([], [])
        """The places with an upper and those with a lower end, at present."""
        self._capped = self._floored = itemgetter(0, 0)
        self._moving: list[tuple[int | None, Within, Condition | None]] = []
        self._edges: list[_Edge] = []
        self._sides: list[_Side] = []
        self._repeats: list[_Repeats] = []
        self._runs: list[tuple[Earlier, bool, int]] = []
        """Values in a row beyond what was before, and how many there may have been."""
        self._earlier: list[tuple[int, Earlier]] = []
        """What was before, of the metrics at these places: it takes in each step at once."""
        self._shape: tuple[tuple[str, ...], list[str]] = ((), [])
        """Keys and names of the newest part."""
        self._kept: list[int] = []
        """The places in a row of what pasts take in."""
        self._keep: Callable[[Sequence[float]], tuple[float, ...]]
        self._pack = Struct("0d").pack
        self._rows = bytearray()
        """What pasts have not taken in: doubles, as objects take four times the memory."""

    def add_part(self, target: RuleTarget, own: Values, holds: Sequence[Hold]) -> None:
        """A rank, or then one of its seeds, with the values ``own`` that its frames have."""
        history, first = target.history, len(self._names)
        watched = (*history.put_off, *(metric for metric, _ in history.own_excursions))
        watched += history.own_earlier
        needed = {*watched, *(hold.metric for hold in holds)}
        picked = [key for key in own if key in needed]
        picked += [next(iter(own))] * (2 - len(picked))  # one alone would not be a tuple
        derived = [] if target.seed_id is None else self._book.derived
        told = [each for each in derived if each.metric.key in target.values]
        names = [*picked, *(each.metric.key for each in told)]
        place = {metric: first + offset for offset, metric in enumerate(names)}
        self._names += names
        self._least += [-inf] * len(names)
        self._most += [inf] * len(names)
        part = _Part(
            target=target,
            keys=tuple(own),
            pick=itemgetter(*picked),
            derived=[each.of for each in told],
            absent=[each.of for each in derived if each not in told],
            columns=self._columns(
                [(key, place[key]) for key in history.put_off if key in place]
            ),
        )
        if self._shape == (part.keys, names):  # seeds are alike: then what says so is shared
            alike = self._parts[-1]._asdict()
            part = _Part(**{**alike, "target": target, "columns": part.columns})
        self._shape = part.keys, names
        self._parts.append(part)
        if target.seed_id is not None:
            self._of_seeds.append((part.keys, part.pick, part.derived, part.absent))
        self._sides += [
            _Side(place[key[0]], history.excursions[key], below=key[1])
            for key in history.own_excursions
            if key[0] in place
        ]
        self._earlier += [
            (place[key], history.earlier[key]) for key in history.own_earlier if key in place
        ]
        for hold in holds:
            self._keep_to(hold, place.get(hold.metric))

    def _columns(self, columns: list[tuple[str, int]]) -> dict[str, int]:
        """Have what is put off have these metrics, by their place in a row."""
        first = len(self._kept)
        self._kept += [place for _, place in columns]
        some = self._kept[0] if self._kept else 0
        self._keep = itemgetter(*self._kept, some, some)
        self._pack = Struct(f"{len(self._kept) + 2}d").pack
        return {metric: first + offset for offset, (metric, _) in enumerate(columns)}

    def _keep_to(self, hold: Hold, place: int | None) -> None:
        if hold.edge is not None and place is not None:
            self._edges.append(_Edge(place, *hold.edge, len(self._parts) - 1))
        elif hold.repeats is not None and place is not None:
            self._repeats.append(_Repeats(place, *hold.repeats))
        elif hold.runs is not None and hold.runs not in self._runs:
            self._runs.append(hold.runs)
        if not hold.is_fixed:
            self._moving.append((place, hold.within, hold.condition))
        elif place is not None:
            low, high, _ = hold.within(0) or ANY
            self._least[place] = max(low, self._least[place])
            self._most[place] = min(high, self._most[place])

    def is_about(self, targets: list[RuleTarget]) -> bool:
        """Whether it is about these."""
        return len(targets) == len(self._parts) and all(
            part.target is target for part, target in zip(self._parts, targets, strict=True)
        )

    def renew(self, steps: int) -> int:
        """Work out the ranges anew; for how many steps they hold, of ``steps`` at most."""
        self._steps = steps
        lower, upper = self._least.copy(), self._most.copy()
        for place, within, _ in self._moving:
            found = within(steps)
            if found is None:
                return 0
            low, high, lasts = found
            if lasts < steps:
                steps = lasts
            if place is not None:
                if low > lower[place]:
                    lower[place] = low
                if high < upper[place]:
                    upper[place] = high
        self._lower, self._upper = lower, upper
        self._compare_bounded()
        for repeats in self._repeats:
            repeats.start()
        for side in self._sides:
            side.flush()
        return steps

    def _compare_bounded(self) -> None:
        """Have rows compared where there is a bound, as half of the places have none."""
        lower, upper = self._lower, self._upper
        capped = [place for place, high in enumerate(upper) if high < inf]
        floored = [place for place, low in enumerate(lower) if low > -inf]
        if (capped, floored) != self._bounded:
            self._bounded = (capped, floored)
            self._capped = itemgetter(0, 0, *capped)  # one alone would not be a tuple
            self._floored = itemgetter(0, 0, *floored)
        self._caps = [inf, inf, *(upper[place] for place in capped)]
        self._floors = [-inf, -inf, *(lower[place] for place in floored)]

    def row_of(self, values: Values, seeds: Collection[Values]) -> Sequence[float] | None:
        """The row of a step that changes no rule, else None; ``values`` are those of the rank
        and ``seeds`` those of each seed."""
        rank = self._parts[0]
        if tuple(values) != rank.keys:
            return None
        row: Sequence[float] = rank.pick(values)
        if seeds:
            whole_row = self._with_seeds(row, seeds)
            if whole_row is None:
                return None
            row = whole_row
        if any(map(gt, self._capped(row), self._caps)) or any(
            map(lt, self._floored(row), self._floors)
        ):
            self._note_crossed(row)
            return None
        for place, excursions, below, test, part_at in self._edges:
            edge = excursions.edge
            if edge is None:
                return None
            if row[place] < edge if below else row[place] > edge:
                own = [values, *seeds][part_at]
                whole = self._book.values_of_seed(NO_CUSTOM, own)
                if test(whole, self._parts[part_at].target.history) is not False:
                    return None
        for earlier, below, most in self._runs:
            if (earlier.below if below else earlier.above) >= most:
                return None
        for repeats in self._repeats:
            if repeats.are_enough(row[repeats.place]):
                return None
        return row

    def _with_seeds(
        self, row: Sequence[float], seeds: Collection[Values]
    ) -> Sequence[float] | None:
        """A row of the rank, and behind it that of each seed."""
        found = [*row]
        for (keys, pick, derived, absent), values in zip(self._of_seeds, seeds, strict=True):
            if tuple(values) != keys:
                return None
            found += pick(values)
            for derive in derived:
                value = derive(values)
                if value is None:
                    return None
                found.append(value)
            if absent and any(derive(values) is not None for derive in absent):
                return None
        return found

    def _note_crossed(self, row: Sequence[float]) -> None:
        """Note whose ranges a step has left, of those that move: others may leave more room."""
        for place, within, condition in self._moving:
            if place is not None and not self._lower[place] <= row[place] <= self._upper[place]:
                low, high, _ = within(self._steps) or ANY
                if not low <= row[place] <= high:
                    self._crossed[condition] += 1

    def put_off(self, row: Sequence[float]) -> None:
        """Take in the row of a step."""
        for side in self._sides:
            value = row[side.place]
            if side.room > 0 and side.sign * value <= side.edge:
                side.waiting.append(value)
                side.room -= 1
            else:
                side.take_in(value)
        for place, earlier in self._earlier:
            earlier.add(row[place])
        self._rows += self._pack(*self._keep(row))

    def flush(self, frame: StepFrame) -> None:
        """Make the rows that wait part of the past; ``frame`` is the newest of them."""
        rows, width = array("d", bytes(self._rows)), len(self._kept) + 2
        for side in self._sides:
            side.flush()
        for part, own in zip(self._parts, (frame.values, *frame.seeds.values()), strict=False):
            target = part.target
            target.values = (
                own if target.seed_id is None else self._book.values_of_seed(frame.values, own)
            )
            columns = {key: rows[place::width].tolist() for key, place in part.columns.items()}
            target.history.absorb_together(columns, len(rows) // width)
        self._rows.clear()
