"""Step records (frames): the values of one step, and of each seed during it.

On the training thread a frame is a *row*, a list of floats in registry order in which
NaN says "absent": non-finite measurements are never values, they are counted in
``nonfinite``. Off the training thread a frame is a :class:`StepFrame`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from esper_otel.leyline.decisions import Decision, Proposal
from esper_otel.leyline.endings import RunEnd
from esper_otel.leyline.events import Event
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS

ABSENT = nan
"""Value of an absent metric in a row."""

NO_CUSTOM: Mapping[str, float] = MappingProxyType({})
"""A step without custom values, which are by name."""


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
