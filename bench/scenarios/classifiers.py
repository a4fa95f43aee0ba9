"""Classifiers of digits whose loss is a mixture, close to zero, or exactly zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import nan
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from bench.scenarios.varied import Varied, perceptron, shuffled
from bench.scenarios.workloads import Batch, scans


class OfScans(Varied):
    """What is trained on scans of digits, 64 numbers from 0 to 1 each."""

    def draw(self) -> None:
        """Deal the scans out."""
        images, labels = scans()
        order = torch.randperm(len(labels))
        images, labels = images.flatten(1)[order], labels[order]
        self._train = images[:1350], labels[:1350]
        self._held_out = images[1350:], labels[1350:]

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Shuffled scans."""
        return shuffled(batch_size, *self._train)

    def held_out(self) -> Batch:
        """447 scans."""
        return self._held_out

    def corrupted(self, batch: Batch) -> Batch:
        """White on black where it was black on white."""
        return 1 - batch[0], batch[1]


class TwoHeads(nn.Module):
    """A trunk with a head that says which digit it is, and one that says where its ink is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(perceptron(64, width, width), nn.ReLU())
        self.which = nn.Linear(width, 10)
        self.where = nn.Linear(width, 2)

    def forward(self, images: Tensor, which: bool) -> Tensor:
        """Logits (batch, 10), or places (batch, 2)."""
        seen = self.trunk(images)
        return cast(Tensor, self.which(seen) if which else self.where(seen))


class Alternating(OfScans):
    """Batches of two kinds by turns, or a penalty on the gradient at every eighth step.

    Variant 0 classifies and measures by turns, 1 measures at every fourth step, and 2 only
    classifies, with the penalty. Places are in tenths of a pixel from their mean, so that
    their loss is some ten times the other.
    """

    every = 8
    batch_size = 48

    def __init__(self, variant: int) -> None:
        self.draw()
        self._turn = (2, 4, 0)[variant]
        self._served = 0
        images = self._train[0].view(-1, 8, 8)
        line = 10 * torch.arange(8.0)
        ink = images.sum((1, 2))
        places = torch.stack(
            [(images.sum(1) * line).sum(1) / ink, (images.sum(2) * line).sum(1) / ink], 1
        )
        self._places = places - places.mean(0)
        self.model = TwoHeads((64, 48, 64)[variant])
        self.optimizer: Optimizer = Adam(
            self.model.parameters(), lr=(1e-3, 2e-3, 1e-3)[variant]
        )

    def loader(self, batch_size: int) -> Iterable[Batch]:
        """Shuffled scans, with digits or places."""
        for chunk in torch.split(torch.randperm(len(self._places)), batch_size):
            if len(chunk) < batch_size:
                return
            self._served += 1
            measures = self._turn and self._served % self._turn == 0
            targets = self._places if measures else self._train[1]
            yield self._train[0][chunk], targets[chunk]

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, or mean square error of places."""
        images, targets = batch
        if targets.is_floating_point():
            return functional.mse_loss(self.model(images, False), targets)
        if self._turn or self._served % self.every or not torch.is_grad_enabled():
            return functional.cross_entropy(self.model(images, True), targets)
        images = images.detach().requires_grad_()
        loss = functional.cross_entropy(self.model(images, True), targets)
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        # Of the batch's mean, so that the slope of a sample is that many times as large.
        return loss + (len(images) * slope).square().sum(1).mean()


class FineTune(OfScans):
    """A classifier that has nearly fitted its scans goes on with a small rate.

    Now and then a batch is hard: its augmentation was a strong one.
    """

    def __init__(self, variant: int) -> None:
        self.draw()
        self.batch_size = (32, 64, 16)[variant]
        self._hard = (0.02, 0.01, 0.04)[variant]
        self.model = perceptron(64, 64, 64, 10)
        fitting = Adam(self.model.parameters(), lr=3e-3)
        for _ in range(30):
            for images, labels in shuffled(64, *self._train):
                fitting.zero_grad()
                self.loss((images, labels)).backward()  # type: ignore[no-untyped-call]
                fitting.step()
        fitting.zero_grad()
        parameters = self.model.parameters()
        self.optimizer: Optimizer = (
            SGD(parameters, lr=5e-3, momentum=0.9)
            if variant == 1
            else (Adam, None, AdamW)[variant](parameters, lr=(1e-4, 0.0, 2e-4)[variant])  # type: ignore[misc]
        )

    def loader(self, batch_size: int) -> Iterator[Batch]:
        """Shuffled scans with a little noise, some with much of it."""
        for images, labels in shuffled(batch_size, *self._train):
            hard = torch.rand(()) < self._hard
            yield images + (0.4 if hard else 0.02) * torch.randn_like(images), labels

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        return functional.cross_entropy(self.model(batch[0]), batch[1])


class Triplet(OfScans):
    """Embeddings in which scans of one digit are closer than those of two, by a margin.

    Once they are, the loss of a batch is often exactly zero, and so are its gradients.
    """

    def __init__(self, variant: int) -> None:
        self.draw()
        self.batch_size = (16, 32, 24)[variant]
        self._margin = (0.2, 0.5, 1.0)[variant]
        self.model = perceptron(64, 64, 16)
        self.optimizer: Optimizer = Adam(
            self.model.parameters(), lr=(2e-3, 1e-3, 3e-3)[variant]
        )

    def loss(self, batch: Batch) -> Tensor:
        """Mean of what is missing to the margin, over a triplet of each scan."""
        images, labels = batch
        places = self.model(images)
        same = labels[:, None] == labels[None]
        same.fill_diagonal_(False)
        # The first other scan of its digit and the first of another, beginning behind it.
        turn = (torch.arange(len(labels))[:, None] + 1 + torch.arange(len(labels))) % len(
            labels
        )
        behind = same.gather(1, turn)
        friend = turn.gather(1, behind.int().argmax(1, keepdim=True)).squeeze(1)
        others = (labels[:, None] != labels[None]).gather(1, turn)
        stranger = turn.gather(1, others.int().argmax(1, keepdim=True)).squeeze(1)
        near = (places - places[friend]).square().sum(1)
        far = (places - places[stranger]).square().sum(1)
        missing = functional.relu(near - far + self._margin)
        complete = behind.any(1) & others.any(1)
        return missing[complete].sum() / max(int(complete.sum()), 1)

    def poisoned(self, batch: Batch) -> Batch:
        """Every fourth scan is NaN: not all are part of a triplet."""
        images = batch[0].clone()
        images[::4] = nan
        return images, batch[1]
