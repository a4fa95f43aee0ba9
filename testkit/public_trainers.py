"""Loops without ``backward``, by closures, with scalers, and those of small frameworks.

For :mod:`testkit.public_loops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from testkit.ledger import (
    BATCH,
    STEPS,
    Ledger,
    loader,
    network,
    norm_of,
    train,
)

# Without ``backward``, by closures, with scalers, and clipped by hand.


def by_torch_func(ledger: Ledger) -> None:
    """Gradients of a function; nobody but the script knows its loss."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    named = dict(model.named_parameters())

    def loss_of(weights: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, weights, (x,)), y)

    for x, y in loader():
        detached = {name: p.detach() for name, p in named.items()}
        gradients = torch.func.grad(loss_of)(detached, x, y)
        for name, p in named.items():
            p.grad = gradients[name]
        ledger.step(optimizer, None, norm_of(model.parameters()))
        optimizer.step()
    ledger.end(model)


def by_autograd_grad(ledger: Ledger) -> None:
    """``autograd.grad`` for all weights, given as a generator."""
    model = network()
    optimizer = ledger.probed(torch.optim.Adam)(model.parameters(), lr=0.01)
    for x, y in loader():
        loss = F.mse_loss(model(x), y)
        gradients = torch.autograd.grad(loss, cast(Any, model.parameters()))
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        ledger.step(optimizer, loss, norm_of(model.parameters()))
        optimizer.step()
    ledger.end(model)


