"""Whole lives of a seed in the hosts and loops that people have.

Each way of training is run three times over the same batches: without a garden, with a
dormant one, and with a seed that goes from germination to fossil. Until the seed begins to
blend all three must be alike to the bit, in their losses and in the host's gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch
from zlib import crc32

import pytest
import torch
from kasmina.driven import QUICK, AtOnce, about, agreed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper_otel.kasmina import isolation
from esper_otel.kasmina.garden import Garden
from esper_otel.leyline import events
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings

pytestmark = pytest.mark.torch

STEPS = 28
SETTINGS = {**QUICK, "training_steps": 5, "plateau_steps": 1_000_000, "isolation_every": 1}
"""Seeds are sown by the test alone."""


@pytest.fixture(autouse=True)
def _alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


# --- hosts


class Digits(nn.Sequential):
    """A CNN with what makes trouble: dropout, batch statistics, work in place."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(6 * 16, 4),
        )


class Attends(nn.Module):
    """A transformer block as libraries write them: it returns (hidden, weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(hidden)
        attended, weights = self.attention(normed, normed, normed)
        return hidden + self.after(attended), weights


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, 8)
        self.block = Attends()
        self.head = nn.Linear(8, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden, _ = self.block(self.embedding(pixels.flatten(1).unflatten(1, (4, 4))))
        return self.head(hidden.mean(1))


class Checkpointed(nn.Sequential):
    """Forgets its activations, and computes them again in backward."""

    def __init__(self, reentrant: bool) -> None:
        self.reentrant = reentrant
        super().__init__(
            nn.Linear(16, 8),
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 8)),
            nn.Linear(8, 4),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        first, inner, last = self
        hidden = first(pixels.flatten(1))
        return last(checkpoint(inner, hidden, use_reentrant=self.reentrant))


# --- ways to train: from (called model, images, labels) to the loss, backward done


def whole(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def accumulated(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(())
    for some, labels in zip(x.chunk(3), y.chunk(3), strict=True):
        total = total + whole(lambda given: model(given) / 3, some, labels).detach()
    return total


def autocast(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    with torch.amp.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


class Way(NamedTuple):
    """A host, where its slot is, and how it is trained and called."""

    host: Callable[[], nn.Module]
    slot: str
    train: Callable[..., Tensor] = whole
    compiled: str = ""
    calls: frozenset[int] = frozenset({1})
    """How many times the seed is called in one step."""


TWICE = frozenset({2})
"""Forward, and again in backward."""

ONCE_MORE = frozenset({1, 2})
"""The first time without gradients, where an isolated seed has no part."""

WAYS = {
    "cnn": Way(Digits, "0"),
    "tuple": Way(Transformer, "block"),
    "inside a tuple": Way(Transformer, "block.after"),
    "accumulated": Way(Digits, "0", accumulated, calls=frozenset({3})),
    "bfloat16": Way(Digits, "0", autocast),
    "bfloat16 tuple": Way(Transformer, "block", autocast),
    "checkpointed": Way(lambda: Checkpointed(False), "1.0", calls=TWICE),
    "checkpointed whole": Way(lambda: Checkpointed(False), "1"),
    "checkpointed reentrant": Way(lambda: Checkpointed(True), "1.0", calls=ONCE_MORE),
    "compiled eager": Way(Digits, "0", compiled="eager"),
    "compiled aot": Way(Transformer, "block", compiled="aot_eager"),
}


class Life:
    """What one run left: a digest of loss and gradients per step, and what the garden did."""

    def __init__(self, way: Way, *, garden: bool, sown: bool) -> None:
        torch.manual_seed(0)
        self.host = way.host()
        optimizer = torch.optim.SGD(self.host.parameters(), lr=0.05, momentum=0.9)
        self.garden: Garden | None = None
        if garden:
            with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
                settings = EsperSettings().changed(**SETTINGS)
                self.garden = Garden(self.host, [way.slot], settings=settings)
        called = torch.compile(self.host, backend=way.compiled) if way.compiled else self.host
        self.told: list[int] = []
        self.stages: list[Stage] = []
        self.calls: list[int] = []
        self.rows: list[dict[str, float]] = []
        self.events: list[Any] = []
        noise = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            x = torch.randn(6, 1, 4, 4, generator=noise)
            y = torch.randint(4, (6,), generator=noise)
            optimizer.zero_grad()
            loss = way.train(called, x, y)
            told = [loss.detach(), *(each.grad for each in self.host.parameters())]
            self.told.append(crc32(b"".join(each.numpy().tobytes() for each in told)))
            optimizer.step()
            if self.garden is not None:
                self._tend(self.garden, step, optimizer, loss)
                if sown and step == 1:
                    self.garden.germinate(way.slot, blueprint_for(way), "seed")
        self.told_random = torch.get_rng_state()

    def _tend(self, garden: Garden, step: int, optimizer: Any, loss: Tensor) -> None:
        row = step_row()
        row[STEP_SLOT["loss_ewma"]] = float(loss.detach())
        row[STEP_SLOT["gradient_norm"]] = 1.0
        for path in garden.slots:
            slot = garden.slot(path)
            self.calls.append(slot.hook.calls)
            self.stages.append(slot.stage)
        garden.learn(optimizer)
        frame = garden.finalize(step, row)
        self.rows += [dict(enumerate(values)) for _, values in frame.seeds]
        garden.proposal_sent(step)
        garden.apply(about(step, agreed(frame.proposal)), enforced=True)
        self.events += garden.take_events()


def blueprint_for(way: Way) -> str:
    return "bottleneck_conv" if way.host is Digits else "residual_mlp"


@pytest.fixture(params=WAYS, ids=list(WAYS))
def way(request) -> Way:
    return WAYS[request.param]


# Dynamo hides this warning of its own from showing, which is too late where it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_seed_lives_from_germination_to_fossil_and_isolated_changes_nothing(way) -> None:
    bare = Life(way, garden=False, sown=False)
    dormant = Life(way, garden=True, sown=False)
    assert dormant.told == bare.told
    assert torch.equal(dormant.told_random, bare.told_random)

    lived = Life(way, garden=True, sown=True)
    assert list(lived.garden.stages.values()) == [Stage.FOSSILIZED]
    isolated = lived.stages.index(Stage.BLENDING)
    assert isolated > 4
    assert lived.told[:isolated] == bare.told[:isolated]
    assert lived.told[isolated + 1 :] != bare.told[isolated + 1 :]
    assert torch.equal(lived.told_random, bare.told_random)
    troubles = {events.FALLBACK, events.VIOLATION, events.FAULT, events.REFUSED}
    assert [each for each in lived.events if each.name in troubles] == []
    assert {count for count in lived.calls if count} == way.calls


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_leak_is_found_and_ends_the_seed(way, monkeypatch) -> None:
    monkeypatch.setattr(isolation, "cut", lambda activation: activation)
    lived = Life(way, garden=True, sown=True)
    assert lived.garden.stages == {}
    told = [each.name for each in lived.events]
    assert told.count(events.VIOLATION) == 3
    assert told.count(events.CULLED) == 1
