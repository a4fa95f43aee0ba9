"""Loops of reinforcement learning, and with several losses or updates in a step.

For :mod:`testkit.public_loops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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


def curvature_now_and_then(ledger: Ledger) -> None:
    """At every fifth update one more ``backward`` measures something, as Sophia does.

    Its gradients are thrown away before the next step has any.
    """
    model = network()
    optimizer = ledger.probed(torch.optim.SGD)(model.parameters(), lr=0.01)
    for number, (x, y) in enumerate(loader(), 1):
        loss = F.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer, loss, norm_of(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        if number % 5 == 0:
            drawn_anew = model(x).detach() + torch.ones_like(y)
            F.mse_loss(model(x), drawn_anew).backward()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
    ledger.end(model)


def clips_too_early(ledger: Ledger) -> None:
    """Clips between ``zero_grad`` and ``backward``, which clips nothing (as TCN's scripts)."""
    model = network()
    optimizer = ledger.probed(torch.optim.RMSprop)(model.parameters(), lr=1e-3)
    for x, y in loader():
        optimizer.zero_grad(set_to_none=False)
        loss = F.mse_loss(model(x), y)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.step(optimizer, loss, norm_of(model.parameters()))
        optimizer.step()
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
