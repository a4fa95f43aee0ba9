"""Excursions: how far a metric leaves its ordinary state by itself, and the resulting limit.

The ordinary state is a *level* and a *scatter*. The level is the median of some newest values;
each value is compared with the level before it, and the scatter is the 98th percentile of these
distances, over more values. So a steady fall makes no scatter, and a steady rise is part of it.
How far out a value is counts in scatters. While it is out by more than one, the metric is on an
*excursion*: its values wait, and enter level and scatter when it is over, so that trouble is
not compared with itself. An excursion that does not end is a new level.

What excursions reached is kept in a *record*. From it follows how far the metric may be out by
chance, at a stated risk: the extreme quantile of Weissman (Estimation of parameters and large
quantiles based on the k largest observations, JASA 73, 1978) with the tail index of Hill (A
simple general approach to inference about the tail of a distribution, Annals of Statistics 3,
1975), of one peak per excursion, as in the peaks-over-threshold method (Davison and Smith,
Models for exceedances over high thresholds, JRSS B 52, 1990). Gaussian noise gives about four
scatters, heavy tails give tens. A prior stands in for the peaks that a young run has not had.

Pure bookkeeping, without a clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable
from math import inf, log

LAG = 8
"""Newest values that are not in the window yet: so an excursion is noticed before it moves
what it is compared with."""

CALM = 4
"""Values in a row within one scatter that end an excursion."""

ONSET = 3
"""First values of an excursion, which what rises goes beyond."""

AGO = 16
"""Values of an excursion, the newest, that what rises goes beyond all those before: a loss that
stays where it has come to, or falls back from there, rises no more."""

PATIENCE = 64
"""Values after which an excursion is a new level."""

QUANTILE = 0.98

TAIL = 0.25
"""Tail index of a run that has not shown its own; of light tails it is about 0.17."""

PEAKS = 12
"""Peaks that :data:`TAIL` weighs as much as."""

YOUNG = 200
"""Values that a run is taken to have had before its first."""

FLOOR = 0.25
"""Share of the scatter that a run used to have; its scatter now counts as no less."""

FADING = 0.98
"""What is left of the scatter that a run used to have, each time it is taken anew."""

REFRESH = 4
"""Values between two times that level and scatter are taken anew."""

LEAST = 1e-3
"""Share of the level; the scatter counts as no less."""


class Record:
    """What ``k`` of the newest ``n`` values reached at once, in excursions that are over.

    Distances are in scatters from the level. ``peaks`` counts the excursions in which they
    were all out by more than one, ``largest`` is the farthest of these.
    """

    __slots__ = ("_logs", "_newest", "_nth", "_peak", "_size", "bound", "largest", "peaks")

    def __init__(self, k: int, n: int) -> None:
        self.peaks = 0
        self.largest = 0.0
        self.bound = inf
        """Scatters that are no more than this record explains."""
        self._nth = k
        self._size = n
        self._newest: deque[float] = deque([0.0] * n, maxlen=n)
        self._peak = 0.0
        self._logs = 0.0

    def add(self, out: float) -> None:
        """Take in how far out the newest value of an excursion is."""
        newest = self._newest
        newest.append(out)
        reached = sorted(newest)[-self._nth] if self._size > 1 else out
        if reached > self._peak:
            self._peak = reached

    def end_excursion(self) -> None:
        """Remember the excursion that is over."""
        peak = self._peak
        if peak > 1.0:
            self.peaks += 1
            self._logs += log(peak)
            self.largest = max(self.largest, peak)
        self.drop_excursion()

    def drop_excursion(self) -> None:
        """Forget the excursion that is under way."""
        self._peak = 0.0
        self._newest.extend([0.0] * self._size)

    def move_bound(self, values: int, risk: float) -> None:
        """Work out ``bound``: chance exceeds it at a share of ``risk`` of all values, after
        ``values`` of them."""
        tail = (TAIL * PEAKS + self._logs) / (PEAKS + self.peaks)
        share = (self.peaks + 1) / (values + YOUNG)
        self.bound = max(1.0, share / risk) ** tail


class Excursions:
    """One side of what one metric may be: above its level, or with ``below`` under it.

    ``level`` is None during warm-up, ``scatter`` also while nothing has ever moved. ``edge`` is
    the value that is out by one scatter, None without one. ``version`` changes whenever a bound
    may have.
    """

    __slots__ = (
        "_calm",
        "_distances",
        "_farthest",
        "_length",
        "_newest",
        "_onset",
        "_ordered",
        "_recent",
        "_risk",
        "_sign",
        "_taken",
        "_usual",
        "_values",
        "_waiting",
        "_warmup",
        "edge",
        "level",
        "records",
        "scatter",
        "version",
    )

    def __init__(
        self,
        holds: Iterable[tuple[int, int]],
        window: int,
        warmup: int,
        risk: float,
        *,
        below: bool = False,
    ) -> None:
        self.records = {hold: Record(*hold) for hold in holds}
        self.level: float | None = None
        self.scatter: float | None = None
        self.edge: float | None = None
        self.version = 0
        self._sign = -1.0 if below else 1.0
        self._warmup = warmup
        self._risk = risk
        self._newest: deque[float] = deque(maxlen=warmup)
        self._distances: deque[float] = deque(maxlen=window)
        self._ordered: list[float] = []
        self._waiting: deque[tuple[float, float | None]] = deque()
        self._values = 0
        self._taken = 0
        self._length = 0
        self._calm = 0
        self._onset = 0.0
        self._recent: deque[float] = deque(maxlen=AGO)
        """How far out the newest values of the excursion are, and the farthest before these."""
        self._farthest = 0.0
        self._usual = 0.0

    def bound(
        self, hold: tuple[int, int], factor: float, *, rising: bool = False
    ) -> float | None:
        """The value that is out by ``factor`` times what the record of ``hold`` explains; None
        where there is no level.

        With ``rising`` it also is a scatter beyond the first values of the excursion that is
        under way, and beyond all but its newest ones; infinitely far out before there are some.
        """
        level, scatter = self.level, self.scatter
        if level is None or scatter is None:
            return None
        out = factor * self.records[hold].bound
        if rising:
            out = max(out, self._onset + 1.0, self._farthest) if self._length >= ONSET else inf
        return level + self._sign * out * scatter

    def add(self, value: float) -> None:
        """Take in a finite observation."""
        waiting, level, scatter = self._waiting, self.level, self.scatter
        distance = None if level is None else self._sign * (value - level)
        waiting.append((self._sign * value, distance))
        if scatter is not None and distance is not None:
            self._values += 1
            out = distance / scatter
            if out > 1.0 or self._length:
                self._go_out(out)
        if not self._length:
            while len(waiting) > LAG:  # several at the end of an excursion
                self._take(*waiting.popleft())

    @property
    def steady_for(self) -> int:
        """So many values within the edge do not move it, until the last of them; 0 while it
        is not known, or on an excursion."""
        if self.scatter is None or self._length or len(self._waiting) != LAG:
            return 0
        return REFRESH - self._taken % REFRESH

    def add_steady(self, values: Collection[float]) -> None:
        """Take in no more than :attr:`steady_for` values within the edge."""
        sign, level, scatter = self._sign, self.level, self.scatter
        waiting, distances, ordered = self._waiting, self._distances, self._ordered
        assert level is not None
        assert scatter is not None
        farthest = max(values) if sign > 0.0 else min(values)
        if sign * (farthest - level) / scatter > 1.0:  # by rounding
            for value in values:
                self.add(value)
            return
        wait, take, window = waiting.append, self._newest.append, distances.maxlen
        for value in values:
            wait((sign * value, sign * (value - level)))
            taken, old = waiting.popleft()
            take(taken)
            if old is not None:
                if len(ordered) == window:
                    del ordered[bisect_left(ordered, distances[0])]
                distances.append(old)
                insort(ordered, old)
        self._values += len(values)
        self._taken += len(values)
        if not self._taken % REFRESH:
            self._settle()

    def clear(self) -> None:
        """Another phase: the level begins anew, records are kept."""
        for record in self.records.values():
            record.drop_excursion()
        self.level = self.scatter = self.edge = None
        self.version += 1
        self._newest.clear()
        self._distances.clear()
        self._ordered.clear()
        self._waiting.clear()
        self._forget_excursion()

    def _go_out(self, out: float) -> None:
        """An excursion begins, or goes on."""
        self._calm = 0 if out > 1.0 else self._calm + 1
        self._length += 1
        self.version += 1
        if self._length <= ONSET:
            self._onset = max(self._onset, out)
        recent = self._recent
        if len(recent) == AGO:
            self._farthest = max(self._farthest, recent[0])
        recent.append(out)
        for record in self.records.values():
            record.add(out)
        if self._calm >= CALM:
            self._end()
        elif self._length >= PATIENCE:
            self._end()
            self._begin_anew()

    def _forget_excursion(self) -> None:
        self._length = self._calm = 0
        self._onset = self._farthest = 0.0
        self._recent.clear()

    def _end(self) -> None:
        self._forget_excursion()
        for record in self.records.values():
            record.end_excursion()
            record.move_bound(self._values, self._risk)

    def _begin_anew(self) -> None:
        """The metric stays where it is: that is its level now, and its way there no scatter."""
        self._newest.clear()
        kept = [value for value, _ in self._waiting][-self._warmup - LAG :]
        self._waiting = deque((value, None) for value in kept)

    def _take(self, value: float, distance: float | None) -> None:
        """Make a value part of what is ordinary."""
        self._newest.append(value)
        if distance is not None:
            ordered, distances = self._ordered, self._distances
            if len(ordered) == distances.maxlen:
                del ordered[bisect_left(ordered, distances[0])]
            distances.append(distance)
            insort(ordered, distance)
        self._taken = taken = self._taken + 1
        if self.scatter is None or not taken % REFRESH:
            self._settle()

    def _settle(self) -> None:
        """Take level and scatter anew."""
        newest, ordered = self._newest, self._ordered
        if len(newest) < self._warmup:
            return
        self.level = level = self._sign * sorted(newest)[len(newest) >> 1]
        count = len(ordered)
        if count < self._warmup:
            return
        high = ordered[int(QUANTILE * count)]
        middle, usual = ordered[count >> 1], FADING * self._usual
        scatter = high if middle > 0.0 else high - middle
        if scatter > usual:
            usual = scatter
        self._usual = usual
        scatter = max(scatter, FLOOR * usual, LEAST * abs(level))
        if self.scatter is None:
            for record in self.records.values():
                record.move_bound(self._values, self._risk)
        self.scatter = scatter or None
        self.edge = level + self._sign * scatter if scatter else None
        self.version += 1
