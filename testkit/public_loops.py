"""Training loops of the kinds that public scripts have, which keep their own account.

Each loop of :data:`PUBLIC` trains for :data:`~testkit.ledger.STEPS` steps, knows nothing of us
and writes into a :class:`~testkit.ledger.Ledger` what it took: the loss of each step as its
author would report it, norms and rates. Loops of frameworks are in
:mod:`testkit.public_frameworks`.
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


# Reinforcement learning.


def dqn(ledger: Ledger) -> None:
    """As in the tutorial: a target network, and gradients clipped by value."""
    policy, target = network(4, 2), network(4, 2)
    target.load_state_dict(policy.state_dict())
    optimizer = ledger.probed(torch.optim.AdamW)(policy.parameters(), lr=1e-4, amsgrad=True)
    for x, reward in drawn():
        if len(ledger.losses) == STEPS:
            break
        actions = torch.randint(2, (BATCH, 1))
        with torch.no_grad():
            expected = target(x).max(1).values.unsqueeze(1) * 0.99 + reward
        loss = F.smooth_l1_loss(policy(x).gather(1, actions), expected)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = norm_of(policy.parameters())
        torch.nn.utils.clip_grad_value_(policy.parameters(), 0.01)
        ledger.step(optimizer, loss, norm)
        optimizer.step()
        kept = target.state_dict()
        for key, value in policy.state_dict().items():
            kept[key] = value * 0.005 + kept[key] * 0.995
        target.load_state_dict(kept)
    ledger.end(policy)


def dqn_of_old(ledger: Ledger) -> None:
    """Clips each gradient by hand, past the counting of versions."""
    model = network()
    optimizer = ledger.probed(torch.optim.RMSprop)(model.parameters(), lr=1e-3)

    def clip() -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.data.clamp_(-0.01, 0.01)

    train(ledger, model, optimizer, clip)


def reinforce(ledger: Ledger) -> None:
    """One loss of a whole episode, of varying length."""
    policy = network(4, 2)
    optimizer = ledger.probed(torch.optim.Adam)(policy.parameters(), lr=1e-2)
    x = samples()[0]
    for step in range(STEPS):
        episode = x[step * 4 : step * 4 + 3 + step % 4]
        chances = torch.distributions.Categorical(logits=policy(episode))
        actions = chances.sample()  # type: ignore[no-untyped-call]
        returns = torch.arange(len(episode), 0, -1.0)
        chosen = chances.log_prob(actions)  # type: ignore[no-untyped-call]
        loss = torch.stack([-p * r for p, r in zip(chosen, returns, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer, loss, norm_of(policy.parameters()))
        optimizer.step()
    ledger.end(policy)


def soft_actor_critic(ledger: Ledger) -> None:
    """Three optimizers, one of a single number, as in stable-baselines3."""
    actor, critic = network(4, 1), network(5, 1)
    temperature = torch.zeros(1, requires_grad=True)
    of_temperature = ledger.probed(torch.optim.Adam)([temperature], lr=3e-4)
    of_critic = ledger.probed(torch.optim.Adam, primary=False)(critic.parameters(), lr=3e-4)
    of_actor = ledger.probed(torch.optim.Adam, primary=False)(actor.parameters(), lr=3e-4)
    for x, y in loader():
        action = actor(x)
        loss = -(temperature * (action.detach().square() - 1)).mean()
        of_temperature.zero_grad()
        loss.backward()
        assert temperature.grad is not None
        ledger.step(of_temperature, loss, float(temperature.grad.abs()))
        of_temperature.step()
        of_critic.zero_grad()
        F.mse_loss(critic(torch.cat([x, action.detach()], 1)), y).backward()  # type: ignore[no-untyped-call]
        ledger.step(of_critic, None, None, primary=False)
        of_critic.step()
        of_actor.zero_grad()
        (-critic(torch.cat([x, action], 1))).mean().backward()
        ledger.step(of_actor, None, None, primary=False)
        of_actor.step()
    ledger.end(actor, critic)


# Sharpness-aware minimisation, attacks, several losses.


class Sam(torch.optim.Optimizer):
    """As it goes around: a wrapper that shares the groups of another."""

    def __init__(self, parameters: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """To where the loss is highest nearby."""
        norm = norm_of(p for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["kept"] = p.data.clone()
                p.add_(p.grad, alpha=group["rho"] / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Back, and the other's step from there."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["kept"]
        self.base.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both, with an evaluation between."""
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


