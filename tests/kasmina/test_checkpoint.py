"""A run that is cut and goes on from a checkpoint is the run that was not cut, to the bit."""

import copy
import io
from unittest.mock import patch

import pytest
import torch
from kasmina.cut_runs import MADE, another, assert_same_life, lived, settled_in
from kasmina.driven import MLP, QUICK, AtOnce, Driven, idle, said
from torch import nn

from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.hook import ALTERED
from esper_otel.kasmina.kernels import Fetch
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Action
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings


@pytest.mark.parametrize(
    ("stage", "blending"),
    [
        (Stage.GERMINATED, "channelwise"),
        (Stage.TRAINING, "convex"),
        (Stage.TRAINING, "channelwise"),
        (Stage.BLENDING, "convex"),
        (Stage.BLENDING, "residual"),
        (Stage.BLENDING, "channelwise"),
        (Stage.BLENDING, "confidence"),
        (Stage.SHADOWING, "convex"),
        (Stage.SHADOWING, "channelwise"),
        (Stage.PROBATIONARY, "confidence"),
        (Stage.FOSSILIZED, "convex"),
        (Stage.FOSSILIZED, "residual"),
        (Stage.FOSSILIZED, "channelwise"),
        (Stage.FOSSILIZED, "confidence"),
        (Stage.EMBARGOED, "convex"),
    ],
)
def test_a_run_cut_at_any_stage_goes_on_as_if_it_had_not_been(stage, blending):
    driven = settled_in(stage, blending=blending)
    resumed = another(driven, blending=blending).resume(driven.saved())
    assert resumed.garden.slots == driven.garden.slots
    assert resumed.garden.stages == driven.garden.stages
    uncut = lived(driven, 40)
    assert_same_life(lived(resumed, 40), uncut)
    assert Stage.FOSSILIZED in uncut[0][-1][-1].values()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_a_run_cut_at_any_step_of_blending_goes_on_as_if_it_had_not_been(schedule):
    driven = settled_in(Stage.BLENDING, alpha_schedule=schedule)
    while driven.garden.slots["1"] is Stage.BLENDING:
        resumed = another(driven, alpha_schedule=schedule).resume(driven.saved())
        beside = copy.deepcopy(driven.losses)
        assert_same_life(lived(resumed, 3), lived(driven, 3))
        assert driven.losses[: len(beside)] == beside


def test_a_seed_blends_by_the_course_it_began_whatever_the_settings_are_now():
    driven = settled_in(Stage.BLENDING)
    changed = another(driven, blending_steps=2, alpha_schedule="linear", blending="residual")
    uncut = lived(driven, 8)
    assert_same_life(
        lived(changed.resume(settled_in(Stage.BLENDING).saved()), 8),
        uncut,
    )


