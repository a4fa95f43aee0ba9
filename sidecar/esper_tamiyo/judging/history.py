"""What a rank, or one of its seeds, looked like before.

Pure bookkeeping, filled after each frame was judged, so that no value is ever held
against a baseline it is part of itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from esper_tamiyo.judging.slope import Slope
from esper_tamiyo.language.operators import BaselineKind


class RollingMedian:
    """Median of the last ``window`` observations, None until ``warmup`` of them are in."""

    __slots__ = ("_arrived", "_ordered", "_warmup", "_window", "value")

    def __init__(self, window: int, warmup: int) -> None:
        self._window = window
        self._warmup = warmup
        self._arrived: deque[float] = deque()
        self._ordered: list[float] = []
        self.value: float | None = None

    def push(self, value: float) -> None:
        """Take in a finite observation; the oldest leaves when the window is full."""
        ordered = self._ordered
        if len(ordered) == self._window:
            del ordered[bisect_left(ordered, self._arrived.popleft())]
        self._arrived.append(value)
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


class FrozenMedian:
    """Median of the first ``window`` observations after ``warmup``, then kept; None until
    all of them are in."""

    __slots__ = ("_missing", "_rolling", "_skip", "value")

    def __init__(self, window: int, warmup: int) -> None:
        self._skip = warmup
        self._missing = window
        self._rolling = RollingMedian(window, window)
        self.value: float | None = None

    def push(self, value: float) -> None:
        """Take in a finite observation, if it is still one of the first."""
        if self._skip:
            self._skip -= 1
        elif self._missing:
            self._missing -= 1
            self._rolling.push(value)
            self.value = self._rolling.value


class Extreme:
    """The lowest, or highest, that a rolling median has ever been; None during warm-up."""

    __slots__ = ("_better", "_rolling", "value")

    def __init__(self, rolling: RollingMedian, better: Callable[[float, float], float]) -> None:
        self._rolling = rolling
        self._better = better
        self.value: float | None = None

    def push(self, value: float) -> None:
        """Look at the rolling median after it took in ``value``."""
        median = self._rolling.value
        if median is not None:
            self.value = median if self.value is None else self._better(self.value, median)


class Last:
    """The last observation, how often in a row it came, how many came in all, and how
    many frames have been without one since."""

    __slots__ = ("missed", "repeats", "total", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.repeats = 0
        self.total = 0
        self.missed = 0

    def push(self, value: float) -> None:
        """Take in an observation."""
        self.repeats = self.repeats + 1 if value == self.value else 1
        self.total += 1
        self.missed = 0
        self.value = value


Reference = RollingMedian | FrozenMedian | Extreme


class Watch(NamedTuple):
    """One baseline: whose, and which past of it."""

    metric: str
    kind: BaselineKind

    @property
    def name(self) -> str:
        """What findings call it, and the key it is kept by."""
        kind = "baseline" if self.kind is BaselineKind.ROLLING else self.kind.value
        return f"{kind}({self.metric})"


class Watched(msgspec.Struct, frozen=True):
    """The metrics of one scope whose past some rule needs.

    Before an extreme among ``baselines`` comes the rolling median that it is one of.
    """

    baselines: tuple[Watch, ...] = ()
    lasts: tuple[str, ...] = ()
    slopes: tuple[str, ...] = ()
    window: int = 64
    warmup: int = 20


class History:
    """The past of one rank or seed, by the key of the metric.

    The history of a seed also shows its rank's, so that one rule can speak of both.
    ``peers`` are the medians of the other ranks of the run, by the key of the metric, at the
    step that is judged.
    """

    __slots__ = ("_own_lasts", "_pushes", "_watched", "baselines", "lasts", "peers", "slopes")

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
        self._pushes = [
            *((watch.metric, baselines[watch.name].push) for watch in watched.baselines),
            *((key, slope.push) for key, slope in slopes.items()),
        ]
        self._own_lasts = list(lasts.items())
        self.baselines: Mapping[str, Reference] = baselines
        self.slopes: Mapping[str, Slope] = slopes
        self.lasts: Mapping[str, Last] = lasts
        self.peers: Mapping[str, float] = {}
        if of_rank is not None:
            self.baselines = {**of_rank.baselines, **baselines}
            self.slopes = {**of_rank.slopes, **slopes}
            self.lasts = {**of_rank.lasts, **lasts}

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
                last.push(value)
            else:
                last.missed += 1


def _reference(
    watch: Watch, spans: tuple[int, int], made: Mapping[str, Reference]
) -> Reference:
    if watch.kind is BaselineKind.ROLLING:
        return RollingMedian(*spans)
    if watch.kind is BaselineKind.FROZEN:
        return FrozenMedian(*spans)
    rolling = made[Watch(watch.metric, BaselineKind.ROLLING).name]
    assert isinstance(rolling, RollingMedian)
    return Extreme(rolling, min if watch.kind is BaselineKind.LOWEST else max)
