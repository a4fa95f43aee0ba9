"""Regressions: one whose targets have heavy tails, and one of a matrix from some entries."""

from __future__ import annotations

from collections.abc import Iterable
from math import nan

import torch
from torch import Tensor, nn
from torch.distributions import StudentT
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from bench.scenarios.varied import Varied, perceptron, shuffled
from bench.scenarios.workloads import Batch


class HeavyTail(Varied):
    """A perceptron learns a smooth function from measurements with Student's t as noise.

    Single batches have a loss that is 20 to 100 times as large as those around them, or
    more. Measurements end at 100, as those of an instrument do.
    """

    features = 8

    def __init__(self, variant: int) -> None:
        freedom = (2.0, 1.5, 1.75)[variant]
        inputs = torch.randn(4096, self.features)
        noise = 0.4 * StudentT(freedom).sample((4096, 1))
        mix = torch.randn(self.features, 3)
        smooth = torch.sin(inputs @ mix).sum(1, keepdim=True)
        targets = (smooth + noise).clamp(-100, 100)
        self._train = inputs[512:], targets[512:]
        self._held_out = inputs[:512], smooth[:512]
        width = (48, 32, 64)[variant]
        self.model = perceptron(self.features, width, width, 1)
        parameters = self.model.parameters()
        # Plain descent follows an outlier as far as it goes, so that its gradients are clipped.
        self.clip = (0.0, 5.0, 0.0)[variant]
        self.optimizer: Optimizer = (
            SGD(parameters, lr=0.01, momentum=0.9)
            if variant == 1
            else Adam(parameters, lr=(2e-3, 0.0, 5e-4)[variant])
        )

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Shuffled measurements."""
        return shuffled(batch_size, *self._train)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error."""
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """512 samples without noise."""
        return self._held_out


class Factors(nn.Module):
    """A matrix as the product of two thin ones, with a bias for each row and column."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(rows, rank)
        self.columns = nn.Embedding(columns, rank)
        self.row_bias = nn.Embedding(rows, 1)
        self.column_bias = nn.Embedding(columns, 1)
        for each in (self.rows, self.columns, self.row_bias, self.column_bias):
            nn.init.normal_(each.weight, std=0.1)

    def forward(self, places: Tensor) -> Tensor:
        """Entries (batch,) at places (batch, 2)."""
        row, column = places[:, 0], places[:, 1]
        product = (self.rows(row) * self.columns(column)).sum(1)
        biases = self.row_bias(row) + self.column_bias(column)
        return torch.as_tensor(product + biases.squeeze(1))


class Embedding(Varied):
    """A matrix of 300 times 200 ratings, from a sixth of its entries."""

    rows, columns = 300, 200

    def __init__(self, variant: int) -> None:
        rank = (8, 16, 4)[variant]
        self.batch_size = (128, 256, 64)[variant]
        truth = torch.randn(self.rows, 4) @ torch.randn(4, self.columns) / 2
        chosen = torch.randperm(self.rows * self.columns)[:10_000]
        places = torch.stack([chosen // self.columns, chosen % self.columns], 1)
        ratings = truth[places[:, 0], places[:, 1]] + 0.1 * torch.randn(len(places))
        self._train = places[1000:], ratings[1000:]
        self._held_out = places[:1000], ratings[:1000]
        self.model = Factors(self.rows, self.columns, rank)
        parameters = self.model.parameters()
        self.optimizer: Optimizer = (
            SGD(parameters, lr=0.5, momentum=0.9)
            if variant == 1
            else Adam(parameters, lr=(1e-2, 0.0, 3e-3)[variant])
        )

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Shuffled ratings."""
        return shuffled(batch_size, *self._train)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error."""
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """A thousand ratings."""
        return self._held_out

    def poisoned(self, batch: Batch) -> Batch:
        """One rating is NaN."""
        ratings = batch[1].clone()
        ratings[0] = nan
        return batch[0], ratings

    def corrupted(self, batch: Batch) -> Batch:
        """Rows and columns numbered from their other end."""
        ends = torch.tensor([self.rows - 1, self.columns - 1])
        return ends - batch[0], batch[1]
