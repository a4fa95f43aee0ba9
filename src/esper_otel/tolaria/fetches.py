"""Fetches: separates training batches from others, and measures the wait for them.

A loop fetches for training and for evaluating, and only ``backward`` tells which was which,
later. Then the fetches before it belong

======================================================== =====================================
to the step                                              when
======================================================== =====================================
those of iterators that the step before was made of      there are any
else those of the newest iterator, and of any other over no iterator is known, as at the first
another dataset that gave as many batches (loaders that  step of an epoch; those asked for while
are zipped)                                              no gradients were recorded do not
                                                         count, nor, where datasets of the step
                                                         before are among them, do others
none                                                     gradients were recorded for none of
                                                         them: it was an evaluation, of a loop
                                                         that trains on what no loader gives it
                                                         or had its batch before
all the same                                             their iterator goes on from one step
                                                         to the next
======================================================== =====================================

and what was fetched before the step's first batch was an evaluation between two steps. How many
samples a batch has, and how long they are, is found here as well (:func:`size_in`).
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple

MAX_FETCH_RUNS = 64
"""Runs of fetches from one iterator that are remembered until ``backward``."""

MAX_WAITS = 64
"""Waits of such a run that are told apart; older ones are told as one."""


class Source(NamedTuple):
    """Where a batch came from, in numbers of :class:`~esper_otel.tolaria.identities.ObjectIds`.

    ``graded``: gradients were recorded when it was asked for, as no evaluation has it that
    runs under ``torch.no_grad``.
    """

    iterator: int
    dataset: int
    graded: bool = True


UNNAMED = Source(0, 0)
"""Of a loop that has one loader, and says nothing of it."""


Size = tuple[int, int]
"""Samples of a batch, and the length of its second dimension (tokens of a sequence, features,
channels of an image); 0 for what it has not."""

NO_SIZE: Size = 0, 0

Charged = tuple[int, int, bool, Size, Sequence[tuple[int, int]]]
"""What a step is charged with; marks are nanoseconds of one clock.

