"""How right the shipped tables are about trainings that really went wrong, or did not.

Replays the recorded scenarios of :mod:`bench.scenarios` through the engine: the half that
no table was tuned on, and beside it the half that was. Bars on the first half only, that
of troubles not answered for each workload as well: most troubles are of one. The
prototype's fixed numbers are the baseline that the default table has to beat; beside it
are the default table of before and two rules of other projects
(:mod:`bench.scenarios.peers`).
"""

from __future__ import annotations

import statistics
import sys

from bench.figures import Figure, run
from bench.scenarios.peers import PEERS, peer_outcome
from bench.scenarios.scoring import (
    PER_STEPS,
    SOON_ACTED,
    SOON_TOLD,
    Outcome,
    Score,
    recorded_in,
    score,
    timed,
)
from bench.scenarios.suite import BEFORE, EXTENTS, HEALTHY, RECORDINGS, RIGHT
from esper_tamiyo.language.table_file import load

BENCH = "judgement"
RECALL_BAR = 95.0
DELAY_BAR = 3.0
FALSE_ACTIONS_BAR = 2.0
FALSE_NOTICES_BAR = 10.0
TOUCHED_BAR = 2.0
TOLD_SOON_BAR = 95.0
ACTED_ON_BAR = 85.0


def suite(outcomes: list[Outcome]) -> list[Figure]:
    """What the figures speak of."""
    told = score(outcomes)
    return [
        Figure.report(BENCH, "kinds of trouble", len(RIGHT), "kinds"),
        Figure.report(BENCH, "kinds of healthy runs", len(HEALTHY), "kinds"),
        Figure.report(BENCH, "workloads", len(EXTENTS), "workloads"),
        Figure.report(BENCH, "unused half: troubled runs", told.troubles, "runs"),
        Figure.report(
            BENCH,
            "unused half: of these, troubles that show in no metric",
            told.troubles - told.showing,
            "runs",
        ),
        Figure.report(
            BENCH, "unused half: healthy runs", len(outcomes) - told.troubles, "runs"
        ),
        Figure.report(BENCH, "unused half: healthy steps", told.healthy, "steps"),
    ]


def judged(told: Score, healthy: Score, others: dict[str, Score]) -> list[Figure]:
    """The figures of all workloads that have bars, and those of ``others`` by name; ``healthy``
    scores the healthy runs alone."""
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
        Figure.at_most(
            BENCH,
            f"default, unused half: false notices in {PER_STEPS:,} healthy steps",
            told.false_notices,
            "notices",
            bar=FALSE_NOTICES_BAR,
        ),
        # What comes before a trouble is the same training for each of its kinds.
        Figure.report(
            BENCH,
            f"default, unused half: the same in the {told.healthy_runs} healthy runs alone",
            healthy.false_notices,
            "notices",
        ),
        Figure.at_most(
            BENCH,
            f"default, unused half: of {told.healthy_runs} healthy runs an action touched",
            100 * told.touch,
            "%",
            bar=TOUCHED_BAR,
        ),
        Figure.at_most(
            BENCH,
            f"default, unused half: troubles not told within {SOON_TOLD} steps of showing",
            100 * (1 - told.promptness),
            "%",
            bar=100 - TOLD_SOON_BAR,
        ),
        Figure.at_most(
            BENCH,
            f"default, unused half: of {told.harmful} harmful troubles not acted on within "
            f"{SOON_ACTED} steps",
            100 * (1 - told.intervention),
            "%",
            bar=100 - ACTED_ON_BAR,
        ),
        *(row for name, other in others.items() for row in baseline(name, other)),
    ]


def baseline(judge: str, told: Score) -> list[Figure]:
    """The same figures of somebody else, without bars."""
    half = f"{judge}, unused half"
    return [
        Figure.report(BENCH, f"{half}: troubles not answered", 100 * (1 - told.recall), "%"),
        Figure.report(BENCH, f"{half}: median delay", told.delay, "steps"),
        Figure.report(
            BENCH,
            f"{half}: false actions in {PER_STEPS:,} healthy steps",
            told.false_actions,
            "actions",
        ),
        Figure.report(
            BENCH,
            f"{half}: false notices in {PER_STEPS:,} healthy steps",
            told.false_notices,
            "notices",
        ),
        Figure.report(BENCH, f"{half}: healthy runs an action touched", 100 * told.touch, "%"),
        Figure.report(
            BENCH,
            f"{half}: troubles not told within {SOON_TOLD} steps of showing",
            100 * (1 - told.promptness),
            "%",
        ),
        Figure.report(
            BENCH,
            f"{half}: harmful troubles not acted on within {SOON_ACTED} steps",
            100 * (1 - told.intervention),
            "%",
        ),
    ]


def of_peers() -> list[Figure]:
    """The figures of other projects' rules."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in PEERS}
    for ranks in recorded_in(RECORDINGS, held_out=True):
        for name, rule in PEERS.items():
            outcomes[name].append(peer_outcome(ranks, rule))
    return [row for name, some in outcomes.items() for row in baseline(name, score(some))]


def beside(outcomes: list[Outcome]) -> list[Figure]:
    """What the bars do not say: the half that the table was tuned on."""
    tuning = score(outcomes)
    healthy = score(each for each in outcomes if each.at is None)
    return [
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
        Figure.report(
            BENCH,
            f"default, half it was tuned on: false notices in {PER_STEPS:,} healthy steps",
            tuning.false_notices,
            "notices",
        ),
        Figure.report(
            BENCH,
            f"default, half it was tuned on: the same in the {tuning.healthy_runs} healthy "
            "runs alone",
            healthy.false_notices,
            "notices",
        ),
        Figure.report(
            BENCH,
            f"default, half it was tuned on: troubles not told within {SOON_TOLD} steps",
            100 * (1 - tuning.promptness),
            "%",
        ),
        Figure.report(
            BENCH,
            f"default, half it was tuned on: harmful troubles not acted on within {SOON_ACTED} "
            "steps",
            100 * (1 - tuning.intervention),
            "%",
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
    default = load("default")
    others = {"default table of before": load(str(BEFORE)), "prototype": load("prototype")}
    outcomes, took = timed(default, held_out=True)
    tuning, _ = timed(default, held_out=False)
    told = score(outcomes)
    return [
        *suite(outcomes),
        *judged(
            told,
            score(each for each in outcomes if each.at is None),
            {name: score(timed(table, held_out=True)[0]) for name, table in others.items()},
        ),
        *of_peers(),
        *beside(tuning),
        *of_each_workload(outcomes),
        Figure.report(BENCH, "replay of one half, reading included", took, "s"),
    ]


if __name__ == "__main__":
    sys.exit(run(figures))
