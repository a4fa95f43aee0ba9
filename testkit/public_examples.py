"""Loops like those of PyTorch's examples, and of language models.

For :mod:`testkit.public_loops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from testkit.ledger import (
    BATCH,
    STEPS,
    Ledger,
    drawn,
    loader,
    network,
    norm_of,
    samples,
    train,
)

# The examples of PyTorch.


def mnist(ledger: Ledger) -> None:
    """Epochs with a test after each, and a rate that falls per epoch."""
    model = network()
    optimizer = ledger.probed(torch.optim.Adadelta)(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    for _ in range(3):
        model.train()
        train(ledger, model, optimizer, batches=loader(4 * BATCH))
        model.eval()
        with torch.no_grad():
            for x, y in loader(2 * BATCH, 2 * BATCH):
                F.mse_loss(model(x), y, reduction="sum").item()
        schedule.step()


def word_language_model(ledger: Ledger) -> None:
    """Truncated back-propagation through time, clipped, the rate divided when it stalls."""
    torch.manual_seed(0)
    rnn, head = nn.LSTM(4, 8), nn.Linear(8, 1)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = ledger.probed(torch.optim.SGD)(parameters, lr=20.0)
    state: Any = (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))
    x = samples(STEPS * 10)[0].reshape(STEPS, 5, 2, 4)
    for i, part in enumerate(x):
        optimizer.zero_grad()
        state = tuple(each.detach() for each in state)
        out, state = rnn(part, state)
        loss = F.mse_loss(head(out), part.sum(-1, keepdim=True))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = norm_of(parameters)
        nn.utils.clip_grad_norm_(parameters, 0.25)
        ledger.step(optimizer, loss, norm)
        optimizer.step()
        if i == STEPS // 2:
            for group in optimizer.param_groups:
                group["lr"] /= 4.0
    ledger.end(rnn, head)


def dcgan(ledger: Ledger) -> None:
    """Two losses of the critic, each with a ``backward`` of its own; its loss is their sum."""
    generator, critic = network(2, 4), network(4, 1)
    of_critic = ledger.probed(torch.optim.Adam)(
        critic.parameters(), lr=2e-4, betas=(0.5, 0.999)
    )
    kind = ledger.probed(torch.optim.Adam, primary=False)
    of_generator = kind(generator.parameters(), lr=1e-4, betas=(0.5, 0.999))
    real, made = torch.ones(BATCH, 1), torch.zeros(BATCH, 1)
    for x, _ in loader():
        critic.zero_grad()
        on_real = F.binary_cross_entropy_with_logits(critic(x), real)
        on_real.backward()  # type: ignore[no-untyped-call]
        fake = generator(torch.randn(BATCH, 2))
        on_fake = F.binary_cross_entropy_with_logits(critic(fake.detach()), made)
        on_fake.backward()  # type: ignore[no-untyped-call]
        ledger.step(of_critic, on_real + on_fake, norm_of(critic.parameters()))
        of_critic.step()
        generator.zero_grad()
        loss = F.binary_cross_entropy_with_logits(critic(fake), real)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(of_generator, loss, None, primary=False)
        of_generator.step()
    ledger.end(generator, critic)


def wgan_gp(ledger: Ledger) -> None:
    """A critic with a gradient penalty, and three losses, two of them of other operations."""
    generator, critic = network(2, 4), network(4, 1)
    of_critic = ledger.probed(torch.optim.RMSprop)(critic.parameters(), lr=1e-3)
    kind = ledger.probed(torch.optim.RMSprop, primary=False)
    of_generator = kind(generator.parameters(), lr=1e-3)
    for x, _ in drawn():
        if len(ledger.losses) == STEPS:
            break
        of_critic.zero_grad()
        fake = generator(torch.randn(BATCH, 2)).detach()
        between = (x + fake).div(2).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        parts = [
            -critic(x).mean(),
            critic(fake).mean(),
            (slope.norm(dim=1) - 1).square().mean(),
        ]
        for part in parts:
            part.backward()
        ledger.step(of_critic, sum(map(float, parts)), norm_of(critic.parameters()))
        of_critic.step()
        of_generator.zero_grad()
        loss = -critic(generator(torch.randn(BATCH, 2))).mean()
        loss.backward()
        ledger.step(of_generator, loss, None, primary=False)
        of_generator.step()
    ledger.end(generator, critic)


def pix2pix(ledger: Ledger) -> None:
    """The generator steps first; the critic's loss is half of two."""
    generator, critic = network(4, 4), network(4, 1)
    of_generator = ledger.probed(torch.optim.Adam)(generator.parameters(), lr=2e-4)
    kind = ledger.probed(torch.optim.Adam, primary=False)
    of_critic = kind(critic.parameters(), lr=2e-4)
    for x, _ in loader():
        fake = generator(x)
        of_generator.zero_grad()
        loss = F.mse_loss(critic(fake), torch.ones(len(x), 1)) + 10 * F.l1_loss(fake, x)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(of_generator, loss, norm_of(generator.parameters()))
        of_generator.step()
        of_critic.zero_grad()
        scores = critic(x), critic(fake.detach())
        half = (F.mse_loss(scores[0], torch.ones(len(x), 1)) + scores[1].square().mean()) * 0.5
        half.backward()
        ledger.step(of_critic, half, None, primary=False)
        of_critic.step()
    ledger.end(generator, critic)


