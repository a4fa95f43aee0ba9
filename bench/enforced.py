"""What enforcing avoids of the harm of lasting trouble, and what it costs where there is none.

Five kinds of trouble in six small trainings (:mod:`bench.small_trainings`), three random seeds
each, from the middle of the training on:

===================  ========================================================================
learning rate × 30   to the end: the schedule's mistake
momentum             0.9 → 0.999 to the end; of Adam: the two betas swapped
gradients            to the end: × 1024, a loss scale that nobody takes off; where the optimizer
                     or clipping makes up for that, ``zero_grad`` is not called any more
sign                 for 40 steps: updates go up the loss
batches              for 8 steps: inputs × 255, targets × 1000, or another tokenizer's letters
===================  ========================================================================

Each is trained healthy and bare, with the trouble under ``advise``, where nothing is changed,
and under ``enforce``, watched as a script that knows nothing of us is, by a ``tamiyo serve``
with the default table. What counts is the last loss on data that is not trained on: the *harm*
is what it is above the healthy twin's when advised, and enforcing avoids as much of it as it
brings the loss back. Where the advised run ends within 5 % of its healthy twin there was no
harm to avoid: these runs are counted, and are part of what enforcing may not make worse.

Then the same trainings and ten unusual ones (:mod:`bench.unusual_trainings`) without any
trouble, bare and enforced.

    python -m bench.enforced [--json PATH]
"""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim import SGD, RMSprop

from bench.figures import Figure, median, run
from bench.roundtrip import tamiyo
from bench.small_trainings import (
    HEALTHY,
    SMALL,
    Batch,
    Course,
    Factors,
    Sequence,
    Small,
    quiet,
    train,
    watched,
)
from bench.unusual_trainings import UNUSUAL

BENCH = "enforced"
SEEDS = range(3)
LARGEST = 1e6
"""Stands for a loss beyond, or that is no number; also for what is that many times another."""

HARMLESS = 1.05
"""Loss over the healthy twin's up to which there is no harm."""

AVOIDED = 0.8
WORSE = 1.05
COST = 1.02
"""Bars."""


class Descent(Factors):
    """The factorisation by plain descent, which takes gradients as large as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = SGD(self.model.parameters(), lr=2.0, momentum=0.9)


class Waves(Sequence):
    """The LSTM with momentum, which can go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = RMSprop(self.model.parameters(), lr=1e-3, momentum=0.9)


Make = Callable[[int], Small]
"""Makes a training for a random seed, which torch's generator has already."""

LOWEST = 0.1
"""Share of the rate that trainings end with: the common one of cosine schedules."""

FASTER = {"digits": 3, "regression": 2, "characters": 3, "autoencoder": 3, "sequence": 2}
"""Times the rates of the small trainings, which are low enough to survive much: with three
times these no training ends better."""


def small(name: str) -> Small:
    """One of the six small trainings."""
    makes = SMALL | {"factors": Descent, "sequence": Waves}
    work = makes[name]()
    work.lowest = LOWEST
    for group in work.optimizer.param_groups:
        group["lr"] *= FASTER.get(name, 1)
    return work


TRAININGS: dict[str, Make] = {
    name: lambda seed, name=name: small(name)  # type: ignore[misc]
    for name in SMALL
}


class Trouble(Course):
    """Something is wrong from step ``at`` on, for so many steps."""

    lasts = 1 << 30

    def __init__(self, at: int) -> None:
        self._at = at

    def is_on(self, step: int) -> bool:
        """Whether it is wrong in that step."""
        return self._at <= step < self._at + self.lasts


class WrongRate(Trouble):
    """Thirty times the rate."""

    def rate(self, step: int, rate: float) -> float:
        return 30 * rate if self.is_on(step) else rate


class WrongMomentum(Trouble):
    """Momentum of 0.999; Adam's betas the wrong way round."""

    def batch(self, step: int, work: Small, batch: Batch) -> Batch:
        if step == self._at:
            for group in work.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = group["betas"][::-1]
                else:
                    group["momentum"] = 0.999
        return batch


class WrongGradients(Trouble):
    """Gradients × 1024, or that pile up where this would not be felt."""

    def clear(self, step: int, work: Small) -> None:
        if not self.is_on(step) or _takes_them_as_they_are(work):
            super().clear(step, work)

    def gradients(self, step: int, work: Small) -> None:
        if self.is_on(step) and _takes_them_as_they_are(work):
            for parameter in work.model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 1024


def _takes_them_as_they_are(work: Small) -> bool:
    """Whether gradients of another size make updates of another size."""
    return isinstance(work.optimizer, SGD) and not work.clip


class WrongSign(Trouble):
    """Updates go up the loss."""

    lasts = 40

    def gradients(self, step: int, work: Small) -> None:
        if self.is_on(step):
            for parameter in work.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.neg_()


class WrongBatches(Trouble):
    """Data as another program would read it."""

    lasts = 8

    def batch(self, step: int, work: Small, batch: Batch) -> Batch:
        if not self.is_on(step):
            return batch
        inputs, targets = batch
        match type(work).__name__:
            case "Characters":  # the same file, with letters in another order
                return inputs.flip(0) // 2, targets
            case "Regression" | "Descent":
                return inputs, 1000 * targets
            case "Digits":
                return 255 * inputs, targets
            case _:
                return 255 * inputs, 255 * targets


TROUBLES: dict[str, Callable[[int], Trouble]] = {
    "learning rate × 30": WrongRate,
    "momentum": WrongMomentum,
    "gradients": WrongGradients,
    "sign": WrongSign,
    "batches": WrongBatches,
}


def begin(work: Small) -> int:
    """The first step at which something is wrong."""
    return work.steps // 2


