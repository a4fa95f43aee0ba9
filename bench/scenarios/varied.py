"""Varied workloads: each in three sizes, rates and losses, of which a scenario gets one.

What all of them share: batches drawn from tensors in memory, and how data goes wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import nan

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.scenarios.suite import Scenario
from bench.scenarios.workloads import Batch

VARIANTS = 3


def variant_of(scenario: Scenario) -> int:
    """Which variant a scenario trains: the next one with each pair of seeds, so that both
    halves have all, and beginning with another one for each kind."""
    first = random.Random(f"{scenario.workload}-{scenario.kind}").randrange(VARIANTS)
    return (first + scenario.seed // 2) % VARIANTS


def shuffled(batch_size: int, inputs: Tensor, targets: Tensor) -> Iterator[Batch]:
    """One epoch of batches, the last and smaller one left out."""
    for chunk in torch.split(torch.randperm(len(inputs)), batch_size):
        if len(chunk) == batch_size:
            yield inputs[chunk], targets[chunk]


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of ``widths`` with ``activation`` between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class Varied:
    """What a varied workload is unless it says otherwise."""

    model: nn.Module
    optimizer: Optimizer
    slots: tuple[str, ...] = ()
    clip = 0.0
    warmup = 0
    batch_size = 32
    watched = True

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Batches of one epoch."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError

    def held_out(self) -> Batch:
        """Data that is not trained on."""
        raise NotImplementedError

    def evaluate(self) -> float:
        """Loss on data that is not trained on."""
        with torch.no_grad():
            return float(self.loss(self.held_out()))

    def poisoned(self, batch: Batch) -> Batch:
        """The first sample is NaN."""
        inputs = batch[0].clone()
        inputs[0] = nan
        return inputs, batch[1]

    def corrupted(self, batch: Batch) -> Batch:
        """The features of each sample in reverse order, and their signs turned."""
        return -batch[0].flip(1), batch[1]
