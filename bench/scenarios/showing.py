"""From which step a trouble shows in any metric: a criterion that knows no rule.

A metric shows it at the first of two steps in a row that lie beyond everything it was in
the 64 steps before the trouble, on the same side, by more than the whole width of that
range. A metric that was above zero in all of them shows it as well by falling as far on a
logarithmic scale, which is how what vanishes leaves a wide range. For a metric that did
not move at all in these steps one step that differs is enough, and so is one at which a
metric that was always there is absent. Noise passes for trouble now and then, of which
there are some thirty metrics: the step found is then too early, and the delay counted from
it too long, never too short.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bench.scenarios.recordings import Column, Recorded

REFERENCE = 64
LEAST = 16
"""Values a metric needs among them."""

ITS_OWN_COURSE = frozenset(
    {
        "step",
        "kasmina.seed.stage",
        "kasmina.seed.alpha",
        "kasmina.seed.alpha_steps",
        "kasmina.kernel_fetch_ms",
        "cpu_util_percent",
    }
)
"""Metrics that move in a healthy run too after they stood still: counters, the life of a
seed, and the load of the host, which is looked at once a second."""

ISOLATED = frozenset({"kasmina.seed.isolation.dot", "kasmina.seed.isolation.seed_norm"})
"""Zero by what they mean as long as a seed is isolated; that they no longer are says only
that the seed has joined."""


def shows(ranks: list[Recorded]) -> int | None:
    """The first step at which the trouble shows in any metric; None when in none."""
    found = [step for recorded in ranks for step in _steps(recorded)]
    return min(found, default=None)


def _steps(recorded: Recorded) -> list[int]:
    assert recorded.at is not None
    steps = recorded.steps["step"]
    begins = int(np.searchsorted(steps, recorded.at))
    found = []
    for key, column in recorded.steps.items():
        if key not in ITS_OWN_COURSE:
            found.append(_first(column, begins))
    for key, column in recorded.seeds.items():
        if key in ITS_OWN_COURSE:
            continue
        for number in range(len(recorded.seed_ids)):
            of_seed = np.full(len(steps), np.nan)
            mine = recorded.seed_numbers == number
            of_seed[recorded.seed_frames[mine]] = column[mine]
            before = of_seed[max(begins - REFERENCE, 0) : begins]
            if key in ISOLATED and not np.any(before[np.isfinite(before)]):
                continue
            found.append(_first(of_seed, begins))
    return [int(steps[place]) for place in found if place is not None]


def _first(column: Column, begins: int) -> int | None:
    """The place at which ``column`` shows what began at ``begins``."""
    before = column[max(begins - REFERENCE, 0) : begins]
    known = before[np.isfinite(before)]
    if len(known) < LEAST:
        return None
    after = column[begins:]
    places = []
    if len(known) == len(before):
        places.append(_one(np.isnan(after)))
    low, high = known.min(), known.max()
    width = high - low
    with np.errstate(invalid="ignore"):
        lowest = max(low - width, low * low / high) if low > 0.0 else low - width
        for beyond in (after > high + width, after < lowest):
            if width > 0.0:
                beyond = beyond[:-1] & beyond[1:]
            places.append(_one(beyond))
    return min((begins + place for place in places if place is not None), default=None)


def _one(beyond: npt.NDArray[np.bool_]) -> int | None:
    return int(beyond.argmax()) if beyond.any() else None
