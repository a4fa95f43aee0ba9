"""Six small trainings whose last loss tells whether an accident on the way was survived.

===============  ============================================================================
``digits``       a CNN tells scanned digits apart; Adam, clipped gradients
``regression``   a perceptron learns a smooth function of eight numbers; SGD with momentum
``characters``   a GPT guesses the next letter of Python's help texts; AdamW, clipped
``autoencoder``  scanned digits through a bottleneck of 16 numbers; Adam
``sequence``     an LSTM goes on with a sum of two sines; RMSprop, clipped
``factors``      a matrix of rank 4 from a third of its entries; Adagrad
===============  ============================================================================

Each is a loop as people write it, which knows nothing of us: the rate is set in the
optimizer's groups at every step, rises over a warm-up and comes down to a hundredth, so that
the loss at the end is not that of a moment. A training and its twin with another course draw
the same batches. All randomness is torch's global generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import cos, inf, isfinite, nan, pi
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from bench.scenarios.workloads import Letters
from examples.digits import DigitsNet

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""


class Small:
    """A training before it begins."""

    steps = 240
    warmup = 20
    lowest = 0.01
    """Share of its rate that it ends with."""

    clip = 0.0
    model: nn.Module
    optimizer: Optimizer

    def batch(self) -> Batch:
        """The next batch."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        raise NotImplementedError

    def held_out(self) -> Batch:
        """Data that is not trained on."""
        raise NotImplementedError

    def poisoned(self, batch: Batch) -> Batch:
        """The batch as one bad sample makes it: its loss is NaN."""
        inputs = batch[0].clone()
        inputs[0] = nan
        return inputs, batch[1]

    def evaluate(self) -> float:
        """Loss on data that is not trained on; infinite where it is no number."""
        with torch.no_grad():
            loss = float(self.loss(self.held_out()))
        return loss if isfinite(loss) else inf

    @property
    def finite(self) -> bool:
        """Whether all weights are."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())


def some(data: Batch, count: int) -> Batch:
    """``count`` samples at random."""
    chosen = torch.randint(len(data[0]), (count,))
    return data[0][chosen], data[1][chosen]


@cache
def scans() -> Batch:
    """Digits (1797, 1, 8, 8) with pixels from 0 to 1, and which digits they are."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


class Digits(Small):
    """The CNN of ``examples/digits.py``."""

    steps = 360
    clip = 5.0

    def __init__(self, rate: float = 2e-3) -> None:
        order = torch.randperm(1797)
        images, labels = (each[order] for each in scans())
        self._train, self._held_out = (
            (images[:1347], labels[:1347]),
            (images[1347:], labels[1347:]),
        )
        self.model = DigitsNet()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)

    def batch(self) -> Batch:
        """64 scans."""
        return some(self._train, 64)

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """450 scans."""
        return self._held_out


class Regression(Small):
    """A perceptron of two hidden layers."""

    steps = 600

    def __init__(self) -> None:
        inputs = torch.rand(1200, 8) * 2 - 1
        targets = (3 * inputs[:, :1]).sin() + inputs[:, 1:2] * inputs[:, 2:3]
        targets = targets + 0.1 * torch.randn_like(targets)
        self._train, self._held_out = (
            (inputs[:800], targets[:800]),
            (inputs[800:], targets[800:]),
        )
        self.model = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def batch(self) -> Batch:
        """64 points."""
        return some(self._train, 64)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error."""
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """400 points."""
        return self._held_out


@cache
def text() -> tuple[Tensor, int]:
    """Python's help texts as numbers of letters, and how many letters there are."""
    letters = "".join(topics[name] for name in sorted(topics))
    number = {letter: i for i, letter in enumerate(sorted(set(letters)))}
    return torch.tensor([number[letter] for letter in letters]), len(number)


class Characters(Small):
    """A GPT of two layers."""

    steps = 300
    clip = 1.0

    def __init__(
        self, width: int = 32, context: int = 32, batch_size: int = 12, rate: float = 3e-3
    ) -> None:
        self._text, letters = text()
        self.context, self.batch_size = context, batch_size
        self._end = 9 * len(self._text) // 10
        self._held_out = self._cut(range(self._end, len(self._text) - context - 1, context))
        self.model = Letters(letters, context, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)

    def _cut(self, starts: range | list[int]) -> Batch:
        places = torch.tensor(list(starts))[:, None] + torch.arange(self.context)
        return self._text[places], self._text[places + 1]

    def batch(self) -> Batch:
        """Pieces from anywhere in the first nine tenths of the text."""
        return self._cut(torch.randint(self._end - self.context, (self.batch_size,)).tolist())

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy per letter that counts: padding, which is -1, does not."""
        logits, targets = self.model(batch[0]).flatten(0, 1), batch[1].flatten()
        counts = (targets >= 0).float()
        losses = functional.cross_entropy(logits, targets.clamp(min=0), reduction="none")
        return (losses * counts).sum() / counts.sum()

    def held_out(self) -> Batch:
        """96 pieces of the last tenth."""
        inputs, targets = self._held_out
        spread = torch.linspace(0, len(inputs) - 1, 96).long()
        return inputs[spread], targets[spread]

    def poisoned(self, batch: Batch) -> Batch:
        """All of it is padding: the mean of nothing."""
        return batch[0], torch.full_like(batch[1], -1)


class Autoencoder(Small):
    """Two layers down to 16 numbers and two up again."""

    steps = 600

    def __init__(self) -> None:
        images = scans()[0].flatten(1)[torch.randperm(1797)]
        self._train, self._held_out = (images[:1347],) * 2, (images[1347:],) * 2
        self.model = nn.Sequential(
            *(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16)),
            *(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 64)),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)

    def batch(self) -> Batch:
        """64 scans."""
        return some(self._train, 64)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error of what comes out."""
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """450 scans."""
        return self._held_out


