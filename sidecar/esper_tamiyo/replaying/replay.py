"""Replay: recorded steps through the engine that evaluated them live, by one table or two.

The engine reads no clock, so the same frames with the same proposals give the same
decisions, whether a trainer asks or a file is read. Where a live sidecar looks at its
clock, to notice a rank that has fallen silent, a replay takes the times of the frames.
:class:`Comparison` replays the same steps by two tables, and says where these differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from esper_otel.leyline.decisions import (
    NOMINAL,
    WARMING_UP,
    Action,
    Decision,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.observer import RuleChange
from esper_tamiyo.language.table import Table

Steps = Iterable[tuple[StepFrame, Proposal | None]]

TICK_NS = 1_000_000_000
"""Recorded time between two looks for silent ranks."""


class Judged(NamedTuple):
    """A decision, and the frame it is about: one without values when it is about silence."""

    frame: StepFrame
    decision: Decision

    @property
    def is_step(self) -> bool:
        """Whether a step was judged, and not that none came."""
        return bool(self.frame.values)

    @property
    def is_nominal(self) -> bool:
        """Whether there is nothing to tell."""
        decision = self.decision
        is_plain = decision.reason in (NOMINAL, WARMING_UP)
        return decision.action is Action.CONTINUE and is_plain


class Judge:
    """One engine over recorded steps."""

    def __init__(self, table: Table) -> None:
        self._collector = _DecisionCollector()
        self._engine = Engine(table, observer=self._collector)
        self._tick_at = 0

    def judge(self, frame: StepFrame, proposal: Proposal | None) -> list[Judged]:
        """The decision about ``frame``, behind those about silences until then.

        Empty for the frame of a process that a newer one has replaced.
        """
        if frame.time_unix_nano >= self._tick_at:
            self._tick_at = frame.time_unix_nano + TICK_NS
            self._engine.tick(frame.time_unix_nano)
        self._engine.observe(frame, proposal)
        return self._collector.pop_all()


class _DecisionCollector:
    """An observer that remembers what was decided."""

    def __init__(self) -> None:
        self._decided: list[Judged] = []

    def pop_all(self) -> list[Judged]:
        decided, self._decided = self._decided, []
        return decided

    def on_rule_change(self, change: RuleChange) -> None:
        """Not of interest."""

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """Comes once more to :meth:`on_decision`."""

    def on_end(self, frame: StepFrame) -> None:
        """Not of interest."""

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        self._decided.append(Judged(frame, decision))


def once(steps: Steps) -> Iterator[tuple[StepFrame, Proposal | None]]:
    """``steps`` without those that come again: nobody asks about a step twice."""
    newest: dict[tuple[str, int, str], int] = {}
    for frame, proposal in steps:
        whose = (frame.run, frame.rank, frame.instance)
        if frame.ended is not None:
            yield frame, None
        elif frame.step > newest.get(whose, -1):
            newest[whose] = frame.step
            yield frame, proposal


def replay(steps: Steps, table: Table) -> Iterator[Judged]:
    """Everything that ``table`` decides about ``steps``, in their order."""
    judge = Judge(table)
    for frame, proposal in once(steps):
        yield from judge.judge(frame, proposal)


class ReplaySummary(msgspec.Struct):
    """What a replay came to: steps, whose, over how long, and what was decided."""

    steps: int = 0
    ranks: set[tuple[str, int]] = msgspec.field(default_factory=set)
    decided: Counter[tuple[Action, str]] = msgspec.field(default_factory=Counter)
    first_unix_nano: int = 0
    last_unix_nano: int = 0

    def add(self, judged: Judged) -> None:
        """Count one decision in."""
        frame, decision = judged
        self.decided[decision.action, decision.reason] += 1
        if not judged.is_step:
            return
        time = frame.time_unix_nano
        self.first_unix_nano = min(self.first_unix_nano or time, time)
        self.last_unix_nano = max(self.last_unix_nano, time)
        self.steps += 1
        self.ranks.add((frame.run, frame.rank))

    @property
    def recorded_s(self) -> float:
        """From the end of the first step to the end of the last."""
        return (self.last_unix_nano - self.first_unix_nano) / 1e9


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
