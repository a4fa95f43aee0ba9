"""A kernel that missed its budget gets one more try, and no step waits for either."""

import threading
import time
from unittest.mock import patch

import pytest
import torch
from kasmina.driven import Driven, idle
from torch import nn

from esper_otel.kasmina import blueprints
from esper_otel.kasmina.kernels import KernelFetcher
from esper_otel.leyline import events
from esper_otel.leyline.stages import Stage
from testkit.patience import PATIENCE_S


class Workshop:
    """A fetcher whose clock stands still, and a blueprint that waits to be let through."""

    def __init__(self, holds):
        self.now = 0
        self.gate = threading.Event()
        self.begun = 0
        self._holds = holds
        self._lock = threading.Lock()

    def fetcher(self, budget_ms, compiler=None):
        return KernelFetcher(10.0, compiler=compiler, clock=lambda: self.now)

    def build(self, shape):
        with self._lock:
            self.begun += 1
            held = self.begun <= self._holds
        if held:
            self.gate.wait(60)
        return nn.Linear(shape[-1], shape[-1])


@pytest.fixture
def planted(monkeypatch):
    """A driven run whose kernels are held up so many times, and its workshop."""
    made = []

    def plant(holds):
        shop = Workshop(holds)
        held = blueprints.Blueprint("held", shop.build, frozenset({2}))
        monkeypatch.setitem(blueprints._registry, "held", held)
        with patch("kasmina.driven.AtOnce", shop.fetcher):
            driven = Driven(("1",))
        made.append((driven, shop))
        driven.step(idle)
        driven.garden.germinate("1", "held", "s")
        driven.step(idle)
        return driven, shop

    yield plant
    for driven, shop in made:
        shop.gate.set()
        driven.garden.close()


def until(condition):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def late(driven, shop, attempt):
    """A step that finds the fetch over its budget, while its thread is held up."""
    until(lambda: shop.begun == attempt)
    shop.now += 11_000_000
    driven.step(idle)


def test_the_second_try_may_succeed_and_the_event_counts_it(planted):
    driven, shop = planted(holds=1)
    late(driven, shop, 1)
    (event,) = [event for event in driven.events if event.name == events.RETRIED]
    assert event.attributes["esper.attempts"] == 2
    assert event.attributes["esper.reason"] == "took longer than 10 ms"
    assert driven.garden.stages == {"s": Stage.GERMINATED}
    slot = driven.garden.slot("1")
    until(lambda: slot.kernel_fetch is not None and slot.kernel_fetch.done())
    driven.step(idle)
    assert slot.hook.occupied
    assert driven.told(events.FALLBACK) == []


def test_there_is_no_third(planted):
    driven, shop = planted(holds=9)
    late(driven, shop, 1)
    late(driven, shop, 2)
    (event,) = [event for event in driven.events if event.name == events.FALLBACK]
    assert event.attributes["esper.attempts"] == 2
    assert len(driven.told(events.RETRIED)) == 1
    driven.step()
    assert driven.garden.slots["1"] is Stage.EMBARGOED
    assert shop.begun == 2


def test_what_comes_of_the_first_try_in_the_end_is_thrown_away(planted):
    driven, shop = planted(holds=1)
    late(driven, shop, 1)
    slot = driven.garden.slot("1")
    until(slot.kernel_fetch.done)
    driven.step(idle)
    module = slot.hook.seed
    shop.gate.set()
    for _ in range(3):
        driven.step(idle)
    assert slot.hook.seed is module


def is_free(driven):
    """Whether its slot is, a step later: the thread of a culled seed may not have ended yet."""
    driven.step(idle)
    return driven.garden.slots["1"] is Stage.DORMANT


def is_there(driven):
    """Whether the kernel is in its slot, a step later."""
    driven.step(idle)
    return driven.garden.slot("1").hook.occupied


def test_nothing_keeps_the_kernel_of_a_culled_seed(planted):
    driven, _ = planted(holds=0)
    until(lambda: is_there(driven))
    driven.garden.cull("s")
    until(lambda: is_free(driven))


def test_a_kernel_that_fails_of_itself_is_not_tried_again(planted, monkeypatch):
    driven, _ = planted(holds=0)
    slot = driven.garden.slot("1")
    driven.garden.cull("s")
    until(lambda: is_free(driven))

    def broken(shape):
        raise RuntimeError("no such thing")

    unfit = blueprints.Blueprint("broken", broken, frozenset({2}))
    monkeypatch.setitem(blueprints._registry, "broken", unfit)
    driven.garden.germinate("1", "broken", "t")
    driven.step(idle)
    until(lambda: slot.kernel_fetch is None or slot.kernel_fetch.done())  # taken already, or so
    driven.step(idle)
    assert "raised RuntimeError: no such thing" in driven.told(events.FALLBACK)[-1]
    assert driven.told(events.RETRIED) == []


def test_a_run_s_random_numbers_do_not_notice(planted):
    before = torch.get_rng_state()
    driven, shop = planted(holds=1)
    late(driven, shop, 1)
    assert torch.equal(torch.get_rng_state(), before)