class Lstm(nn.Module):
    """One layer of 32 units, and the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(1, 32, batch_first=True)
        self.next = nn.Linear(32, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        """The number after each; both (batch, length, 1)."""
        following: Tensor = self.next(self.cells(numbers)[0])
        return following


class Sequence(Small):
    """An LSTM."""

    steps = 400
    clip = 1.0

    def __init__(self) -> None:
        self.model = Lstm()
        self.optimizer = torch.optim.RMSprop(self.model.parameters(), lr=3e-3)
        self._held_out = self._waves(128)

    @staticmethod
    def _waves(count: int) -> Batch:
        slow, fast = 0.2 + 0.2 * torch.rand(2, count, 1, 1)
        times = torch.arange(25.0)[None, :, None]
        waves = (slow * times + 6 * torch.rand(count, 1, 1)).sin() + (2 * fast * times).sin()
        return waves[:, :-1], waves[:, 1:]

    def batch(self) -> Batch:
        """32 waves of 24 numbers."""
        return self._waves(32)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error of the next number."""
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """128 waves."""
        return self._held_out


class Table(nn.Module):
    """Rows and columns as points whose inner products are the entries."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(size, rank), nn.Embedding(size, rank)
        for points in (self.rows, self.columns):
            nn.init.normal_(points.weight, std=0.1)

    def forward(self, places: Tensor) -> Tensor:
        """Entries at (row, column)."""
        entries: Tensor = (self.rows(places[:, 0]) * self.columns(places[:, 1])).sum(1)
        return entries


class Factors(Small):
    """The factorisation of a matrix of which a part is known."""

    steps = 1000
    size, rank = 60, 4

    def __init__(self) -> None:
        whole = torch.randn(self.size, self.rank) @ torch.randn(self.rank, self.size) / 2
        places = torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size))
        places = places[torch.randperm(len(places))]
        entries = whole[places[:, 0], places[:, 1]]
        entries += 0.1 * torch.randn_like(entries)
        known = len(places) // 3
        self._train = places[:known], entries[:known]
        self._held_out = places[known:], entries[known:]
        self.model = Table(self.size, self.rank)
        self.optimizer = torch.optim.Adagrad(self.model.parameters(), lr=0.3)

    def batch(self) -> Batch:
        """256 entries."""
        return some(self._train, 256)

    def loss(self, batch: Batch) -> Tensor:
        """Mean square error."""
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def held_out(self) -> Batch:
        """The entries that are not known."""
        return self._held_out

    def poisoned(self, batch: Batch) -> Batch:
        """One entry is NaN: a table with a gap in it."""
        entries = batch[1].clone()
        entries[0] = nan
        return batch[0], entries


SMALL: dict[str, Callable[[], Small]] = {
    "digits": Digits,
    "regression": Regression,
    "characters": Characters,
    "autoencoder": Autoencoder,
    "sequence": Sequence,
    "factors": Factors,
}


class Course:
    """What happens on the way: here nothing, which is a healthy training."""

    def rate(self, step: int, rate: float) -> float:
        """The rate of that step, where the schedule has ``rate``."""
        return rate

    def batch(self, step: int, work: Small, batch: Batch) -> Batch:
        """The batch as it reaches the model."""
        return batch

    def loss(self, step: int, loss: Tensor) -> Tensor:
        """The loss that backward begins from."""
        return loss

    def clear(self, step: int, work: Small) -> None:
        """Gradients of the last update are not needed any more."""
        work.optimizer.zero_grad(set_to_none=True)

    def gradients(self, step: int, work: Small) -> None:
        """After backward, before clipping."""


HEALTHY = Course()


class Outcome(NamedTuple):
    """How a training ended."""

    loss: float
    """On data that is not trained on; infinite where it is no number."""
    finite: bool
    """Whether all weights are."""


def share(step: int, work: Small) -> float:
    """Share of its rate in that step, from 1: a linear warm-up, and a cosine."""
    if step < work.warmup:
        return step / work.warmup
    done = (step - work.warmup) / (work.steps - work.warmup)
    return work.lowest + (1 - work.lowest) * (1 + cos(pi * done)) / 2


def train(work: Small, course: Course = HEALTHY) -> Outcome:
    """Train to the end, as a hand-written loop does."""
    optimizer, parameters = work.optimizer, list(work.model.parameters())
    own = [group["lr"] for group in optimizer.param_groups]
    for step in range(1, work.steps + 1):
        now = share(step, work)
        for rate, group in zip(own, optimizer.param_groups, strict=True):
            group["lr"] = course.rate(step, rate * now)
        batch = course.batch(step, work, work.batch())
        course.clear(step, work)
        loss = course.loss(step, work.loss(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        course.gradients(step, work)
        if work.clip:
            nn.utils.clip_grad_norm_(parameters, work.clip)
        optimizer.step()
    return Outcome(work.evaluate(), work.finite)


@contextmanager
def watched(mode: str, socket: Path, **settings: Any) -> Iterator[None]:
    """This process as ``esper-otel run --mode MODE`` has it, with ``settings``; "" leaves it
    bare."""
    if not mode:
        yield
        return
    from esper_otel.integrations.torch import TorchInstrumentor

    TorchInstrumentor().instrument(
        skip_dep_check=True,
        mode=mode,
        tamiyo_socket=str(socket),
        summary="off",
        **settings,
    )
    try:
        yield
    finally:
        TorchInstrumentor().uninstrument()


def quiet() -> None:
    """One core, and no telemetry but what the sidecar is asked with."""
    torch.set_num_threads(1)
    for signal in ("METRICS", "TRACES", "LOGS"):
        os.environ[f"OTEL_{signal}_EXPORTER"] = "none"
