"""The harvest of one request: its step records, and the fate of each of its data points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from operator import itemgetter

import msgspec

from esper_otel.leyline.frames import (
    MAX_NAME,
    MAX_SEEDS_PER_FRAME,
    MAX_STEP,
    MAX_TIME_UNIX_NANO,
    StepFrame,
)
from esper_tamiyo.receiving.moments import Identity
from esper_tamiyo.receiving.pipe import PackedStep, packed_step
from esper_tamiyo.receiving.shapes import Read

MAX_STEPS = 16_384
"""Steps that are taken of one request; of those of our own sender it has 256 at most."""

MAX_SEED_ROWS = 32_768
"""Seeds of steps that are taken of one request, each counted in every step that reports it."""

MAX_WALKED = 1 << 18
"""Most metrics, and data points of no use to us, that a request may have: its bytes bound the
others."""

NO_STEP, NAME, TIME, SEEDS, AMOUNT = "no_step", "name", "time", "seeds", "amount"
"""Why points of ours cannot be used: no number, seed_id or step at their time; a name (or rank)
that is too long; a time or step out of range; too many seeds; too many steps in one request."""

_ANY = 1 << 62


class TooMuchError(Exception):
    """A request has more resources, metrics or points than are gone through."""


class Harvest(msgspec.Struct):
    """Frames of one request, and what became of its data points.

    ``used`` points are in the frames. ``foreign`` ones belong to other metrics and are
    none of our business. ``unusable`` ones carry a name of ours but no step at their
    time, no ``seed_id`` or no number, or are beyond a limit; the producer is told about
    them, and ``reasons`` has how many for which. ``old`` ones are of steps that came too
    late to be decided on.

    ``steps_left`` and ``seeds_left`` are how many more are taken: a recording may have any
    number, a request from a network may not.
    """

    frames: list[StepFrame | PackedStep]
    used: int = 0
    foreign: int = 0
    unusable: int = 0
    old: int = 0
    reasons: dict[str, int] = {}
    steps_left: int = _ANY
    seeds_left: int = _ANY
    walked: int = 0
    """Metrics that were looked at."""

    @classmethod
    def of_request(cls) -> Harvest:
        """An empty one, for a request from a network."""
        return cls([], steps_left=MAX_STEPS, seeds_left=MAX_SEED_ROWS)

    def take_whole(
        self,
        reads: Sequence[Read],
        whose: Identity,
        packed: bytes,
        is_old: Callable[[Identity, int], bool],
    ) -> bool:
        """Take the steps of a resource all of whose parts have a known shape, packed at once;
        ``packed`` is how the pipe says whose they are.

        False, and none is taken, where something has to be looked at point by point.
        """
        steps = _steps_of(reads)
        if steps is None or len(steps) > self.steps_left:
            return False
        seeds = 0
        for time_unix_nano, step in steps.items():
            if (
                not (0.0 <= step.number <= MAX_STEP and step.number.is_integer())
                or time_unix_nano > MAX_TIME_UNIX_NANO
                or len(step.seeds) > MAX_SEEDS_PER_FRAME
            ):
                return False
            seeds += len(step.seeds)
        if seeds > self.seeds_left:
            return False
        self.steps_left -= len(steps)
        self.seeds_left -= seeds
        frames = []
        for time_unix_nano, step in steps.items():
            if is_old(whose, time_unix_nano):
                self.old += step.points
            else:
                self.used += step.points
                number, seeds_packed = int(step.number), step.seeds.values()
                frames.append(
                    packed_step(packed, number, time_unix_nano, step.values, seeds_packed)
                )
        frames.sort(key=_STEP)
        self.frames += frames
        self.walked += sum(metrics + 1 for (_, metrics), _, _ in reads)
        return True

    def bound(self) -> None:
        """Raise :class:`TooMuchError` where more was looked at than is."""
        if self.walked + self.foreign + self.unusable > MAX_WALKED:
            raise TooMuchError(f"a request may have {MAX_WALKED} metrics and points")

    def leave_out(self, reason: str, points: int = 1) -> None:
        """Count points that cannot be used."""
        self.unusable += points
        self.reasons[reason] = self.reasons.get(reason, 0) + points


_STEP = itemgetter(0)
"""Of a packed step; two of the same step stay in the order they came."""


class _StepParts:
    """The packed parts of one step."""

    __slots__ = ("number", "points", "seeds", "values")

    def __init__(self) -> None:
        self.number = -1.0
        self.values = b""
        self.seeds: dict[str, bytes] = {}
        self.points = 0


def _steps_of(reads: Sequence[Read]) -> dict[int, _StepParts] | None:
    """The steps by their time; None where one is not made of whole, finite parts."""
    steps: dict[int, _StepParts] = {}
    for (groups, _), time_unix_nano, values in reads:
        if not isfinite(sum(values)):
            return None
        step = steps.get(time_unix_nano)
        if step is None:
            step = steps[time_unix_nano] = _StepParts()
        step.points += len(values)
        for seed_id, _, pick, (constants, pack), step_at in groups:
            picked = values if pick is None else pick(values)
            parts = constants.copy()
            parts[1::2] = picked
            if seed_id:
                if seed_id in step.seeds or len(seed_id) > MAX_NAME:
                    return None
                step.seeds[seed_id] = pack(*parts)
            elif step.values or step_at < 0:
                return None
            else:
                step.number = picked[step_at]
                step.values = pack(*parts)
    return steps
