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
samples a batch has is found here as well (:func:`samples_in`).
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


Charged = tuple[int, int, bool, int, Sequence[tuple[int, int]]]
"""What a step is charged with; marks are nanoseconds of one clock.

The mark the loop was at before all of it; that at which it asked for the step's first batch;
whether an evaluation lay between; the samples; the waits as (asked for, came). Where there is
no wait, no batch was the step's, and the second mark is the end of the evaluation as far as
it is known. A plain tuple, for one is made at every step.
"""


class _FetchRun:
    """Fetches from one iterator, with none from another between them."""

    __slots__ = ("_newest", "samples", "source", "waits")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.waits: list[tuple[int, int]] = []
        self.samples = 0
        self._newest = 0

    def append(self, asked_for: int, now: int, samples: int) -> None:
        waits = self.waits
        waits.append((asked_for, now))
        self.samples += samples
        self._newest = samples
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
        self._alone: tuple[Source, int, int, int] | None = None
        self._runs: list[_FetchRun] = []

    def came(self, source: Source, asked_for: int, now: int, samples: int, mark: int) -> None:
        """A batch of ``samples`` came; the loop was at ``mark`` before the first of them."""
        if not self.waiting:
            self.waiting = True
            self._before = mark
            self._alone = source, asked_for, now, samples
            return
        runs = self._runs
        if self._alone is not None:
            first, self._alone = self._alone, None
            self._append(*first)
        if asked_for <= runs[-1].waits[-1][0]:
            self._drop_newest()  # it lies in this one: a loader that is timed at two places
        self._append(source, asked_for, now, samples)

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
            (source, asked_for, now, samples), self._alone = self._alone, None
            if source not in self._trained or len(self._trained) > 1:
                if self._is_evaluation({source}, now, step):
                    return self._before, max(now, self._ended), True, 0, ()
                self._trained = {source}
            return self._before, asked_for, False, samples, ((asked_for, now),)
        runs, self._runs = self._runs, []
        now = runs[-1].waits[-1][1]
        if self._is_evaluation({each.source for each in runs}, now, step):
            return self._before, max(now, self._ended), True, 0, ()
        first = 0
        if len(runs) > 1:
            trained = self._trained_of(runs)
            first = next(i for i, each in enumerate(runs) if each.source in trained)
            # What is fetched behind the first batch of a step is the step's as well.
            runs = runs[first:]
        self._trained = {each.source for each in runs}
        waits = [wait for each in runs for wait in each.waits]
        samples = sum(each.samples for each in runs)
        return self._before, waits[0][0], first > 0, samples, waits

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

    def _append(self, source: Source, asked_for: int, now: int, samples: int) -> None:
        runs = self._runs
        if not runs or runs[-1].source != source:
            runs.append(_FetchRun(source))
            if len(runs) > MAX_FETCH_RUNS:
                del runs[0]
        runs[-1].append(asked_for, now, samples)

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

_Size = Callable[[Any], int]

_sizes: dict[type, _Size | None] = {}
"""How the first dimension of each kind of tensor seen so far is read, None: it is none."""


def samples_in(batch: object, depth: int = 0) -> int:
    """Length of the first dimension of the first tensor in ``batch``, 0 when it has none.

    Looks into dictionaries, lists and tuples, and what extends them or ``UserDict`` (as
    batches of Hugging Face do), to a depth of four, for tensors of torch and arrays of numpy.
    Nothing else is looked at, and none of the batch's own code runs: what decodes when it is
    asked for something is not asked.
    """
    kind = type(batch)
    if kind is list and batch:  # what a DataLoader collates
        first = batch[0]  # type: ignore[index]
        size = _sizes.get(type(first))
        if size is _first_of_shape:
            shape = first.shape
            if shape:
                return int(shape[0])
        elif size is not None and (samples := size(first)):
            return samples
    if kind in _sizes:
        size = _sizes[kind]
    else:
        size = _size_of(kind)
        if len(_sizes) < _MOST_KINDS:
            _sizes[kind] = size
    if size is not None:
        return size(batch)
    if depth == _DEEPEST:
        return 0
    for part in _parts_of(batch, kind):
        samples = samples_in(part, depth + 1)
        if samples:
            return samples
    return 0


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


def _size_of(kind: Any) -> _Size | None:
    """How the first dimension of a ``kind`` of tensor is read; None where it is no tensor."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and kind is numpy.ndarray:
        return _first_of_shape
    if torch is None or not issubclass(kind, torch.Tensor):
        return None
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return _first_of_shape
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not (
        kind.__module__.startswith("torch.")
    ):
        return None  # its shape may be computed by the script
    without_overrides = torch._C.DisableTorchFunctionSubclass

    def first_dimension(tensor: Any) -> int:
        with without_overrides():
            return _first_of_shape(tensor)

    return first_dimension


def _first_of_shape(tensor: Any) -> int:
    shape = tensor.shape
    return int(shape[0]) if shape else 0
