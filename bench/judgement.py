"""How right the shipped tables are about trainings that really went wrong, or did not.

Replays the recorded scenarios of :mod:`bench.scenarios` through the engine: the half that
no table was tuned on, and beside it the half that was. Bars on the first half only, that
of troubles not answered for each workload as well: most troubles are of one. The
prototype's fixed numbers are the baseline that the default table has to beat.
"""

from __future__ import annotations

import statistics
import sys

from bench.figures import Figure, run
from bench.scenarios.scoring import PER_STEPS, Outcome, Score, score, timed
from bench.scenarios.suite import EXTENTS, HEALTHY, RIGHT
from esper_tamiyo.language.table_file import load

BENCH = "judgement"
RECALL_BAR = 95.0
DELAY_BAR = 3.0
FALSE_ACTIONS_BAR = 1.0


def suite(outcomes: list[Outcome]) -> list[Figure]:
    """What the figures speak of."""
    told = score(outcomes)
    return [
        Figure.report(BENCH, "kinds of trouble", len(RIGHT), "kinds"),
        Figure.report(BENCH, "kinds of healthy runs", len(HEALTHY), "kinds"),
        Figure.report(BENCH, "unused half: troubled runs", told.troubles, "runs"),
        Figure.report(
            BENCH, "unused half: healthy runs", len(outcomes) - told.troubles, "runs"
        ),
        Figure.report(BENCH, "unused half: healthy steps", told.healthy, "steps"),
    ]


def judged(told: Score, prototype: Score) -> list[Figure]:
    """The figures of all workloads that have bars, and the prototype's."""
    return [
        Figure.at_most(
            BENCH,
            "default, unused half: troubles not answered",
            100 * (1 - told.recall),
            "%",
            bar=100 - RECALL_BAR,
        ),
        Figure.at_most(
            BENCH,
            "default, unused half: median delay after the trouble shows",
            told.delay,
            "steps",
            bar=DELAY_BAR,
        ),
        Figure.at_most(
            BENCH,
            f"default, unused half: false actions in {PER_STEPS:,} healthy steps",
            told.false_actions,
            "actions",
            bar=FALSE_ACTIONS_BAR,
        ),
        Figure.report(
            BENCH,
            "prototype, unused half: troubles not answered",
            100 * (1 - prototype.recall),
            "%",
        ),
        Figure.report(BENCH, "prototype, unused half: median delay", prototype.delay, "steps"),
        Figure.report(
            BENCH,
            f"prototype, unused half: false actions in {PER_STEPS:,} healthy steps",
            prototype.false_actions,
            "actions",
        ),
    ]


def beside(tuning: Score, told: Score) -> list[Figure]:
    """What the bars do not say."""
    return [
        Figure.report(
            BENCH,
            f"default, unused half: false notices in {PER_STEPS:,} healthy steps",
            told.false_notices,
            "notices",
        ),
        Figure.report(
            BENCH,
            "default, half it was tuned on: troubles not answered",
            100 * (1 - tuning.recall),
            "%",
        ),
        Figure.report(
            BENCH,
            f"default, half it was tuned on: false actions in {PER_STEPS:,} healthy steps",
            tuning.false_actions,
            "actions",
        ),
    ]


def of_each_workload(outcomes: list[Outcome]) -> list[Figure]:
    """The figures of every workload that has troubles."""
    rows = []
    for workload in EXTENTS:
        some = [each for each in outcomes if each.scenario.workload == workload]
        part = score(some)
        if part.troubles:
            rows += [
                Figure.at_most(
                    BENCH,
                    f"default, unused half, {workload}: {part.troubles} troubles, not answered",
                    100 * (1 - part.recall),
                    "%",
                    bar=100 - RECALL_BAR,
                ),
                Figure.report(
                    BENCH,
                    f"default, unused half, {workload}: median delay",
                    part.delay,
                    "steps",
                ),
                Figure.report(
                    BENCH,
                    f"default, unused half, {workload}: false actions",
                    part.acted,
                    f"in {part.healthy:,} steps",
                ),
                Figure.report(
                    BENCH,
                    f"unused half, {workload}: load average while recording, median",
                    statistics.median(each.load for each in some),
                    "",
                ),
            ]
    return rows


def figures() -> list[Figure]:
    default, prototype = load("default"), load("prototype")
    outcomes, took = timed(default, held_out=True)
    tuning, _ = timed(default, held_out=False)
    by_prototype, _ = timed(prototype, held_out=True)
    told = score(outcomes)
    return [
        *suite(outcomes),
        *judged(told, score(by_prototype)),
        *beside(score(tuning), told),
        *of_each_workload(outcomes),
        Figure.report(BENCH, "replay of one half, reading included", took, "s"),
    ]


if __name__ == "__main__":
    sys.exit(run(figures))
