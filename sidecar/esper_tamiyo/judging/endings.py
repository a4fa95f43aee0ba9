"""Endings: ranks that have reported the end of their run, and the consequences.

A rank that has ended is not missed, its rules and its conservative mode count no more, and it
is the first to be forgotten. Its past stays as it is: a step behind the one that it called its
last takes the end back, and it goes on from there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from esper_otel.leyline.decisions import PROTOCOL_ERROR, Decision, unanswered
from esper_otel.leyline.endings import HowEnded
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.liveness import Key

if TYPE_CHECKING:
    from esper_tamiyo.judging.observer import Observed
    from esper_tamiyo.judging.run_state import RunState
    from esper_tamiyo.judging.silences import Silences


MAX_EARLY = 256
"""Ends that are kept for processes of which nothing else was heard."""


class Endings:
    """The ranks that have ended, in the order of their ends."""

    def __init__(self) -> None:
        self._ended: OrderedDict[Key, None] = OrderedDict()
        self._early: OrderedDict[tuple[Key, str], StepFrame] = OrderedDict()
        """Ends of processes of which no step was heard yet: a Collector that sends several
        requests at once lets the second of a short run come first."""

    def hear(
        self,
        frame: StepFrame,
        ranks: Mapping[Key, RunState],
        silences: Silences,
        observed: Observed,
    ) -> Decision:
        """``frame`` says that one of ``ranks`` has ended; there is nothing to decide."""
        if self._is_news(frame, ranks):
            _end_silences(frame.run, ranks, silences)
            observed.tell_end(frame)
        return unanswered(frame.run, frame.step, PROTOCOL_ERROR)

    def begin(
        self,
        frame: StepFrame,
        ranks: Mapping[Key, RunState],
        silences: Silences,
        observed: Observed,
    ) -> None:
        """The rank of ``frame``, its first step, is known now: perhaps its end came already."""
        early = self._early.pop(((frame.run, frame.rank), frame.instance), None)
        if early is not None:
            self.hear(early, ranks, silences, observed)

    def _is_news(self, frame: StepFrame, ranks: Mapping[Key, RunState]) -> bool:
        """Take an end in, unless it is none.

        That is one of a rank or process that is not known yet, of one that has gone on since,
        and one that comes again: by the socket and in the stream.
        """
        key = frame.run, frame.rank
        state = ranks.get(key)
        if state is None or state.instance != frame.instance:
            self._early[key, frame.instance] = frame
            if len(self._early) > MAX_EARLY:
                self._early.popitem(last=False)
            return False
        if frame.step < state.newest:
            return False
        before = state.pace.ending
        if before is not None and before.step == frame.step:
            return False
        state.pace.note_end(frame, state.newest)
        self.remember(key)
        return True

    def remember(self, key: Key) -> None:
        """A rank has ended, later than all those before."""
        self._ended[key] = None
        self._ended.move_to_end(key)

    def oldest(self, ranks: Mapping[Key, RunState]) -> Key | None:
        """The one of ``ranks`` whose end is longest ago; None where none has ended."""
        while self._ended:
            key = next(iter(self._ended))
            state = ranks.get(key)
            if state is not None and state.pace.ending is not None:
                return key
            del self._ended[key]  # it has gone on, or is not known any more
        return None


def _end_silences(run: str, ranks: Mapping[Key, RunState], silences: Silences) -> None:
    """The silences of ``run`` end, if all its ranks have ended and none of them failed.

    The next attempt at a run that failed is the same run.
    """
    if not silences.used:
        return
    ends = [state.pace.ending for (name, _), state in ranks.items() if name == run]
    hows = [None if end is None or end.ended is None else end.ended.how for end in ends]
    if None not in hows and HowEnded.EXCEPTION not in hows:
        silences.end_run(run)
