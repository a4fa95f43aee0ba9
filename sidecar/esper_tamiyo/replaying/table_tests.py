"""Tests of tables: synthetic steps, and the expected decisions.

:mod:`esper_tamiyo.replaying.table_test_file` reads them from YAML. Everything runs through the
engine that serves trainers; one step follows the other in every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite

import msgspec

from esper_otel.leyline.custom import is_custom
from esper_otel.leyline.decisions import (
    NOMINAL,
    WARMING_UP,
    Action,
    Decision,
    Proposal,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.language.table import Table
from esper_tamiyo.replaying.replay import Judge, Judged

RUN = "test"
FIRST_STEP = 1
"""Trainers count from 1."""

START_NS = 1_000_000_000_000_000_000

Value = float | None
"""None is no value."""

MAX_VALUES = 100_000
"""In one series; a test is something that a person reads."""

_FINITE = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_WORD = re.compile(
    rf"(?:(_)|({_FINITE}|[+-]?inf|nan)(?:([+-])({_FINITE}))?)(?:x(\d{{1,9}}))?",
    re.IGNORECASE | re.ASCII,
)


class SeriesError(ValueError):
    """A word that is none of the notation's."""


def series(text: str) -> list[Value]:
    """The values that ``text`` stands for; raises :class:`SeriesError`.

    Words separated by blanks, each one or more values of a metric, step by step:

    ======== ================================================================
    ``4``    the value
    ``4x20`` the value twenty times
    ``1+2x3`` ``1 3 5``: three values that rise by 2; ``1-2x3`` falls
    ``_``    no value; ``_x5`` none five times
    ``nan``  a value that was measured and is not finite, also ``inf``, ``-inf``
    ======== ================================================================

    The notation is promtool's but for one thing: ``xN`` is always N values, where promtool's
    ``4x20`` is twenty-one.
    """
    values: list[Value] = []
    for word in text.split():
        match = _WORD.fullmatch(word)
        if match is None:
            raise SeriesError(
                f"expected values like 4, 4x20, 1+0.5x10, _ or nan; got {word[:60]!r}"
            )
        gap, start, sign, slope, times = match.groups()
        if slope and not times:
            raise SeriesError(
                f"{word!r} does not say how often: expected {word}x10 or the like"
            )
        count = int(times or 1)
        if not 0 < count <= MAX_VALUES - len(values):
            raise SeriesError(f"{word!r} makes {count:,} values; expected 1 to {MAX_VALUES:,}")
        if gap:
            values += [None] * count
        else:
            rise = float(slope or 0) * (-1 if sign == "-" else 1)
            values += _ramp(float(start), rise, count)
    return values


def _ramp(start: float, rise: float, count: int) -> Iterator[float]:
    return (start + place * rise for place in range(count))


class Rank(msgspec.Struct, frozen=True):
    """What one rank measured: a series by metric, the same by seed, and lost steps."""

    metrics: dict[str, list[Value]] = {}
    seeds: dict[str, dict[str, list[Value]]] = {}
    proposals: dict[int, Proposal] = {}
    lost: frozenset[int] = frozenset()

    @property
    def steps(self) -> int:
        """The number of its last step, the length of its longest series."""
        whose = (self.metrics, *self.seeds.values())
        return max((len(series) for metrics in whose for series in metrics.values()), default=0)

    def frame_at(self, rank: int, step: int, step_ns: int) -> StepFrame | None:
        """The frame of one step, None when it is lost or there is none."""
        if step in self.lost or step > self.steps:
            return None
        values, nonfinite = _at(self.metrics, step)
        seeds = {}
        for seed_id, metrics in self.seeds.items():
            seeds[seed_id], more = _at(metrics, step)
            nonfinite += more
        values["step"] = float(step)
        values["nonfinite"] = values.get("nonfinite", 0.0) + nonfinite
        return StepFrame(
            RUN,
            "",
            rank,
            step,
            START_NS + step * step_ns,
            values,
            {seed_id: values for seed_id, values in seeds.items() if values},
        )


