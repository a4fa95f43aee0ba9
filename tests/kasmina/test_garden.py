import gc
import itertools
import threading
import time
import weakref
from math import isfinite

import pytest
import torch
from kasmina.driven import MLP, AtOnce, Driven, agreed, host, idle, said
from torch import nn

from esper_otel.kasmina import isolation
from esper_otel.kasmina.blueprints import UnknownBlueprintError
from esper_otel.kasmina.context import MAX_EVENTS
from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.kernels import Fetch
from esper_otel.kasmina.slot import HARM_IN_A_ROW
from esper_otel.leyline import events
from esper_otel.leyline.decisions import (
    FAILED_OPEN,
    NOT_ASKED,
    Action,
    Finding,
    SeedOperation,
    Severity,
)
from esper_otel.leyline.metrics import SEED_KEYS
from esper_otel.leyline.stages import IllegalTransitionError, Stage
from testkit.patience import PATIENCE_S

LIFE = ["germinate", "train", "blend", "shadow", "probate", "fossilize"]
AUTONOMOUS = {"growth": "autonomous"}


@pytest.fixture
def driven():
    return Driven(settings={"blending_steps": 8, "embargo_steps": 3, "patience_steps": 50})


def grown_to(stage, **options):
    """A run whose one seed has just come to ``stage``."""
    driven = Driven(**options)
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    # Its kernel is there at once here, so who agrees sees no GERMINATED.
    decide = idle if stage is Stage.GERMINATED else agreed
    driven.until(lambda: driven.garden.stages.get("s") is stage, decide)
    return driven


# At plant time, and when it is called.


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (["feature"], "'feature' is no submodule.*expected one of 0, 1, 2, 3, 4"),
        (["1", "1"], "named twice"),
        ([], "at least one"),
    ],
)
def test_a_slot_that_cannot_be_is_refused_at_once(slots, words):
    model = host()
    with pytest.raises(GardenError, match=words):
        Garden(model, slots)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_with_replicas_is_refused() -> None:
    with pytest.raises(GardenError, match="DistributedDataParallel"):
        Garden(nn.DataParallel(nn.Linear(2, 2)), ["module"])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: g.germinate("9", MLP), GardenError, "'9': expected one of 1, 3"),
        (lambda g: g.germinate("1", "oak"), UnknownBlueprintError, "'oak': expected one of"),
        (lambda g: g.germinate("3", MLP, "s"), GardenError, "not used before"),
        (lambda g: g.germinate("3", MLP, ""), GardenError, "not used before"),
        (lambda g: g.germinate("1", MLP), GardenError, "it has seed 's'"),
        (lambda g: g.cull("t"), GardenError, "'t': expected one of s"),
    ],
)
def test_a_wrong_argument_is_an_error_of_the_call(call, error, words):
    driven = grown_to(Stage.GERMINATED)
    with pytest.raises(error, match=words):
        call(driven.garden)


def test_blueprints_of_a_garden_are_looked_up_when_it_is_planted():
    with pytest.raises(UnknownBlueprintError):
        Garden(host(), ["1"], blueprints=["oak"])


def test_a_slot_that_lies_fallow_takes_no_seed_and_a_fossil_is_not_culled():
    driven = grown_to(Stage.TRAINING)
    driven.garden.cull("s")
    driven.step()
    assert driven.garden.slots["1"] is Stage.EMBARGOED
    with pytest.raises(IllegalTransitionError):
        driven.garden.germinate("1", MLP)
    fossil = grown_to(Stage.FOSSILIZED)
    with pytest.raises(IllegalTransitionError):
        fossil.garden.cull("s")


def test_what_is_asked_for_waits_for_the_end_of_the_step(driven):
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    assert driven.garden.stages == {}
    assert set(driven.step(idle)) == {"s"}
    driven.garden.cull("s")
    assert driven.garden.stages == {"s": Stage.GERMINATED}
    assert driven.step() == {}


