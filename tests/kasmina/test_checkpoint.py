"""A run that is cut and goes on from a checkpoint is the run that was not cut, to the bit."""

import copy
import io
import os
import sys
from functools import cache
from unittest.mock import patch

import pytest
import torch
from kasmina.driven import MLP, QUICK, AtOnce, Driven, agreed, host, idle, said
from torch import nn

from esper_otel import process
from esper_otel import run as runs
from esper_otel.kasmina.garden import Garden, GardenError
from esper_otel.kasmina.hook import ALTERED
from esper_otel.kasmina.kernels import Fetch
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Action
from esper_otel.leyline.frames import present
from esper_otel.leyline.metrics import STEP_KEYS
from esper_otel.leyline.stages import Stage
from esper_otel.settings import EsperSettings
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import RateFactor, Responses
from testkit.fork_server import fork_server

NOT_OF_THE_RUN = "kasmina.seed.last_kernel_latency_ms"
"""Measured with a clock, so no two runs have the same."""

MADE = {"momentum": 0.9, "settings": {"blending_steps": 8, "isolation_every": 3}}


def grown_to(stage, slots=("1", "3"), **settings):
    """A run whose first seed came to ``stage`` and stayed for a step."""
    driven = Driven(slots, momentum=0.9, settings={**MADE["settings"], **settings})
    driven.step()
    driven.garden.germinate("1", MLP, "s")
    if stage is Stage.EMBARGOED:
        driven.until(lambda: driven.garden.stages.get("s") is Stage.TRAINING)
        driven.garden.cull("s")
    decide = idle if stage is Stage.GERMINATED else agreed
    driven.until(lambda: driven.garden.slots["1"] is stage, decide)
    driven.step(idle)
    return driven


def another(driven, **settings):
    """What a fresh process would make, before it goes on."""
    return Driven(
        tuple(driven.garden.slots), momentum=0.9, settings={**MADE["settings"], **settings}
    )


def lived(driven, steps, decide=agreed):
    """Everything that there is to see of the next ``steps`` steps."""
    seen = []
    for _ in range(steps):
        rows = driven.step(decide)
        for row in rows.values():
            row.pop(NOT_OF_THE_RUN, None)
        seen.append((driven.losses[-1], rows, driven.frame.proposal, driven.garden.slots))
    weights = [each.detach().clone() for each in driven.host.parameters()]
    weights += [
        each.detach().clone()
        for path in driven.garden.slots
        for each in driven.garden.slot(path).hook.parameters()
    ]
    return seen, weights


def assert_same_life(one, other):
    (seen, weights), (seen_after, weights_after) = one, other
    assert seen == seen_after
    assert len(weights) == len(weights_after)
    for a, b in zip(weights, weights_after, strict=True):
        assert torch.equal(a, b)


# What the bits are.


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
def test_cut_and_resumed_is_as_if_it_had_not_been(stage, blending):
    driven = grown_to(stage, blending=blending)
    resumed = another(driven, blending=blending).resume(driven.saved())
    assert resumed.garden.slots == driven.garden.slots
    assert resumed.garden.stages == driven.garden.stages
    uncut = lived(driven, 40)
    assert_same_life(lived(resumed, 40), uncut)
    assert Stage.FOSSILIZED in uncut[0][-1][-1].values()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_cut_at_every_step_of_blending(schedule):
    driven = grown_to(Stage.BLENDING, alpha_schedule=schedule)
    while driven.garden.slots["1"] is Stage.BLENDING:
        resumed = another(driven, alpha_schedule=schedule).resume(driven.saved())
        beside = copy.deepcopy(driven.losses)
        assert_same_life(lived(resumed, 3), lived(driven, 3))
        assert driven.losses[: len(beside)] == beside


