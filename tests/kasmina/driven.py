"""A small host with a garden, driven step by step by a test."""

from __future__ import annotations

import io
from math import nan
from typing import Any
from unittest.mock import patch

import torch
from msgspec.structs import replace
from torch import nn

from esper_otel.kasmina.garden import Garden
from esper_otel.kasmina.kernels import Compilation, Fetch
from esper_otel.leyline.decisions import NOMINAL, Action, Decision, Severity
from esper_otel.leyline.frames import present, step_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_SLOT
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings

torch.set_num_threads(1)

MLP = "residual_mlp"
"""The blueprint that fits this host and is registered first."""

QUICK = {
    "plateau_steps": 3,
    "training_steps": 2,
    "blending_steps": 4,
    "shadowing_steps": 2,
    "probation_steps": 2,
    "patience_steps": 5,
    "embargo_steps": 3,
    "loss_rise_max": 10.0,
    "kernel_budget_ms": 10_000.0,
    "step_rise_max": 1e6,
}

AUTONOMOUS = {"growth": "autonomous"}


class AtOnce:
    """Fetches kernels at once, in the calling thread; ``reason``: fails every time."""

    reason = ""

    def __init__(self, budget_ms: float, compiler: Any = None) -> None:
        pass

    def request(self, blueprint: Any, activation: Any, seed: int) -> Fetch:
        fetch = Fetch(blueprint.name, 1e9, lambda: 0)
        if self.reason:
            fetch.set_result(None, self.reason, 0.5)
        else:
            fetch.set_result(blueprint.build(activation.shape, seed), "", 0.5)
        return fetch

    def compile(self, module: Any, activation: Any) -> Compilation:
        compilation = Compilation()
        compilation.set_result(None, "")
        return compilation

    def stop(self, timeout_s: float = 0.0) -> None:
        pass


def said(action: Action, target=None, operation=None, reason=NOMINAL, findings=()) -> Decision:
    """A decision of the sidecar."""
    return Decision(
        "id", "r", 1, 1, action, Severity.NORMAL, reason, list(findings), target, operation
    )


def about(step: int, decision: Decision) -> Decision:
    """The same decision, as the answer to the request about ``step``."""
    return replace(decision, step=step)


def idle(proposal) -> Decision:
    """What it answers when nothing is to be done."""
    return said(Action.CONTINUE)


def agreed(proposal) -> Decision:
    """What the sidecar answers while all is well."""
    if proposal is None:
        return said(Action.CONTINUE)
    return said(Action.SEED, proposal.seed_id, proposal.operation)


def paused(target=None, *findings):
    """It answers all proposals with a pause, of one seed or of all."""
    return lambda proposal: said(Action.PAUSE, target, reason="a_rule", findings=findings)


def host(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        # With a CUDA build `torch.manual_seed` also keeps the caller's stack, as text.
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )


class Driven:
    """Host, optimizer and garden; :meth:`step` makes one step of all three."""

    def __init__(
        self, slots=("1", "3"), garden=True, settings=None, momentum=0.0, **options
    ) -> None:
        self.host = host()
        self.optimizer = torch.optim.SGD(self.host.parameters(), lr=0.02, momentum=momentum)
        self.losses: list[float] = []
        self.proposals: list[Any] = []
        self.events: list[Any] = []
        self.steps = 0
        self.seen_loss = 1.0
        self.seen_step_ms = nan
        self._generator = torch.Generator().manual_seed(1)
        self.garden: Garden | None = None
        if garden:
            with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
                self.garden = Garden(
                    self.host,
                    slots,
                    settings=EsperSettings().changed(**{**QUICK, **(settings or {})}),
                    **options,
                )

    def batch(self):
        x = torch.randn(6, 4, generator=self._generator)
        return x, x.sum(1, keepdim=True).sin()

    def train(self) -> None:
        x, y = self.batch()
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.host(x), y)
        loss.backward()
        self.losses.append(loss.item())
        self.optimizer.step()
        self.steps += 1

    def step(self, decide=agreed, enforced=True) -> dict[str, dict[str, float]]:
        """One step; returns the rows of its seeds, by id. ``decide`` answers a proposal."""
        self.train()
        garden = self.garden
        row = step_row()
        row[STEP_SLOT["loss_ewma"]] = self.seen_loss
        row[STEP_SLOT["gradient_norm"]] = 1.0
        row[STEP_SLOT["step_latency_ms"]] = self.seen_step_ms
        garden.learn(self.optimizer)
        self.frame = frame = garden.finalize(self.steps, row)
        self.proposals.append(frame.proposal)
        garden.proposal_sent(self.steps)
        decision = about(self.steps, decide(frame.proposal))
        self.acted = garden.apply(decision, enforced=enforced)
        self.events += garden.take_events()
        return {seed_id: present(SEED_KEYS, values) for seed_id, values in frame.seeds}

    def until(self, condition, decide=agreed, enforced=True, most=200):
        """Steps until ``condition()`` holds; fails when it never does."""
        for _ in range(most):
            if condition():
                return
            self.step(decide, enforced)
        raise AssertionError(f"not within {most} steps: {self.garden.slots}")

    def saved(self) -> bytes:
        """A checkpoint, as it would lie in a file."""
        file = io.BytesIO()
        state = {
            "model": self.host.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "garden": self.garden.state_dict(),
            "batches": self._generator.get_state(),
            "steps": self.steps,
        }
        torch.save(state, file)
        return file.getvalue()

    def resume(self, saved: bytes) -> Driven:
        """Go on from a checkpoint, in the order that the documentation gives."""
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.host.load_state_dict(state["model"])
        self.garden.set_host_optimizer(self.optimizer)
        self.garden.load_state_dict(state["garden"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["batches"])
        self.steps = state["steps"]
        return self

    def told(self, name: str) -> list[str]:
        return [event.text for event in self.events if event.name == name]


def grown_to(stage, **options):
    """A run whose one seed has just come to ``stage``."""
    driven = Driven(**options)
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    # Its kernel is there at once here, so who agrees sees no GERMINATED.
    decide = idle if stage is Stage.GERMINATED else agreed
    driven.until(lambda: driven.garden.stages.get("s") is stage, decide)
    return driven
