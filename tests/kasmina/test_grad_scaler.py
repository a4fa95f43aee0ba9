"""Seeds in a loop with a ``GradScaler``: as if there were none."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from kasmina.driven import QUICK, AtOnce, about, agreed, host
from torch import nn

from esper_otel.kasmina.garden import Garden
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings

pytestmark = pytest.mark.torch

SETTINGS = {**QUICK, "plateau_steps": 1_000_000, "training_steps": 6}


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    # Growth never: each step's scale is known to the tests.
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1_000_000)


class Loop:
    """A host with one seed; ``bad`` steps have a loss whose gradients are not finite."""

    def __init__(self, scaled, *, bad=(), seed_bad=(), fused=False, chunks=1) -> None:
        model = host()
        self.host = model
        # Momentum-free SGD shows every wrong factor, AdamW would hide most of them.
        optimizer = torch.optim.AdamW if fused else torch.optim.SGD
        options = {"fused": True} if fused else {}
        self.optimizer = optimizer(model.parameters(), lr=0.01, **options)
        with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
            self.garden = Garden(
                model,
                ["1"],
                settings=EsperSettings().changed(**SETTINGS),
                make_optimizer=lambda params, rate: torch.optim.SGD(params, lr=0.05),
                scaler=scaled,
            )
        self.scaler = scaled
        self.optimizer.register_step_post_hook(lambda *_: self._end())
        noise = torch.Generator().manual_seed(1)
        for step in range(30):
            x = torch.randn(6, 4, generator=noise)
            y = x.sum(1, keepdim=True).sin()
            if scaled is None and step in bad:
                continue
            self.optimizer.zero_grad()
            for some, target in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
                loss = nn.functional.mse_loss(model(some), target)
                if step in bad:
                    loss = loss * float("inf")
                (loss if scaled is None else scaled.scale(loss)).backward()
            if step in seed_bad:
                next(iter(self.seed)).grad[:] = float("inf")
            if scaled is None:
                self.optimizer.step()
            else:
                scaled.step(self.optimizer)
                scaled.update()
            if step == 2:
                self.garden.germinate("1", "residual_mlp", "s")

    @property
    def seed(self):
        return list(self.garden.slot("1").hook.parameters())

    def _end(self) -> None:
        row = step_row()
        row[STEP_SLOT["loss_ewma"]] = row[STEP_SLOT["gradient_norm"]] = 1.0
        self.garden.learn(self.optimizer)
        frame = self.garden.finalize(0, row)
        self.garden.proposal_sent(0)
        self.garden.apply(about(0, agreed(frame.proposal)), enforced=True)
        self.garden.take_events()


def alike(one: Loop, other: Loop) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip(
            [*one.host.parameters(), *one.seed],
            [*other.host.parameters(), *other.seed],
            strict=True,
        )
    )


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_a_seed_learns_as_if_the_loss_were_not_scaled(fused, chunks) -> None:
    # A power of two: scaling and unscaling are exact.
    plain = Loop(None, fused=fused, chunks=chunks)
    scaled = Loop(scaler(), fused=fused, chunks=chunks)
    assert list(scaled.garden.stages.values()) == [Stage.FOSSILIZED]
    assert alike(scaled, plain)


def test_without_the_unscaling_it_would_not() -> None:
    with patch("esper_otel.kasmina.host.SeedGradScaler.unscale", lambda *_: None):
        assert not alike(Loop(scaler()), Loop(None))


@pytest.mark.parametrize("bad", [[6], [6, 7], [4, 9, 14, 19, 24]])
def test_a_step_that_is_left_out_is_left_out_for_seeds(bad) -> None:
    plain, scaled = Loop(None, bad=bad), Loop(scaler(2.0**20), bad=bad)
    assert scaled.scaler.get_scale() == 2.0 ** (20 - len(bad))
    assert alike(scaled, plain)


def test_an_isolated_seed_that_overflows_loses_the_step_and_the_host_does_not() -> None:
    sound, overflows = Loop(scaler()), Loop(scaler(), seed_bad=[7])
    assert overflows.scaler.get_scale() == 1024.0
    assert all(bool(torch.isfinite(each).all()) for each in overflows.seed)
    assert not alike(sound, overflows)


def test_a_scaler_that_is_off_changes_nothing() -> None:
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert alike(Loop(off), Loop(None))


def test_the_scaler_is_given_back() -> None:
    loop = Loop(scaler())
    assert "update" in vars(loop.scaler)
    loop.garden.uproot()
    assert "update" not in vars(loop.scaler)
