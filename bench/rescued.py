"""Whether a training is rescued from an accident: its learning rate × 30 from a step on.

The same character GPT twice, in a hand-written loop that warms up, follows a cosine, clips,
and sets the rate in the optimizer's groups at every step, as nanoGPT does; and in
Transformers' ``Trainer``, whose linear schedule with a warm-up sets it. Then the CNN of
``examples/digits.py`` with its ``MultiStepLR``, whose ``gamma`` is the mistake. Five random
seeds each, trained healthy and bare, and with the accident under ``advise`` and under
``enforce``, watched as scripts that know nothing of us are, by a ``tamiyo serve`` with the
default table. What counts is the mean loss at the end, on data that is not trained on.

    python -m bench.rescued [--json PATH]
"""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

from bench.figures import Figure, run
from bench.roundtrip import tamiyo
from bench.small_trainings import (
    HEALTHY,
    Characters,
    Course,
    Digits,
    quiet,
    train,
    watched,
)

BENCH = "rescued"
SEEDS = 5
AT = 150
"""The first step at the wrong rate."""

TIMES = 30
BAR = 1.1
LARGEST = 999.0
"""Stands for a loss beyond, or that is no number."""


class WrongRate(Course):
    """Thirty times the rate, from a step on."""

    def rate(self, step: int, rate: float) -> float:
        return TIMES * rate if step >= AT else rate


class Gpt(Characters):
    """The GPT of 64 dimensions."""

    steps = 400
    warmup = 40
    lowest = 0.1

    def __init__(self) -> None:
        super().__init__(width=64, context=48, batch_size=12, rate=4e-3)


def by_hand(accident: bool) -> float:
    """A hand-written loop."""
    return train(Gpt(), WrongRate() if accident else HEALTHY).loss


class ForTrainer(nn.Module):
    """The GPT as the Trainer calls it."""

    def __init__(self, work: Gpt) -> None:
        super().__init__()
        self.model = work.model
        self._loss = work.loss

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert input_ids is not None
        assert labels is not None
        return {"loss": self._loss((input_ids, labels))}


def by_trainer(accident: bool) -> float:
    """Transformers' Trainer."""
    import transformers as hf

    work = Gpt()
    pieces = [work.batch() for _ in range(work.steps)]
    linear = hf.get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        work.optimizer, work.warmup, work.steps
    ).lr_lambdas[0]

    def rate(step: int) -> float:  # the scheduler counts from 0
        return float(linear(step)) * (TIMES if accident and step + 1 >= AT else 1)

    class Trainer(hf.Trainer):
        def _remove_unused_columns(self, dataset: Any, description: Any = None) -> Any:
            return dataset

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=ForTrainer(work),
            args=hf.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=work.batch_size,
                max_steps=work.steps,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=torch.initial_seed() % 2**32,
            ),
            train_dataset=[
                {"input_ids": inputs, "labels": targets}
                for batch in pieces
                for inputs, targets in zip(*batch, strict=True)
            ],
            optimizers=(work.optimizer, LambdaLR(work.optimizer, rate)),
        )
        trainer.remove_callback(hf.PrinterCallback)
        trainer.train()
    return work.evaluate()


def digits(accident: bool) -> float:
    """The loop of ``examples/digits.py``."""
    work = Digits()
    schedule = MultiStepLR(work.optimizer, [AT - 1] if accident else [], gamma=TIMES)
    for _ in range(600):
        work.optimizer.zero_grad()
        loss = work.loss(work.batch())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(work.model.parameters(), work.clip)
        work.optimizer.step()
        schedule.step()
    return work.evaluate()


LOOPS: dict[str, Callable[[bool], float]] = {
    "character GPT, by hand": by_hand,
    "character GPT, Trainer": by_trainer,
    "digits CNN": digits,
}


def losses(
    loop: Callable[[bool], float], mode: str, accident: bool, socket: Path
) -> list[float]:
    """The last loss of each random seed."""
    ended = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        with watched(mode, socket):
            ended.append(min(loop(accident), LARGEST))
    return ended


def rows(name: str, loop: Callable[[bool], float], socket: Path) -> list[Figure]:
    """The rows of one loop."""
    healthy = losses(loop, "", False, socket)
    advised = losses(loop, "advise", True, socket)
    enforced = losses(loop, "enforce", True, socket)
    worst = max(range(SEEDS), key=lambda seed: enforced[seed] / healthy[seed])
    mean = statistics.mean
    return [
        Figure.at_most(
            BENCH,
            f"{name}: last loss over healthy, enforced, mean of {SEEDS} seeds",
            mean(enforced),
            "loss",
            mean(healthy),
            bar=BAR,
        ),
        Figure.report(
            BENCH, f"{name}: the same, worst seed", enforced[worst], "loss", healthy[worst]
        ),
        Figure.report(
            BENCH, f"{name}: the same, advised, mean", mean(advised), "loss", mean(healthy)
        ),
        Figure.report(
            BENCH, f"{name}: healthy, standard deviation", statistics.stdev(healthy), "loss"
        ),
    ]


def figures() -> list[Figure]:
    """All rows of this bench."""
    quiet()
    warnings.simplefilter("ignore")
    logging.getLogger("esper_otel").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        socket = Path(folder) / "tamiyo.sock"
        with tamiyo(socket):
            return [row for name, loop in LOOPS.items() for row in rows(name, loop, socket)]


if __name__ == "__main__":
    raise SystemExit(run(figures))
