"""The ranks of one run side by side, step by step.

A rank is compared at the step *before* the one that is judged. In a synchronous run no
rank can end a step before all others have ended the one before it, so by then their
frames are in, and it does not matter whose frame comes first: a replay in the order of
the frames' times sees what the live sidecar saw. It is the same step for all, so that an
evaluation or a checkpoint, which all ranks take part in, makes a straggler of none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

PEER_STEPS = 16
"""Newest steps kept of a run."""


class PeerBoard:
    """The newest steps of all ranks of one run."""

    __slots__ = ("_ordered", "_steps")

    def __init__(self) -> None:
        self._steps: dict[int, dict[int, Mapping[str, float]]] = {}
        self._ordered: dict[tuple[int, str], tuple[int, list[float]]] = {}
        """By step and metric: how many ranks had ended the step, and their values."""

    def post(self, rank: int, step: int, values: Mapping[str, float]) -> None:
        """Take in a judged frame."""
        of_step = self._steps.get(step)
        if of_step is None:
            of_step = self._steps[step] = {}
            if len(self._steps) > PEER_STEPS:
                del self._steps[next(iter(self._steps))]
                self._ordered = {
                    at: had for at, had in self._ordered.items() if at[0] in self._steps
                }
        of_step.setdefault(rank, values)

    def forget(self, rank: int) -> None:
        """A rank began anew: it may tell its steps a second time."""
        self._ordered.clear()
        for of_step in self._steps.values():
            of_step.pop(rank, None)

    def own(self, rank: int, step: int, key: str) -> float | None:
        """The value of ``rank`` at ``step``."""
        values = self._steps.get(step, {}).get(rank)
        return None if values is None else values.get(key)

    def others(self, rank: int, step: int, key: str) -> float | None:
        """The median of the other ranks' values at ``step``.

        None where there are no others, or ``rank`` itself has no value.
        """
        of_step = self._steps.get(step)
        if of_step is None or len(of_step) < 2:
            return None
        had, ordered = self._ordered.get((step, key), (0, []))
        if had != len(of_step):  # once a step: all ranks ask after all have ended it
            ordered = sorted(values[key] for values in of_step.values() if key in values)
            self._ordered[step, key] = len(of_step), ordered
        own = self.own(rank, step, key)
        count = len(ordered) - 1
        if own is None or count < 1:
            return None
        mine = bisect_left(ordered, own)
        low, high = (count - 1) >> 1, count >> 1
        below, above = ordered[low + (low >= mine)], ordered[high + (high >= mine)]
        return below + (above - below) / 2


class PeerView:
    """The board as one rank sees it, from the step that is judged."""

    __slots__ = ("_board", "_rank", "step")

    def __init__(self, board: PeerBoard, rank: int) -> None:
        self._board = board
        self._rank = rank
        self.step = -1
        """The step compared, the one before the step judged."""

    def own(self, key: str) -> float | None:
        """This rank's value."""
        return self._board.own(self._rank, self.step, key)

    def others(self, key: str) -> float | None:
        """The median of the other ranks' values."""
        return self._board.others(self._rank, self.step, key)

    def post(self, step: int, values: Mapping[str, float]) -> None:
        """Show the others what this rank's step was like."""
        self._board.post(self._rank, step, values)