def meta_learning(ledger: Ledger) -> None:
    """Inner steps by ``autograd.grad`` are no losses of the outer one."""
    model = nn.Linear(4, 1)
    optimizer = ledger.probed(torch.optim.Adam)(model.parameters(), lr=0.01)
    for x, y in loader():
        inner = F.mse_loss(model(x[:4]), y[:4])
        by = torch.autograd.grad(inner, tuple(model.parameters()), create_graph=True)
        weight, bias = (p - 0.1 * g for p, g in zip(model.parameters(), by, strict=True))
        loss = F.mse_loss(F.linear(x[4:], weight, bias), y[4:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer, loss, norm_of(model.parameters()))
        optimizer.step()
    ledger.end(model)


def skorch(ledger: Ledger) -> None:
    """Every step is a closure that the optimizer calls."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    for x, y in loader():
        found: list[float] = []

        def closure(x: Tensor = x, y: Tensor = y, found: list[float] = found) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            found[:] = loss.item(), norm_of(model.parameters())
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.clamp_(-0.05, 0.05)
            return loss

        ledger.step(optimizer, None, None)
        optimizer.step(closure)
        ledger.losses[-1], ledger.norms[-1] = found
    ledger.end(model)


def clipped_under_a_scaler(ledger: Ledger) -> None:
    """Unscaled, then clipped by hand to a norm worked out by hand."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for x, y in loader():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        norm = norm_of(model.parameters())
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(min(1.0, 0.1 / norm))
        ledger.step(optimizer, loss, norm)
        scaler.step(optimizer)
        scaler.update()
    ledger.end(model)


def deepspeed(ledger: Ledger) -> None:
    """An engine that clips by a function of its own, through ``.data``, when it steps."""
    model = network()

    class Engine:
        def __init__(self) -> None:
            self.optimizer = ledger.probed(torch.optim.AdamW)(model.parameters(), lr=1e-3)

        def backward(self, loss: Tensor) -> None:
            self.loss = loss
            loss.backward()  # type: ignore[no-untyped-call]

        def step(self) -> None:
            norm = norm_of(model.parameters())
            share = torch.tensor([0.05 / (norm + 1e-6)]).clamp(max=1.0)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.data.mul_(share)
            ledger.step(self.optimizer, self.loss, norm)
            self.optimizer.step()
            for p in model.parameters():
                p.grad = None

    engine = Engine()
    for x, y in loader():
        engine.backward(F.mse_loss(model(x), y))
        engine.step()
    ledger.end(model)


def timm(ledger: Ledger) -> None:
    """Adaptive clipping, unit by unit, a rate set per update, a moving average of weights."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(
        model.parameters(), lr=0.05, nesterov=True, momentum=0.9
    )
    average = torch.optim.swa_utils.AveragedModel(model)
    updates = 0

    def clip() -> None:
        for p in model.parameters():
            if p.grad is not None:
                most = p.detach().norm().clamp(min=1e-3) * 0.01
                norm = p.grad.norm().clamp(min=1e-6)
                p.grad.detach().copy_(torch.where(norm > most, p.grad * (most / norm), p.grad))

    def after() -> None:
        nonlocal updates
        updates += 1
        average.update_parameters(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * updates / STEPS)) / 2 + 1e-5

    train(ledger, model, optimizer, clip, after_step=after)


def ultralytics(ledger: Ledger) -> None:
    """Groups of their own rates, warm-up of rate and momentum, two batches a step, AMP."""
    model = network()
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    weights = [p for name, p in model.named_parameters() if "bias" not in name]
    optimizer = ledger.probed(torch.optim.SGD)(weights, lr=0.01, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": biases, "weight_decay": 0.0})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    losses: list[float] = []
    for i, (x, y) in enumerate(loader(2 * STEPS * BATCH)):
        for j, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 + (0.1 - 0.01 * i / 24 if j else 0.0)
            group["momentum"] = 0.8 + 0.1 * i / 24
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if i % 2:
            scaler.unscale_(optimizer)
            norm = norm_of(model.parameters())
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            ledger.step(optimizer, sum(losses) / 2, norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.clear()
    ledger.end(model)


def ignite(ledger: Ledger) -> None:
    """An engine calls a function of the script for each batch, and handlers after it."""

    class Engine:
        def __init__(self, process: Callable[[Any, Any], float]) -> None:
            self.process, self.handlers = process, list[Callable[[Any], None]]()
            self.iteration = 0

        def run(self, batches: Iterable[Any], epochs: int) -> None:
            for _ in range(epochs):
                for batch in batches:
                    self.iteration += 1
                    self.output = self.process(self, batch)
                    for handler in self.handlers:
                        handler(self)

    model = network()
    optimizer = ledger.probed(torch.optim.Adam)(model.parameters(), lr=1e-3)

    def update(engine: Any, batch: Any) -> float:
        model.train()
        optimizer.zero_grad()
        x, y = batch
        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = norm_of(model.parameters())
        half = len(list(model.parameters())) // 2  # a norm for each part of the model
        for part in list(model.parameters())[:half], list(model.parameters())[half:]:
            nn.utils.clip_grad_norm_(part, 0.1)
        ledger.step(optimizer, loss, norm)
        optimizer.step()
        return loss.item()

    def piecewise_linear(engine: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - engine.iteration / (2 * STEPS))

    trainer = Engine(update)
    trainer.handlers.append(piecewise_linear)
    trainer.run(loader(STEPS // 2 * BATCH), epochs=2)
    ledger.end(model)


def low_rank(ledger: Ledger) -> None:
    """Frozen weights with a small trained part beside them, as PEFT's; not all are trained."""
    model = network()
    model.requires_grad_(False)
    down = nn.Parameter(torch.randn(2, 4) * 0.1)
    up = nn.Parameter(torch.zeros(1, 2))
    optimizer = ledger.probed(torch.optim.AdamW)([down, up], lr=1e-2)
    for x, y in loader():
        loss = F.mse_loss(model(x) + x @ down.T @ up.T, y)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = norm_of([down, up])
        nn.utils.clip_grad_norm_([down, up], 0.3)
        ledger.step(optimizer, loss, norm)
        optimizer.step()
        optimizer.zero_grad()
    ledger.weights = [down.detach().clone(), up.detach().clone()]


def no_rate(ledger: Ledger) -> None:
    """An optimizer whose groups hold nothing that is expected of them."""

    class Relative(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": None, "betas": None, "scale": (1, "x")})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=0.01)

    model = network()
    train(ledger, model, ledger.probed(Relative)(model.parameters()))
