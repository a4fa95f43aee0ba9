"""Whether one bad step ruins a training: a NaN batch, an infinite loss, a gradient × 10⁴.

Six small trainings (:mod:`bench.small_trainings`), three random seeds each, on the CPU. Each is
trained healthy and bare, then three times with one bad step, which has its effect before the
optimizer's update: once under ``advise``, where nothing is changed, and once under
``enforce``, each watched as a script that knows nothing of us is, by a ``tamiyo serve`` with
the default table. What counts is whether weights are finite at the end, and the loss on data
that is not trained on, over that of the healthy twin with the same seed.

    python -m bench.poisoned [--json PATH]
"""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from bench.figures import Figure, median, run
from bench.roundtrip import tamiyo
from bench.small_trainings import (
    HEALTHY,
    SMALL,
    Batch,
    Course,
    Outcome,
    Small,
    quiet,
    train,
    watched,
)

BENCH = "poisoned"
SEEDS = 3
AT = 137
"""The bad step."""

TIMES = 1e4
BAR = 1.05
LARGEST = 999.0
"""Stands for all ratios beyond, and for those of losses that are no number."""

MODES = ("advise", "enforce")


class NanBatch(Course):
    """One bad sample."""

    def batch(self, step: int, work: Small, batch: Batch) -> Batch:
        return work.poisoned(batch) if step == AT else batch


class InfiniteLoss(Course):
    """A loss that overflows."""

    def loss(self, step: int, loss: Tensor) -> Tensor:
        return loss * inf if step == AT else loss


class LargeGradient(Course):
    """Gradients that are 10,000 times what they are."""

    def gradients(self, step: int, work: Small) -> None:
        if step == AT:
            for parameter in work.model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= TIMES


COURSES: dict[str, Callable[[], Course]] = {
    "NaN batch": NanBatch,
    "infinite loss": InfiniteLoss,
    "gradient × 10⁴": LargeGradient,
}


def outcome(make: Callable[[], Small], seed: int, course: Course) -> Outcome:
    torch.manual_seed(seed)
    return train(make(), course)


class Against:
    """Outcomes of one bad step in one mode, beside those of healthy twins."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.ratios: dict[str, list[float]] = {}
        """By training: loss over that of the healthy twin."""

    def take(self, name: str, outcome: Outcome, healthy: Outcome) -> None:
        """One training more."""
        self.outcomes.append(outcome)
        self.ratios.setdefault(name, []).append(outcome.loss / healthy.loss)

    @property
    def ruined(self) -> int:
        """Trainings whose weights are not finite."""
        return sum(not outcome.finite for outcome in self.outcomes)

    @property
    def all_ratios(self) -> list[float]:
        """Of all trainings."""
        return [ratio for ratios in self.ratios.values() for ratio in ratios]


def measured(socket: Path) -> dict[tuple[str, str], Against]:
    """What came of each bad step in each mode."""
    against = {(course, mode): Against() for course in COURSES for mode in MODES}
    for name, make in SMALL.items():
        for seed in range(SEEDS):
            healthy = outcome(make, seed, HEALTHY)
            for course, mode in against:
                with watched(mode, socket):
                    ended = outcome(make, seed, COURSES[course]())
                against[course, mode].take(name, ended, healthy)
    return against


def worst(ratios: list[float]) -> float:
    """The largest of them, as far as it is worth a number."""
    return min(max(ratios), LARGEST)


def rows(course: str, of_mode: dict[str, Against]) -> Iterator[Figure]:
    """The rows of one kind of bad step."""
    advised, enforced = of_mode["advise"], of_mode["enforce"]
    count = len(enforced.outcomes)
    yield Figure.at_most(
        BENCH,
        f"{course}: of {count} trainings enforced, weights not finite",
        enforced.ruined,
        "trainings",
        bar=0,
    )
    yield Figure.report(
        BENCH, f"{course}: the same, advised", advised.ruined, "trainings", None
    )
    yield Figure.at_most(
        BENCH,
        f"{course}: last loss over the healthy twin's, enforced, worst",
        worst(enforced.all_ratios),
        "times",
        bar=BAR,
    )
    for title, against in (("enforced", enforced), ("advised", advised)):
        yield Figure.report(
            BENCH,
            f"{course}: the same, {title}, median",
            min(median(against.all_ratios), LARGEST),
            "times",
        )
    yield Figure.report(
        BENCH, f"{course}: the same, advised, worst", worst(advised.all_ratios), "times"
    )
    for name, ratios in enforced.ratios.items():
        yield Figure.report(BENCH, f"{course}: enforced, {name}, worst", worst(ratios), "times")


def figures() -> list[Figure]:
    """All rows of this bench."""
    quiet()
    logging.getLogger("esper_otel").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        socket = Path(folder) / "tamiyo.sock"
        with tamiyo(socket):
            against = measured(socket)
    return [
        row
        for course in COURSES
        for row in rows(course, {mode: against[course, mode] for mode in MODES})
    ]


if __name__ == "__main__":
    raise SystemExit(run(figures))
