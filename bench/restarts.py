"""A sidecar restarted around a trouble: whether it answers as one that was left alone.

Every labelled trouble of :mod:`bench.scenarios` that the default table answers is judged by
three: one that is left alone, one that is killed and goes on from its state, and, as the
baseline, one that is killed and forgets. Before the kill all steps have gone down the pipe,
and no step passes unasked; then the same with some steps that nobody answers, which no state
can bring back. Engine, files and their reading are the real ones, in one process.

    python -m bench.restarts [--json PATH]
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from heapq import merge
from pathlib import Path
from typing import NamedTuple

from bench.figures import Figure, run
from bench.scenarios.recordings import Recorded
from bench.scenarios.scoring import recorded_in
from bench.scenarios.suite import RECORDINGS, RIGHT
from esper_otel.leyline.decisions import Decision, Proposal
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import load
from testkit.kept_state import KeptEngine, Observed

BENCH = "restarts"

PLACES = (-30, -10, -5, -2, 0, 5)
"""Steps from the one at which the trouble is brought in to the first after the restart."""

AWAY = 5
"""Steps that nobody answers, where some are."""

Steps = list[tuple[StepFrame, Proposal | None]]


class After(NamedTuple):
    """What came after one restart: the step of the first right answer, for each of the three.

    ``differing`` of the ``steps`` were decided otherwise than by the one left alone.
    """

    place: int
    away: int
    alone: int
    kept: int | None
    forgot: int | None
    differing: int
    steps: int
    start_ms: float


class Answers:
    """Decisions about steps, in their order, and the step of the first right one."""

    def __init__(self, right: frozenset[str]) -> None:
        self.decisions: list[tuple[int, int, list[Decision]]] = []
        self._right = right

    def add(self, frame: StepFrame, decisions: list[Decision]) -> None:
        """What was decided with one frame."""
        self.decisions.append((frame.rank, frame.step, decisions))

    def since(self, step: int) -> list[tuple[int, int, list[Decision]]]:
        """Those about a step and all after it."""
        return [each for each in self.decisions if each[1] >= step]

    def first(self, step: int) -> int | None:
        """The first step from ``step`` on at which a right rule spoke."""
        for _, at, decisions in self.since(step):
            if any(found.rule in self._right for each in decisions for found in each.findings):
                return at
        return None


def judged(engine: Engine, observed: Observed, steps: Steps, right: frozenset[str]) -> Answers:
    """What ``engine`` decides about ``steps``."""
    answers = Answers(right)
    for frame, proposal in steps:
        observed.decisions.clear()
        engine.observe(frame, proposal)
        answers.add(frame, list(observed.decisions))
    return answers


def restarts_of(ranks: list[Recorded], table: Table, folder: Path) -> Iterator[After]:
    """What comes after each restart around the trouble of one scenario."""
    at = ranks[0].at
    assert at is not None
    right = frozenset(RIGHT[ranks[0].scenario.kind])
    steps = list(
        merge(*(each.frames() for each in ranks), key=lambda pair: pair[0].time_unix_nano)
    )
    observed = Observed()
    alone = judged(Engine(table, observer=observed), observed, steps, right)
    if alone.first(at) is None:
        return
    running = KeptEngine(folder / "running", table, round_s=0.02)
    done = 0
    for place in PLACES:
        begin = next(n for n, (frame, _) in enumerate(steps) if frame.step >= at + place)
        for frame, proposal in steps[done:begin]:
            running.judge(frame, proposal)
        done = begin
        for away in (0, AWAY):
            since = max(at, at + place + away)
            first = alone.first(since)
            if first is None:
                continue
            rest = [pair for pair in steps[begin:] if pair[0].step >= at + place + away]
            copy = folder / "copy"
            shutil.copytree(folder / "running", copy)
            observed = Observed()
            began = time.perf_counter()
            kept_engine = KeptEngine(copy, table, observed)
            start_ms = (time.perf_counter() - began) * 1e3
            if kept_engine.restored.problem or not kept_engine.restored.ranks:
                raise RuntimeError(f"nothing was restored: {kept_engine.restored}")
            kept = judged(kept_engine.engine, observed, rest, right)
            kept_engine.kill()
            shutil.rmtree(copy)
            forgetful = Observed()
            forgot = judged(Engine(table, observer=forgetful), forgetful, rest, right)
            expected = alone.since(at + place + away)
            differing = sum(
                one != other for one, other in zip(kept.decisions, expected, strict=True)
            )
            yield After(
                place,
                away,
                first,
                kept.first(since),
                forgot.first(since),
                differing,
                len(expected),
                start_ms,
            )
    running.kill()
    shutil.rmtree(folder / "running")


def figures(held_out: bool | None = None) -> list[Figure]:
    """All rows of this bench."""
    table = load("default")
    found: list[After] = []
    troubles = 0
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as name:
        for ranks in recorded_in(RECORDINGS, held_out=held_out):
            if ranks[0].at is not None:
                some = list(restarts_of(ranks, table, Path(name)))
                troubles += bool(some)
                found += some
    return [
        Figure.report(BENCH, "troubles that one left alone answers", troubles, "troubles"),
        *(row for place in PLACES for row in at_place(place, found)),
        *(row for place in PLACES for row in unanswered_at(place, found)),
        Figure.report(
            BENCH,
            "restoring one run, median",
            statistics.median(each.start_ms for each in found),
            "ms",
        ),
    ]


def at_place(place: int, found: list[After]) -> list[Figure]:
    """Rows of one place, where no step passes unasked."""
    some = [each for each in found if each.place == place and each.away == 0]
    where = f"restarted {where_of(place)}"
    return [
        Figure.at_most(
            BENCH,
            f"{where}, {len(some)} troubles: not answered",
            missed(some, "kept"),
            "%",
            bar=0.0,
        ),
        Figure.report(
            BENCH, f"{where}: not answered by one that forgets", missed(some, "forgot"), "%"
        ),
        Figure.at_most(
            BENCH,
            f"{where}: steps decided otherwise than by one left alone, of "
            f"{sum(each.steps for each in some):,}",
            sum(each.differing for each in some),
            "steps",
            bar=0.0,
        ),
    ]


def unanswered_at(place: int, found: list[After]) -> list[Figure]:
    """Rows of one place, where the sidecar is away for some steps."""
    some = [each for each in found if each.place == place and each.away]
    where = f"away for {AWAY} steps, {where_of(place)}"
    late = [each for each in some if each.kept is None or each.kept > each.alone + AWAY]
    return [
        Figure.report(
            BENCH,
            f"{where}, {len(some)} troubles: not answered as soon, or later by the time away",
            100 * len(late) / len(some),
            "%",
        ),
        Figure.report(BENCH, f"{where}: not answered", missed(some, "kept"), "%"),
        Figure.report(
            BENCH, f"{where}: not answered by one that forgets", missed(some, "forgot"), "%"
        ),
    ]


def missed(found: list[After], whose: str) -> float:
    """Share of the troubles that were not answered, in percent."""
    return 100 * sum(getattr(each, whose) is None for each in found) / len(found)


def where_of(place: int) -> str:
    """A place in words."""
    if place == 0:
        return "at the beginning of the trouble"
    return f"{-place} steps before the trouble" if place < 0 else f"{place} steps into it"


if __name__ == "__main__":
    sys.exit(run(figures))
