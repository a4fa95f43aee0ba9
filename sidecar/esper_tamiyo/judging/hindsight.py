"""Ranks are compared in hindsight: each step when all have told it.

A rank that asks is heard at once, one that only streams in batches. So that the order in
which frames come changes nothing, a step is compared by the times of frames alone: at the
rank's own first frame :data:`HINDSIGHT_NS` after it, with those ranks that had ended it
:data:`ARRIVAL_NS` before that frame. Who is later than that is left out, whether it is here
or not. What is found counts from the next frame on, and so nothing that an answer needs
hangs on what other ranks have sent. As it is the same step for all, an evaluation or a
checkpoint, which all ranks take part in, makes a straggler of none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.history import History, Watched
from esper_tamiyo.judging.peers import MAX_STEPS, PeerBoard
from esper_tamiyo.judging.rules import Values
from esper_tamiyo.judging.subject import Subject

ARRIVAL_NS = 1_000_000_000
"""What any rank tells is here a second after the step: ten times what a batch waits."""

HINDSIGHT_NS = ARRIVAL_NS + 250_000_000
"""When a step is compared. The ranks may end it a quarter of a second apart, or have clocks
that are."""

AT_ONCE = 8
"""Newest steps compared with one frame; behind a pause, older ones are passed over."""

ALONE: Mapping[str, float] = {}


class Waiting(NamedTuple):
    """A step that is not compared yet."""

    step: int
    time_ns: int
    values: Values


class Hindsight:
    """The steps of one rank that wait to be compared.

    ``subject`` is the rank as it was at the step looked at, with the past of that step. It
    begins with the first other rank: until then there is no other past than the rank's own.
    """

    __slots__ = ("_board", "_company", "_rank", "_waiting", "_watched", "subject")

    def __init__(self, board: PeerBoard, rank: int, watched: Watched) -> None:
        self._board = board
        self._rank = rank
        self._company = False
        self._waiting: deque[Waiting] = deque(maxlen=MAX_STEPS)
        self._watched = watched
        self.subject = Subject(None, 0, History(watched))

    def in_company(self, time_ns: int, past: History) -> bool:
        """Whether there are other ranks, as far as a frame of that time can know.

        A rank without any is judged at once: nothing will come that it could wait for.
        ``past`` is the rank's own, before that frame.
        """
        if not self._company and self._board.has_others(self._rank, time_ns - ARRIVAL_NS):
            self._company = True
            self.subject.history = deepcopy(History(self._watched, before=past))
        return self._company

    def tell(self, frame: StepFrame, keys: Iterable[str]) -> None:
        """Show the others what this step was like and, in company, keep it to compare."""
        values = frame.values
        picked = {key: values[key] for key in keys if key in values}
        self._board.post(self._rank, frame.step, frame.time_unix_nano, picked)
        if self._company:
            self._waiting.append(Waiting(frame.step, frame.time_unix_nano, picked))

    def due(self, time_ns: int) -> list[Waiting]:
        """The steps to compare now that the rank has come to ``time_ns``."""
        waiting = self._waiting
        if not waiting or waiting[0].time_ns > time_ns - HINDSIGHT_NS:
            return []
        found = []
        while waiting and waiting[0].time_ns <= time_ns - HINDSIGHT_NS:
            found.append(waiting.popleft())
        for passed in found[:-AT_ONCE]:
            self.turn_to(passed.values)
        return found[-AT_ONCE:]

    def compare(self, waiting: Waiting, keys: Sequence[str], time_ns: int) -> None:
        """Turn to a step, with the medians of the other ranks of ``keys``."""
        by_ns = time_ns - ARRIVAL_NS
        medians = {}
        for key in keys:
            others = self._board.others(self._rank, waiting.step, key, by_ns)
            if others is not None:
                medians[key] = others
        self.turn_to(waiting.values, medians)

    def turn_to(self, values: Values, medians: Mapping[str, float] = ALONE) -> None:
        """Look at one more step; the one before becomes part of the past."""
        subject = self.subject
        if subject.values:
            subject.history.absorb(subject.values)
        subject.values = values
        subject.history.peers = medians

    def adopt(self, watched: Watched) -> None:
        """Go on under another table."""
        self._watched = watched
        self.subject.history = History(watched, before=self.subject.history)
