"""A garden: what it refuses, what its host feels of it, and its end."""

import gc
import threading
import time
from math import isfinite

import pytest
import torch
from kasmina.driven import MLP, AtOnce, Driven, grown_to, host, idle
from torch import nn

from esper_otel.kasmina.blueprints import UnknownBlueprintError
from esper_otel.kasmina.context import MAX_EVENTS
from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.kernels import Fetch
from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.stages import IllegalTransitionError, Stage
from testkit.patience import PATIENCE_S


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


def test_what_is_asked_for_waits_for_the_end_of_the_step():
    driven = Driven()
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


def test_kernels_that_are_asked_for_are_fetched_one_at_a_time(monkeypatch):
    driven = Driven()
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
