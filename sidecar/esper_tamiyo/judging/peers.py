"""What the ranks of one run told of their newest steps, side by side.

Who asks is heard at once, who only streams a batch later; so whose value is here depends on
who reads, and when. What a comparison may see is therefore said in the time of the frames,
never by what is there (:mod:`~esper_tamiyo.judging.hindsight`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice

KEPT_NS = 5_000_000_000
"""Steps are kept for so long behind the newest that was told, and longer while there are
no more than :data:`KEPT_STEPS`: a run of slow steps has few of them in any time."""

KEPT_STEPS = 16

MAX_STEPS = 4096
"""Steps kept at most, whatever their times say."""


class _Told:
    """One step: what each rank told of it, and when it had ended it."""

    __slots__ = ("latest_ns", "ordered", "posts")

    def __init__(self) -> None:
        self.latest_ns = 0
        self.posts: dict[int, tuple[int, Mapping[str, float]]] = {}
        self.ordered: dict[str, list[float]] = {}
        """The values of all ranks by metric, in order: sorted once, all ranks ask."""

    def until(self, by_ns: int, key: str) -> list[float]:
        """The values of the ranks that had ended the step ``by_ns``, in order."""
        if self.latest_ns > by_ns:
            return sorted(
                values[key]
                for time_ns, values in self.posts.values()
                if time_ns <= by_ns and key in values
            )
        ordered = self.ordered.get(key)
        if ordered is None:
            ordered = self.ordered[key] = sorted(
                values[key] for _, values in self.posts.values() if key in values
            )
        return ordered


class PeerBoard:
    """The newest steps of all ranks of one run. Times are those of the frames."""

    __slots__ = ("_first_ns", "_steps")

    def __init__(self) -> None:
        # A plain dict would look over every step that it has forgotten to find the oldest.
        self._steps: OrderedDict[int, _Told] = OrderedDict()
        self._first_ns: dict[int, int] = {}

    def post(self, rank: int, step: int, time_ns: int, values: Mapping[str, float]) -> None:
        """Take in what a rank told."""
        self._first_ns.setdefault(rank, time_ns)
        told = self._steps.get(step)
        if told is None:
            told = self._steps[step] = _Told()
            if len(self._steps) > KEPT_STEPS:
                self._let_go(time_ns - KEPT_NS)
        told.posts[rank] = time_ns, values
        told.latest_ns = max(told.latest_ns, time_ns)
        told.ordered.clear()

    def forget(self, rank: int) -> None:
        """A rank began anew: it may tell its steps a second time."""
        for told in self._steps.values():
            told.posts.pop(rank, None)
            told.ordered.clear()

    def has_others(self, rank: int, by_ns: int) -> bool:
        """Whether any rank but ``rank`` had ended a step ``by_ns``."""
        if len(self._first_ns) == 1 and rank in self._first_ns:
            return False  # as of a run of one rank it is at every step
        return any(
            first_ns <= by_ns for other, first_ns in self._first_ns.items() if other != rank
        )

    def others(self, rank: int, step: int, key: str, by_ns: int) -> float | None:
        """The median of the other ranks' values at ``step``, of those that ended it ``by_ns``.

        None where there are none, or where ``rank``, which is one of them, has no value.
        """
        told = self._steps.get(step)
        post = None if told is None else told.posts.get(rank)
        own = None if post is None else post[1].get(key)
        if told is None or own is None:
            return None
        ordered = told.until(by_ns, key)
        count = len(ordered) - 1
        if count < 1:
            return None
        mine = bisect_left(ordered, own)
        low, high = (count - 1) >> 1, count >> 1
        below, above = ordered[low + (low >= mine)], ordered[high + (high >= mine)]
        return below + (above - below) / 2

    def _let_go(self, before_ns: int) -> None:
        """Forget the oldest step or two. More come only one by one, so that will do."""
        steps = self._steps
        for step in list(islice(steps, 2)):
            is_old = steps[step].latest_ns < before_ns
            if len(steps) > MAX_STEPS or (is_old and len(steps) > KEPT_STEPS):
                del steps[step]
