"""Two ranks' gardens in one process: what only one of them sees must reach the other."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from kasmina.driven import QUICK, AtOnce, Driven, about, agreed

from esper_otel.leyline.decisions import Decision
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.stages import Stage
from esper_otel.ranks.agreement import Agreement
from esper_otel.ranks.shared_garden import SharedGarden
from esper_otel.settings import EsperSettings

pytestmark = pytest.mark.torch


class ProcessGroup:
    """Of two ranks that take turns: each hears the greatest of what was sent until then."""

    size = 2

    def __init__(self, sent: list[list[bytes]], rank: int) -> None:
        self.leads = rank == 0
        self._all = sent
        self._mine = sent[rank]

    def send(self, data: bytes) -> Any:
        number = len(self._mine)
        self._mine.append(data)
        everybody = self._all

        class PendingReduce:
            def wait(self) -> bytes:
                came = [each[number] for each in everybody if len(each) > number]
                return bytes(max(bytes_) for bytes_ in zip(*came, strict=True))

        return PendingReduce()

    def average(self, gradients: Any, like: Any) -> Any:
        # Both have the same data.
        return list(gradients)

    def leave(self) -> None:
        pass


class Rank(Driven):
    def __init__(self, sent: list[list[bytes]], rank: int, settings: dict[str, Any]) -> None:
        super().__init__(garden=False)
        self.now = 0.0
        self.answer: Decision | None = None
        self.agreement = Agreement(ProcessGroup(sent, rank), "r")
        with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
            self.garden = SharedGarden(
                self.host,
                ["1"],
                agreement=self.agreement,
                settings=EsperSettings().changed(**{**QUICK, **settings}),
                clock=lambda: self.now,
            )

    def one_step(self) -> None:
        self.train()
        if self.answer is not None:  # it has come before the optimizer stepped
            self.agreement.submit_answer(self.answer)
        row = step_row()
        row[STEP_SLOT["loss_ewma"]] = row[STEP_SLOT["gradient_norm"]] = 1.0
        garden = self.garden
        garden.learn(self.optimizer)
        self.frame = garden.finalize(self.steps, row)
        garden.proposal_sent(self.steps)
        if self.agreement.leads:
            self.answer = about(self.steps, agreed(self.frame.proposal))
        garden.apply(self.agreement.settle(self.steps), enforced=True)

    @property
    def stage(self) -> Stage:
        return self.garden.slots["1"]

    @property
    def slot(self) -> Any:
        return self.garden.slot("1")


class Pair:
    def __init__(self, **settings: Any) -> None:
        sent: list[list[bytes]] = [[], []]
        self.first, self.second = (Rank(sent, rank, settings) for rank in range(2))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.first.one_step()
            self.second.one_step()

    def until(self, stage: Stage) -> None:
        """Steps to that stage, at each of which both are at the same."""
        for _ in range(100):
            self.step()
            assert self.first.stage is self.second.stage
            if self.first.stage is stage:
                return
        raise AssertionError(f"{stage.name} never came, but {self.first.stage.name}")

    @property
    def agrees(self) -> bool:
        return self.first.agreement.holds and self.second.agreement.holds


def test_a_seed_lives_its_life_on_both() -> None:
    pair = Pair()
    pair.until(Stage.FOSSILIZED)
    assert pair.agrees
    seeds = [list(each.slot.hook.parameters()) for each in (pair.first, pair.second)]
    assert all(map(torch.equal, *seeds))


def test_who_clips_the_model_meets_no_gradient_of_a_fossil_that_ranks_have_not_averaged() -> (
    None
):
    pair = Pair()
    pair.until(Stage.FOSSILIZED)
    rank = pair.first
    fossil = [each for name, each in rank.host.named_parameters() if "esper_fossil" in name]
    assert fossil
    assert len(fossil) < len(list(rank.host.parameters()))
    before = [each.detach().clone() for each in fossil]
    seen = []
    step = rank.optimizer.step
    rank.optimizer.step = lambda: (seen.append([each.grad for each in fossil]), step())
    for _ in range(2):
        pair.step()
    assert seen == [[None] * len(fossil)] * 2
    assert not any(map(torch.equal, fossil, before))
    rank.garden.uproot()


def culled(**settings: Any) -> Pair:
    """A pair whose seed has failed on the second rank alone."""
    pair = Pair(**settings)
    pair.until(Stage.BLENDING)
    with torch.no_grad():
        for each in pair.second.slot.hook.parameters():
            each.fill_(float("nan"))
    pair.until(Stage.EMBARGOED)
    return pair


def test_a_seed_that_fails_on_one_rank_goes_on_both() -> None:
    assert culled().agrees


def test_a_slot_is_sown_when_it_lies_fallow_on_no_rank() -> None:
    pair = culled(embargo_s=60.0)
    pair.first.now = 60.0
    pair.step(20)
    # The leader could, and waits for the other.
    assert (pair.first.stage, pair.second.stage) == (Stage.DORMANT, Stage.EMBARGOED)
    assert pair.first.frame.proposal is None
    pair.second.now = 60.0
    pair.step()
    pair.until(Stage.GERMINATED)
    assert pair.agrees


def test_gardens_that_differ_move_no_seed_any_more() -> None:
    pair = Pair(blending_steps=100)
    pair.until(Stage.BLENDING)
    pair.second.slot.lifecycle.dwelt += 1
    pair.step(2)
    both = pair.first, pair.second
    assert not any(each.agreement.holds for each in both)
    alphas = [each.slot.hook.alpha for each in both]
    pair.step(20)
    assert [each.slot.hook.alpha for each in both] == alphas
    assert [each.stage for each in both] == [Stage.BLENDING] * 2
