"""The harvest of one request: its step records, and the fate of each of its data points."""

from __future__ import annotations

import msgspec

from esper_otel.leyline.frames import StepFrame

MAX_STEPS = 16_384
"""Steps that are taken of one request; of those of our own sender it has 256 at most."""

MAX_SEED_ROWS = 32_768
"""Seeds of steps that are taken of one request, each counted in every step that reports it."""

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

    frames: list[StepFrame]
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

    def leave_out(self, reason: str, points: int = 1) -> None:
        """Count points that cannot be used."""
        self.unusable += points
        self.reasons[reason] = self.reasons.get(reason, 0) + points
