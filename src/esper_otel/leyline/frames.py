"""Step records (frames): the values of one step, and of each seed during it, and their limits.

On the training thread a frame is a *row*, a list of floats in registry order in which
NaN says "absent": non-finite measurements are never values, they are counted in
``nonfinite``. Off the training thread a frame is a :class:`StepFrame`. A value that a device
still has to deliver is a :class:`Reading` until then: nobody waits for it.

The limits of its contents are the same for every sender and channel. They are checked at the
edge, before anything is copied or kept; what is beyond one is refused and counted. What is
within them stays within 64 bits through all sums that are made of it, as that is what
MessagePack and OTLP can carry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from types import MappingProxyType
from typing import NamedTuple, Protocol

import msgspec

from esper_otel.leyline.decisions import Decision, Proposal
from esper_otel.leyline.endings import RunEnd
from esper_otel.leyline.events import Event
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS

ABSENT = nan
"""Value of an absent metric in a row."""

NO_CUSTOM: Mapping[str, float] = MappingProxyType({})
"""A step without custom values, which are by name."""

MAX_STEP = (1 << 53) - 1
"""Largest number of a step: from there on a double no longer tells one step from the next."""

MAX_RANK = (1 << 31) - 1
"""Largest rank, and largest number of ranks that a trainer may name: what torch.distributed and
MPI count with."""

MAX_TIME_UNIX_NANO = (1 << 62) - 1
"""Latest time of a frame, in the year 2116: two such times can be added. 0 says no time."""

MAX_NAME = 256
"""Longest id of a run, an instance or a seed, in characters."""

MAX_CUSTOM = 64
"""Custom values that a run may have, and so a step of one rank."""

MAX_CUSTOM_NAME = 100
"""Longest name of a custom value, in characters."""

MAX_SEEDS_PER_FRAME = 256
"""Seeds that one step of one rank may report. An Ask with all their values is near the 64 KiB
that a message may have."""


class StepFrame(msgspec.Struct, frozen=True, array_like=True):
    """Everything known of one step of one rank.

    ``run``, ``rank`` and ``instance`` (unique per process) say whose step it is,
    ``time_unix_nano`` when it ended. ``values`` maps the keys of step metrics that are
    present to finite values, and those of custom values
    (:mod:`~esper_otel.leyline.custom`); ``seeds`` does the same per seed id.

    One with ``ended`` is the last of its process and has no values but custom ones that were
    reported behind the last step: ``step`` is that step, ``time_unix_nano`` when the run ended.
    """

    run: str
    instance: str
    rank: int
    step: int
    time_unix_nano: int
    values: dict[str, float]
    seeds: dict[str, dict[str, float]] = {}
    ended: RunEnd | None = None


def step_row() -> list[float]:
    """A row of step values with everything absent."""
    return [ABSENT] * len(STEP_KEYS)


def seed_row() -> list[float]:
    """A row of seed values with everything absent."""
    return [ABSENT] * len(SEED_KEYS)


def present(keys: Sequence[str], row: Sequence[float]) -> dict[str, float]:
    """The finite values of ``row`` by key; the two must be equally long."""
    return {key: value for key, value in zip(keys, row, strict=True) if isfinite(value)}


class GardenFrame(NamedTuple):
    """What a garden has to say of one step.

    ``seeds`` are (seed id, its row); ``violations`` and ``live`` the running count of
    isolation violations and the seeds alive, ``fetch_ms`` the last kernel fetch, NaN
    before the first; ``proposal`` the operation the garden would like to do.
    """

    seeds: list[tuple[str, list[float]]]
    violations: float
    fetch_ms: float
    live: float
    proposal: Proposal | None = None


class StepTimeline(NamedTuple):
    """When the phases of one step were; becomes the spans of its trace.

    ``phases`` are (span name, start, end), for example ``train.forward``; all times are
    Unix nanoseconds whose differences are those of a monotonic clock. ``row`` is the
    step's row of values. ``decision`` is None when nobody was asked, ``applied`` whether
    it changed something in the run; its phase ``tamiyo.decide`` may end within the next
    step. ``events`` happened during the step, their marks Unix nanoseconds. ``update`` is
    what was decided about the step's own update before it was made, None when it was not
    checked. ``phase`` is the name of the training's phase, "" before the first was named.
    """

    step: int
    start_unix_nano: int
    end_unix_nano: int
    phases: Sequence[tuple[str, int, int]]
    row: Sequence[float] = ()
    decision: Decision | None = None
    applied: bool = False
    events: Sequence[Event] = ()
    update: Decision | None = None
    phase: str = ""

    @property
    def spans(self) -> int:
        """How many spans it makes."""
        return 1 + len(self.phases)


class Reading(Protocol):
    """A number that a device still has to deliver."""

    def ready(self) -> bool:
        """Whether it has arrived; never waits for it."""

    def value(self) -> float | None:
        """The number; None when it has been lost or is not here yet."""


Value = float | Reading
"""A number, or one that a device still has to deliver."""


def arrived(value: Value) -> float | None:
    """The number; None when it has been lost or is not here yet."""
    return value if isinstance(value, float) else value.value()


def known(value: Value) -> float:
    """As :func:`arrived`, with NaN for what is not known."""
    number = arrived(value)
    return nan if number is None else number


def delivered(value: Value) -> float | None:
    """The number, NaN where it was lost; None while it is on its way."""
    if isinstance(value, float):
        return value
    return known(value) if value.ready() else None
