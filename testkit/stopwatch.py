"""A clock of the benches' own: when steps ended, and how long a loop did something else.

It is read where a loop's optimizer has stepped, by a hook of that very optimizer, which torch
calls before those that are for all optimizers, ours among them. The loops are timed by it
whether or not anybody else watches them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter_ns as clock
from typing import Any, NamedTuple

import torch

from esper_otel.tolaria.step_hooks import untraced

Optimizer = torch.optim.Optimizer


class Took(NamedTuple):
    """How long a step took, ``ms`` or, where ``at_most``, no longer than that."""

    ms: float
    at_most: bool = False


class Stopwatch:
    """Ends of steps, and evaluations between them, in nanoseconds of ``perf_counter``."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self._evaluations: list[tuple[int, int, bool]] = []

    def clear(self) -> None:
        """Forget what was; a loop begins."""
        self.ends.clear()
        self._evaluations.clear()

    def on(self, optimizer: Optimizer) -> Optimizer:
        """``optimizer``, the end of each of whose steps is noted from here on.

        Not of one that it was called for and, being fused, left out: a ``GradScaler`` has told
        it of an overflow.
        """

        def ended(stepped: Any, *_: Any) -> None:
            if not float(getattr(stepped, "found_inf", None) or 0.0):
                self.ends.append(clock())

        optimizer.register_step_post_hook(untraced(ended))
        return optimizer

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is done within is in the time of no step."""
        began = clock()
        try:
            yield
        finally:
            self.evaluated(began)

    def evaluated(self, since: int, *, alone: bool = True) -> None:
        """An evaluation since that mark is over.

        ``alone`` False: what surrounds it, and is in no step either, nobody could time.
        """
        self._evaluations.append((since, clock(), alone))

    def steps(self) -> list[Took]:
        """What each step took but the first, of which nobody knows when it began."""
        return [self._took(before, end) for before, end in pairwise(self.ends)]

    def _took(self, before: int, end: int) -> Took:
        within = [each for each in self._evaluations if before <= each[0] and each[1] <= end]
        outside = sum(ended - began for began, ended, _ in within)
        return Took((end - before - outside) / 1e6, not all(alone for _, _, alone in within))


STOPWATCH = Stopwatch()
"""That of the loops of this process, which run one after the other."""
