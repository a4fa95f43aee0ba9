"""Live runs: the page's data of current runs, in memory, within bounds.

Frames that were judged and lines of the journal go in. Out come the runs as a report shows
them, what is new of them since a version, and a line of each for the index. All of this is
called from one thread.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

from msgspec import structs

from esper_otel.leyline.frames import StepFrame
from esper_otel.report.columns import Producer
from esper_otel.report.curves import thinned
from esper_otel.report.packing import packed
from esper_otel.report.rulings import Ruling
from esper_otel.report.runs import ShownRun
from esper_tamiyo.showing.live_curves import LiveTrainer, StepBatch
from esper_tamiyo.showing.stories import RunStories

MOST_RUNS = 64
"""Runs that are known; the one that was heard of longest ago goes."""

MOST_BEGINNINGS = 4
"""Times that a run of one name began anew which are shown apart."""

MOST_RANKS = 256
"""Ranks of all runs together."""

MOST_POINTS = 2 << 20
"""Points of all curves together, 16 bytes each. Long curves are thinned to fit."""

FEWEST = 128
"""Points that a curve may have however many curves there are."""

MOST_CURVES = 1 << 14
"""Curves of all ranks; beyond it ranks that come are left out."""

RECENT_BYTES = 12 << 20
"""Newest values as they came, for pages that are open: whoever asks for older ones loads the
whole run again."""

AT_ONCE = 2048
"""Frames that wait before they become curves, where nobody looks."""

SPARK = 48
"""Parts of the small curve of the index."""


class _Recent(NamedTuple):
    version: int
    run: LiveRun
    rank: int
    batches: list[StepBatch]
    size: int


class LiveRun:
    """One run: its ranks, from a time that their steps began on."""

    def __init__(self, name: str, number: int) -> None:
        """``number`` counts the times that a run of this name has begun anew, from 1."""
        self.name = name
        self.number = number
        self.trainers: dict[int, LiveTrainer] = {}
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8)
        self.id = digest.hexdigest() + (f"-{number}" if number > 1 else "")
        """What it is called in an address."""

    @property
    def heard_unix_nano(self) -> int:
        """When it was heard of last."""
        return max((each.heard_unix_nano for each in self.trainers.values()), default=0)

    @property
    def ended(self) -> str:
        """How it ended, "" while a rank of it goes on."""
        said = [each.ended for each in self.trainers.values()]
        return next((word for word in said if word != "done"), "done") if all(said) else ""


class LiveRuns:
    """All runs that are known. ``version`` rises with whatever is new."""

    def __init__(self) -> None:
        # Of the process that was here before none is as high.
        self.version = time.time_ns() // 1000
        self.stories = RunStories()
        self.left_out = 0
        """Frames of ranks that there was no room for."""
        self._runs: dict[str, list[LiveRun]] = {}
        self._trainers: dict[Producer, tuple[LiveRun, LiveTrainer]] = {}
        self._recent: deque[_Recent] = deque()
        self._recent_size = 0
        self._forgotten_version = self.version
        """Version up to which not all newest values are there any more."""
        self._waiting = 0
        self._curves = 0

    @property
    def count(self) -> int:
        """How many are known."""
        return len(self._all())

    def take_frame(self, frame: StepFrame, at_unix_nano: int) -> None:
        """Take in a step that was judged, or how a rank ended."""
        source = Producer(frame.run, frame.rank, frame.instance)
        found = self._trainers.get(source) or self._admit(source, frame.step)
        if found is None:
            self.left_out += 1
            return
        _, trainer = found
        trainer.heard_unix_nano = at_unix_nano
        if frame.ended is not None:
            trainer.ended = str(frame.ended)
            self.version += 1
            self._note_recent(found[0], frame.rank, [])
            return
        trainer.ended = ""
        trainer.take_newest(frame)
        self._waiting += 1
        if self._waiting >= AT_ONCE:
            self.make_curves()

    def take_line(self, line: bytes) -> None:
        """Take in a line of the journal."""
        self.version += 1
        self.stories.tell_line(line, self.version)

    def make_curves(self) -> None:
        """Make curves of the frames that wait."""
        if not self._waiting:
            return
        self._waiting = 0
        self.version += 1
        for run, trainer in self._trainers.values():
            if trainer.waiting:
                batches = trainer.gather()
                trainer.take_batches(batches)
                self._note_recent(run, trainer.source.rank, batches)
        curves = sum(len(trainer.curves) for _, trainer in self._trainers.values())
        if curves != self._curves:
            self._curves = curves
            most = max(MOST_POINTS // max(curves, 1), FEWEST)
            for _, trainer in self._trainers.values():
                for curve in trainer.curves.values():
                    curve.hold_at_most(most)

    def index(self, states: dict[tuple[str, int], str], now_unix_nano: int) -> list[Any]:
        """A line for each run, the newest first; ``states`` are Tamiyo's of (run, rank)."""
        self.make_curves()
        runs = sorted(self._all(), key=lambda run: run.heard_unix_nano, reverse=True)
        return [self._line(run, states, now_unix_nano) for run in runs]

    def named(self, ids: Sequence[str]) -> list[LiveRun]:
        """The runs of these ids that are known."""
        known = {run.id: run for run in self._all()}
        return [known[each] for each in dict.fromkeys(ids) if each in known]

    def label(self, run: LiveRun) -> str:
        """What people see as its name."""
        shown = run.name or "(no run id)"
        several = len(self._runs.get(run.name, ())) > 1
        return f"{shown} ({run.number})" if several else shown

    def pack(self, runs: Sequence[LiveRun], problems: Sequence[str]) -> bytes:
        """All of ``runs``, as the page of a report reads it."""
        self.make_curves()
        shown = [self._shown(run, list(run.trainers.values()), -1) for run in runs]
        return packed(shown, self.stories.rules, problems, also=self._also(runs))

    def news(self, runs: Sequence[LiveRun], since: int) -> bytes | None:
        """What is new of ``runs`` since a version, b"" for nothing; None when that is not
        known any more, and all has to be loaded again."""
        self.make_curves()
        if since > self.version or since < self._forgotten_version:
            return None
        shown = [self._shown(run, self._newest_of(run, since), since) for run in runs]
        if not any(run.ranks or run.rulings or run.rules for run in shown):
            return b""
        told = [
            run.id
            for run in runs
            if (story := self.stories.story_of(run.name)) and story.rules_changed > since
        ]
        return packed(shown, {}, [], also={**self._also(runs), "told": told})

    def newest(self, since_unix_nano: int) -> list[StepFrame]:
        """The newest step of each rank that goes on and was heard of since then, and with it
        the newest of each value of the script's own."""
        found: dict[tuple[str, int], StepFrame] = {}
        for run in self._all():  # of one name the newest last
            for rank, trainer in run.trainers.items():
                found.pop((run.name, rank), None)
                is_there = trainer.heard_unix_nano >= since_unix_nano and not trainer.ended
                if is_there and trainer.newest is not None:
                    values = {**trainer.custom, **trainer.newest.values}
                    found[run.name, rank] = structs.replace(trainer.newest, values=values)
        return list(found.values())

    def _all(self) -> list[LiveRun]:
        return [run for several in self._runs.values() for run in several]

    def _also(self, runs: Sequence[LiveRun]) -> dict[str, Any]:
        return {"version": self.version, "ids": [run.id for run in runs]}

    def _admit(self, source: Producer, step: int) -> tuple[LiveRun, LiveTrainer] | None:
        """A place for a process that is new: it goes on where one of its rank has been, or
        its run has begun anew."""
        several = self._runs.get(source.run, [])
        newest = next((run for run in reversed(several) if source.rank in run.trainers), None)
        if newest is not None:
            trainer = newest.trainers[source.rank]
            if trainer.newest is None or step > trainer.newest.step:
                self._trainers.pop(trainer.source, None)
                trainer.source = source
                self._trainers[source] = newest, trainer
                return self._trainers[source]
        self._make_room(source.run)
        several = self._runs.get(source.run, [])
        if len(self._trainers) >= MOST_RANKS or self._curves >= MOST_CURVES:
            return None
        if not several or source.rank in several[-1].trainers:
            if len(several) >= MOST_BEGINNINGS:
                self._forget(several[0])
            several = self._runs.setdefault(source.run, [])
            several.append(LiveRun(source.run, several[-1].number + 1 if several else 1))
        trainer = several[-1].trainers[source.rank] = LiveTrainer(source)
        self._trainers[source] = several[-1], trainer
        return self._trainers[source]

    def _make_room(self, name: str) -> None:
        """See that one more run, or rank, fits, where others have not been heard for longer."""
        while True:
            runs = self._all()
            full = (
                len(runs) >= MOST_RUNS
                or len(self._trainers) >= MOST_RANKS
                or self._curves >= MOST_CURVES
            )
            oldest = min(runs, key=lambda run: run.heard_unix_nano, default=None)
            if not full or oldest is None or oldest is self._newest_run(name):
                return
            self._forget(oldest)

    def _newest_run(self, name: str) -> LiveRun | None:
        several = self._runs.get(name)
        return several[-1] if several else None

    def _forget(self, run: LiveRun) -> None:
        several = self._runs[run.name]
        several.remove(run)
        if not several:
            del self._runs[run.name]
            self.stories.drop_story(run.name)
        self._trainers = {
            source: found for source, found in self._trainers.items() if found[0] is not run
        }
        self._recent = deque(each for each in self._recent if each.run is not run)
        self._recent_size = sum(each.size for each in self._recent)
        self._curves = sum(len(trainer.curves) for _, trainer in self._trainers.values())

    def _note_recent(self, run: LiveRun, rank: int, batches: list[StepBatch]) -> None:
        size = sum(batch.size for batch in batches) + 256
        self._recent.append(_Recent(self.version, run, rank, batches, size))
        self._recent_size += size
        while self._recent_size > RECENT_BYTES:
            oldest = self._recent.popleft()
            self._recent_size -= oldest.size
            self._forgotten_version = oldest.version

    def _newest_of(self, run: LiveRun, since: int) -> list[LiveTrainer]:
        batches: dict[int, list[StepBatch]] = {}
        for each in reversed(self._recent):
            if each.version <= since:
                break
            if each.run is run:
                batches.setdefault(each.rank, [])[:0] = each.batches
        return [run.trainers[rank].news(found) for rank, found in sorted(batches.items())]

    def _shown(self, run: LiveRun, trainers: list[LiveTrainer], since: int) -> ShownRun:
        """The run with these curves, and what is told of it that is newer than ``since``."""
        story = self.stories.story_of(run.name)
        rulings: list[Ruling] = []
        if story is not None:
            story.ledger.settle()
            rulings = [
                ruling
                for ruling in story.ledger.rulings.values()
                if story.changed.get(ruling.id, 0) > since and self._is_of(ruling, run)
            ]
        is_last = run is self._newest_run(run.name)
        return ShownRun(
            name=self.label(run),
            title=self.label(run),
            ranks=sorted(trainers, key=lambda each: each.source.rank),
            settings={},
            rulings=sorted(rulings, key=lambda ruling: (ruling.step, ruling.rank)),
            happenings=[],
            rules=story.ledger.states(run.name)
            if story is not None and is_last and story.rules_changed > since
            else [],
        )

    def _is_of(self, ruling: Ruling, run: LiveRun) -> bool:
        """Whether it is about this time that the run began, and not about another."""
        several = self._runs.get(run.name, [run])
        if len(several) == 1:
            return True
        begins = [_began(each) for each in several]
        place = sum(begin <= ruling.time_unix_nano for begin in begins[1:])
        return several[place] is run

    def _line(
        self, run: LiveRun, states: dict[tuple[str, int], str], now_unix_nano: int
    ) -> dict[str, Any]:
        ranks = sorted(run.trainers)
        first = run.trainers[ranks[0]]
        loss = first.curves.get((None, "loss"))
        total = None if loss is None or not loss.total.count else loss.total
        spark = [] if loss is None else thinned(loss.points(), SPARK // 2).values.tolist()
        story = self.stories.story_of(run.name)
        said = {states.get((run.name, rank), "") for rank in ranks}
        return {
            "id": run.id,
            "name": self.label(run),
            "ranks": len(ranks),
            "steps": max(trainer.steps()[2] for trainer in run.trainers.values()),
            "began_ms": _began(run) / 1e6,
            "heard_s": max(0.0, (now_unix_nano - run.heard_unix_nano) / 1e9),
            "ended": run.ended,
            "stale": "stale" in said and not run.ended,
            "loss": None if total is None else [total.first, total.last],
            "spark": [value for value in spark if isfinite(value)],
            "decisions": 0
            if story is None
            else sum(self._is_of(ruling, run) for ruling in story.ledger.rulings.values()),
        }


def _began(run: LiveRun) -> float:
    """When the first step that is known of it ended, in Unix nanoseconds."""
    starts = [start for each in run.trainers.values() if (start := each.span()[0])]
    return min(starts, default=0.0)
