"""The loop that all scenarios share, with the places where something can go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench.scenarios.tape import Tape
from bench.scenarios.workloads import Batch, Workload, epochs
from esper_otel.process import start
from esper_otel.run import Run
from esper_otel.tolaria.gradients import pcgrad

SOURCES = 4
"""Gradient sources of a training that has several."""


class Training:
    """One training under way.

    ``at`` is the step from which on something is wrong, None in a healthy training;
    courses that find out late when it begins set it themselves.
    """

    def __init__(self, work: Workload, steps: int, at: int | None, tape: Tape) -> None:
        self.work = work
        self.steps = steps
        self.at = at
        self.tape = tape
        self.step = 0
        """The step under way, from 1."""
        self.lr: float = work.optimizer.param_groups[0]["lr"]
        """The learning rate that the workload is made for."""
        self.batch_size = work.batch_size
        # Answers are waited for: a slow one then costs its whole delay, however long a step
        # takes, and a garden that was not answered proposes again at every step.
        self.run: Run = start(
            work.optimizer, mode="off", wait_for_decisions=True, run_id=tape.name
        )
        tape.attach(self.run)

    @property
    def wrong(self) -> bool:
        """Whether the trouble has begun."""
        return self.at is not None and self.step >= self.at

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the model, seeds left out."""
        return list(self.work.model.parameters())

    def set_lr(self, rate: float) -> None:
        """From the next optimizer step on."""
        for group in self.work.optimizer.param_groups:
            group["lr"] = rate


class Course:
    """What is peculiar about a training: here nothing, which is a healthy one.

    Methods are called in the order in which they stand. ``ranks`` is how many processes
    train together, ``lasts`` how many steps a trouble takes to come about in full.
    """

    ranks = 1
    lasts = 0

    def prepare(self, work: Workload, steps: int) -> None:
        """Before the run begins."""

    def begin(self, training: Training) -> None:
        """Before the first step."""

    def fetch(self, training: Training) -> None:
        """While the loop waits for a batch."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        """The batch as it reaches the model."""
        return batch

    def clear(self, training: Training) -> None:
        """Forget the gradients of the step before."""
        training.work.optimizer.zero_grad()

    def schedule(self, training: Training) -> None:
        """Set the learning rate: by default a linear warm-up and then its own."""
        share = training.step / training.work.warmup if training.work.warmup else 1.0
        training.set_lr(training.lr * min(1.0, share))

    def forward(self, training: Training, batch: Batch) -> Tensor:
        """The loss."""
        return training.work.loss(batch)

    def backward(self, training: Training, loss: Tensor) -> None:
        """Gradients of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def stepped(self, training: Training) -> None:
        """After the optimizer's step."""

    def end(self, training: Training) -> None:
        """After the last step, also when the training fails."""


class SeveralSources(Course):
    """A healthy training on four losses, joined by PCGrad.

    Each leaves out another quarter of the batch, so that they agree as related tasks do.
    """

    def sign(self, training: Training, nth: int) -> float:
        """Of the loss of the ``nth`` source."""
        return 1.0

    def forward(self, training: Training, batch: Batch) -> Tensor:
        """The mean loss, gradients and conflict rate of the sources."""
        parameters = training.parameters
        losses, gradients = [], []
        inputs, targets = (each.chunk(SOURCES) for each in batch)
        for nth in range(SOURCES):
            others = [quarter for quarter in range(SOURCES) if quarter != nth]
            loss = training.work.loss(
                (
                    torch.cat([inputs[i] for i in others]),
                    torch.cat([targets[i] for i in others]),
                )
            )
            losses.append(loss)
            sign = self.sign(training, nth)
            gradients.append(torch.autograd.grad(sign * loss, parameters))
        surgery = pcgrad(gradients)
        for parameter, gradient in zip(parameters, surgery.gradient, strict=True):
            assert isinstance(gradient, Tensor)
            parameter.grad = gradient
        training.run.report(grad_conflict_rate=surgery.conflict_rate)
        return torch.stack(losses).mean()

    def backward(self, training: Training, loss: Tensor) -> None:
        """Nothing: the gradients are there."""


def train(training: Training, course: Course) -> None:
    """Train to the end of ``training``, by the course it takes."""
    work, run = training.work, training.run
    try:
        course.begin(training)
        batches = _fetched(training, course)
        for fetched in run.batches(batches) if work.watched else batches:
            batch = course.batch(training, fetched)
            course.clear(training)
            course.schedule(training)
            with run.phase("forward"):
                loss = course.forward(training, batch)
            with run.phase("backward"):
                course.backward(training, loss)
            if work.clip:
                norm = nn.utils.clip_grad_norm_(training.parameters, work.clip)
                run.report(gradient_norm=norm)
            run.report(loss=loss)
            work.optimizer.step()
            course.stepped(training)
    finally:
        course.end(training)
        run.close()


def _fetched(training: Training, course: Course) -> Iterator[Batch]:
    """Batches for as many steps as the training has; the batch size may change on its way."""
    size = training.batch_size
    batches = epochs(training.work, size)
    for _ in range(training.steps):
        training.step += 1
        course.fetch(training)
        if training.batch_size != size:
            size = training.batch_size
            batches = epochs(training.work, size)
        yield next(batches)
