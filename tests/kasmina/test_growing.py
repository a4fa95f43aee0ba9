"""Growth: from a plateau to a fossil, as decisions allow it, or autonomously."""

import pytest
import torch
from kasmina.driven import AUTONOMOUS, MLP, Driven, agreed, grown_to, idle, said

from esper_otel.kasmina.slot import HARM_IN_A_ROW
from esper_otel.leyline import events
from esper_otel.leyline.decisions import FAILED_OPEN, NOT_ASKED, Action, SeedOperation
from esper_otel.leyline.stages import Stage

LIFE = ["germinate", "train", "blend", "shadow", "probate", "fossilize"]


def test_a_plateau_makes_a_seed_grow_as_tamiyo_allows_each_step():
    driven = Driven(slots=["1"])
    driven.until(lambda: driven.garden.slots["1"] is Stage.FOSSILIZED)
    done = [p.operation.value for p in driven.proposals if p is not None]
    assert done == LIFE
    assert driven.told(events.STAGE_CHANGED)[0] == "1-1: DORMANT to GERMINATED (germinated)"
    gates = driven.told(events.GATE)
    assert any("G1 before blend is open" in text for text in gates)
    assert not any("shut" in text for text in gates)


def test_a_garden_that_asks_does_nothing_by_itself_and_proposes_on():
    driven = Driven()
    for _ in range(20):
        driven.step(idle)
    assert driven.garden.stages == {}
    assert {p.operation for p in driven.proposals[5:]} == {SeedOperation.GERMINATE}
    assert len({p.seed_id for p in driven.proposals[5:]}) == 1


@pytest.mark.parametrize("reason", [*sorted(FAILED_OPEN), NOT_ASKED])
@pytest.mark.parametrize("enforced", [True, False])
def test_an_autonomous_garden_grows_when_nobody_answers(reason, enforced):
    driven = Driven(slots=["1"], settings=AUTONOMOUS)
    driven.until(
        lambda: driven.garden.slots["1"] is Stage.FOSSILIZED,
        lambda proposal: said(Action.CONTINUE, reason=reason),
        enforced,
    )
    assert [p.operation.value for p in driven.proposals if p] == LIFE


@pytest.mark.parametrize("action", [Action.OPTIMIZER, Action.PAUSE])
def test_an_autonomous_garden_heeds_a_decision_that_is_enforced(action):
    driven = Driven(settings=AUTONOMOUS)
    for _ in range(20):
        driven.step(lambda proposal: said(action, reason="a_rule"))
    assert driven.garden.stages == {}


def test_what_is_only_advised_is_not_done():
    driven = Driven()
    for _ in range(20):
        driven.step(agreed, enforced=False)
    assert driven.garden.stages == {}
    assert not driven.acted


def test_a_downgraded_operation_is_proposed_again_and_done_once():
    driven = grown_to(Stage.TRAINING)
    for _ in range(10):
        driven.step(lambda proposal: said(Action.OPTIMIZER, reason="loss_warning"))
    assert driven.garden.stages["s"] is Stage.TRAINING
    assert driven.frame.proposal.operation is SeedOperation.BLEND
    driven.step()
    assert driven.garden.stages["s"] is Stage.BLENDING
    assert len([text for text in driven.told(events.STAGE_CHANGED) if "BLENDING" in text]) == 1


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (said(Action.SEED, "gone", SeedOperation.BLEND), "there is no such seed"),
        (said(Action.SEED, "s", SeedOperation.FOSSILIZE), "it was not proposed"),
    ],
)
def test_a_decision_about_what_was_not_proposed_is_an_event(decision, words):
    driven = grown_to(Stage.TRAINING)
    driven.step(lambda proposal: decision)
    assert words in driven.told(events.REFUSED)[0]
    assert driven.garden.stages == {"s": Stage.TRAINING}


def test_a_seed_whose_gate_stays_shut_is_culled():
    driven = grown_to(Stage.TRAINING, settings={"gradient_ratio_max": 1.0})
    driven.until(lambda: "s" not in driven.garden.stages)
    assert any("G1 before blend is shut" in text for text in driven.told(events.GATE))
    assert "gradient" in driven.told(events.CULLED)[0]


