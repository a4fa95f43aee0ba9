"""Small trainings, and the steps of the runs that they become."""

import torch
from torch import nn

from esper_otel.integrations.torch import TorchInstrumentor


def all_steps(streams):
    """Steps by run, when the process has ended."""
    TorchInstrumentor().uninstrument()
    return streams.steps()


def whole(n):
    """Steps of a run from which none is missing."""
    return list(range(1, n + 1))


X = torch.linspace(-1, 1, 32).reshape(8, 4)


class Training:
    """A model and its optimizer."""

    def __init__(self, make=torch.optim.SGD, lr=0.01):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer = make(self.model.parameters(), lr=lr)
        self.losses = []

    def train(self, steps, loss=None):
        for _ in range(steps):
            self.optimizer.zero_grad()
            value = self.model(X).square().mean() if loss is None else loss(self.model)
            value.backward()
            self.optimizer.step()
            self.losses.append(value.item())
        return self
