"""The recorded source: runs from recordings, as they grow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from esper_otel.report.following import GrowingArchive
from esper_otel.report.rulings import Ruling
from esper_otel.report.sources import OnBytes
from esper_otel.report.trainers import TrainerCurves
from esper_otel.top.watched import WatchedRank, WatchedRun

PROBLEM_S = 10.0
"""How long people are told of a file that turned bad; when they end it they are told again."""


class RecordedSource:
    """The runs that lie at some paths."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._archive = GrowingArchive(paths)
        self._runs: list[WatchedRun] = []
        self.name = ", ".join(map(str, paths))
        self.problem = ""
        """The newest thing that could not be read, for a while."""
        self._told = 0
        self._told_until = 0.0

    @property
    def problems(self) -> list[str]:
        """All that could not be read, one line each."""
        return self._archive.problems

    def read(self, now: float, on_bytes: OnBytes) -> None:
        """Read what lies there for the first time, which may take a while."""
        self._archive.read_growth(now, on_bytes)
        self._gather()

    def refresh(self, run: str, rank: int, now: float) -> bool:
        """Read what was added; of all runs alike."""
        grown = self._archive.read_growth(now)
        if grown:
            self._gather()
        before, problems = self.problem, self._archive.problems
        if len(problems) > self._told:
            self._told, self._told_until = len(problems), now + PROBLEM_S
            self.problem = problems[-1]
        elif now >= self._told_until:
            self.problem = ""
        return grown or self.problem != before

    def runs(self) -> list[WatchedRun]:
        """The runs that have a step, the one that was heard of last at the end."""
        return self._runs

    def _gather(self) -> None:
        by_rank: dict[tuple[str, int], list[TrainerCurves]] = defaultdict(list)
        for source, trainer in self._archive.trainers.items():
            if trainer.steps()[0]:
                by_rank[source.run, source.rank].append(trainer)
        rulings: dict[str, list[Ruling]] = defaultdict(list)
        for ruling in self._archive.ledger.rulings.values():
            rulings[ruling.run].append(ruling)
        found: dict[str, WatchedRun] = {}
        for (name, number), trainers in sorted(by_rank.items(), key=lambda each: each[0]):
            run = found.setdefault(name, WatchedRun(name))
            rank = run.ranks[number] = WatchedRank(number)
            rank.take_trainers(trainers)
            rank.ended = rank.trainers[-1].ended
            if rank.ended:
                rank.state = "failed" if rank.ended.startswith("exception") else "finished"
        for name, run in found.items():
            run.rulings = sorted(rulings[name], key=lambda each: (each.step, each.rank))
            run.decided = len(run.rulings)
            if len(found) == 1:
                run.decided += self._archive.rulings_gone
        self._runs = sorted(found.values(), key=_newest)


def _newest(run: WatchedRun) -> float:
    return max((rank.clock for rank in run.ranks.values()), default=0.0)
