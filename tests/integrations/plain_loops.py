"""Plain loops of PyTorch, and the norm of what they compute."""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data(n=96, batch_size=32, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(
        TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size, **options
    )


def plain_loop(*, epochs=2, clip=None, loader=None, evaluate=False):
    """A training loop as people write it; returns its losses and final weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(epochs):
        model.train()
        for x, y in loader or data():
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            losses.append(loss.item())
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if evaluate:
            model.eval()
            with torch.no_grad():
                for x, y in data(batch_size=96):
                    nn.functional.mse_loss(model(x), y)
    return losses, [p.detach().clone() for p in model.parameters()]


def norm_of(model):
    """Of its gradients, all together."""
    return math.sqrt(sum(p.grad.norm().item() ** 2 for p in model.parameters()))


def explicit_loop(run, model, optimizer, epochs=2):
    """A loop that tells its run what it does; returns its losses."""
    losses = []
    for _ in range(epochs):
        for x, y in run.batches(data()):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            run.report(loss=loss, accuracy=0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses
