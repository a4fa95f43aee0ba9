"""What recording and asking add to a step of a small transformer on a GPU.

Trains it in this process in blocks that alternate: bare, recorded, and recorded with a sidecar
that is asked at every step. Time per step is that of the whole block, the device included; CPU
is that of the training thread. ``ESPER_GPU_DEVICE=cpu`` tries the bench itself. Its rows are
not in ``bench/RESULTS.md``: ``make test-gpu`` writes them to ``bench/GPU_RESULTS.md``.

    python -m bench.gpu [--json PATH]
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from bench.figures import Figure, alternate, median, run
from bench.training import sidecar

BENCH = "gpu"
DEVICE = os.environ.get("ESPER_GPU_DEVICE", "cuda")
BLOCKS, BLOCK_STEPS = (12, 200) if DEVICE == "cuda" else (1, 3)
BATCH, LENGTH, WIDTH, LAYERS, WORDS = 16, 128, 256, 4, 1000
ADDED_BAR = 1.05
"""Of a step's time: what recording may add."""


class Took(NamedTuple):
    """Milliseconds per step of a block, and microseconds of CPU of the training thread."""

    wall_ms: float
    cpu_us: float


class Training:
    """A small language model on numbers that mean nothing."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True)
        self.model = nn.Sequential(
            nn.Embedding(WORDS, WIDTH),
            nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False),
            nn.Linear(WIDTH, WORDS),
        ).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        words = torch.randint(WORDS, (32, BATCH, LENGTH))
        self.batches = words.pin_memory() if DEVICE == "cuda" else words

    def step(self, number: int) -> None:
        """One of them."""
        words = self.batches[number % len(self.batches)].to(DEVICE, non_blocking=True)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(words).flatten(0, 1), words.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def block(self, steps: int = BLOCK_STEPS) -> Took:
        """So many steps."""
        began, cpu = time.perf_counter(), time.thread_time()
        for number in range(steps):
            self.step(number)
        cpu = time.thread_time() - cpu
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return Took((time.perf_counter() - began) * 1e3 / steps, cpu * 1e6 / steps)


@contextmanager
def watched(mode: str) -> Iterator[None]:
    """This process is instrumented."""
    from esper_otel.integrations.torch import TorchInstrumentor

    instrumentor = TorchInstrumentor()
    instrumentor.instrument(skip_dep_check=True, mode=mode)
    try:
        yield
    finally:
        instrumentor.uninstrument()


def figures() -> list[Figure]:
    """All rows of this bench."""
    with tempfile.TemporaryDirectory() as name, sidecar(Path(name)) as environment:
        os.environ.update(environment)
        training = Training()
        training.block()

        def observed(mode: str) -> Took:
            with watched(mode):
                training.block(5)  # what is made once is not what a step costs
                return training.block()

        return [
            row
            for mode, words in (("off", "recorded"), ("advise", "recorded and asking"))
            for row in compared(
                words, *alternate(partial(observed, mode), training.block, BLOCKS)
            )
        ]


def compared(words: str, ours: list[Took], bare: list[Took]) -> list[Figure]:
    """Rows of one way, beside bare blocks."""
    return [
        Figure.at_most(
            BENCH,
            f"time per step, {words}, over bare",
            median([each.wall_ms for each in ours]),
            "ms",
            median([each.wall_ms for each in bare]),
            bar=ADDED_BAR,
        ),
        Figure.report(
            BENCH,
            f"CPU of the training thread per step, {words}, over bare",
            median([each.cpu_us for each in ours]),
            "µs",
            median([each.cpu_us for each in bare]),
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(run(figures))
