"""History of a rank, or of one of its seeds: baselines, last values, slopes.

Pure bookkeeping, filled after each frame was judged, so that no value is ever held
against a baseline it is part of itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from esper_tamiyo.judging.excursions import Excursions
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

END = 0.2
"""Share of what a metric was before that lies beyond either end of it."""

BEYOND = 0.02
"""Share of an end by which a value has to be beyond it, to count."""

ROUNDING = 1e-9
"""Share of the largest value that differences are taken to have at least."""

MOST_INERTIA = 4.0
"""After some forty observations a new level is part of what was before: by then it has to be
noticed."""


def earlier_span(window: int) -> tuple[int, int, int]:
    """Observations that :class:`Earlier` spans for a table whose baselines span ``window``, the
    fewest newest ones that it leaves out, and after how many it is taken anew."""
    block = max(2, window // 8)
    return 12 * block, 7 * block // 4, block


class Earlier:
    """What a metric was before its newest observations, and how many of these in a row are
    beyond either end of that.

    ``upper`` and ``lower`` are the ends of ``span`` values, None until all of them are in.
    ``above`` and ``below`` count values in a row.

    Of values that are independent of each other n in a row are beyond an end with the
    probability that one is, to the power of n: a test of runs, which knows no distribution and
    no size (Wald and Wolfowitz, On a test whether two samples are from the same population,
    Annals of Mathematical Statistics 11, 1940). Values that follow each other smoothly stay
    beyond it together: :attr:`inertia` times as long.
    """

    __slots__ = (
        *("_arrived", "_block", "_inertia", "_most", "_newest", "_ordered", "_span"),
        *("above", "below", "lower", "upper"),
    )

    def __init__(self, span: int, lag: int, block: int) -> None:
        self._span = span
        self._block = block
        self._most = lag + block
        self._arrived: deque[float] = deque(maxlen=span)
        self._newest: deque[float] = deque()
        self._ordered: list[float] = []
        """Those that have arrived, once all are in."""
        self.upper: float | None = None
        self.lower: float | None = None
        self.above = self.below = 0
        self._inertia = 0.0
        """0.0 until somebody asks."""

    def add(self, value: float) -> None:
        """Take in a finite observation."""
        upper, lower = self.upper, self.lower
        if upper is not None and lower is not None:
            if lower <= value <= upper:
                if self.above or self.below:
                    self.above = self.below = 0
            elif value > upper:
                self.above += 1
                self.below = 0
            else:
                self.below += 1
                self.above = 0
        newest = self._newest
        newest.append(value)
        if len(newest) == self._most:
            self._fold()

    def clear(self) -> None:
        """Begin anew."""
        self._arrived.clear()
        self._newest.clear()
        self._ordered.clear()
        self.upper = self.lower = None
        self.above = self.below = 0

    @property
    def inertia(self) -> float:
        """How many times as long as independent values these stay on one side: by how much
        they move less from one to the next than over a block, or 1.0.

        That is a ratio of two points of a variogram, as von Neumann's of successive differences
        to the variance (Distribution of the ratio of the mean square successive difference to
        the variance, Annals of Mathematical Statistics 12, 1941). Median deviations stand for
        squares: an outlier counts for little, and a steady slope for nothing.
        """
        if not self._inertia:
            near, far = _spread(self._arrived, 1), _spread(self._arrived, self._block)
            near = max(near, ROUNDING * max(map(abs, self._arrived)))
            slow = far / near if near else 1.0
            self._inertia = min(max(1.0, slow), MOST_INERTIA)
        return self._inertia

    @property
    def missing(self) -> int:
        """Observations that are to come until both ends are known."""
        if self.upper is not None:
            return 0
        blocks = -(-(self._span - len(self._arrived)) // self._block)
        return self._most - len(self._newest) + (max(blocks, 1) - 1) * self._block

    def _fold(self) -> None:
        """Let the oldest of what is left out be no longer among the newest."""
        arrived, newest, ordered = self._arrived, self._newest, self._ordered
        new = [newest.popleft() for _ in range(self._block)]
        is_ordered = len(ordered) == self._span
        if is_ordered:
            for old in islice(arrived, self._block):
                del ordered[bisect_left(ordered, old)]
            ordered += new
        arrived.extend(new)
        if len(arrived) == self._span:
            self._inertia = 0.0
            if not is_ordered:
                ordered[:] = arrived
            ordered.sort()  # of the values that stay, and so few more
            place = round(END * (self._span - 1))
            upper, lower = ordered[-1 - place], ordered[place]
            self.upper = upper + BEYOND * abs(upper)
            self.lower = lower - BEYOND * abs(lower)


def _spread(values: Sequence[float], lag: int) -> float:
    """The median deviation of the differences of values that are ``lag`` apart."""
    pairs = zip(values, islice(values, lag, None), strict=False)
    steps = [after - before for before, after in pairs]
    middle = sorted(steps)[len(steps) >> 1]
    return sorted(abs(step - middle) for step in steps)[len(steps) >> 1]


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
        return tuple(dict.fromkeys((*self._by_metric, *watched.slopes, *lasts)))

    @property
    def own_earlier(self) -> tuple[str, ...]:
        """Keys of the own :attr:`earlier`."""
        return self._watched.earlier

    def absorb_together(self, columns: Mapping[str, Sequence[float]], steps: int) -> None:
        """As :meth:`absorb` of so many frames, one after the other, but for excursions and what
        was before.

        ``columns`` has a value of each frame, of every metric that all of them have; none has
        another.
        """
        for metric, references in self._by_metric.items():
            if metric in columns:
                references.take_in(columns[metric])
        for key in self._watched.slopes:
            if key in columns:
                self.slopes[key].add_row(columns[key])
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
