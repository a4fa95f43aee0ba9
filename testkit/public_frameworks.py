"""Trainings of the frameworks that public scripts use, which keep their own account.

As :mod:`testkit.public_loops`; each of :data:`PUBLIC_FRAMEWORKS` raises ``ImportError`` where
the framework is not installed.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Callable
from typing import Any

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
    rate_of,
    samples,
)
from testkit.quiet_trainers import lightning_trainer, transformers_arguments


def _trained(module: Any, ledger: Ledger, optimizer: Callable[[], Any]) -> Any:
    """A Lightning module that keeps ``ledger``, whose optimizers ``optimizer`` gives."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            self.loss = F.mse_loss(self.network(x), y)
            return self.loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            ledger.losses.append(self.loss.item())
            ledger.norms.append(norm_of(self.network.parameters()))

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            ledger.own.append(rate_of(self.trainer.optimizers[0]))

        def configure_optimizers(self) -> Any:
            return optimizer()

    return Module()


def _fit(module: Any, **options: Any) -> None:
    lightning_trainer(**options).fit(module, loader())


def lightning(ledger: Ledger, **options: Any) -> None:
    model = network()

    def configure() -> Any:
        optimizer = ledger.probed(torch.optim.AdamW)(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    _fit(_trained(model, ledger, configure), **options)
    ledger.end(model)


def lightning_by_value(ledger: Ledger) -> None:
    lightning(ledger, gradient_clip_val=0.01, gradient_clip_algorithm="value")


def lightning_by_norm(ledger: Ledger) -> None:
    lightning(ledger, gradient_clip_val=0.1)


def lightning_two_optimizers(ledger: Ledger) -> None:
    """Optimised by hand: a critic with two losses, and a generator."""
    import lightning.pytorch as pl

    class Gan(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = network(2, 4), network(4, 1)

        def training_step(self, batch: Any, index: int) -> None:
            x, _ = batch
            optimizers: Any = self.optimizers()
            of_critic, of_generator = optimizers
            fake = self.generator(torch.randn(len(x), 2))
            parts = [
                self.critic(fake.detach()).square().mean(),
                (self.critic(x) - 1).square().mean(),
            ]
            of_critic.zero_grad()
            for part in parts:
                self.manual_backward(part)
            norm = norm_of(self.critic.parameters())
            ledger.step(of_critic.optimizer, sum(map(float, parts)), norm)
            of_critic.step()
            of_generator.zero_grad()
            loss = (self.critic(fake) - 1).square().mean()
            self.manual_backward(loss)
            ledger.step(of_generator.optimizer, loss, None, primary=False)
            of_generator.step()

        def configure_optimizers(self) -> Any:
            kind, other = torch.optim.Adam, ledger.probed(torch.optim.Adam, primary=False)
            return [
                ledger.probed(kind)(self.critic.parameters(), lr=1e-3),
                other(self.generator.parameters(), lr=2e-3),
            ]

    module = Gan()
    _fit(module)
    ledger.end(module)


def fabric(ledger: Ledger) -> None:
    import lightning.fabric

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    instance = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    own = network()
    inner = ledger.probed(torch.optim.SGD)(own.parameters(), lr=0.05)
    model, optimizer = instance.setup(own, inner)
    for x, y in instance.setup_dataloaders(loader()):
        loss = F.mse_loss(model(x), y)
        instance.backward(loss)
        norm = norm_of(own.parameters())
        instance.clip_gradients(model, optimizer, max_norm=0.1)
        ledger.step(inner, loss, norm)
        optimizer.step()
        optimizer.zero_grad()
    ledger.end(own)


def accelerate(ledger: Ledger) -> None:
    """Three micro-batches a step, and one that is left over, as the scripts of Accelerate."""
    accelerator: Any = importlib.import_module("accelerate").Accelerator(
        cpu=True, gradient_accumulation_steps=3
    )
    own = network()
    inner = ledger.probed(torch.optim.AdamW)(own.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda n: 1 / (1 + n))
    model, optimizer, batches, schedule = accelerator.prepare(
        own, inner, loader(3 * STEPS * BATCH), schedule
    )
    losses: list[float] = []
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(x), y)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = norm_of(own.parameters())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                ledger.step(inner, sum(losses) / 3, norm)
                losses.clear()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    ledger.end(own)


def _trainer(
    ledger: Ledger, model: nn.Module, compute_loss: Any = None, **options: Any
) -> None:
    """Transformers' Trainer; gradients are measured behind the step's last micro-batch."""
    import transformers as hf

    accumulate = options.get("gradient_accumulation_steps", 1)

    class Trainer(hf.Trainer):
        calls = 0

        def create_optimizer(self, *args: Any) -> Any:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizer = ledger.probed(torch.optim.AdamW)(
                trained, lr=self.args.learning_rate
            )
            return self.optimizer

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if compute_loss is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            return compute_loss(model, inputs)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            self.calls += 1
            if self.calls % accumulate == 0:
                ledger.losses.append(sum(losses))  # each is divided already
                ledger.norms.append(norm_of(model.parameters()))
                ledger.own.append(rate_of(self.optimizer))
                losses.clear()
            return loss

    losses: list[float] = []
    x, y = samples(STEPS * BATCH * accumulate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=transformers_arguments(folder, BATCH, learning_rate=1e-2, **options),
            train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        )
        trainer.remove_callback(hf.PrinterCallback)
        trainer.train()
    ledger.end(model)


class Head(nn.Module):
    """Returns its loss, as models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(
        self, x: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss alone."""
        if x is None or labels is None:
            raise ValueError("expected x and labels")
        return {"loss": F.mse_loss(self.network(x), labels)}


def transformers(ledger: Ledger) -> None:
    _trainer(ledger, Head(), gradient_accumulation_steps=2, max_grad_norm=0.1, warmup_steps=4)


class Adapted(Head):
    """Frozen, with a small trained part beside it (PEFT)."""

    def __init__(self) -> None:
        super().__init__()
        self.network.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False)

    def preference(self, x: Tensor, y: Tensor) -> Tensor:
        """DPO's, of a pair of which ``y`` says how far apart its parts are."""
        chosen, rejected = (self.network(each) + self.up(self.down(each)) for each in (x, -x))
        return -F.logsigmoid(0.1 * y.sign() * (chosen - rejected)).mean()


def trl(ledger: Ledger) -> None:
    """A trainer with a loss of its own over adapters, as TRL's DPO with PEFT."""
    model = Adapted()

    def loss(model: Any, inputs: Any) -> Tensor:
        found: Tensor = model.preference(inputs["x"], inputs["labels"])
        return found

    _trainer(ledger, model, loss, max_grad_norm=0.01, lr_scheduler_type="cosine")


PUBLIC_FRAMEWORKS: dict[str, tuple[str, Callable[[Ledger], None]]] = {
    "Lightning": ("lightning", lightning),
    "Lightning, clipped by value": ("lightning", lightning_by_value),
    "Lightning, clipped by norm": ("lightning", lightning_by_norm),
    "Lightning, two optimizers": ("lightning", lightning_two_optimizers),
    "Fabric": ("lightning", fabric),
    "Transformers": ("transformers", transformers),
    "TRL and PEFT": ("transformers", trl),
    "Accelerate": ("accelerate", accelerate),
}
"""Module that has to be installed, and the training, by what it is."""
