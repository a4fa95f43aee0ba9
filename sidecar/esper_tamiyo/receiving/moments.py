"""Moments: the points of one trainer that share a timestamp, and their step record."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.leyline.endings import RunEnd
from esper_otel.leyline.frames import MAX_STEP, MAX_TIME_UNIX_NANO, StepFrame


class Identity(NamedTuple):
    """Whose points a resource holds."""

    run: str
    rank: int
    instance: str


class Moment:
    """Points of one trainer that share a timestamp."""

    __slots__ = ("custom", "end", "nonfinite", "points", "seeds", "values")

    def __init__(self) -> None:
        self.end: tuple[int, RunEnd] | None = None
        """The last step of a run that ended then, and how it ended."""
        self.values: dict[str, float] = {}
        self.seeds: dict[str, dict[str, float]] = {}
        self.points = 0
        self.nonfinite = 0
        self.custom = 0
        """Points of custom values."""

    def join(self, other: Moment) -> bool:
        """Take in what came in another request; False for a second copy of the step, of which
        nothing is taken."""
        if "step" in self.values and "step" in other.values:
            return False
        self.values.update(other.values)
        for seed_id, values in other.seeds.items():
            self.seeds.setdefault(seed_id, {}).update(values)
        self.end = self.end or other.end
        self.points += other.points
        self.nonfinite += other.nonfinite
        return True

    def step_frame(self, whose: Identity, time_unix_nano: int) -> StepFrame | None:
        """The step it was, None when no point says which."""
        step = self.values.get("step")
        if step is None or not 0 <= step <= MAX_STEP or step != int(step):
            return None
        if time_unix_nano > MAX_TIME_UNIX_NANO:
            return None
        if self.nonfinite:
            self.values["nonfinite"] = self.values.get("nonfinite", 0.0) + self.nonfinite
            self.nonfinite = 0
        return StepFrame(
            whose.run,
            whose.instance,
            whose.rank,
            int(step),
            time_unix_nano,
            self.values,
            self.seeds,
        )

    def end_frame(self, whose: Identity, time_unix_nano: int) -> StepFrame | None:
        """The end of a run that it was, None when it was none."""
        if self.end is None or time_unix_nano > MAX_TIME_UNIX_NANO:
            return None
        run, rank, instance = whose
        step, ended = self.end
        return StepFrame(run, instance, rank, step, time_unix_nano, {}, ended=ended)
