"""Lifecycle: the stage of a slot, the time spent in it, and the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from esper_otel.leyline.decisions import SeedOperation
from esper_otel.leyline.stages import Stage, check_transition
from esper_otel.settings import EsperSettings

TARGET: dict[SeedOperation, Stage] = {
    SeedOperation.GERMINATE: Stage.GERMINATED,
    SeedOperation.TRAIN: Stage.TRAINING,
    SeedOperation.BLEND: Stage.BLENDING,
    SeedOperation.SHADOW: Stage.SHADOWING,
    SeedOperation.PROBATE: Stage.PROBATIONARY,
    SeedOperation.FOSSILIZE: Stage.FOSSILIZED,
    SeedOperation.CULL: Stage.CULLED,
}
"""Stage that each operation leads to."""

NEXT: dict[Stage, SeedOperation] = {
    Stage.GERMINATED: SeedOperation.TRAIN,
    Stage.TRAINING: SeedOperation.BLEND,
    Stage.BLENDING: SeedOperation.SHADOW,
    Stage.SHADOWING: SeedOperation.PROBATE,
    Stage.PROBATIONARY: SeedOperation.FOSSILIZE,
}
"""The operation that leads a growing seed on from each stage."""

GROWING = frozenset(
    {Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY}
)
"""Stages of a seed whose fate is open: it is alive and not yet part of the network."""

ISOLATED = frozenset({Stage.GERMINATED, Stage.TRAINING})
"""Stages in which the host must not feel the seed."""


class GardenError(ValueError):
    """An impossible request to a garden; the message has the expected arguments."""


class Lifecycle:
    """The stage of one slot, and how many steps it has been in it.

    ``dwelt`` is counted in steps by :meth:`pass_step`, which is not called while the slot
    is frozen: the clock of a stage is whoever calls that.
    """

    __slots__ = ("dwelt", "stage")

    def __init__(self, stage: Stage = Stage.DORMANT, dwelt: int = 0) -> None:
        self.stage = stage
        self.dwelt = dwelt

    def move(self, target: Stage) -> Stage:
        """Go to ``target``; returns the stage left.

        Raises :class:`~esper_otel.leyline.stages.IllegalTransitionError`.
        """
        check_transition(self.stage, target)
        left, self.stage = self.stage, target
        self.dwelt = 0
        return left

    def pass_step(self) -> None:
        """One more step in this stage."""
        self.dwelt += 1

    def __repr__(self) -> str:
        return f"Lifecycle({self.stage.name}, dwelt={self.dwelt})"


def min_dwell(stage: Stage, settings: EsperSettings) -> int:
    """Steps that a seed stays in ``stage`` at least."""
    if stage is Stage.TRAINING:
        return settings.training_steps
    if stage is Stage.BLENDING:
        return settings.blending_steps
    if stage is Stage.SHADOWING:
        return settings.shadowing_steps
    if stage is Stage.PROBATIONARY:
        return settings.probation_steps
    return 0


class SeedView(NamedTuple):
    """What there is to know of a growing seed to choose the next operation.

    ``next_operation`` comes next in its life, ``is_ready`` says whether it has dwelt and
    every gate before that is open, ``cull_reason`` why it should be culled (empty: it
    should not).
    """

    seed_id: str
    next_operation: SeedOperation | None
    is_ready: bool
    cull_reason: str
    is_frozen: bool


class Countdown:
    """Seconds of an embargo that have to pass between steps, those of a pause not counted.

    ``clock`` gives monotonic seconds. What is left is kept, and no mark of an end: after
    a restart the clock is another one.
    """

    __slots__ = ("_clock", "_mark", "left")

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.left = max(seconds, 0.0)
        """Seconds still to pass, as of the newest :meth:`tick`."""
        self._clock = clock
        self._mark = clock()

    def tick(self, frozen: bool) -> None:
        """Take note of the time since the last call, unless it was a pause."""
        now = self._clock()
        if not frozen:
            self.left = max(self.left - (now - self._mark), 0.0)
        self._mark = now

    @property
    def over(self) -> bool:
        """Whether all of it has passed."""
        return self.left == 0.0
