"""History of a rank, or of one of its seeds: baselines, last values, slopes.

Pure bookkeeping, filled after each frame was judged, so that no value is ever held
against a baseline it is part of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from esper_tamiyo.judging.excursions import Earlier, Excursions, earlier_span
from esper_tamiyo.judging.observations import (
    Extreme,
    FrozenMedian,
    Last,
    Reference,
    References,
    RollingMedian,
    Slope,
)
from esper_tamiyo.language.operators import BaselineKind
from esper_tamiyo.language.table import RecordSpan


class BaselineKey(NamedTuple):
    """One baseline: whose, and which past of it."""

    metric: str
    kind: BaselineKind

    @property
    def name(self) -> str:
        """What findings call it, and the key it is kept by."""
        kind = "baseline" if self.kind is BaselineKind.ROLLING else self.kind.value
        return f"{kind}({self.metric})"


class RecordKey(NamedTuple):
    """One record of excursions: of which metric, on which side, and of how many values at
    once (``k`` of ``n``)."""

    metric: str
    below: bool
    hold: tuple[int, int]


class Watched(msgspec.Struct, frozen=True):
    """The metrics of one scope whose past some rule needs.

    Before an extreme among ``baselines`` comes the rolling median that it is one of.
    """

    baselines: tuple[BaselineKey, ...] = ()
    lasts: tuple[str, ...] = ()
    slopes: tuple[str, ...] = ()
    window: int = 64
    warmup: int = 20
    records: tuple[RecordKey, ...] = ()
    record: RecordSpan = RecordSpan()
    earlier: tuple[str, ...] = ()


class History:
    """The past of one rank or seed, by the key of the metric.

    The history of a seed also shows its rank's, so that one rule can speak of both.
    ``peers`` are the medians of the other ranks of the run, by the key of the metric, at the
    step that is judged.
    """

    __slots__ = (
        "_by_metric",
        "_own",
        "_own_lasts",
        "_phase",
        "_pushes",
        "_watched",
        "baselines",
        "earlier",
        "excursions",
        "lasts",
        "peers",
        "slopes",
    )

    def __init__(
        self,
        watched: Watched,
        of_rank: History | None = None,
        before: History | None = None,
    ) -> None:
        """``before`` is the past under another table: what is still watched goes on."""
        self._watched = watched
        spans = (watched.window, watched.warmup)
        kept = before
        if before is not None and (before._watched.window, before._watched.warmup) != spans:
            kept = None
        baselines: dict[str, Reference] = {}
        for watch in watched.baselines:
            old = kept.baselines.get(watch.name) if kept else None
            baselines[watch.name] = old or _reference(watch, spans, baselines)
        slopes = {
            key: (kept.slopes.get(key) if kept else None) or Slope(*spans)
            for key in watched.slopes
        }
        lasts = {
            key: (before.lasts.get(key) if before else None) or Last() for key in watched.lasts
        }
        excursions = _excursions(watched, before)
        earlier = {
            key: (kept.earlier.get(key) if kept else None)
            or Earlier(*earlier_span(watched.window))
            for key in watched.earlier
        }
        self._pushes = [
            *((key[0], each.add) for key, each in excursions.items()),
            *((watch.metric, baselines[watch.name].add) for watch in watched.baselines),
            *((key, each.add) for key, each in earlier.items()),
            *((key, slope.add) for key, slope in slopes.items()),
        ]
        self._by_metric = _by_metric(watched, baselines)
        self._own = (*baselines.values(), *excursions.values(), *earlier.values())
        self._own_lasts = list(lasts.items())
        self._phase: float = before._phase if before is not None else 0.0
        self.baselines: Mapping[str, Reference] = baselines
        self.excursions: Mapping[tuple[str, bool], Excursions] = excursions
        self.earlier: Mapping[str, Earlier] = earlier
        self.slopes: Mapping[str, Slope] = slopes
        self.lasts: Mapping[str, Last] = lasts
        self.peers: Mapping[str, float] = {}
        if of_rank is not None:
            self.baselines = {**of_rank.baselines, **baselines}
            self.excursions = {**of_rank.excursions, **excursions}
            self.earlier = {**of_rank.earlier, **earlier}
            self.slopes = {**of_rank.slopes, **slopes}
            self.lasts = {**of_rank.lasts, **lasts}

    def enter_phase(self, phase: float) -> bool:
        """A phase of the training that its loop has named: what is usual begins anew.

        ``phase`` counts them, 0.0 is the first. What excursions have reached stays known.
        True when it is another one than before.
        """
        if phase == self._phase:
            return False
        self._phase = phase
        for past in self._own:
            past.clear()
        return True

    def absorb(self, values: Mapping[str, float]) -> None:
        """Take in the values of a frame; what is absent leaves its baselines as they were."""
        get = values.get
        for key, push in self._pushes:
            value = get(key)
            if value is not None:
                push(value)
        for key, last in self._own_lasts:
            value = get(key)
            if value is not None:
                last.add(value)
            else:
                last.missed += 1

    @property
    def own_excursions(self) -> tuple[tuple[str, bool], ...]:
        """Keys of the own :attr:`excursions`."""
        return tuple(
            dict.fromkeys((watch.metric, watch.below) for watch in self._watched.records)
        )

    @property
    def put_off(self) -> tuple[str, ...]:
        """The metrics that :meth:`absorb_together` takes in."""
        lasts = (key for key, _ in self._own_lasts)
        watched = self._watched
        return tuple(
            dict.fromkeys((*self._by_metric, *watched.slopes, *watched.earlier, *lasts))
        )

    def absorb_together(self, columns: Mapping[str, Sequence[float]], steps: int) -> None:
        """As :meth:`absorb` of so many frames, one after the other, but for excursions.

        ``columns`` has a value of each frame, of every metric that all of them have; none has
        another.
        """
        for metric, references in self._by_metric.items():
            if metric in columns:
                references.take_in(columns[metric])
        for key in self._watched.slopes:
            if key in columns:
                self.slopes[key].add_row(columns[key])
        for key in self._watched.earlier:
            if key in columns:
                for value in columns[key]:
                    self.earlier[key].add(value)
        for key, last in self._own_lasts:
            if key in columns:
                last.add_row(columns[key])
            else:
                last.missed += steps


class WarmUp:
    """Whether a rank has a past that the rules which act can compare a step with."""

    __slots__ = ("phase", "steps", "under_way")

    def __init__(self) -> None:
        self.phase = 0.0
        self.steps = 0
        """Steps that the past holds, of this phase of the training."""
        self.under_way = False
        """Whether the newest step had too few of them behind it."""

    def begin_step(self, past: History, phase: float, needed: int) -> None:
        """A step of that phase, which needs so many behind it; ``past`` enters the phase."""
        self.phase = phase
        if past.enter_phase(phase):
            self.steps = 0
        self.under_way = self.steps < needed


def _by_metric(watched: Watched, baselines: Mapping[str, Reference]) -> dict[str, References]:
    mine: dict[str, list[Reference]] = {}
    for watch in watched.baselines:
        mine.setdefault(watch.metric, []).append(baselines[watch.name])
    return {metric: References(*each) for metric, each in mine.items()}


def _excursions(watched: Watched, before: History | None) -> dict[tuple[str, bool], Excursions]:
    """Of each metric and side, with the records that are watched; those of ``before`` go on
    where they are the same."""
    holds: dict[tuple[str, bool], dict[tuple[int, int], None]] = {}
    for metric, below, hold in watched.records:
        holds.setdefault((metric, below), {})[hold] = None
    span = watched.record
    made = {}
    for key, wanted in holds.items():
        old = before.excursions.get(key) if before is not None else None
        same = before is not None and before._watched.record == span
        if old is not None and same and old.records.keys() == wanted.keys():
            made[key] = old
        else:
            risk = 1.0 / span.false_alarm_steps
            made[key] = Excursions(wanted, span.window, span.warmup, risk, below=key[1])
    return made


def _reference(
    watch: BaselineKey, spans: tuple[int, int], made: Mapping[str, Reference]
) -> Reference:
    if watch.kind is BaselineKind.ROLLING:
        return RollingMedian(*spans)
    if watch.kind is BaselineKind.FROZEN:
        return FrozenMedian(*spans)
    rolling = made[BaselineKey(watch.metric, BaselineKind.ROLLING).name]
    assert isinstance(rolling, RollingMedian)
    return Extreme(rolling, min if watch.kind is BaselineKind.LOWEST else max)
