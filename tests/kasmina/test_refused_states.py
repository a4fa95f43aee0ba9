"""A state that does not fit its garden is refused with the reason, and changes nothing."""

import io
from functools import cache
from unittest.mock import patch

import pytest
import torch
from kasmina.cut_runs import MADE, assert_same_life, lived, settled_in
from kasmina.driven import MLP, QUICK, AtOnce, Driven, host
from kasmina.recorded import Recorded

from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings


def set_in(state, path, value):
    *way, last = path
    for key in way:
        state = state[key]
    state[last] = value


SEED = ("slots", "1", "seed")
WRONG = [
    ((), None, "expected the result of garden.state_dict\\(\\), got a NoneType"),
    (("version",), 7, "version=7: expected 1"),
    (("slots",), {}, "slots : expected 1, 3"),
    (("step",), "four", "Expected `int`, got `str` - at `\\$.step`"),
    (("colour",), 1, "unknown field `colour`"),
    (("slots", "1", "stage"), "ASLEEP", "slot '1', seed 's': stage='ASLEEP': expected one"),
    (("slots", "1", "stage"), "DORMANT", "stage=DORMANT: expected no seed"),
    (("slots", "1", "activation"), None, "activation=None: expected that of its seed"),
    (("slots", "1", "activation", "dtype"), "float7", "dtype='float7': expected"),
    ((*SEED, "blueprint"), "oak", "slot '1': blueprint 'oak': expected one of residual_mlp"),
    (
        (*SEED, "blueprint"),
        "low_rank",
        "slot '1', seed 's': .*size mismatch for change.0.weight",
    ),
    ((*SEED, "kernel"), None, "kernel=None: expected one in stage FOSSILIZED"),
    ((*SEED, "kernel", "alpha"), 1.5, "alpha=1.5: expected 0 to 1"),
    ((*SEED, "kernel", "blending"), "milk", "blending='milk': expected one of convex"),
    ((*SEED, "kernel", "joined"), [99], "joined=\\[99\\]: expected numbers below 6"),
    ((*SEED, "kernel", "group"), 3, "in group 3 after 0 parameters, it has no there"),
    ((*SEED, "course"), ("zigzag", 4, 1.0), "schedule='zigzag': expected one of linear"),
    (("recorder",), {"step": "x"}, "recorder: "),
    (
        ("requests",),
        [{"operation": "germinate", "slot": "9", "seed_id": "q", "blueprint": MLP}],
        "slot '9': expected one of 1, 3",
    ),
    (
        ("requests",),
        [{"operation": "blend", "slot": "3", "seed_id": "q", "blueprint": ""}],
        "request 'blend': expected germinate or cull",
    ),
]


@cache
def a_fossil():
    return settled_in(Stage.FOSSILIZED).saved()


@pytest.mark.parametrize(("path", "value", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_a_state_that_does_not_fit_names_what_and_leaves_all_as_it_was(path, value, words):
    saved = a_fossil()
    state = torch.load(io.BytesIO(saved), weights_only=True)["garden"]
    if path:
        set_in(state, path, value)
    else:
        state = value
    driven = Driven(**MADE)
    driven.garden._recorder = Recorded().recorder
    driven.garden.set_host_optimizer(driven.optimizer)
    before = repr(driven.garden.state_dict())
    with pytest.raises(GardenError, match=words):
        driven.garden.load_state_dict(state)
    assert repr(driven.garden.state_dict()) == before
    assert [len(group["params"]) for group in driven.optimizer.param_groups] == [6]
    # And the right one is still welcome.
    driven.resume(saved)
    assert driven.garden.stages == {"s": Stage.FOSSILIZED}


def test_a_state_of_other_slots_is_refused():
    saved = settled_in(Stage.TRAINING).saved()
    with pytest.raises(GardenError, match="slots 1, 3: expected 1, 2"):
        Driven(("1", "2"), momentum=0.9).resume(saved)


def test_the_optimizer_s_state_before_the_garden_s_is_told_the_order():
    state = torch.load(io.BytesIO(settled_in(Stage.FOSSILIZED).saved()), weights_only=True)
    driven = Driven(**MADE)
    driven.garden.set_host_optimizer(driven.optimizer)
    with pytest.raises(GardenError, match=r"has 12 parameters, the optimizer 6.*garden\.load"):
        driven.optimizer.load_state_dict(state["optimizer"])
    driven.garden.uproot()
    with pytest.raises(ValueError, match="parameter groups"):
        driven.optimizer.load_state_dict(state["optimizer"])  # torch's own word again


def test_a_fossil_needs_to_know_its_optimizer():
    state = torch.load(io.BytesIO(settled_in(Stage.FOSSILIZED).saved()), weights_only=True)
    driven = Driven(**MADE)
    with pytest.raises(GardenError, match=r"plant\(\.\.\., optimizer=optimizer\)"):
        driven.garden.load_state_dict(state["garden"])
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    garden = Garden(model, ["1", "3"], optimizer=optimizer)
    garden.load_state_dict(state["garden"])
    assert len(optimizer.param_groups) == 2
    garden.uproot()


def test_a_garden_in_use_takes_no_state_and_a_new_one_in_its_place_does():
    driven = settled_in(Stage.FOSSILIZED)
    saved = driven.saved()
    with pytest.raises(GardenError, match="slot '1' is in use"):
        driven.garden.load_state_dict(driven.garden.state_dict())
    uncut = lived(driven, 10)
    driven.garden.uproot()
    with pytest.raises(GardenError, match="uprooted"):
        driven.garden.state_dict()
    with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
        driven.garden = Garden(
            driven.host,
            ["1", "3"],
            settings=EsperSettings().changed(**{**QUICK, **MADE["settings"]}),
        )
    assert_same_life(lived(driven.resume(saved), 10), uncut)


def test_an_optimizer_of_another_kind_is_refused():
    saved = settled_in(Stage.TRAINING).saved()

    def made(parameters, rate):
        half = len(parameters) // 2
        return torch.optim.SGD(
            [{"params": parameters[:half]}, {"params": parameters[half:]}], lr=rate
        )

    with pytest.raises(GardenError, match=r"slot '1', seed 's': .*parameter groups"):
        Driven(make_optimizer=made, **MADE).resume(saved)
