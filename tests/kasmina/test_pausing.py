"""A pause freezes what grows until somebody says that all is well."""

import pytest
import torch
from kasmina.driven import AUTONOMOUS, MLP, grown_to, idle, paused, said

from esper_otel.leyline import events
from esper_otel.leyline.decisions import (
    FAILED_OPEN,
    NOT_ASKED,
    Action,
    Finding,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.stages import Stage


def test_patience_does_not_run_out_in_a_pause():
    driven = grown_to(Stage.TRAINING, settings={"gradient_ratio_max": 1.0})
    driven.until(lambda: "is shut" in " ".join(driven.told(events.GATE)), idle)
    for _ in range(20):
        driven.step(paused())
    assert driven.frame.proposal is None


def finding(seed_id, action=Action.PAUSE):
    return Finding("a_rule", action, Severity.HIGH, "", {}, seed_id)


def test_a_pause_freezes_alpha_and_stages_and_a_nominal_decision_resumes_them():
    driven = grown_to(Stage.BLENDING)
    before = driven.step()["s"]
    driven.step(paused())
    frozen = [driven.step(paused())["s"] for _ in range(10)]
    for row in frozen[1:]:
        assert row["kasmina.seed.alpha"] == frozen[0]["kasmina.seed.alpha"]
        assert row["kasmina.seed.alpha_steps"] == before["kasmina.seed.alpha_steps"] + 1
    driven.step(idle)
    row = driven.step()["s"]
    assert row["kasmina.seed.alpha_steps"] == before["kasmina.seed.alpha_steps"] + 2
    assert len(driven.told(events.PAUSED)) == len(driven.told(events.RESUMED)) == 1


@pytest.mark.parametrize("reason", sorted(FAILED_OPEN))
def test_an_ask_without_an_answer_does_not_resume(reason):
    driven = grown_to(Stage.BLENDING)
    driven.step(paused())
    rows = [driven.step(lambda p: said(Action.CONTINUE, reason=reason))["s"] for _ in range(9)]
    assert len({row["kasmina.seed.alpha"] for row in rows}) == 1


@pytest.mark.parametrize("target", [None, "s"])
def test_a_pause_of_an_autonomous_garden_stays_a_pause_while_nobody_answers(target):
    driven = grown_to(Stage.TRAINING, settings=AUTONOMOUS)
    for _ in range(5):
        driven.step(lambda proposal: said(Action.OPTIMIZER, reason="a_rule"))
    driven.step(paused(target))
    for reason in [*sorted(FAILED_OPEN), NOT_ASKED]:
        driven.step(lambda proposal, reason=reason: said(Action.CONTINUE, reason=reason))
        assert driven.frame.proposal.operation is SeedOperation.BLEND
        assert driven.garden.stages == {"s": Stage.TRAINING}
    driven.step(idle)
    assert driven.garden.stages == {"s": Stage.BLENDING}


def test_a_pause_may_be_about_one_seed():
    driven = grown_to(Stage.BLENDING, settings={"blending_steps": 50})
    driven.garden.germinate("3", MLP, "t")
    driven.until(lambda: driven.garden.stages.get("t") is Stage.BLENDING)
    driven.step(paused("s"))
    first, last = [driven.step(paused("s")) for _ in range(5)][::4]
    key = "kasmina.seed.alpha"
    assert first["s"][key] == last["s"][key]
    assert first["t"][key] < last["t"][key]


def test_a_pause_names_every_seed_that_a_rule_found():
    driven = grown_to(Stage.BLENDING, settings={"blending_steps": 50})
    driven.garden.germinate("3", MLP, "t")
    driven.until(lambda: driven.garden.stages.get("t") is Stage.BLENDING)
    found = paused("s", finding("s"), finding("t"), finding(None, Action.OPTIMIZER))
    driven.step(found)
    first, last = [driven.step(found) for _ in range(5)][::4]
    assert first["t"]["kasmina.seed.alpha"] == last["t"]["kasmina.seed.alpha"]


def test_a_seed_that_is_to_be_culled_after_a_pause_does_not_become_part_of_the_host_first():
    driven = grown_to(Stage.PROBATIONARY, settings={**AUTONOMOUS, "probation_steps": 1})
    driven.step(paused())
    driven.until(lambda: driven.frame.proposal is not None, paused())
    assert driven.frame.proposal.operation is SeedOperation.FOSSILIZE
    driven.garden.cull("s")
    driven.step(idle)
    assert driven.frame.proposal is None
    assert driven.frame.live == 1
    driven.step(idle)
    assert "s" not in driven.garden.stages
    assert driven.told(events.CULLED)
    assert not driven.told(events.FAULT)


def test_what_the_user_asked_for_waits_for_the_end_of_a_pause():
    driven = grown_to(Stage.TRAINING, settings={"training_steps": 100})
    driven.step(paused())
    driven.garden.cull("s")
    for _ in range(5):
        driven.step(paused())
    assert "s" in driven.garden.stages
    driven.step(idle)
    driven.step()
    assert "s" not in driven.garden.stages
    assert len(driven.told(events.CULLED)) == 1


def test_a_frozen_seed_goes_on_learning():
    driven = grown_to(Stage.BLENDING)
    driven.step(paused())
    weights = [each.detach().clone() for each in driven.garden.slot("1").hook.parameters()]
    driven.step(paused())
    now = driven.garden.slot("1").hook.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(weights, now, strict=True))
