"""Troubles: courses of a training on which something goes wrong from a step on.

Each is a mistake or a fault that happens to people, brought in where it would be.
"""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from bench.scenarios.training import Course, SeveralSources, Training
from bench.scenarios.workloads import Batch, mislabelled


class RateTimes50(Course):
    """A learning rate of 50 times what it was: ``gamma=50`` for ``gamma=0.5``."""

    times = 50.0

    def schedule(self, training: Training) -> None:
        if training.wrong:
            training.set_lr(self.times * training.lr)
        else:
            super().schedule(training)


class RateTimes10(RateTimes50):
    """A learning rate of 10 times what it was: ``gamma=10`` for ``gamma=0.1``."""

    times = 10.0


class RateZero(Course):
    """A schedule that ran out: the learning rate is 0."""

    def schedule(self, training: Training) -> None:
        if training.wrong:
            training.set_lr(0.0)
        else:
            super().schedule(training)


class TooMuchMomentum(Course):
    """Momentum (Adam: beta1) of 0.999, where 0.9 was meant to become 0.99."""

    def schedule(self, training: Training) -> None:
        super().schedule(training)
        if training.wrong:
            for group in training.work.optimizer.param_groups:
                if "momentum" in group:
                    group["momentum"] = 0.999
                else:
                    group["betas"] = (0.999, group["betas"][1])


class BetasSwapped(Course):
    """Adam's two betas in the wrong order."""

    def schedule(self, training: Training) -> None:
        super().schedule(training)
        if training.step == training.at:
            for group in training.work.optimizer.param_groups:
                group["betas"] = group["betas"][::-1]


class NanBatch(Course):
    """One bad batch; what becomes of the weights is up to the optimizer."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        return training.work.poisoned(batch) if training.step == training.at else batch


class Overflow(Course):
    """A loss scale that grows until gradients overflow, and nobody looks before the step."""

    def backward(self, training: Training, loss: Tensor) -> None:
        if training.at is None or not training.wrong:
            super().backward(training, loss)
            return
        # Powers of two: as long as nothing overflows, not a bit of a gradient changes.
        scale = 2.0 ** min(16 * (training.step - training.at + 1), 1000)
        super().backward(training, loss * scale)
        for parameter in training.parameters:
            if parameter.grad is not None:
                parameter.grad /= scale


class LabelsShuffled(Course):
    """Targets lose their order: a join on the wrong key."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        return mislabelled(batch) if training.wrong else batch


class LabelsRot(Course):
    """Ever more targets are wrong, one percent of them more with each step, to the last."""

    lasts = 100

    def batch(self, training: Training, batch: Batch) -> Batch:
        if training.at is None or not training.wrong:
            return batch
        return mislabelled(batch, min(1.0, 0.01 * (training.step - training.at + 1)))


class InputsCorrupted(Course):
    """The preprocessing of inputs is another one."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        return training.work.corrupted(batch) if training.wrong else batch


class InputsZero(Course):
    """Inputs are zeros: a buffer that is never filled."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        return (torch.zeros_like(batch[0]), batch[1]) if training.wrong else batch


class InputsTimes255(Course):
    """Inputs are 255 times as large: nobody divides them any more."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        return (255 * batch[0], batch[1]) if training.wrong else batch


class ConstantBatch(Course):
    """A loader gives the same batch over and over; or, by the step it begins at, a sample."""

    def batch(self, training: Training, batch: Batch) -> Batch:
        if training.at is None or not training.wrong:
            return batch
        if training.step == training.at:
            inputs, targets = batch
            if training.at % 2:
                inputs = inputs[:1].expand_as(inputs).clone()
                targets = targets[:1].expand_as(targets).clone()
            self._kept = inputs, targets
        return self._kept


class DeadParameters(Course):
    """The optimizer's parameters get no gradients, or, by the step it begins at, only zeros.

    The first is a model that was built anew, or frozen, behind its optimizer's back.
    """

    def backward(self, training: Training, loss: Tensor) -> None:
        super().backward(training, loss)
        if training.at is not None and training.wrong:
            for parameter in training.parameters:
                if training.at % 2 and parameter.grad is not None:
                    parameter.grad.zero_()
                else:
                    parameter.grad = None


class LossExplodes(Course):
    """The loss has the wrong sign: training climbs. What is told is the loss itself."""

    def backward(self, training: Training, loss: Tensor) -> None:
        super().backward(training, -loss if training.wrong else loss)


class GradientsScaled(Course):
    """The loss is scaled for half precision, and gradients are not unscaled."""

    def backward(self, training: Training, loss: Tensor) -> None:
        super().backward(training, loss * 1024.0 if training.wrong else loss)


class GradientsKept(Course):
    """``zero_grad`` is no longer called: gradients pile up."""

    def clear(self, training: Training) -> None:
        if not training.wrong:
            super().clear(training)


class GradientsVanish(Course):
    """Gradients are unscaled though the loss was not scaled."""

    def backward(self, training: Training, loss: Tensor) -> None:
        super().backward(training, loss / 65536.0 if training.wrong else loss)


class InputStall(Course):
    """Every batch comes late, by twice what a step takes."""

    def __init__(self) -> None:
        self._pace = Pace()

    def fetch(self, training: Training) -> None:
        self._pace.follow(training)
        if training.wrong:
            time.sleep(2 * self._pace.step_s)


class StepSlow(Course):
    """Something in the loop waits: a step takes six times what it did."""

    def __init__(self) -> None:
        self._pace = Pace()

    def fetch(self, training: Training) -> None:
        self._pace.follow(training)

    def forward(self, training: Training, batch: Batch) -> Tensor:
        if training.wrong:
            time.sleep(5 * self._pace.step_s)
        return super().forward(training, batch)


class TimeLeak(Course):
    """Each step takes a twentieth of a step longer than the one before, up to six steps."""

    lasts = 120

    def __init__(self) -> None:
        self._pace = Pace()

    def fetch(self, training: Training) -> None:
        self._pace.follow(training)

    def forward(self, training: Training, batch: Batch) -> Tensor:
        if training.at is not None and training.wrong:
            time.sleep(min(5.0, 0.05 * (training.step - training.at + 1)) * self._pace.step_s)
        return super().forward(training, batch)


class HookSlow(Course):
    """Decisions take 40 ms, within a deadline that somebody has raised."""

    def fetch(self, training: Training) -> None:
        if training.wrong:
            training.tape.delay_s = 0.04


class SourcesConflict(SeveralSources):
    """Half of the losses get the wrong sign.

    A garden waits for consent all the while, so that there is something to put off.
    """

    def begin(self, training: Training) -> None:
        work = training.work
        training.run.plant(
            work.model, work.slots, growth="asked", plateau_steps=1, plateau_improvement=1.0
        )

    def sign(self, training: Training, nth: int) -> float:
        return -1.0 if training.wrong and nth % 2 else 1.0


class Quiet(Course):
    """The process stands still between two steps, for sixty of them and twelve seconds."""

    def __init__(self) -> None:
        self._pace = Pace()

    def fetch(self, training: Training) -> None:
        self._pace.follow(training)
        if training.step == training.at:
            time.sleep(max(12.0, 60 * self._pace.step_s))


class Pace:
    """What a healthy step takes, as the run itself has shown."""

    def __init__(self) -> None:
        self._marks: deque[float] = deque(maxlen=9)
        self.step_s = 0.0

    def follow(self, training: Training) -> None:
        """A step begins."""
        if training.wrong:
            return
        self._marks.append(time.perf_counter())
        if len(self._marks) == self._marks.maxlen:
            self.step_s = median(later - mark for mark, later in pairwise(self._marks))
