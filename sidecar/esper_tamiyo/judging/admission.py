"""Admission: whether a step record, and its sender, keep to the limits.

The same for asks, the stream and recordings, and before anything of a frame is kept. What is
refused is counted by its reason, in ``tamiyo status``.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from esper_otel.leyline.decisions import Proposal
from esper_otel.leyline.frames import (
    MAX_NAME,
    MAX_RANK,
    MAX_SEEDS_PER_FRAME,
    MAX_STEP,
    MAX_TIME_UNIX_NANO,
    StepFrame,
)
from esper_otel.leyline.wire import Hello
from esper_tamiyo.judging.liveness import FLOOR_NS, STALE_AFTER_STEPS, StepPace

MAX_COLUMNS = 512
"""Columns that the rows of a trainer may have: ten times those of the registry."""

FREE_LEAP = 4096
"""Steps by which a streamed frame may always pass its rank's newest: a Collector drops, and a
producer may send every N-th step."""

HELD_LEAP = 64
"""The same while a process of that rank asks: its next ask says how far it has come."""

QUICKER = 16.0
"""Times its known pace that a rank may have gone since it was heard of last."""


class RefusalReason(StrEnum):
    """Why a frame, or a trainer, is not taken in."""

    STEP = "step_out_of_range"
    TIME = "time_out_of_range"
    RANK = "rank_out_of_range"
    NAME = "name_too_long"
    SEEDS = "too_many_seeds"
    COLUMNS = "too_many_columns"
    ROOM = "too_many_ranks"
    LEAP = "step_leap"
    UNNAMED = "unnamed_beside_an_asking_process"


def fault_of(frame: StepFrame, proposal: Proposal | None = None) -> RefusalReason | None:
    """Which limit a frame, or what is proposed with it, is beyond; None for a sound one."""
    if not 0 <= frame.step <= MAX_STEP:
        return RefusalReason.STEP
    if not 0 <= frame.time_unix_nano <= MAX_TIME_UNIX_NANO:
        return RefusalReason.TIME
    if not 0 <= frame.rank <= MAX_RANK:
        return RefusalReason.RANK
    if len(frame.run) > MAX_NAME or len(frame.instance) > MAX_NAME:
        return RefusalReason.NAME
    if proposal is not None and len(proposal.seed_id) > MAX_NAME:
        return RefusalReason.NAME
    return fault_of_seeds(frame.seeds) if frame.seeds else None


def fault_of_seeds(seeds: Collection[str]) -> RefusalReason | None:
    """Which limit the ids of the seeds of one frame are beyond."""
    if len(seeds) > MAX_SEEDS_PER_FRAME:
        return RefusalReason.SEEDS
    return RefusalReason.NAME if any(len(each) > MAX_NAME for each in seeds) else None


def fault_of_hello(hello: Hello) -> RefusalReason | None:
    """Which limit a trainer that introduces itself is beyond."""
    columns = (*hello.step_columns, *hello.seed_columns)
    if not (0 <= hello.rank <= MAX_RANK and 0 <= hello.world_size <= MAX_RANK):
        return RefusalReason.RANK
    if not 0 <= hello.began_unix_nano <= MAX_TIME_UNIX_NANO:
        return RefusalReason.TIME
    if len(columns) > MAX_COLUMNS:
        return RefusalReason.COLUMNS
    names = (hello.run, hello.instance, hello.mode, *columns)
    return RefusalReason.NAME if any(len(name) > MAX_NAME for name in names) else None


def leaps(pace: StepPace, steps: int, at_ns: int, *, held: bool) -> bool:
    """Whether a streamed frame that is ``steps`` past its rank's newest cannot be its next.

    ``at_ns`` is when it came, by the clock of ``pace``, and ``held`` whether a process of the
    rank asks. While a rank is heard of, its steps go on at about its pace: one point with a
    step far ahead, from whomever, would make all that follows late. Once nothing has come for
    as long as makes a rank stale, whatever comes next is believed: so a process that goes on
    elsewhere, and one that is sampled more coarsely than this allows, waits ten seconds.
    """
    if steps <= (HELD_LEAP if held else FREE_LEAP):
        return False
    silent_ns = at_ns - pace.heard_ns
    if silent_ns > max(FLOOR_NS, STALE_AFTER_STEPS * pace.step_ns):
        return False
    return not pace.step_ns or steps * pace.step_ns > QUICKER * silent_ns
