"""What a device computes is known late; the garden waits for none of it.

There is no device here. The slot is made to think that its values lie on one, readings come
a step late, and every call that would wait for a tensor raises.
"""

import pytest
import torch
from kasmina.driven import Driven, idle

from esper_otel.kasmina import hook as hooks
from esper_otel.kasmina.seed import MAX_PENDING, Seed
from esper_otel.kasmina.slot import IN_A_ROW
from esper_otel.leyline import events
from esper_otel.leyline.frames import known
from esper_otel.leyline.stages import Stage

WAITING = ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy")


class Device:
    """Delivers what was asked of it ``late`` steps later; None: never."""

    def __init__(self, late=1):
        self.late, self.steps = late, 0

    def read(self, tensor):
        return Late(self, tensor.detach().clone())


class Late:
    def __init__(self, device, tensor):
        self.device, self.tensor, self.asked = device, tensor, device.steps

    def ready(self):
        late = self.device.late
        return late is not None and self.device.steps - self.asked >= late

    def value(self):
        # As a ScalarReader's: None while it is not here.
        return self.tensor.numpy().item() if self.ready() else None


class OnDevice(Driven):
    def __init__(self, monkeypatch, late=1, **settings):
        self.device = Device(late)
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(hooks, "_is_known_at_once", lambda value: False)
        options = {"blending_steps": 100, "isolation_every": 0, **settings}
        super().__init__(("1",), settings=options, read=self.device.read)
        garden, finalize = self.garden, self.garden.finalize
        garden.finalize = lambda *given: self.without_waiting(finalize, *given)

    def without_waiting(self, finalize, *given):
        def waits(*_):
            raise AssertionError("it waits for a device")

        with self.monkeypatch.context() as patched:
            # What has arrived lies in host memory and may be read.
            patched.setattr(Late, "value", self.arrived(Late.value))
            for name in WAITING:
                patched.setattr(torch.Tensor, name, waits)
            return finalize(*given)

    def arrived(self, value):
        numpy, item = torch.Tensor.numpy, torch.Tensor.item

        def arrived(reading):
            with self.monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "numpy", numpy)
                patched.setattr(torch.Tensor, "item", item)
                return value(reading)

        return arrived

    def step(self, *given, **named):
        self.device.steps += 1
        return super().step(*given, **named)

    def grown(self):
        self.step(idle)
        self.garden.germinate("1", "residual_mlp", "s")
        self.until(lambda: self.garden.stages.get("s") is Stage.BLENDING)
        self.step(idle)
        self.step(idle)
        return self

    def break_seed(self):
        with torch.no_grad():
            for each in self.garden.slot("1").hook.parameters():
                each.fill_(float("nan"))


def test_a_seed_that_is_sound_grows_though_everything_is_known_late(monkeypatch):
    driven = OnDevice(monkeypatch, blending_steps=4)
    driven.until(lambda: driven.garden.slots["1"] is Stage.FOSSILIZED)
    assert driven.told(events.FALLBACK) == []


@pytest.mark.parametrize("late", [1, 2, 5])
def test_a_value_that_is_not_finite_is_told_late_and_ends_the_seed_all_the_same(
    monkeypatch, late
):
    driven = OnDevice(monkeypatch, late).grown()
    driven.break_seed()
    flags = []
    for _ in range(late + IN_A_ROW):
        row = driven.step(idle).get("s", {})
        flags.append(row.get("kasmina.seed.fallback_used"))
    assert flags == [0.0] * late + [1.0] * IN_A_ROW
    assert "not finite" in driven.told(events.FALLBACK)[0]
    assert len(driven.told(events.FALLBACK)) == 1
    assert driven.garden.slot("1").seed.faults_in_a_row == IN_A_ROW
    driven.step()
    driven.step()
    assert driven.garden.slots["1"] is Stage.EMBARGOED
    assert all(loss == loss for loss in driven.losses)


def test_what_never_arrives_is_neither_good_nor_bad(monkeypatch):
    driven = OnDevice(monkeypatch).grown()
    driven.break_seed()
    driven.step(idle)
    driven.step(idle)
    driven.device.late = None
    for _ in range(3 * MAX_PENDING):
        driven.step(idle)
    seed = driven.garden.slot("1").seed
    assert seed.faults_in_a_row == 1
    assert len(seed._finite_checks) == MAX_PENDING


@pytest.mark.parametrize("late", [0, 1, 2, 5])
def test_statistics_of_every_step_are_told_late_and_not_lost(monkeypatch, late):
    driven = OnDevice(monkeypatch, late, isolation_every=1).grown()
    for _ in range(late):
        driven.step(idle)
    norm = "kasmina.seed.isolation.seed_norm"
    taken = []
    statistics = hooks.SlotHook.statistics
    monkeypatch.setattr(
        hooks.SlotHook, "statistics", lambda slot: taken.append(statistics(slot)) or taken[-1]
    )
    told = [driven.step(idle)["s"].get(norm) for _ in range(8)]
    assert told[late:] == [each.seed_norm.item() for each in taken[: 8 - late]]
    assert None not in told


def test_a_good_value_in_between_begins_the_count_anew(monkeypatch):
    driven = OnDevice(monkeypatch).grown()
    weights = [each.detach().clone() for each in driven.garden.slot("1").hook.parameters()]
    for _ in range(3):
        driven.break_seed()
        driven.step(idle)
        with torch.no_grad():
            hook = driven.garden.slot("1").hook
            for each, good in zip(hook.parameters(), weights, strict=True):
                each.copy_(good)
        driven.step(idle)
        assert driven.garden.slot("1").seed.faults_in_a_row == 1
    driven.step(idle)
    assert driven.garden.slot("1").seed.faults_in_a_row == 0
    assert driven.garden.stages == {"s": Stage.BLENDING}


def test_a_checkpoint_asks_again_what_a_device_has_not_said(monkeypatch):
    driven = OnDevice(monkeypatch)
    driven.step(idle)
    driven.garden.germinate("1", "residual_mlp", "s")
    driven.device.late = None
    driven.step(idle)
    resumed = OnDevice(monkeypatch).resume(driven.saved())
    resumed.until(lambda: resumed.garden.stages.get("s") is Stage.BLENDING)


def test_a_reading_that_is_lost_says_nothing():
    seed = Seed("s", "residual_mlp", 0)
    seed.add_finite_check(float("nan"))
    assert seed.saw_nonfinite() is None
    for number, verdict in [(1.0, False), (0.0, True)]:
        seed.add_finite_check(number)
        assert seed.saw_nonfinite() is verdict
    assert known(Device(None).read(torch.ones(()))) != known(1.0)
