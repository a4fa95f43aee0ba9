"""Peers: ranks compared with the others of their run, with a delay until all have reported.

A rank that asks is heard at once, one that only streams a batch later; so whose value is here
depends on who reads, and when. What a comparison may see is therefore said in the time of the
frames, never by what is there. A step is compared at the rank's own first frame
:data:`HINDSIGHT_NS` after it, with those ranks that had ended it :data:`ARRIVAL_NS` before
that frame. Who is later than that is left out, whether it is here or not. What is found
counts from the next frame on, and so nothing that an answer needs hangs on what other ranks
have sent. As it is the same step for all, an evaluation or a checkpoint, which all ranks take
part in, makes a straggler of none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from typing import NamedTuple

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.history import History, Watched
from esper_tamiyo.judging.rule_status import RuleTarget
from esper_tamiyo.judging.rules import Values

ARRIVAL_NS = 1_000_000_000
"""What any rank tells is here a second after the step: ten times what a batch waits."""

HINDSIGHT_NS = ARRIVAL_NS + 250_000_000
"""When a step is compared. The ranks may end it a quarter of a second apart, or have clocks
that are."""

AT_ONCE = 8
"""Newest steps compared with one frame; behind a pause, older ones are passed over."""

ALONE: Mapping[str, float] = {}

KEPT_NS = 5_000_000_000
"""Steps are kept for so long behind the newest that was told, and longer while there are
no more than :data:`KEPT_STEPS`: a run of slow steps has few of them in any time."""

KEPT_STEPS = 16

MAX_STEPS = 4096
"""Steps kept at most, whatever their times say."""

MAX_POSTS = 65_536
"""What all ranks of a run told of the steps that are kept, at most: many ranks, fewer steps."""


class _Told:
    """One step: what each rank told of it, and when it had ended it."""

    __slots__ = ("latest_ns", "ordered", "posts")

    def __init__(self, rank: int, time_ns: int, values: Mapping[str, float]) -> None:
        """By what the first of them told."""
        self.latest_ns = time_ns if time_ns > 0 else 0
        self.posts: dict[int, tuple[int, Mapping[str, float]]] = {rank: (time_ns, values)}
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


Post = tuple[int, int, Mapping[str, float]]
"""A step, when a rank had ended it, and what it told of it."""


class PeerBoard:
    """The newest steps of all ranks of one run. Times are those of the frames."""

    __slots__ = ("_alone", "_first_ns", "_steps", "_who", "posts", "ranks")

    def __init__(self) -> None:
        self.ranks = 0
        """Ranks of the run that are known."""
        self.posts = 0
        """What is kept of all ranks and steps."""
        # A plain dict would look over every step that it has forgotten to find the oldest.
        self._steps: OrderedDict[int, _Told] = OrderedDict()
        self._alone: deque[Post] = deque()
        """What the only rank has told, in place of :attr:`_steps`: nobody compares it."""
        self._who = 0
        """Which rank that is."""
        self._first_ns: dict[int, int] = {}

    def post(self, rank: int, step: int, time_ns: int, values: Mapping[str, float]) -> None:
        """Take in what a rank told."""
        if rank not in self._first_ns:
            self._first_ns[rank] = time_ns
        steps, alone = self._steps, self._alone
        if not steps and len(self._first_ns) == 1 and (not alone or step > alone[-1][0]):
            alone.append((step, time_ns, values))
            self._who = rank
            self.posts += 1
            if len(alone) > KEPT_STEPS:
                self._let_go_alone(time_ns - KEPT_NS)
            return
        if alone:
            self._lay_out()
        told = steps.get(step)
        if told is None:
            steps[step] = _Told(rank, time_ns, values)
            self.posts += 1
            if len(steps) > KEPT_STEPS:
                self._let_go(time_ns - KEPT_NS)
            return
        if rank not in told.posts:
            self.posts += 1
        told.posts[rank] = time_ns, values
        if time_ns > told.latest_ns:
            told.latest_ns = time_ns
        if told.ordered:
            told.ordered.clear()

    def remove_rank(self, rank: int) -> None:
        """A rank began anew: it may tell its steps a second time."""
        self._lay_out()
        for told in self._steps.values():
            self.posts -= told.posts.pop(rank, None) is not None
            told.ordered.clear()

    def forget_rank(self, rank: int) -> None:
        """A rank is not known any more."""
        self.ranks -= 1
        self._first_ns.pop(rank, None)
        if self.ranks:
            self.remove_rank(rank)

    def is_first(self, rank: int) -> bool:
        """Whether it is the one of the ranks that was heard of first."""
        return next(iter(self._first_ns), rank) == rank

    @property
    def most_steps(self) -> int:
        """Steps that are kept at most."""
        ranks = len(self._first_ns)
        if ranks <= MAX_POSTS // MAX_STEPS:
            return MAX_STEPS
        return max(KEPT_STEPS, MAX_POSTS // ranks)

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
        return self.medians(rank, step, (key,), by_ns).get(key)

    def medians(
        self, rank: int, step: int, keys: Iterable[str], by_ns: int
    ) -> dict[str, float]:
        """That of each of ``keys`` that has one."""
        found: dict[str, float] = {}
        told = self._steps.get(step)
        post = None if told is None else told.posts.get(rank)
        if told is None or post is None:
            return found
        values = post[1]
        for key in keys:
            own = values.get(key)
            if own is None:
                continue
            ordered = told.until(by_ns, key)
            count = len(ordered) - 1
            if count < 1:
                continue
            mine = bisect_left(ordered, own)
            low, high = (count - 1) >> 1, count >> 1
            below, above = ordered[low + (low >= mine)], ordered[high + (high >= mine)]
            found[key] = below + (above - below) / 2
        return found

    def told_by(self, rank: int) -> Iterator[Post]:
        """What a rank has told of the steps that are kept, the newest first."""
        if rank == self._who:
            yield from reversed(self._alone)
        for step, told in reversed(self._steps.items()):
            post = told.posts.get(rank)
            if post is not None:
                yield step, *post

    def _lay_out(self) -> None:
        """Have the steps of a rank that was alone lie ready for others."""
        for step, time_ns, values in self._alone:
            self._steps[step] = _Told(self._who, time_ns, values)
        self._alone.clear()

    def _let_go_alone(self, before_ns: int) -> None:
        """As :meth:`_let_go`, of a rank that is alone."""
        alone, place = self._alone, 0
        for _ in range(2):
            count = len(alone)
            if count > MAX_STEPS or (alone[place][1] < before_ns and count > KEPT_STEPS):
                del alone[place]
                self.posts -= 1
            else:
                place += 1

    def _let_go(self, before_ns: int) -> None:
        """Forget the oldest step or two. More come only one by one, so that will do."""
        steps, most = self._steps, self.most_steps
        for step in (*islice(steps, 2),):
            told = steps[step]
            if len(steps) > most or (told.latest_ns < before_ns and len(steps) > KEPT_STEPS):
                self.posts -= len(told.posts)
                del steps[step]


class Waiting(NamedTuple):
    """A step that is not compared yet."""

    step: int
    time_ns: int
    values: Values


class PeerComparison:
    """The steps of one rank that wait to be compared.

    ``target`` is the rank as it was at the step looked at, with the past of that step. It
    begins with the first other rank: until then there is no other past than the rank's own.
    """

    __slots__ = ("_board", "_company", "_rank", "_waiting", "_watched", "target")

    def __init__(self, board: PeerBoard, rank: int, watched: Watched) -> None:
        self._board = board
        self._rank = rank
        self._company = False
        self._waiting: deque[Waiting] = deque(maxlen=MAX_STEPS)
        self._watched = watched
        self.target = RuleTarget(None, 0, History(watched))

    def in_company(self, time_ns: int, past: History) -> bool:
        """Whether there are other ranks, as far as a frame of that time can know.

        A rank without any is judged at once: nothing will come that it could wait for.
        ``past`` is the rank's own, before that frame.
        """
        if not self._company and self._board.has_others(self._rank, time_ns - ARRIVAL_NS):
            self._company = True
            self.target.history = deepcopy(History(self._watched, before=past))
        return self._company

    @property
    def has_company(self) -> bool:
        """Whether :meth:`in_company` has ever found other ranks."""
        return self._company

    def is_joined(self, time_ns: int) -> bool:
        """Whether a frame of that time would be the first to know of other ranks."""
        if self._company or len(self._board._first_ns) < 2:
            return False
        return self._board.has_others(self._rank, time_ns - ARRIVAL_NS)

    def record(self, frame: StepFrame, keys: Iterable[str]) -> None:
        """Show the others what this step was like and, in company, keep it to compare."""
        values = frame.values
        picked = {key: values[key] for key in keys if key in values}
        self._board.post(self._rank, frame.step, frame.time_unix_nano, picked)
        if self._company:
            waiting = self._waiting
            waiting.append(Waiting(frame.step, frame.time_unix_nano, picked))
            if len(waiting) > KEPT_STEPS and len(waiting) > self._board.most_steps:
                self.turn_to(waiting.popleft().values)

    def due(self, time_ns: int) -> list[Waiting]:
        """The steps to compare now that the rank has come to ``time_ns``."""
        waiting, by_ns = self._waiting, time_ns - HINDSIGHT_NS
        if not waiting or waiting[0].time_ns > by_ns:
            return []
        found = [waiting.popleft()]
        while waiting and waiting[0].time_ns <= by_ns:
            found.append(waiting.popleft())
        if len(found) == 1:
            return found
        for passed in found[:-AT_ONCE]:
            self.turn_to(passed.values)
        return found[-AT_ONCE:]

    def compare(self, waiting: Waiting, keys: Sequence[str], time_ns: int) -> None:
        """Turn to a step, with the medians of the other ranks of ``keys``."""
        by_ns = time_ns - ARRIVAL_NS
        self.turn_to(waiting.values, self._board.medians(self._rank, waiting.step, keys, by_ns))

    def turn_to(self, values: Values, medians: Mapping[str, float] = ALONE) -> None:
        """Look at one more step; the one before becomes part of the past."""
        target = self.target
        if target.values:
            target.history.absorb(target.values)
        target.values = values
        target.history.peers = medians

    def switch_table(self, watched: Watched) -> None:
        """Go on under another table."""
        self._watched = watched
        self.target.history = History(watched, before=self.target.history)
