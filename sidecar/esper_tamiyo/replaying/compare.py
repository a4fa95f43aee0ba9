"""Compare: two tables over the same steps, and where they decide differently."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from esper_otel.leyline.decisions import (
    NOMINAL,
    WARMING_UP,
    Action,
    Decision,
    SeedOperation,
    Severity,
)
from esper_tamiyo.language.table import Table
from esper_tamiyo.replaying.replay import Judge, Judged, Steps, once


class DecisionEffect(msgspec.Struct, frozen=True):
    """What of a decision reaches the run; the rest of it says why."""

    action: Action
    severity: Severity
    reason: str
    target_seed: str | None
    seed_operation: SeedOperation | None
    parameters: dict[str, float]
    conservative: bool


def effect_of(decision: Decision) -> DecisionEffect:
    """The part of a decision that two tables are compared by.

    That one of them warms up for longer is no difference, as long as nothing comes of it.
    """
    return DecisionEffect(
        decision.action,
        decision.severity,
        NOMINAL if decision.reason == WARMING_UP else decision.reason,
        decision.target_seed,
        decision.seed_operation,
        decision.parameters,
        decision.conservative,
    )


class Difference(msgspec.Struct):
    """Steps of one rank, none between them left out, that differ in the same way.

    Or its silence behind a step, which only one of the tables minds: then the effect of
    the other is None.
    """

    run: str
    rank: int
    first_step: int
    last_step: int
    steps: int
    silence: bool
    a: DecisionEffect | None
    b: DecisionEffect | None


class Comparison:
    """Compares two tables over steps; the counts are known once it was run through."""

    def __init__(self, a: Table, b: Table) -> None:
        self.steps = 0
        self.differing = 0
        self.silences = 0
        self._a, self._b = Judge(a), Judge(b)
        self._open: dict[tuple[str, int], Difference] = {}

    def differences(self, steps: Steps) -> Iterator[Difference]:
        """Where the tables decide differently, each difference as soon as it has ended."""
        for frame, proposal in once(steps):
            a = _effects(self._a.judge(frame, proposal))
            b = _effects(self._b.judge(frame, proposal))
            for place in dict.fromkeys((*a, *b)):
                run, rank, step, is_step = place
                pair = a.get(place), b.get(place)
                if is_step:
                    yield from self._step(run, rank, step, *pair)
                elif pair[0] != pair[1]:
                    self.silences += 1
                    yield Difference(run, rank, step, step, 0, True, *pair)
        yield from self._open.values()

    def _step(
        self, run: str, rank: int, step: int, a: DecisionEffect | None, b: DecisionEffect | None
    ) -> Iterator[Difference]:
        """The difference that ends before this step, if one does."""
        self.steps += 1
        self.differing += a != b
        before = self._open.get((run, rank))
        if before is not None and (before.a, before.b) == (a, b):
            before.last_step = step
            before.steps += 1
            return
        if before is not None:
            yield self._open.pop((run, rank))
        if a != b:
            self._open[run, rank] = Difference(run, rank, step, step, 1, False, a, b)


def _effects(decided: list[Judged]) -> dict[tuple[str, int, int, bool], DecisionEffect]:
    """By run, rank, step and whether it is about the step."""
    return {
        (judged.frame.run, judged.frame.rank, judged.frame.step, judged.is_step): effect_of(
            judged.decision
        )
        for judged in decided
    }
