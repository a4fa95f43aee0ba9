"""After a cull a slot lies fallow by steps and by a clock, and both can be turned."""

import pytest
from kasmina.driven import MLP, Driven, idle, paused

from esper_otel.kasmina.lifecycle import Countdown
from esper_otel.leyline.stages import Stage


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def culled(clock, steps=2, seconds=60.0):
    driven = Driven(
        ("1",), settings={"embargo_steps": steps, "embargo_s": seconds}, clock=clock
    )
    driven.step(idle)
    driven.garden.germinate("1", MLP, "s")
    driven.step(idle)
    driven.garden.cull("s")
    driven.step(idle)
    assert driven.garden.slots == {"1": Stage.EMBARGOED}
    return driven


def steps_fallow(driven, steps, decide=idle):
    """How many of so many steps end with the slot still fallow."""
    fallow = 0
    for _ in range(steps):
        driven.step(decide)
        fallow += driven.garden.slots["1"] is not Stage.DORMANT
    return fallow


def test_many_steps_are_not_enough_while_the_clock_stands():
    clock = Clock()
    driven = culled(clock)
    assert steps_fallow(driven, 20) == 20
    clock.now = 59.9
    assert steps_fallow(driven, 1) == 1
    clock.now = 60.0
    assert steps_fallow(driven, 1) == 0


def test_much_time_is_not_enough_without_the_steps():
    clock = Clock()
    driven = culled(clock, steps=5)
    clock.now = 1e6
    assert steps_fallow(driven, 5) == 3  # the step of the cull was one


def test_without_seconds_the_clock_does_not_matter():
    assert steps_fallow(culled(Clock(), seconds=0.0), 5) == 0


def test_the_clock_stands_still_with_the_steps_of_a_pause():
    clock = Clock()
    driven = culled(clock)
    driven.step(paused())
    for _ in range(10):
        clock.now += 60.0
        driven.step(paused())
    clock.now += 60.0
    driven.step(idle)  # still a step of the pause; it ends here
    assert driven.garden.slots["1"] is Stage.EMBARGOED
    clock.now += 60.0
    driven.step(idle)
    assert driven.garden.slots["1"] is Stage.DORMANT


@pytest.mark.parametrize("started", [0.0, 1e9])
def test_a_checkpoint_has_what_is_left_and_no_mark_of_a_clock_that_is_gone(started):
    clock = Clock(500.0)
    driven = culled(clock)
    clock.now += 45.0
    driven.step(idle)
    assert driven.garden.state_dict()["slots"]["1"]["embargo_s"] == 15.0
    another = Clock(started)
    resumed = Driven(
        ("1",), settings={"embargo_steps": 2, "embargo_s": 60.0}, clock=another
    ).resume(driven.saved())
    another.now += 14.5
    assert steps_fallow(resumed, 3) == 3
    another.now += 0.5
    assert steps_fallow(resumed, 1) == 0


def test_a_countdown_counts_what_passes_unless_frozen():
    clock = Clock(7.0)
    countdown = Countdown(10.0, clock)
    for passed, frozen, left in [(3.0, False, 7.0), (9.0, True, 7.0), (8.0, False, 0.0)]:
        clock.now += passed
        countdown.tick(frozen)
        assert countdown.left == left
    assert countdown.over
    assert Countdown(0.0, clock).over


def test_after_a_cull_the_slot_lies_fallow_by_the_clock_of_steps():
    driven = Driven()
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