class Compared(NamedTuple):
    """Last losses of one trouble in one training."""

    trouble: str
    training: str
    seed: int
    healthy: float
    advised: float
    enforced: float

    @property
    def harm(self) -> float:
        """The advised run's loss over the healthy one's."""
        return self.advised / self.healthy

    @property
    def is_harmed(self) -> bool:
        """Whether there was harm to avoid."""
        return self.harm > HARMLESS

    @property
    def avoided(self) -> float:
        """Share of the harm that enforcing avoided: 1 is all of it, below 0 it added some."""
        return min(1.0, (self.advised - self.enforced) / (self.advised - self.healthy))

    @property
    def worse(self) -> float:
        """The enforced run's loss over the better of the advised one's and what is no harm."""
        return self.enforced / max(self.advised, self.healthy)


def last_loss(
    make: Make,
    seed: int,
    mode: str,
    socket: Path,
    trouble: Callable[[int], Trouble] | None = None,
) -> float:
    """Train one and evaluate it."""
    torch.manual_seed(seed)
    work = make(seed)  # what some train before they begin is no part of this
    with watched(mode, socket):
        loss = train(work, trouble(begin(work)) if trouble else HEALTHY).loss
    return min(loss, LARGEST) if isfinite(loss) else LARGEST


def with_trouble(socket: Path, seeds: Iterable[int] = SEEDS) -> Iterator[Compared]:
    """All troubles in all trainings."""
    for seed in seeds:
        for training, make in TRAININGS.items():
            healthy = last_loss(make, seed, "", socket)
            for name, trouble in TROUBLES.items():
                advised, enforced = (
                    last_loss(make, seed, mode, socket, trouble)
                    for mode in ("advise", "enforce")
                )
                yield Compared(name, training, seed, healthy, advised, enforced)


def without_trouble(
    socket: Path, seeds: Iterable[int] = SEEDS
) -> Iterator[tuple[str, float, float]]:
    """By training: last losses without us, and enforced."""
    for seed in seeds:
        for name, make in (TRAININGS | UNUSUAL).items():
            bare, enforced = (last_loss(make, seed, mode, socket) for mode in ("", "enforce"))
            yield name, bare, enforced


def of_trouble(compared: list[Compared]) -> Iterator[Figure]:
    """The rows of trainings with trouble."""
    harmed = [each for each in compared if each.is_harmed]
    yield Figure.at_most(
        BENCH,
        "harm left of what advised trainings suffer, median of those that suffer any",
        1 - median([each.avoided for each in harmed]),
        "of the harm",
        bar=round(1 - AVOIDED, 2),
    )
    # Beside a loss without a bound any other is next to no harm: so this is told as well.
    yield Figure.report(
        BENCH,
        "the same: last loss over healthy, enforced, median",
        median([each.enforced / each.healthy for each in harmed]),
        "times",
    )
    yield Figure.report(
        BENCH,
        "trainings in which there was no harm to avoid",
        len(compared) - len(harmed),
        "trainings",
        len(compared),
    )
    yield Figure.at_most(
        BENCH,
        "last loss over advised, or over healthy where advised ended lower, worst",
        max(each.worse for each in compared),
        "times",
        bar=WORSE,
    )
    yield Figure.report(
        BENCH,
        f"trainings made worse by more than {WORSE - 1:.0%}",
        sum(each.worse > WORSE for each in compared),
        "trainings",
        len(compared),
    )
    for each in compared:
        if each.worse > WORSE:
            yield Figure.report(
                BENCH,
                f"{each.training}, {each.trouble}, seed {each.seed}: made worse",
                each.enforced,
                "loss",
                max(each.advised, each.healthy),
            )
    for part, names in (("trouble", TROUBLES), ("training", TRAININGS)):
        for name in names:
            those = [each for each in compared if name == getattr(each, part)]
            suffer = [each for each in those if each.is_harmed]
            yield Figure.report(
                BENCH,
                f"{name}: trainings that suffer, advised",
                len(suffer),
                "trainings",
                len(those),
            )
            if not suffer:
                continue
            for mode in ("advised", "enforced"):
                over = [getattr(each, mode) / each.healthy for each in suffer]
                yield Figure.report(
                    BENCH,
                    f"{name}: last loss over healthy, {mode}, median",
                    min(median(over), LARGEST),
                    "times",
                )
            yield Figure.report(
                BENCH,
                f"{name}: harm left, enforced, median",
                1 - median([each.avoided for each in suffer]),
                "of the harm",
            )


def of_health(ratios: dict[str, list[float]]) -> Iterator[Figure]:
    """The rows of trainings without trouble; ``ratios`` are last losses over those without
    us, by training."""
    every = [ratio for each in ratios.values() for ratio in each]
    yield Figure.at_most(
        BENCH,
        "no trouble, last loss over the same without, worst",
        max(every),
        "times",
        bar=COST,
    )
    yield Figure.report(
        BENCH,
        "no trouble, trainings that are not the same to the bit",
        sum(ratio != 1.0 for ratio in every),
        "trainings",
        len(every),
    )
    for name, each in ratios.items():
        if max(each) != 1.0 or min(each) != 1.0:
            yield Figure.report(BENCH, f"no trouble, {name}, worst", max(each), "times")


def figures() -> list[Figure]:
    """All rows of this bench."""
    quiet()
    logging.getLogger("esper_otel").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        socket = Path(folder) / "tamiyo.sock"
        with tamiyo(socket):
            ratios: dict[str, list[float]] = {}
            for name, bare, enforced in without_trouble(socket):
                ratios.setdefault(name, []).append(enforced / bare)
            return [*of_trouble(list(with_trouble(socket))), *of_health(ratios)]


if __name__ == "__main__":
    raise SystemExit(run(figures))