# Language models.


def nano_gpt(ledger: Ledger) -> None:
    """Losses divided by the number of micro-batches, a scaler that is off, rates by hand."""
    model = network()
    optimizer = ledger.probed(torch.optim.AdamW)(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = drawn()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 5)
        total = 0.0
        for _ in range(4):
            x, y = next(batches)
            loss = F.mse_loss(model(x), y) / 4
            total += loss.item()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        norm = norm_of(model.parameters())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        ledger.step(optimizer, total, norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    ledger.end(model)


def torchtitan(ledger: Ledger) -> None:
    """The norm is taken by one function and clipped to by another."""
    model = network()
    optimizer = ledger.probed(torch.optim.AdamW)(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))

    def clip() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, 2.0)
        torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), 0.1, norm)

    train(ledger, model, optimizer, clip, after_step=schedule.step)


def muon_and_adamw(ledger: Ledger) -> None:
    """Matrices by one optimizer, the rest by another, after one ``backward``."""

    class Muon(torch.optim.Optimizer):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, {"lr": lr, "momentum": 0.95})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
                    p.add_(u @ v, alpha=-group["lr"])

    model = network()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    muon = ledger.probed(Muon)(matrices, lr=0.02)
    adamw = ledger.probed(torch.optim.AdamW, primary=False)(rest, lr=1e-3)
    for x, y in loader():
        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(muon, loss, norm_of(matrices))
        ledger.step(adamw, loss, None, primary=False)
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
    ledger.end(model)


def schedule_free(ledger: Ledger) -> None:
    """An optimizer with modes for training and evaluating, which warms up by itself."""

    class ScheduleFree(torch.optim.Optimizer):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "k": 0})
            self.training = False

        def mode(self, training: bool) -> None:
            self.training = training

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if not self.training:
                raise RuntimeError("not in train mode")
            for group in self.param_groups:
                group["k"] += 1
                rate = group["scheduled_lr"] = group["lr"] * min(1.0, group["k"] / 5)
                for p in group["params"]:
                    z = self.state[p].setdefault("z", p.clone())
                    z.sub_(p.grad, alpha=rate)
                    p.lerp_(z, 1 / group["k"])

    model = network()
    optimizer = ledger.probed(ScheduleFree)(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.mode(True)
        train(ledger, model, optimizer, batches=loader(STEPS // 2 * BATCH))
        optimizer.mode(False)


def fairseq(ledger: Ledger) -> None:
    """Losses are sums over tokens; gradients are divided by their number, then clipped.

    What counts is the norm of the mean: the division is not clipping.
    """
    model = network()
    optimizer = ledger.probed(torch.optim.Adam)(model.parameters(), lr=1e-3)
    for x, y in loader():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(1 / len(x))
        norm = norm_of(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        ledger.step(optimizer, loss, norm)
        optimizer.step()
    ledger.end(model)
