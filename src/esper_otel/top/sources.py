"""Sources: runs from Tamiyo, over its socket, or from recordings, as they grow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.tool_requests import NoAnswerError, reply_to
from esper_otel.leyline.wire import DecisionNote, RankNow, Recent, RecentRequest, Refusal
from esper_otel.report.columns import Producer
from esper_otel.report.curves import Curve
from esper_otel.report.following import GrowingArchive
from esper_otel.report.rulings import Ground, Ruling
from esper_otel.report.sources import OnBytes
from esper_otel.report.trainers import CLOCK, JOINED_EVERY, TrainerCurves
from esper_otel.top.watched import WatchedRank, WatchedRun

PATIENCE_S = 0.5
"""How long an answer is waited for: meanwhile no key is read."""

MOST_AT_ONCE = 32
"""Requests that may follow each other, while there are more steps."""

KEPT = 500
"""Newest decisions of a run that are kept."""

MOST_RANKS = 256
"""Ranks whose curves are kept: those that were looked at."""


class SidecarSource:
    """The runs that the sidecar at a socket knows."""

    def __init__(self, path: Path) -> None:
        self.name = f"Tamiyo at {path}"
        self.problem = ""
        self.path = path
        self._trainers: dict[tuple[str, int], TrainerCurves] = {}
        self._rulings: dict[str, list[Ruling]] = {}
        self._decided: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._runs: list[WatchedRun] = []
        self._told: object = None
        self._batches = 0

    def refresh(self, run: str, rank: int, now: float) -> bool:
        """Ask what is new; a sidecar that does not answer is a problem, and asked again."""
        run = run or (self._runs[-1].name if self._runs else "")
        before = self.problem
        is_new = False
        try:
            for _ in range(MOST_AT_ONCE):
                recent = self._ask(run, rank)
                is_new |= self._take(recent)
                if not recent.more:
                    break
                run, rank = recent.run, recent.rank
        except NoAnswerError as error:
            self.problem = str(error).removeprefix(f"{self.path}: ")
        return is_new or before != self.problem

    def runs(self) -> list[WatchedRun]:
        """The runs, the one that was heard of last at the end."""
        return self._runs

    def _ask(self, run: str, rank: int) -> Recent:
        trainer = self._trainers.get((run, rank))
        reply = reply_to(
            RecentRequest(
                run,
                rank,
                trainer.source.instance if trainer else "",
                trainer.steps()[2] if trainer and trainer.steps()[0] else -1,
                self._numbers.get(run, 0),
            ),
            self.path,
            PATIENCE_S,
        )
        if isinstance(reply, Recent):
            self.problem = ""
            return reply
        why = reply.message if isinstance(reply, Refusal) else type(reply).__name__
        raise NoAnswerError(
            f"{self.path}: this sidecar does not support the request ({why}): "
            "it is older than this esper-otel, restart it"
        )

    def _take(self, recent: Recent) -> bool:
        """Take in an answer; whether it says anything new."""
        told = (
            [(n.run, n.rank, n.step, n.state, n.ended, n.reason) for n in recent.ranks],
            recent.seeds,
        )
        if not recent.rows and not recent.decisions and told == self._told:
            return False
        self._told = told
        if recent.rows:
            self._extend(recent)
        self._note(recent)
        self._gather(recent.ranks)
        return True

    def _extend(self, recent: Recent) -> None:
        key = (recent.run, recent.rank)
        trainer = self._trainers.get(key)
        if trainer is None or trainer.source.instance != recent.instance:
            trainer = TrainerCurves(Producer(recent.run, recent.rank, recent.instance))
            self._trainers.pop(key, None)
            self._trainers[key] = trainer
            if len(self._trainers) > MOST_RANKS:
                del self._trainers[next(iter(self._trainers))]
        rows = np.array(recent.rows, np.float64)
        steps = rows[:, 0].astype(np.int64)
        columns = {"step": rows[:, 0], CLOCK: rows[:, 1]}
        columns |= {key: rows[:, 2 + place] for place, key in enumerate(recent.columns)}
        broken = columns.get("nonfinite", np.zeros(len(rows))) > 0
        for name, values in columns.items():
            # What a step lacks is a gap where something in it was not finite.
            there = ~np.isnan(values)
            if there.any() or (None, name) in trainer.curves:
                keep = there if is_custom(name) else there | broken
                if not keep.any():
                    continue
                curve = trainer.curves.setdefault((None, name), Curve())
                curve.extend(steps[keep], np.ascontiguousarray(values[keep]))
        self._batches += 1
        if self._batches % JOINED_EVERY == 0:
            trainer.join_pieces()
        if not recent.more:
            for seed, told in recent.seeds.items():
                for name, value in zip(("stage", "alpha"), told, strict=True):
                    curve = trainer.curves.setdefault((seed, f"kasmina.seed.{name}"), Curve())
                    curve.extend(steps[-1:], np.array([value]))

    def _note(self, recent: Recent) -> None:
        run = recent.run
        modes = {rank.rank: rank.mode for rank in recent.ranks if rank.run == run}
        rulings = self._rulings.setdefault(run, [])
        for note in recent.decisions:
            rulings.append(_ruling(run, note, modes.get(note.rank, "")))
            self._numbers[run] = note.number
            self._decided[run] = self._decided.get(run, 0) + 1
        del rulings[:-KEPT]

    def _gather(self, ranks: list[RankNow]) -> None:
        found: dict[str, WatchedRun] = {}
        newest: dict[str, int] = {}
        for now in ranks:
            run = found.setdefault(now.run, WatchedRun(now.run))
            rank = run.ranks[now.rank] = WatchedRank(now.rank)
            rank.state, rank.ended, rank.mode = now.state, now.ended, now.mode
            rank.told_step = now.step
            told = {"loss": now.loss, "step_latency_ms": now.step_latency_ms}
            rank.told = {key: value for key, value in told.items() if isfinite(value)}
            trainer = self._trainers.get((now.run, now.rank))
            if trainer is not None:
                rank.take_trainers([trainer])
            newest[now.run] = max(newest.get(now.run, 0), now.time_unix_nano)
            run.rulings = self._rulings.get(now.run, [])
            run.decided = self._decided.get(now.run, 0)
        self._runs = sorted(found.values(), key=lambda run: newest[run.name])


def _ruling(run: str, note: DecisionNote, mode: str) -> Ruling:
    ending = "/update" if note.of_update else ""
    return Ruling(
        id=f"{run}/{note.rank}/{note.step}{ending}",
        run=run,
        rank=note.rank,
        step=note.step,
        time_unix_nano=note.time_unix_nano,
        action=note.action,
        severity=note.severity,
        reason=note.reason,
        of_update=note.of_update,
        mode=mode,
        findings=[Ground(note.reason, note.action, note.severity, note.text, note.values)],
    )


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
        self._runs = sorted(found.values(), key=_newest_clock)


def _newest_clock(run: WatchedRun) -> float:
    return max((rank.clock for rank in run.ranks.values()), default=0.0)
