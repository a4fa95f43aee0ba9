"""Courses with a garden: a seed that grows as it should, and seeds that do not."""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.scenarios.training import Course, Training
from bench.scenarios.troubles import Pace
from esper_otel.kasmina import isolation
from esper_otel.kasmina.blueprints import blueprint
from esper_otel.leyline.stages import Stage

_QUICK: dict[str, Any] = {
    "growth": "autonomous",
    "plateau_steps": 10**6,  # nothing but what is asked for
    "training_steps": 20,
    "blending_steps": 20,
    "shadowing_steps": 10,
    "probation_steps": 10,
    "isolation_every": 1,
    "kernel_budget_ms": 10_000,
    "step_rise_max": 1000,
}
"""A life of about 60 steps, and no gate that a busy machine could shut."""


class Growing(Course):
    """One seed grows from step 25 on."""

    sown = 25
    blueprint = "low_rank"
    settings: dict[str, Any] = {}

    def begin(self, training: Training) -> None:
        work = training.work
        register()
        self.garden = training.run.plant(
            work.model, work.slots, blueprints=[self.blueprint], **(_QUICK | self.settings)
        )

    def fetch(self, training: Training) -> None:
        if training.step == self.sown:
            self.garden.germinate(training.work.slots[0], self.blueprint)

    @property
    def stage(self) -> Stage:
        """Of the only seed."""
        return next(iter(self.garden.stages.values()), Stage.UNKNOWN)


class Leak(Growing):
    """A seed in isolation whose input is no longer detached from the host."""

    settings = {"training_steps": 10**6}

    def fetch(self, training: Training) -> None:
        super().fetch(training)
        if training.step == training.at:
            self._cut = isolation.cut
            isolation.cut = _uncut

    def end(self, training: Training) -> None:
        if training.wrong:
            isolation.cut = self._cut


class Fallback(Growing):
    """A kernel that begins to raise: identity takes its place."""

    blueprint = "raises"
    settings = {"training_steps": 10**6}

    def fetch(self, training: Training) -> None:
        super().fetch(training)
        Raises.broken = training.wrong

    def end(self, training: Training) -> None:
        Raises.broken = False


class SlowKernel(Growing):
    """A kernel that begins to take as long as a whole step did."""

    blueprint = "waits"
    settings = {"training_steps": 10**6}

    def __init__(self) -> None:
        self._pace = Pace()

    def fetch(self, training: Training) -> None:
        super().fetch(training)
        self._pace.follow(training)
        Waits.wait_s = self._pace.step_s if training.wrong else 0.0

    def end(self, training: Training) -> None:
        Waits.wait_s = 0.0


class Blended(Growing):
    """The trouble begins when the seed joins, not at a step that was chosen."""

    lasts = 40
    settings = {"loss_rise_max": 1e9, "gradient_ratio_max": 1e12, "blending_steps": lasts}

    def fetch(self, training: Training) -> None:
        if training.at is not None and training.step == 1:
            self.sown = training.at - 24
            training.at = None
        super().fetch(training)

    def stepped(self, training: Training) -> None:
        if training.at is None and self.stage is Stage.BLENDING:
            training.at = training.step + 1


class InConflict(Blended):
    """A seed that wants of its input the opposite of what the host wants."""

    blueprint = "contradicts"


class Harm(Blended):
    """A seed that drowns what the host has to say."""

    blueprint = "drowns"


class _Scaled(nn.Module):
    """Its output is a fixed function of its input, times a parameter that begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    @classmethod
    def built(cls, shape: torch.Size) -> nn.Module:
        """A new one, for activations of any shape."""
        return cls()


class Raises(_Scaled):
    """Identity, until it is broken."""

    broken = False

    def forward(self, activation: Tensor) -> Tensor:
        if Raises.broken:
            raise RuntimeError("no kernel image is available for execution on the device")
        return activation * self.scale


class Waits(_Scaled):
    """Identity, after a while."""

    wait_s = 0.0

    def forward(self, activation: Tensor) -> Tensor:
        time.sleep(Waits.wait_s)
        return activation * self.scale


class Contradicts(_Scaled):
    """The opposite."""

    def forward(self, activation: Tensor) -> Tensor:
        return -activation * self.scale


class Drowns(_Scaled):
    """A pattern that has nothing to do with its input but its size."""

    def forward(self, activation: Tensor) -> Tensor:
        pattern = torch.linspace(0, 50, activation.numel()).sin().view_as(activation)
        return 8 * activation.detach().abs().mean() * pattern * self.scale + 0 * activation


def _uncut(activation: Tensor) -> Tensor:
    return activation


def register() -> None:
    """Make the blueprints known. Not on import: who only scores must not change what grows."""
    for module in (Raises, Waits, Contradicts, Drowns):
        blueprint(module.__name__.lower(), ranks=(2, 3, 4))(module.built)