class Expectation(msgspec.Struct, frozen=True):
    """What a test wants decided at some steps; None is whatever comes."""

    line: int
    rank: int
    steps: tuple[int, ...]
    action: Action
    reason: str | None = None
    severity: Severity | None = None
    seed: str | None = None
    operation: SeedOperation | None = None
    findings: tuple[str, ...] | None = None
    conservative: bool | None = None
    silence: bool = False
    """Whether it is about the silence behind the step, and not about the step."""
    parameters: Mapping[str, float | None] = {}
    """What must be asked for, by name; None: nothing of that name."""

    def _reason_of(self, decision: Decision) -> str:
        """Its reason; a test that is too short to warm up may call it nominal."""
        reason = decision.reason
        return NOMINAL if (self.reason, reason) == (NOMINAL, WARMING_UP) else reason

    def difference(self, decision: Decision) -> tuple[str, str] | None:
        """(expected, got) in words, None when ``decision`` is as it should be."""
        found = {finding.rule: None for finding in decision.findings}
        asked = decision.parameters
        parts = [
            (f"{name} {_shown(wanted)}".strip(), f"{name} {_shown(got)}".strip())
            for name, wanted, got in (
                ("", self.action, decision.action),
                ("reason", self.reason, self._reason_of(decision)),
                ("severity", self.severity, decision.severity),
                ("seed", self.seed, decision.target_seed),
                ("operation", self.operation, decision.seed_operation),
                ("conservative", self.conservative, decision.conservative),
            )
            if wanted is not None and wanted != got
        ]
        parts += [
            (f"{name} {_shown(wanted)}", f"{name} {_shown(asked.get(name))}")
            for name, wanted in self.parameters.items()
            if wanted != asked.get(name)
        ]
        if self.findings is not None and set(self.findings) != set(found):
            parts.append((f"findings {_listed(self.findings)}", f"findings {_listed(found)}"))
        if not parts:
            return None
        expected, got = (", ".join(side) for side in zip(*parts, strict=True))
        return expected, got


class TableTestFailure(msgspec.Struct):
    """One thing that went otherwise, at ``step`` and ``more`` steps behind it.

    ``judged`` is None when nothing was decided where something should have been.
    """

    line: int
    test: str
    rank: int
    step: int
    expected: str
    got: str
    judged: Judged | None = None
    more: int = 0


class TableTest(msgspec.Struct, frozen=True):
    """One test. ``step_ms`` is the time from one step to the next."""

    name: str
    line: int
    ranks: dict[int, Rank]
    expected: tuple[Expectation, ...]
    step_ms: float = 100.0
    nothing_else: bool = True

    def failures(self, table: Table) -> list[TableTestFailure]:
        """Where ``table`` decides otherwise, empty when it does not."""
        judge = Judge(table)
        wanted = {
            (one.rank, step, one.silence): one for one in self.expected for step in one.steps
        }
        found: list[TableTestFailure] = []
        for number, frame in self._frames():
            proposal = self.ranks[number].proposals.get(frame.step)
            for judged in judge.judge(frame, proposal):
                key = (judged.frame.rank, judged.frame.step, not judged.is_step)
                failure = self._failure(judged, wanted.pop(key, None))
                if failure is not None:
                    _note(found, failure)
        for (_, step, _), expectation in wanted.items():
            _note(found, self._undecided(expectation, step))
        return found

    def _failure(self, judged: Judged, wanted: Expectation | None) -> TableTestFailure | None:
        frame, decision = judged
        if wanted is not None:
            difference = wanted.difference(decision)
        elif self.nothing_else and not judged.is_nominal:
            difference = ("nothing", f"{decision.action}, reason {decision.reason}")
        else:
            difference = None
        if difference is None:
            return None
        line = self.line if wanted is None else wanted.line
        return TableTestFailure(line, self.name, frame.rank, frame.step, *difference, judged)

    def _undecided(self, wanted: Expectation, step: int) -> TableTestFailure:
        """Of a silence that nobody found; every step gets a decision."""
        expected = f"silence behind it: {wanted.action}"
        return TableTestFailure(wanted.line, self.name, wanted.rank, step, expected, "nothing")

    def _frames(self) -> Iterator[tuple[int, StepFrame]]:
        """Step by step, every rank's, in the order in which they happened."""
        step_ns = round(self.step_ms * 1e6)
        last = max((rank.steps for rank in self.ranks.values()), default=0)
        for step in range(FIRST_STEP, last + 1):
            for number in sorted(self.ranks):
                frame = self.ranks[number].frame_at(number, step, step_ns)
                if frame is not None:
                    yield number, frame


def _note(found: list[TableTestFailure], failure: TableTestFailure) -> None:
    """Add a failure, or count it to the same one of the steps before."""
    for before in found:
        if (before.line, before.rank, before.expected, before.got) == (
            failure.line,
            failure.rank,
            failure.expected,
            failure.got,
        ):
            before.more += 1
            return
    found.append(failure)


def _at(metrics: dict[str, list[Value]], step: int) -> tuple[dict[str, float], int]:
    """The finite values of a step, and how many were not finite."""
    values: dict[str, float] = {}
    nonfinite = 0
    for key, series in metrics.items():
        value = series[step - FIRST_STEP] if step - FIRST_STEP < len(series) else None
        if value is None:
            continue
        if isfinite(value):
            values[key] = value
        elif is_custom(key):
            values["custom_nonfinite"] = values.get("custom_nonfinite", 0.0) + 1.0
        else:
            nonfinite += 1
    return values, nonfinite


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


def _listed(rules: Iterable[str]) -> str:
    return " ".join(rules) or "none"
