"""What snapshots to go back to cost, and whether a training whose weights are lost comes back.

A character GPT trains with a snapshot about every 100 steps beside the same without, in blocks
that alternate. Then three small trainings meet an accident: one whose weights become NaN from
one step to the next, and one whose learning rate is 100 times its own for 20 steps. Each is
trained healthy and bare, and with the accident under ``enforce`` with snapshots and without,
watched as scripts that know nothing of us are, by a ``tamiyo serve`` with the default table.
What counts is the mean loss at the end, on data that is not trained on.

    python -m bench.snapshots [--json PATH]
"""

# ruff: noqa: D102 (what a method is for is said where it is overridden: Course)

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from math import nan
from pathlib import Path

import torch

from bench.figures import Figure, alternate, median, run
from bench.roundtrip import tamiyo
from bench.small_trainings import (
    HEALTHY,
    SMALL,
    Batch,
    Characters,
    Course,
    Small,
    quiet,
    train,
    watched,
)

BENCH = "snapshots"
BLOCKS, BLOCK_STEPS = 8, 400
EVERY = 100
"""Of the cost."""

OFTEN, RELEASE = 25, 50
"""Steps between snapshots, and until a cut rate is given back, in small trainings."""

LONGER = 3
"""Times as long as elsewhere: what is lost by going back is a small part of a training."""

SEEDS = 3
AT, LASTS = 150, 20
TIMES = 100
BAR = 1.1
COST_BAR = 1.05
LARGEST = 999.0
"""Stands for a loss beyond, or that is no number."""


class LostWeights(Course):
    """All weights are NaN before a step."""

    def batch(self, step: int, work: Small, batch: Batch) -> Batch:
        if step == AT:
            with torch.no_grad():
                for parameter in work.model.parameters():
                    parameter.fill_(nan)
        return batch


class RateSlip(Course):
    """A hundred times the rate, for some steps."""

    def rate(self, step: int, rate: float) -> float:
        return TIMES * rate if AT <= step < AT + LASTS else rate


ACCIDENTS: dict[str, Callable[[], Course]] = {
    "NaN weights": LostWeights,
    f"rate × {TIMES} for {LASTS} steps": RateSlip,
}
TRAININGS = ("digits", "regression", "characters")


class Gpt(Characters):
    """A GPT of 128 dimensions."""

    steps = BLOCK_STEPS

    def __init__(self) -> None:
        super().__init__(width=128, context=32, batch_size=12)


def block(every: int, socket: Path) -> float:
    """Milliseconds per step of one training."""
    torch.manual_seed(0)
    work = Gpt()
    with watched("enforce", socket, snapshot_every=every):
        began = time.perf_counter()
        train(work, HEALTHY)
        return (time.perf_counter() - began) * 1e3 / work.steps


def cost(socket: Path) -> list[Figure]:
    """Rows on time and memory."""
    from esper_otel import process

    with_, without = alternate(lambda: block(EVERY, socket), lambda: block(0, socket), BLOCKS)
    torch.manual_seed(0)
    work = Gpt()
    with watched("enforce", socket, snapshot_every=EVERY):
        train(work, HEALTHY)
        current = process.automatic()
        assert current is not None
        report = current._responses.restoring.report
    assert report is not None
    weights = sum(p.numel() * p.element_size() for p in work.model.parameters())
    name = f"GPT of {weights / 4e6:.2g} million weights with AdamW"
    return [
        Figure.at_most(
            BENCH,
            f"{name}: a step, with a snapshot about every {EVERY} steps and without",
            median(with_),
            "ms",
            median(without),
            bar=COST_BAR,
        ),
        Figure.report(BENCH, f"{name}: one copy, of the training thread", report.copy_ms, "ms"),
        Figure.report(
            BENCH,
            f"{name}: host memory of all snapshots, and of the weights",
            report.bytes / 1e6,
            "MB",
            weights / 1e6,
        ),
    ]


def losses(
    name: str, course: Callable[[], Course], mode: str, every: int, socket: Path
) -> list[float]:
    """The last loss of each random seed."""
    ended = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        with watched(mode, socket, snapshot_every=every, release_steps=RELEASE):
            work = SMALL[name]()
            work.steps *= LONGER
            ended.append(min(train(work, course()).loss, LARGEST))
    return ended


def rows(name: str, accident: str, healthy: list[float], socket: Path) -> list[Figure]:
    """The rows of one training that meets one accident."""
    course, mean = ACCIDENTS[accident], statistics.mean
    back = losses(name, course, "enforce", OFTEN, socket)
    without = losses(name, course, "enforce", 0, socket)
    label = f"{name}, {accident}"
    worst = max(range(SEEDS), key=lambda seed: back[seed] / healthy[seed])
    return [
        Figure.at_most(
            BENCH,
            f"{label}: last loss over healthy, with snapshots, mean of {SEEDS} seeds",
            mean(back),
            "loss",
            mean(healthy),
            bar=BAR,
        ),
        Figure.report(
            BENCH, f"{label}: the same, worst seed", back[worst], "loss", healthy[worst]
        ),
        Figure.report(
            BENCH,
            f"{label}: the same without snapshots, mean",
            mean(without),
            "loss",
            mean(healthy),
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
            found = cost(socket)
            for name in TRAININGS:
                healthy = losses(name, lambda: HEALTHY, "", 0, socket)
                for accident in ACCIDENTS:
                    found += rows(name, accident, healthy, socket)
    return found


if __name__ == "__main__":
    raise SystemExit(run(figures))
