"""What a garden tells of its seeds: a row for each, and totals."""

import itertools
from math import isfinite

import pytest
from kasmina.driven import MLP, Driven, grown_to, idle

from esper_otel.kasmina import isolation
from esper_otel.leyline import events
from esper_otel.leyline.metrics import SEED_KEYS
from esper_otel.leyline.stages import Stage


def test_a_seed_in_blending_reports_what_the_registry_promises():
    driven = grown_to(Stage.BLENDING, settings={"blending_steps": 8, "isolation_every": 1})
    alphas = []
    for steps in range(1, 9):
        row = driven.step(idle)["s"]
        assert row["kasmina.seed.stage"] == Stage.BLENDING
        assert row["kasmina.seed.alpha_steps"] == steps
        assert row["kasmina.seed.kernel_attached"] == 1.0
        assert row["kasmina.seed.last_kernel_latency_ms"] > 0.0
        assert row["kasmina.seed.isolation_violations"] == 0.0
        assert row["kasmina.seed.fallback_used"] == 0.0
        alphas.append(row["kasmina.seed.alpha"])
    assert set(row) == set(SEED_KEYS)
    assert all(a < b for a, b in itertools.pairwise(alphas))
    assert alphas[-1] == 1.0
    assert row["kasmina.seed.isolation.seed_norm"] > 0.0
    assert type(driven.frame.seeds[0][1][0]) is float


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.SHADOWING])
def test_alpha_steps_are_told_in_blending_only(stage):
    row = grown_to(stage).step(idle)["s"]
    assert "kasmina.seed.alpha_steps" not in row
    assert row["kasmina.seed.alpha"] == (1.0 if stage is Stage.SHADOWING else 0.0)


def test_statistics_are_told_of_the_steps_they_were_taken_in():
    driven = grown_to(Stage.TRAINING, settings={"isolation_every": 3, "training_steps": 100})
    told = ["kasmina.seed.isolation.host_norm" in driven.step()["s"] for _ in range(9)]
    assert sum(told) == 3
    assert told[:3] == told[3:6] == told[6:]


def test_statistics_that_raise_leave_their_three_metrics_out_and_all_else_in(monkeypatch):
    driven = grown_to(Stage.TRAINING, settings={"isolation_every": 1, "training_steps": 100})
    whole = driven.step()["s"]

    def broken(self):
        raise RuntimeError("statistics are out")

    monkeypatch.setattr(isolation.GradientTally, "statistics", broken)
    for _ in range(3):
        row = driven.step()["s"]
    lost = {f"kasmina.seed.isolation.{name}" for name in ("dot", "host_norm", "seed_norm")}
    assert set(whole) - set(row) == lost
    assert len(driven.told(events.FAULT)) == 1


def test_totals_are_of_all_seeds():
    driven = Driven()
    driven.step()
    assert not isfinite(driven.frame.fetch_ms)
    assert (driven.frame.live, driven.frame.violations) == (0, 0)
    for slot in ("1", "3"):
        driven.garden.germinate(slot, MLP)
    driven.until(lambda: len(driven.garden.stages) == 2)
    driven.step()
    assert driven.frame.live == 2
    assert driven.frame.fetch_ms == 0.5
