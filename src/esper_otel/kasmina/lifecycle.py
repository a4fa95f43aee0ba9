"""A slot's life: which stage, and for how long."""

from __future__ import annotations

from esper_otel.leyline.decisions import SeedOperation
from esper_otel.leyline.stages import Stage, check_transition

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

GROWING = frozenset(
    {Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY}
)
"""Stages of a seed whose fate is open: it is alive and not yet part of the network."""

ISOLATED = frozenset({Stage.GERMINATED, Stage.TRAINING})
"""Stages in which the host must not feel the seed."""


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
