"""What goes wrong with a seed ends the seed, and never the run."""

import gc
import weakref
from math import isfinite

import torch
from kasmina.driven import MLP, AtOnce, Driven, grown_to, host, idle, paused
from torch import nn

from esper_otel.kasmina import isolation
from esper_otel.kasmina.garden import Garden
from esper_otel.leyline import events
from esper_otel.leyline.decisions import SeedOperation
from esper_otel.leyline.stages import Stage


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


def test_violations_that_are_not_in_a_row_do_not_open_the_breaker(monkeypatch):
    driven = grown_to(Stage.TRAINING, settings={"training_steps": 100})
    for _ in range(4):
        with monkeypatch.context() as patched:
            patched.setattr(isolation, "cut", lambda activation: activation)
            driven.step()
        driven.step()
    assert driven.garden.stages == {"s": Stage.TRAINING}
    assert driven.step()["s"]["kasmina.seed.isolation_violations"] == 4.0


def test_a_kernel_that_fails_is_identity_says_so_and_is_culled(monkeypatch):
    driven = Driven()
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


def test_of_a_seed_that_is_culled_half_blended_nothing_is_left():
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
