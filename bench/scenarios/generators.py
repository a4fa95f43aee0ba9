"""Generators: a generator against its critic, and an autoencoder with a warm-up of its own."""

from __future__ import annotations

from math import pi
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, Optimizer

from bench.scenarios.classifiers import OfScans
from bench.scenarios.varied import perceptron
from bench.scenarios.workloads import Batch, scans


class Gan(OfScans):
    """A generator and a critic with an optimizer each; the generator's sets the steps.

    Variant 0 makes points on a ring, 1 the same against a critic of Wasserstein's distance
    that steps three times, whose losses are negative at times, and 2 makes scans of digits.
    """

    batch_size = 64

    def __init__(self, variant: int) -> None:
        self._critic_steps = (1, 3, 1)[variant]
        self._distance = variant == 1
        self._noise = (4, 4, 16)[variant]
        points = scans()[0].flatten(1) if variant == 2 else _ring(1797)
        points = points[torch.randperm(len(points))]
        nothing = torch.zeros(len(points))
        self._train = points[256:], nothing[256:]
        self._held_out = points[:256], nothing[:256]
        width, size = (32, 32, 64)[variant], points.shape[1]
        self.model = perceptron(self._noise, width, width, size)
        self._critic = perceptron(size, width, width, 1, activation=nn.LeakyReLU)
        rate = (1e-3, 5e-4, 5e-4)[variant]
        self.optimizer: Optimizer = Adam(self.model.parameters(), lr=rate, betas=(0.5, 0.999))
        self._other = Adam(self._critic.parameters(), lr=rate, betas=(0.5, 0.999))

    def loss(self, batch: Batch) -> Tensor:
        """Train the critic, then how much of the generator's it sees through."""
        if torch.is_grad_enabled():
            for _ in range(self._critic_steps):
                self._train_critic(batch[0])
        return self._seen_through(self._critic(self._made(len(batch[0]))))

    def corrupted(self, batch: Batch) -> Batch:
        """What is real has other signs."""
        return 1 - batch[0], batch[1]

    def _made(self, count: int) -> Tensor:
        return cast(Tensor, self.model(torch.randn(count, self._noise)))

    def _seen_through(self, judged: Tensor) -> Tensor:
        return -judged.mean() if self._distance else functional.softplus(-judged).mean()

    def _train_critic(self, real: Tensor) -> None:
        self._other.zero_grad()
        found = self._critic(real)
        made = self._critic(self._made(len(real)).detach())
        if self._distance:
            loss = made.mean() - found.mean()
        else:
            loss = functional.softplus(-found).mean() + functional.softplus(made).mean()
        loss.backward()
        self._other.step()
        if self._distance:
            with torch.no_grad():
                for parameter in self._critic.parameters():
                    parameter.clamp_(-0.1, 0.1)


def _ring(count: int) -> Tensor:
    """Points (count, 2) around eight places on a ring."""
    angles = torch.randint(8, (count,)) * (2 * pi / 8)
    places = torch.stack([angles.cos(), angles.sin()], 1)
    return places + 0.05 * torch.randn(count, 2)


class Coder(nn.Module):
    """A variational autoencoder of scans."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.encode = perceptron(64, width, 2 * size)
        self.decode = perceptron(size, width, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of pixels (batch, 64), and how far each code is from noise (batch,)."""
        mean, log = self.encode(images).chunk(2, 1)
        code = mean + (log / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log.exp() - 1 - log).sum(1) / 2
        return cast(Tensor, self.decode(code)), cast(Tensor, divergence)


class Vae(OfScans):
    """A variational autoencoder whose loss is a sum over the batch, with a KL warm-up."""

    def __init__(self, variant: int) -> None:
        self.draw()
        self.batch_size = (64, 32, 48)[variant]
        self._warmed = (200, 400, 100)[variant]
        self._weight = (1.0, 1.0, 4.0)[variant]
        self._summed = 0
        self.model = Coder((64, 48, 64)[variant], (8, 4, 8)[variant])
        self.optimizer: Optimizer = Adam(
            self.model.parameters(), lr=(1e-3, 2e-3, 1e-3)[variant]
        )

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of all pixels, and by and by the divergence from noise."""
        if torch.is_grad_enabled():
            self._summed += 1
        logits, divergence = self.model(batch[0])
        pixels = functional.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum")
        share = min(1.0, self._summed / self._warmed)
        return torch.as_tensor(pixels + self._weight * share * divergence.sum())
