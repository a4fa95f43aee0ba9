"""What a rank, or one of its seeds, looked like before: baselines, last values, slopes.

Pure bookkeeping, filled after each frame was judged, so that no value is ever held
against a baseline it is part of itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import NamedTuple

import msgspec

from esper_tamiyo.judging.excursions import Earlier, Excursions, earlier_span
from esper_tamiyo.language.operators import BaselineKind
from esper_tamiyo.language.table import RecordSpan

_MARGIN = 1.0 + 1e-9
"""For rounding: what is this near to the bound is worked out."""


class RollingMedian:
    """Median of the last ``window`` observations, None until ``warmup`` of them are in."""

    __slots__ = ("_arrived", "_ordered", "_warmup", "_window", "value")

    def __init__(self, window: int, warmup: int) -> None:
        self._window = window
        self._warmup = warmup
        self._arrived: deque[float] = deque()
        self._ordered: list[float] = []
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take in a finite observation; the oldest leaves when the window is full."""
        ordered, arrived = self._ordered, self._arrived
        if len(ordered) == self._window:
            oldest = arrived.popleft()
            arrived.append(value)
            if value == oldest:  # what stands still, as a learning rate, has the same median
                return
            del ordered[bisect_left(ordered, oldest)]
        else:
            arrived.append(value)
        insort(ordered, value)
        count = len(ordered)
        if count < self._warmup:
            return
        middle = count >> 1
        if count & 1:
            self.value = ordered[middle]
        else:
            low, high = ordered[middle - 1], ordered[middle]
            self.value = low + (high - low) / 2

    def clear(self) -> None:
        """Begin anew."""
        self._arrived.clear()
        self._ordered.clear()
        self.value = None


class FrozenMedian:
    """Median of the first ``window`` observations after ``warmup``, then kept; None until
    all of them are in."""

    __slots__ = ("_missing", "_rolling", "_skip", "_spans", "value")

    def __init__(self, window: int, warmup: int) -> None:
        self._spans = (window, warmup)
        self._rolling = RollingMedian(window, window)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._missing, self._skip = self._spans
        self._rolling.clear()
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Take in a finite observation, if it is still one of the first."""
        if self._skip:
            self._skip -= 1
        elif self._missing:
            self._missing -= 1
            self._rolling.add(value)
            self.value = self._rolling.value


class Extreme:
    """The lowest, or highest, that a rolling median has ever been; None during warm-up."""

    __slots__ = ("_better", "_rolling", "value")

    def __init__(self, rolling: RollingMedian, better: Callable[[float, float], float]) -> None:
        self._rolling = rolling
        self._better = better
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Look at the rolling median after it took in ``value``."""
        median = self._rolling.value
        if median is not None:
            self.value = median if self.value is None else self._better(self.value, median)

    def clear(self) -> None:
        """Begin anew."""
        self.value = None


class Last:
    """The last observation, how often in a row it came, how many came in all, and how
    many frames have been without one since."""

    __slots__ = ("missed", "repeats", "total", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.repeats = 0
        self.total = 0
        self.missed = 0

    def add(self, value: float) -> None:
        """Take in an observation."""
        self.repeats = self.repeats + 1 if value == self.value else 1
        self.total += 1
        self.missed = 0
        self.value = value


class Slope:
    """Steps until a falling value reaches zero, by least squares over the last ``window``.

    The first ``warmup`` observations are left out: a run takes most of its memory in its
    first steps, and that slope says nothing of the next. The line is fitted to the whole
    window and to its newer half, and the more hopeful of the two counts, so that a single
    fall long over is not taken for a slope.
    """

    __slots__ = ("_skip", "_values", "_window")

    def __init__(self, window: int, warmup: int) -> None:
        self._skip = warmup
        self._window = window
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        """Take in a finite observation."""
        if self._skip:
            self._skip -= 1
        else:
            self._values.append(value)

    def within(self, value: float, number: float) -> bool | None:
        """Whether :meth:`left` of ``value`` is ``number`` or less; None as there.

        A line through numbers that lie in a range of R falls by 1.5 n R / (n² - 1) a step at
        most (one half of the n at the top of it, then the other at its bottom). Where even
        that leaves more, which is nearly always, no line is fitted.
        """
        values = self._values
        count = len(values)
        if count < self._window:
            return None
        if value >= values[0]:
            return False
        steepest = 1.5 * (count + 1) * (max(values) - min(value, min(values)))
        if value * (count * (count + 2)) > _MARGIN * number * steepest:
            return False
        left = self.left(value)
        return None if left is None else left <= number

    @property
    def oldest(self) -> float | None:
        """The value that the newest must be below to be falling; None before it counts."""
        return self._values[0] if len(self._values) == self._window else None

    def left(self, value: float) -> float | None:
        """Observations from ``value``, the newest, until zero; infinite when it does not
        fall, None while there are too few to say."""
        oldest = self.oldest
        if oldest is None:
            return None
        if value >= oldest:
            return inf
        values = [*self._values, value]
        newer = values[len(values) // 2 :]
        return max(_until_zero(values), _until_zero(newer))


def _until_zero(values: Sequence[float]) -> float:
    """Ordinary least squares of ``values`` on 0, 1, 2, …, from the last one on."""
    count = len(values)
    middle = (count - 1) / 2
    mean = sum(values) / count
    rise = sum((place - middle) * (value - mean) for place, value in enumerate(values))
    spread = count * (count * count - 1) / 12  # the sum of squares of (place - middle)
    slope = rise / spread
    return max(values[-1], 0.0) / -slope if slope < 0.0 else inf


Reference = RollingMedian | FrozenMedian | Extreme


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