def test_a_seed_blends_by_the_course_it_began_whatever_the_settings_are_now():
    driven = grown_to(Stage.BLENDING)
    changed = another(driven, blending_steps=2, alpha_schedule="linear", blending="residual")
    uncut = lived(driven, 8)
    assert_same_life(
        lived(changed.resume(grown_to(Stage.BLENDING).saved()), 8),
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


def test_a_pause_requests_and_ids_survive():
    driven = grown_to(Stage.BLENDING, slots=("1", "3", "0"))
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
    driven = grown_to(Stage.TRAINING, gradient_ratio_max=1.0, patience_steps=100)
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
    driven = grown_to(Stage.FOSSILIZED)
    saved = driven.saved()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4711)
        resumed = another(driven).resume(saved)
        after = lived(resumed, 30)
    assert_same_life(after, lived(driven, 30))
    assert len(resumed.garden.stages) == 2


def test_a_seed_that_is_not_called_any_more_stays_so():
    driven = grown_to(Stage.BLENDING)
    driven.garden.slot("1").hook.banned = ALTERED
    resumed = another(driven).resume(driven.saved())
    assert_same_life(lived(resumed, 5), lived(driven, 5))
    assert "changed its input" in resumed.told(events.CULLED)[0]


def test_the_random_numbers_of_the_run_are_left_alone():
    driven = grown_to(Stage.BLENDING)
    saved = driven.saved()
    before = torch.get_rng_state()
    another(driven).resume(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_that_was_loaded_shares_nothing_with_the_garden():
    driven = grown_to(Stage.TRAINING, training_steps=100)
    state = torch.load(io.BytesIO(driven.saved()), weights_only=True)["garden"]
    kept = copy.deepcopy(state)
    resumed = another(driven, training_steps=100)
    resumed.garden.load_state_dict(state)
    lived(resumed, 5)
    assert repr(state) == repr(kept)


# The same with a recorder, whose statistics the decisions depend on.


class Recorded(Driven):
    def __init__(self):
        super().__init__(garden=False, momentum=0.9)
        self.rows = []
        rate = RateFactor(minimum=0.01, maximum=1.0, release_steps=200)
        self.recorder = Recorder(self, run="r", responses=Responses(rate, enforce=False))
        settings = EsperSettings().changed(
            **{**QUICK, "growth": "autonomous", "plateau_steps": 6, "loss_rise_max": 0.5}
        )
        with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
            self.garden = Garden(
                self.host, ["1", "3"], settings=settings, recorder=self.recorder
            )
        self.recorder.attach_garden(self.garden)

    def frame(self, time_unix_nano, row, seeds=()):
        values = present(STEP_KEYS, row)
        self.rows.append(
            {k: v for k, v in values.items() if "_ms" not in k and "per_s" not in k}
        )

    def timeline(self, timeline):
        pass

    def event(self, event):
        self.events.append(event)

    def step(self, decide=None, enforced=True):
        self.recorder.backward_begins()
        self.train()
        self.recorder.backward_ends(self.losses[-1])
        self.recorder.clipped(1.0 + self.losses[-1])
        self.recorder.optimizer_ends()
        self.recorder.optimizer = self.optimizer
        self.recorder.end_step()


@pytest.mark.parametrize("cut", [1, 12, 18, 25, 40])
def test_with_its_recorder_a_run_grows_on_the_same_steps(cut):
    driven = Recorded()
    for _ in range(cut):
        driven.step()
    resumed = Recorded().resume(driven.saved())
    driven.rows.clear()
    for each in (driven, resumed):
        each.events.clear()
        for _ in range(40):
            each.step()
    assert resumed.rows == driven.rows
    assert resumed.rows[0]["step"] == cut + 1
    assert "loss_delta" in resumed.rows[0]
    told = [event.text for event in driven.events if event.name == events.STAGE_CHANGED]
    assert resumed.told(events.STAGE_CHANGED) == told
    assert told


def test_a_process_that_has_counted_further_counts_on():
    driven, other = Recorded(), Recorded()
    for _ in range(3):
        driven.step()
    for _ in range(5):
        other.step()
    other.resume(driven.saved())
    other.step()
    assert other.rows[-1]["step"] == 6


# And with a whole run, which knows its optimizer from the beginning.


class Nowhere:
    """A stream that leads to nowhere."""

    def __init__(self, *_, **__):
        pass

    def start(self):
        pass

    def frame(self, *_, **__):
        pass

    timeline = event = configure = follow = frame

    def close(self, timeout_s=None):
        return self


def a_run(monkeypatch):
    monkeypatch.setattr(runs, "Stream", Nowhere)
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    run = process.start(optimizer, mode="off")
    with patch("esper_otel.kasmina.garden.KernelFetcher", AtOnce):
        run.plant(model, ["1"], **{**QUICK, "growth": "autonomous", "loss_rise_max": 100.0})
    return run, model, optimizer


def train(run, model, optimizer, steps):
    losses = []
    for step in range(steps):
        x = torch.linspace(-1.0, 1.0, 24).view(6, 4) * (1 + step % 3)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        loss.backward()
        run.report(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_three_lines_of_the_documentation_resume_a_run(monkeypatch):
    run, model, optimizer = a_run(monkeypatch)
    while run.garden.slots["1"] is not Stage.FOSSILIZED:
        train(run, model, optimizer, 3)
        assert run._recorder.step < 500
    state = {"model": model, "optimizer": optimizer, "garden": run.garden}
    file = io.BytesIO()
    torch.save({name: each.state_dict() for name, each in state.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    step = run._recorder.step
    uncut = train(run, model, optimizer, 9)
    run.close()

    run, model, optimizer = a_run(monkeypatch)
    model.load_state_dict(saved["model"])
    run.garden.load_state_dict(saved["garden"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(run, model, optimizer, 9) == uncut
    assert run._recorder.step == step + 9
    run.close()


# A process of its own.

RESUME = """
import sys, torch
from kasmina.driven import Driven
from kasmina.test_checkpoint import MADE, lived
torch.manual_seed(99)
driven = Driven(**MADE).resume(open(sys.argv[1], "rb").read())
_, weights = lived(driven, 30)
torch.save({"losses": driven.losses, "weights": weights,
            "stages": {k: v.name for k, v in driven.garden.slots.items()}}, sys.argv[2])
"""


def test_another_process_goes_on_to_the_bit(tmp_path):
    driven = grown_to(Stage.BLENDING)
    driven.step(idle)
    assert 0.0 < driven.garden.slot("1").hook.alpha < 1.0
    (tmp_path / "run.pt").write_bytes(driven.saved())
    driven.losses.clear()
    _, weights = lived(driven, 30)
    done = fork_server().run(
        [sys.executable, "-c", RESUME, tmp_path / "run.pt", tmp_path / "end.pt"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert end["losses"] == driven.losses
    assert end["stages"] == {k: v.name for k, v in driven.garden.slots.items()}
    for a, b in zip(end["weights"], weights, strict=True):
        assert torch.equal(a, b)


# What does not fit.


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
    return grown_to(Stage.FOSSILIZED).saved()


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


def test_other_slots_are_not_the_same_garden():
    saved = grown_to(Stage.TRAINING).saved()
    with pytest.raises(GardenError, match="slots 1, 3: expected 1, 2"):
        Driven(("1", "2"), momentum=0.9).resume(saved)


def test_the_optimizer_s_state_before_the_garden_s_is_told_the_order():
    state = torch.load(io.BytesIO(grown_to(Stage.FOSSILIZED).saved()), weights_only=True)
    driven = Driven(**MADE)
    driven.garden.set_host_optimizer(driven.optimizer)
    with pytest.raises(GardenError, match=r"has 12 parameters, the optimizer 6.*garden\.load"):
        driven.optimizer.load_state_dict(state["optimizer"])
    driven.garden.uproot()
    with pytest.raises(ValueError, match="parameter groups"):
        driven.optimizer.load_state_dict(state["optimizer"])  # torch's own word again


def test_a_fossil_needs_to_know_its_optimizer():
    state = torch.load(io.BytesIO(grown_to(Stage.FOSSILIZED).saved()), weights_only=True)
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
    driven = grown_to(Stage.FOSSILIZED)
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


def test_an_optimizer_of_another_kind_is_told_of():
    saved = grown_to(Stage.TRAINING).saved()

    def made(parameters, rate):
        half = len(parameters) // 2
        return torch.optim.SGD(
            [{"params": parameters[:half]}, {"params": parameters[half:]}], lr=rate
        )

    with pytest.raises(GardenError, match=r"slot '1', seed 's': .*parameter groups"):
        Driven(make_optimizer=made, **MADE).resume(saved)


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