def test_a_seed_does_not_go_on_while_steps_take_longer_than_before_it():
    driven = Driven(settings={"step_rise_max": 1.0, "patience_steps": 100})
    driven.seen_step_ms = 1.0
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    driven.until(lambda: driven.garden.stages.get("s") is Stage.TRAINING)
    driven.seen_step_ms = 10.0
    for _ in range(20):
        driven.step()
    assert driven.garden.stages == {"s": Stage.TRAINING}
    assert "steps take too long: 1 ms, now" in " ".join(driven.told(events.GATE))
    driven.seen_step_ms = 1.0
    driven.until(lambda: driven.garden.stages["s"] is Stage.BLENDING)


def test_a_seed_that_does_not_help_is_culled():
    driven = grown_to(Stage.BLENDING, settings={"loss_fall_min": 0.1})
    driven.until(lambda: "s" not in driven.garden.stages)
    assert "does not help" in driven.told(events.CULLED)[0]


def test_seeds_that_nobody_asked_for_come_one_after_the_other():
    driven = Driven(slots=["1", "3"], settings={"seeds_at_once": 1})
    driven.until(lambda: set(driven.garden.slots.values()) == {Stage.FOSSILIZED}, most=400)
    assert set(driven.garden.stages) == {"1-1", "3-1"}
    blueprints = [
        event.attributes["esper.blueprint"]
        for event in driven.events
        if event.attributes.get("esper.stage") == "GERMINATED"
    ]
    assert blueprints == [MLP, MLP]


def test_after_a_cull_the_next_seed_of_a_slot_is_of_the_next_blueprint():
    driven = Driven(slots=["1"], blueprints=[MLP, "bottleneck_conv", "low_rank"])
    for seed_id in ("1-1", "1-2", "1-3"):
        driven.until(lambda seed_id=seed_id: seed_id in driven.garden.stages)
        driven.garden.cull(seed_id)
    blueprints = [
        event.attributes["esper.blueprint"]
        for event in driven.events
        if event.attributes.get("esper.stage") == "GERMINATED"
    ]
    assert blueprints == [MLP, "low_rank", MLP]  # that for images does not fit


def test_a_loss_that_is_not_reported_is_no_plateau():
    driven = Driven()
    driven.seen_loss = float("nan")
    for _ in range(20):
        driven.step()
    assert driven.proposals == [None] * 20


def test_an_isolated_seed_trains_a_number_of_steps_however_long_it_waits():
    driven = grown_to(Stage.TRAINING, settings={"training_steps": 4})
    hook = driven.garden.slot("1").hook
    for _ in range(5):
        driven.step(lambda proposal: said(Action.OPTIMIZER))
    weights = [each.detach().clone() for each in hook.parameters()]
    for _ in range(5):
        driven.step(lambda proposal: said(Action.OPTIMIZER))
    assert all(torch.equal(a, b) for a, b in zip(weights, hook.parameters(), strict=True))
    assert driven.garden.slot("1").seed.train_steps == 4
    assert driven.frame.proposal.operation is SeedOperation.BLEND


def test_a_seed_that_does_harm_while_it_joins_is_culled_before_it_is_done():
    driven = grown_to(Stage.BLENDING, settings={"blending_steps": 1000, "loss_rise_max": 0.25})
    driven.seen_loss = 1.5
    before = driven.steps
    driven.until(lambda: "s" not in driven.garden.stages)
    assert driven.steps - before == HARM_IN_A_ROW
    assert "the loss rose: 1, now 1.5" in driven.told(events.CULLED)[0]


def test_the_same_decision_twice_is_done_once():
    driven = grown_to(Stage.TRAINING)
    driven.step(idle)
    driven.step(idle)
    decision = agreed(driven.frame.proposal)
    driven.step(lambda proposal: decision)
    assert driven.garden.stages["s"] is Stage.BLENDING
    assert not driven.garden.apply(decision, enforced=True)
    assert driven.garden.stages["s"] is Stage.BLENDING
