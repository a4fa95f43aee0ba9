"""What growing brings: accuracy against the same host without seeds, and what it costs.

Trains the host of ``examples/grow.py`` three times for each of five random seeds and as many
steps: with a garden that grows by itself, without one, and from the start as wide as the
grown network has parameters. Then measures the thread time of the garden's part of a
step's end, with eight seeds alive, statistics off and on.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from bench.figures import Figure, percentile, run
from esper_otel.kasmina.garden import Garden
from esper_otel.leyline.decisions import NOT_ASKED, unanswered
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.process import start
from esper_otel.settings import EsperSettings
from examples.digits import evaluate, load
from examples.grow import SLOTS, TooSmall

BENCH = "growth"
SEEDS = 5
EPOCHS = 60
LIVE = 8
STEPS = 600
GERMINATING = 300
"""Steps within which all seeds train."""
WIDTHS = tuple((narrow, wide) for narrow in range(3, 9) for wide in range(narrow, narrow + 4))


class Trained(NamedTuple):
    """What became of one training."""

    accuracy: float
    parameters: int
    fossils: int = 0


def train(seed: int, *, grows: bool, widths: tuple[int, int] = (3, 4)) -> Trained:
    torch.manual_seed(seed)
    train_data, test_data = load(seed)
    loader = DataLoader(train_data, batch_size=64, shuffle=True)
    model = TooSmall(*widths)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    told = start(optimizer, mode="off")
    garden = None
    if grows:
        # A fetch may take its time here: what grows must not depend on a busy machine.
        garden = told.plant(
            model, SLOTS, growth="autonomous", plateau_steps=60, kernel_budget_ms=1000
        )
    for _ in range(EPOCHS):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            told.report(loss=loss)
            optimizer.step()
    # Those of seeds that are still growing count as well: they took part in the result.
    parameters = sum(p.numel() for p in model.parameters())
    fossils = 0
    if garden is not None:
        parameters += garden.parameters
        fossils = sum(stage.name == "FOSSILIZED" for stage in garden.stages.values())
    accuracy = evaluate(model.eval(), test_data)
    told.close()
    return Trained(accuracy, parameters, fossils)


def as_wide_as(parameters: int) -> tuple[int, int]:
    """Widths of the host whose number of parameters is nearest to that."""

    def distance(widths: tuple[int, int]) -> int:
        return abs(sum(p.numel() for p in TooSmall(*widths).parameters()) - parameters)

    return min(WIDTHS, key=distance)


def accuracy() -> list[Figure]:
    grown, plain, wide = [], [], []
    for seed in range(SEEDS):
        grown.append(train(seed, grows=True))
        plain.append(train(seed, grows=False))
        wide.append(train(seed, grows=False, widths=as_wide_as(grown[-1].parameters)))
    gains = [100 * (a.accuracy - b.accuracy) for a, b in zip(grown, plain, strict=True)]
    behind = [100 * (a.accuracy - b.accuracy) for a, b in zip(grown, wide, strict=True)]
    not_better = sum(gain <= 0 for gain in gains)

    def mean(trained: list[Trained]) -> float:
        return 100 * statistics.mean(each.accuracy for each in trained)

    return [
        Figure.at_most(
            BENCH,
            f"random seeds of {SEEDS} for which growing did not beat the host alone",
            not_better,
            "seeds",
            bar=1,
        ),
        Figure.report(BENCH, "test accuracy, grown", mean(grown), "%", mean(plain)),
        *spread("gain over the host alone", gains),
        Figure.report(BENCH, "the same, least", min(gains), "points"),
        Figure.report(BENCH, "the same, most", max(gains), "points"),
        Figure.report(
            BENCH,
            "test accuracy, host as large as the grown one from the start",
            mean(wide),
            "%",
            mean(plain),
        ),
        *spread("grown against that one", behind),
        Figure.report(
            BENCH,
            "parameters, grown",
            statistics.mean(each.parameters for each in grown),
            "parameters",
            statistics.mean(each.parameters for each in plain),
        ),
        Figure.report(
            BENCH,
            "parameters, as large from the start",
            statistics.mean(each.parameters for each in wide),
            "parameters",
        ),
        Figure.report(
            BENCH, "seeds fossilised", statistics.mean(each.fossils for each in grown), "seeds"
        ),
    ]


def spread(what: str, points: list[float]) -> list[Figure]:
    return [
        Figure.report(BENCH, f"{what}, mean", statistics.mean(points), "points"),
        Figure.report(
            BENCH, "the same, standard deviation", statistics.stdev(points), "points"
        ),
    ]


def finalize_us(isolation_every: int) -> tuple[list[float], list[float]]:
    """Thread time of finalize, and of the seeds' optimizers, of each step; in µs."""
    torch.manual_seed(0)
    host = nn.Sequential(*[nn.Linear(32, 32) for _ in range(LIVE)])
    optimizer = torch.optim.SGD(host.parameters(), lr=0.01)
    settings = EsperSettings().changed(
        growth="autonomous",
        training_steps=10**6,
        kernel_budget_ms=5000,
        isolation_every=isolation_every,
    )
    garden = Garden(host, map(str, range(LIVE)), settings=settings)
    row = step_row()
    for key, value in {"loss_ewma": 1.0, "gradient_norm": 1.0, "step_latency_ms": 2.0}.items():
        row[STEP_SLOT[key]] = value
    batch = torch.randn(32, 32)
    for slot in garden.slots:
        garden.germinate(slot, "residual_mlp")
    finalize: list[float] = []
    learn: list[float] = []
    step = 0
    while len(finalize) < STEPS:
        step += 1
        if step > STEPS + GERMINATING:
            raise RuntimeError(f"{LIVE} seeds do not train together: {garden.stages}")
        optimizer.zero_grad()
        host(batch).square().mean().backward()
        optimizer.step()
        began = time.thread_time_ns()
        garden.learn(optimizer)
        learnt = time.thread_time_ns()
        garden.finalize(step, row)
        finalized = time.thread_time_ns()
        garden.proposal_sent(step)
        garden.apply(unanswered("r", step, NOT_ASKED), enforced=False)
        garden.take_events()
        if all(stage.name == "TRAINING" for stage in garden.stages.values()) and (
            len(garden.stages) == LIVE
        ):
            learn.append((learnt - began) / 1e3)
            finalize.append((finalized - learnt) / 1e3)
    garden.uproot()
    # The first steps of a process are not what a step costs.
    return finalize[STEPS // 6 :], learn[STEPS // 6 :]


def cost() -> list[Figure]:
    off, learn = finalize_us(0)
    on, _ = finalize_us(1)
    off_us, on_us = percentile(off, 50), percentile(on, 50)
    return [
        Figure.at_most(
            BENCH, f"finalize, {LIVE} live seeds, statistics off, p50", off_us, "µs", bar=150
        ),
        Figure.report(BENCH, "the same, p95", percentile(off, 95), "µs"),
        Figure.report(
            BENCH, f"finalize, {LIVE} live seeds, statistics at every step, p50", on_us, "µs"
        ),
        Figure.report(BENCH, "finalize per seed, statistics on", on_us / LIVE, "µs"),
        Figure.report(BENCH, "optimizer of a seed, p50", percentile(learn, 50) / LIVE, "µs"),
    ]


def figures() -> list[Figure]:
    torch.set_num_threads(1)
    for signal in ("METRICS", "TRACES", "LOGS"):
        os.environ[f"OTEL_{signal}_EXPORTER"] = "none"
    return [*accuracy(), *cost()]


if __name__ == "__main__":
    sys.exit(run(figures))
