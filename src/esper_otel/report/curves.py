"""Curves: the values of one metric over steps, thinned so that no extreme is lost.

A curve holds all points up to :data:`HELD`; beyond that the steps are divided into as many
equal parts as fit, and of each part the least and the greatest value stay, where they were.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from esper_otel.report.layouts import Numbers, Times

HELD = 32_768
"""Points of a curve before it is thinned while it is read."""

PARTS = 4
"""So many times fewer parts is it divided into then, each with two points or so."""


class Points(NamedTuple):
    """Steps, rising, and the value at each; NaN where it was no finite number."""

    steps: Times
    values: Numbers


class Total(msgspec.Struct):
    """What all values of a metric come to, those that are thinned out included."""

    count: int = 0
    sum: float = 0.0
    least: float = float("inf")
    least_step: int = 0
    greatest: float = float("-inf")
    greatest_step: int = 0
    first: float = 0.0
    first_step: int = -1
    last: float = 0.0
    last_step: int = -1

    def count_in(self, steps: Times, values: Numbers) -> None:
        """Count in ``values``, all finite and at least one."""
        self.count += len(values)
        with np.errstate(over="ignore"):
            self.sum += float(values.sum())
        low, high = int(values.argmin()), int(values.argmax())
        if values[low] < self.least:
            self.least, self.least_step = float(values[low]), int(steps[low])
        if values[high] > self.greatest:
            self.greatest, self.greatest_step = float(values[high]), int(steps[high])
        first, last = int(steps.argmin()), int(steps.argmax())
        if self.first_step < 0 or steps[first] < self.first_step:
            self.first, self.first_step = float(values[first]), int(steps[first])
        if steps[last] >= self.last_step:
            self.last, self.last_step = float(values[last]), int(steps[last])

    def add(self, other: Total) -> None:
        """Count in what another total has."""
        if not other.count:
            return
        self.count += other.count
        self.sum += other.sum
        if other.least < self.least:
            self.least, self.least_step = other.least, other.least_step
        if other.greatest > self.greatest:
            self.greatest, self.greatest_step = other.greatest, other.greatest_step
        if self.first_step < 0 or other.first_step < self.first_step:
            self.first, self.first_step = other.first, other.first_step
        if other.last_step >= self.last_step:
            self.last, self.last_step = other.last, other.last_step


class Curve:
    """One metric of one trainer, or of one of its seeds."""

    def __init__(self, most: int | None = None) -> None:
        """So many points are held at ``most``, :data:`HELD` unless said."""
        self.total = Total()
        self.thinned = False
        """Whether it holds fewer points than it was given."""
        self._parts: list[Points] = []
        self._count = 0
        self._most = HELD if most is None else most

    def extend(self, steps: Times, values: Numbers) -> None:
        """Take in more points, in whatever order; a value that is not finite is a gap."""
        finite = np.isfinite(values)
        if finite.all():
            self.total.count_in(steps, values)
        else:
            values = np.where(finite, values, np.nan)
            if finite.any():
                self.total.count_in(steps[finite], values[finite])
        self._hold(Points(steps, values))

    def absorb(self, other: Curve) -> None:
        """Take in what another curve of the same metric holds, and its total."""
        self.total.add(other.total)
        self.thinned = self.thinned or other.thinned
        self._hold(other.points())

    def _hold(self, points: Points) -> None:
        self._parts.append(points)
        self._count += len(points.steps)
        self._thin()

    def hold_at_most(self, points: int) -> None:
        """From here on hold no more ``points``."""
        self._most = min(self._most, points)
        self._thin()

    def _thin(self) -> None:
        if self._count > self._most:
            thin = thinned(self.points(), self._most // PARTS)
            self.thinned = self.thinned or len(thin.steps) < self._count
            self._parts = [thin]
            self._count = len(thin.steps)

    def points(self) -> Points:
        """All points that are held, by step; of two at one step the later stays."""
        if not self._parts:
            return Points(np.empty(0, np.int64), np.empty(0, np.float64))
        steps = np.concatenate([part.steps for part in self._parts])
        values = np.concatenate([part.values for part in self._parts])
        if (steps[1:] <= steps[:-1]).any():
            order = np.argsort(steps, kind="stable")
            steps, values = steps[order], values[order]
            last = np.append(steps[1:] != steps[:-1], True)
            steps, values = steps[last], values[last]
        self._parts = [Points(steps, values)]
        self._count = len(steps)
        return self._parts[0]


def thinned(points: Points, parts: int) -> Points:
    """At most two values of each part of the steps, its least and greatest; and its first gap.

    The first and the last point stay. Few enough points stay all of them.
    """
    steps, values = points
    if len(steps) <= 2 * parts:
        return points
    span = float(steps[-1] - steps[0]) + 1.0
    part = ((steps - steps[0]) * (parts / span)).astype(np.int64)
    keep = np.zeros(len(steps), np.bool_)
    keep[[0, -1]] = True
    gaps = np.isnan(values)
    if gaps.any():
        keep[_firsts(np.flatnonzero(gaps), part)] = True
    finite = np.flatnonzero(~gaps)
    if len(finite):
        of, numbers = part[finite], values[finite]
        starts = np.flatnonzero(np.append(True, of[1:] != of[:-1]))
        sizes = np.diff(np.append(starts, len(of)))
        for extreme in (np.minimum, np.maximum):
            reached = numbers == np.repeat(extreme.reduceat(numbers, starts), sizes)
            keep[_firsts(finite[reached], part)] = True
    return Points(steps[keep], values[keep])


def _firsts(places: Times, part: Times) -> Times:
    """The first of ``places`` in each part."""
    of = part[places]
    first: Times = places[np.append(True, of[1:] != of[:-1])]
    return first


def without_repeats(points: Points) -> Points:
    """Without the points between two of the same value: a line through the rest is the same."""
    steps, values = points
    if len(values) < 3:
        return points
    same = values[1:] == values[:-1]
    keep = np.append(np.append(True, ~(same[:-1] & same[1:])), True)
    return Points(steps[keep], values[keep])
