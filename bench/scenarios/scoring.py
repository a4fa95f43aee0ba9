"""Scoring: recorded scenarios through the engine, and how right its decisions were.

*Answered* is a trouble when a rule of :data:`~bench.scenarios.suite.RIGHT` is among the
findings of a decision, from the step on at which the trouble was brought in; rules that
only tell count as those that act, rules that only observe do not. *Delay* is counted from
the step at which it shows in any metric (:mod:`~bench.scenarios.showing`), 0 when the
answer came first. It is *acted on* at the first step at which one of these rules won a
decision to PAUSE or OPTIMIZER. A *false action* is a step that was answered so in a
healthy run, or before the trouble in another. A *false notice* is a step of the same kind
at which only rules spoke that tell and do not act. Proposals are those that the garden of
the run really made, at the steps at which it made them; rules that only put off a seed
operation count at those steps alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bench.scenarios.recordings import Recorded, read
from bench.scenarios.showing import shows
from bench.scenarios.suite import HARMFUL, RECORDINGS, RIGHT, Scenario
from esper_otel.leyline.decisions import Action
from esper_tamiyo.language.table import RuleMode, Table
from esper_tamiyo.replaying.replay import Judge

PER_STEPS = 50_000
"""False actions are told per so many healthy steps."""

ACTIONS = (Action.PAUSE, Action.OPTIMIZER)

SOON_TOLD, SOON_ACTED = 20, 50
"""Steps from showing within which a trouble is to be told, and acted on where harmful."""


class Outcome(NamedTuple):
    """What a table made of one scenario.

    ``at``, ``shown``, ``answered`` and ``acted_on`` are steps; ``acted`` are the steps of
    false actions, each with the rule that won, ``told`` those of false notices. ``others``
    are the rules that spoke of a trouble and are not among the right ones. Nothing was wrong
    at ``healthy`` of the ``frames``. ``load`` is the load average that the machine had
    meanwhile.
    """

    scenario: Scenario
    at: int | None
    shown: int | None
    answered: int | None
    acted: tuple[tuple[int, str], ...]
    told: tuple[tuple[int, str], ...]
    others: tuple[str, ...]
    frames: int
    healthy: int
    load: float
    acted_on: int | None = None

    @property
    def delay(self) -> int | None:
        """Steps from showing to the answer; None without an answer."""
        return self._since_shown(self.answered)

    @property
    def action_delay(self) -> int | None:
        """Steps from showing to the first action; None without one."""
        return self._since_shown(self.acted_on)

    @property
    def harmful(self) -> bool:
        """Whether it is a trouble that something done to the update can help."""
        return self.at is not None and self.scenario.kind in HARMFUL

    def _since_shown(self, step: int | None) -> int | None:
        if step is None or self.at is None:
            return None
        return max(0, step - (self.at if self.shown is None else self.shown))


class Score(NamedTuple):
    """Outcomes in numbers: shares from 0 to 1, delays in steps.

    Of the troubles ``showing`` show in some metric, and ``told_soon`` of these are told
    within :data:`SOON_TOLD` steps from there. ``acted_on_soon`` are those of the ``harmful``
    ones acted on within :data:`SOON_ACTED`. Of the ``healthy_runs`` any action touched
    ``touched``.
    """

    troubles: int
    answered: int
    delays: list[int]
    healthy: int
    acted: int
    told: int
    frames: int
    showing: int = 0
    told_soon: int = 0
    harmful: int = 0
    acted_on_soon: int = 0
    healthy_runs: int = 0
    touched: int = 0

    @property
    def promptness(self) -> float:
        """Share of troubles that show which were told soon."""
        return self.told_soon / self.showing if self.showing else 1.0

    @property
    def intervention(self) -> float:
        """Share of harmful troubles acted on soon."""
        return self.acted_on_soon / self.harmful if self.harmful else 1.0

    @property
    def touch(self) -> float:
        """Share of healthy runs that any action touched."""
        return self.touched / self.healthy_runs if self.healthy_runs else 0.0

    @property
    def recall(self) -> float:
        """Share of troubles that were answered."""
        return self.answered / self.troubles if self.troubles else 1.0

    @property
    def delay(self) -> float:
        """Median delay of those that were answered; infinite without any."""
        return statistics.median(self.delays) if self.delays else float("inf")

    @property
    def false_actions(self) -> float:
        """Per :data:`PER_STEPS` healthy steps."""
        return self.acted * PER_STEPS / self.healthy if self.healthy else 0.0

    @property
    def false_notices(self) -> float:
        """Per :data:`PER_STEPS` healthy steps."""
        return self.told * PER_STEPS / self.healthy if self.healthy else 0.0


def outcome(ranks: list[Recorded], table: Table) -> Outcome:
    """What ``table`` makes of the ranks of one scenario."""
    judge = Judge(table)
    scenario, at = ranks[0].scenario, ranks[0].at
    counts = {rule.id for rule in table.rules if rule.mode is RuleMode.ACT}
    right = counts.intersection(RIGHT.get(scenario.kind, ()))
    answered = acted_on = None
    acted: list[tuple[int, str]] = []
    told: list[tuple[int, str]] = []
    others: set[str] = set()
    frames = healthy = 0
    for frame, proposal in merge(
        *(recorded.frames() for recorded in ranks), key=lambda pair: pair[0].time_unix_nano
    ):
        step = frame.step
        wrong = at is not None and step >= at
        frames += 1
        healthy += not wrong
        for _, decision in judge.judge(frame, proposal):
            rules = [each.rule for each in decision.findings if each.rule in counts]
            if wrong:
                others.update(rule for rule in rules if rule not in right)
                if answered is None and right.intersection(rules):
                    answered = step
                if acted_on is None and decision.action in ACTIONS and decision.reason in right:
                    acted_on = step
            elif decision.action in ACTIONS:
                acted.append((step, decision.reason))
            elif rules:
                told.append((step, rules[0]))
    shown = shows(ranks) if at is not None else None
    return Outcome(
        scenario=scenario,
        at=at,
        shown=shown,
        answered=answered,
        acted=tuple(acted),
        told=tuple(told),
        others=tuple(sorted(others)),
        frames=frames,
        healthy=healthy,
        load=max(load for recorded in ranks for load in recorded.load),
        acted_on=acted_on,
    )


def recorded_in(folder: Path, *, held_out: bool | None = None) -> Iterator[list[Recorded]]:
    """The scenarios recorded in ``folder``, each with all of its ranks; of one half only
    unless ``held_out`` is None."""
    for file in sorted(folder.glob("*.tapes")):
        for scenario, ranks in groupby(read(file), key=_scenario):
            if held_out is None or scenario.held_out is held_out:
                yield list(ranks)


def score(outcomes: Iterable[Outcome]) -> Score:
    """``outcomes`` in numbers."""
    found = list(outcomes)
    troubled = [each for each in found if each.at is not None]
    showing = [each for each in troubled if each.shown is not None]
    harmful = [each for each in troubled if each.harmful]
    healthy = [each for each in found if each.at is None]
    return Score(
        troubles=len(troubled),
        answered=sum(each.answered is not None for each in troubled),
        delays=[each.delay for each in troubled if each.delay is not None],
        healthy=sum(each.healthy for each in found),
        acted=sum(len(each.acted) for each in found),
        told=sum(len(each.told) for each in found),
        frames=sum(each.frames for each in found),
        showing=len(showing),
        told_soon=sum(_within(each.delay, SOON_TOLD) for each in showing),
        harmful=len(harmful),
        acted_on_soon=sum(_within(each.action_delay, SOON_ACTED) for each in harmful),
        healthy_runs=len(healthy),
        touched=sum(bool(each.acted) for each in healthy),
    )


def _within(delay: int | None, steps: int) -> bool:
    return delay is not None and delay <= steps


def by_kind(outcomes: list[Outcome]) -> str:
    """The outcomes for people: a line for each workload and kind, and what went wrong."""
    lines = []
    for (workload, kind), group in groupby(sorted(outcomes, key=_kind), key=_kind):
        runs = list(group)
        told = score(runs)
        cells = [f"{workload:11} {kind:17}"]
        if told.troubles:
            cells.append(f"answered {told.answered:2} of {told.troubles:2}")
            cells.append(f"delay {told.delay:5.1f}")
            cells.append(f"soon {told.told_soon:2}")
        if told.harmful:
            cells.append(f"acted on {told.acted_on_soon:2}")
        cells.append(f"false {told.acted:4} in {told.healthy:6,} steps")
        reasons = sorted({reason for each in runs for _, reason in each.acted})
        notices = sorted({rule for each in runs for _, rule in each.told})
        others = sorted({rule for each in runs for rule in each.others})
        missed = [str(each.scenario.seed) for each in runs if each.at and each.answered is None]
        cells += [f"by {', '.join(reasons)}"] if reasons else []
        cells += [f"notices {told.told} by {', '.join(notices)}"] if notices else []
        cells += [f"missed {', '.join(missed)}"] if missed else []
        cells += [f"also said {', '.join(others)}"] if others else []
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _scenario(recorded: Recorded) -> Scenario:
    return recorded.scenario


def _kind(outcome: Outcome) -> tuple[str, str]:
    return outcome.scenario.workload, outcome.scenario.kind


def timed(table: Table, *, held_out: bool | None) -> tuple[list[Outcome], float]:
    """The outcomes of one half, and how many seconds the replay took."""
    began = time.perf_counter()
    outcomes = [outcome(ranks, table) for ranks in recorded_in(RECORDINGS, held_out=held_out)]
    return outcomes, time.perf_counter() - began
