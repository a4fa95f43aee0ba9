"""Batch sizes: notices when the batches of a training become larger, or its sequences longer.

Such a change moves loss, gradients and step times to another level, and is meant: a phase of
the training begins. It lasts, unlike the smaller last batch of an epoch, and what it changes
was steady, unlike the length of padded sequences.
"""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.tolaria.fetches import NO_SIZE, Size

STEADY = 16
"""Steps with one size after which another one is a change; single steps between them that have
another size, as the last one of an epoch has, are passed over."""

LASTING = 2
"""Steps in a row with the other size after which it has changed."""

MOST_CHANGES = 64
"""Of a training: one whose batches never stop changing has no levels to begin anew."""


class TrainingPhase(NamedTuple):
    """A part of a training that is not to be measured by what was before it.

    ``number`` is how many began before it.
    """

    number: int = 0
    name: str = ""


class _Dimension:
    """One of the two numbers of a size, step by step."""

    __slots__ = ("_known", "_newer", "_steps", "_times", "usual")

    def __init__(self) -> None:
        self._known: set[int] = set()
        """Values that were steady once: going back to one of them begins nothing new."""
        self.forget_usual()

    def forget_usual(self) -> None:
        """What was usual is usual no more."""
        self.usual = self._steps = 0
        """The value, 0 where there is none, and for how many steps."""
        self._newer = self._times = 0

    def pass_usual(self, steps: int) -> None:
        """So many more steps had the usual value."""
        self._steps += steps
        self._times = 0

    def has_changed(self, value: int) -> bool:
        """Whether ``value``, of one more step, is steady from here on for the first time."""
        if value == self.usual:
            self.pass_usual(1)
            return False
        if value != self._newer:
            self._newer, self._times = value, 0
        self._times += 1
        if self._times < LASTING:
            return False
        was_steady = self._steps >= STEADY
        if was_steady:
            self._known.add(self.usual)
        self.usual, self._steps, self._times = value, LASTING, 0
        return was_steady and value not in self._known


class BatchSizes:
    """The size of the batches of one training."""

    __slots__ = ("_as_usual", "_changes", "_length", "_samples", "_usual")

    def __init__(self) -> None:
        self._samples, self._length = _Dimension(), _Dimension()
        self._changes = 0
        # Nearly all steps have the size of the one before: they are only counted.
        self._usual = NO_SIZE
        self._as_usual = 0

    def change(self, size: Size) -> str:
        """The name of the phase that begins with a step on batches of ``size``, "" for none.

        ``size`` is the samples of all batches of the step, and the length of the first; steps
        without a known size are passed over.
        """
        samples, length = size
        if not samples:
            return ""
        if size == self._usual:
            self._as_usual += 1
            return ""
        if self._as_usual:
            self._samples.pass_usual(self._as_usual)
            self._length.pass_usual(self._as_usual)
            self._as_usual = 0
        has_changed = self._samples.has_changed(samples)
        has_changed = self._length.has_changed(length) or has_changed
        self._usual = self._samples.usual, self._length.usual
        if not has_changed or self._changes >= MOST_CHANGES:
            return ""
        self._changes += 1
        return f"batches of {samples} × {length}" if length else f"batches of {samples}"

    def forget_usual(self) -> None:
        """Another phase has begun: its sizes are no change."""
        self._samples.forget_usual()
        self._length.forget_usual()
        self._usual, self._as_usual = NO_SIZE, 0
