"""Saved structs: a rank's data as plain data, one struct for each stateful class.

The fields have the names of the class's own, without their underscore. How objects become
these, and these objects again: :mod:`~esper_tamiyo.judging.saved_state`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from esper_otel.leyline.decisions import Decision, Finding
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.endings import Endings
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.excursions import Excursions, Record
from esper_tamiyo.judging.history import Earlier, History, WarmUp
from esper_tamiyo.judging.liveness import StepPace
from esper_tamiyo.judging.observations import (
    Extreme,
    FrozenMedian,
    Last,
    RollingMedian,
    Slope,
)
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.judging.peers import PeerBoard, PeerComparison, Waiting
from esper_tamiyo.judging.roster import Ranks, Roster
from esper_tamiyo.judging.rule_status import RuleStatus, RuleTarget
from esper_tamiyo.judging.run_state import RunState
from esper_tamiyo.judging.silences import SilencedRules, Silences
from esper_tamiyo.language.table import Rule


class SavedMedian(msgspec.Struct, frozen=True, array_like=True):
    """A rolling median."""

    arrived: list[float]
    value: float | None


class SavedFrozenMedian(msgspec.Struct, frozen=True, array_like=True):
    """A median of the first observations."""

    missing: int
    rolling: SavedMedian
    skip: int
    value: float | None


class SavedExtreme(msgspec.Struct, frozen=True, array_like=True):
    """The lowest or highest of a rolling median."""

    value: float | None


class SavedEarlier(msgspec.Struct, frozen=True, array_like=True):
    """What a metric was before its newest observations."""

    arrived: list[float]
    newest: list[float]
    above: int
    below: int
    lower: float | None
    upper: float | None


class SavedLast(msgspec.Struct, frozen=True, array_like=True):
    """A last observation."""

    missed: int
    repeats: int
    total: int
    value: float | None


class SavedSlope(msgspec.Struct, frozen=True, array_like=True):
    """A slope."""

    skip: int
    values: list[float]


class SavedRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record of excursions."""

    logs: float
    newest: list[float]
    peak: float
    bound: float
    largest: float
    peaks: int


class SavedExcursions(msgspec.Struct, frozen=True, array_like=True):
    """One side of one metric, with its records in the order of the table."""

    calm: int
    distances: list[float]
    length: int
    newest: list[float]
    onset: float
    taken: int
    usual: float
    values: int
    waiting: list[tuple[float, float | None]]
    edge: float | None
    level: float | None
    records: list[SavedRecord]
    scatter: float | None
    version: int
    farthest: float = 0.0
    recent: list[float] = []


class SavedHistory(msgspec.Struct, frozen=True, array_like=True):
    """The own past of a rank or seed. What is watched follows from the table, and so does the
    order of each list."""

    phase: float
    baselines: list[SavedMedian]
    frozen: list[SavedFrozenMedian]
    extremes: list[SavedExtreme]
    excursions: list[SavedExcursions]
    lasts: list[SavedLast]
    peers: dict[str, float]
    slopes: list[SavedSlope]
    earlier: list[SavedEarlier] = []


class SavedWarmUp(msgspec.Struct, frozen=True, array_like=True):
    """Whether a rank has a past to compare with."""

    phase: float
    steps: int
    under_way: bool


class SavedStatus(msgspec.Struct, frozen=True, array_like=True):
    """Where one rule stands; ``recent`` is hexadecimal, as it may have 1024 bits."""

    active: bool
    fired_at: int
    hits: int
    recent: str
    silenced_by: str
    since: int
    state: RuleState


class SavedTarget(msgspec.Struct, frozen=True, array_like=True):
    """Whom rules are judged for, a status for each rule of the table."""

    history: SavedHistory
    seed_id: str | None
    statuses: list[SavedStatus]
    values: dict[str, float]


class SavedComparison(msgspec.Struct, frozen=True, array_like=True):
    """The steps of a rank that wait to be compared with the other ranks'."""

    company: bool
    waiting: list[Waiting]
    target: SavedTarget


StepNs = Annotated[float, msgspec.Meta(ge=0.0, le=1e18)]
"""Mean duration of a step: it is multiplied, and up to 30 years stay a finite number."""


