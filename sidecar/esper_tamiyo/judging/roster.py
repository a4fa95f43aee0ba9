"""The roster: which ranks are known, which process speaks for each, and who is forgotten.

A process that asks on a connection is the rank for as long as that is open: the stream may add
to what it says, and does not replace it. Of two that ask the one that began later is the rank,
and where neither says when it began the one that introduced itself last. Of two that only
stream, one that tells of a time before the other's first step is of an earlier attempt,
whenever it comes: a spool that is delivered late, a Collector that catches up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from esper_otel.leyline.frames import MAX_SEEDS_PER_FRAME, StepFrame
from esper_tamiyo.judging.admission import RefusalReason, leaps
from esper_tamiyo.judging.endings import Endings
from esper_tamiyo.judging.history import Watched
from esper_tamiyo.judging.liveness import STALE_AFTER_STEPS, Key
from esper_tamiyo.judging.peers import PeerBoard
from esper_tamiyo.judging.rule_status import NEW_AT_ONCE
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.judging.run_state import RunState
from esper_tamiyo.judging.silences import Silences

MAX_RUNS = 4096
"""Ranks kept in memory at most, of all runs together, whatever there is room for."""

STATE_BYTES = 192 << 20
"""What all of it may take unless said otherwise: with the process itself, 28 MB, and what its
allocator does not give back, it stays below 256 MB."""

PEER_STEP_BYTES = 600
"""What one step of one rank takes that is kept for the others: measured, 562."""

MAX_RETIRED = 1024
"""Instances remembered as replaced, so that their late frames do not bring them back."""

GONE_AFTER_NS = 3_600_000_000_000
"""After an hour without a word a rank is anybody's, whatever the times of frames say: a clock
that was wrong must not keep a run out for ever."""

TRIMMED_AT_ONCE = 16
"""Ranks that go within a second or so, where there are too many."""

BRIEF = 16
"""Ranks, those not heard of for longest, among which one goes first that told a single step."""


class Capacity(NamedTuple):
    """How many ranks, seeds of all ranks, and steps of ranks kept for the others, there may
    be."""

    ranks: int
    seeds: int
    peer_steps: int


def capacity_of(book: Rulebook, state_bytes: int) -> Capacity:
    """What there is room for in ``state_bytes``, by what a table needs of the past.

    Nine parts of sixteen are for ranks, four for seeds and three for comparing ranks.
    """
    part = state_bytes / 16
    of_rank = 10_000 + 700 * len(book.rules) + past_bytes(book.step_watch)
    of_seed = 4_800 + 500 * len(book.seed_places) + past_bytes(book.seed_watch)
    return Capacity(
        max(1, min(MAX_RUNS, int(9 * part / of_rank))),
        max(MAX_SEEDS_PER_FRAME, int(4 * part / of_seed)),
        int(3 * part / PEER_STEP_BYTES),
    )


def past_bytes(watched: Watched) -> int:
    """What a full past takes: fitted to that of the tables here, 40 bytes for each number."""
    sides = {(each.metric, each.below) for each in watched.records}
    return (
        (1_300 + 40 * watched.window) * len(watched.baselines)
        + (1_000 + 40 * watched.window) * len(watched.slopes)
        + (3_000 + 40 * watched.record.window) * len(sides)
        + 1_000 * len(watched.records)
    )


class Speaker:
    """A process that asks: which one, since when, and on how many connections."""

    __slots__ = ("began_unix_nano", "connections", "heard_ns", "instance")

    def __init__(self, instance: str, began_unix_nano: int, heard_ns: int) -> None:
        self.instance = instance
        self.began_unix_nano = began_unix_nano
        self.connections = 1
        self.heard_ns = heard_ns


class Ranks(OrderedDict[Key, RunState]):
    """Ranks in the order in which they were heard of last, and each in a place that it keeps.

    To go through all of them in that order takes milliseconds, as nothing of most is in a
    processor's cache, and nobody may be heard of meanwhile; from place to place it can be done
    bit by bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: list[Key | None] = []
        self._place_of: dict[Key, int] = {}
        self._free: list[int] = []

    def __setitem__(self, key: Key, state: RunState) -> None:
        if key not in self._place_of:
            if not self._free:
                self._free.append(len(self._places))
                self._places.append(None)
            place = self._place_of[key] = self._free.pop()
            self._places[place] = key
        super().__setitem__(key, state)

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(key)
        place = self._place_of.pop(key)
        self._places[place] = None
        self._free.append(place)

    def in_parts(self, ranks_at_once: int) -> Iterator[list[tuple[Key, RunState]]]:
        """All ranks, so many at a time; one that comes or goes meanwhile may be among them."""
        for first in range(0, len(self._places), ranks_at_once):
            places = self._places[first : first + ranks_at_once]
            yield [(key, self[key]) for key in places if key is not None]


class Roster:
    """All ranks in the order in which they were heard of last."""

    def __init__(self, book: Rulebook, state_bytes: int) -> None:
        self._state_bytes = state_bytes
        self.use_table(book)
        self.ranks = Ranks()
        self.silences = Silences()
        self.endings = Endings()
        self.forgotten = 0
        """Ranks that went to make room."""
        self.seeds = 0
        """Seeds kept, of all ranks."""
        self.believed: set[Key] = set()
        """Ranks of which no process asks and whose next step is believed however far it
        leaps, as a restart of the sidecar lies before it."""
        self._peer_steps = 0
        self._boards: dict[str, PeerBoard] = {}
        self._speakers: dict[Key, Speaker] = {}
        self._retired: OrderedDict[tuple[Key, str], None] = OrderedDict()

    def use_table(self, book: Rulebook) -> None:
        """Have room for as much as that table allows; the next :meth:`trim` sees to it."""
        self.capacity = capacity_of(book, self._state_bytes)

    def introduce(self, key: Key, instance: str, began_unix_nano: int, at_ns: int) -> bool:
        """A process of a rank asks from now on; False: a living one that is newer does.

        ``began_unix_nano`` is when it began, 0 where it does not say; ``at_ns`` is now.
        """
        now = self._speakers.get(key)
        if now is not None and now.instance == instance:
            now.connections += 1
            now.heard_ns = at_ns
            return True
        if now is not None and self._is_living(key, now, at_ns):
            began_earlier = 0 < began_unix_nano < now.began_unix_nano
            if began_earlier or (key, instance) in self._retired:
                return False
        self._retired.pop((key, instance), None)
        if now is not None:
            self._retire(key, now.instance)
        self._speakers[key] = Speaker(instance, began_unix_nano, at_ns)
        return True

    def leave(self, key: Key, instance: str) -> None:
        """A connection of that process has ended."""
        speaker = self._speakers.get(key)
        if speaker is not None and speaker.instance == instance:
            speaker.connections -= 1
            if not speaker.connections:
                del self._speakers[key]

    def overview(self) -> dict[str, Any]:
        """How much is kept, as plain data; ``asking`` are ranks of which a process asks."""
        return {
            "ranks": len(self.ranks),
            "asking": len(self._speakers),
            "seeds": self.seeds,
            "peer_steps": self._peer_steps,
            "room_for": self.capacity._asdict(),
        }

    def admit(
        self, frame: StepFrame, book: Rulebook, at_ns: int, *, asked: bool
    ) -> RunState | RefusalReason | None:
        """The state that a frame of a new rank, or of another process, belongs to; None when a
        newer process is the rank.

        Where there are too many, one goes of which no process asks: of the few not heard of
        for longest one that has told a single step, as ids made up at random do, or else the
        very first. Where that one goes on as well, whoever comes has no place, unless it asks:
        else each would push the next out, and none ever had a past.
        """
        key = (frame.run, frame.rank)
        before, speaker = self.ranks.get(key), self._speakers.get(key)
        if asked and speaker is not None:
            if speaker.instance != frame.instance:
                return None
        elif not self._may_stream(frame, key, before, at_ns):
            return None
        elif speaker is not None and speaker.instance not in ("", frame.instance):
            del self._speakers[key]  # its connection is open, and nothing has come for long
            self._retire(key, speaker.instance)
        if before is not None and not before.instance and before.newest < frame.step:
            before.instance = frame.instance
            return before
        if before is None and len(self.ranks) >= self.capacity.ranks:
            oldest = self._next_to_go()
            if oldest is None or not (asked or self._is_over(self.ranks[oldest], at_ns)):
                return RefusalReason.ROOM
            self._forget(oldest)
        state = self.ranks[key] = self._new_state(frame, book, before)
        return state

    def fault_of_next(
        self, state: RunState, frame: StepFrame, at_ns: int, *, asked: bool
    ) -> RefusalReason | None:
        """Why a frame with a step beyond the newest is not that rank's next one."""
        if not asked and state.newest >= 0:
            is_held = (frame.run, frame.rank) in self._speakers
            if is_held and state.instance and not frame.instance:
                return RefusalReason.UNNAMED
            if not is_held and (frame.run, frame.rank) in self.believed:
                self.believed.discard((frame.run, frame.rank))
            elif leaps(state.pace, frame.step - state.newest, at_ns, held=is_held):
                return RefusalReason.LEAP
        if frame.seeds and state.book.judges_seeds and not self._has_room_for(state, frame):
            return RefusalReason.SEEDS
        return None

    def trim_in_parts(self, ranks_at_once: int) -> Iterator[None]:
        """Let some ranks go where there are more, or more of their steps, than there is room
        for; with a stop after each, and after so many that were looked at."""
        kept = 0
        for part in self.ranks.in_parts(ranks_at_once):
            for (run, rank), _ in part:
                board = self._boards[run]
                kept += board.posts if board.is_first(rank) else 0
            yield
        self._peer_steps = kept
        ranks, _, peer_steps = self.capacity
        for _ in range(TRIMMED_AT_ONCE):
            oldest = self._next_to_go()
            if oldest is None or (self._peer_steps <= peer_steps and len(self.ranks) <= ranks):
                return
            before = self._boards[oldest[0]].posts
            self._forget(oldest)
            board_after = self._boards.get(oldest[0])
            self._peer_steps -= before - (board_after.posts if board_after else 0)
            yield

    def newest_steps(self) -> dict[str, int]:
        """The newest step of each run."""
        newest: dict[str, int] = {}
        for (run, _), state in self.ranks.items():
            newest[run] = max(state.newest, newest.get(run, -1))
        return newest

    def _has_room_for(self, state: RunState, frame: StepFrame) -> bool:
        """Whether the seeds of a frame can be kept, after silent ranks have gone for them."""
        wanted = min(len(frame.seeds.keys() - state.seeds.keys()), NEW_AT_ONCE)
        while self.seeds + wanted > self.capacity.seeds:
            oldest = next((key for key in self._silent() if self.ranks[key].seeds), None)
            if oldest is None or self.ranks[oldest] is state:
                return False
            self._forget(oldest)
        return True

    def _may_stream(
        self, frame: StepFrame, key: Key, before: RunState | None, at_ns: int
    ) -> bool:
        """Whether a process that does not ask may be the rank from now on."""
        instance, speaker = frame.instance, self._speakers.get(key)
        is_others = speaker is not None and speaker.instance not in ("", instance)
        if is_others and self._is_living(key, speaker, at_ns):
            return False
        if (key, instance) in self._retired:
            return False
        if before is None or not before.instance:
            return True
        is_older = 0 < frame.time_unix_nano < before.first_ns
        return not (is_older and at_ns - before.pace.heard_ns < GONE_AFTER_NS)

    def _is_living(self, key: Key, speaker: Speaker | None, at_ns: int) -> bool:
        """Whether a process whose connection is open was heard of lately."""
        if speaker is None:
            return False
        state, heard_ns = self.ranks.get(key), speaker.heard_ns
        if state is None or state.instance != speaker.instance:
            return at_ns - heard_ns < GONE_AFTER_NS
        patience = state.pace.patience_ns(STALE_AFTER_STEPS)
        return at_ns - max(heard_ns, state.pace.heard_ns) <= patience

    def _new_state(self, frame: StepFrame, book: Rulebook, before: RunState | None) -> RunState:
        run, rank = frame.run, frame.rank
        board = self._boards.get(run)
        if board is None:
            board = self._boards[run] = PeerBoard()
        if before is None:
            board.ranks += 1
        else:
            board.remove_rank(rank)
            self.seeds -= len(before.seeds)
            if not 0 < frame.time_unix_nano < before.first_ns:
                self._retire((run, rank), before.instance)
        return RunState(frame.instance, book, board, rank, self.silences.of_run(run))

    def _retire(self, key: Key, instance: str) -> None:
        if instance:
            self._retired[key, instance] = None
            if len(self._retired) > MAX_RETIRED:
                self._retired.popitem(last=False)

    def _silent(self) -> Iterator[Key]:
        """The ranks of which no process asks, those not heard of for longest first."""
        return (key for key in self.ranks if key not in self._speakers)

    def _next_to_go(self) -> Key | None:
        """The rank to forget next, first those that have ended; None where a process asks of
        each."""
        ended = self.endings.oldest(self.ranks)
        if ended is not None and ended not in self._speakers:
            return ended
        first = list(islice(self._silent(), BRIEF))
        brief = (key for key in first if not self.ranks[key].pace.step_ns)
        return next(brief, first[0] if first else None)

    @staticmethod
    def _is_over(state: RunState, at_ns: int) -> bool:
        """Whether a rank has ended, told a single step, or nothing for as long as makes it
        stale."""
        if state.pace.ending is not None:
            return True
        silent_ns = at_ns - state.pace.heard_ns
        patience_ns = state.pace.patience_ns(STALE_AFTER_STEPS)
        return not state.pace.step_ns or silent_ns > patience_ns

    def _forget(self, key: Key) -> None:
        state = self.ranks[key]
        del self.ranks[key]
        self.seeds -= len(state.seeds)
        self.forgotten += 1
        run, rank = key
        board = self._boards[run]
        board.forget_rank(rank)
        if not board.ranks:
            del self._boards[run]
            self.silences.forget_run(run)