@pytest.mark.parametrize("fossils", ["join", "stay"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_several_fossils_come_back_to_where_they_were_in_the_host_s_optimizer(
    fossils, scheduled
):
    def follow_rate(driven):
        if scheduled:
            return torch.optim.lr_scheduler.StepLR(driven.optimizer, 5)
        return None

    options = {**MADE["settings"], "fossils": fossils}
    driven = Driven(("1", "3"), momentum=0.9, settings=options)
    scheduler = follow_rate(driven)
    # The second slot first: their order in the optimizer is that in which they joined.
    driven.step(idle)
    for slot in ("3", "1"):
        driven.garden.germinate(slot, MLP)
        driven.until(lambda slot=slot: driven.garden.slots[slot] is Stage.FOSSILIZED)
    sizes = [len(group["params"]) for group in driven.optimizer.param_groups]
    resumed = Driven(("1", "3"), momentum=0.9, settings=options)
    again = follow_rate(resumed)
    resumed.resume(driven.saved())
    assert [len(group["params"]) for group in resumed.optimizer.param_groups] == sizes
    assert_same_life(lived(resumed, 5), lived(driven, 5))
    if scheduled:
        scheduler.step()
        again.step()
        assert_same_life(lived(resumed, 5), lived(driven, 5))


def test_a_pause_and_requests_and_ids_survive():
    driven = settled_in(Stage.BLENDING, slots=("1", "3", "0"))
    driven.step(lambda proposal: said(Action.PAUSE, "s", reason="a_rule"))
    driven.garden.cull("s")
    driven.garden.germinate("3", MLP, "t")
    resumed = another(driven).resume(driven.saved())
    with pytest.raises(GardenError, match="not used before"):
        resumed.garden.germinate("0", MLP, "t")
    with pytest.raises(GardenError, match="it has seed 't'"):
        resumed.garden.germinate("3", MLP)
    for each in (driven, resumed):
        each.step(lambda proposal: said(Action.PAUSE, "s", reason="a_rule"))
        # The one is held by the pause, the other is not.
        assert set(each.garden.stages) == {"s", "t"}
    assert_same_life(lived(resumed, 20), lived(driven, 20))
    assert "s" not in resumed.garden.stages
    assert len(resumed.told(events.CULLED)) == 1


def test_what_was_told_of_a_gate_is_not_told_again():
    driven = settled_in(Stage.TRAINING, gradient_ratio_max=1.0, patience_steps=100)
    driven.until(lambda: "is shut" in " ".join(driven.told(events.GATE)))
    driven.events.clear()
    resumed = another(driven, gradient_ratio_max=1.0, patience_steps=100)
    resumed.resume(driven.saved())
    assert_same_life(lived(resumed, 5), lived(driven, 5))
    assert resumed.told(events.GATE) == driven.told(events.GATE)


def test_a_kernel_on_its_way_is_fetched_again(monkeypatch):
    never = Fetch(MLP, 1e9, lambda: 0)
    driven = Driven(("1",), settings=QUICK)
    driven.step()
    with monkeypatch.context() as patched:
        patched.setattr(AtOnce, "request", lambda *_: never)
        driven.garden.germinate("1", MLP, "s")
        for _ in range(3):
            driven.step()
    assert not driven.garden.slot("1").hook.occupied
    resumed = Driven(("1",), settings=QUICK).resume(driven.saved())
    assert resumed.garden.stages == {"s": Stage.GERMINATED}
    resumed.until(lambda: resumed.garden.slots["1"] is Stage.FOSSILIZED)
    moves = resumed.told(events.STAGE_CHANGED)
    assert len(moves) == len(set(moves)) == 5
    assert set(resumed.garden.stages) == {"s"}


def test_a_kernel_that_had_failed_is_not_tried_again(monkeypatch):
    driven = Driven(("1",), settings=QUICK)
    driven.step()
    with monkeypatch.context() as patched:
        patched.setattr(AtOnce, "reason", "raised ValueError: no")
        driven.garden.germinate("1", MLP, "s")
        driven.step(idle)
    resumed = Driven(("1",), settings=QUICK).resume(driven.saved())
    resumed.step()
    assert resumed.garden.slots["1"] is Stage.EMBARGOED
    assert "raised ValueError: no" in resumed.told(events.CULLED)[0]


def test_seeds_of_after_a_restart_are_those_that_would_have_been():
    """They are made from the run's seed, whatever a new process's generator starts from."""
    driven = settled_in(Stage.FOSSILIZED)
    saved = driven.saved()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4711)
        resumed = another(driven).resume(saved)
        after = lived(resumed, 30)
    assert_same_life(after, lived(driven, 30))
    assert len(resumed.garden.stages) == 2


def test_a_seed_that_is_not_called_any_more_stays_so():
    driven = settled_in(Stage.BLENDING)
    driven.garden.slot("1").hook.banned = ALTERED
    resumed = another(driven).resume(driven.saved())
    assert_same_life(lived(resumed, 5), lived(driven, 5))
    assert "changed its input" in resumed.told(events.CULLED)[0]


def test_the_random_numbers_of_the_run_are_left_alone():
    driven = settled_in(Stage.BLENDING)
    saved = driven.saved()
    before = torch.get_rng_state()
    another(driven).resume(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_that_was_loaded_shares_nothing_with_the_garden():
    driven = settled_in(Stage.TRAINING, training_steps=100)
    state = torch.load(io.BytesIO(driven.saved()), weights_only=True)["garden"]
    kept = copy.deepcopy(state)
    resumed = another(driven, training_steps=100)
    resumed.garden.load_state_dict(state)
    lived(resumed, 5)
    assert repr(state) == repr(kept)


def test_a_seed_comes_back_to_the_dtype_it_had():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
        gardens = [Garden(model, ["1"], settings=EsperSettings().changed(**QUICK))]
        model(torch.zeros(2, 4, dtype=torch.float64)).sum().backward()
        gardens[0].germinate("1", MLP, "s")
        gardens[0].finalize(1, [float("nan")] * len(STEP_KEYS))
        gardens[0].finalize(2, [float("nan")] * len(STEP_KEYS))
        hook = gardens[0].slot("1").hook
        hook.seed.double()
        state = gardens[0].state_dict()
        gardens.append(Garden(model, ["1"], settings=EsperSettings().changed(**QUICK)))
    gardens[1].load_state_dict(state)
    assert {p.dtype for p in gardens[1].slot("1").hook.parameters()} == {torch.float64}
