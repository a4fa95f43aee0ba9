"""Healthy courses: what trainings do that looks unusual and is right."""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import os
import tempfile
from math import cos, pi

import torch
from torch import Tensor

from bench.scenarios.training import Course, Training
from bench.scenarios.workloads import Batch, Workload, epochs


class Warmup(Course):
    """The learning rate rises a hundredfold over the first third."""

    def schedule(self, training: Training) -> None:
        share = min(1.0, 3 * training.step / training.steps)
        training.set_lr(training.lr * (0.01 + 0.99 * share))


class Cosine(Course):
    """The learning rate falls to a hundredth, along half a cosine."""

    def schedule(self, training: Training) -> None:
        training.set_lr(training.lr * _fallen(training.step / training.steps))


class StepDecay(Course):
    """The learning rate falls to a tenth after a third, and again after two."""

    def schedule(self, training: Training) -> None:
        training.set_lr(training.lr * 0.1 ** (3 * (training.step - 1) // training.steps))


class WarmRestarts(Course):
    """Four cosines, one after the other: three times the rate jumps a hundredfold."""

    def schedule(self, training: Training) -> None:
        training.set_lr(training.lr * _fallen(4 * training.step / training.steps % 1.0))


class OneCycle(Course):
    """Up to three times the learning rate and down again, and momentum against it."""

    def begin(self, training: Training) -> None:
        self._scheduler = torch.optim.lr_scheduler.OneCycleLR(
            training.work.optimizer, max_lr=3 * training.lr, total_steps=training.steps + 1
        )

    def schedule(self, training: Training) -> None:
        """The scheduler does, after the step."""

    def stepped(self, training: Training) -> None:
        self._scheduler.step()


class Evaluations(Course):
    """Between steps, now and then, the loss on other data, five times over."""

    def stepped(self, training: Training) -> None:
        if training.step % max(training.steps // 8, 1) == 0:
            for _ in range(5):
                training.work.evaluate()


class Checkpoints(Course):
    """Now and then everything is written to a disk."""

    def stepped(self, training: Training) -> None:
        if training.step % max(training.steps // 6, 1) == 0:
            with tempfile.NamedTemporaryFile() as file:
                work = training.work
                torch.save((work.model.state_dict(), work.optimizer.state_dict()), file)
                file.flush()
                os.fsync(file.fileno())


class BatchSizes(Course):
    """Batches twice as large after a third, half as large after two."""

    def fetch(self, training: Training) -> None:
        third = 3 * (training.step - 1) // training.steps
        training.batch_size = (training.work.batch_size * (2, 4, 1)[third]) // 2


class SmallBatches(Course):
    """Four samples a batch: everything is noise."""

    def begin(self, training: Training) -> None:
        training.batch_size = 4
        training.lr /= 4


class MicroBatches(Course):
    """Two batches of half the size to a step."""

    def backward(self, training: Training, loss: Tensor) -> None:
        """Done as part of forward, each after its own."""

    def forward(self, training: Training, batch: Batch) -> Tensor:
        losses = []
        for half in zip(*(each.chunk(2) for each in batch), strict=True):
            loss = training.work.loss(half)
            (loss / 2).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.stack(losses).mean()


class FineTuning(Course):
    """The run begins where another has ended, with a tenth of the learning rate."""

    def prepare(self, work: Workload, steps: int) -> None:
        batches = epochs(work, work.batch_size)
        for _ in range(min(steps // 3, 200)):
            work.optimizer.zero_grad()
            work.loss(next(batches)).backward()  # type: ignore[no-untyped-call]
            work.optimizer.step()

    def begin(self, training: Training) -> None:
        training.lr /= 10


def _fallen(share: float) -> float:
    """From 1 to 0.01 along half a cosine."""
    return 0.01 + 0.99 * (1 + cos(pi * share)) / 2