class SavedPace(msgspec.Struct, frozen=True, array_like=True):
    """How fast a rank goes, and the frame by which it has ended."""

    awaited: int
    ending: StepFrame | None
    last_ns: int
    step_ns: StepNs


class SavedRank(msgspec.Struct, frozen=True, array_like=True):
    """All that is known of one rank.

    ``posts`` are its newest steps as the other ranks see them (step, time, values),
    ``there_since_ns`` is when it was first seen there, None where ranks are not compared.
    ``live`` are the ids of the seeds of its newest frame.
    """

    comparison: SavedComparison
    gaps: list[tuple[int, int]]
    live: list[str]
    rank: SavedTarget
    seeds: list[SavedTarget]
    acting: bool
    clean_steps: int
    conservative: bool
    decision: Decision | None
    fired: list[tuple[Rule, Finding]]
    first: int
    first_ns: int
    instance: str
    newest: int
    pace: SavedPace
    warm_up: SavedWarmUp
    there_since_ns: int | None
    posts: list[tuple[int, int, dict[str, float]]]


class SavedEngine(msgspec.Struct, frozen=True, array_like=True):
    """What the engine knows besides ranks: replaced instances, and silences by run."""

    retired: list[tuple[str, int, str]]
    silences: dict[str, dict[str, int | None]]


SAVED: dict[type, type[msgspec.Struct]] = {
    RollingMedian: SavedMedian,
    FrozenMedian: SavedFrozenMedian,
    Extreme: SavedExtreme,
    Earlier: SavedEarlier,
    Last: SavedLast,
    WarmUp: SavedWarmUp,
    Slope: SavedSlope,
    Record: SavedRecord,
    Excursions: SavedExcursions,
    History: SavedHistory,
    RuleStatus: SavedStatus,
    RuleTarget: SavedTarget,
    PeerComparison: SavedComparison,
    StepPace: SavedPace,
    RunState: SavedRank,
    Engine: SavedEngine,
}
"""What each class is saved as."""

DERIVED: dict[type, frozenset[str]] = {
    RollingMedian: frozenset({"_ordered", "_warmup", "_window"}),
    FrozenMedian: frozenset({"_spans"}),
    Extreme: frozenset({"_better", "_rolling"}),
    Earlier: frozenset({"_block", "_inertia", "_most", "_ordered", "_span"}),
    Slope: frozenset({"_window"}),
    Record: frozenset({"_nth", "_size"}),
    Excursions: frozenset({"_ordered", "_risk", "_sign", "_warmup"}),
    History: frozenset({"_by_metric", "_own", "_own_lasts", "_pushes", "_watched"}),
    RuleStatus: frozenset({"idle"}),
    PeerComparison: frozenset({"_board", "_rank", "_watched"}),
    StepPace: frozenset({"away_ns", "heard_ns"}),
    RunState: frozenset(
        {
            *("_active", "_transitions", "_undecided"),  # of the step that is being judged
            *("_silenced", "_unrest", "guards", "stretch", "update_guards"),
            *("book", "silences"),
        }
    ),
    Engine: frozenset(
        {
            *("_book", "_observed"),  # by whoever makes it
            *("_runs", "roster"),  # rank by rank
            *("_counts", "_refused"),  # of this process
        }
    ),
}
"""Fields that are not saved, since they follow from the rest, from the table or from who runs
the engine."""

BY_HAND: dict[type, frozenset[str]] = {
    Endings: frozenset({"_ended", "_early"}),  # those of a few milliseconds are let go
    PeerBoard: frozenset({"_alone", "_first_ns", "_steps", "_who", "posts", "ranks"}),
    Ranks: frozenset({"_free", "_place_of", "_places"}),  # as ranks are put back
    Roster: frozenset(
        {
            *("_boards", "_retired", "endings", "ranks", "silences"),
            *("_peer_steps", "seeds"),  # counted as ranks are put back
            *("_state_bytes", "capacity", "forgotten"),  # of this process
            *("_speakers", "believed"),  # whoever asks introduces itself again
        }
    ),
    SilencedRules: frozenset({"_until", "used"}),
    Silences: frozenset({"_runs", "orders", "used"}),
}
"""Classes that several ranks share, and their fields: saved with each rank or the engine."""
