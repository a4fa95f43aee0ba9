"""Healthy trainings that look unusual, for the loop of :mod:`bench.small_trainings`.

They are workloads of :mod:`bench.scenarios.registry`, each in its three variants by turns:
outlier batches, a curriculum, batches that alternate, a loss close to zero, an actor-critic and
deep Q-learning, a GAN, a loss that is often exactly zero, one that is summed and warms up part
of itself, and a factorisation. The games are evaluated by the longest game over the mean length
of games, and the GAN by how far its points are from real ones: their losses say little of
either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.scenarios.generators import Gan
from bench.scenarios.registry import VARIED
from bench.scenarios.varied import VARIANTS, Varied
from bench.scenarios.workloads import epochs
from bench.small_trainings import Batch, Small

STEPS = {"curriculum": 750}
"""Until the last of its phases is over."""


class DistantGan(Gan):
    """A GAN with an evaluation that means something."""

    def evaluate(self) -> float:
        """Energy distance (Székely and Rizzo, 2004) between 256 points and real ones."""
        with torch.no_grad():
            real, made = self.held_out()[0], self._made(256)
            between = 2 * torch.cdist(real, made).mean()
            within = torch.cdist(real, real).mean() + torch.cdist(made, made).mean()
        return float(between - within)


class Unusual(Small):
    """A workload in the loop of small trainings."""

    def __init__(self, work: Varied, steps: int) -> None:
        self._work = work
        self._batches: Iterator[Batch] = epochs(work, work.batch_size)
        self.steps, self.clip = steps, work.clip
        self.model, self.optimizer = work.model, work.optimizer

    def batch(self) -> Batch:
        """The workload's next."""
        return next(self._batches)

    def loss(self, batch: Batch) -> Tensor:
        """The workload's."""
        return self._work.loss(batch)

    def evaluate(self) -> float:
        """As the workload is evaluated."""
        return self._work.evaluate()


def unusual(name: str, variant: int) -> Unusual:
    """One of :data:`UNUSUAL` in a variant, before it is trained."""
    make = DistantGan if name == "gan" else VARIED[name]
    return Unusual(make(variant % VARIANTS), STEPS.get(name, 500))


UNUSUAL: dict[str, Callable[[int], Small]] = {
    name: lambda variant, name=name: unusual(name, variant)  # type: ignore[misc]
    for name in VARIED
}
"""By the name of the workload: makes it in a variant."""
