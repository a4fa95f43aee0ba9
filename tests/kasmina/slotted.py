"""Hosts with a slot in them, and seeds that do what a test says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_otel.kasmina.blending import Convex
from esper_otel.kasmina.blueprints import lookup
from esper_otel.kasmina.hook import SlotHook


def noise(shape, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def host() -> nn.Sequential:
    """With what makes trouble: work in place behind the slot, and random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 3),
    )


def conv_seed() -> nn.Module:
    return lookup("bottleneck_conv").build((2, 8, 4, 4), seed=1)


def planted(model: nn.Sequential, at: str = "0") -> SlotHook:
    return SlotHook(at, model.get_submodule(at))


class Does(nn.Module):
    """A seed that does what a test says."""

    def __init__(self, does) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.does = does

    def forward(self, given):
        return self.does(given, self.weight)


def one(model: nn.Module, does, *, alpha: float | None = None) -> SlotHook:
    """A slot at ``model`` with a seed that ``does``, isolated or blended."""
    there = SlotHook("here", model)
    there.attach(Does(does), Convex())
    if alpha is not None:
        there.set_alpha(alpha)
    return there


def raises(*_):
    """What a seed does that fails."""
    raise RuntimeError("no memory")
