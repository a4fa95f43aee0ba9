"""Liveness of ranks: healthy, ended, or stale and since when.

When a silence began is said in the times of frames alone, so that a replay finds the same
ones: whether a frame that came at last ended it or the clock did, which the server hands in,
it is the same instant. How long it has lasted the server tells by its own clock, from when a
frame came: the trainer's may be wrong. What a recording cannot know is that a frame was only
late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from esper_otel.leyline.endings import HowEnded
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.observer import RuleState

if TYPE_CHECKING:
    from esper_tamiyo.judging.run_state import RunState

FLOOR_NS = 10_000_000_000
"""No silence is shorter than ten seconds: a run of 1 ms steps may well stop to evaluate."""

FIRST_NS = 600_000_000_000
"""Ten minutes for a rank of which only one step is known: how long its steps are is not."""

STALE_AFTER_STEPS = 30
"""Step times after which a rank is stale: nobody can say any more how it is doing."""

_WEIGHT = 0.2

_MOST = 10.0
"""Times its pace that one step may count for: half an hour of evaluation says little of how
long the next steps take."""


TOLD_RANKS = 16
"""Ranks that an overview tells of in detail."""

SEEDS_LIKE_A_RANK = 16
"""Seeds that take as long to count as a rank without."""

Key = tuple[str, int]
"""A run and a rank."""


class RankState(StrEnum):
    """How a rank is doing, as status and metrics have it."""

    HEALTHY = "healthy"
    STALE = "stale"
    """It was not heard of for too long: nobody can say how it is doing."""
    FINISHED = "finished"
    """It said that its run has ended, or that somebody interrupted it."""
    FAILED = "failed"
    """It said that an exception ended its run."""


ENDED = frozenset({RankState.FINISHED, RankState.FAILED})


class StepPace:
    """How fast a rank goes: the weighted mean of its steps' durations, in nanoseconds.

    A pause that was no trouble, an evaluation or a checkpoint, makes it slower for a
    while, and so a little more patient. ``last_ns`` is when the newest step ended, and
    ``heard_ns`` when that was heard, by the clock that silence is measured with. ``ending``
    is the frame by which the rank said that its run has ended, None while it goes on;
    ``awaited`` how many of its steps up to then have not been heard. ``away_ns`` is for how
    long there was no sidecar since the newest step.
    """

    __slots__ = ("awaited", "away_ns", "ending", "heard_ns", "last_ns", "step_ns")

    def __init__(self) -> None:
        self.heard_ns = 0
        self.last_ns = 0
        self.step_ns = 0.0
        self.away_ns = 0
        self.ending: StepFrame | None = None
        self.awaited = 0

    def note_end(self, ending: StepFrame, newest: int) -> None:
        """The rank has ended, of which steps up to ``newest`` have been heard."""
        self.ending = ending
        self.awaited = ending.step - newest

    def since_newest(self, time_ns: int) -> int:
        """How long nothing came before a frame that ended at ``time_ns``, but for the time in
        which nobody listened."""
        return time_ns - self.last_ns - self.away_ns

    def heard(self, time_ns: int, steps: int, at_ns: int) -> None:
        """A frame that ended at ``time_ns``, ``steps`` after the one before it."""
        if self.last_ns and time_ns > self.last_ns:
            each = (time_ns - self.last_ns) / steps
            known = self.step_ns
            if known:
                each = known + _WEIGHT * (min(each, _MOST * known) - known)
            self.step_ns = each
        self.last_ns = time_ns
        self.heard_ns = at_ns
        self.away_ns = 0
        ending = self.ending
        if ending is not None:
            self.awaited -= steps
            if self.awaited < 0 or time_ns > ending.time_unix_nano:  # it was not the end
                self.ending = None

    def patience_ns(self, steps: float) -> int:
        """How long ``steps`` step times are, the floor at least."""
        return max(FLOOR_NS, int(steps * self.step_ns)) if self.step_ns else FIRST_NS

    def silent_since(self, silent_ns: int, steps: float) -> int | None:
        """When patience ended with a silence that has lasted ``silent_ns``; None before.

        Nobody waits for a rank that has ended.
        """
        if self.ending is not None:
            return None
        patience = self.patience_ns(steps)
        return self.last_ns + patience if self.last_ns and silent_ns > patience else None


def rank_state(state: RunState, now_ns: int | None) -> RankState:
    """How a rank is doing at ``now_ns``, by the clock of ``heard_ns``.

    Without one it is healthy, unless it has ended.
    """
    ending = state.pace.ending
    if ending is not None and ending.ended is not None:
        failed = ending.ended.how is HowEnded.EXCEPTION
        return RankState.FAILED if failed else RankState.FINISHED
    if now_ns is None:
        return RankState.HEALTHY
    silent_ns = now_ns - state.pace.heard_ns
    is_stale = state.pace.silent_since(silent_ns, STALE_AFTER_STEPS) is not None
    return RankState.STALE if is_stale else RankState.HEALTHY


_TOLD_FIRST = (RankState.STALE, RankState.FAILED)


class RankCensus:
    """How ranks are doing, gathered rank by rank; without ``now_ns`` none is stale."""

    def __init__(self, now_ns: int | None) -> None:
        self._now_ns = now_ns
        self._states: Counter[str] = Counter()
        self._rules: Counter[tuple[str, str]] = Counter()
        self._conservative = 0
        self._newest: dict[int, list[tuple[int, int, Key, RunState]]] = {}
        """Of each kind, in the order in which they are told of, those heard of last."""
        self._counted = 0

    def count_in_parts(
        self, ranks: Sequence[tuple[Key, RunState]], ranks_at_once: int
    ) -> Iterator[None]:
        """Count them, with a stop after so many, of which one with many seeds is several."""
        weight = 0
        for key, state in ranks:
            weight += 1 + len(state.seeds) // SEEDS_LIKE_A_RANK
            if weight > ranks_at_once:
                weight = 0
                yield
            self.count(key, state)
        yield

    def count(self, key: Key, state: RunState) -> None:
        """One more rank."""
        how = rank_state(state, self._now_ns)
        self._states[how.value] += 1
        self._conservative += state.conservative and how not in ENDED
        for rule in _rules(state, how):
            self._rules[str(rule["rule"]), str(rule["state"])] += 1
        if how in _TOLD_FIRST:
            kind = _TOLD_FIRST.index(how)
        else:
            kind = 4 if how is RankState.FINISHED else 3 - bool(state.acting)
        self._counted += 1
        newest = self._newest.setdefault(kind, [])
        newest.append((state.pace.heard_ns, self._counted, key, state))
        if len(newest) > 4 * TOLD_RANKS:
            newest.sort(reverse=True)
            del newest[TOLD_RANKS:]

    def result(self) -> dict[str, Any]:
        """As plain data.

        ``states``, ``rules`` and ``conservative`` are counts over every rank; of those that
        have ended rules and conservative mode count no more. ``runs`` are some ranks in
        detail: first those that are stale, then those that failed, those for which a rule
        acts and those that finished last, of each kind those first that were heard of last.
        """
        told = [
            rank
            for _, newest in sorted(self._newest.items())
            for rank in sorted(newest, reverse=True)
        ]
        return {
            "states": {} if self._now_ns is None else dict(self._states),
            "rules": [
                {"rule": rule, "state": state, "count": count}
                for (rule, state), count in sorted(self._rules.items())
            ],
            "conservative": self._conservative,
            "runs": [
                _detail(key, state, self._now_ns) for _, _, key, state in told[:TOLD_RANKS]
            ],
        }


def _rules(state: RunState, how: RankState) -> list[dict[str, str | int]]:
    """The rules that are not at rest; none of a rank that has ended.

    Of a stale rank nobody can say how they stand, but for the rule on silence itself.
    """
    if how in ENDED:
        return []
    rules = state.rules()
    if how is not RankState.STALE:
        return rules
    about_silence = {entry.rule.id for _, entry in state.book.silence}
    return [
        rule
        if rule["rule"] in about_silence
        else {**rule, "state": RuleState.UNKNOWN.value, "last_state": rule["state"]}
        for rule in rules
    ]


def _detail(key: Key, state: RunState, now_ns: int | None) -> dict[str, Any]:
    how = rank_state(state, now_ns)
    detail: dict[str, Any] = {
        "run": key[0],
        "rank": key[1],
        "instance": state.instance,
        "newest_step": state.newest,
        "time_unix_nano": state.time_unix_nano,
        "action": state.decision.action.value if state.decision else None,
        "reason": state.decision.reason if state.decision else None,
        "conservative": state.conservative and how not in ENDED,
        "rules": _rules(state, how),
    }
    ending = state.pace.ending
    if ending is not None and ending.ended is not None:
        detail["ended"] = str(ending.ended)
    if now_ns is not None:
        detail["state"] = how.value
        detail["silent_s"] = max(0.0, (now_ns - state.pace.heard_ns) / 1e9)
    return detail
