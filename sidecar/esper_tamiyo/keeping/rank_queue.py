"""The queue of ranks to be saved: one in a turn, or a part of one, and when the next may be.

While a rank is saved nobody is answered. One with up to sixteen seeds takes half a millisecond,
one with 256 takes 10: it is saved in parts, with asks in between. Only where it goes on
meanwhile, so that the parts would be of different steps, it is saved at once after all.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.liveness import Key
from esper_tamiyo.judging.run_state import RunState
from esper_tamiyo.judging.saved_state import (
    SEEDS_AT_ONCE,
    heard_ns,
    saved_rank,
    saved_rank_in_parts,
)
from esper_tamiyo.judging.saved_structs import SavedRank, SavedTarget
from esper_tamiyo.keeping.bodies import encode_rank, encode_seed

log = logging.getLogger("tamiyo")

GATHERED_AT_ONCE = 32
"""Ranks that are asked in one turn when they were heard of: at most 0.3 ms with cold caches."""

PART_PAUSE_S = 0.005
"""After a part of a rank: ten times what it takes."""

SEED_PAUSE_S = 0.008
"""For each seed beyond :data:`SEEDS_AT_ONCE` that was saved at once, two hundred times what it
takes: so few asks fall on that, that the slowest in a hundred do not show it."""


class _Saving(NamedTuple):
    """A rank of which some seeds were saved, and what is still to come."""

    key: Key
    parts: Iterator[list[SavedTarget] | SavedRank]
    seeds: list[msgspec.Raw]


class RankQueue:
    """Ranks that are to be saved, the next one first."""

    def __init__(self) -> None:
        self.at = 0.0
        """When the next may be saved, of the monotonic clock."""
        self.left_out = 0
        """Ranks that were not saved."""
        self._due: deque[Key] = deque()
        self._saving: _Saving | None = None
        self._gathering: Iterator[list[tuple[Key, RunState]]] | None = None
        """All ranks, some at a time, as long as they have not all been asked when they were
        heard of."""
        self._since_ns = 0
        self._gathered: list[tuple[int, Key]] = []

    def __bool__(self) -> bool:
        """Whether there is something to do."""
        return bool(self._due) or self._saving is not None or self._gathering is not None

    def start_over(self, engine: Engine, since_ns: int) -> None:
        """Save all ranks that were heard since then, by the clock of
        :meth:`~esper_tamiyo.judging.engine.Engine.tick`, the last one first."""
        self.clear()
        self.left_out = 0
        self._since_ns = since_ns
        self._gathering = engine.roster.ranks.in_parts(GATHERED_AT_ONCE)
        while self._gathering and len(engine.roster.ranks) <= GATHERED_AT_ONCE:
            self._gather(self._gathering)

    def enqueue(self, ranks: Iterable[Key]) -> None:
        """Save these as well."""
        self._due.extend(ranks)

    def clear(self) -> None:
        """Save none of them."""
        self._due.clear()
        self._gathered.clear()
        self._saving = self._gathering = None

    def leave_out(self) -> None:
        """Do not save the ones that are left."""
        self.left_out += len(self._due)
        self.clear()

    def pop(self, engine: Engine) -> bytes | None:
        """The body of the next one; None where it is gone, or there was only a part to do.

        Never raises.
        """
        if self._gathering is not None:
            self._gather(self._gathering)
            return None
        if self._saving is None:
            first = self._due.popleft()
            self._saving = _Saving(first, saved_rank_in_parts(engine, first), [])
        saving, self._saving = self._saving, None
        try:
            return self._next_of(saving, engine)
        except Exception:  # its steps go on, and so does everybody else
            run, rank = saving.key
            self.left_out += 1
            log.exception("could not save rank %d of run %.80r", rank, run)
            return None

    def _gather(self, ranks: Iterator[list[tuple[Key, RunState]]]) -> None:
        """Take in some more ranks; when these were all, bring them into their order."""
        for part in ranks:
            heard = ((state.pace.heard_ns, key) for key, state in part)
            self._gathered += (each for each in heard if each[0] >= self._since_ns)
            return
        self._due.extendleft(key for _, key in sorted(self._gathered))
        self._gathered.clear()
        self._gathering = None

    def _next_of(self, saving: _Saving, engine: Engine) -> bytes | None:
        key, parts, seeds = saving
        part: list[SavedTarget] | SavedRank | None = next(parts, None)
        if isinstance(part, list):
            seeds += map(encode_seed, part)
            self._saving, self.at = saving, time.monotonic() + PART_PAUSE_S
            return None
        if part is None:
            part, seeds = saved_rank(engine, key), []
            if part is None:
                return None
            self.at = time.monotonic() + pause_after(len(part.seeds))
        ago_ns = time.perf_counter_ns() - heard_ns(engine, key)
        return encode_rank(key, part, time.time_ns() - ago_ns, seeds)


def pause_after(seeds: int) -> float:
    """Seconds to let go by after a rank with so many seeds was saved at once."""
    return SEED_PAUSE_S * max(0, seeds - SEEDS_AT_ONCE)
