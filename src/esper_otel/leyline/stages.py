"""The stages of a seed's life and the transitions between them."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """Stage of a seed; the number is what ``kasmina.seed.stage`` reports."""

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    SHADOWING = 5
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10
    TERMINATED = 11


TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.UNKNOWN: frozenset(),
    Stage.DORMANT: frozenset({Stage.GERMINATED, Stage.TERMINATED}),
    Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.CULLED}),
    Stage.TRAINING: frozenset({Stage.BLENDING, Stage.CULLED}),
    Stage.BLENDING: frozenset({Stage.SHADOWING, Stage.CULLED}),
    Stage.SHADOWING: frozenset({Stage.PROBATIONARY, Stage.CULLED}),
    Stage.PROBATIONARY: frozenset({Stage.FOSSILIZED, Stage.CULLED}),
    Stage.FOSSILIZED: frozenset({Stage.TERMINATED}),
    Stage.CULLED: frozenset({Stage.EMBARGOED}),
    Stage.EMBARGOED: frozenset({Stage.RESETTING}),
    Stage.RESETTING: frozenset({Stage.DORMANT}),
    Stage.TERMINATED: frozenset(),
}


class IllegalTransitionError(ValueError):
    """A seed was asked to move between two stages that are not connected."""

    def __init__(self, source: Stage, target: Stage) -> None:
        allowed = ", ".join(sorted(stage.name for stage in TRANSITIONS[source])) or "nothing"
        super().__init__(
            f"a seed cannot go from {source.name} to {target.name}: "
            f"{source.name} may go to {allowed}"
        )
        self.source = source
        self.target = target


def check_transition(source: Stage, target: Stage) -> None:
    """Raise :class:`IllegalTransitionError` unless ``source`` may go to ``target``."""
    if target not in TRANSITIONS[source]:
        raise IllegalTransitionError(source, target)
