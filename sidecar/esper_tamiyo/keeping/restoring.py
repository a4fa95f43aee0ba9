"""Restoring: an engine with its predecessor's state, from the segments in a folder.

The entries are gone through in the order in which they were written. Each rank is put back
where it was saved last, and its steps behind that place are judged again, which nobody hears
of. Steps before it are only shown to the other ranks of the run. So each rank stands where it
stood after the last step that was judged, however the sidecar ended.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.liveness import Key
from esper_tamiyo.judging.observer import EngineObserver
from esper_tamiyo.judging.roster import STATE_BYTES
from esper_tamiyo.judging.saved_state import (
    UnfitStateError,
    finish,
    judge_again,
    note_company,
    post_again,
    put_engine_back,
    put_rank_back,
)
from esper_tamiyo.keeping import bodies
from esper_tamiyo.keeping.segments import (
    LOCK_PATIENCE_S,
    DamagedSegmentError,
    EntryKind,
    entries,
    locked,
    segments_of,
    set_aside,
)
from esper_tamiyo.language.table import Table

log = logging.getLogger("tamiyo")

MAX_AGE_S = 3600.0
"""A rank that was not heard for so long, by the wall clock, is not put back: who comes by that
name then is as good as new."""

_UNUSABLE = (
    *(DamagedSegmentError, bodies.ForeignStateError, msgspec.MsgspecError, ValueError),
    RecursionError,  # nested too deeply
)


class Restored(msgspec.Struct, kw_only=True):
    """What became of the state that was found, as plain data.

    ``ranks`` were put back, ``steps`` judged again on the way; ``too_old`` ranks were left
    out, and ``unfit`` ones, which could not be read. ``age_s`` is how long before the start
    a step was judged last, None where there was no state. ``table`` is the version of the
    table then. ``problem`` says why nothing was put back although there was something.
    """

    ranks: int = 0
    steps: int = 0
    too_old: int = 0
    unfit: int = 0
    age_s: float | None = None
    table: str = ""
    problem: str = ""

    @property
    def found(self) -> bool:
        """Whether there was any state, of use or not."""
        return self.age_s is not None or bool(self.problem)

    def __str__(self) -> str:
        """What was put back, as a person would say it."""
        parts = [f"restored {self.ranks} ranks"]
        if self.age_s is not None:
            parts.append(f"the newest step was {self.age_s:.1f} s before the start")
        if self.steps:
            parts.append(f"{self.steps} steps evaluated again")
        if self.too_old:
            parts.append(f"{self.too_old} ranks too old to restore")
        if self.unfit:
            parts.append(f"{self.unfit} ranks unreadable")
        return "; ".join(parts)


class _Place(NamedTuple):
    """Where an entry is: number of the segment, and its own in it."""

    segment: int
    entry: int


class _Survey:
    """What is in a folder, gone through once: all checksums are right."""

    def __init__(self, folder: Path) -> None:
        self.paths = segments_of(folder)
        self.saved_at: dict[Key, _Place] = {}
        self.heard: dict[Key, int] = {}
        """When each rank was heard last, in Unix nanoseconds."""
        self.alive = 0
        """When the sidecar was there last, likewise."""
        for segment, path in enumerate(self.paths):
            for number, kind, body in _entries(path):
                if kind == EntryKind.RANK:
                    found = bodies.rank_body(body)
                    self.saved_at[found.key] = _Place(segment, number)
                    self.heard[found.key] = found.heard_unix_nano
                elif kind == EntryKind.STEPS:
                    turn = bodies.steps(body)
                    self.alive = max(self.alive, turn.at_unix_nano)
                    for frame in turn.frames:
                        self.heard[frame.run, frame.rank] = turn.at_unix_nano
                elif kind == EntryKind.ALIVE:
                    self.alive = max(self.alive, int(bytes(body)))

    def walk(self) -> Iterator[tuple[_Place, int, memoryview]]:
        """Place, kind and body of every entry."""
        for segment, path in enumerate(self.paths):
            for number, kind, body in _entries(path):
                yield _Place(segment, number), kind, body


def restore(
    folder: Path,
    table: Table,
    observer: EngineObserver | None = None,
    state_bytes: int = STATE_BYTES,
) -> tuple[Engine, Restored]:
    """An engine that goes on by ``table`` where the state in ``folder`` ends. Never raises.

    What cannot be used is set aside, and the engine begins anew; the reason is in the report.
    """
    try:
        engine, report = _restored(folder, Engine(table, state_bytes, observer=observer))
    except FileNotFoundError:
        return Engine(table, state_bytes, observer=observer), Restored()
    except OSError as error:
        problem = f"{folder}: {(error.strerror or str(error)).lower()}"
    except _UNUSABLE as error:
        problem = f"{error}; {_aside(folder)}"
    except Exception as error:  # whatever it is, a sidecar that begins anew is better than none
        log.exception("the state in %s could not be restored", folder)
        problem = f"{error!r}; {_aside(folder)}"
    else:
        if report.found:
            log.info("%s, from %s", report, folder)
        return engine, report
    log.warning("state is not restored, all ranks start afresh: %s", problem)
    return Engine(table, state_bytes, observer=observer), Restored(problem=problem)


def last_table(folder: Path, source: str) -> Table | None:
    """The table that was decided by last, if it came from the name or file ``source``; None
    where nobody can say.

    Waits a little for a writer that has not ended yet.
    """
    found = None
    if folder.exists():
        with suppress(OSError):
            os.close(locked(folder, LOCK_PATIENCE_S))
    try:
        for path in segments_of(folder):
            told = ""
            for _, kind, body in _entries(path):
                if kind == EntryKind.HEADER:
                    head = bodies.header(body)
                    told, found = head.source, head.table
                elif kind == EntryKind.TABLE:
                    found = bodies.table(body)
            if told != source:
                found = None
    except (OSError, *_UNUSABLE):
        return None
    return found


def _restored(folder: Path, engine: Engine) -> tuple[Engine, Restored]:
    survey = _Survey(folder)
    restoring = _Restoring(survey, engine)
    if survey.heard:
        restoring.walk_to_end(engine.table)
    return restoring.engine, restoring.report


class _Restoring:
    """An engine on its way to where the state ends."""

    def __init__(self, survey: _Survey, engine: Engine) -> None:
        self.engine = engine
        self.report = Restored()
        self._survey = survey
        self._now_unix_ns, self._now_ns = time.time_ns(), time.perf_counter_ns()
        oldest = self._now_unix_ns - MAX_AGE_S * 1e9
        self._shown: dict[Key, str] = {}
        """The processes whose steps the other ranks were shown."""
        self._old = {key for key, at in survey.heard.items() if at < oldest}

    def walk_to_end(self, table: Table) -> None:
        """Go through all entries, and over to ``table`` at the end."""
        survey, engine, report = self._survey, self.engine, self.report
        self._introduce()
        for place, kind, body in survey.walk():
            if kind == EntryKind.HEADER:
                self._reload(bodies.header(body).table)
            elif kind == EntryKind.TABLE:
                self._reload(bodies.table(body))
            elif kind == EntryKind.ENGINE:
                put_engine_back(bodies.engine(body), engine)
            elif kind == EntryKind.RANK:
                self._put_back(place, bodies.rank_body(body))
            elif kind == EntryKind.STEPS:
                self._judge(place, bodies.steps(body))
        report.table = engine.table.version
        self._reload(table)
        away_ns = max(0, self._now_unix_ns - survey.alive)
        report.ranks = finish(
            engine, sorted(survey.heard, key=survey.heard.__getitem__), away_ns
        )
        report.too_old = len(self._old)
        ago_ns = self._now_unix_ns - max(survey.heard.values())
        report.age_s = max(0.0, ago_ns / 1e9)

    def _introduce(self) -> None:
        """Have the ranks of a run know of each other before any step is judged again."""
        count = Counter(run for run, _ in self._survey.heard)
        if all(ranks == 1 for ranks in count.values()):
            return
        for place, kind, body in self._survey.walk():
            if kind != EntryKind.RANK:
                continue
            found = bodies.rank_body(body)
            if count[found.run] > 1 and self._is_last(place, found.key):
                with suppress(msgspec.MsgspecError):
                    note_company(bodies.rank(found.saved), self.engine, found.key)

    def _is_last(self, place: _Place, key: Key) -> bool:
        """Whether a rank that is not too old was saved at ``place`` last."""
        return key not in self._old and place == self._survey.saved_at[key]

    def _reload(self, table: Table) -> None:
        if table != self.engine.table:
            self.engine.reload(table)

    def _put_back(self, place: _Place, found: bodies.RankBody) -> None:
        if not self._is_last(place, found.key):
            return
        try:
            put_rank_back(bodies.rank(found.saved), self.engine, found.key, self._now_ns)
        except (UnfitStateError, msgspec.MsgspecError) as error:
            self.report.unfit += 1
            log.warning("the state of a rank does not fit and is skipped: %.200s", error)

    def _judge(self, place: _Place, turn: bodies.StepsBody) -> None:
        for frame in turn.frames:
            key = (frame.run, frame.rank)
            saved_at = self._survey.saved_at.get(key)
            if key in self._old:
                continue
            if saved_at is None or place > saved_at:
                judge_again(self.engine, frame, self._now_ns)
                self.report.steps += 1
            elif frame.values:
                began_anew = self._shown.get(key, frame.instance) != frame.instance
                self._shown[key] = frame.instance
                post_again(self.engine, frame, began_anew=began_anew)


def _entries(path: Path) -> Iterator[tuple[int, int, memoryview]]:
    """Number, kind and body of each entry of a segment that begins as one of ours."""
    for number, (kind, body) in enumerate(entries(path.read_bytes(), str(path))):
        if number == 0:
            if kind != EntryKind.HEADER:
                raise bodies.ForeignStateError(f"{path}: not state of a sidecar")
            try:
                bodies.header(body)
            except bodies.ForeignStateError as error:
                raise bodies.ForeignStateError(f"{path}: {error}") from None
        yield number, kind, body


def _aside(folder: Path) -> str:
    """Set the segments aside; what was done, in words."""
    try:
        return "set aside as " + ", ".join(path.name for path in set_aside(folder))
    except OSError as error:
        return f"left where it is, as it cannot be set aside: {error.strerror or error}"
