"""Growth: which operation the garden would like to do next.

Nothing here acts. The garden offers what it sees (:class:`Sight`), and gets at most one
proposal, which stays the same from step to step until it was done or its reason is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isfinite
from typing import NamedTuple

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings


class Sight(NamedTuple):
    """What growth sees of one seed.

    ``wants`` is the operation that comes next in its life, ``ready`` whether it has dwelt
    and every gate before it is open, ``hopeless`` why it should be culled (empty: it
    should not).
    """

    seed_id: str
    wants: SeedOperation | None
    ready: bool
    hopeless: str
    frozen: bool


NEXT: dict[Stage, SeedOperation] = {
    Stage.GERMINATED: SeedOperation.TRAIN,
    Stage.TRAINING: SeedOperation.BLEND,
    Stage.BLENDING: SeedOperation.SHADOW,
    Stage.SHADOWING: SeedOperation.PROBATE,
    Stage.PROBATIONARY: SeedOperation.FOSSILIZE,
}
"""The operation that leads a growing seed on from each stage."""


def dwell(stage: Stage, settings: EsperSettings) -> int:
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


def choose(seeds: Iterable[Sight], germination: str | None) -> Proposal | None:
    """The operation to propose, None when there is none.

    What can be culled comes first, then seeds that may go on, the oldest (first) before
    the others; ``germination`` is the id of a seed that could be sown, the last choice.
    Frozen seeds come behind all others: they need a SEED decision to go on, and must not
    keep those that are free from being proposed.
    """
    best: Proposal | None = None
    best_rank = inf
    for seed in seeds:
        if seed.hopeless:
            operation, rank = SeedOperation.CULL, 0
        elif seed.ready and seed.wants is not None:
            operation, rank = seed.wants, 1
        else:
            continue
        rank += 3 * seed.frozen
        if rank < best_rank:
            best, best_rank = Proposal(seed.seed_id, operation), rank
    if germination is not None and best_rank > 2:
        return Proposal(germination, SeedOperation.GERMINATE)
    return best


class Plateau:
    """Says when a loss has stopped falling.

    ``steps`` without one that is lower than the best by a share of ``improvement`` make a
    plateau; a step without a loss does not count.
    """

    __slots__ = ("_improvement", "_steps", "best", "waited")

    def __init__(self, steps: int, improvement: float) -> None:
        self._steps = steps
        self._improvement = improvement
        self.best = inf
        self.waited = 0

    def update(self, loss: float) -> None:
        """Take the loss of one step; NaN is none."""
        if not isfinite(loss):
            return
        if loss < self.best - self._improvement * abs(self.best) or self.best == inf:
            self.best = loss
            self.waited = 0
        else:
            self.waited += 1

    @property
    def reached(self) -> bool:
        """Whether it has lasted long enough."""
        return self.waited >= self._steps

    def restart(self) -> None:
        """The network is another one now: what it can do has to show anew."""
        self.best = inf
        self.waited = 0
