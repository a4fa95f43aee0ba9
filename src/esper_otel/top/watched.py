"""Watched runs: the data of runs and their ranks, and its source."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Protocol

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.stages import Stage
from esper_otel.report.curves import Curve
from esper_otel.report.rulings import Ruling
from esper_otel.report.trainers import CLOCK, TrainerCurves

PHASES = {
    "input_wait_ms": "input",
    "forward_ms": "forward",
    "backward_ms": "backward",
    "optimizer_ms": "optimizer",
    "hook_latency_ms": "esper",
}
"""Parts of a step that are shown, and what they are called."""

_NOT_SHOWN = frozenset({CLOCK, "step", "phase"})
_FIRST = ("loss", "gradient_norm", "step_latency_ms", "optimizer_lr", "accuracy")
"""Curves that come first, where people choose one."""


class WatchedSeed:
    """A seed: the stages it has been in, each with its first step, and its newest alpha."""

    def __init__(self, name: str, stages: list[tuple[Stage, int]], alpha: float) -> None:
        self.name = name
        self.stages = stages
        self.alpha = alpha
        self.is_gone = False
        """It is not reported any more, and was no fossil."""


class WatchedRank:
    """One rank: the processes that were it, one after the other, and how it is doing.

    ``state`` is healthy, stale, finished or failed, "" where nobody says; ``ended`` is how it
    ended, and ``mode`` what it does with decisions.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.trainers: list[TrainerCurves] = []
        self.state = ""
        self.ended = ""
        self.mode = ""
        self.told_step = -1
        self.told: dict[str, float] = {}
        """Newest values, where they are known without their curves."""

    def take_trainers(self, trainers: Sequence[TrainerCurves]) -> None:
        """Those of its processes whose steps follow one another; of others the newest."""
        self.trainers = []
        for trainer in sorted(trainers, key=lambda each: each.span()[0]):
            if self.trainers and trainer.steps()[1] <= self.trainers[-1].steps()[2]:
                self.trainers = []
            self.trainers.append(trainer)

    @property
    def step(self) -> int:
        """Its newest step, -1 without any."""
        newest = self.trainers[-1].steps()[2] if self.trainers else -1
        return max(newest, self.told_step)

    @property
    def clock(self) -> float:
        """When its newest step ended, in Unix nanoseconds; 0 when that is not known."""
        return self.trainers[-1].span()[1] if self.trainers else 0.0

    def curve(self, key: str, seed: str | None = None) -> Curve | None:
        """The curve of a metric over all its processes, None without a value."""
        found = [t.curves[seed, key] for t in self.trainers if (seed, key) in t.curves]
        if len(found) < 2:
            return found[0] if found else None
        whole = Curve()
        for each in found:
            whole.absorb(each)
        return whole

    def newest(self, key: str) -> float | None:
        """The value of a metric at the newest step; None when it had none."""
        if self.told_step >= 0:
            value = self.told.get(key)
            if value is not None and isfinite(value):
                return value
        if not self.trainers:
            return None
        curve = self.trainers[-1].curves.get((None, key))
        if curve is None or curve.total.last_step < self.trainers[-1].steps()[2]:
            return None
        return curve.total.last

    def keys(self) -> list[str]:
        """Metrics that have a curve: the usual ones first, then the script's own."""
        there = {
            key
            for trainer in self.trainers
            for (seed, key), curve in trainer.curves.items()
            if seed is None and key not in _NOT_SHOWN and curve.total.count
        }
        first = [key for key in _FIRST if key in there]
        rest = sorted(there.difference(first), key=lambda key: (not is_custom(key), key))
        return [*first, *rest]

    def seeds(self) -> list[WatchedSeed]:
        """Its seeds, those that live first, and of these the one seen first."""
        names = dict.fromkeys(
            seed for trainer in self.trainers for seed, _ in trainer.curves if seed is not None
        )
        found = [seed for name in names if (seed := self._seed(name)) is not None]
        return sorted(found, key=lambda seed: seed.is_gone)

    def _seed(self, name: str) -> WatchedSeed | None:
        curve = self.curve("kasmina.seed.stage", name)
        if curve is None or not curve.total.count:
            return None
        stages: list[tuple[Stage, int]] = []
        for step, value in zip(*(part.tolist() for part in curve.points()), strict=True):
            if isfinite(value) and 0 <= value < len(Stage):
                stage = Stage(int(value))
                if not stages or stages[-1][0] is not stage:
                    stages.append((stage, step))
        if not stages:
            return None
        alpha = self.curve("kasmina.seed.alpha", name)
        seed = WatchedSeed(name, stages, alpha.total.last if alpha is not None else 0.0)
        is_behind = curve.total.last_step < self.trainers[-1].steps()[2] - 1
        seed.is_gone = is_behind and stages[-1][0] is not Stage.FOSSILIZED
        return seed


class WatchedRun:
    """One run: its ranks, and its newest decisions in the order in which they came."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ranks: dict[int, WatchedRank] = {}
        self.rulings: list[Ruling] = []
        self.decided = 0
        """How many decisions there have been, those included that are not kept."""

    @property
    def lead(self) -> WatchedRank | None:
        """The rank that stands for the run: the lowest."""
        return self.ranks[min(self.ranks)] if self.ranks else None


class RunSource(Protocol):
    """Where watched runs come from."""

    @property
    def name(self) -> str:
        """What people are told of it."""

    @property
    def problem(self) -> str:
        """What is wrong with it now, "" when all is well."""

    def refresh(self, run: str, rank: int, now: float) -> bool:
        """Find out what is new at ``now`` (seconds of a monotonic clock), of all runs and in
        particular of a rank of one ("": the newest run); whether anything is."""

    def runs(self) -> list[WatchedRun]:
        """The runs, the one that was heard of last at the end."""