The mark the loop was at before all of it; that at which it asked for the step's first batch;
whether an evaluation lay between; the samples of all batches, and the length of the first; the
waits as (asked for, came). Where there is no wait, no batch was the step's, and the second mark
is the end of the evaluation as far as it is known. A plain tuple: one is made at every step.
"""


class _FetchRun:
    """Fetches from one iterator, with none from another between them."""

    __slots__ = ("_newest", "length", "samples", "source", "waits")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waits: list[tuple[int, int]] = []
        self.samples = 0
        self.length = 0
        """Of its first batch."""
        self._newest = 0

    def append(self, asked_for: int, now: int, size: Size) -> None:
        waits = self.waits
        if not waits:
            self.length = size[1]
        waits.append((asked_for, now))
        self.samples += size[0]
        self._newest = size[0]
        if len(waits) > MAX_WAITS:
            # What lay between them comes after both: the sums stay what they are.
            (first, came), (next_one, next_came) = waits[:2]
            waits[:2] = [(first, came + next_came - next_one)]

    def drop_newest(self) -> None:
        self.waits.pop()
        self.samples -= self._newest


class Fetches:
    """The fetches of one loop that no ``backward`` has followed yet."""

    __slots__ = (
        "_alone",
        "_before",
        "_ended",
        "_evaluated",
        "_evaluated_at",
        "_runs",
        "_trained",
        "waiting",
    )

    def __init__(self) -> None:
        self.waiting = False
        """Whether there are any."""
        self._before = 0
        self._ended = 0
        self._trained: set[Source] = set()
        self._evaluated: Set[Source] = frozenset()
        self._evaluated_at = 0
        # What most steps have is one fetch, and no work should be made of it.
        self._alone: tuple[Source, int, int, Size] | None = None
        self._runs: list[_FetchRun] = []

    def came(self, source: Source, asked_for: int, now: int, size: Size, mark: int) -> None:
        """A batch of ``size`` came; the loop was at ``mark`` before the first of them."""
        if not self.waiting:
            self.waiting = True
            self._before = mark
            self._alone = source, asked_for, now, size
            return
        runs = self._runs
        if self._alone is not None:
            first, self._alone = self._alone, None
            self._append(*first)
        if asked_for <= runs[-1].waits[-1][0]:
            self._drop_newest()  # it lies in this one: a loader that is timed at two places
        self._append(source, asked_for, now, size)

    def is_usual(self, source: Source) -> bool:
        """Whether one batch from ``source``, and nothing else, is what a step consists of."""
        return not self.waiting and len(self._trained) == 1 and source in self._trained

    def ended(self, iterator: int, now: int) -> None:
        """The iterator of that number was asked for a batch and had none left."""
        if self.waiting:
            newest = self._alone[0] if self._alone is not None else self._runs[-1].source
            if newest.iterator == iterator:
                self._ended = now

    def charge(self, step: int) -> Charged:
        """What ``backward``, which is called now, makes of them; ``step`` were taken so far."""
        self.waiting = False
        if self._alone is not None:
            (source, asked_for, now, size), self._alone = self._alone, None
            if source not in self._trained or len(self._trained) > 1:
                if self._is_evaluation({source}, now, step):
                    return self._before, max(now, self._ended), True, NO_SIZE, ()
                self._trained = {source}
            return self._before, asked_for, False, size, ((asked_for, now),)
        runs, self._runs = self._runs, []
        now = runs[-1].waits[-1][1]
        if self._is_evaluation({each.source for each in runs}, now, step):
            return self._before, max(now, self._ended), True, NO_SIZE, ()
        first = 0
        if len(runs) > 1:
            trained = self._trained_of(runs)
            first = next(i for i, each in enumerate(runs) if each.source in trained)
            # What is fetched behind the first batch of a step is the step's as well.
            runs = runs[first:]
        self._trained = {each.source for each in runs}
        waits = [wait for each in runs for wait in each.waits]
        size = sum(each.samples for each in runs), runs[0].length
        return self._before, waits[0][0], first > 0, size, waits

    def _is_evaluation(self, sources: Set[Source], now: int, step: int) -> bool:
        """Whether none of ``sources``, the last fetched from at mark ``now``, is trained on."""
        known = {(source.dataset, source.graded) for source in self._trained}
        if any(source.graded or (source.dataset, False) in known for source in sources):
            return False
        goes_on = (
            self._ended < now
            and step - self._evaluated_at <= 1
            and not self._evaluated.isdisjoint(sources)
        )
        self._evaluated, self._evaluated_at = sources, step
        return not goes_on

    def _append(self, source: Source, asked_for: int, now: int, size: Size) -> None:
        runs = self._runs
        if not runs or runs[-1].source != source:
            runs.append(_FetchRun(source))
            if len(runs) > MAX_FETCH_RUNS:
                del runs[0]
        runs[-1].append(asked_for, now, size)

    def _drop_newest(self) -> None:
        newest = self._runs[-1]
        newest.drop_newest()
        if not newest.waits:
            self._runs.pop()

    def _trained_of(self, runs: list[_FetchRun]) -> set[Source]:
        counts: dict[Source, int] = {}  # the newest first
        for each in reversed(runs):
            counts[each.source] = counts.get(each.source, 0) + len(each.waits)
        known = self._trained & counts.keys()
        if known:
            return known
        datasets = {source.dataset for source in self._trained}
        likely = [source for source in counts if source.graded] or list(counts)
        familiar = [source for source in likely if source.dataset in datasets] or likely
        newest = familiar[0]
        return {newest} | {
            source
            for source in familiar
            if source.dataset != newest.dataset and counts[source] == counts[newest]
        }


_DEEPEST = 4
_MOST_KINDS = 256

_Measure = Callable[[Any], Size]

_measures: dict[type, _Measure | None] = {}
"""How the size of each kind of tensor seen so far is read, None: it is none."""


def size_in(batch: object, depth: int = 0) -> Size:
    """The first two dimensions of the first tensor in ``batch``, 0 for what it has not.

    Looks into dictionaries, lists and tuples, and what extends them or ``UserDict`` (as
    batches of Hugging Face do), to a depth of four, for tensors of torch and arrays of numpy.
    Nothing else is looked at, and none of the batch's own code runs: what decodes when it is
    asked for something is not asked.
    """
    kind = type(batch)
    if kind is list and batch:  # what a DataLoader collates
        first = batch[0]  # type: ignore[index]
        measure = _measures.get(type(first))
        if measure is not None:
            size = measure(first)
            if size[0]:
                return size
    if kind in _measures:
        measure = _measures[kind]
    else:
        measure = _measure_of(kind)
        if len(_measures) < _MOST_KINDS:
            _measures[kind] = measure
    if measure is not None:
        return measure(batch)
    if depth == _DEEPEST:
        return NO_SIZE
    for part in _parts_of(batch, kind):
        size = size_in(part, depth + 1)
        if size[0]:
            return size
    return NO_SIZE


def _parts_of(batch: Any, kind: type) -> Iterable[object]:
    """What ``batch`` holds, by the methods of Python's own types."""
    if issubclass(kind, dict):
        return dict.values(batch)
    if issubclass(kind, list):
        return list.__iter__(batch)
    if issubclass(kind, tuple):
        return tuple.__iter__(batch)
    if issubclass(kind, UserDict):
        held = object.__getattribute__(batch, "__dict__").get("data")
        return dict.values(held) if issubclass(type(held), dict) else ()
    return ()


def _measure_of(kind: Any) -> _Measure | None:
    """How the size of a ``kind`` of tensor is read; None where it is no tensor."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and kind is numpy.ndarray:
        return _size_of_shape
    if torch is None or not issubclass(kind, torch.Tensor):
        return None
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return _size_of_shape
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not (
        kind.__module__.startswith("torch.")
    ):
        return None  # its shape may be computed by the script
    without_overrides = torch._C.DisableTorchFunctionSubclass

    def own_size(tensor: Any) -> Size:
        with without_overrides():
            return _size_of_shape(tensor)

    return own_size


def _size_of_shape(tensor: Any) -> Size:
    shape = tensor.shape
    dimensions = len(shape)
    if dimensions > 1:
        return int(shape[0]), int(shape[1])
    return (int(shape[0]), 0) if dimensions else NO_SIZE
