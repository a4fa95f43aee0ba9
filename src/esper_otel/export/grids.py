"""Grids: the metrics of one rank, or of one of its seeds, side by side at the same steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.report.layouts import Numbers, Times
from esper_otel.report.trainers import CLOCK, TrainerCurves

_ORDER = {key: place for place, key in enumerate((*STEP_KEYS, *SEED_KEYS))}


class Steps(NamedTuple):
    """The steps that are wanted, both ends included."""

    first: int = 0
    last: int = 1 << 53

    def __contains__(self, step: object) -> bool:
        """Whether ``step`` is wanted."""
        return isinstance(step, int) and self.first <= step <= self.last


class Grid(NamedTuple):
    """Values by metric at ``steps``, NaN where there is none; times in Unix nanoseconds.

    Times are exact to 256 ns, as double floats hold them.
    """

    seed: str | None
    steps: Times
    times: Times
    values: dict[str, Numbers]


def grids(rank: TrainerCurves, wanted: Steps) -> Iterator[Grid]:
    """The grid of a rank's own metrics (``seed`` None), and then one for each of its seeds."""
    clock = rank.curves[None, CLOCK].points()
    for seed in dict.fromkeys(sorted((seed for seed, _ in rank.curves), key=_none_first)):
        points = {
            key: curve.points()
            for (whose, key), curve in rank.curves.items()
            if whose == seed and key not in (CLOCK, "step")
        }
        own = (clock.steps,) if seed is None else ()
        steps = np.unique(np.concatenate([*own, *(each.steps for each in points.values())]))
        steps = steps[(steps >= wanted.first) & (steps <= wanted.last)]
        values = {}
        for key in sorted(points, key=in_order):
            column = np.full(len(steps), np.nan)
            here = np.isin(points[key].steps, steps)
            column[np.searchsorted(steps, points[key].steps[here])] = points[key].values[here]
            values[key] = column
        places = np.minimum(np.searchsorted(clock.steps, steps), len(clock.steps) - 1)
        if len(steps):
            yield Grid(seed, steps, clock.values[places].astype(np.int64), values)


def time_of(rank: TrainerCurves, step: int, otherwise: int) -> int:
    """When ``step`` of a rank ended, in Unix nanoseconds; ``otherwise`` where nobody knows."""
    clock = rank.curves[None, CLOCK].points()
    place = int(np.searchsorted(clock.steps, step))
    if place < len(clock.steps) and clock.steps[place] == step:
        return int(clock.values[place])
    return otherwise


def in_order(key: str) -> tuple[int, str]:
    """By which metrics are sorted: as in the registry, and others behind them."""
    return _ORDER.get(key, len(_ORDER)), key


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` once all of it is written; else nothing does."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _none_first(seed: str | None) -> tuple[bool, str]:
    return seed is not None, seed or ""