def sam_by_hand(ledger: Ledger) -> None:
    """Two evaluations of one batch, the second with other weights."""
    model = network()
    base = ledger.probed(torch.optim.SGD)
    optimizer = Sam(model.parameters(), base, lr=0.01, momentum=0.9)
    for x, y in loader():
        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.first_step()
        F.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer.base, loss, norm_of(model.parameters()))
        optimizer.second_step()
        optimizer.zero_grad()
    ledger.end(model)


def sam_by_closure(ledger: Ledger) -> None:
    """The first evaluation is the loop's, the second the closure's."""
    model = network()
    optimizer = Sam(model.parameters(), ledger.probed(torch.optim.SGD), lr=0.01)
    norm = 0.0
    for x, y in loader():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal norm
            second = F.mse_loss(model(x), y)
            second.backward()  # type: ignore[no-untyped-call]
            norm = norm_of(model.parameters())
            return second

        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer.base, loss, None)
        optimizer.step(closure)
        ledger.norms[-1] = norm
        optimizer.zero_grad()
    ledger.end(model)


def adversarial_training(ledger: Ledger) -> None:
    """An attack on the inputs (FGSM) has a ``backward`` whose gradients are thrown away."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    for x, y in loader():
        attacked = x.clone().requires_grad_()
        F.mse_loss(model(attacked), y).backward()  # type: ignore[no-untyped-call]
        assert attacked.grad is not None
        stepped = (attacked + 0.1 * attacked.grad.sign()).detach()
        optimizer.zero_grad()
        loss = F.mse_loss(model(stepped), y)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer, loss, norm_of(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    ledger.end(model)


def two_tasks(ledger: Ledger) -> None:
    """Two losses through one graph, which is kept for the second."""
    model = network(4, 2)
    optimizer = ledger.probed(torch.optim.Adam)(model.parameters(), lr=1e-3)
    for x, y in loader():
        optimizer.zero_grad()
        out = model(x)
        first, second = F.mse_loss(out[:, :1], y), F.mse_loss(out[:, 1:], -y)
        first.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        second.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer, float(first) + float(second), norm_of(model.parameters()))
        optimizer.step()
    ledger.end(model)


def micro_batches(ledger: Ledger) -> None:
    """Undivided, one batch of the loader each: a step's loss is their mean."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    losses: list[float] = []
    for x, y in loader(3 * STEPS * BATCH):
        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if len(losses) == 3:
            ledger.step(optimizer, sum(losses) / 3, norm_of(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            losses.clear()
    ledger.end(model)


def last_step_is_shorter(ledger: Ledger) -> None:
    """Four micro-batches a step, and two in the last step of an epoch."""
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    for _ in range(STEPS // 3):
        losses: list[float] = []
        batches = list(loader(10 * BATCH))
        for i, (x, y) in enumerate(batches):
            loss = F.mse_loss(model(x), y)
            (loss / 4).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            if i % 4 == 3 or i == len(batches) - 1:
                mean = sum(losses) / len(losses)
                ledger.step(optimizer, mean, norm_of(model.parameters()))
                optimizer.step()
                optimizer.zero_grad()
                losses.clear()
    ledger.end(model)


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


PUBLIC: dict[str, Callable[[Ledger], None]] = {
    "examples: mnist": mnist,
    "examples: word_language_model": word_language_model,
    "examples: dcgan": dcgan,
    "examples: reinforce": reinforce,
    "tutorial: dqn": dqn,
    "dqn, clamp by hand": dqn_of_old,
    "wgan-gp": wgan_gp,
    "pix2pix": pix2pix,
    "nanoGPT": nano_gpt,
    "torchtitan": torchtitan,
    "fairseq": fairseq,
    "Muon and AdamW": muon_and_adamw,
    "schedule-free": schedule_free,
    "soft actor-critic": soft_actor_critic,
    "SAM, by hand": sam_by_hand,
    "SAM, by closure": sam_by_closure,
    "adversarial training": adversarial_training,
    "two tasks, one graph": two_tasks,
    "micro-batches": micro_batches,
    "micro-batches, a shorter last step": last_step_is_shorter,
    "torch.func": by_torch_func,
    "autograd.grad": by_autograd_grad,
    "meta-learning": meta_learning,
    "skorch": skorch,
    "GradScaler, clipped by hand": clipped_under_a_scaler,
    "DeepSpeed's engine": deepspeed,
    "timm": timm,
    "ultralytics": ultralytics,
    "ignite": ignite,
    "PEFT": low_rank,
    "relative Adafactor": no_rate,
}
"""Loops by whose they are like."""