def test_a_germination_waits_until_its_slot_has_been_called():
    driven = Driven()
    driven.garden.germinate("1", MLP, "s")  # before the first forward
    driven.step(idle)
    assert driven.garden.stages == {"s": Stage.GERMINATED}


def test_kernels_that_are_asked_for_are_fetched_one_at_a_time(monkeypatch, driven):
    fetches = []

    def request(*_):
        fetches.append(Fetch(MLP, 1e9, lambda: 0))
        return fetches[-1]

    monkeypatch.setattr(AtOnce, "request", request)
    driven.step()
    for slot in ("1", "3"):
        driven.garden.germinate(slot, MLP)
    for _ in range(3):
        driven.step(idle)
    assert len(fetches) == 1
    fetches[0].abandon("raised ValueError: no")
    driven.step(idle)
    driven.step(idle)
    assert len(fetches) == 2


# The host.


def test_a_dormant_garden_changes_nothing_to_the_bit():
    bare, planted = Driven(garden=False), Driven(settings={"plateau_steps": 10**6})
    before = torch.get_rng_state()
    for _ in range(20):
        bare.train()
        planted.step()
    assert planted.losses == bare.losses
    assert torch.equal(torch.get_rng_state(), before)
    assert list(planted.host.state_dict()) == list(bare.host.state_dict())
    for a, b in zip(planted.host.parameters(), bare.host.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_a_seed_in_isolation_learns_and_the_host_does_not_feel_it():
    bare, planted = Driven(garden=False), Driven(settings={"training_steps": 10**6})
    planted.step()
    bare.train()
    planted.garden.germinate("1", MLP, "s")
    planted.until(lambda: planted.garden.stages.get("s") is Stage.TRAINING)
    seed = [each.detach().clone() for each in planted.garden.slot("1").hook.parameters()]
    for _ in range(20):
        planted.step()
    while bare.steps < planted.steps:
        bare.train()
    assert planted.losses == bare.losses
    now = list(planted.garden.slot("1").hook.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(seed, now, strict=True))


def test_uprooting_restores_the_host():
    driven = grown_to(Stage.FOSSILIZED)
    driven.garden.germinate("3", MLP, "t")
    driven.until(lambda: driven.garden.stages.get("t") is Stage.BLENDING)
    assert len(driven.optimizer.param_groups) == 2
    weights = {name: tensor.clone() for name, tensor in driven.host.state_dict().items()}
    weights = {name: weights[name] for name in host().state_dict()}
    assert len(driven.host.state_dict()) > len(weights)
    driven.garden.uproot()
    assert list(driven.host.state_dict()) == list(weights)
    driven.garden.uproot()  # once more is not wrong
    assert not any(module._forward_hooks for module in driven.host.modules())
    assert len(driven.optimizer.param_groups) == 1
    fresh = host()
    fresh.load_state_dict(weights)
    x, _ = driven.batch()
    assert torch.equal(driven.host(x), fresh(x))
    assert driven.step() == {}
    assert not driven.garden.planted
    assert set(driven.garden.slots.values()) == {Stage.TERMINATED}
    assert all(not isfinite(number) for number in driven.frame[1:4])


# Growing.


def test_a_plateau_makes_a_seed_grow_as_tamiyo_allows_each_step():
    driven = Driven(slots=["1"])
    driven.until(lambda: driven.garden.slots["1"] is Stage.FOSSILIZED)
    done = [p.operation.value for p in driven.proposals if p is not None]
    assert done == LIFE
    assert driven.told(events.STAGE_CHANGED)[0] == "1-1: DORMANT to GERMINATED (germinated)"
    gates = driven.told(events.GATE)
    assert any("G1 before blend is open" in text for text in gates)
    assert not any("shut" in text for text in gates)


def test_asked_it_does_nothing_by_itself_and_proposes_on():
    driven = Driven()
    for _ in range(20):
        driven.step(idle)
    assert driven.garden.stages == {}
    assert {p.operation for p in driven.proposals[5:]} == {SeedOperation.GERMINATE}
    assert len({p.seed_id for p in driven.proposals[5:]}) == 1


@pytest.mark.parametrize("reason", [*sorted(FAILED_OPEN), NOT_ASKED])
@pytest.mark.parametrize("enforced", [True, False])
def test_autonomous_it_grows_when_nobody_answers(reason, enforced):
    driven = Driven(slots=["1"], settings=AUTONOMOUS)
    driven.until(
        lambda: driven.garden.slots["1"] is Stage.FOSSILIZED,
        lambda proposal: said(Action.CONTINUE, reason=reason),
        enforced,
    )
    assert [p.operation.value for p in driven.proposals if p] == LIFE


@pytest.mark.parametrize("action", [Action.OPTIMIZER, Action.PAUSE])
def test_autonomous_it_heeds_a_decision_that_is_enforced(action):
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


def test_patience_does_not_run_out_in_a_pause():
    driven = grown_to(Stage.TRAINING, settings={"gradient_ratio_max": 1.0})
    driven.until(lambda: "is shut" in " ".join(driven.told(events.GATE)), idle)
    for _ in range(20):
        driven.step(paused())
    assert driven.frame.proposal is None


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


def test_seeds_of_its_own_accord_come_one_after_the_other():
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


# Telling.


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


def test_totals_are_of_all_seeds(driven):
    driven.step()
    assert not isfinite(driven.frame.fetch_ms)
    assert (driven.frame.live, driven.frame.violations) == (0, 0)
    for slot in ("1", "3"):
        driven.garden.germinate(slot, MLP)
    driven.until(lambda: len(driven.garden.stages) == 2)
    driven.step()
    assert driven.frame.live == 2
    assert driven.frame.fetch_ms == 0.5


# Pausing.


def paused(target=None, *findings):
    return lambda proposal: said(Action.PAUSE, target, reason="a_rule", findings=findings)


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
def test_autonomous_a_pause_stays_a_pause_while_nobody_answers(target):
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


# What goes wrong.


def test_a_leak_is_seen_on_its_step_and_three_in_a_row_open_the_breaker(monkeypatch):
    driven = grown_to(Stage.TRAINING, settings={"training_steps": 100, "isolation_every": 0})
    driven.step()
    monkeypatch.setattr(isolation, "cut", lambda activation: activation)
    key = "kasmina.seed.isolation_violations"
    assert driven.step(paused())["s"][key] == 1.0
    assert driven.step(paused())["s"][key] == 2.0
    assert driven.frame.violations == 2
    # Not even a pause keeps it: it is a fault, not growth.
    assert driven.step(paused()) == {}
    assert driven.frame.violations == 3
    assert len(driven.told(events.VIOLATION)) == 3
    assert "breaker" in driven.told(events.CULLED)[0]


def test_violations_that_are_not_in_a_row_do_not_open_it(monkeypatch):
    driven = grown_to(Stage.TRAINING, settings={"training_steps": 100})
    for _ in range(4):
        with monkeypatch.context() as patched:
            patched.setattr(isolation, "cut", lambda activation: activation)
            driven.step()
        driven.step()
    assert driven.garden.stages == {"s": Stage.TRAINING}
    assert driven.step()["s"]["kasmina.seed.isolation_violations"] == 4.0


def test_a_kernel_that_fails_is_identity_says_so_and_is_culled(monkeypatch, driven):
    monkeypatch.setattr(AtOnce, "reason", "took longer than 10 ms")
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    row = driven.step(idle)["s"]
    assert (row["kasmina.seed.kernel_attached"], row["kasmina.seed.fallback_used"]) == (0, 1)
    assert "took longer than 10 ms" in driven.told(events.FALLBACK)[0]
    assert driven.frame.proposal.operation is SeedOperation.CULL
    driven.step()
    assert driven.garden.stages == {}


def test_a_seed_that_makes_nan_is_left_out_and_culled():
    driven = grown_to(Stage.BLENDING, settings={"blending_steps": 100})
    driven.step()
    with torch.no_grad():
        for each in driven.garden.slot("1").hook.parameters():
            each.fill_(float("nan"))
    rows = [driven.step() for _ in range(3)]
    assert rows[0]["s"]["kasmina.seed.fallback_used"] == 1.0
    driven.step()
    assert driven.garden.stages == {}
    assert all(isfinite(loss) for loss in driven.losses)
    assert len(driven.told(events.FALLBACK)) == 1


def test_an_optimizer_that_raises_ends_its_seed_and_not_the_run():
    def made(parameters, rate):
        optimizer = torch.optim.SGD(parameters, lr=rate)
        optimizer.step = lambda: 1 / 0
        return optimizer

    driven = Driven(make_optimizer=made)
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    driven.until(lambda: "s" not in driven.garden.stages and driven.steps > 3)
    assert "ZeroDivisionError" in driven.told(events.FAULT)[0]
    assert driven.garden.slots["1"] is not Stage.GERMINATED


def test_culled_half_blended_nothing_of_it_is_left():
    driven = grown_to(Stage.BLENDING, settings={"blending_steps": 8})
    driven.until(lambda: driven.garden.slot("1").hook.alpha >= 0.5)
    module = weakref.ref(driven.garden.slot("1").hook.seed)
    trained = weakref.ref(next(driven.garden.slot("1").hook.parameters()))
    driven.garden.cull("s")
    assert driven.step() == {}
    alone = host()
    alone.load_state_dict(driven.host.state_dict())
    x, _ = driven.batch()
    assert torch.equal(driven.host(x), alone(x))
    gc.collect()
    assert module() is None
    assert trained() is None
    driven.until(lambda: driven.garden.slots["1"] is Stage.DORMANT)
    assert driven.garden.germinate("1", MLP) == "1-2"


def test_after_a_cull_the_slot_lies_fallow_by_the_clock_of_steps(driven):
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    driven.step()
    driven.garden.cull("s")
    driven.step()
    seen = []
    for _ in range(5):
        seen.append(driven.garden.slots["1"])
        driven.step(idle)
    assert seen == [Stage.EMBARGOED] * 2 + [Stage.DORMANT] * 3


def test_a_seed_that_somebody_still_holds_keeps_its_slot_from_being_reset():
    driven = grown_to(Stage.TRAINING)
    held = driven.garden.slot("1").hook.seed
    driven.garden.cull("s")
    for _ in range(10):
        driven.step(idle)
    assert driven.garden.slots["1"] is Stage.RESETTING
    assert "still referenced" in " ".join(driven.told(events.GATE))
    del held
    driven.step()
    assert driven.garden.slots["1"] is Stage.DORMANT


def test_a_module_that_takes_no_part_is_told_of_once():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return self.used(x)

    driven = Driven(garden=False)
    driven.host = Unused()
    driven.optimizer = torch.optim.SGD(driven.host.parameters(), lr=0.1)
    driven.garden = Garden(driven.host, ["unused"])
    for _ in range(3):
        driven.step()
    assert driven.told(events.UNUSED_SLOT) == ["slot 'unused' was not called in a whole step"]
    driven.garden.uproot()


@pytest.mark.parametrize("end", ["close", "uproot", "forget"])
def test_no_thread_outlives_its_garden(end):
    before = set(threading.enumerate())
    model = host()
    garden = Garden(model, ["1"])
    assert [each.name for each in set(threading.enumerate()) - before] == ["esper-kernel"]
    if end == "forget":
        del garden
        gc.collect()
    else:
        getattr(garden, end)()
    deadline = time.monotonic() + PATIENCE_S
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_events_nobody_takes_do_not_pile_up():
    driven = Driven()
    for number in range(3000):
        driven.garden._context.add_event("e", Severity.NORMAL, str(number))
    taken = driven.garden.take_events()
    assert len(taken) == MAX_EVENTS
    assert taken[-1].text == "2999"
    assert driven.garden.take_events() == []


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
