"""The same small training under each framework, for benches and tests.

Each loop of :data:`FRAMEWORKS` trains on :data:`ROWS` samples in batches of :data:`BATCH`,
an optimizer step per ``accumulate`` of them, and returns the loss of every batch. With
``watch`` it adds our callback; without, it knows nothing of us. Raises ``ImportError``
where the framework is not installed.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from testkit.quiet_trainers import lightning_trainer, transformers_arguments
from testkit.stopwatch import STOPWATCH

ROWS, BATCH = 64, 8


def dataset() -> TensorDataset:
    x = torch.linspace(-1, 1, ROWS * 4).reshape(ROWS, 4)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=BATCH)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return STOPWATCH.on(torch.optim.Adam(model.parameters(), lr=1e-3))


def plain(accumulate: int = 1, watch: bool = False) -> list[float]:
    """No framework; ``watch`` is not for it."""
    model = network()
    optimizer = adam(model)
    losses = []
    for i, (x, y) in enumerate(loader()):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def lightning(accumulate: int = 1, watch: bool = False) -> list[float]:
    """With a validation loop in the middle of the epoch."""
    import lightning.pytorch as pl

    losses = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss = nn.functional.mse_loss(self.network(x), y)
            losses.append(loss.item())
            return loss

        def on_validation_start(self) -> None:
            self.evaluating = perf_counter_ns()

        def validation_step(self, batch: Any, index: int) -> None:
            pass

        def on_validation_end(self) -> None:
            STOPWATCH.evaluated(self.evaluating, alone=False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

    callbacks: list[Any] = []
    if watch:
        from esper_otel.integrations.lightning import EsperCallback

        callbacks = [EsperCallback()]
    trainer = lightning_trainer(
        accumulate_grad_batches=accumulate, val_check_interval=4, callbacks=callbacks
    )
    trainer.fit(Module(), loader(), loader())
    return losses


def transformers(accumulate: int = 1, watch: bool = False) -> list[float]:
    import transformers as hf

    losses = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(
            self, x: Tensor | None = None, labels: Tensor | None = None
        ) -> dict[str, Tensor]:
            if x is None or labels is None:
                raise ValueError("expected x and labels")
            loss = nn.functional.mse_loss(self.network(x), labels)
            losses.append(loss.item())
            return {"loss": loss}

    class Trainer(hf.Trainer):
        def create_optimizer(self, *args: Any) -> Any:
            return STOPWATCH.on(super().create_optimizer(*args))

    callbacks: list[Any] = []
    if watch:
        from esper_otel.integrations.transformers import EsperCallback

        callbacks = [EsperCallback()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=Model(),
            args=transformers_arguments(
                folder,
                BATCH,
                gradient_accumulation_steps=accumulate,
                learning_rate=1e-3,
                max_grad_norm=0,
            ),
            train_dataset=[
                {"x": x, "labels": y} for x, y in zip(*dataset().tensors, strict=True)
            ],
            callbacks=callbacks,
        )
        trainer.remove_callback(hf.PrinterCallback)
        trainer.train()
    return losses


def accelerate(accumulate: int = 1, watch: bool = False) -> list[float]:
    trackers: list[Any] = []
    if watch:
        from esper_otel.integrations.accelerate import EsperTracker

        trackers = [EsperTracker()]
    # Untyped, most of it.
    accelerator: Any = importlib.import_module("accelerate").Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, log_with=trackers
    )
    accelerator.init_trackers("test")
    model = network()
    optimizer = adam(model)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    losses = []
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    return losses


FRAMEWORKS: dict[str, Callable[..., list[float]]] = {
    "plain": plain,
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
}
