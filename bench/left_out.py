"""Whether the default table holds on workloads that nobody tuned it on: one is left out.

For each workload in turn the few numbers of the table that can be tuned as a whole are chosen
by all others, on their half for tuning, and the workload that had no part in that is judged:
on its half for tuning, and on its unused one. The bars are those of :mod:`bench.judgement`
times :data:`SLACK`.

What can be chosen (:data:`CHOICES`): the *margin* beyond what a record explains, the *budget*
of false alarms that it states, and the *patience* of rules on what has risen or fallen for so
many steps. From the table as it is each is moved alone. Each recording is read once and
replayed by all of these tables.

    python -m bench.left_out [--json PATH]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from bench.figures import Figure, run
from bench.judgement import (
    ACTED_ON_BAR,
    FALSE_ACTIONS_BAR,
    FALSE_NOTICES_BAR,
    TOLD_SOON_BAR,
    TOUCHED_BAR,
)
from bench.scenarios.scoring import (
    PER_STEPS,
    SOON_ACTED,
    SOON_TOLD,
    Outcome,
    Score,
    outcome,
    recorded_in,
    score,
)
from bench.scenarios.suite import EXTENTS, RECORDINGS
from esper_tamiyo.language.operators import ON_EARLIER, ON_RECORDS
from esper_tamiyo.language.table import Condition, Group, Rule, Table
from esper_tamiyo.language.table_file import load

BENCH = "left_out"
SLACK = 2.0


class Choice(NamedTuple):
    """What is chosen: factors of what the table has."""

    margin: float = 1.0
    budget: float = 1.0
    patience: float = 1.0

    def __str__(self) -> str:
        """What it moves, for people."""
        moved = [
            f"{name} × {value:g}" for name, value in self._asdict().items() if value != 1.0
        ]
        return ", ".join(moved) or "as it is"


CHOICES = (
    Choice(),
    Choice(margin=0.8),
    Choice(margin=1.25),
    Choice(budget=4.0),
    Choice(patience=0.75),
    Choice(patience=1.25),
)


def moved(table: Table, choice: Choice) -> Table:
    """``table`` with the numbers of a choice."""
    steps = round(table.record.false_alarm_steps * choice.budget)
    return replace(
        table,
        rules=tuple(_moved_rule(rule, choice) for rule in table.rules),
        record=replace(table.record, false_alarm_steps=steps),
    )


def _moved_rule(rule: Rule, choice: Choice) -> Rule:
    return replace(rule, when=_moved_when(rule.when, choice))


def _moved_when(when: Condition | Group, choice: Choice) -> Condition | Group:
    if isinstance(when, Group):
        return replace(when, parts=tuple(_moved_when(part, choice) for part in when.parts))
    if when.operator in ON_RECORDS:
        return replace(when, number=when.number * choice.margin)
    if when.operator in ON_EARLIER:
        return replace(when, number=max(1, round(when.number * choice.patience)))
    return when


def shortfall(told: Score) -> float:
    """How bad it is: each figure in units of its bar."""
    return (
        told.false_actions / FALSE_ACTIONS_BAR
        + told.false_notices / FALSE_NOTICES_BAR
        + 100 * (1 - told.promptness) / (100 - TOLD_SOON_BAR)
        + 100 * (1 - told.intervention) / (100 - ACTED_ON_BAR)
    )


Judged = dict[Choice, list[Outcome]]


def judged(table: Table, *, held_out: bool, only: dict[str, Choice] | None = None) -> Judged:
    """The outcomes of one half by each choice; with ``only`` by that of each workload."""
    tables = {choice: moved(table, choice) for choice in CHOICES}
    found: Judged = {choice: [] for choice in CHOICES}
    for ranks in recorded_in(RECORDINGS, held_out=held_out):
        workload = ranks[0].scenario.workload
        for choice in CHOICES if only is None else (only[workload],):
            found[choice].append(outcome(ranks, tables[choice]))
    return found


def chosen(tuning: Judged) -> dict[str, Choice]:
    """For each workload what all others choose."""
    return {
        workload: min(
            CHOICES,
            key=lambda choice: shortfall(score(_others(tuning[choice], workload))),
        )
        for workload in EXTENTS
    }


def _others(outcomes: list[Outcome], workload: str) -> Iterator[Outcome]:
    return (each for each in outcomes if each.scenario.workload != workload)


def left_out(found: Judged, choices: dict[str, Choice]) -> list[Outcome]:
    """The outcomes of each workload by what the others chose."""
    return [
        each
        for choice, outcomes in found.items()
        for each in outcomes
        if choices[each.scenario.workload] == choice
    ]


def rows(half: str, outcomes: list[Outcome]) -> list[Figure]:
    """The figures of one half, with their bars, and those of each workload."""
    told = score(outcomes)
    healthy = score(each for each in outcomes if each.at is None)
    name = f"each workload by what the others chose, {half}"
    bars = [
        (f"false actions in {PER_STEPS:,} healthy steps", told.false_actions, "actions"),
        (f"false notices in {PER_STEPS:,} healthy steps", told.false_notices, "notices"),
        ("healthy runs that an action touched", 100 * told.touch, "%"),
        (f"troubles not told within {SOON_TOLD} steps", 100 * (1 - told.promptness), "%"),
        (
            f"harmful troubles not acted on within {SOON_ACTED} steps",
            100 * (1 - told.intervention),
            "%",
        ),
    ]
    limits = (
        *(FALSE_ACTIONS_BAR, FALSE_NOTICES_BAR, TOUCHED_BAR),
        *(100 - TOLD_SOON_BAR, 100 - ACTED_ON_BAR),
    )
    made = [
        Figure.at_most(BENCH, f"{name}: {what}", value, unit, bar=SLACK * limit)
        for (what, value, unit), limit in zip(bars, limits, strict=True)
    ]
    made.append(
        Figure.report(
            BENCH,
            f"{name}: false notices in {PER_STEPS:,} steps of healthy runs alone",
            healthy.false_notices,
            "notices",
        )
    )
    return made + [row for workload in EXTENTS for row in _of(workload, half, outcomes)]


def _of(workload: str, half: str, outcomes: list[Outcome]) -> list[Figure]:
    told = score(each for each in outcomes if each.scenario.workload == workload)
    healthy = f"in {told.healthy:,} steps"
    late, idle = told.showing - told.told_soon, told.harmful - told.acted_on_soon
    return [
        Figure.report(BENCH, f"{workload}, {half}: {what}", value, unit)
        for what, value, unit in (
            ("false actions", told.acted, healthy),
            ("false notices", told.told, healthy),
            (f"not told within {SOON_TOLD} steps", late, f"of {told.showing}"),
            (f"harmful, not acted on within {SOON_ACTED} steps", idle, f"of {told.harmful}"),
        )
    ]


def figures() -> list[Figure]:
    """All rows of this bench."""
    table = load("default")
    tuning = judged(table, held_out=False)
    choices = chosen(tuning)
    for workload, choice in choices.items():
        print(f"{workload} left out: the others choose the table {choice}")
    unused = judged(table, held_out=True, only=choices)
    return [
        Figure.report(BENCH, "tables to choose from", len(CHOICES), "tables"),
        Figure.report(BENCH, "different choices", len({*choices.values()}), "tables"),
        *rows("half for tuning", left_out(tuning, choices)),
        *rows("unused half", left_out(unused, choices)),
    ]


if __name__ == "__main__":
    sys.exit(run(figures))
